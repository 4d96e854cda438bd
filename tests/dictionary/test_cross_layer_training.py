"""Cross-layer transcoders in training: gradients against plain loops, what they recover, exact resume, bad input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microtome.activations import ArraySource
from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.dictionary import (
    BatchTopKConfig,
    CrossLayerTranscoder,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    Origin,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    load_cross_layer_transcoder,
    save_dictionary,
    train,
    train_cross_layer,
)
from microtome.dictionary.activation import JumpReLU as JumpReLUActivation
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import DictionaryConfig
from microtome.dictionary.decoders import CrossLayerDecoder
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack
from microtome.dictionary.trainer import Trainer

L, N, D, F, K = 3, 40, 6, 16, 4
VARIANCE = torch.tensor([4.0, 6.0, 8.0])
CAP = 2.0
COMMON: dict[str, Any] = {"d_sae": F, "cross_layer": True, "aux_k": 3, "outlier_cap": CAP}
LAMBDA: dict[str, Any] = {"coefficient": 0.7, "coefficient_warmup": 0.0}
CONFIGS: dict[str, DictionaryConfig] = {
    "relu": ReLUConfig(**COMMON, **LAMBDA),
    "gated": GatedConfig(**COMMON, **LAMBDA),
    "jumprelu": JumpReLUConfig(**COMMON, **LAMBDA, bandwidth=0.8, start_threshold=0.5, sparsity="tanh"),
    "topk": TopKConfig(**COMMON, k=K),
    "batchtopk": BatchTopKConfig(**COMMON, k=K),
    "matryoshka": MatryoshkaConfig(**COMMON, k=K, prefixes=(0.25, 1.0)),
    "relu-unit": ReLUConfig(**COMMON, **LAMBDA, norms="unit"),
    "topk-unit": TopKConfig(**COMMON, k=K, norms="unit"),
    "topk-skip": TopKConfig(**COMMON, k=K, skip=True),
    "gated-skip": GatedConfig(**COMMON, **LAMBDA, skip=True),
}


def make(config: DictionaryConfig, products: str = "sparse") -> Stack:
    """Three layers with random weights of every kind."""
    configs = [config] * L
    stack = Stack(configs, make_rule(configs), D, D, CrossLayerDecoder(L, F, D))
    stack.rule.products = products  # type: ignore[assignment]
    stack.initialise(DataStatistics(torch.zeros(L, D), torch.full((L, D), 0.1), VARIANCE), [0, 1, 2])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    stack.after_update()
    return stack


def rows(seed: int) -> Float[Tensor, "L n d"]:
    x = torch.randn(L, N, D, generator=torch.Generator().manual_seed(seed))
    x[1, 3] *= 30  # as an attention sink is
    return x


def plain_codes(stack: Stack, layer: int, pre: Tensor, norms: Tensor) -> Tensor:
    config, rule = stack.config, stack.rule
    if isinstance(config, BatchTopKConfig):
        edge = (pre * norms).relu().flatten().sort(descending=True).values[K * N - 1]
        return pre.relu() * (pre * norms >= edge)
    if isinstance(config, TopKConfig):
        kept = (pre * norms).topk(K, dim=1).indices
        return pre.relu() * torch.zeros_like(pre).scatter(1, kept, 1.0)
    if isinstance(config, GatedConfig):
        r_mag, b_mag = rule.get_parameter("r_mag")[layer], rule.get_parameter("b_mag")[layer]
        return (r_mag.exp() * (pre - stack.b_enc[layer]) + b_mag).relu() * (pre > 0)
    if isinstance(config, JumpReLUConfig):
        threshold = rule.get_parameter("threshold")[layer]
        near = ((pre - threshold).abs() < config.bandwidth / 2).detach()
        return pre * (pre > threshold) - threshold.detach() / config.bandwidth * near * (threshold - threshold.detach())
    return pre.relu()


def plain_penalty(stack: Stack, layer: int, pre: Tensor, f: Tensor, norms: Tensor, w: Tensor) -> Tensor:
    config = stack.config
    if isinstance(config, JumpReLUConfig):
        revive = (stack.rule.get_parameter("threshold")[layer] - pre).relu() * norms
        spread = (w * (config.tanh_scale * f * norms).tanh()).sum()
        return config.coefficient * spread + config.revive_coefficient * revive.sum()
    if isinstance(config, GatedConfig):
        return config.coefficient * (w * pre.relu() * norms.detach()).sum()
    return config.coefficient * (w * f * norms).sum() if isinstance(config, ReLUConfig) else f.new_zeros(())


def written(stack: Stack, x: Tensor, codes: list[Tensor], *, frozen: bool = False) -> list[Tensor]:
    """y_l = Σ_{l' ≤ l} f^{l'} W_dec^{l' → l} + b_dec^l (+ x^l W_skip^l), layer by layer."""
    out = []
    for target in range(L):
        total = stack.b_dec[target]
        if stack.W_skip is not None:
            total = total + x[target] @ stack.W_skip[target]
        total = total.detach() if frozen else total
        for source in range(target + 1):
            block = stack.decoder.rows(source)[:, (target - source) * D : (target - source + 1) * D]
            total = total + codes[source] @ (block.detach() if frozen else block)
        out.append(total)
    return out


def plain_loss(stack: Stack, x: Tensor, y: Tensor, dead: Tensor | None) -> Tensor:
    """The loss of all layers, with plain loops and autograd."""
    config, pre, f, norms = stack.config, [], [], []
    for layer in range(L):
        norms.append(torch.ones(F) if config.unit_norms else stack.decoder.rows(layer).norm(dim=1))
        pre.append(x[layer] @ stack.encoder[layer].T + stack.b_enc[layer])
        f.append(plain_codes(stack, layer, pre[layer], norms[layer]))
    w = [(CAP**2 * VARIANCE[i] / (y[i] - stack.b_dec[i]).detach().square().sum(1)).clamp(max=1.0) for i in range(L)]
    ends = config.boundaries if isinstance(config, MatryoshkaConfig) else (F,)
    loss = x.new_zeros(())
    for end in ends:
        prefix = [each * (torch.arange(F) < end) for each in f]
        out = written(stack, x, prefix)
        loss = loss + sum((w[i][:, None] * (y[i] - out[i]) ** 2).sum() for i in range(L)) / len(ends)
    for i in range(L):
        loss = loss + plain_penalty(stack, i, pre[i], f[i], norms[i], w[i][:, None])
    if isinstance(config, GatedConfig):
        frozen = written(stack, x, [each.relu() for each in pre], frozen=True)
        loss = loss + sum((w[i][:, None] * (y[i] - frozen[i]) ** 2).sum() for i in range(L))
    loss = loss / (N * VARIANCE.mean())
    for i in range(L if dead is not None else 0):
        assert dead is not None
        if not dead[i].any():
            continue
        error = torch.cat([(y[j] - out[j]).detach() for j in range(i, L)], 1)
        weight = torch.stack(w[i:]).min(0).values[:, None]
        scores = pre[i].detach().masked_fill(~dead[i], -torch.inf)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(min(3, int(dead[i].sum())), dim=1).indices, 1.0)
        missed = (weight * (error - (pre[i].relu() * chosen) @ stack.decoder.rows(i)) ** 2).sum()
        mean = (weight * error).sum(0) / weight.sum()
        loss = loss + config.aux_coefficient * missed / (weight * (error - mean) ** 2).sum()
    return loss


