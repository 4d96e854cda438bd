"""Nodes: the parts of a model between which circuits run, named in text.

    embed                     what enters the stream before the first block
    L5.H3                     head 3 of block 5
    L5.H3.q                   what that head's queries read (its input)
    L5.KV1.k, L5.KV1.v        what key/value head 1 of block 5 reads
    L5.mlp                    the MLP of block 5
    L5.resid_pre, L5.resid_mid, L5.resid_post    the stream at a place
    logits                    what leaves

`L5.H3.k` is the same as `L5.KV3.k` where each query head has its own keys and values. Where a group of query heads shares
them, there is no such thing as one query head's key input: the error says which heads share. `5.3` and `a5.h3`, `m5` (the
notations of the IOI paper and of EAP-IG) are read too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal

from microtome.common.errors import InputError
from microtome.model.names import HookName
from microtome.model.specs import ModelConfig

Kind = Literal["embed", "head", "q", "k", "v", "resid_pre", "resid_mid", "mlp", "resid_post", "logits"]

# Where each kind stands within its block: what a node writes can reach a later node only.
_ORDER: dict[str, int] = {
    "resid_pre": 0, "q": 1, "k": 1, "v": 1, "head": 2, "resid_mid": 3, "mlp": 5, "resid_post": 6,
}  # fmt: skip
_READS = {"q", "k", "v", "resid_pre", "resid_mid", "resid_post", "mlp", "logits"}
_WRITES = {"embed", "head", "mlp"}


@total_ordering
@dataclass(frozen=True)
class Node:
    """One part of a model. `index` is the head: of queries, or for the kinds k and v of keys and values."""

    kind: Kind
    layer: int | None = None
    index: int | None = None

    def __str__(self) -> str:
        if self.kind in ("embed", "logits"):
            return self.kind
        if self.kind == "head":
            return f"L{self.layer}.H{self.index}"
        if self.kind == "q":
            return f"L{self.layer}.H{self.index}.q"
        if self.kind in ("k", "v"):
            return f"L{self.layer}.KV{self.index}.{self.kind}"
        return f"L{self.layer}.{self.kind}"

    @property
    def depth(self) -> tuple[int, int]:
        """(block, place in it): embed first, logits last."""
        if self.kind == "embed":
            return (-1, 0)
        if self.kind == "logits":
            return (1_000_000, 0)
        assert self.layer is not None
        return (self.layer, _ORDER[self.kind])

    def __lt__(self, other: "Node") -> bool:
        return (*self.depth, self.kind, self.index or 0) < (*other.depth, other.kind, other.index or 0)

    @property
    def writes(self) -> bool:
        """Whether it adds to the residual stream: it can be a sender."""
        return self.kind in _WRITES

    @property
    def reads(self) -> bool:
        """Whether it reads the residual stream: it can be a receiver."""
        return self.kind in _READS

    def feeds(self, reader: "Node", *, parallel: bool = False) -> bool:
        """Whether what this node writes is in the stream that `reader` reads. In `parallel` blocks the MLP does not read what
        the heads of its own block write."""
        if parallel and self.kind == "head" and reader.kind == "mlp" and self.layer == reader.layer:
            return False
        return self.writes and reader.reads and self.depth < reader.depth

    @property
    def written(self) -> HookName:
        """The point at which what it writes can be read and replaced: a head's z, the MLP's output, for the embedding
        (positions included) what enters the first block."""
        points = {"embed": "hook_resid_pre", "head": "attn.hook_z", "mlp": "hook_mlp_out"}
        if self.kind not in points:
            raise InputError(f"{self} writes nothing into the residual stream", expected="embed, a head, or an mlp")
        return HookName(points[self.kind], self.layer or 0)

    @property
    def read(self) -> HookName:
        """The point at which what it reads can be replaced for it alone."""
        if self.kind == "logits":
            raise InputError("The logits read the end of the last block", fix="Use the last block's resid_post")
        points = {"q": "hook_q_input", "k": "hook_k_input", "v": "hook_v_input", "mlp": "hook_mlp_in"}
        if not self.reads:
            raise InputError(
                f"{self} reads nothing by itself", expected="L5.H3.q, L5.KV1.k, L5.KV1.v, L5.mlp, L5.resid_pre, logits"
            )
        return HookName(points.get(self.kind, f"hook_{self.kind}"), self.layer)


_HEAD = re.compile(r"(?:l|a)?(\d{1,9})\.h?(\d{1,9})(?:\.([qkv]))?", re.IGNORECASE)
_KV = re.compile(r"l?(\d{1,9})\.kv(\d{1,9})\.([kv])", re.IGNORECASE)
_PLACE = re.compile(r"(?:l(\d{1,9})\.(mlp|resid_pre|resid_mid|resid_post)|m(\d{1,9}))", re.IGNORECASE)


def parse_node(text: "str | Node", config: ModelConfig, *, parallel: bool = False) -> Node:
    """A node from its text. Raises InputError for what is no node, and for a layer or head that the model does not have."""
    node = text if isinstance(text, Node) else _parsed(text.strip(), config)
    _check(node, config)
    if parallel and node.kind == "resid_mid":
        raise InputError(
            f"There is no {node}: attention and MLP of this model read the same stream side by side",
            fix=f"Use L{node.layer}.resid_pre or L{node.layer}.resid_post",
        )
    return node


def parse_nodes(
    texts: "str | Node | Sequence[str | Node]", config: ModelConfig, *, parallel: bool = False
) -> list[Node]:
    """Several nodes, as `parse_node`; each once, in their order. Raises InputError for an empty list."""
    listed = [texts] if isinstance(texts, str | Node) else list(texts)
    if not listed:
        raise InputError("No node was named", expected="at least one, such as 'L5.H3'")
    return list(dict.fromkeys(parse_node(text, config, parallel=parallel) for text in listed))


def _parsed(text: str, config: ModelConfig) -> Node:
    if text.lower() == "embed":
        return Node("embed")
    if text.lower() == "logits":
        return Node("logits")
    if found := _KV.fullmatch(text):
        layer, index, part = found.groups()
        return Node("k" if part.lower() == "k" else "v", int(layer), int(index))
    if found := _HEAD.fullmatch(text):
        layer, index, part = found.groups()
        part = (part or "").lower()
        if part in ("k", "v"):
            return _shared(Node("k" if part == "k" else "v", int(layer), int(index)), config)
        return Node("q" if part else "head", int(layer), int(index))
    if found := _PLACE.fullmatch(text):
        layer, place, mlp = found.groups()
        kinds: dict[str, Kind] = {
            "mlp": "mlp", "resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post",
        }  # fmt: skip
        return Node(kinds[place.lower()], int(layer)) if place else Node("mlp", int(mlp))
    raise InputError(
        f"{text!r} is no part of a model",
        expected="embed, L5.H3, L5.H3.q, L5.KV1.k, L5.KV1.v, L5.mlp, L5.resid_pre, L5.resid_mid, L5.resid_post or logits",
    )


def _shared(node: Node, config: ModelConfig) -> Node:
    """The key/value input of one query head, if it has its own."""
    group = config.n_heads // config.n_kv_heads
    if group == 1:
        return node
    kv = (node.index or 0) // group
    raise InputError(
        f"Query head {node.index} of block {node.layer} has no {node.kind} input of its own",
        got=f"{config.n_heads} query heads on {config.n_kv_heads} key/value heads",
        fix=f"L{node.layer}.KV{kv}.{node.kind} is read by the query heads {kv * group} to {kv * group + group - 1} together",
    )


def _check(node: Node, config: ModelConfig) -> None:
    if node.layer is not None and not 0 <= node.layer < config.n_layers:
        raise InputError(f"There is no {node}", got=f"layer {node.layer}", expected=f"0 to {config.n_layers - 1}")
    if node.index is None:
        return
    n = config.n_kv_heads if node.kind in ("k", "v") else config.n_heads
    if not 0 <= node.index < n:
        raise InputError(f"There is no {node}", got=f"head {node.index}", expected=f"0 to {n - 1}")
