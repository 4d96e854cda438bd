"""The anatomy of one model: which station serves each of its hook points, from the spec of its family."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from microtome.model.block_weights import BlockWeights
from microtome.model.kernel import KernelMode
from microtome.model.names import HookName
from microtome.model.projections import Part, projection
from microtome.model.specs import Dense, Experts, FamilySpec, Gated, ModelConfig
from microtome.model.stations import (
    ExpertStation,
    HeadInputStation,
    KernelStation,
    ModuleStation,
    NormStation,
    ResultStation,
    SharedNormInputStation,
    Station,
)
from microtome.model.views import Columns, View, Whole

Found = Iterator[tuple[Station, list[HookName]]]


def anatomy(spec: FamilySpec, config: ModelConfig) -> dict[HookName, Station]:
    """Every hook point of a model, in the order of the forward pass, with the station that serves it."""
    found: dict[HookName, Station] = {}
    for station, names in _outside_blocks(spec):
        found.update(dict.fromkeys(names, station))
    for i in range(config.n_layers):
        for station, names in _Block(spec, config, i).stations():
            found.update(dict.fromkeys(names, station))
    return dict(sorted(found.items()))


def _outside_blocks(spec: FamilySpec) -> Found:
    yield _whole(HookName("hook_tokens"), spec.embed, "input")
    yield _whole(HookName("hook_embed"), spec.embed_out or spec.embed)
    if spec.pos_embed:
        yield _whole(HookName("hook_pos_embed"), spec.pos_embed)
    if spec.ln_final:
        yield _norm("ln_final", spec.ln_final, spec, None)
    yield _whole(HookName("unembed.hook_in"), spec.unembed_in or spec.unembed, "input")
    yield _whole(HookName("unembed.hook_out"), spec.unembed)


@dataclass(frozen=True)
class _Block:
    """The stations of one block."""

    spec: FamilySpec
    config: ModelConfig
    layer: int

    def name(self, point: str, expert: int | None = None) -> HookName:
        return HookName(point, self.layer, expert)

    @property
    def path(self) -> str:
        return f"{self.spec.blocks}.{self.layer}"

    @property
    def flat_mlp(self) -> bool:
        """Whether the tensors around the MLP are `[batch · pos, …]` (OPT)."""
        return isinstance(self.spec.mlp, Dense | Gated) and self.spec.mlp.flat

    def at(self, module: str) -> str:
        return f"{self.path}.{module}"

    def weights(self, hf: nn.Module) -> BlockWeights:
        return BlockWeights(hf.get_submodule(self.path), self.spec, self.config)

    def stations(self) -> Found:
        yield _whole(self.name("hook_resid_pre"), self.path, "input")
        if self.spec.has_attn:
            yield from self._attention()
        yield from self._norms()
        if self.spec.has_mlp:
            yield from self._streams()
            yield from self._mlp()
        yield _whole(self.name("hook_resid_post"), self.path)

    def _reads(self, point: str, module: str, *, flat: bool = False) -> tuple[Station, list[HookName]]:
        """What attention or the MLP reads: behind the norm and what it learned, where there is one. Changed for this reader
        alone: the norm may be shared with the other, and without a norm this is the stream itself."""
        name = self.name(point)
        return ModuleStation(self.at(module), "input", ((name, Whole()),), own=True, flat=flat), [name]

    # ---- attention --------------------------------------------------------------------------------------------------

    def _attention(self) -> Found:
        spec, config = self.spec, self.config
        yield self._reads("attn.hook_in", spec.attn)
        yield from self._head_inputs()
        yield from self._projections(("q", "attn.hook_q"), ("k", "attn.hook_k"), ("v", "attn.hook_v"))
        parts = {"scores": self.name("attn.hook_attn_scores"), "pattern": self.name("attn.hook_pattern")}
        if spec.rotary:
            parts |= {"rot_q": self.name("attn.hook_rot_q"), "rot_k": self.name("attn.hook_rot_k")}
        kernel = KernelStation(self.at(spec.attn), partial(KernelMode, config), tuple(parts.items()))
        yield kernel, list(parts.values())
        heads, o = Columns(0, config.n_heads, config.d_head), self.at(spec.o)
        z, result = self.name("attn.hook_z"), self.name("attn.hook_result")
        yield ModuleStation(o, "input", ((z, heads),)), [z]
        yield ResultStation(o, result, heads, self._output_weights), [result]
        yield _whole(self.name("hook_attn_out"), self.at(spec.ln1_post or spec.o))

    def _head_inputs(self) -> Found:
        """Not for post-norm blocks, where the heads' input is normed with the stream."""
        spec, config = self.spec, self.config
        if not spec.additive:
            return
        shared = self.name("hook_attn_in") if config.n_kv_heads == config.n_heads else None
        positions = spec.pos_embed if spec.shortformer else None
        feeds = []
        for part in ("q", "k", "v"):
            path, view = projection(spec, config, part)
            feeds.append((self.name(f"hook_{part}_input"), self.at(path), view, partial(self._part_weights, part)))
        norm = self.at(spec.ln1) if spec.ln1 else None
        station = HeadInputStation(self.path, norm, config.n_heads, shared, tuple(feeds), positions)
        yield station, [feed[0] for feed in feeds] + ([shared] if shared else [])

    def _part_weights(self, part: Part, hf: nn.Module) -> tuple[Tensor, Tensor]:
        return self.weights(hf).of(part)

    def _output_weights(self, hf: nn.Module) -> tuple[Tensor, Tensor]:
        weights = self.weights(hf)
        return weights.W_O, weights.b_O

    def _projections(self, *parts: tuple[Part, str]) -> Found:
        """One station for each linear map, with the points that are in its output."""
        by_module: dict[str, list[tuple[HookName, View]]] = {}
        for part, point in parts:
            path, view = projection(self.spec, self.config, part)
            by_module.setdefault(path, []).append((self.name(point), view))
        for path, views in by_module.items():
            flat_here = self.flat_mlp and parts[0][0] not in ("q", "k", "v")
            yield ModuleStation(self.at(path), "output", tuple(views), flat=flat_here), [name for name, _ in views]

    # ---- norms and streams ------------------------------------------------------------------------------------------

    def _norms(self) -> Found:
        for norm in ("ln1", "ln1_post", "ln2", "ln2_post"):
            path = getattr(self.spec, norm)
            has_part = self.spec.has_attn if norm.startswith("ln1") else self.spec.has_mlp
            if path and has_part:
                yield _norm(norm, self.at(path), self.spec, self.layer, flat=self.flat_mlp and norm == "ln2")

    def _streams(self) -> Found:
        """`hook_resid_mid` and the MLP's own copy of what it reads."""
        spec = self.spec
        mid, mlp_in = self.name("hook_resid_mid"), self.name("hook_mlp_in")
        reader = spec.ln2 or spec.mid
        if reader and spec.has_attn and not spec.parallel:
            yield ModuleStation(self.at(reader), "input", ((mid, Whole()),), in_place=True, flat=self.flat_mlp), [mid]
        if reader:
            yield ModuleStation(self.at(reader), "input", ((mlp_in, Whole()),), own=True, flat=self.flat_mlp), [mlp_in]
        elif spec.parallel and spec.ln1 and isinstance(spec.mlp, Dense | Gated):
            yield SharedNormInputStation(self.path, self.at(spec.ln1), self.at(spec.mlp.module), mlp_in), [mlp_in]

    # ---- MLP --------------------------------------------------------------------------------------------------------

    def _mlp(self) -> Found:
        mlp, out = self.spec.mlp, self.name("hook_mlp_out")
        yield self._reads("mlp.hook_in", mlp.module, flat=self.flat_mlp)
        if isinstance(mlp, Experts):
            yield from self._experts(mlp)
            yield _whole(out, self.at(self.spec.ln2_post or mlp.module))
            return
        if isinstance(mlp, Gated):
            yield from self._projections(("gate", "mlp.hook_pre"), ("up", "mlp.hook_pre_linear"))
        else:
            yield from self._projections(("up", "mlp.hook_pre"))
            if mlp.norm:
                yield _whole(self.name("mlp.hook_mid"), self.at(mlp.norm), "input")
        post = self.name("mlp.hook_post")
        yield ModuleStation(self.at(mlp.down), "input", ((post, Whole()),), flat=mlp.flat), [post]
        station = ModuleStation(
            self.at(self.spec.ln2_post or mlp.down),
            "output",
            ((out, Whole()),),
            flat=mlp.flat,
            overwritten=self.spec.mlp_out_overwritten,
        )
        yield station, [out]

    def _experts(self, mlp: Experts) -> Found:
        for item, point in ((1, "mlp.hook_expert_weights"), (2, "mlp.hook_expert_indices")):
            name = self.name(point)
            yield ModuleStation(self.at(mlp.router), "output", ((name, Whole()),), item=item, flat=True), [name]
        parts = ("gate", "pre", "post")
        points = tuple(
            (self.name(f"mlp.experts.{{j}}.hook_{part}", j), j, part)
            for j in range(self.config.n_experts)
            for part in parts
        )
        yield ExpertStation(self.at(mlp.experts), points), [name for name, _, _ in points]


def _whole(name: HookName, module: str, side: str = "output") -> tuple[Station, list[HookName]]:
    return ModuleStation(module, "input" if side == "input" else "output", ((name, Whole()),)), [name]


def _norm(
    norm: str, module: str, spec: FamilySpec, layer: int | None, *, flat: bool = False
) -> tuple[Station, list[HookName]]:
    names = [HookName(f"{norm}.hook_scale", layer), HookName(f"{norm}.hook_normalized", layer)]
    return NormStation(module, spec.norm_offset, names[0], names[1], flat), names
