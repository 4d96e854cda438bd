"""Which latents are kept: the k largest of each row, or the largest of a whole batch."""

from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """The indices of the k largest pre-activations of each row, in no order."""
    return pre.topk(k, dim=1, sorted=False).indices


def batch_top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Bool[Tensor, "n d_sae"]:
    """Where the `k` largest positive pre-activations of the whole batch are (fewer, if fewer are positive; where many
    are equal to the smallest of them, as can be in bf16, a few more)."""
    flat = pre.reshape(-1)
    if k >= len(flat):
        return pre > 0
    edge = flat.topk(k, sorted=False).values.min()
    return (pre >= edge) & (pre > 0)
