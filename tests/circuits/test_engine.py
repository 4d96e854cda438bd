"""The engine against the naive loop: one edited forward pass for each intervention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.model.families import KINDS, make
from torch import Tensor

from microtome.circuits import metrics
from microtome.circuits.engine import Engine, sweep
from microtome.circuits.rows import Write, columns_of
from microtome.common.errors import ConfigError, InputError, ModelError
from microtome.model import HookedModel, edits
from microtome.model.names import HookName
from microtome.model.prompts import Prompts
from microtome.model.reference import ReferenceConfig
from microtome.model.reference_hf import ReferenceTransformer

POSITIONS, PROMPTS = 7, 3
POINTS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_q_input", "hook_k_input",
    "hook_mlp_in", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_z",
    "attn.hook_pattern",
    "mlp.hook_post", "ln1.hook_normalized", "attn.hook_in", "mlp.hook_in",
)  # fmt: skip
EVERYWHERE = ("hook_resid_pre", "hook_resid_post", "attn.hook_z")
PADDED = (
    "gpt2",
    "gpt_neo",
    "llama",
    "gpt_neox",
    "gptj",
    "falcon-rw",
    "bloom",
    "opt",
    "gemma2",
    "gemma3",
    "mixtral",
    "phi",
)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 320, (PROMPTS, POSITIONS), generator=torch.Generator().manual_seed(seed))


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


@dataclass
class Case:
    """One intervention: as edits (for the naive loop) and as writes (for the engine)."""

    edits: list[edits.Edit]
    writes: list[Write]


def patches(model: HookedModel, other: Prompts | Tensor) -> list[Case]:
    """At each point and layer, everywhere or at one place: the activation of another run."""
    known = [*map(HookName.parse, model.hook_points)]
    names = [n for n in known if n.point in POINTS and (n.layer == 1 or n.point in EVERYWHERE)]
    cache = model.activations(other, names)
    mine = Prompts(other) if isinstance(other, Tensor) else other
    cases = []
    for i, name in enumerate(names):
        source, heads = cache[str(name)], None
        if "n_heads" in name.axes or "n_kv_heads" in name.axes:
            heads = (i % (2 if "n_kv_heads" in name.axes else 4) % source.shape[1 if "query" in name.axes else 2],)
        position = (i % POSITIONS) - POSITIONS if mine.mask is None else -1 - i % 3
        write = Write(name=name, value=source, columns=columns_of(mine, position), heads=heads)
        cases.append(Case([edits.patch(name, source, positions=position, heads=heads)], [write]))
    return cases


def naive(
    model: HookedModel, prompts: Tensor | Prompts, cases: Sequence[Case], metric: Callable[[Tensor], Tensor]
) -> Tensor:
    values = []
    for case in cases:
        with model.edited(case.edits):
            values.append(metric(model(prompts).float()))
    return torch.stack(values)


def masked() -> Tensor:
    """The first prompt has two tokens less."""
    mask = torch.ones(PROMPTS, POSITIONS, dtype=torch.bool)
    mask[0, :2] = False
    return mask


def reference(normalization: str = "layer", **settings: Any) -> HookedModel:
    sizes = {
        "n_layers": 3,
        "d_model": 16,
        "n_heads": 4,
        "d_head": 4,
        "d_mlp": 32,
        "d_vocab": 320,
        "n_ctx": 16,
        "start_std": 0.3,
    }
    return ReferenceTransformer.build(
        ReferenceConfig(**{**sizes, "normalization": normalization, **settings}), 0
    ).hooked()


REFERENCES: dict[str, dict[str, Any]] = {
    "reference": {},
    "reference-rotary": {"positions": "rotary", "n_kv_heads": 2, "activation": "swiglu", "normalization": "rms"},
    "reference-shortformer": {"positions": "shortformer", "normalization": "none"},
    "reference-attention-only": {"d_mlp": 0},
    "reference-mlp-only": {"n_heads": 0, "d_head": 0},
}


def model_of(kind: str) -> HookedModel:
    return reference(**REFERENCES[kind]) if kind in REFERENCES else make(kind)


def check_against_naive(model: HookedModel, clean: Prompts | Tensor, other: Prompts | Tensor) -> None:
    cases = patches(model, other)
    found = sweep(model, clean, [case.writes for case in cases], metrics.logit_difference(model, 5, 9), max_rows=16)
    wanted = naive(model, clean, cases, difference)
    assert found.shape == (len(cases), PROMPTS)
    for case, mine, plain in zip(cases, found, wanted, strict=True):
        assert torch.allclose(mine, plain, atol=1e-4, rtol=1e-4), (case.writes[0].name, mine, plain)
    assert float((wanted - difference(model(clean))).abs().max()) > 0.01


@pytest.mark.parametrize("kind", [*KINDS, *REFERENCES])
def test_a_sweep_is_the_naive_loop(kind: str) -> None:
    check_against_naive(model_of(kind), tokens(), tokens(1))


@pytest.mark.parametrize("kind", PADDED)
def test_a_sweep_over_padded_prompts_is_the_naive_loop(kind: str) -> None:
    check_against_naive(make(kind), Prompts(tokens(), masked()), Prompts(tokens(1), masked()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "generic"])
def test_the_prefix_comes_from_the_cache_in_every_family(kind: str) -> None:
    engine = Engine(make(kind), tokens())
    assert len(engine._segments.clean.keys_values) == engine.model.config.n_layers


def test_without_a_cache_rows_begin_at_the_first_column(gpt2: HookedModel) -> None:
    engine, plain = Engine(gpt2, tokens()), Engine(gpt2, tokens())
    plain._segments.clean.keys_values.clear()  # as for a model whose cache holds something else
    writes = [[Write(name=HookName("hook_mlp_out", 1), value=0.0, columns=columns_of(engine.prompts, 4))]]
    metric = metrics.logit_difference(gpt2, 5, 9)
    assert torch.allclose(engine.sweep(writes, metric), plain.sweep(writes, metric), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_bf16(kind: str) -> None:
    model = make(kind, dtype=torch.bfloat16)
    cases = patches(model, tokens(1))
    found = sweep(model, tokens(), [case.writes for case in cases], metrics.logit_difference(model, 5, 9))
    wanted = naive(model, tokens(), cases, difference)
    spread = float((wanted - difference(model(tokens()).float())).abs().mean())
    assert float((found - wanted).abs().mean()) < 0.1 * spread


def test_the_built_in_model(smol: HookedModel) -> None:
    clean = smol.to_tokens("When Mary and John went to the store, John gave a drink to")
    other = smol.to_tokens("When Mary and John went to the store, Mary gave a drink to")
    names = [HookName("attn.hook_z", 12), HookName("hook_resid_pre", 3), HookName("hook_resid_pre", 29)]
    cache = smol.activations(other, names)
    cases = [Case([edits.patch(n, cache[str(n)], positions=9)], [write(smol, n, cache, clean)]) for n in names]
    found = sweep(smol, clean, [case.writes for case in cases], metrics.logit_difference(smol, 5, 9))
    assert torch.allclose(found, naive(smol, clean, cases, difference), atol=1e-4)


def write(model: HookedModel, name: HookName, cache: Any, clean: Tensor) -> Write:
    return Write(name=name, value=cache[str(name)], columns=columns_of(Prompts(clean), 9))


# ---- what a row may be --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> HookedModel:
    return make("gpt2")


def test_several_writes_and_each_prompts_own_position(gpt2: HookedModel) -> None:
    prompts = Prompts(tokens())
    own = torch.tensor([1, 4, -1])
    z, mlp = HookName("attn.hook_z", 2), HookName("hook_mlp_out", 0)
    both = [
        Write(name=z, value=0.0, heads=(1, 3), columns=columns_of(prompts, slice(2, 5))),
        Write(name=mlp, value=torch.full((32,), 0.5), columns=columns_of(prompts, own)),
    ]
    doubled = [Write(name=mlp, value=lambda x, rows, first: x * 2, units=(0, 7))]
    found = sweep(gpt2, prompts, [both, doubled], metrics.logit_difference(gpt2, 5, 9), max_rows=2)

    for i, position in enumerate((1, 4, 6)):
        with gpt2.edited(
            [
                edits.zero(str(z), heads=[1, 3], positions=slice(2, 5)),
                edits.mean(str(mlp), torch.full((32,), 0.5), positions=position),
            ]
        ):
            assert float(difference(gpt2(tokens()[i : i + 1]))) == pytest.approx(float(found[0, i]), abs=1e-4)
    with gpt2.edited(edits.scale(str(mlp), 2.0, units=[0, 7])):
        assert torch.allclose(found[1], difference(gpt2(tokens())), atol=1e-4)


def test_points_outside_of_blocks(gpt2: HookedModel) -> None:
    prompts = Prompts(tokens())
    names = ["hook_embed", "ln_final.hook_normalized", "unembed.hook_in"]
    found = sweep(
        gpt2,
        prompts,
        [[Write(name=HookName(n), value=0.25, columns=columns_of(prompts, -1), units=(0, 1, 2))] for n in names],
        metrics.logit_difference(gpt2, 5, 9),
    )
    for name, mine in zip(names, found, strict=True):
        with gpt2.edited(edits.mean(name, 0.25, positions=-1, units=[0, 1, 2])):
            assert torch.allclose(mine, difference(gpt2(tokens())), atol=1e-4), name
    with pytest.raises(InputError, match="share what is at hook_pos_embed"):
        sweep(
            gpt2, prompts, [[Write(name=HookName("hook_pos_embed"), value=0.0)]], metrics.logit_difference(gpt2, 5, 9)
        )


@pytest.mark.parametrize("max_rows", [1, 5, 100])
def test_metrics_of_all_positions_and_of_all_prompts(gpt2: HookedModel, max_rows: int) -> None:
    prompts = Prompts(tokens())
    zeros = [
        [Write(name=HookName("hook_mlp_out", layer), value=0.0, columns=columns_of(prompts, 3))] for layer in (0, 2)
    ]
    loss = sweep(gpt2, prompts, zeros, metrics.loss(tokens()), max_rows=max_rows)
    mine = sweep(gpt2, prompts, zeros, lambda logits: logits[..., 7].mean(), max_rows=max_rows)
    for i, layer in enumerate((0, 2)):
        with gpt2.edited(edits.zero(f"blocks.{layer}.hook_mlp_out", positions=3)):
            logits = gpt2(tokens())
        assert torch.allclose(mine[i], logits[..., 7].mean(), atol=1e-5)
        plain = [torch.nn.functional.cross_entropy(logits[r, :-1], tokens()[r, 1:]) for r in range(PROMPTS)]
        assert torch.allclose(loss[i], torch.stack(plain), atol=1e-5)


def test_activations_under_interventions(gpt2: HookedModel) -> None:
    prompts = Prompts(tokens())
    engine = Engine(gpt2, prompts, max_rows=4)
    zeros = [
        [Write(name=HookName("attn.hook_z", i), value=0.0, heads=(2,), columns=columns_of(prompts, 3))] for i in (0, 1)
    ]
    names = [HookName("hook_resid_pre", 1), HookName("hook_mlp_out", 1), HookName("hook_resid_pre", 2)]
    found = engine.record(zeros, names)
    for i in (0, 1):
        with gpt2.edited(edits.zero(f"blocks.{i}.attn.hook_z", head=2, positions=3)):
            _, cache = gpt2.run_with_cache(tokens(), names)
        for name in names:
            assert torch.allclose(found[name][i], cache[str(name)], atol=1e-5), (i, name)
    with pytest.raises(ModelError, match="behind all that is to be recorded"):
        engine.record([[Write(name=HookName("attn.hook_z", 2), value=0.0)]], names[:1])


def test_what_writes_nothing_is_the_clean_run(gpt2: HookedModel) -> None:
    none = torch.zeros(PROMPTS, POSITIONS, dtype=torch.bool)
    metric = metrics.logit_difference(gpt2, 5, 9)
    found = sweep(gpt2, tokens(), [[Write(name=HookName("hook_mlp_out", 1), value=0.0, columns=none)]], metric)
    assert torch.allclose(found[0], difference(gpt2(tokens())), atol=1e-5)


def test_the_model_is_left_as_it_was(gpt2: HookedModel) -> None:
    before = gpt2(tokens())
    wrong = Write(name=HookName("hook_mlp_out", 1), value=torch.zeros(PROMPTS, POSITIONS, 5))
    with pytest.raises(ModelError, match="does not fit"):
        sweep(gpt2, tokens(), [[wrong]], metrics.logit_difference(gpt2, 5, 9))
    assert torch.equal(gpt2(tokens()), before)
    assert not gpt2._switchboard.busy
    assert all("forward" not in module.__dict__ for module in gpt2.hf.modules())


def test_bad_input(gpt2: HookedModel) -> None:
    metric = metrics.logit_difference(gpt2, 5, 9)
    zero = [[Write(name=HookName("hook_mlp_out", 1), value=0.0)]]
    with pytest.raises(InputError, match="no intervention"):
        sweep(gpt2, tokens(), [], metric)
    with pytest.raises(ConfigError, match="max_rows"):
        sweep(gpt2, tokens(), zero, metric, max_rows=0)
    with pytest.raises(ModelError, match="inside of edits"), gpt2.edited(edits.zero("blocks.0.hook_mlp_out")):
        sweep(gpt2, tokens(), zero, metric)
    with pytest.raises(InputError, match="one value for each row"):
        sweep(gpt2, tokens(), zero, metrics.Metric("odd", lambda logits, rows: logits[:, 0, :2]))
    with pytest.raises(InputError, match="NaN"):
        sweep(gpt2, tokens(), zero, metrics.Metric("nan", lambda logits, rows: logits[:, 0, 0] * torch.nan))
    with pytest.raises(InputError, match="no rows of its own"):
        Write(name=HookName("mlp.experts.{j}.hook_gate", 0, 1), value=0.0)
    for positions, message in (
        (99, "no such position"),
        ([], "No position"),
        (torch.zeros(2, 1).long(), "each prompt"),
    ):
        with pytest.raises(InputError, match=message):
            columns_of(Prompts(tokens()), positions)
