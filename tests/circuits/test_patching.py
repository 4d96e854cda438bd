"""Activation patching and ablation against plain loops of edited runs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.model.families import make
from torch import Tensor

from microtome.circuits import metrics
from microtome.circuits.ablation import ablate, ablate_features, knock_out, knock_outs
from microtome.circuits.patching import activation_patching
from microtome.common.errors import InputError, MicrotomeError, ModelError
from microtome.dictionary import Dictionary, Origin
from microtome.dictionary.activation import TopK
from microtome.model import HookedModel, edits
from microtome.model.prompts import Prompts

PROMPTS, POSITIONS, LAYERS = 3, 6, 3


def pair_of_tokens() -> tuple[Tensor, Tensor]:
    """Prompts that differ from position 2 (the second one: 1) on."""
    draws = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 320, (PROMPTS, POSITIONS), generator=draws)
    corrupt = clean.clone()
    corrupt[:, 2] = torch.randint(3, 320, (PROMPTS,), generator=draws)
    corrupt[1, 1] = 7
    return clean, corrupt


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


@pytest.fixture(scope="module")
def gpt2() -> HookedModel:
    return make("gpt2")


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return make("llama")


# ---- patching -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gemma2"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_each_place_is_a_loop_of_edits(kind: str, direction: str) -> None:
    model, (clean, corrupt) = make(kind), pair_of_tokens()
    metric = metrics.logit_difference(model, 5, 9)
    base, source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    overs = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    for over in overs[:1] + overs[2:] if model.spec.parallel else overs:
        found = activation_patching(model, clean, corrupt, metric, over, direction=direction, max_rows=5)  # type: ignore[arg-type]
        assert [axis.name for axis in found.axes] == ["layer", "position"]
        for layer in range(LAYERS):
            for position in range(POSITIONS):
                patch = edits.patch(
                    f"blocks.{layer}.hook_{over}",
                    model.activations(source, f"blocks.{layer}.hook_{over}"),
                    positions=position,
                )
                with model.edited(patch):
                    wanted = difference(model(base))
                assert torch.allclose(found.values[layer, position], wanted, atol=1e-4), (over, layer, position)
    assert found.clean is not None
    assert found.corrupt is not None
    assert torch.allclose(found.clean, difference(model(clean)), atol=1e-5)
    assert torch.allclose(found.corrupt, difference(model(corrupt)), atol=1e-5)


@pytest.mark.parametrize(("over", "point"), [("head", "z"), ("q", "q"), ("k", "k"), ("v", "v"), ("pattern", "pattern")])
def test_patching_heads(llama: HookedModel, over: str, point: str) -> None:
    clean, corrupt = pair_of_tokens()
    metric = metrics.logit_difference(llama, 5, 9)
    found = activation_patching(llama, clean, corrupt, metric, over)
    each = activation_patching(llama, clean, corrupt, metric, over, by_position=True, layers=[1])
    shared = over in ("k", "v")
    assert found.values.shape == (LAYERS, 2 if shared else 4, PROMPTS)
    assert each.values.shape == (1, 2 if shared else 4, POSITIONS, PROMPTS)
    if shared:
        assert found.axes[1].labels == ("KV0 (H0–H1)", "KV1 (H2–H3)")
        assert "moves 2 query heads" in found.notes[0]
    for layer in range(LAYERS):
        for head in range(found.values.shape[1]):
            name = f"blocks.{layer}.attn.hook_{point}"
            source = llama.activations(clean, name)
            with llama.edited(edits.patch(name, source, head=head)):
                assert torch.allclose(found.values[layer, head], difference(llama(corrupt)), atol=1e-4)
            if layer == 1:
                with llama.edited(edits.patch(name, source, head=head, positions=4)):
                    assert torch.allclose(each.values[0, head, 4], difference(llama(corrupt)), atol=1e-4)


def test_patching_is_normalized_to_no_effect_and_full_restoration(gpt2: HookedModel) -> None:
    clean, corrupt = pair_of_tokens()
    metric = metrics.logit_difference(gpt2, 5, 9)
    for direction in ("denoising", "noising"):
        found = activation_patching(gpt2, clean, corrupt, metric, normalize=True, direction=direction)
        assert torch.allclose(found.values[:, 0], torch.zeros(LAYERS, PROMPTS), atol=1e-5)  # before they differ
        whole = activation_patching(
            gpt2, clean, corrupt, metric, "resid_pre", normalize=True, by_position=False, direction=direction
        )  # fmt: skip
        assert torch.allclose(whole.values, torch.ones(LAYERS, PROMPTS), atol=1e-4)
    only = activation_patching(gpt2, clean, corrupt, metric, "resid_pre", by_position=False, positions=-1)
    each = activation_patching(gpt2, clean, corrupt, metric, "resid_pre")
    assert torch.allclose(only.values, each.values[:, -1], atol=1e-5)


def test_padded_prompts_are_patched_as_if_alone(llama: HookedModel) -> None:
    clean, corrupt = pair_of_tokens()
    mask = torch.ones(clean.shape, dtype=torch.bool)
    mask[0, :1] = False
    metric = metrics.logit_difference(llama, 5, 9)
    padded = activation_patching(llama, Prompts(clean, mask), Prompts(corrupt, mask), metric, "mlp_out")
    alone = activation_patching(llama, clean[:1, 1:], corrupt[:1, 1:], metric, "mlp_out")
    assert padded.axes[1].labels == ("-6", "-5", "-4", "-3", "-2", "-1")
    assert torch.allclose(padded.values[:, 1:, 0], alone.values[..., 0], atol=1e-4)


def test_patching_what_cannot_be(gpt2: HookedModel) -> None:
    clean, corrupt = pair_of_tokens()
    metric = metrics.logit_difference(gpt2, 5, 9)
    parallel = make("gptj")
    calls: list[tuple[type[Exception], str, Any]] = [
        (InputError, "are the same", lambda: activation_patching(gpt2, clean, clean, metric)),
        (InputError, "numbers of tokens", lambda: activation_patching(gpt2, clean, corrupt[:, 1:], metric)),
        (InputError, "head", lambda: activation_patching(gpt2, clean, corrupt, metric, "heads")),
        (InputError, "side by side", lambda: activation_patching(parallel, clean, corrupt, metric, "resid_mid")),
        (InputError, "NaN", lambda: activation_patching(gpt2, clean, corrupt, lambda x: x[:, 0, 0] * torch.nan)),
        (InputError, "one value for each", lambda: activation_patching(gpt2, clean, corrupt, lambda x: x[:, 0, :2])),
        (
            InputError,
            "cannot be normalized",
            lambda: activation_patching(gpt2, clean, corrupt, lambda x: x[:, 0, 0], normalize=True),
        ),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()


def test_several_token_answers_are_refused(smol: HookedModel) -> None:
    with pytest.raises(InputError, match="one token|single token"):
        metrics.logit_difference(smol, " antidisestablishmentarianism", " Mary")


# ---- ablation -----------------------------------------------------------------------------------------------------------


def looped(model: HookedModel, prompts: Tensor, names: Sequence[str], make_edit: Any) -> Tensor:
    values = []
    for name in names:
        with model.edited(make_edit(name)):
            values.append(difference(model(prompts)))
    return torch.stack(values)


@pytest.mark.parametrize("how", ["zero", "mean", "resample", "counterfactual"])
def test_ablation_of_heads_and_layers(llama: HookedModel, how: str) -> None:
    prompts, other = pair_of_tokens()
    metric = metrics.logit_difference(llama, 5, 9)
    reference = None if how == "zero" else other
    found = ablate(llama, prompts, metric, "head", how, reference=reference, seed=3)  # type: ignore[arg-type]
    rows = torch.randint(PROMPTS, (PROMPTS,), generator=torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        name = f"blocks.{layer}.attn.hook_z"
        seen = llama.activations(other, name)[name]
        value = {"zero": torch.zeros(()), "mean": seen.mean((0, 1)), "resample": seen[rows], "counterfactual": seen}[
            how
        ]
        for head in range(4):
            with llama.edited(edits.patch(name, value, head=head) if value.ndim else edits.zero(name, head=head)):
                assert torch.allclose(found.values[layer, head], difference(llama(prompts)), atol=1e-4), (layer, head)
    assert torch.allclose(found.change.values, found.values - difference(llama(prompts)), atol=1e-5)
    if how == "zero":
        layers = ablate(llama, prompts, metric, "layer", "zero", layers=[1])
        with llama.edited([edits.zero("blocks.1.hook_attn_out"), edits.zero("blocks.1.hook_mlp_out")]):
            assert torch.allclose(layers.values[0], difference(llama(prompts)), atol=1e-4)
        neurons = ablate(llama, prompts, metric, "neuron", "zero", layers=[2], positions=-1)
        with llama.edited(edits.zero("blocks.2.mlp.hook_post", units=17, positions=-1)):
            assert torch.allclose(neurons.values[0, 17], difference(llama(prompts)), atol=1e-4)
        each = ablate(llama, prompts, metric, "mlp_out", "zero", by_position=True)
        with llama.edited(edits.zero("blocks.0.hook_mlp_out", positions=3)):
            assert torch.allclose(each.values[0, 3], difference(llama(prompts)), atol=1e-4)


def test_template_means_are_within_the_group_and_the_position(gpt2: HookedModel) -> None:
    prompts, _ = pair_of_tokens()
    reference = torch.randint(3, 320, (5, POSITIONS), generator=torch.Generator().manual_seed(4))
    groups = (["a", "b", "a"], ["b", "a", "b", "a", "b"])
    metric = metrics.logit_difference(gpt2, 5, 9)
    found = ablate(gpt2, prompts, metric, "mlp_out", "template_mean", reference=reference, groups=groups)
    for layer in range(LAYERS):
        name = f"blocks.{layer}.hook_mlp_out"
        seen = gpt2.activations(reference, name)[name]
        a, b = seen[[1, 3]].mean(0), seen[[0, 2, 4]].mean(0)
        with gpt2.edited(edits.patch(name, torch.stack([a, b, a]))):
            assert torch.allclose(found.values[layer], difference(gpt2(prompts)), atol=1e-4)


def test_features_are_taken_out_and_the_error_stays(gpt2: HookedModel) -> None:
    prompts, _ = pair_of_tokens()
    torch.manual_seed(0)
    sae = Dictionary(32, 64, TopK(8), origin=Origin.at("tiny", "blocks.1.hook_resid_pre"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    name = "blocks.1.hook_resid_pre"
    metric = metrics.logit_difference(gpt2, 5, 9)
    x = gpt2.activations(prompts, name)[name]
    with torch.no_grad():
        codes = sae.encode(x.flatten(0, 1)).to_dense()
    features = [int(codes.sum(0).argmax()), int(codes.sum(0).argmin())]
    found = ablate_features(gpt2, prompts, metric, sae, name, features)
    for i, feature in enumerate(features):
        with torch.no_grad():
            new = x - (codes[:, feature, None] * sae.W_dec[feature]).view_as(x)
        with gpt2.edited(edits.patch(name, new)):
            assert torch.allclose(found.values[i], difference(gpt2(prompts)), atol=1e-4)
    assert float(found.change.values[0].abs().max()) > 1e-3
    with pytest.raises(InputError, match="No such feature"):
        ablate_features(gpt2, prompts, metric, sae, name, [64])
    with pytest.raises(ModelError, match="does not fit"):
        ablate_features(gpt2, prompts, metric, sae, "blocks.1.mlp.hook_post", [1])


def test_knock_outs_of_sets_and_of_all_but_a_set(gpt2: HookedModel) -> None:
    prompts, other = pair_of_tokens()
    metric = metrics.logit_difference(gpt2, 5, 9)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(LAYERS)]
    means = {name: value.mean(0) for name, value in gpt2.activations(other, names).items()}
    how: dict[str, Any] = {"how": "template_mean", "reference": other, "groups": ["one"] * PROMPTS}

    def plain(out: dict[int, dict[int, Any]]) -> Tensor:
        listed = [
            edits.patch(names[layer], means[names[layer]], head=head, positions=positions)
            for layer, heads in out.items()
            for head, positions in heads.items()
        ]
        with gpt2.edited(listed):
            return difference(gpt2(prompts))

    found = knock_out(gpt2, prompts, metric, ["L0.H1", "L2.H0", "2.3"], **how)
    assert torch.allclose(found.values, plain({0: {1: None}, 2: {0: None, 3: None}}), atol=1e-4)

    kept = knock_out(gpt2, prompts, metric, keep={"L0.H1": -1, "L2.H2": None, "L1.H0": [2, 3]}, **how)
    out: dict[int, dict[int, Any]] = {layer: dict.fromkeys(range(4)) for layer in range(LAYERS)}
    out[0][1], out[1][0] = slice(0, 5), (0, 1, 4, 5)
    del out[2][2]
    assert torch.allclose(kept.values, plain(out), atol=1e-4)

    both = knock_outs(gpt2, prompts, metric, [["L0.H1"], ["L0.H1", "L1.H2"], []], max_rows=2, **how)
    assert torch.allclose(both.values[1], plain({0: {1: None}, 1: {2: None}}), atol=1e-4)
    assert both.clean is not None
    assert torch.allclose(both.values[2], both.clean)
    mlps = knock_out(gpt2, prompts, metric, ["m1"], how="zero")
    with gpt2.edited(edits.zero("blocks.1.hook_mlp_out")):
        assert torch.allclose(mlps.values, difference(gpt2(prompts)), atol=1e-4)


def test_ablations_that_cannot_be(gpt2: HookedModel) -> None:
    prompts, other = pair_of_tokens()
    metric = metrics.logit_difference(gpt2, 5, 9)
    calls: list[tuple[str, Any]] = [
        ("needs a reference", lambda: ablate(gpt2, prompts, metric, how="counterfactual")),
        ("Groups go with", lambda: ablate(gpt2, prompts, metric, how="template_mean")),
        ("do not fit", lambda: ablate(gpt2, prompts, metric, how="template_mean", groups=["a"])),
        ("as many counterfactuals", lambda: ablate(gpt2, prompts, metric, how="counterfactual", reference=other[:2])),
        ("numbers of tokens", lambda: ablate(gpt2, prompts, metric, how="counterfactual", reference=other[:, 1:])),
        ("several prompts", lambda: ablate(gpt2, prompts[:1], metric, how="resample")),
        ("attention patterns", lambda: ablate(gpt2, prompts, metric, "pattern")),
        ("which nodes", lambda: knock_out(gpt2, prompts, metric)),
        ("which nodes", lambda: knock_out(gpt2, prompts, metric, ["L0.H0"], keep=["L0.H1"])),
        ("cannot be knocked out", lambda: knock_out(gpt2, prompts, metric, ["L0.H0.q"])),
        ("such position", lambda: knock_out(gpt2, prompts, metric, {"L0.H0": 9})),
    ]
    for message, call in calls:
        with pytest.raises(MicrotomeError, match=message):
            call()
