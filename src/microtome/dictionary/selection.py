"""Which latents are kept: the k largest of each row, the k·n largest of a batch, those above a threshold."""

from jaxtyping import Float, Int
from torch import Tensor


def top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """The indices of the k largest pre-activations of each row, in no order."""
    return pre.topk(k, dim=1, sorted=False).indices
