"""The heat-map of the built-in model's induction heads: `python scripts/induction_heads.py`.

A head's score is how much it looks, from the second half of a random sequence that is said twice, at the token that
followed the same token the first time (Olsson et al. 2022, "In-context Learning and Induction Heads").
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch

from microtome.model import HookedModel, load_model

LENGTH = 50
OUT = Path(__file__).parents[1] / "docs/images"


def induction_scores(model: HookedModel, n_sequences: int = 8) -> torch.Tensor:
    """Mean attention `[layer, head]` from each repeated token to the one behind its first appearance."""
    random = torch.randint(1000, 20_000, (n_sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    bos = model.to_tokens("a")[:, :1].expand(n_sequences, 1)
    patterns = model.activations(torch.cat([bos, random, random], dim=1), "blocks.*.attn.hook_pattern")
    diagonals = [p.diagonal(1 - LENGTH, dim1=-2, dim2=-1)[..., 1:] for p in patterns.values()]
    return torch.stack([diagonal.mean((0, -1)) for diagonal in diagonals])


def main() -> None:
    scores = induction_scores(load_model("smollm2-135m"))
    for theme, style, name in (("light", "default", ""), ("dark", "dark_background", "-dark")):
        with plt.style.context(style):
            figure, axes = plt.subplots(figsize=(3.6, 6), layout="constrained")
            image = axes.imshow(scores, cmap="Purples" if theme == "light" else "magma", vmin=0, vmax=1, aspect="auto")
            axes.set(xlabel="head", ylabel="layer", title="induction score", xticks=range(9), yticks=range(0, 30, 5))
            figure.colorbar(image, label="attention to the token behind the first one")
            figure.savefig(OUT / f"induction_heads{name}.png", dpi=120)
            plt.close(figure)
    best = scores.flatten().argsort(descending=True)[:5]
    print([(int(i) // 9, int(i) % 9, round(float(scores.flatten()[i]), 2)) for i in best])


if __name__ == "__main__":
    main()
