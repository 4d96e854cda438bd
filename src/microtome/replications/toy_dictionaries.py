"""The sixth part of `toy_models_of_superposition`: sparse autoencoders that recover the true features of toy models.

ARENA's protocol: the hidden space of a toy model (5 features of density .025 in 2 dimensions), five latents, the loss
mean_d (h − h')² + λ Σ|z|. The features are known, so recovery can be tested; a good reconstruction is not enough.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.device import derive_seed, generator
from microtome.common.progress import Progress
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import DictionaryConfig, GatedConfig, JumpReLUConfig, ReLUConfig
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.jumprelu import Heaviside, JumpReLU
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack
from microtome.replications.frame import Found, claim
from microtome.replications.toy_config import ToyModelsConfig
from microtome.toy import Features, Recovery, ToyConfig, ToyModel, recovery, train_toy
from microtome.views import Claim, Directions, Table, at_least, at_most
from microtome.views.report import Cell

_ARENA, _DENSITY, _LATENTS = "ARENA 1.5.4", 0.025, 5
_TANH_SCALE = 0.3
KINDS = ("ReLU", "ReLU, resampled", "Gated, resampled", "JumpReLU, resampled")


@dataclass(frozen=True, eq=False)
class Trained:
    """Dictionaries of one kind, one for each toy model, and what they do on fresh inputs."""

    kind: str
    W_dec: Float[Tensor, "S F d"]
    recovered: Recovery
    firing: Float[Tensor, "S F"]
    """How often each latent fires."""
    explained: Float[Tensor, " S"]
    """Share of the variance."""

    @property
    def full(self) -> int:
        return int(self.recovered.full.sum())

    @property
    def dead(self) -> float:
        return float((self.firing == 0).float().mean())


def dictionaries(config: ToyModelsConfig, progress: Progress) -> Found:
    """Toy models first, then each kind of dictionary on all of them side by side."""
    toys = ToyModel(ToyConfig(n_features=5, n_hidden=2, n_instances=config.dictionaries, seed=config.seed))
    train_toy(toys, Features(5, _DENSITY, config.dictionaries), config.train)
    found = []
    for kind in KINDS:
        found.append(_trained(config, toys, kind))
        progress.advance(1, f"dictionaries: {kind}")
    return Found(
        "Dictionaries that recover the features", _claims(config, found), [_table(found), *_figures(toys, found)]
    )


def _member(config: ToyModelsConfig, kind: str) -> DictionaryConfig:
    """λ beside a summed squared error is twice ARENA's, which takes the mean over two dimensions."""
    revival = "resample" if "resampled" in kind else "none"
    common: dict[str, Any] = {
        "d_sae": _LATENTS,
        "norms": "unit",
        "revival": revival,
        "resample_every": max(config.dictionary_steps // 8, 1),
        "b_dec_start": "zero",
        "encoder_start": "random",  # as there: from the decoder's transpose no latent ever dies
        "outlier_cap": None,
        "betas": (0.0, 0.999),
        "coefficient": 2 * config.coefficient,
        "coefficient_warmup": 0.0,
    }
    if kind.startswith("Gated"):
        return GatedConfig(**common, start_threshold=0.0)
    if kind.startswith("JumpReLU"):
        common["coefficient"] = 2 * config.jumprelu_coefficient
        # A count of latents gives the encoder no gradient: two latents that share a feature stay so, and the one that could
        # stand alone dies. A tanh that is nearly straight over the codes (0 to 1.15) pulls as L1 does.
        thresholds: dict[str, Any] = {"start_threshold": 0.1, "threshold_rate": 1.0, "bandwidth": 0.1}
        return JumpReLUConfig(**common, **thresholds, sparsity="tanh", tanh_scale=_TANH_SCALE)
    return ReLUConfig(**common)


def _trained(config: ToyModelsConfig, toys: ToyModel, kind: str) -> Trained:
    """One stack, a member for each toy model, on fresh batches of its hidden space. Dead: silent for the last fifth of the
    steps between two resamplings; new weights until three fifths of the run."""
    members = [_member(config, kind)] * config.dictionaries
    one, stack = members[0], Stack(members, make_rule(members), 2, 2)
    center = torch.zeros(len(members), 2)
    seeds = [derive_seed(config.seed, "dictionary", i) for i in range(len(members))]
    stack.initialise(DataStatistics(center, center, 1.0), seeds)
    optimiser = torch.optim.Adam(stack.parameters(), lr=1e-3, betas=(one.betas[0], one.betas[1]), fused=True)
    features, rng = Features(5, _DENSITY, len(members)), generator(config.seed, "dictionary data")
    silent = torch.zeros(len(members), _LATENTS, dtype=torch.int64)
    for step in range(1, config.dictionary_steps + 1):
        h = _hidden(toys, features, config.dictionary_batch, rng)
        # Half the summed error is the mean over two dimensions.
        report = stack.step(h, h, variance=2.0, fraction=step / config.dictionary_steps)
        stack.before_update()
        optimiser.step()
        stack.after_update()
        silent = torch.where(report.fired, 0, silent + 1)
        due = one.revival == "resample" and step % one.resample_every == 0
        if due and step <= one.resample_until * config.dictionary_steps:
            for i, dead in enumerate(silent >= max(one.resample_every // 5, 1)):
                draw = generator(config.seed, "resample", step, i)
                resample(stack, optimiser, i, dead, h[i], h[i], generator=draw)
    return _measured(kind, stack, toys, features, generator(config.seed, "dictionary test"))


def _hidden(toys: ToyModel, features: Features, n: int, rng: torch.Generator) -> Float[Tensor, "S n d"]:
    with torch.no_grad():
        return toys.encode(features.sample(n, rng))


@torch.no_grad()
def _measured(kind: str, stack: Stack, toys: ToyModel, features: Features, rng: torch.Generator) -> Trained:
    h = _hidden(toys, features, 10_000, rng)
    W_dec, firing, explained = [], [], []
    for i in range(len(stack)):
        sae = stack.export(i, Origin(model_name="toy model", inputs=("hidden",)))
        codes = sae.encode(h[i])
        dense = codes.to_dense()
        error = (h[i] - sae.decode(codes)).square().sum()
        W_dec.append(sae.W_dec.detach())
        firing.append((dense > 0).float().mean(dim=0))
        explained.append(1 - error / (h[i] - h[i].mean(dim=0)).square().sum())
    learned = torch.stack(W_dec)
    found = recovery(toys.W_in.detach().transpose(1, 2), learned)
    return Trained(kind, learned, found, torch.stack(firing), torch.stack(explained))


# ---- claims -------------------------------------------------------------------------------------------------------------


def _claims(config: ToyModelsConfig, found: list[Trained]) -> list[Claim]:
    n = config.dictionaries
    plain, resampled = found[0], found[1]
    return [
        claim(
            "recovery",
            f"With resampling, autoencoders find all five features (cosines > {plain.recovered.threshold}; share of toy models)",
            at_least(9 / 16),
            resampled.full / n,
            source=_ARENA,
            note=f"{resampled.full} of {n}; mean of the best cosines {float(resampled.recovered.mean_max_cosine.mean()):.3f}",
        ),
        claim(
            "resampling_helps",
            "Resampling finds all features of more toy models than training without it (difference of the shares)",
            at_least(5 / 16),
            (resampled.full - plain.full) / n,
            source=_ARENA,
            note=f"without: {plain.full} of {n}, {plain.dead:.3f} of the latents dead; with: {resampled.dead:.3f}",
        ),
        *_resampling(config),
        claim(
            "straight_through",
            "JumpReLU's gradients equal the straight-through estimator's formula (largest difference)",
            at_most(1e-6),
            _estimator_error(config),
            source="arXiv 2407.14435, eqs. 11 and 12",
        ),
    ]


def _resampling(config: ToyModelsConfig) -> list[Claim]:
    """What resampling changes, on a small stack after some steps."""
    members = [_member(config, KINDS[1])] * 2
    stack = Stack(members, make_rule(members), 2, 2)
    zero = torch.zeros(2, 2)
    stack.initialise(DataStatistics(zero, zero, 1.0), [0, 1])
    optimiser = torch.optim.Adam(stack.parameters(), lr=1e-2)
    rng = generator(config.seed, "resampling check")
    for _ in range(5):
        x = torch.randn(2, 64, 2, generator=rng)
        stack.step(x, x, variance=2.0)
        optimiser.step()
    before = {name: p.detach().clone() for name, p in stack.named_parameters()}
    dead = torch.tensor([False, True, False, True, False])
    resample(stack, optimiser, 0, dead, x[0], x[0], generator=rng)
    rows = [(name, p) for name, p in stack.named_parameters() if p.ndim >= 2 and p.shape[1] == _LATENTS]
    live = torch.stack([~dead, torch.ones_like(dead)])
    moved = max(float((p.detach() - before[name])[live].abs().max()) for name, p in rows)
    moments = max(
        float(optimiser.state[p][key][0, dead].abs().max()) for _, p in rows for key in ("exp_avg", "exp_avg_sq")
    )
    said = [
        (
            "resampled_bias",
            "Resampled latents have a bias of 0 (largest)",
            float(stack.b_enc[0, dead].detach().abs().max()),
        ),
        (
            "resampled_live",
            "Resampling leaves live latents, and other dictionaries, as they are (largest change)",
            moved,
        ),
        ("resampled_moments", "Adam's moments of resampled latents are 0 (largest)", moments),
    ]
    return [claim(name, words, at_most(1e-8), value, source=_ARENA) for name, words, value in said]


def _estimator_error(config: ToyModelsConfig) -> float:
    """Autograd through both functions, against the formula worked out entry by entry."""
    rng, width = generator(config.seed, "estimator"), 0.3
    z = torch.randn(200, generator=rng).requires_grad_()
    theta = torch.rand(200, generator=rng).requires_grad_()
    up = torch.randn(200, generator=rng)
    found = [
        torch.autograd.grad((JumpReLU.apply(z, theta, width) * up).sum(), (z, theta)),  # type: ignore[no-untyped-call]
        torch.autograd.grad((Heaviside.apply(z, theta, width) * up).sum(), theta),  # type: ignore[no-untyped-call]
    ]
    errors = []
    for i in range(200):
        zi, ti, ui = float(z[i].detach()), float(theta[i].detach()), float(up[i])
        kernel = 1.0 if abs((zi - ti) / width) < 0.5 else 0.0
        wanted = (ui * (zi > ti), -ui * ti / width * kernel, -ui / width * kernel)
        got = (found[0][0][i], found[0][1][i], found[1][0][i])
        errors += [abs(float(g) - w) for g, w in zip(got, wanted, strict=True)]
    return max(errors)


# ---- how it is shown ----------------------------------------------------------------------------------------------------


def _table(found: list[Trained]) -> Table:
    columns = [
        "dictionary",
        "all five found",
        "mean best cosine",
        "dead latents",
        "mean firing rate",
        "variance explained",
    ]
    rows: list[list[Cell]] = [
        [
            one.kind,
            f"{one.full} of {len(one.firing)}",
            float(one.recovered.mean_max_cosine.mean()),
            one.dead,
            float(one.firing.mean()),
            float(one.explained.mean()),
        ]
        for one in found
    ]
    return Table(columns, rows, caption=f"The features fire with a rate of {_DENSITY}.")


def _figures(toys: ToyModel, found: list[Trained]) -> list[Directions]:
    """The true directions and the learned ones of the first toy models."""
    shown = min(5, toys.config.n_instances)
    truth = torch.nn.functional.normalize(toys.W_in.detach().transpose(1, 2), dim=-1)
    figures = []
    for one in found[:2]:
        learned = 0.75 * torch.nn.functional.normalize(one.W_dec, dim=-1)
        figures.append(
            Directions(
                [torch.cat([truth[i], learned[i]]) for i in range(shown)],
                names=[f"model {i}: {int(one.recovered.found[i].sum())} of 5" for i in range(shown)],
                groups=[["true"] * 5 + ["learned (drawn shorter)"] * _LATENTS] * shown,
                title=f"True and learned directions: {one.kind}",
            )
        )
    return figures