@pytest.mark.parametrize("kind", ["sparse", "dense", "pieces"])
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_leaves_the_gradients_of_plain_loops(
    name: str, with_dead: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pieces":  # dense products, some rows at a time, and the gradients some latents at a time
        monkeypatch.setattr("microtome.dictionary.kept._FEW", N // 4)
        monkeypatch.setattr("microtome.dictionary.kept._LATENTS", 2)
    stack, x, y = make(CONFIGS[name], "sparse" if kind == "sparse" else "dense"), rows(1), rows(2)
    dead = torch.arange(F).expand(L, F) < torch.tensor([[2], [0], [9]]) if with_dead else None
    stack.zero_grad()
    loss = plain_loss(stack, x, y, dead)
    loss.backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in stack.named_parameters()}
    report = stack.step(x, y, variance=VARIANCE, dead=dead)
    torch.testing.assert_close(report.loss.sum(), loss.detach())
    for parameter, p in stack.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-5, msg=f"the gradients of {parameter}")


def test_the_fvu_is_that_of_each_layer_in_its_own_variance() -> None:
    stack, x, y = make(CONFIGS["topk"]), rows(1), rows(2)
    stack.config = replace(stack.config, outlier_cap=None)
    pre = [x[i] @ stack.encoder[i].T + stack.b_enc[i] for i in range(L)]
    out = written(stack, x, [plain_codes(stack, i, pre[i], stack.decoder.norms()[i]) for i in range(L)])
    expected = torch.stack([(y[i] - out[i]).detach().square().sum(1).mean() / VARIANCE[i] for i in range(L)])
    torch.testing.assert_close(stack.step(x, y, variance=VARIANCE).fvu, expected)


