"""Every architecture's step against its published loss, written out densely with autograd and nothing clever."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microtome.common.errors import ConfigError
from microtome.dictionary import kept, rules
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    PenaltyConfig,
    ReLUConfig,
    TopKConfig,
)
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.stack import DataStatistics, Stack

N, D, D_OUT, F, K = 40, 12, 10, 48, 5
VARIANCE = 9.0
Pre = Float[Tensor, "n f"]

SIZES: dict[str, Any] = {"d_sae": F, "aux_k": 6, "outlier_cap": 2.0}
LAMBDA: dict[str, Any] = {"coefficient": 0.7, "coefficient_warmup": 0.0}
JUMP: dict[str, Any] = {**SIZES, **LAMBDA, "bandwidth": 0.8, "start_threshold": 0.5}
CONFIGS: dict[str, DictionaryConfig] = {
    "relu": ReLUConfig(**SIZES, **LAMBDA, norms="unit"),
    "relu-free": ReLUConfig(**SIZES, **LAMBDA, norms="free"),
    "relu-tied": ReLUConfig(**SIZES, **LAMBDA, tied=True),
    "relu-uncentred": ReLUConfig(**SIZES, **LAMBDA, center=False),
    "p-anneal": PAnnealConfig(**SIZES, **LAMBDA, norms="free"),
    "gated": GatedConfig(**SIZES, **LAMBDA, norms="free"),
    "jumprelu-step": JumpReLUConfig(**JUMP),
    "jumprelu-tanh": JumpReLUConfig(**JUMP, sparsity="tanh", norms="free", revive_coefficient=0.05),
    "jumprelu-quadratic": JumpReLUConfig(**JUMP, sparsity="quadratic", target_l0=3.0),
    "topk": TopKConfig(**SIZES, k=K),
    "topk-free": TopKConfig(**SIZES, k=K, norms="free"),
    "batchtopk": BatchTopKConfig(**SIZES, k=K, norms="free"),
    "matryoshka": MatryoshkaConfig(**SIZES, k=K, prefixes=(0.25, 0.5, 1.0)),
    "transcoder": TopKConfig(**SIZES, k=K, inputs=("a",), outputs=("b",)),
    "skip-transcoder": ReLUConfig(**SIZES, **LAMBDA, inputs=("a",), outputs=("b",), skip=True),
}


def make(config: DictionaryConfig, members: int = 1, products: str = "sparse") -> Stack:
    """A stack with random weights of every kind."""
    d_out = D_OUT if config.is_transcoder else D
    configs = [replace(config, seed=seed) for seed in range(members)]
    stack = Stack(configs, make_rule(configs), D, d_out)
    stack.rule.products = products  # type: ignore[assignment]
    data = DataStatistics(torch.zeros(members, D), torch.full((members, d_out), 0.1), VARIANCE)
    stack.initialise(data, list(range(members)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    stack.after_update()
    return stack


def rows(seed: int, d: int = D) -> Float[Tensor, "1 n d"]:
    x = torch.randn(1, N, d, generator=torch.Generator().manual_seed(seed))
    x[0, 3] *= 30  # as an attention sink is
    return x


def power_mean(sizes: Pre, p: float) -> Pre:
    return torch.where(sizes > 0, sizes.clamp_min(1e-12) ** p, torch.zeros_like(sizes))


def keep(scores: Pre, k: int) -> Bool[Tensor, "n f"]:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k, dim=1).indices, True)


def twin_codes(stack: Stack, pre: Pre, norms: Float[Tensor, " f"]) -> Pre:
    config, rule = stack.config, stack.rule
    if isinstance(config, BatchTopKConfig):
        edge = (pre * norms).relu().flatten().sort(descending=True).values[K * N - 1]
        return pre.relu() * (pre * norms >= edge)
    if isinstance(config, TopKConfig):
        return pre.relu() * keep(pre * norms, K)
    if isinstance(config, GatedConfig):
        r_mag, b_mag = rule.get_parameter("r_mag")[0], rule.get_parameter("b_mag")[0]
        return (r_mag.exp() * (pre - stack.b_enc[0]) + b_mag).relu() * (pre > 0)
    if isinstance(config, JumpReLUConfig):
        return straight_through(pre, rule.get_parameter("threshold")[0], config.bandwidth, value=True)
    return pre.relu()


def straight_through(z: Pre, threshold: Float[Tensor, " f"], width: float, *, value: bool) -> Pre:
    """z·1[z > θ] (or 1[z > θ]) with the gradients of 2407.14435, eqs. 11–12, made from a surrogate for θ alone."""
    above = (z > threshold).to(z.dtype)
    near = ((z - threshold).abs() < width / 2).to(z.dtype).detach()
    by_threshold = -(threshold.detach() if value else torch.ones_like(threshold)) / width * near
    surrogate = by_threshold * (threshold - threshold.detach())
    return (z * above if value else above) + surrogate


def twin_penalty(stack: Stack, pre: Pre, f: Pre, norms: Float[Tensor, " f"], w: Float[Tensor, "n 1"]) -> Tensor:
    config = stack.config
    if isinstance(config, JumpReLUConfig):
        threshold = stack.rule.get_parameter("threshold")[0]
        if config.sparsity == "tanh":
            revive = config.revive_coefficient * ((threshold - pre).relu() * norms).sum()
            return config.coefficient * (w * (config.tanh_scale * f * norms).tanh()).sum() + revive
        fires = (w * straight_through(pre, threshold, config.bandwidth, value=False)).sum()
        if config.sparsity == "step":
            return config.coefficient * fires
        assert config.target_l0 is not None
        return config.coefficient * w.sum() * (fires / w.sum() / config.target_l0 - 1) ** 2
    if isinstance(config, GatedConfig):
        return config.coefficient * (w * pre.relu() * norms.detach()).sum()
    if isinstance(config, PAnnealConfig):
        return config.coefficient * (w * power_mean(f * norms, 1.0)).sum()
    return config.coefficient * (w * f * norms).sum() if isinstance(config, PenaltyConfig) else f.new_zeros(())


def twin_loss(stack: Stack, x: Tensor, y: Tensor, dead: Bool[Tensor, " f"] | None) -> tuple[Tensor, Pre]:
    """The published loss of the first member."""
    config, encoder, W_dec, b_dec = stack.config, stack.encoder[0], stack.W_dec[0], stack.b_dec[0]
    norms = torch.ones(F) if config.unit_norms else W_dec.norm(dim=1)
    pre = (x - b_dec if config.centered else x) @ encoder.T + stack.b_enc[0]
    f = twin_codes(stack, pre, norms)
    cap = config.outlier_cap
    assert cap is not None
    w = (cap**2 * VARIANCE / (y - b_dec).detach().square().sum(1, keepdim=True)).clamp(max=1.0)
    skip = x @ stack.W_skip[0] if stack.W_skip is not None else 0.0
    ends = config.boundaries if isinstance(config, MatryoshkaConfig) else (F,)
    outs = [f[:, :end] @ W_dec[:end] + b_dec + skip for end in ends]
    loss = torch.stack([(w * (y - out) ** 2).sum() for out in outs]).mean() + twin_penalty(stack, pre, f, norms, w)
    if isinstance(config, GatedConfig):
        loss = loss + (w * (y - pre.relu() @ W_dec.detach() - b_dec.detach()) ** 2).sum()
    loss = loss / (N * VARIANCE)
    if dead is not None:
        error = (y - outs[-1]).detach()
        chosen = keep(pre.masked_fill(~dead, -torch.inf), min(6, int(dead.sum())))
        missed = (w * (error - (pre.relu() * chosen) @ W_dec) ** 2).sum()
        mean = (w * error).sum(0) / w.sum()
        loss = loss + config.aux_coefficient * missed / (w * (error - mean) ** 2).sum()
    return loss, f


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    """With the parameter's name in the message."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def products_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The products of a step; "pieces" are dense ones, some rows at a time, and the gradients some latents at a time."""
    if kind == "pieces":
        monkeypatch.setattr(kept, "_FEW", N // 4)
        monkeypatch.setattr(kept, "_LATENTS", 3)
    return "dense" if kind == "pieces" else kind


@pytest.mark.parametrize("kind", ["sparse", "dense", "pieces"])
@pytest.mark.parametrize("n_dead", [None, 4, 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_leaves_the_gradients_of_the_published_loss(
    name: str, n_dead: int | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = make(CONFIGS[name], products=products_of(kind, monkeypatch))
    x, y = rows(1), rows(2, D_OUT) if stack.config.is_transcoder else rows(1)
    dead = None if n_dead is None else torch.arange(F) < n_dead
    loss, f = twin_loss(stack, x[0], y[0], dead)
    stack.zero_grad()
    loss.backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in stack.named_parameters()}
    report = stack.step(x, y, variance=VARIANCE, dead=None if dead is None else dead[None])
    torch.testing.assert_close(report.loss[0], loss.detach())
    torch.testing.assert_close(report.l0[0], (f > 0).sum(1).float().mean())
    assert torch.equal(report.fired[0], (f > 0).any(0))
    for parameter, p in stack.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        assert_close(grad, expected[parameter], parameter)


@pytest.mark.parametrize("kind", ["sparse", "dense", "pieces"])
@pytest.mark.parametrize("name", CONFIGS)
def test_members_of_a_stack_are_what_they_would_be_alone(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, products = CONFIGS[name], products_of(kind, monkeypatch)
    stack = make(config, members=3, products=products)
    x, y = rows(1), rows(2, D_OUT) if config.is_transcoder else rows(1)
    dead = torch.arange(F).expand(3, F) < torch.tensor([[4], [0], [30]])
    together = stack.step(x, y, variance=VARIANCE, dead=dead)
    for member in range(3):
        alone = make(config, products=products)
        for p, whole in zip(alone.state_dict().values(), stack.state_dict().values(), strict=True):
            if p.ndim and len(whole) == 3:
                p.copy_(whole[member : member + 1])
        if isinstance(config, BatchTopKConfig):
            alone.rule.get_buffer("threshold").fill_(-1.0)
        report = alone.step(x, y, variance=VARIANCE, dead=dead[member : member + 1])
        torch.testing.assert_close(report.loss[0], together.loss[member])
        for (parameter, one), all_of_them in zip(alone.named_parameters(), stack.parameters(), strict=True):
            if one.grad is not None and all_of_them.grad is not None:
                assert_close(one.grad[0], all_of_them.grad[member], parameter)


def test_each_member_can_have_rows_of_its_own() -> None:
    stack = make(CONFIGS["relu"], members=2)
    x = torch.cat([rows(1), rows(2)])
    both = stack.step(x, x, variance=VARIANCE)
    for member in range(2):
        mine = stack.step(x[member : member + 1], x[member : member + 1], variance=VARIANCE)
        torch.testing.assert_close(mine.loss[member], both.loss[member])


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_member_reconstructs_as_the_step_did(name: str) -> None:
    """In the model's own units: with scales folded in, and thresholds where training selected by batch."""
    stack = make(CONFIGS[name])
    transcodes = stack.config.is_transcoder
    x, y = rows(1), rows(2, D_OUT) if transcodes else rows(1)
    in_scales = torch.linspace(0.5, 2.0, D)
    out_scales = torch.full((D_OUT,), 3.0) if transcodes else in_scales
    stack.step(x, y, variance=VARIANCE)
    if isinstance(stack.config, BatchTopKConfig):  # a hair lower, so that the smallest value of the batch is above it
        stack.rule.get_buffer("threshold").mul_(0.999)
    origin = Origin(model_name="tiny", inputs=("a",), outputs=("b",) if transcodes else ())
    plain = stack.export(0, origin)
    folded = stack.export(0, origin, in_scales, out_scales)
    torch.testing.assert_close(folded(x[0] / in_scales) * out_scales, plain(x[0]), rtol=1e-4, atol=1e-4)
    _, f = twin_loss(stack, x[0], y[0], None)
    tuned = plain.encode(x[0]).to_dense()
    norms = torch.ones(F) if stack.config.unit_norms else stack.W_dec[0].norm(dim=1)
    torch.testing.assert_close(tuned, (f * norms).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_fine_tuning_begins_with_what_was_exported(name: str) -> None:
    stack = make(CONFIGS[name])
    transcodes = stack.config.is_transcoder
    x, y = rows(1), rows(2, D_OUT) if transcodes else rows(1)
    stack.step(x, y, variance=VARIANCE)
    in_scales = torch.full((D,), 2.0)
    out_scales = torch.full((stack.d_out,), 3.0) if transcodes else in_scales
    origin = Origin(model_name="tiny", inputs=("a",), outputs=("b",) if transcodes else ())
    made: Dictionary = stack.export(0, origin, in_scales, out_scales)
    again = make(CONFIGS[name])
    again.begin_with(0, made, in_scales, out_scales)
    torch.testing.assert_close(again.export(0, origin, in_scales, out_scales)(x[0]), made(x[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("norms", "norm", "encoder_norm"), [("unit", 1.0, 1.0), ("free", 0.1, 0.1)])
def test_an_encoder_can_begin_with_directions_of_its_own(norms: Any, norm: float, encoder_norm: float) -> None:
    data = DataStatistics(torch.zeros(1, D), torch.zeros(1, D), VARIANCE)
    began = []
    for start in ("transpose", "random"):
        config = ReLUConfig(**SIZES, **LAMBDA, norms=norms, encoder_start=start)
        stack = Stack([config], make_rule([config]), D, D)
        stack.initialise(data, [3])
        began.append(stack)
    assert torch.equal(*(stack.W_dec for stack in began))
    rows, (transposed, own) = began[0].W_dec[0].detach(), [stack.encoder[0].detach() for stack in began]
    torch.testing.assert_close(transposed, rows)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((F,), norm))
    torch.testing.assert_close(own.norm(dim=1), torch.full((F,), encoder_norm))
    # Random directions of their own have a mean cosine near zero to the decoder's; the transpose has one.
    assert abs(float(torch.cosine_similarity(own, rows).mean())) < 0.3
    with pytest.raises(ConfigError, match="no encoder"):
        ReLUConfig(**SIZES, **LAMBDA, tied=True, encoder_start="random")
    with pytest.raises(ConfigError, match="no encoder"):
        ReLUConfig(**SIZES, **LAMBDA, fine_tune="elsewhere", encoder_start="random")


def test_gradients_along_unit_rows_are_taken_out_and_long_ones_shortened() -> None:
    stack = make(ReLUConfig(**SIZES, **LAMBDA, norms="unit", clip_norm=1e-3), members=2)
    stack.step(rows(1), rows(1), variance=VARIANCE)
    stack.before_update()
    assert stack.W_dec.grad is not None
    assert float((stack.W_dec.grad * stack.W_dec.detach()).sum(2).abs().max()) < 1e-6
    norms = sum(p.grad.flatten(1).square().sum(1) for p in stack.parameters() if p.grad is not None)
    torch.testing.assert_close(norms, torch.full((2,), 1e-6))


@pytest.mark.parametrize("kind", ["sparse", "dense", "pieces"])
def test_p_falls_and_the_penalty_stays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PAnnealConfig(**SIZES, **LAMBDA, p_end=0.2, p_start_at=0.5, p_steps=10)
    products = products_of(kind, monkeypatch)
    stack, p = make(config, products=products), []
    for fraction in (0.0, 0.5, 0.75, 1.0):
        stack.step(rows(1), rows(1), variance=VARIANCE, fraction=fraction)
        stack.after_update()
        p.append(float(stack.rule.get_buffer("p")))
    assert p == pytest.approx([1.0, 1.0, 0.6, 0.2])
    stack = make(config, products=products)
    before = stack.step(rows(1), rows(1), variance=VARIANCE, fraction=0.9).loss
    stack.after_update()
    after = stack.step(rows(1), rows(1), variance=VARIANCE, fraction=0.9).loss
    torch.testing.assert_close(before, after)


def test_k_falls_from_its_start() -> None:
    config = TopKConfig(**SIZES, k=4, k_start=12, k_anneal=0.5)
    assert [config.k_at(fraction) for fraction in (0.0, 0.25, 0.5, 1.0)] == [12, 8, 4, 4]
    stack = make(config)
    with torch.no_grad():
        stack.b_enc.fill_(100.0)
    first, last = (stack.step(rows(1), rows(1), variance=VARIANCE, fraction=at).l0 for at in (0.0, 0.9))
    assert (float(first), float(last)) == (12.0, 4.0)


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_the_powers_of_p_anneal_have_the_gradients_of_plain_ones(p: float) -> None:
    sizes = torch.randn(N, F, generator=torch.Generator().manual_seed(1)).relu()
    weights = torch.randn(N, F, generator=torch.Generator().manual_seed(2))
    quick, plain = sizes.clone().requires_grad_(), sizes.clone().requires_grad_()
    found: Tensor = rules._Power.apply(quick, p)  # type: ignore[no-untyped-call]
    expected = power_mean(plain, p)
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(quick.grad, plain.grad)
    assert quick.grad is not None
    assert bool((quick.grad != 0).eq(sizes > 0).all())


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen |= {tuple(each.shape) for each in tree_leaves(made) if isinstance(each, Tensor)}
        return made


@pytest.mark.parametrize("name", ["relu", "relu-uncentred", "p-anneal", "gated", "jumprelu-step", "jumprelu-tanh"])
def test_what_goes_in_pieces_makes_no_matrix_of_all_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, stack = rows(1), make(CONFIGS[name], products="dense")
    whole = stack.residual(x, x)
    products_of("pieces", monkeypatch)
    with Shapes() as shapes:
        found = stack.residual(x, x)
        stack.step(x, x, variance=VARIANCE, fraction=0.5)
    torch.testing.assert_close(found, whole)
    assert (1, N // 4, F) in shapes.seen
    assert (1, N, F) not in shapes.seen
