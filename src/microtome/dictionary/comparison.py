"""`compare`: several dictionaries of one model side by side, on the same tokens: what a sweep, or a choice between
releases, is decided on.

A dictionary is on the Pareto front if no other of the same points is as sparse or sparser and as good or better, and one
of both strictly. Only dictionaries of the same outputs compete: FVU at one point says nothing of FVU at another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from microtome.common.artifacts import CONFIG, read_json
from microtome.common.errors import InputError
from microtome.dictionary.evaluate import EvaluateConfig, Evaluation, evaluate_all
from microtome.dictionary.similarity import Similarity, similarity
from microtome.dictionary.surface import SparseDictionary
from microtome.model import HookedModel
from microtome.text import TokenDataset

COLUMNS = (
    *("name", "architecture", "outputs", "d_sae", "l0", "fvu", "fvu_without_sinks"),
    *("ce_recovered", "ce_recovered_mean", "delta_ce", "delta_ce_replaced", "top1_replaced"),
    *("dead_fraction", "n_dense", "on_front"),
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One dictionary of a comparison. `architecture` is what it was trained as. `on_front` and `on_ce_front`: whether it is on
    the Pareto front of L0 with FVU, and of L0 with CE recovered (None where this was not measured)."""

    name: str
    architecture: str
    outputs: tuple[str, ...]
    d_sae: int
    evaluation: Evaluation
    on_front: bool
    on_ce_front: bool | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The dictionaries in the order in which they were given; `similarities` by pairs of names, where asked for."""

    rows: tuple[Compared, ...]
    similarities: dict[tuple[str, str], Similarity] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Compared:
        return {row.name: row for row in self.rows}[name]

    def table(self) -> list[dict[str, str | int | float | bool | None]]:
        """One flat row for each dictionary, with the columns `COLUMNS`."""
        return [
            {
                column: ", ".join(row.outputs)
                if column == "outputs"
                else getattr(row, column)
                if hasattr(row, column)
                else getattr(row.evaluation, column)
                for column in COLUMNS
            }
            for row in self.rows
        ]


def compare(
    model: HookedModel,
    dictionaries: Sequence[SparseDictionary],
    dataset: TokenDataset,
    config: EvaluateConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    similarities: bool = False,
) -> Comparison:
    """Evaluate them together, each batch read once. `names` (else their folders, else numbers) must differ; with
    `similarities`, MMCS of each pair of equal width is added.

    Raises InputError for no dictionary or names that are not one for each; else as `evaluate` does.
    """
    if not dictionaries:
        raise InputError("There is no dictionary to compare")
    named = list(names) if names is not None else _names(dictionaries)
    if len(set(named)) != len(dictionaries) or len(named) != len(dictionaries):
        raise InputError("Each dictionary needs a name of its own", got=", ".join(named))
    architectures = [trained_as(dictionary) for dictionary in dictionaries]
    found = evaluate_all(model, dictionaries, dataset, config)
    outputs = [dictionary.origin.outputs for dictionary in dictionaries]
    by_fvu = _fronts(outputs, [one.l0 for one in found], [one.fvu for one in found])
    ce = [None if one.ce_recovered is None else -one.ce_recovered for one in found]
    by_ce = _fronts(outputs, [one.l0 for one in found], ce)
    rows = tuple(
        Compared(
            name=name,
            architecture=architecture,
            outputs=dictionary.origin.outputs,
            d_sae=dictionary.d_sae,
            evaluation=evaluation,
            on_front=bool(front),
            on_ce_front=ce_front,
        )
        for name, architecture, dictionary, evaluation, front, ce_front in zip(
            named, architectures, dictionaries, found, by_fvu, by_ce, strict=True
        )
    )
    return Comparison(rows=rows, similarities=_similarities(named, dictionaries) if similarities else {})


def trained_as(dictionary: SparseDictionary) -> str:
    """The architecture that its folder says it was trained with, and what kind of transcoder it is; else what it is in use,
    where a BatchTopK or Matryoshka dictionary is one with thresholds, "jumprelu"."""
    in_use = str(getattr(dictionary, "architecture", type(dictionary).__name__))
    folder = getattr(dictionary, "path", Path())
    if folder == Path() or not (folder / CONFIG).is_file():  # Path(): it was not read from a folder
        return in_use
    config = read_json(folder / CONFIG).get("config")
    trained = config.get("architecture") if isinstance(config, dict) else None
    name = trained.get("architecture") if isinstance(trained, dict) else None
    activation = getattr(getattr(dictionary, "activation", None), "name", None)
    if name is None or activation is None:  # a cross-layer transcoder has several
        return in_use
    kind = in_use.removeprefix(activation).removeprefix("standard").removeprefix("_")
    return "_".join(part for part in ("" if name == "standard" and kind else name, kind) if part)


def _names(dictionaries: Sequence[SparseDictionary]) -> list[str]:
    paths = [getattr(dictionary, "path", None) for dictionary in dictionaries]
    short = [path.name if path is not None else "" for path in paths]
    return short if all(short) and len(set(short)) == len(short) else [str(i) for i in range(len(dictionaries))]


def _fronts(outputs: Sequence[tuple[str, ...]], l0: Sequence[float], cost: Sequence[float | None]) -> list[bool | None]:
    """Whether no other of the same outputs is at least as good in both, and better in one."""
    found: list[bool | None] = []
    for i, mine in enumerate(cost):
        if mine is None:
            found.append(None)
            continue
        rivals = [
            (l0[j], theirs)
            for j, theirs in enumerate(cost)
            if j != i and theirs is not None and outputs[j] == outputs[i]
        ]
        beaten = any(a <= l0[i] and b <= mine and (a, b) != (l0[i], mine) for a, b in rivals)
        found.append(not beaten)
    return found


def _similarities(names: Sequence[str], dictionaries: Sequence[SparseDictionary]) -> dict[tuple[str, str], Similarity]:
    return {
        (names[i], names[j]): similarity(dictionaries[i], dictionaries[j])
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if dictionaries[i].d_out == dictionaries[j].d_out
    }
