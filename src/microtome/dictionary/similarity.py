"""Do two dictionaries hold the same latents? MMCS: the mean, over one's decoder rows, of the largest cosine to a row of the
other (Sharkey, Braun & Millidge 2022, "Taking features out of superposition"; Cunningham et al. 2023, 2309.08600).

MMCS lets several rows share one partner, and a wide dictionary finds a partner for nearly every row of a narrow one. So
it is given in both directions, and beside it the mean cosine where each row has a partner of its own (`matched`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from microtome.common.errors import InputError
from microtome.dictionary.geometry import best_cosines, unit_rows
from microtome.dictionary.matching import best_matching
from microtome.dictionary.surface import SparseDictionary, decoder_rows

THRESHOLDS = (0.7, 0.9)
MOST_MATCHED = 8192


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How much of each dictionary is in the other. `forward`: from the first's rows to the second's; `above` the shares of
    rows whose best cosine lies above 0.7 and 0.9. `matched` and `matched_above`: over the pairs of the best one-to-one
    matching of the narrower one's rows; None where both have more than 8,192."""

    forward: float
    backward: float
    forward_above: dict[str, float]
    backward_above: dict[str, float]
    matched: float | None
    matched_above: dict[str, float] | None


def similarity(first: SparseDictionary, second: SparseDictionary, *, match: bool = True) -> Similarity:
    """MMCS of two dictionaries; `match=False` leaves the one-to-one matching out, which takes longest.

    Raises InputError for dictionaries whose rows differ in width, or that have no row but zeros.
    """
    a, b = unit_rows(decoder_rows(first).cpu()), unit_rows(decoder_rows(second).cpu())
    if a.shape[1] != b.shape[1]:
        raise InputError("Only directions of one space have a cosine", got=f"d_out {a.shape[1]} and {b.shape[1]}")
    if not len(a) or not len(b):
        raise InputError("A dictionary has no direction: all its decoder rows are zero")
    there, back = best_cosines(a, b), best_cosines(b, a)
    pairs = None
    if match and min(len(a), len(b)) <= MOST_MATCHED:
        small, large = (a, b) if len(a) <= len(b) else (b, a)
        columns = best_matching((small @ large.T).numpy())
        pairs = (small * large[columns]).sum(1)
    return Similarity(
        forward=float(there.double().mean()),
        backward=float(back.double().mean()),
        forward_above=_above(there.tolist()),
        backward_above=_above(back.tolist()),
        matched=None if pairs is None else float(pairs.double().mean()),
        matched_above=None if pairs is None else _above(pairs.tolist()),
    )


def _above(cosines: Sequence[float]) -> dict[str, float]:
    return {str(t): sum(c > t for c in cosines) / len(cosines) for t in THRESHOLDS}
