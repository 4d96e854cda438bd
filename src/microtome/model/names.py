"""Hook points: their names (TransformerLens's), axes and order, parsed once into `HookName`.

A name is either global (`hook_embed`) or belongs to a block (`blocks.6.hook_resid_pre`). A number behind a point with heads is
one of them (`blocks.6.attn.hook_z.3`): the point as if there were no other head. `POINTS` lists what Microtome knows in the
order in which a forward pass reaches it; which of them a model has is said by its family's spec.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, total_ordering

from microtome.common.errors import MicrotomeError, ModelError, nearest, unknown_name

RESIDUAL = ("batch", "pos", "d_model")
SCALE = ("batch", "pos", "one")
QUERY_HEADS = ("batch", "pos", "n_heads", "d_head")
KV_HEADS = ("batch", "pos", "n_kv_heads", "d_head")
HEAD_INPUTS = ("batch", "pos", "n_heads", "d_model")
KV_INPUTS = ("batch", "pos", "n_kv_heads", "d_model")
WITH_HEADS, HEAD_AXIS = (QUERY_HEADS, KV_HEADS, HEAD_INPUTS, KV_INPUTS), 2
"""Points of which one head is a point too, and where its axis is."""
PATTERN = ("batch", "n_heads", "query", "key")
NEURONS = ("batch", "pos", "d_mlp")
EXPERTS = ("batch", "pos", "top_k")
ROUTED = ("routed", "d_mlp")

BEFORE_BLOCKS = {"hook_tokens": ("batch", "pos"), "hook_embed": RESIDUAL, "hook_pos_embed": RESIDUAL}
IN_BLOCK = {
    "hook_resid_pre": RESIDUAL,
    "hook_attn_in": HEAD_INPUTS,
    "hook_q_input": HEAD_INPUTS,
    "hook_k_input": KV_INPUTS,
    "hook_v_input": KV_INPUTS,
    "ln1.hook_scale": SCALE,
    "ln1.hook_normalized": RESIDUAL,
    "attn.hook_in": RESIDUAL,
    "attn.hook_q": QUERY_HEADS,
    "attn.hook_k": KV_HEADS,
    "attn.hook_v": KV_HEADS,
    "attn.hook_rot_q": QUERY_HEADS,
    "attn.hook_rot_k": KV_HEADS,
    "attn.hook_attn_scores": PATTERN,
    "attn.hook_pattern": PATTERN,
    "attn.hook_z": QUERY_HEADS,
    "attn.hook_result": HEAD_INPUTS,
    "ln1_post.hook_scale": SCALE,
    "ln1_post.hook_normalized": RESIDUAL,
    "hook_attn_out": RESIDUAL,
    "hook_resid_mid": RESIDUAL,
    "hook_mlp_in": RESIDUAL,
    "ln2.hook_scale": SCALE,
    "ln2.hook_normalized": RESIDUAL,
    "mlp.hook_in": RESIDUAL,
    "mlp.hook_expert_weights": EXPERTS,
    "mlp.hook_expert_indices": EXPERTS,
    "mlp.hook_pre": NEURONS,
    "mlp.hook_pre_linear": NEURONS,
    "mlp.hook_mid": NEURONS,
    "mlp.hook_post": NEURONS,
    "mlp.experts.{j}.hook_gate": ROUTED,
    "mlp.experts.{j}.hook_pre": ROUTED,
    "mlp.experts.{j}.hook_post": ROUTED,
    "ln2_post.hook_scale": SCALE,
    "ln2_post.hook_normalized": RESIDUAL,
    "hook_mlp_out": RESIDUAL,
    "hook_resid_post": RESIDUAL,
}
AFTER_BLOCKS = {
    "ln_final.hook_scale": SCALE,
    "ln_final.hook_normalized": RESIDUAL,
    "unembed.hook_in": RESIDUAL,
    "unembed.hook_out": ("batch", "pos", "d_vocab"),
}
POINTS = {**BEFORE_BLOCKS, **IN_BLOCK, **AFTER_BLOCKS}

# Points that cost much memory or a second computation: `*` leaves them out, they have to be asked for by name.
ON_REQUEST = frozenset(
    {"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "attn.hook_result"}
    | {point for point in IN_BLOCK if point.startswith("mlp.experts")}
)

# Other names of the same points, as TransformerLens's TransformerBridge spells them. `mlp.in.hook_out` depends on
# whether the MLP is gated, see `canonical`.
ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.hook_out": "hook_attn_out",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.hook_out": "hook_mlp_out",
}

_DIGITS = 9  # of a layer's, head's or expert's number; `int` refuses text of more than 4,300
_BLOCK = re.compile(rf"blocks\.(\d{{1,{_DIGITS}}})\.(.+)")
_HEAD = re.compile(rf"(.+)\.(\d{{1,{_DIGITS}}})")
_EXPERT = re.compile(rf"mlp\.experts\.(\d{{1,{_DIGITS}}})\.(.+)")
_ORDER = {point: i for i, point in enumerate(POINTS)}


@total_ordering
@dataclass(frozen=True, slots=True)
class HookName:
    """One hook point of a model: `point` as in `POINTS`, `layer` for the points of a block, `expert` for those of an
    expert, `head` for one head of a point that has several. Sorts by depth."""

    point: str
    layer: int | None = None
    expert: int | None = None
    head: int | None = None

    @classmethod
    @cache
    def parse(cls, text: str) -> "HookName":
        """`"blocks.6.hook_resid_pre"`, `"hook_embed"`, or `"blocks.6.attn.hook_z.3"`. Raises ModelError for a name of any other
        form."""
        match = _BLOCK.fullmatch(text)
        point, layer = (match[2], int(match[1])) if match else (text, None)
        expert = head = None
        if (one := _HEAD.fullmatch(point)) and IN_BLOCK.get(one[1], ()) in WITH_HEADS:
            point, head = one[1], int(one[2])
        if layer is not None and (inner := _EXPERT.fullmatch(point)):
            point, expert = f"mlp.experts.{{j}}.{inner[2]}", int(inner[1])
        known = IN_BLOCK if match else {**BEFORE_BLOCKS, **AFTER_BLOCKS}
        if point not in known:
            layer_text = "0" if layer is None else str(layer)
            names = [*BEFORE_BLOCKS, *(f"blocks.{layer_text}.{p}" for p in IN_BLOCK), *AFTER_BLOCKS]
            raise unknown_name("hook point", text, names, ModelError)
        return cls(point, layer, expert, head)

    def __str__(self) -> str:
        point = self.point if self.expert is None else self.point.format(j=self.expert)
        head = "" if self.head is None else f".{self.head}"
        return point if self.layer is None else f"blocks.{self.layer}.{point}{head}"

    @property
    def of_all_heads(self) -> "HookName":
        """The point of which this is one head; itself, if it is of none."""
        return self if self.head is None else HookName(self.point, self.layer)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of the tensor at this point."""
        axes = POINTS[self.point]
        return axes if self.head is None else (*axes[:HEAD_AXIS], *axes[HEAD_AXIS + 1 :])

    @property
    def pos_axis(self) -> int | None:
        """Which axis counts positions (of a pattern: its queries). None for an expert's, which counts what is routed to it."""
        return None if self.axes == ROUTED else 2 if self.axes == PATTERN else 1

    @property
    def depth(self) -> tuple[int, int, int]:
        """A key that grows along the forward pass."""
        order = _ORDER[self.point]
        if self.layer is not None:
            inner = self.head if self.expert is None else self.expert
            return (self.layer, order, -1 if inner is None else inner)
        return (-1, order, -1) if self.point in BEFORE_BLOCKS else (1 << 30, order, -1)

    def __lt__(self, other: "HookName") -> bool:
        return self.depth < other.depth