def test_long_gradients_are_shortened_for_all_layers_alike() -> None:
    stack = make(replace(CONFIGS["relu"], clip_norm=1e-3))
    stack.step(rows(1), rows(2), variance=VARIANCE)
    before = [p.grad.clone() for p in stack.parameters() if p.grad is not None]
    stack.before_update()
    after = [p.grad for p in stack.parameters() if p.grad is not None]
    total = torch.stack([g.square().sum() for g in before]).sum().sqrt()
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b * (1e-3 / total))


def test_unit_norms_are_kept_over_all_that_a_latent_writes() -> None:
    stack = make(CONFIGS["relu-unit"])
    stack.step(rows(1), rows(2), variance=VARIANCE)
    grads = [p.grad.clone() for p in map(stack.decoder.rows, range(L)) if p.grad is not None]
    stack.before_update()
    for layer in range(L):
        unit, grad = stack.decoder.rows(layer).detach(), stack.decoder.rows(layer).grad
        assert grad is not None
        torch.testing.assert_close(grad, grads[layer] - (grads[layer] * unit).sum(1, keepdim=True) * unit)
        assert not torch.allclose(grad, grads[layer])
    torch.optim.SGD(stack.parameters(), lr=1.0).step()
    grown = [stack.decoder.rows(layer).detach().norm(dim=1) - 1 for layer in range(L)]
    assert max(float(each.abs().max()) for each in grown) > 0.01
    stack.after_update()
    for layer in range(L):
        torch.testing.assert_close(stack.decoder.rows(layer).norm(dim=1), torch.ones(F))


def test_resampled_latents_point_at_what_was_missed_in_all_later_layers() -> None:
    stack = make(CONFIGS["relu"])
    optimiser = torch.optim.Adam(stack.parameters())
    x, y = rows(1), rows(2)
    stack.step(x, y, variance=VARIANCE)
    optimiser.step()
    x[1], y[1], y[2] = x[1] * 1e-3, y[1] * 1e-3, y[2] * 1e-3
    x[1, 7], y[1, 7], y[2, 7] = 1.0, 50.0, -40.0  # the one row that is badly missed at layers 1 and 2
    dead = torch.arange(F) == 5
    resample(stack, optimiser, 1, dead, x, y, generator=torch.Generator().manual_seed(0))
    row = stack.decoder.rows(1)[5].detach()
    wanted = torch.cat([y[1, 7] - stack.b_dec[1], y[2, 7] - stack.b_dec[2]]).detach()
    torch.testing.assert_close(functional.normalize(row, dim=0), functional.normalize(wanted, dim=0))
    torch.testing.assert_close(row.norm(), stack.decoder.rows(1)[~dead].norm(dim=1).mean())
    state = optimiser.state[stack.decoder.place(1)[0]]["exp_avg"]
    assert float(state[5].abs().max()) == 0.0 < float(state[4].abs().max())
    assert float(optimiser.state[stack.b_enc]["exp_avg"][1, 5]) == 0.0


