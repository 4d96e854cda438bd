"""Single steps of cross-layer transcoders in training: losses and gradients against plain loops, norms, resampling."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import Float
from tests.dictionary.cross_layer_cases import CAP, CONFIGS, VARIANCE, D, F, K, L, N
from torch import Tensor
from torch.nn import functional

from microtome.dictionary import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, ReLUConfig, TopKConfig
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import DictionaryConfig
from microtome.dictionary.decoders import CrossLayerDecoder
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack


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
