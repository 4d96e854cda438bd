"""Do bf16 activations say the same as fp32 ones? FVU of the one against the other; and, through a dictionary, whether the
same latents fire on a token and the same sequences are a latent's top examples. Special tokens are left out."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.dictionary import Dictionary
from microtome.dictionary.evaluate import Moments

TOP = 10
_OUTLIER_DIMENSIONS = 2


class Agreement:
    """Fed with the same sequences in both dtypes; `figures()` at the end.

    With a dictionary it holds two matrices `[n_sequences, d_sae]` of peaks.
    """

    def __init__(self, d: int, n_sequences: int, sae: Dictionary | None) -> None:
        self.sae, self.done = sae, 0
        self.moments = Moments(d)
        self.jaccard = 0.0
        d_sae = sae.d_sae if sae else 0
        self.peaks = {name: torch.zeros(n_sequences, d_sae) for name in ("fp32", "bf16")}

    @torch.no_grad()
    def add(
        self,
        fp32: Float[Tensor, "sequence context d"],
        bf16: Float[Tensor, "sequence context d"],
        is_text: Bool[Tensor, "sequence context"],
    ) -> None:
        self.moments.add(fp32[is_text].float(), bf16[is_text].float())
        if self.sae is not None:
            fired = {}
            for name, x in (("fp32", fp32), ("bf16", bf16)):
                codes = self.sae.encode(x.flatten(0, 1).float()).to_dense() * is_text.flatten()[:, None]
                self.peaks[name][self.done : self.done + len(x)] = codes.unflatten(0, x.shape[:2]).amax(1)
                fired[name] = codes[is_text.flatten()] > 0
            both = (fired["fp32"] & fired["bf16"]).sum(1)
            either = (fired["fp32"] | fired["bf16"]).sum(1).clamp_min(1)
            self.jaccard += float((both / either).double().sum())
        self.done += len(fp32)

    def figures(self) -> dict[str, float | int | None]:
        """`fvu`, also without the two dimensions of largest variance; `fired_jaccard`, the mean over tokens; and over
        the latents that fire in at least ten sequences, the mean share of common top-ten sequences and the share of
        latents whose ten are all the same.
        """
        variance = self.moments.variance
        kept = torch.ones(len(variance), dtype=torch.bool)
        kept[variance.topk(min(_OUTLIER_DIMENSIONS, len(variance) - 1)).indices] = False
        figures: dict[str, float | int | None] = {
            "text_tokens": self.moments.n,
            "fvu": self.moments.fvu(),
            "fvu_without_outliers": self.moments.fvu(kept),
        }
        if self.sae is None:
            return figures
        common = common_top(self.peaks["fp32"], self.peaks["bf16"])
        return {
            **figures,
            "fired_jaccard": self.jaccard / self.moments.n,
            "latents_compared": len(common),
            "top_examples_common": float(common.mean()) if len(common) else None,
            "top_examples_all_same": float((common == 1).float().mean()) if len(common) else None,
        }


def common_top(a: Float[Tensor, "sequence d_sae"], b: Float[Tensor, "sequence d_sae"]) -> Float[Tensor, " latent"]:
    """For each latent that fires in at least `TOP` sequences of both, the share of top sequences that are common."""
    enough = ((a > 0).sum(0) >= TOP) & ((b > 0).sum(0) >= TOP)
    if not bool(enough.any()):
        return torch.zeros(0)
    top_a, top_b = (peaks[:, enough].topk(TOP, dim=0).indices for peaks in (a, b))
    return (top_a[:, None] == top_b[None]).any(1).float().mean(0)