# ---- the whole of it ------------------------------------------------------------------------------------------------

INPUTS = tuple(f"blocks.{i}.hook_resid_mid" for i in range(L))
OUTPUTS = tuple(f"blocks.{i}.hook_mlp_out" for i in range(L))
WIDTH, FEATURES = 12, 8


def synthetic(n: int = 6000) -> tuple[Float[Tensor, "n d"], Float[Tensor, "l j f d"]]:
    """Layer l shows eight features of its own; feature i of layer l writes `writes[l, j, i]` to every layer j ≥ l."""
    generator = torch.Generator().manual_seed(0)
    reads = functional.normalize(torch.randn(L, FEATURES, WIDTH, generator=generator), dim=2)
    writes = functional.normalize(torch.randn(L, L, FEATURES, WIDTH, generator=generator), dim=3)
    chosen = torch.rand(L, n, FEATURES, generator=generator) < 0.15
    codes = chosen * (torch.rand(L, n, FEATURES, generator=generator) + 0.5)
    x = [codes[i] @ reads[i] for i in range(L)]
    y = [sum((codes[i] @ writes[i, j] for i in range(j + 1)), torch.zeros(n, WIDTH)) for j in range(L)]
    scales = [3.0, 1.0, 10.0]
    return torch.cat([*(each * s for each, s in zip(x, scales, strict=True)), *y], 1) + 1.0, writes


def source(rows: Float[Tensor, "n d"]) -> ArraySource:
    return ArraySource(rows, hook_names=(*INPUTS, *OUTPUTS), widths=(WIDTH,) * (2 * L), model_name="toy")


ARCHITECTURE = TopKConfig(d_sae=12, k=3, inputs=INPUTS, outputs=OUTPUTS, cross_layer=True, dead_after=5000, aux_k=4)
RUN = TrainConfig(n_tokens=100_000, batch_size=256, lr=1e-2, warmup_steps=20, checkpoint_every=400)