def is_below(text: str, n: int) -> bool:
    """Whether a text is a number from 0 to n − 1."""
    return text.isdecimal() and len(text) <= _DIGITS and int(text) < n


def one_head(text: str, n: int) -> HookName:
    """One head of a point that has `n`. Raises ModelError for a head that is not there."""
    head = text.rpartition(".")[2]
    if not is_below(head, n):
        raise ModelError(f"There is no hook point {text!r}", got=f"head {head}", expected=f"a head from 0 to {n - 1}")
    return HookName.parse(text)


def is_glob(text: str) -> bool:
    """Whether a name stands for whatever it matches."""
    return any(mark in text for mark in "*?[")


def no_match(glob: str, names: Iterable[str], whose: str, error: type[MicrotomeError] = ModelError) -> MicrotomeError:
    """The error for a glob that matches none of the names, with the nearest that match some."""
    layers = re.compile(r"^blocks\.[^.]+\.")
    close = nearest(layers.sub("blocks.*.", glob), {layers.sub("blocks.*.", name) for name in names})
    like = f"Did you mean {' or '.join(repr(each) for each in close)}? " if close else ""
    heads = "A number behind a point with heads is one of these"
    return error(f"No hook point of {whose} matches {glob!r}", fix=f"{like}{heads}")


def matches(pattern: str, name: HookName) -> bool:
    """Whether a glob matches a name. A point of `ON_REQUEST` has to be spelled by the pattern's end: `*hook_result`
    matches it, `blocks.3.*` does not."""
    text = str(name)
    if not fnmatch.fnmatchcase(text, pattern):
        return False
    return name.point not in ON_REQUEST or bool(re.split(r"[*?\]]", pattern)[-1])


def canonical(text: str, *, gated: bool) -> str:
    """The name behind an alias (`blocks.3.attn.o.hook_in` is `blocks.3.attn.hook_z`); other names as they are."""
    match = _BLOCK.fullmatch(text)
    if not match:
        return text
    point, head = match[2], ""
    if (one := _HEAD.fullmatch(point)) and one[1] in ALIASES:
        point, head = one[1], f".{one[2]}"
    if point == "mlp.in.hook_out":
        point = "mlp.hook_pre_linear" if gated else "mlp.hook_pre"
    return f"blocks.{match[1]}.{ALIASES.get(point, point)}{head}"
