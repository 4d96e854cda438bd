"""Cross-layer transcoders against plain loops over layers and latents."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from microtome.common.errors import ConfigError, InputError
from microtome.dictionary import CrossLayerTranscoder, Origin
from microtome.dictionary.activation import Activation, Gated, JumpReLU, ReLU, TopK

LAYERS, D, F = 3, 4, 5
ORIGIN = Origin(
    model_name="tiny",
    inputs=tuple(f"blocks.{i}.hook_resid_mid" for i in range(LAYERS)),
    outputs=tuple(f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)),
)


def make(activation: Activation | Sequence[Activation], *, skip: bool = False) -> CrossLayerTranscoder:
    made = CrossLayerTranscoder(D, F, activation, origin=ORIGIN, skip=skip)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False)


def x_of(n: int = 7) -> Tensor:
    return torch.randn(n, LAYERS * D, generator=torch.Generator().manual_seed(4))


def plain_pre(made: CrossLayerTranscoder, row: Tensor) -> list[Tensor]:
    return [made.encoder[layer] @ row[layer * D : (layer + 1) * D] + made.b_enc[layer] for layer in range(LAYERS)]


def plain_decode(made: CrossLayerTranscoder, codes: list[Tensor]) -> Tensor:
    """Σ over the source layers at or below each target, latent by latent."""
    out = [made.b_dec[target].clone() for target in range(LAYERS)]
    for source in range(LAYERS):
        for target in range(source, LAYERS):
            for latent in range(F):
                out[target] += codes[source][latent] * made.W_dec[source][latent, target - source]
    return torch.cat(out)


def largest(pre: Tensor, k: int) -> Tensor:
    kept = pre.topk(k).indices
    return torch.zeros_like(pre).scatter(0, kept, pre[kept].relu())


def test_relu() -> None:
    made = make(ReLU())
    check(made, [[pre.relu() for pre in plain_pre(made, row)] for row in x_of()])


def test_jumprelu_with_a_threshold_for_every_latent() -> None:
    made = make(JumpReLU(torch.zeros(LAYERS * F)))
    threshold = made.activations[0].get_parameter("threshold").view(LAYERS, F)
    rows = [plain_pre(made, row) for row in x_of()]
    check(made, [[pre * (pre > threshold[i]) * (pre > 0) for i, pre in enumerate(layers)] for layers in rows])


def test_topk_over_all_layers_and_topk_in_each() -> None:
    rows = x_of()
    over_all, in_each = make(TopK(4)), make([TopK(1), TopK(2), TopK(3)])
    check(over_all, [list(largest(torch.cat(plain_pre(over_all, row)), 4).split(F)) for row in rows])
    check(in_each, [[largest(pre, i + 1) for i, pre in enumerate(plain_pre(in_each, row))] for row in rows])
    assert (over_all.k, in_each.k, make(ReLU()).k) == (4, 6, None)


def check(made: CrossLayerTranscoder, plain: list[list[Tensor]]) -> None:
    codes = made.encode(x_of())
    torch.testing.assert_close(codes.to_dense(), torch.stack([torch.cat(layers) for layers in plain]))
    out = torch.stack([plain_decode(made, layers) for layers in plain])
    torch.testing.assert_close(made.decode(codes), out)
    torch.testing.assert_close(made(x_of().view(7, 1, -1)), out.view(7, 1, -1))
    assert codes.d_sae == made.d_sae == LAYERS * F


def test_no_latent_writes_before_its_own_layer() -> None:
    made = make(ReLU())
    before = made(x_of())
    with torch.no_grad():
        made.b_enc[2] += 5
    changed = (made(x_of()) - before).view(7, LAYERS, D).abs().amax((0, 2))
    assert changed[:2].max() == 0
    assert changed[2] > 1


def test_no_rows_and_nothing_that_fires() -> None:
    made = make(ReLU())
    assert made(torch.zeros(0, LAYERS * D)).shape == (0, LAYERS * D)
    with torch.no_grad():
        made.b_enc.fill_(-100.0)
    torch.testing.assert_close(made(x_of()), made.b_dec.flatten().expand(7, -1))


def test_a_skip_path_adds_a_linear_map_of_each_layers_own_input() -> None:
    made, plain, x = make(ReLU(), skip=True), make(ReLU()), x_of()
    assert made.W_skip is not None
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(made.get_parameter(name))
    paths = [row @ W for row, W in zip(x.split(D, 1), made.W_skip, strict=True)]
    torch.testing.assert_close(made(x) - plain(x), torch.cat(paths, 1), atol=1e-5, rtol=1e-5)
    assert made.fingerprint != plain.fingerprint
    with pytest.raises(InputError, match="skip path"):
        made.decode(made.encode(x))


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("activations", [1, LAYERS])
def test_layer_by_layer_it_is_the_same(activations: int, skip: bool) -> None:
    thresholds = torch.linspace(0.1, 1.0, LAYERS * F).chunk(activations)
    jumps = [JumpReLU(each.clone()) for each in thresholds]
    made, x = make(jumps if activations > 1 else jumps[0], skip=skip), x_of()
    codes = [made.encode_layer(layer, rows) for layer, rows in enumerate(x.split(D, 1))]
    torch.testing.assert_close(torch.cat([each.to_dense() for each in codes], 1), made.encode(x).to_dense())
    assert [(each.start, each.stop) for each in made.layer_latents()] == [(0, 5), (5, 10), (10, 15)]
    written = [
        made.decode_layer(layer, [codes[source] for source in made.sources(layer)], rows)
        for layer, rows in enumerate(x.split(D, 1))
    ]
    torch.testing.assert_close(torch.cat(written, 1), made(x))


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize(
    "activation", [ReLU(), TopK(4), JumpReLU(torch.zeros(LAYERS * F))], ids=["relu", "topk", "jump"]
)
def test_scales_are_folded(activation: Activation, skip: bool) -> None:
    made, x = make(activation, skip=skip), x_of()
    read, written = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([4.0, 0.1, 1.5])
    codes = made.encode(x * read.repeat_interleave(D)).to_dense()
    out = made(x * read.repeat_interleave(D)) / written.repeat_interleave(D)
    made.fold_scales(read, written)
    torch.testing.assert_close(made.encode(x).to_dense(), codes)
    torch.testing.assert_close(made(x), out)


@pytest.mark.parametrize("one", [True, False], ids=["one-activation", "one-a-layer"])
def test_decoder_norms_are_folded_into_the_codes(one: bool) -> None:
    """The norm of a latent is that of all that it writes."""
    thresholds = torch.linspace(0.1, 1.0, LAYERS * F)
    made = make(JumpReLU(thresholds) if one else [JumpReLU(each) for each in thresholds.view(LAYERS, F)])
    with torch.no_grad():
        made.W_dec[1][2].zero_()
    x, norms = x_of(), [rows.flatten(1).norm(dim=1) for rows in made.W_dec]
    codes, out = made.encode(x).to_dense(), made(x)
    assert int((codes > 0).sum()) > 10
    made.fold_decoder_norms()
    norms[1][2] = 1.0
    torch.testing.assert_close(made.encode(x).to_dense(), codes * torch.cat(norms))
    torch.testing.assert_close(made(x), out)
    for layer, rows in enumerate(made.W_dec):
        expected = torch.ones(F)
        expected[2] = 0.0 if layer == 1 else 1.0
        torch.testing.assert_close(rows.flatten(1).norm(dim=1), expected)


@pytest.mark.parametrize(
    "activation",
    [JumpReLU(torch.linspace(0.1, 1.0, LAYERS * F)), Gated(torch.randn(LAYERS * F), torch.randn(LAYERS * F)), ReLU()],
    ids=["jump", "gated", "relu"],
)
def test_an_activation_for_all_latents_is_one_for_each_layer(activation: Activation) -> None:
    made = make(activation)
    apart = CrossLayerTranscoder(D, F, made.layer_activations(), origin=ORIGIN)
    weights = {name: p for name, p in made.state_dict().items() if not name.startswith("activations")}
    apart.load_state_dict(weights, strict=False)
    torch.testing.assert_close(apart.encode(x_of()).to_dense(), made.encode(x_of()).to_dense())
    assert len(apart.layer_activations()) == LAYERS
    assert apart.layer_activations()[1] is apart.activations[1]


def test_gradients_reach_every_weight() -> None:
    made = make(ReLU()).requires_grad_(True)
    made(x_of()).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_its_name_is_its_weights() -> None:
    first, second = make(ReLU()), make(ReLU())
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        second.W_dec[1][0, 0, 0] += 1e-3
    assert first.fingerprint != second.fingerprint
    assert len(first.fingerprint) == 16


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="as many points"):
        CrossLayerTranscoder(D, F, ReLU(), origin=Origin(model_name="a", inputs=("x", "y"), outputs=("z",)))
    with pytest.raises(ConfigError, match="one a layer"):
        CrossLayerTranscoder(D, F, [ReLU(), ReLU()], origin=ORIGIN)
    with pytest.raises(ConfigError, match="at most"):
        CrossLayerTranscoder(D, F, [TopK(6), TopK(1), TopK(1)], origin=ORIGIN)
    with pytest.raises(ConfigError, match="3 points"):
        _ = make(ReLU()).hook_name
    other = CrossLayerTranscoder(D, F + 1, ReLU(), origin=ORIGIN)
    with pytest.raises(InputError, match="another dictionary"):
        make(ReLU()).decode(other.encode(x_of()))


def test_a_gated_one_uses_its_own_bias() -> None:
    made = make(Gated(torch.zeros(LAYERS * F), torch.zeros(LAYERS * F)))
    gate = made.activations[0]
    pre = torch.stack([torch.cat(plain_pre(made, row)) for row in x_of()])
    shared = pre - made.b_enc.flatten()
    wanted = (gate.get_parameter("r_mag").exp() * shared + gate.get_parameter("b_mag")).relu() * (pre > 0)
    torch.testing.assert_close(made.encode(x_of()).to_dense(), wanted)