@pytest.mark.slow
def test_it_finds_which_layer_features_come_from_and_where_they_write(tmp_path: Path) -> None:
    data, writes = synthetic()
    [made] = train_cross_layer(ARCHITECTURE, source(data), out=tmp_path / "clt", config=RUN)
    x, y = data[:, : L * WIDTH], data[:, L * WIDTH :]
    errors = (made(x) - y).square().view(-1, L, WIDTH).sum((0, 2))
    spreads = (y - y.mean(0)).square().view(-1, L, WIDTH).sum((0, 2))
    assert float((errors / spreads).max()) < 0.1
    for layer in range(L):
        found = functional.normalize(made.W_dec[layer].flatten(1), dim=1)
        true = functional.normalize(writes[layer, layer:].transpose(0, 1).flatten(1), dim=1)
        assert float((true @ found.T).max(1).values.median()) > 0.95
    # Transcoders of one layer each cannot: what earlier layers wrote is not in their input.
    alone = [
        replace(ARCHITECTURE, cross_layer=False, inputs=(a,), outputs=(b,))
        for a, b in zip(INPUTS, OUTPUTS, strict=True)
    ]
    last = train(alone, source(data), out=tmp_path / "each", config=RUN)[-1]
    apart = (last(x[:, -WIDTH:]) - y[:, -WIDTH:]).square().sum() / spreads[-1]
    assert float(apart) > 0.4


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_what_was_trained(name: str, tmp_path: Path) -> None:
    """In the model's own units: scales of all points are folded in."""
    data, _ = synthetic(1024)
    config = replace(CONFIGS[name], inputs=INPUTS, outputs=OUTPUTS)
    trainer = Trainer([config], source(data), tmp_path / "clt", TrainConfig(n_tokens=2560, batch_size=256, lr=5e-3))
    batches = trainer.begin()
    for _ in range(10):
        trainer.train_step(next(batches))
    group, stack = trainer.groups[0], trainer.groups[0].stack
    if isinstance(config, BatchTopKConfig):
        stack.rule.get_buffer("threshold").zero_()
        stack.config = stack.rule.config = replace(config, k=F)
    made = group.export(0, trainer.scales, {"model_name": "toy"})
    scaled = data * trainer.scales
    y = group.layout.y(scaled)
    expected = y + stack.residual(group.layout.x(scaled), y)
    out = made(data[:, : L * WIDTH]).view(-1, L, WIDTH).transpose(0, 1)
    scales = trainer.scales[L * WIDTH :].view(L, 1, WIDTH)
    torch.testing.assert_close(out * scales, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_fine_tuning_begins_with_what_was_saved(name: str, tmp_path: Path) -> None:
    """A training begins with other weights and other scales, and takes over what was saved."""
    data, _ = synthetic(1024)
    config = replace(CONFIGS[name], inputs=INPUTS, outputs=OUTPUTS)
    run = TrainConfig(n_tokens=2560, batch_size=256, lr=5e-3)
    [saved] = train_cross_layer(config, source(data), out=tmp_path / "first", config=run)
    again = Trainer([replace(config, fine_tune=str(tmp_path / "first"), seed=5)], source(data), tmp_path / "b", run)
    again.begin()
    begun = again.groups[0].export(0, again.scales, {"model_name": "toy"})
    x = data[:, : L * WIDTH]
    if name in ("batchtopk", "matryoshka"):  # the mean of the thresholds is taken over: near, and not the same
        codes = [each.encode(x).l0.mean() for each in (begun, saved)]
        torch.testing.assert_close(*codes, rtol=0.05, atol=0.05)
        return
    torch.testing.assert_close(begun(x), saved(x), rtol=1e-3, atol=1e-3)


def test_fine_tuning_a_released_one_with_one_activation_for_all_and_rows_of_any_norm(tmp_path: Path) -> None:
    data, _ = synthetic(1024)
    released = CrossLayerTranscoder(
        WIDTH,
        F,
        JumpReLUActivation(torch.linspace(0.1, 2.0, L * F)),
        origin=Origin(model_name="x", inputs=INPUTS, outputs=OUTPUTS),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in released.named_parameters():
            if "activation" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    folder = tmp_path / "released"
    folder.mkdir()
    save_dictionary(released, folder)
    config = JumpReLUConfig(d_sae=F, cross_layer=True, inputs=INPUTS, outputs=OUTPUTS, fine_tune=str(folder))
    run = TrainConfig(n_tokens=256, batch_size=256, lr=1e-9)
    for norms in ("free", "unit"):
        [tuned] = train_cross_layer(replace(config, norms=norms), source(data), out=tmp_path / norms, config=run)
        x = data[:, : L * WIDTH]
        torch.testing.assert_close(tuned(x), released(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sae": 13}, r"Got: \(layers, d_model, latents of a layer\) = \(3, 12, 12\)\. Expected: \(3, 12, 13\)"),
        ({"inputs": INPUTS[:2], "outputs": OUTPUTS[:2]}, r"Expected: \(2, 12, 12\)"),
        ({"cross_layer": False}, "is a cross-layer transcoder.*cross_layer=True"),
    ],
    ids=["width", "layers", "kind"],
)
def test_fine_tuning_of_what_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data, _ = synthetic(512)
    run = TrainConfig(n_tokens=256, batch_size=256)
    train_cross_layer(ARCHITECTURE, source(data), out=tmp_path / "clt", config=run)
    config = replace(ARCHITECTURE, fine_tune=str(tmp_path / "clt"), **change)
    with pytest.raises(ConfigError, match=message):
        (train_cross_layer if config.cross_layer else train)(config, source(data), out=tmp_path / "b", config=run)


@pytest.mark.parametrize("kind", [JumpReLUConfig, GatedConfig], ids=["jumprelu", "gated"])
def test_topk_begins_with_a_threshold_for_each_layer_that_gives_its_l0(
    kind: type[DictionaryConfig], tmp_path: Path
) -> None:
    data, _ = synthetic(1024)
    data = data + 0.05 * torch.randn(data.shape, generator=torch.Generator().manual_seed(7))  # no two rows are alike
    run = TrainConfig(n_tokens=2560, batch_size=256, lr=5e-3)
    [saved] = train_cross_layer(ARCHITECTURE, source(data), out=tmp_path / "first", config=run)
    settings: dict[str, Any] = {"d_sae": 12, "inputs": INPUTS, "outputs": OUTPUTS, "cross_layer": True}
    again = Trainer([kind(**settings, fine_tune=str(tmp_path / "first"))], source(data), tmp_path / "b", run)
    again.begin()
    begun = again.groups[0].export(0, again.scales, {"model_name": "toy"})
    x = data[:, : L * WIDTH]
    found, before = (each.encode(x).to_dense().view(-1, L, 12) for each in (begun, saved))
    counts = [(codes > 0).float().sum(2).mean(0) for codes in (found, before)]
    torch.testing.assert_close(*counts, rtol=0.05, atol=0.05)
    both = (found > 0) & (before > 0)
    assert float(both.sum() / (before > 0).sum()) > 0.7
    torch.testing.assert_close(found[both], before[both], rtol=1e-3, atol=1e-3)


def test_fine_tuning_from_a_dictionary_of_one_layer_is_refused(tmp_path: Path) -> None:
    data, _ = synthetic(512)
    run = TrainConfig(n_tokens=256, batch_size=256)
    alone = replace(ARCHITECTURE, cross_layer=False, inputs=INPUTS[:1], outputs=OUTPUTS[:1])
    train(alone, source(data), out=tmp_path / "one", config=run)
    config = replace(ARCHITECTURE, fine_tune=str(tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"Only a cross-layer transcoder.*Got: topk_transcoder"):
        train_cross_layer(config, source(data), out=tmp_path / "b", config=run)


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "plain"])
def test_fine_tuning_begins_with_a_skip_path_where_there_is_one(skip: bool, tmp_path: Path) -> None:
    data, _ = synthetic(512)
    origin = Origin(model_name="toy", inputs=INPUTS, outputs=OUTPUTS)
    released = CrossLayerTranscoder(WIDTH, 12, JumpReLUActivation(torch.ones(12 * L)), origin=origin, skip=skip)
    (tmp_path / "released").mkdir()
    save_dictionary(released, tmp_path / "released")
    config = replace(ARCHITECTURE, fine_tune=str(tmp_path / "released"), skip=not skip)
    with pytest.raises(ConfigError, match=rf"one alone has a skip path.*Say skip={skip}"):
        train_cross_layer(config, source(data), out=tmp_path / "b", config=TrainConfig(n_tokens=256, batch_size=256))


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_stopped_training_resumes_to_the_same_weights_and_is_opened(skip: bool, tmp_path: Path) -> None:
    data, _ = synthetic(1024)
    config = replace(ARCHITECTURE, revival="resample", resample_every=10, dead_after=512, skip=skip)
    run = TrainConfig(n_tokens=64 * 40, batch_size=64, lr=5e-3, checkpoint_every=16, log_every=8)
    [whole] = train_cross_layer(config, source(data), out=tmp_path / "whole", config=run)
    stopped = Trainer([config], source(data), tmp_path / "stopped", run)
    batches = stopped.begin()
    while stopped.step < 27:
        for row in stopped.train_step(next(batches)):
            stopped._log(row)
        if stopped.step % run.checkpoint_every == 0:
            stopped.save_checkpoint()
    del stopped
    [resumed] = train_cross_layer(config, source(data), out=tmp_path / "stopped", config=run)
    assert resumed.fingerprint == whole.fingerprint
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    opened = load_cross_layer_transcoder(tmp_path / "whole")
    assert isinstance(opened, CrossLayerTranscoder)
    assert (opened.fingerprint, opened.k, opened.origin.outputs) == (whole.fingerprint, 3 * L, OUTPUTS)
    assert (opened.W_skip is not None and bool((opened.W_skip != 0).any())) == skip


def test_several_are_trained_on_one_stream(tmp_path: Path) -> None:
    data, _ = synthetic(512)
    run = TrainConfig(n_tokens=512, batch_size=64)
    configs = [ARCHITECTURE, replace(ARCHITECTURE, k=2, inputs=INPUTS[:2], outputs=OUTPUTS[:2])]
    both = train_cross_layer(configs, source(data), out=tmp_path / "two", config=run)
    assert [(each.n_layers, each.k) for each in both] == [(3, 9), (2, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": OUTPUTS[:2]}, "writes as many points as it reads"),
        ({"outputs": (*OUTPUTS[:2], "blocks.9.hook_mlp_out")}, "hook point"),
        ({"fine_tune": "somewhere"}, "There is no dictionary at somewhere"),
        ({"inputs": INPUTS[::-1]}, "come in the model's order"),
        ({"outputs": (OUTPUTS[1], OUTPUTS[0], OUTPUTS[2])}, "come in the model's order"),
        ({"inputs": OUTPUTS, "outputs": INPUTS}, "each is read before it is written"),
    ],
    ids=["fewer outputs", "no such point", "nothing to fine-tune", "inputs back", "outputs mixed", "written first"],
)
def test_what_a_cross_layer_transcoder_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data, _ = synthetic(512)
    with pytest.raises((ConfigError, ArtifactError), match=message):
        train_cross_layer(replace(ARCHITECTURE, **change), source(data), out=tmp_path / "clt", config=RUN)


def test_it_cannot_be_tied() -> None:
    with pytest.raises(ConfigError, match=r"Only an autoencoder can be tied\. Got: cross_layer=True\. Leave out tied"):
        replace(ARCHITECTURE, tied=True)


def test_a_skip_path_takes_what_is_linear_of_each_layers_own_input(tmp_path: Path) -> None:
    """y = x A: the one with a skip path learns it, and the one without has too few latents for it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(L, 4096, WIDTH, generator=generator)
    y = x @ torch.randn(L, WIDTH, WIDTH, generator=generator)
    data, fvu = torch.cat([*x, *y], 1), []
    run = TrainConfig(n_tokens=60_000, batch_size=256, lr=1e-2, warmup_steps=5)
    for skip in (False, True):
        config = replace(ARCHITECTURE, skip=skip)
        [made] = train_cross_layer(config, source(data), out=tmp_path / str(skip), config=run)
        target = data[:, L * WIDTH :]
        fvu.append(
            float((made(data[:, : L * WIDTH]) - target).square().sum() / (target - target.mean(0)).square().sum())
        )
    assert fvu[1] < 0.03, fvu
    assert fvu[0] > 0.15, fvu


def test_layers_of_unequal_widths_and_layers_that_are_constant_are_refused(tmp_path: Path) -> None:
    data, _ = synthetic(1024)
    widths = (WIDTH,) * (2 * L - 1) + (WIDTH - 2,)
    cut = ArraySource(data[:, :-2], hook_names=(*INPUTS, *OUTPUTS), widths=widths, model_name="toy")
    with pytest.raises(ConfigError, match="of one width"):
        train_cross_layer(ARCHITECTURE, cut, out=tmp_path / "a", config=RUN)
    data[:, -2 * WIDTH : -WIDTH] = 3.0
    with pytest.raises(InputError, match=r"equal rows at blocks\.1\.hook_mlp_out"):
        train_cross_layer(ARCHITECTURE, source(data), out=tmp_path / "b", config=RUN)


def test_the_two_trainings_refuse_each_others_configs(tmp_path: Path) -> None:
    data, _ = synthetic(512)
    with pytest.raises(ConfigError, match="train_cross_layer"):
        train(ARCHITECTURE, source(data), out=tmp_path / "a", config=RUN)
    with pytest.raises(ConfigError, match="cross_layer=True"):
        train_cross_layer(TopKConfig(d_sae=12, k=3), source(data), out=tmp_path / "b", config=RUN)
