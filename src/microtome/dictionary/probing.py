"""Sparse probing: how much of a yes-or-no property lies in the one, two or five latents that show it best.

For each task and seed, texts are split into two halves of equal shares of both classes. On the first, latents are ranked
by the size of their mean difference between the classes, over their standard deviation there (Gurnee et al. 2023,
2305.01610, §3; SAEBench, 2503.09532), and a logistic probe is trained on the best k; the second half gives its accuracy.
Beside it: a probe on all latents, and one on the model's own activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.common.errors import InputError
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.labelled import EncodedTexts, LabelledTexts
from microtome.dictionary.logistic import fit_probes

KS = (1, 2, 5)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class ProbedTask:
    """Accuracies on one task, with intervals over texts and seeds. `sparse` by the number of latents, `latents` the best
    ones of the first seed, best first; `chance` the share of the larger class."""

    task: str
    attribute: str
    n_texts: int
    chance: float
    model: Estimate
    all_latents: Estimate
    sparse: dict[str, Estimate]
    latents: tuple[int, ...]

    @property
    def answered(self) -> bool:
        """Whether the model's own activations tell the classes apart at all: the probe on them is above chance."""
        return self.model.low > self.chance


@dataclass(frozen=True, kw_only=True)
class Probing:
    """All tasks, and the mean over them of each accuracy."""

    tasks: tuple[ProbedTask, ...]
    mean: dict[str, float]


def probing(encoded: Sequence[EncodedTexts], *, ks: Sequence[int] = KS, seeds: Sequence[int] = SEEDS) -> Probing:
    """Sparse probing on every attribute of every set. Raises InputError where a class has fewer than four texts."""
    tasks = tuple(_task(texts, index, ks, seeds) for texts in encoded for index in range(len(texts.attributes)))
    columns = {"model": [t.model.value for t in tasks], "all_latents": [t.all_latents.value for t in tasks]}
    columns |= {f"top_{k}": [task.sparse[str(k)].value for task in tasks] for k in ks}
    columns["chance"] = [task.chance for task in tasks]
    return Probing(tasks=tasks, mean={name: sum(values) / len(values) for name, values in columns.items()})


def check_probing(texts: Sequence[LabelledTexts]) -> None:
    """Raise InputError where a class has fewer than four texts."""
    for one in texts:
        for name, labels in one.attributes.items():
            halves(torch.tensor(labels), 0, f"{one.name}: {name}")


def _task(texts: EncodedTexts, index: int, ks: Sequence[int], seeds: Sequence[int]) -> ProbedTask:
    labels, n = texts.labels[:, index], len(texts.labels)
    right = {name: torch.full((len(seeds), n), torch.nan) for name in ("model", "all", *map(str, ks))}
    best: list[int] = []
    for row, seed in enumerate(seeds):
        train = halves(labels, seed, f"{texts.name}: {texts.attributes[index]}")
        order = ranked_latents(texts.codes[train], labels[train])
        features = {"model": texts.x, "all": texts.codes, **{str(k): texts.codes[:, order[:k]] for k in ks}}
        for name, x in features.items():
            probe = fit_probes(x[train], labels[train, None])
            right[name][row, ~train] = probe.right(x[~train], labels[~train, None])[:, 0].float()
        best = best or order[: max(ks)].tolist()
    share = float(labels.double().mean())
    return ProbedTask(
        task=texts.name,
        attribute=texts.attributes[index],
        n_texts=n,
        chance=max(share, 1 - share),
        model=Estimate.of_mean(right["model"]),
        all_latents=Estimate.of_mean(right["all"]),
        sparse={str(k): Estimate.of_mean(right[str(k)]) for k in ks},
        latents=tuple(best),
    )


def halves(labels: Bool[Tensor, " text"], seed: int, what: str) -> Bool[Tensor, " text"]:
    """True for the half to train on: half of each class, drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.zeros(len(labels), dtype=torch.bool)
    for of_class in (labels, ~labels):
        members = of_class.nonzero()[:, 0]
        if len(members) < 4:
            raise InputError(
                f"{what} has too few texts of a class",
                got=len(members),
                expected="at least 4",
                fix="Give more, or leave its texts out",
            )
        train[members[torch.randperm(len(members), generator=generator)[: len(members) // 2]]] = True
    return train


def ranked_latents(codes: Float[Tensor, "text d_sae"], labels: Bool[Tensor, " text"]) -> Int[Tensor, " d_sae"]:
    """The latents by the size of the classes' mean difference, in standard deviations, largest first; a latent that never
    changes comes last."""
    difference = codes[labels].mean(0) - codes[~labels].mean(0)
    spread = codes.std(0)
    return (difference.abs() / spread.clamp_min(1e-12) * (spread > 0)).argsort(descending=True, stable=True)
