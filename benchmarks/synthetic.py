"""`microtome bench synthetic`: what each architecture finds of features that are known.

Activations are sums of known directions with known strengths (`microtome.toy`). Four ways in which features fire make
four kinds of data, each with the same mean number of active features; every architecture is trained on each at that L0
(the coefficient of those with a penalty is searched for, with the first seed), with several seeds of data and weights.
`scores` says how the directions and the firing that were learnt agree with the true ones.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.common import MOST_SEEDS, machine, summary
from microtome.activations.array import ArraySource
from microtome.common.config import require, to_dict
from microtome.common.device import generator, parse_device
from microtome.common.errors import unknown_name
from microtome.dictionary import Dictionary, TrainConfig
from microtome.dictionary.config import ARCHITECTURES, DictionaryConfig, PenaltyConfig, TopKConfig
from microtome.dictionary.search import SearchConfig, search_coefficient
from microtome.dictionary.trainer import Trainer
from microtome.toy import Copula, Hierarchy, SyntheticData, recovery, zipf

DATA = ("independent", "correlated", "hierarchical", "zipf")
GROUP = 4  # features that are correlated, or a parent and its children
CORRELATION = 0.8
CHILD = 0.3  # how often a child fires where its parent does


@dataclass(frozen=True, kw_only=True)
class Config:
    """The data (`features` directions in `d` dimensions, `l0` of them active on average, Gaussian `noise` in each
    dimension), the dictionaries and their training. A feature counts as found at a cosine above `found`."""

    data: tuple[str, ...] = DATA
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    features: int = 48
    d: int = 24
    l0: int = 3
    noise: float = 0.01
    d_sae: int = 64
    seeds: int = 3
    rows: int = 100_000
    held_out: int = 20_000
    tokens: int = 200_000
    batch_size: int = 256
    lr: float = 3e-3
    found: float = 0.9
    share: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.data:
            if name not in DATA:
                raise unknown_name("kind of data", name, DATA)
        for name in self.architectures:
            if name not in ARCHITECTURES:
                raise unknown_name("architecture", name, ARCHITECTURES)
        require(self.features % GROUP == 0, f"features must be a multiple of {GROUP}", got=self.features)
        require(0 < self.l0 <= self.d_sae, "l0 must be between 1 and d_sae", got=self.l0)
        require(0 < self.seeds <= MOST_SEEDS, f"seeds must be between 1 and {MOST_SEEDS}", got=self.seeds)
        require(self.rows >= self.batch_size and self.held_out > 0, "There must be rows to train and to measure on")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """`mmcs`: the mean over true features of the cosine with the nearest decoder row; `recall`: the share above
    `found`; `f1`: of the firing of that nearest latent against the feature's own, the mean over features; `fvu`, `l0`
    and `dead` (latents that are silent on all rows) as in use."""

    mmcs: float
    recall: float
    f1: float
    fvu: float
    l0: float
    dead: float


def make_data(kind: str, config: Config, seed: int) -> SyntheticData:
    """Data of this kind, with `config.l0` features active on average."""
    n, groups = config.features, config.features // GROUP
    even = torch.full((n,), config.l0 / n)
    firing: Copula | Hierarchy | None = None
    density = even
    if kind == "correlated":
        block = torch.full((GROUP, GROUP), CORRELATION).fill_diagonal_(1.0)
        firing = Copula(torch.block_diag(*[block] * groups))
    elif kind == "hierarchical":
        parents = [-1 if i % GROUP == 0 else i - i % GROUP for i in range(n)]
        firing = Hierarchy(tuple(parents))
        shares = torch.tensor([1.0 if parent < 0 else CHILD for parent in parents])
        density = shares * (config.l0 / float(shares.sum()))
    elif kind == "zipf":
        density = zipf(n)
        density = (density * (config.l0 / float(density.sum()))).clamp_max(0.9)
    return SyntheticData.make(n, config.d, density=density, firing=firing, noise=config.noise, seed=seed)


def scores(
    sae: Dictionary,
    directions: Float[Tensor, "n_true d"],
    x: Float[Tensor, "n d"],
    true_codes: Float[Tensor, "n n_true"],
    *,
    found: float,
) -> Scores:
    """How a dictionary agrees with the directions and codes of which `x` was made."""
    codes = sae.encode(x)
    error = (sae.decode(codes, x) - x).double().square().sum()
    fires = codes.to_dense() > 0
    match = recovery(directions, sae.W_dec, threshold=found)
    unit = [w / w.norm(dim=1, keepdim=True).clamp_min(1e-12) for w in (directions, sae.W_dec)]
    nearest = (unit[0] @ unit[1].T).argmax(1)
    said, true = fires[:, nearest], true_codes > 0
    f1 = 2 * (said & true).sum(0) / (said.sum(0) + true.sum(0)).clamp_min(1)
    return Scores(
        mmcs=float(match.mean_max_cosine),
        recall=float(match.found.float().mean()),
        f1=float(f1.mean()),
        fvu=float(error / (x - x.mean(0)).double().square().sum()),
        l0=float(fires.sum(1).double().mean()),
        dead=float((~fires.any(0)).sum()),
    )


def run(config: Config) -> dict[str, Any]:
    """Train and measure all; figures by data, architecture and score: mean, interval, and the value of each seed."""
    device = parse_device(config.device)
    figures = {kind: _measure(kind, config) for kind in config.data}
    return {
        "benchmark": "synthetic",
        "machine": machine(device),
        "sizes": to_dict(config),
        "figures": figures,
        "ratios": {},
        "notes": [f"{kind}\n\n{table(rows)}" for kind, rows in figures.items()],
    }


def _measure(kind: str, config: Config) -> dict[str, dict[str, Any]]:
    training = TrainConfig(
        n_tokens=config.tokens, batch_size=config.batch_size, lr=config.lr, device=config.device, stack="always"
    )
    found: list[list[Scores]] = []
    chosen: list[DictionaryConfig] = []
    for seed in range(config.seeds):
        data, rng = make_data(kind, config, seed), generator(seed, "rows")
        source = ArraySource(data.sample(config.rows, rng)[0], hook_names="synthetic", model_name="synthetic")
        chosen = chosen or [_config(name, config, source, training) for name in config.architectures]
        x, codes = data.sample(config.held_out, rng)
        saes = _train(chosen, source, replace(training, seed=seed))
        found.append([scores(sae, data.directions, x, codes, found=config.found) for sae in saes])
    return {
        name: {
            **{field.name: summary([getattr(each, field.name) for each in some]) for field in fields(Scores)},
            **({"coefficient": each.coefficient} if isinstance(each, PenaltyConfig) else {}),
        }
        for name, each, some in zip(config.architectures, chosen, zip(*found, strict=True), strict=True)
    }


def _config(name: str, config: Config, source: ArraySource, training: TrainConfig) -> DictionaryConfig:
    """The architecture with its usual settings, at the L0 of the data."""
    common: dict[str, Any] = {"d_sae": config.d_sae, "dead_after": max(1, config.tokens // 10)}
    kind = ARCHITECTURES[name]
    if issubclass(kind, TopKConfig):
        return kind(**common, k=config.l0)
    return search_coefficient(
        kind(**common), source, float(config.l0), config=training, search=SearchConfig(share=config.share)
    )


def _train(configs: Sequence[DictionaryConfig], source: ArraySource, training: TrainConfig) -> list[Dictionary]:
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as scratch:
        trainer = Trainer(configs, source, Path(scratch) / "run", training, single=False)
        batches = trainer.begin()
        while trainer.step < training.n_steps:
            trainer.train_step(next(batches))
    made = {
        number: group.export(member, trainer.scales, {"model_name": "synthetic"})
        for group in trainer.groups
        for member, number in enumerate(group.numbers)
    }
    found = [made[number] for number in range(len(configs))]
    return [each for each in found if isinstance(each, Dictionary)]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as Markdown: means, and half of the interval where it can be seen."""
    names = [field.name for field in fields(Scores)]
    lines = [f"| architecture | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for architecture, row in rows.items():
        lines.append(f"| {architecture} | {' | '.join(_cell(row[name], name) for name in names)} |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any], name: str) -> str:
    digits = 1 if name in ("l0", "dead") else 3
    mean, ends = f"{figure['mean']:.{digits}f}", figure["interval"]
    return mean if ends is None else f"{mean} ± {(ends[1] - ends[0]) / 2:.{digits}f}"
