"""What a crosscoder says of two models: which latents both have, and which only one (Lindsey et al. 2024, "Sparse
Crosscoders", transformer-circuits.pub/2024/crosscoders; Minder et al. 2025, arXiv 2504.02922)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from microtome.common.config import require
from microtome.common.errors import ConfigError, InputError
from microtome.dictionary.decoders import point_norms
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.statistics import input_scales


@dataclass(frozen=True)
class Sides:
    """A crosscoder's latents on its two sides, which are called `names`.

    `norms` are those of the decoder rows, summed over each side's points. `relative` is the share of the second side, 0
    to 1 (½ for a latent without decoder). `cosine` compares the two sides' rows where they are of one size: a latent can be
    on both sides and mean something else.
    """

    names: tuple[str, str]
    norms: Float[Tensor, "d_sae 2"]
    relative: Float[Tensor, " d_sae"]
    cosine: Float[Tensor, " d_sae"] | None

    def only(self, name: str, edge: float = 0.1) -> Bool[Tensor, " d_sae"]:
        """The latents whose decoder has at most the share `edge` on the other side. Raises ConfigError for a name that is
        neither side's."""
        require(
            name in self.names, "That is neither side of the crosscoder", got=name, expected=" or ".join(self.names)
        )
        return self.relative <= edge if name == self.names[0] else self.relative >= 1 - edge

    def shared(self, edge: float = 0.1) -> Bool[Tensor, " d_sae"]:
        """The latents whose share of each side is within `edge` of one half."""
        return (self.relative - 0.5).abs() <= edge


@torch.no_grad()
def compare_sides(crosscoder: Dictionary, rows: Float[Tensor, "row d_in"]) -> Sides:
    """The latents of a crosscoder of two models on either side.

    `rows` are some of its activations, which give the units: each point's are scaled so that their distances to their mean
    are √d in the mean, and a model of larger activations has no larger share. The sides are the points of each model (what
    stands before the colon in their names, see `PairedSource`), or, of a crosscoder of two points, those points.

    Raises ConfigError for a dictionary without two sides, InputError for rows of another size.
    """
    points = crosscoder.origin.outputs
    labels = points if len(points) == 2 and not all(":" in p for p in points) else [p.partition(":")[0] for p in points]
    found = list(dict.fromkeys(labels))
    if len(found) != 2 or crosscoder.is_transcoder:
        raise ConfigError(
            "This compares the two sides of a crosscoder",
            got=f"a dictionary of {', '.join(points)}",
            expected="points of two models, as PairedSource names them, or two points",
        )
    if rows.shape[1] != crosscoder.d_in:
        raise InputError("The rows are not this crosscoder's", got=f"width {rows.shape[1]}", expected=crosscoder.d_in)
    widths = crosscoder.output_widths
    rows = rows.to(crosscoder.W_dec)
    W_dec = crosscoder.W_dec * input_scales(rows - rows.mean(0), widths)
    of_points = point_norms(W_dec, widths)
    pieces = W_dec.split(list(widths), dim=1)
    norms, sides = [], []
    for name in found:
        mine = [i for i, label in enumerate(labels) if label == name]
        norms.append(of_points[:, mine].sum(1))
        sides.append(torch.cat([pieces[i] for i in mine], 1))
    a, b = norms
    total = a + b
    relative = torch.where(total > 0, b / total.clamp_min(1e-12), torch.full_like(total, 0.5))
    alike = sides[0].shape == sides[1].shape
    cosine = functional.cosine_similarity(sides[0], sides[1], dim=1) if alike else None
    return Sides((found[0], found[1]), torch.stack(norms, 1), relative, cosine)
