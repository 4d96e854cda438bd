"""Ablation: what a model does without some of its parts, each alone (`ablate`) or many together (`knock_out`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome.circuits.effects import Axis, Effects
from microtome.circuits.engine import MAX_ROWS, Engine
from microtome.circuits.grids import grid
from microtome.circuits.metrics import AnyMetric, as_metric
from microtome.circuits.nodes import Node, parse_node
from microtome.circuits.pairs import aligned
from microtome.circuits.replacements import Groups, How, Replacement
from microtome.circuits.rows import Columns, Intervention, Positions, Write, columns_of
from microtome.common.errors import InputError, ModelError
from microtome.dictionary import Dictionary
from microtome.model.hooked import HookedModel, Input
from microtome.model.names import HookName
from microtome.model.prompts import Prompts

Members = str | Node | Iterable[str | Node] | Mapping[Any, Positions]


def ablate(  # noqa: PLR0913 – one keyword a choice
    model: HookedModel,
    prompts: Input,
    metric: AnyMetric,
    over: str = "head",
    how: How = "mean",
    *,
    reference: Any = None,
    groups: Groups | None = None,
    seed: int = 0,
    positions: Positions = None,
    by_position: bool = False,
    layers: Sequence[int] | None = None,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """The metric of each prompt with one part of the model ablated; `.change` is its difference from the clean run.

    `over`: head, mlp_out, attn_out, layer (both outs), resid_pre, resid_mid, resid_post, neuron, q, k, v or pattern, each with its
    layers as the first axis; `by_position` adds an axis of positions, else all (or `positions`) are ablated together. `how`
    and what belongs to it are those of `Replacement`: zero, mean, template_mean, resample or counterfactual.

    Raises InputError or ConfigError for what cannot be, as `grid` and `Replacement` do.
    """
    replacement = Replacement(how=how, reference=reference, groups=groups, seed=seed)
    rows = aligned(model, prompts)
    metric = as_metric(metric, len(rows.tokens))
    places = grid(model, rows, over, by_position=by_position, positions=positions, layers=layers)
    engine = Engine(model, rows, max_rows=max_rows)
    writes = places.writes(replacement.values(model, rows, places.names, max_rows=max_rows))
    return Effects(
        values=engine.sweep(writes, metric).view(*places.shape, engine.n_prompts),
        axes=places.axes,
        what=f"{metric.name} without one {over} ({how} ablation)",
        clean=engine.clean(metric),
        notes=places.notes,
    )


def ablate_features(
    model: HookedModel,
    prompts: Input,
    metric: AnyMetric,
    dictionary: Dictionary,
    hook_name: str,
    features: Sequence[int],
    *,
    positions: Positions = None,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """The metric with the contribution f · W_dec[f] of one feature taken out of the activation at `hook_name`; what the dictionary
    does not explain stays as it is.

    Raises InputError for a feature that the dictionary does not have, ModelError for a point of another width.
    """
    name = model.resolve(hook_name)[0]
    d_sae, d_in = dictionary.W_dec.shape
    rows = aligned(model, prompts)
    metric = as_metric(metric, len(rows.tokens))
    listed = list(features)
    if not listed or not all(0 <= feature < d_sae for feature in listed):
        raise InputError("No such feature in the dictionary", got=listed, expected=f"0 to {d_sae - 1}")
    width = model.activations(Prompts(rows.tokens[:1, -1:]), [name])[str(name)].shape[-1]
    if width != d_in or len(name.axes) != 3:
        raise ModelError(f"The dictionary does not fit {name}", got=f"d_in {d_in}", expected=f"width {width}")
    columns = columns_of(rows, positions)
    engine = Engine(model, rows, max_rows=max_rows)
    writes = [[Write(name=name, value=_without(dictionary, feature), columns=columns)] for feature in listed]
    return Effects(
        values=engine.sweep(writes, metric),
        axes=(Axis("feature", tuple(map(str, listed))),),
        what=f"{metric.name} without one feature",
        clean=engine.clean(metric),
    )


def _without(dictionary: Dictionary, feature: int) -> Any:
    def change(x: Tensor, prompts: Tensor, first: int) -> Tensor:
        codes = dictionary.encode(x.flatten(0, 1).to(dictionary.W_dec.dtype)).to_dense()[:, feature]
        taken = codes[:, None] * dictionary.W_dec[feature]
        rest: Tensor = x - taken.unflatten(0, x.shape[:2]).to(x.dtype)
        return rest

    return change


def knock_out(  # noqa: PLR0913 – one keyword a choice
    model: HookedModel,
    prompts: Input,
    metric: AnyMetric,
    nodes: Members = (),
    *,
    keep: Members | None = None,
    kinds: Sequence[str] = ("head",),
    how: How = "mean",
    reference: Any = None,
    groups: Groups | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """The metric of each prompt `[prompts]` with all `nodes` (heads and MLPs) ablated at once, or with all but those to `keep`
    among the nodes of `kinds` (head, mlp). A mapping node → positions ablates, or keeps, a node there only.

    Raises InputError for a node that writes nothing, and where both or neither of nodes and keep are given.
    """
    if (keep is None) == (not isinstance(nodes, str | Node) and not list(nodes)):
        raise InputError("Say either which nodes to knock out, or which to keep")
    chosen = nodes if keep is None else keep
    made = knock_outs(
        model, prompts, metric, [chosen], keep=keep is not None, kinds=kinds, how=how, reference=reference, groups=groups,
        seed=seed, max_rows=max_rows,
    )  # fmt: skip
    return Effects(values=made.values[0], axes=(), what=made.what, clean=made.clean)


def knock_outs(  # noqa: PLR0913 – one keyword a choice
    model: HookedModel,
    prompts: Input,
    metric: AnyMetric,
    sets: Sequence[Members],
    *,
    keep: bool = False,
    kinds: Sequence[str] = ("head",),
    how: How = "mean",
    reference: Any = None,
    groups: Groups | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """`knock_out` for several sets of nodes, as one sweep: values `[sets, prompts]`. With `keep`, the sets are what stays."""
    replacement = Replacement(how=how, reference=reference, groups=groups, seed=seed)
    rows = aligned(model, prompts)
    metric = as_metric(metric, len(rows.tokens))
    unknown = set(kinds) - {"head", "mlp"}
    if unknown or not kinds:
        raise InputError("Nodes to knock out are of the kinds head and mlp", got=sorted(kinds))
    out = [_columns(model, rows, members) for members in sets]
    if keep:
        out = [_complement(model, rows, members, kinds) for members in out]
    names = sorted({node.written for members in out for node in members})
    values = replacement.values(model, rows, names, max_rows=max_rows) if names else {}
    engine = Engine(model, rows, max_rows=max_rows)
    made = engine.sweep([_writes(members, values) for members in out], metric)
    return Effects(
        values=made,
        axes=(Axis("set", tuple(labels or map(str, range(len(sets))))),),
        what=f"{metric.name} with {'only these' if keep else 'these'} nodes {'kept' if keep else 'knocked out'} ({how} ablation)",
        clean=engine.clean(metric),
    )


def _columns(model: HookedModel, rows: Prompts, members: Members) -> dict[Node, Columns]:
    """The nodes of a set, and the columns that are meant of each."""
    everywhere = torch.ones(rows.tokens.shape, dtype=torch.bool) if rows.mask is None else rows.mask.cpu()
    if isinstance(members, str | Node):
        members = [members]
    pairs = members.items() if isinstance(members, Mapping) else [(member, None) for member in members]
    found: dict[Node, Columns] = {}
    for member, positions in pairs:
        node = parse_node(member, model.config, parallel=model.spec.parallel)
        if node.kind not in ("head", "mlp"):
            raise InputError(f"{node} cannot be knocked out", expected="a head (L5.H3) or an MLP (L5.mlp)")
        columns = everywhere if positions is None else columns_of(rows, positions)
        assert columns is not None
        found[node] = found[node] | columns if node in found else columns
    return found


def _complement(
    model: HookedModel, rows: Prompts, kept: Mapping[Node, Columns], kinds: Sequence[str]
) -> dict[Node, Columns]:
    """All nodes of some kinds where they are not kept."""
    config = model.config
    every = [Node("head", layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    every += [Node("mlp", layer) for layer in range(config.n_layers)]
    everywhere = torch.ones(rows.tokens.shape, dtype=torch.bool) if rows.mask is None else rows.mask.cpu()
    return {
        node: everywhere & ~kept[node] if node in kept else everywhere
        for node in every
        if node.kind in kinds and not (node in kept and bool(kept[node][everywhere].all()))
    }


def _writes(members: Mapping[Node, Columns], values: Mapping[HookName, Any]) -> Intervention:
    """Heads of one block that go at the same columns are one write."""
    grouped: dict[tuple[HookName, int], list[Node]] = {}
    for node, columns in members.items():
        grouped.setdefault((node.written, id(columns)), []).append(node)
    return [
        Write(
            name=name,
            value=values[name],
            columns=members[nodes[0]],
            heads=None if nodes[0].index is None else tuple(node.index or 0 for node in nodes),
        )
        for (name, _), nodes in grouped.items()
    ]
