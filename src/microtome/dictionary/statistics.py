"""What training wants to know of its data beforehand: a scale for each hook point, and a centre."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.errors import InputError


def input_scales(rows: Float[Tensor, "row d"], widths: Sequence[int]) -> Float[Tensor, " d"]:
    """For each column the factor that gives its hook point's activations a mean norm of √d.

    Raises InputError for activations that hold NaN or infinity, or are zero.
    """
    if not bool(torch.isfinite(rows).all()):
        raise InputError("The activations hold NaN or infinity", fix="Harvest them in bf16 or fp32")
    pieces = []
    for point in rows.split(list(widths), dim=1):
        norm = float(point.norm(dim=1).mean())
        if norm == 0.0:
            raise InputError("The activations are all equal: there is nothing to learn", got=f"{len(rows)} zero rows")
        pieces.append(rows.new_full((point.shape[1],), point.shape[1] ** 0.5 / norm))
    return torch.cat(pieces)


def geometric_median(rows: Float[Tensor, "row d"], steps: int = 20) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to all rows, by Weiszfeld's iteration: a centre that outliers do not
    move."""
    point = rows.mean(0)
    for _ in range(steps):
        weights = 1.0 / distances(rows, point).clamp_min(1e-9)
        point = (weights @ rows) / weights.sum()
    return point


def distances(rows: Float[Tensor, "*s row d"], point: Float[Tensor, "*s d"]) -> Float[Tensor, "*s row"]:
    """The distance of each row to a point, without a matrix of differences."""
    return torch.cdist(rows, point[..., None, :], compute_mode="donot_use_mm_for_euclid_dist").squeeze(-1)
