"""What the scripts that make tests/dictionary/fixtures share: sizes, inputs, and how expectations are kept."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[1] / "tests/dictionary/fixtures"
D, F, N, K = 8, 16, 12, 3
POINT = "blocks.3.hook_resid_post"


def inputs(d: int = D) -> Tensor:
    """The same rows every time, none of mean zero."""
    return torch.randn(N, d, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def expect(folder: Path, x: Tensor, codes: Tensor, out: Tensor, units: Tensor | None = None) -> None:
    """Keep what the library made of x. Its codes are ours times `units`, where it has others."""
    tensors = {"x": x, "codes": codes, "out": out} | ({} if units is None else {"units": units})
    save_file(
        {k: v.float().contiguous() for k, v in tensors.items()}, folder.with_name(f"{folder.name}.expected.safetensors")
    )


def shake(module: torch.nn.Module) -> None:
    """Random numbers in every parameter: fresh ones are zeros or transposes of each other."""
    for name, tensor in module.named_parameters():
        if name == "threshold":
            tensor.copy_(torch.rand_like(tensor) * 1.5)
        else:
            tensor.copy_(torch.randn_like(tensor) * 0.5)


def metadata(hook: str = POINT, **more: Any) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(
        model_name="tiny",
        hook_name=hook,
        hook_head_index=None,
        context_size=64,
        prepend_bos=True,
        dataset_path="abc",
        **more,
    )


def keep_saelens(name: str, sae: Any, heads: int = 0) -> None:
    folder = ROOT / "saelens" / name
    shake(sae)
    sae.save_model(folder)
    x = inputs()
    if sae.dtype != torch.float32:  # what float32 arithmetic makes of the rounded weights
        sae = type(sae).load_from_disk(folder, dtype="float32")
    shaped = x.view(N, heads, D // heads) if heads else x
    expect(folder, x, sae.encode(shaped), sae(shaped).reshape(N, -1))
