"""`Circuit`: a set of edges of a model as a value: which nodes it has, where it came from; saved, loaded and drawn.

`prune` makes one from scores of edges (`attribute(level="edge")`). Edges are ranked,

    "top"      all by score                                          (threshold: `apply_topn` of Hanna et al. 2024)
    "greedy"   from the logits backwards: the best edge into a node that is in the circuit already   (`apply_greedy`)

and as many are taken, in this order, as leave at most n edges on paths from the embedding to the logits; the others are dropped.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits.drawing import Drawing, draw
from microtome.circuits.edges import edge_axes
from microtome.circuits.effects import Effects
from microtome.circuits.graph import EdgeText, Graph, Mask
from microtome.circuits.nodes import Node
from microtome.common.artifacts import describe_run, read_json, write_json
from microtome.common.config import from_dict, to_dict
from microtome.common.errors import ArtifactError, InputError, MicrotomeError, unknown_name
from microtome.model.hooked import HookedModel

_KIND, _FORMAT = "circuit", 1


@dataclass(frozen=True)
class Edge:
    """One edge, with its score where it was scored."""

    writer: Node
    reader: Node
    score: float | None = None

    def __str__(self) -> str:
        return f"{self.writer} -> {self.reader}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """The edges `mask` of the model named `model`, whose graph is `graph`. `scores` are of all edges, where there are any;
    `made` says how it was found."""

    graph: Graph
    mask: Mask
    model: str = ""
    scores: Float[Tensor, "writers readers"] | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = tuple(self.graph.all_edges.shape)
        if tuple(self.mask.shape) != sizes:
            raise InputError("A circuit's mask is not one of its graph", got=tuple(self.mask.shape), expected=sizes)
        if bool((self.mask & ~self.graph.all_edges).any()):
            raise InputError("A circuit has an edge whose sender is not before its receiver")

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def whole(cls, model: HookedModel) -> "Circuit":
        """All edges of a model."""
        graph = Graph.of(model)
        return cls(graph=graph, mask=graph.all_edges, model=model.name, made={"how": "whole model"})

    @classmethod
    def of_edges(cls, model: HookedModel, edges: Sequence[EdgeText]) -> "Circuit":
        """From edges as text (`"L2.H3 -> L5.H1.q"`) or pairs. Raises InputError for none, and for one that cannot be."""
        if not edges:
            raise InputError("The circuit is empty", expected="at least one edge, such as 'embed -> logits'")
        graph = Graph.of(model)
        return cls(graph=graph, mask=graph.edges_of(edges), model=model.name, made={"how": "edges by name"})

    @classmethod
    def of_nodes(cls, model: HookedModel, nodes: Sequence[str | Node]) -> "Circuit":
        """All edges between the nodes named, the embedding and the logits. To run it is to replace what all other heads and
        MLPs write. Raises InputError for no node, and for what is no node of a circuit."""
        if not nodes:
            raise InputError("The circuit is empty", expected="at least one node, such as 'L5.H3' or 'L2.mlp'")
        graph = Graph.of(model)
        return cls(graph=graph, mask=graph.between(nodes), model=model.name, made={"how": "nodes by name"})

    # ---- what is in it ----------------------------------------------------------------------------------------------

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def fraction(self) -> float:
        """The share of the model's edges."""
        return self.n_edges / self.graph.n_edges

    @property
    def edges(self) -> list[Edge]:
        """In the order of the forward pass."""
        return [self._edge(int(i), int(j)) for i, j in self.mask.nonzero()]

    @property
    def nodes(self) -> list[Node]:
        """The embedding, heads, MLPs and logits that an edge of the circuit touches, in the order of the forward pass."""
        edges = self.edges
        writing = {edge.writer for edge in edges}
        found = set(writing)
        for reader in {edge.reader for edge in edges}:
            owners = self.graph.owners(reader) or (reader,)
            # Keys and values that a group shares count for those heads of it that write into the circuit.
            found.update([node for node in owners if node in writing] or owners)
        return sorted(found)

    def top_edges(self, n: int = 10) -> list[Edge]:
        """The n edges with the largest scores in size. Raises InputError for a circuit without scores, and for an n below 1."""
        if n < 1:
            raise InputError("There is nothing to list", got=f"the top {n}", expected="1 or more")
        if self.scores is None:
            raise InputError("The edges of this circuit have no scores")
        return sorted(self.edges, key=lambda edge: -abs(edge.score or 0.0))[:n]

    def without(self, nodes: Sequence[str | Node]) -> "Circuit":
        """The circuit without the edges into and out of some nodes (keys and values of a group go when
        none of its heads is left in the circuit)."""
        graph = self.graph
        mask = self.mask & graph.without(nodes)
        for reader in {reader for node in nodes for reader in graph.read_by(graph.node(node))}:
            if not mask[[graph.writer_at[owner] for owner in graph.owners(reader)]].any():
                mask[:, graph.reader_at[reader]] = False
        return replace(self, mask=mask, made={**self.made, "without": [str(node) for node in nodes]})

    def _edge(self, i: int, j: int) -> Edge:
        score = None if self.scores is None else float(self.scores[i, j])
        return Edge(self.graph.writers[i], self.graph.readers[j], score)

    # ---- as a file, as a picture ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        edges = [
            {"from": str(edge.writer), "to": str(edge.reader)} | ({} if edge.score is None else {"score": edge.score})
            for edge in self.edges
        ]
        return {
            "model": self.model,
            "graph": to_dict(self.graph),
            "n_edges": self.n_edges,
            "edges": edges,
            "made": dict(self.made),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write to one JSON file, with what made it. Raises ArtifactError for a file that is there, unless `overwrite`."""
        path = Path(path)
        if path.exists() and not overwrite:
            raise ArtifactError(
                f"{path} is already there", fix="Choose another name, or say overwrite=True (--overwrite)"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kind": _KIND, "format": _FORMAT, **self.to_json(), "provenance": describe_run()})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """What `save` wrote; scores are those of its own edges. Raises ArtifactError for another file."""
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"There is no circuit at {path}")
        data = read_json(path)
        if data.get("kind") != _KIND or data.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is no circuit", got=f"{data.get('kind')}, format {data.get('format')}")
        try:
            graph = from_dict(Graph, data["graph"])
            rows = [(edge["from"], edge["to"]) for edge in data["edges"]]
            scores = torch.zeros(graph.all_edges.shape)
            for edge, ends in zip(data["edges"], rows, strict=True):
                scores[graph.edge(ends)] = edge.get("score", torch.nan)
            scored = None if bool(scores.isnan().any()) else scores
            return cls(graph=graph, mask=graph.edges_of(rows), model=data["model"], scores=scored, made=data["made"])
        except (KeyError, TypeError, MicrotomeError) as error:
            raise ArtifactError(f"{path} is damaged", got=error, expected="what Circuit.save wrote") from error

    def draw(self, *, title: str = "") -> Drawing:
        """A picture: nodes in the order of depth, the embedding below, edges as wide as their score is large. It has `svg`,
        `dot` (Graphviz) and `save(path)`. Raises InputError for a circuit without edges."""
        edges = [(edge.writer, edge.reader, edge.score) for edge in self.edges]
        return draw(self.graph, edges, title=title or self.model)


# ---- from scores to a circuit ---------------------------------------------------------------------------------------


def prune(
    model: HookedModel,
    scores: Effects | Float[Tensor, "writers readers"],
    n: int,
    *,
    how: str = "greedy",
    by: str = "size",
) -> Circuit:
    """The circuit of at most n edges with the best scores, all on paths from the embedding to the logits.

    `scores` are Effects of edges, or a number for each edge. `by`: the largest in size, the most positive or the most
    negative first (with noising and a metric that the task raises, edges that help are negative). There may be fewer than n
    edges: as many as come with the last edge that fits. Raises InputError for scores of something else, NaN, and where no n
    best edges hold a path.
    """
    graph = Graph.of(model)
    mean = scores.mean if isinstance(scores, Effects) else scores
    if isinstance(scores, Effects) and scores.axes != edge_axes(graph):
        raise InputError("These are no scores of this model's edges", fix="attribute(…, level='edge') makes them")
    if mean.shape != graph.all_edges.shape or bool(mean.isnan().any()):
        raise InputError(
            "Scores must be one number for each edge", got=f"{tuple(mean.shape)}, NaN {bool(mean.isnan().any())}"
        )
    if not 0 < n <= graph.n_edges:
        raise InputError("A circuit cannot have so many edges", got=n, expected=f"1 to {graph.n_edges}")
    order = _ranked(graph, mean, how=how, by=by)
    length = _longest(graph, order, n)
    mask = _connected(graph, order[:length])
    if not mask.any():
        raise InputError(
            f"The best edges hold no circuit of at most {n} edges: no path from the embedding to the logits",
            fix=f"Ask for at least {int(_connected(graph, order[: length + 1]).sum())} edges",
        )
    made = {"how": how, "by": by, "n": n} | ({"scores": scores.what} if isinstance(scores, Effects) else {})
    return Circuit(graph=graph, mask=mask, model=model.name, scores=mean, made=made)


def pruned_mask(graph: Graph, scores: Float[Tensor, "writers readers"], n: int, *, how: str, by: str) -> Mask:
    """The edges of `prune`; maybe none."""
    order = _ranked(graph, scores, how=how, by=by)
    return _connected(graph, order[: _longest(graph, order, n)])


def _ranked(graph: Graph, scores: Tensor, *, how: str, by: str) -> list[tuple[int, int]]:
    """All edges in the order in which they are taken."""
    ranks = {"size": Tensor.abs, "positive": Tensor.clone, "negative": Tensor.neg}
    orders = {"top": _by_score, "greedy": _from_logits}
    if by not in ranks:
        raise unknown_name("order of edges", by, ranks, InputError)
    if how not in orders:
        raise unknown_name("way of pruning", how, orders, InputError)
    return list(orders[how](graph, ranks[by](scores)))


def _longest(graph: Graph, order: Sequence[tuple[int, int]], n: int) -> int:
    """How long the longest beginning is that leaves at most n edges on paths."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(_connected(graph, order[:middle]).sum()) <= n else (low, middle - 1)
    return low


def _by_score(graph: Graph, rank: Tensor) -> list[tuple[int, int]]:
    listed = graph.all_edges.nonzero()
    best = rank[graph.all_edges].argsort(descending=True, stable=True)
    return [(int(i), int(j)) for i, j in listed[best].tolist()]


def _from_logits(graph: Graph, rank: Tensor) -> Iterator[tuple[int, int]]:
    """Best first among the edges into what is in the circuit already."""
    values = rank.tolist()
    heap: list[tuple[float, int, int]] = []
    open_readers: set[int] = set()

    def enter(reader: Node) -> None:
        j = graph.reader_at[reader]
        if j not in open_readers:
            open_readers.add(j)
            for i in range(graph.seen(reader)):
                heapq.heappush(heap, (-values[i][j], i, j))

    enter(Node("logits"))
    while heap:
        _, i, j = heapq.heappop(heap)
        yield i, j
        for reader in graph.read_by(graph.writers[i]):
            enter(reader)


def _connected(graph: Graph, edges: Sequence[tuple[int, int]]) -> Mask:
    """Those of the edges that are on a path from the embedding to the logits."""
    mask = torch.zeros_like(graph.all_edges)
    if edges:
        rows, columns = zip(*edges, strict=True)
        mask[list(rows), list(columns)] = True
    return on_paths(graph, mask)


def on_paths(graph: Graph, mask: Mask) -> Mask:
    """The edges of a mask that are on a path from the embedding to the logits: what leaves a node is made of what it reads."""
    reads = [[graph.reader_at[reader] for reader in graph.read_by(writer)] for writer in graph.writers]
    kept = mask.clone()
    for i, columns in enumerate(reads):  # along the forward pass: a node that reads nothing live has nothing to say
        if columns and not kept[:, columns].any():
            kept[i] = False
    useful = torch.zeros(len(graph.readers), dtype=torch.bool)
    useful[-1] = True
    for i in reversed(range(len(reads))):  # and back: a reader is of use if a node of its own is
        if (kept[i] & useful).any():
            useful[reads[i]] = True
    return kept & useful
