"""Hook points: their names (TransformerLens's), axes and order, parsed once into `HookName`.

A name is either global (`hook_embed`) or belongs to a block (`blocks.6.hook_resid_pre`). `POINTS` lists what Microtome
knows in the order in which a forward pass reaches it; which of them a model has is said by its family's spec.
"""

import re
from dataclasses import dataclass
from functools import total_ordering

from microtome.common.errors import ModelError, unknown_name

RESIDUAL = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "n_heads", "d_head")
NEURONS = ("batch", "pos", "d_mlp")

BEFORE_BLOCKS = {"hook_embed": RESIDUAL, "hook_pos_embed": RESIDUAL}
IN_BLOCK = {
    "hook_resid_pre": RESIDUAL,
    "attn.hook_z": HEADS,
    "hook_attn_out": RESIDUAL,
    "hook_resid_mid": RESIDUAL,
    "mlp.hook_pre": NEURONS,
    "mlp.hook_pre_linear": NEURONS,
    "mlp.hook_post": NEURONS,
    "hook_mlp_out": RESIDUAL,
    "hook_resid_post": RESIDUAL,
}
AFTER_BLOCKS = {"unembed.hook_in": RESIDUAL, "unembed.hook_out": ("batch", "pos", "d_vocab")}
POINTS = {**BEFORE_BLOCKS, **IN_BLOCK, **AFTER_BLOCKS}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@total_ordering
@dataclass(frozen=True)
class HookName:
    """One hook point of a model: `point` as in `POINTS`, `layer` for the points of a block. Sorts by depth."""

    point: str
    layer: int | None = None

    @classmethod
    def parse(cls, text: str) -> "HookName":
        """`"blocks.6.hook_resid_pre"` or `"hook_embed"`. Raises ModelError for a name of any other form."""
        match = _BLOCK.fullmatch(text)
        point, layer = (match[2], int(match[1])) if match else (text, None)
        known = IN_BLOCK if match else {**BEFORE_BLOCKS, **AFTER_BLOCKS}
        if point not in known:
            layer_text = "0" if layer is None else str(layer)
            names = [*BEFORE_BLOCKS, *(f"blocks.{layer_text}.{p}" for p in IN_BLOCK), *AFTER_BLOCKS]
            raise unknown_name("hook point", text, names, ModelError)
        return cls(point, layer)

    def __str__(self) -> str:
        return self.point if self.layer is None else f"blocks.{self.layer}.{self.point}"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of the tensor at this point."""
        return POINTS[self.point]

    @property
    def depth(self) -> tuple[int, int]:
        """A key that grows along the forward pass."""
        order = list(POINTS).index(self.point)
        if self.layer is not None:
            return (self.layer, order)
        return (-1, order) if self.point in BEFORE_BLOCKS else (1 << 30, order)

    def __lt__(self, other: "HookName") -> bool:
        return self.depth < other.depth
