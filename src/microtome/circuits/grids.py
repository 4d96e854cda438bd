"""Grids: the places that a sweep goes over (each layer, head, neuron, position …), as axes with labels and as parts of hook
points."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from microtome.circuits.effects import Axis, head_axis, numbers
from microtome.circuits.pairs import position_labels
from microtome.circuits.rows import Columns, Intervention, Write, columns_of
from microtome.common.errors import InputError, unknown_name
from microtome.model.capture import head_axis as heads_at
from microtome.model.hooked import HookedModel
from microtome.model.names import HookName
from microtome.model.prompts import Prompts

Over = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "layer", "head", "z", "q", "k", "v", "pattern", "neuron",
]  # fmt: skip
_POINTS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("hook_resid_pre",),
    "resid_mid": ("hook_resid_mid",),
    "resid_post": ("hook_resid_post",),
    "attn_out": ("hook_attn_out",),
    "mlp_out": ("hook_mlp_out",),
    "layer": ("hook_attn_out", "hook_mlp_out"),
    "head": ("attn.hook_z",),
    "z": ("attn.hook_z",),
    "q": ("attn.hook_q",),
    "k": ("attn.hook_k",),
    "v": ("attn.hook_v",),
    "pattern": ("attn.hook_pattern",),
    "neuron": ("mlp.hook_post",),
}


@dataclass(frozen=True)
class Part:
    """Some heads or units of a hook point; None: all."""

    name: HookName
    heads: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None

    def write(self, value: Any, columns: Columns | None) -> Write:
        return Write(name=self.name, value=value, columns=columns, heads=self.heads, units=self.units)


@dataclass(frozen=True)
class Grid:
    """The axes, and for each place in their order (the last axis fastest) the parts and columns that it is about."""

    axes: tuple[Axis, ...]
    places: tuple[tuple[tuple[Part, ...], Columns | None], ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[HookName]:
        return sorted({part.name for parts, _ in self.places for part in parts})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis.labels) for axis in self.axes)

    def writes(self, values: dict[HookName, Any]) -> list[Intervention]:
        return [[part.write(values[part.name], columns) for part in parts] for parts, columns in self.places]

    def within(self, allowed: Columns) -> "Grid":
        """The same places without the columns that are not allowed."""
        shared: dict[int, Columns] = {}  # places that share their columns go on to share them

        def cut(columns: Columns | None) -> Columns:
            if columns is None:
                return allowed
            return shared.setdefault(id(columns), columns & allowed)

        return replace(self, places=tuple((parts, cut(columns)) for parts, columns in self.places))


def grid(
    model: HookedModel,
    prompts: Prompts,
    over: str,
    *,
    by_position: bool = False,
    positions: Any = None,
    layers: Sequence[int] | None = None,
) -> Grid:
    """The grid of a sweep. Raises InputError for an unknown one, and ModelError for a point that the model does not have."""
    if over not in _POINTS:
        raise unknown_name("thing to sweep over", over, get_args(Over), InputError)
    if over == "resid_mid" and model.spec.parallel:
        raise InputError(
            f"There is no resid_mid in {model.name}: attention and MLP read the same stream side by side",
            fix='Use over="resid_pre" or "resid_post"',
        )
    chosen = list(range(model.config.n_layers)) if layers is None else list(layers)
    known = [[_known(model, HookName(point, layer)) for point in _POINTS[over]] for layer in chosen]
    axes: list[Axis] = [Axis("layer", tuple(str(layer) for layer in chosen))]
    notes: tuple[str, ...] = ()
    parts: list[tuple[Part, ...]]
    if over == "neuron":
        axes.append(Axis("neuron", numbers(model.config.d_mlp)))
        parts = [tuple(Part(name, units=(i,)) for name in names) for names in known for i in range(model.config.d_mlp)]
    elif heads_at(known[0][0]) is not None:
        axis, notes = _heads(model, over)
        axes.append(axis)
        parts = [tuple(Part(name, heads=(i,)) for name in names) for names in known for i in range(len(axis.labels))]
    else:
        parts = [tuple(Part(name) for name in names) for names in known]
    columns = columns_of(prompts, positions)
    if not by_position:
        return Grid(tuple(axes), tuple((some, columns) for some in parts), notes)
    each = _positions(prompts, columns)
    return Grid((*axes, position_labels(model, prompts)), tuple((some, one) for some in parts for one in each), notes)


def _known(model: HookedModel, name: HookName) -> HookName:
    return model.resolve(str(name))[0]


def _heads(model: HookedModel, over: str) -> tuple[Axis, tuple[str, ...]]:
    """Query heads, or the key/value heads with the query heads that read them."""
    n_heads, n_kv = model.config.n_heads, model.config.n_kv_heads
    if over not in ("k", "v") or n_heads == n_kv:
        return head_axis(n_heads), ()
    group = n_heads // n_kv
    labels = tuple(f"KV{i} (H{i * group}–H{i * group + group - 1})" for i in range(n_kv))
    note = f"{n_heads} query heads share {n_kv} key/value heads: a change of one {over} moves {group} query heads"
    return Axis("key/value head", labels), (note,)


def _positions(prompts: Prompts, columns: Columns | None) -> list[Columns]:
    """One place for each column."""
    size = prompts.tokens.shape[1]
    allowed = torch.ones(1, size, dtype=torch.bool) if columns is None else columns.cpu()
    return [one[None] & allowed for one in torch.eye(size, dtype=torch.bool)]
