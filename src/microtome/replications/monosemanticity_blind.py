"""A blind comparison: features and neurons in one random order without labels, for a person to rate, and its scoring.

`comparison` gives three texts: the contexts to read, an empty sheet of ratings, and the key, which the reader does not open.
Bricken et al. 2023 had people rate features beside neurons, without knowing which is which; here the order is drawn from the seed,
and both kinds are shown in the same way.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from microtome.common.artifacts import atomic_file
from microtome.common.device import derive_seed, generator
from microtome.common.errors import InputError
from microtome.replications.monosemanticity_measures import Firings
from microtome.replications.monosemanticity_tables import TOP, Contexts, Example, chance_greater
from microtome.text.strings import TokenStrings

ITEMS, RATINGS, KEY = "comparison.md", "ratings.csv", "comparison-key.json"
COLUMNS = ("item", "rating", "confidence", "note")
LOWEST, HIGHEST = 1, 5
_SCALE = (
    "Rate how well one idea explains all contexts of an item, from 1 (no idea does) to 5 (one idea explains all of them, the weak "
    "ones too). Write the rating into `ratings.csv`, and if you like a confidence from 1 to 5 and a note. An item that you cannot "
    "judge stays empty."
)


@dataclass(frozen=True)
class Comparison:
    """The three texts."""

    items: str
    ratings: str
    key: str

    def save(self, folder: Path) -> None:
        """Write `comparison.md`, `ratings.csv` (unless there is one: it may be filled in) and `comparison-key.json`.

        Raises InputError where the ratings in the folder belong to another key.
        """
        folder.mkdir(parents=True, exist_ok=True)
        old = folder / KEY
        if (folder / RATINGS).exists() and old.exists() and old.read_text(encoding="utf-8") != self.key:
            raise InputError(
                f"{folder / RATINGS} belongs to another comparison",
                fix="Move it and its key away, or choose another folder",
            )
        texts = {ITEMS: self.items, KEY: self.key, RATINGS: self.ratings}
        for name, text in texts.items():
            if name != RATINGS or not (folder / name).exists():
                with atomic_file(folder / name) as file:
                    file.write_text(text, encoding="utf-8")


def comparison(kinds: Mapping[str, Firings], strings: TokenStrings, *, n: int, seed: int) -> Comparison:
    """`n` latents of each kind (`"feature"`, `"neuron"`), drawn among those with at least `TOP` firings, in a drawn order.

    An item shows the strongest contexts and ones from each fifth of the activation. Activations are given in percent of the
    strongest, since their size would tell the kinds apart.
    """
    drawn = [(kind, latent) for kind, firings in kinds.items() for latent in _drawn(firings, kind, n, seed)]
    order = torch.randperm(len(drawn), generator=generator(seed, "order")).tolist()
    items = [drawn[i] for i in order]
    contexts = {kind: Contexts(firings, strings) for kind, firings in kinds.items()}
    blocks = ["# What do these respond to?", _SCALE]
    for number, (kind, latent) in enumerate(items, 1):
        # the draw of contexts does not depend on the kind
        blocks += [f"## Item {number}", _item(contexts[kind], latent, derive_seed(seed, "item", number))]
    key = {str(number): {"kind": kind, "latent": latent} for number, (kind, latent) in enumerate(items, 1)}
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerows([COLUMNS, *([number, "", "", ""] for number in key)])
    return Comparison(
        "\n\n".join(blocks) + "\n", sheet.getvalue(), json.dumps({"seed": seed, "items": key}, indent=1) + "\n"
    )


def _drawn(firings: Firings, kind: str, n: int, seed: int) -> list[int]:
    enough = np.flatnonzero(firings.counts >= TOP)
    order = torch.randperm(len(enough), generator=generator(seed, "drawn", kind)).numpy()
    return [int(i) for i in np.sort(enough[order[:n]])]


def _item(contexts: Contexts, latent: int, seed: int) -> str:
    top = contexts.top(latent, 6)
    strongest = top[0].activation
    rows = ["| % of its maximum | context |", "|---|---|", *(_row(one, strongest) for one in top)]
    for examples in contexts.sampled(latent, 5, 2, seed):
        rows += [_row(one, strongest) for one in examples if one not in top]
    return "\n".join(rows)


def _row(example: Example, strongest: float) -> str:
    return f"| {100 * example.activation / strongest:.0f} | {example.markdown} |"


# ---- scoring --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The ratings of one kind against another's. `chance` is that of a random one of the first to be rated higher than one of the
    second (ties half), with its 95 % bootstrap interval over items."""

    kinds: tuple[str, str]
    rated: tuple[int, int]
    means: tuple[float, float]
    chance: float
    interval: tuple[float, float]


def score(ratings: Path, key: Path, *, kinds: tuple[str, str] = ("feature", "neuron"), seed: int = 0) -> Scores:
    """Compare a filled-in `ratings.csv` with the key. Items without a rating are left out.

    Raises InputError for a file that is not such a sheet, an item that is not in the key or comes twice, a rating outside 1–5, and
    where one of the kinds has no rating.
    """
    where = json.loads(key.read_text(encoding="utf-8"))["items"]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for item, rating in _ratings(ratings):
        if item not in where:
            raise InputError(f"{ratings} rates an item that is not in {key}", got=item)
        found[where[item]["kind"]].append(rating)
    first, second = (np.array(found[kind]) for kind in kinds)
    if not len(first) or not len(second):
        raise InputError("Both kinds need ratings", got=f"{len(first)} and {len(second)}")
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    again = [chance_greater(rng.choice(first, len(first)), rng.choice(second, len(second))) for _ in range(1000)]
    low, high = np.quantile(again, [0.025, 0.975])
    return Scores(
        kinds=kinds,
        rated=(len(first), len(second)),
        means=(float(first.mean()), float(second.mean())),
        chance=chance_greater(first, second),
        interval=(float(low), float(high)),
    )


def _ratings(path: Path) -> list[tuple[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(file))
    if not rows or not {"item", "rating"} <= set(rows[0]):
        raise InputError(f"{path} is no sheet of ratings", expected=f"columns {', '.join(COLUMNS)}")
    rated = []
    for row in rows:
        text = (row["rating"] or "").strip()
        if not text:
            continue
        if not _is_rating(text):
            raise InputError(
                f"Item {row['item']} has no such rating", got=text, expected=f"a number from {LOWEST} to {HIGHEST}"
            )
        rated.append((row["item"].strip(), float(text)))
    items = [item for item, _ in rated]
    if twice := sorted({item for item in items if items.count(item) > 1}):
        raise InputError("An item is rated twice", got=", ".join(twice))
    return rated


def _is_rating(text: str) -> bool:
    try:
        return LOWEST <= float(text) <= HIGHEST
    except ValueError:
        return False
