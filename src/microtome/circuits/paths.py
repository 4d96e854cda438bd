"""Path patching: what reaches some receivers straight from some senders, along no other path through heads (Wang et al. 2022,
arXiv 2211.00593, appendix B).

1. The corrupt run gives what the senders write.
2. The clean run with the senders' writes replaced and all other heads held at their clean outputs (MLPs recomputed, or held
   too) gives what the receivers read.
3. The clean run with the receivers' inputs replaced by that, everything else recomputed, gives the metric.

With attention held, positions do not mix in step 2: only those are run that both a sender writes and a receiver reads. For the
logits and a metric of the last token, this is one column.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits.effects import Axis, Effects, head_axis, layer_axis
from microtome.circuits.engine import MAX_ROWS, Engine, activations
from microtome.circuits.metrics import AnyMetric, Metric, as_metric
from microtome.circuits.nodes import Node, parse_nodes
from microtome.circuits.pairs import Pair, pair
from microtome.circuits.patching import differing
from microtome.circuits.rows import Columns, Intervention, Positions, Write, columns_of
from microtome.common.errors import InputError
from microtome.model.hooked import HookedModel, Input
from microtome.model.names import HookName

Nodes = str | Node | Sequence[str | Node]


def path_patching(  # noqa: PLR0913 – one keyword a choice
    model: HookedModel,
    clean: Input,
    corrupt: Input,
    senders: Nodes,
    receivers: Nodes,
    *,
    metric: AnyMetric,
    sender_positions: Positions = None,
    receiver_positions: Positions = None,
    freeze_mlps: bool = False,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """The metric of each prompt with the direct paths from all `senders` to all `receivers` patched: values `[prompts]`.

    Senders write into the stream (`L5.H3`, `L5.mlp`, `embed`), receivers read it (`L9.H9.q`, `L9.KV3.k`, `L5.mlp`,
    `L5.resid_pre`, `logits`). `freeze_mlps` holds all MLPs but the senders at their clean outputs in step 2; else they are on
    the path. Positions restrict what is replaced, each prompt's own if given as `[prompts]`.

    Raises InputError for a sender that no receiver can read, for logits together with other receivers (whose own effect on
    the logits would be overwritten), positions that senders and receivers do not have in common or up to which clean and corrupt
    prompt are the same, prompts of unequal length, and what the model does not have.
    """
    work = _Work(
        pair(model, clean, corrupt),
        model,
        receivers,
        metric,
        (sender_positions, receiver_positions),
        freeze_mlps,
        max_rows,
    )
    nodes = parse_nodes(senders, model.config, parallel=model.spec.parallel)
    work.check(nodes)
    what = f"{work.metric.name} with the paths {_listed(nodes)} → {_listed(work.receivers)} patched"
    return work.effects(work.values([nodes])[0], (), what)


def path_patching_sweep(  # noqa: PLR0913 – one keyword a choice
    model: HookedModel,
    clean: Input,
    corrupt: Input,
    receivers: Nodes,
    *,
    metric: AnyMetric,
    over: str = "head",
    sender_positions: Positions = None,
    receiver_positions: Positions = None,
    freeze_mlps: bool = False,
    max_rows: int = MAX_ROWS,
) -> Effects:
    """`path_patching` with each head (or, `over="mlp"`, each MLP) as the only sender: layer × head, or layer.

    A sender that no receiver can read has the clean run's metric. Raises as `path_patching` does, but for such a sender.
    """
    work = _Work(
        pair(model, clean, corrupt),
        model,
        receivers,
        metric,
        (sender_positions, receiver_positions),
        freeze_mlps,
        max_rows,
    )
    n_layers, n_heads = model.config.n_layers, model.config.n_heads
    axes: tuple[Axis, ...]
    if over == "head":
        axes = (layer_axis(n_layers), head_axis(n_heads))
        senders = [Node("head", layer, head) for layer in range(n_layers) for head in range(n_heads)]
    elif over == "mlp":
        axes, senders = (layer_axis(n_layers),), [Node("mlp", layer) for layer in range(n_layers)]
    else:
        raise InputError("Senders to sweep over are heads or MLPs", got=over, expected='"head" or "mlp"')
    what = f"{work.metric.name} with the paths from one {over} to {_listed(work.receivers)} patched"
    return work.effects(work.values([[node] for node in senders]), axes, what)


class _Work:
    """The three steps for sets of senders that share their receivers."""

    def __init__(
        self,
        prompts: Pair,
        model: HookedModel,
        receivers: Nodes,
        metric: AnyMetric,
        positions: tuple[Positions, Positions],
        freeze_mlps: bool,
        max_rows: int,
    ) -> None:
        self.model, self.max_rows = model, max_rows
        self.parallel = model.spec.parallel
        self.receivers = _receivers(parse_nodes(receivers, model.config, parallel=self.parallel))
        self.prompts = prompts
        sender_positions, receiver_positions = positions
        self.metric: Metric = as_metric(metric, self.prompts.n_prompts)
        self.to_logits = self.receivers[0].kind == "logits"
        self.read: Columns = _columns(self.prompts, receiver_positions)
        at = [f"positions {each}" if each is not None else "all positions" for each in positions]
        if self.to_logits and self.metric.last_only:
            at[1] = "the last position"
            last = torch.zeros_like(self.read)
            last[:, -1] = True
            _check_common(
                self.read & last,
                f"The metric {self.metric.name} reads the last token's logits, which the receiver positions leave out",
                receiver_positions,
                "Say receiver_positions=-1, or leave them out",
            )
            self.read = self.read & last
        written = _columns(self.prompts, sender_positions)
        _check_common(
            written & self.read,
            "With all heads held, what is sent at a position is received there alone, and these have none in common",
            f"senders at {at[0]}, receivers at {at[1]}",
            "Give both the same positions, or leave one out",
        )
        self.written: Columns = written & differing(self.prompts) & self.read
        _check_common(
            self.written,
            "The clean and the corrupt prompt do not yet differ at any position at which something is sent and received, so no "
            "path carries a difference",
            f"senders at {at[0]}, receivers at {at[1]}",
            "Give positions from the first token on that differs, or leave out prompts that are the same",
        )
        # Receivers' inputs are replaced from the first column on that a sender can have changed.
        self.replaced: Columns = self.read & self.written.cummax(dim=1).values
        self.engine = Engine(model, self.prompts.clean, max_rows=max_rows)
        self.frozen = self._frozen(freeze_mlps)

    def _frozen(self, freeze_mlps: bool) -> list[Write]:
        """All heads (and MLPs) held at the clean run."""
        points = ["attn.hook_z", *(["hook_mlp_out"] if freeze_mlps else [])]
        deepest = self.model.config.n_layers if self.to_logits else 1 + max(node.depth[0] for node in self.receivers)
        names = [HookName(point, layer) for layer in range(deepest) for point in points]
        held = activations(self.model, self.prompts.clean, names, max_rows=self.max_rows)
        return [Write(name=name, value=value, passive=True) for name, value in held.items()]

    def reaches(self, sender: Node) -> bool:
        return any(sender.feeds(receiver, parallel=self.parallel) for receiver in self.receivers)

    def check(self, senders: Sequence[Node]) -> None:
        for node in senders:
            if not node.writes:
                raise InputError(
                    f"{node} writes nothing into the residual stream: it cannot send",
                    expected="heads (L5.H3), MLPs (L5.mlp) or embed",
                )
            if not self.reaches(node):
                raise InputError(
                    f"{node} comes after all receivers: none of them reads what it writes", got=_listed(self.receivers)
                )

    def values(self, sets: Sequence[Sequence[Node]]) -> Float[Tensor, "sets prompts"]:
        """The metric for each set of senders; where no receiver reads a set, of the clean run."""
        able = [i for i, senders in enumerate(sets) if any(self.reaches(node) for node in senders)]
        values = self.engine.clean(self.metric).expand(len(sets), -1).clone()
        points = sorted({node.written for i in able for node in sets[i]})
        corrupt = activations(self.model, self.prompts.corrupt, points, max_rows=self.max_rows) if able else {}
        sent: list[Intervention] = [[*self.frozen, *self._sent(sets[i], corrupt)] for i in able]
        if self.to_logits and able:
            values[able] = self.engine.sweep(sent, self.metric)
            return values
        size = max(1, self.max_rows // self.prompts.n_prompts)
        for at in range(0, len(able), size):
            some = sent[at : at + size]
            read = self.engine.record(some, sorted({_recorded(node) for node in self.receivers}))
            received = [self._received({name: kept[i] for name, kept in read.items()}) for i in range(len(some))]
            values[able[at : at + size]] = self.engine.sweep(received, self.metric)
        return values

    def _sent(self, senders: Sequence[Node], corrupt: dict[HookName, Tensor]) -> list[Write]:
        return [
            Write(
                name=node.written,
                value=corrupt[node.written],
                columns=self.written,
                heads=None if node.index is None else (node.index,),
            )
            for node in senders
        ]

    def _received(self, read: dict[HookName, Tensor]) -> list[Write]:
        writes = []
        for node in self.receivers:
            value = read[_recorded(node)]
            heads = None if node.index is None else (node.index,)
            value = value if heads is None else value.unsqueeze(2)
            writes.append(Write(name=node.read, value=value, columns=self.replaced, heads=heads))
        return writes

    def effects(self, values: Tensor, axes: tuple[Axis, ...], what: str) -> Effects:
        shape = (*(len(axis.labels) for axis in axes), self.prompts.n_prompts)
        on_corrupt = Engine(self.model, self.prompts.corrupt, max_rows=self.max_rows).clean(self.metric)
        on_clean = self.engine.clean(self.metric)
        return Effects(values=values.reshape(shape), axes=axes, what=what, clean=on_clean, corrupt=on_corrupt)


def _columns(prompts: Pair, positions: Positions) -> Columns:
    """Those of positions, or all."""
    found = columns_of(prompts.clean, positions)
    return torch.ones(prompts.clean.tokens.shape, dtype=torch.bool) if found is None else found.cpu()


def _check_common(columns: Columns, what: str, got: object, fix: str) -> None:
    """Raise InputError for a prompt that has no such column: nothing would be patched in it."""
    empty = (~columns.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise InputError(what, got=f"{got} (prompt {empty[0]})", fix=fix)


def _receivers(nodes: list[Node]) -> list[Node]:
    for node in nodes:
        if not node.reads:
            raise InputError(
                f"{node} does not read the residual stream by itself: it cannot receive",
                expected="L5.H3.q, L5.KV1.k, L5.KV1.v, L5.mlp, L5.resid_pre, L5.resid_mid, L5.resid_post or logits",
                fix=f"Name its inputs: {node}.q, and its k and v" if node.kind == "head" else None,
            )
    if len(nodes) > 1 and any(node.kind == "logits" for node in nodes):
        raise InputError(
            "The logits cannot be a receiver beside others: they would overwrite what the others change",
            got=_listed(nodes),
            fix="Patch the paths to the logits in a run of their own",
        )
    return nodes


def _recorded(node: Node) -> HookName:
    """Where what a receiver reads is seen: queries, keys and values read the stream that enters their block."""
    return HookName("hook_resid_pre", node.layer) if node.kind in ("q", "k", "v") else node.read


def _listed(nodes: Sequence[Node]) -> str:
    shown = ", ".join(map(str, nodes[:4]))
    return shown if len(nodes) <= 4 else f"{shown} and {len(nodes) - 4} more"
