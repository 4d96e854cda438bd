"""TopK autoencoders: the written-out gradients and sparse products against dense autograd twins."""

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from microtome.common.errors import ConfigError
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.products import CodeTranspose, decode, latent_sums, sampled_products
from microtome.dictionary.selection import top_k
from microtome.dictionary.topk import TopKConfig, TopKSAE

N, D, F, K = 64, 24, 96, 6
CONFIG = TopKConfig(d_sae=F, k=K, aux_k=10)


@pytest.fixture
def sae() -> TopKSAE:
    torch.manual_seed(0)
    sae = TopKSAE.initialised(D, CONFIG, center=torch.randn(D) * 0.2, seed=0)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.encoder.add_(torch.randn(F, D) * 0.1)
    return sae


@pytest.fixture
def x() -> Float[Tensor, "n d"]:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    rows[5] *= 200  # as an attention sink is
    return rows


def dense_loss(
    sae: TopKSAE, x: Float[Tensor, "n d"], variance: float, dead: Bool[Tensor, " f"] | None
) -> tuple[Float[Tensor, ""], Float[Tensor, "n f"]]:
    """The loss as the paper has it, with nothing sparse and nothing by hand."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc

    def keep(values: Float[Tensor, "n f"], k: int) -> Float[Tensor, "n f"]:
        kept = values.topk(k, dim=1)
        return torch.zeros_like(values).scatter(1, kept.indices, kept.values.relu())

    f = keep(pre, sae.k)
    reconstruction = f @ sae.W_dec + sae.b_dec
    cap = CONFIG.outlier_cap**2 * variance
    w = (cap / (x - sae.b_dec).detach().square().sum(1, keepdim=True)).clamp(max=1.0)
    loss = (w * (x - reconstruction).square()).sum() / (len(x) * variance)
    if dead is not None:
        error = (x - reconstruction).detach()
        a = keep(pre.masked_fill(~dead, -torch.inf), min(CONFIG.aux_k or D // 2, int(dead.sum())))
        missed = (w * (error - a @ sae.W_dec).square()).sum()
        mean = (w * error).sum(0) / w.sum()
        loss = loss + CONFIG.aux_coefficient * missed / (w * (error - mean).square()).sum()
    return loss, f


@pytest.mark.parametrize("n_dead", [None, 1, 30, F])
def test_a_step_leaves_the_gradients_that_autograd_finds(
    sae: TopKSAE, x: Float[Tensor, "n d"], n_dead: int | None
) -> None:
    dead = None if n_dead is None else torch.arange(F) < n_dead
    loss, f = dense_loss(sae, x, 20.0, dead)
    loss.backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    report = sae.training_step(x, CONFIG, variance=20.0, dead=dead, select_dtype=torch.float32)
    torch.testing.assert_close(report.loss, loss.detach())
    assert torch.equal(report.fired, (f > 0).any(0))
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_selection_in_bf16_keeps_exact_values(sae: TopKSAE, x: Float[Tensor, "n d"]) -> None:
    """Rounding may only exchange latents at the edge of the selection: the loss hardly moves, and values are not rounded."""
    exact = sae.training_step(x, CONFIG, variance=1.0, dead=None, select_dtype=torch.float32)
    rounded = sae.training_step(x, CONFIG, variance=1.0, dead=None, select_dtype=torch.bfloat16)
    assert abs(float(rounded.fvu) / float(exact.fvu) - 1) < 0.01


def test_encode_decode_and_forward_agree_with_the_dense_twin(sae: TopKSAE, x: Float[Tensor, "n d"]) -> None:
    _, f = dense_loss(sae, x, 1.0, None)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), f)
    torch.testing.assert_close(codes.l0, (f > 0).sum(1).float())
    torch.testing.assert_close(sae.decode(codes), f @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae(x.view(4, 16, D)), (f @ sae.W_dec + sae.b_dec).view(4, 16, D))


def test_fewer_than_k_latents_fire_where_fewer_are_positive(sae: TopKSAE, x: Float[Tensor, "n d"]) -> None:
    with torch.no_grad():
        sae.b_enc.fill_(-2.0)
    codes = sae.encode(x)
    assert float(codes.l0.min()) < K
    assert bool((codes.values >= 0).all())


def test_rescaled_weights_take_unscaled_activations(sae: TopKSAE, x: Float[Tensor, "n d"]) -> None:
    scaled = sae(x * 0.25).detach()
    before = sae.encode(x * 0.25).values.detach()
    sae.rescale(0.25)
    torch.testing.assert_close(sae(x) * 0.25, scaled)
    torch.testing.assert_close(sae.encode(x).values.sort().values * 0.25, before.sort().values)


def test_sparse_products_against_dense_ones(x: Float[Tensor, "n d"]) -> None:
    generator = torch.Generator().manual_seed(2)
    pre, weight = torch.randn(N, F, generator=generator), torch.randn(F, D, generator=generator)
    indices = top_k(pre, K)
    values = pre.gather(1, indices)
    dense = SparseCodes(indices, values, F).to_dense()
    assert torch.equal(indices.sort(1).values, pre.topk(K, dim=1).indices.sort(1).values)
    torch.testing.assert_close(decode(indices, values, weight), dense @ weight)
    torch.testing.assert_close(sampled_products(indices, x, weight), (x @ weight.T).gather(1, indices))
    torch.testing.assert_close(CodeTranspose(indices, F).times(values, x), dense.T @ x)
    torch.testing.assert_close(latent_sums(indices, values, F), dense.sum(0))


def test_after_a_step_decoder_rows_have_unit_norm(sae: TopKSAE) -> None:
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    direction = functional.normalize(sae.W_dec.detach(), dim=1)
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.detach(), direction)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"k": 0}, "k must be"), ({"k": F + 1}, "k must be"), ({"aux_k": 0}, "aux_k"), ({"dead_after": 0}, "dead_after")],
)
def test_configs_that_cannot_be(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopKConfig(**{"d_sae": F, "k": K, **wrong})
