"""Every figure of a cross-layer transcoder against the library's own modules with torch's hooks, and plain loops over layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.errors import ArtifactError
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    EvaluateConfig,
    Evaluation,
    compare,
    evaluate,
    load_any_dictionary,
    load_dictionary,
    save_dictionary,
)
from microtome.model import HookedModel
from microtome.text import TokenDataset

from ..makers import random_cross_layer, random_dictionary  # noqa: TID252 – shared by tests

LAYERS, D = 3, 32
INPUTS = tuple(f"blocks.{i}.hook_resid_mid" for i in range(LAYERS))
OUTPUTS = tuple(f"blocks.{i}.hook_mlp_out" for i in range(LAYERS))
SOME = EvaluateConfig(n_tokens=24 * 20, function_tokens=24 * 10, batch_tokens=100)
ALL = tuple(range(LAYERS))
SPLICES = [ALL, *((layer,) for layer in ALL)]


def make() -> CrossLayerTranscoder:
    return random_cross_layer("tiny-llama", INPUTS, OUTPUTS, d=D)


@pytest.fixture(scope="module")
def found(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> Evaluation:
    return evaluate(tiny_llama, make(), tiny_dataset, SOME)


def plain_run(
    model: HookedModel, tokens: Tensor, replaced: Mapping[int, Tensor], where: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, the stream before each MLP and what each MLP gave, with some MLPs' outputs replaced."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    handles = []

    def output(layer: int) -> object:
        def hook(_: nn.Module, __: object, out: Tensor) -> Tensor:
            writes.append(out)
            if layer not in replaced:
                return out
            new = out.clone()
            new[where] = replaced[layer].expand(*where.shape, -1)[where]
            return new

        return hook

    for layer, block in enumerate(model.hf.get_submodule("model.layers").children()):
        norm, mlp = block.get_submodule("post_attention_layernorm"), block.get_submodule("mlp")
        handles.append(norm.register_forward_pre_hook(lambda _, given: reads.append(given[0])))
        handles.append(mlp.register_forward_hook(output(layer)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            logits = model.hf(tokens).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, reads, writes


def plain_codes(clt: CrossLayerTranscoder, layer: int, stream: Tensor) -> Tensor:
    pre = stream @ clt.encoder[layer].T + clt.b_enc[layer]
    threshold = clt.activations[0].get_parameter("threshold").view(LAYERS, -1)[layer]
    return pre * (pre > threshold.clamp_min(0))


def plain_output(clt: CrossLayerTranscoder, layer: int, codes: list[Tensor]) -> Tensor:
    out = clt.b_dec[layer].expand(*codes[0].shape[:-1], -1)
    for source in range(layer + 1):
        out = out + codes[source] @ clt.W_dec[source][:, layer - source]
    return out


def text_of(dataset: TokenDataset, n: int) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(dataset.batch(0, n))
    return tokens, ~torch.isin(tokens, torch.tensor([0, 1]))


def test_latents_and_outputs_by_layer_and_in_all(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, found: Evaluation
) -> None:
    clt = make()
    tokens, text = text_of(tiny_dataset, 20)
    _, reads, writes = plain_run(tiny_llama, tokens, {}, text)
    codes = [plain_codes(clt, layer, reads[layer][text]) for layer in ALL]
    for layer, of_layer in enumerate(found.layers):
        fires = codes[layer] > 0
        assert (of_layer.name, of_layer.n_latents) == (INPUTS[layer], 40)
        assert of_layer.l0 == pytest.approx(float(fires.sum(1).double().mean()), rel=1e-6)
        assert of_layer.n_dead == int((~fires.any(0)).sum()) >= layer + 1
    assert found.l0 == pytest.approx(sum(of_layer.l0 for of_layer in found.layers))
    assert found.n_dead == sum(of_layer.n_dead for of_layer in found.layers)
    assert found.dead_fraction == found.n_dead / 120
    y = [writes[layer][text].double() for layer in ALL]
    predicted = [plain_output(clt, layer, codes).double() for layer in ALL]
    variances = [float((each - each.mean(0)).square().sum()) for each in y]
    for layer, point in enumerate(found.points):
        error = float((y[layer] - predicted[layer]).square().sum())
        assert point.name == OUTPUTS[layer]
        assert point.fvu == pytest.approx(error / variances[layer], rel=1e-4)
        assert point.variance == pytest.approx(variances[layer] / sum(variances), rel=1e-5)
        cosine = functional.cosine_similarity(y[layer], predicted[layer]).mean()
        assert point.cosine == pytest.approx(float(cosine), abs=1e-5)
        ratio = predicted[layer].norm(dim=1) / y[layer].norm(dim=1)
        assert point.norm_ratio == pytest.approx(float(ratio.mean()), rel=1e-4)
        low, high = point.intervals["fvu"]
        assert low < point.fvu < high
    whole, out = torch.cat(y, 1), torch.cat(predicted, 1)
    assert found.fvu == pytest.approx(float((whole - out).square().sum()) / sum(variances), rel=1e-4)
    assert found.cosine == pytest.approx(float(functional.cosine_similarity(whole, out).mean()), abs=1e-5)
    assert found.norm_ratio == pytest.approx(float((out.norm(dim=1) / whole.norm(dim=1)).mean()), rel=1e-4)


@pytest.mark.parametrize("together", SPLICES, ids=["all", "first", "middle", "last"])
def test_what_the_model_loses_on_all_layers_and_on_one(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, found: Evaluation, together: tuple[int, ...]
) -> None:
    clt = make()
    tokens, text = text_of(tiny_dataset, 20)
    means = [each[text].mean(0) for each in plain_run(tiny_llama, tokens, {}, text)[2]]
    tokens, text = text_of(tiny_dataset, 10)
    logits, reads, _ = plain_run(tiny_llama, tokens, {}, text)
    codes = [plain_codes(clt, layer, reads[layer]) for layer in ALL]
    replaced: dict[str, dict[int, Tensor]] = {
        "clean": {},
        "spliced": {layer: plain_output(clt, layer, codes) for layer in together},
        "zero": {layer: torch.zeros(D) for layer in together},
        "mean": {layer: means[layer] for layer in together},
    }
    scored = text[:, 1:]
    target = tokens[:, 1:][scored][:, None]
    log_p = {
        name: plain_run(tiny_llama, tokens, what, text)[0].double().log_softmax(-1)[:, :-1][scored]
        for name, what in replaced.items()
    }
    torch.testing.assert_close(log_p["clean"], logits.double().log_softmax(-1)[:, :-1][scored])
    ce = {name: float(-each.gather(1, target).mean()) for name, each in log_p.items()}
    clean = log_p["clean"]
    kl = {name: float((clean.exp() * (clean - each)).sum(-1).mean()) for name, each in log_p.items()}
    loss = vars(found) if together == ALL else found.points[together[0]].loss
    assert found.n_function_tokens == len(target)
    for name in replaced:
        assert loss[f"ce_{name}"] == pytest.approx(ce[name], rel=1e-5)
        if name != "clean":
            assert loss[f"kl_{name}"] == pytest.approx(kl[name], rel=1e-3)
    assert loss["delta_ce"] == pytest.approx(ce["spliced"] - ce["clean"], abs=2e-5)
    for end, ablation in (("", "zero"), ("_mean", "mean")):
        gap = ce[ablation] - ce["clean"]
        assert loss[f"ce_recovered{end}"] * gap == pytest.approx(ce[ablation] - ce["spliced"], abs=5e-5)
        assert loss[f"kl_recovered{end}"] == pytest.approx(1 - kl["spliced"] / kl[ablation], rel=2e-3)
    intervals = found.intervals if together == ALL else found.points[together[0]].intervals
    for name in ("ce_spliced", "kl_spliced", "ce_mean"):
        low, high = intervals[name]
        assert low < loss[name] < high


def test_whole_only_leaves_out_the_single_layers_alone(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, found: Evaluation
) -> None:
    short = evaluate(tiny_llama, make(), tiny_dataset, replace(SOME, whole_only=True))
    assert all(point.loss == {} for point in short.points)
    assert all(set(point.loss) >= {"ce_spliced", "kl_recovered_mean"} for point in found.points)
    assert replace(short, points=found.points) == found
    none = evaluate(tiny_llama, make(), tiny_dataset, replace(SOME, function_tokens=0))
    assert none.ce_spliced is None
    assert all(point.loss == {} for point in none.points)


def test_beside_a_dictionary_it_has_the_figures_that_it_has_alone(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, found: Evaluation, tmp_path: Path
) -> None:
    sae = random_dictionary(tmp_path, model="tiny-llama", d_in=D)
    both = compare(tiny_llama, [sae, make()], tiny_dataset, SOME, names=["sae", "clt"], similarities=True)
    assert both["clt"].evaluation == found
    assert both["sae"].evaluation == evaluate(tiny_llama, sae, tiny_dataset, SOME)
    assert both["sae"].evaluation.layers == ()
    assert both.similarities == {}  # their outputs have no space in common
    assert [row["architecture"] for row in both.table()] == ["topk", "cross_layer_transcoder"]


def test_one_function_opens_both_classes(tmp_path: Path) -> None:
    (tmp_path / "clt").mkdir()
    clt, sae = make(), random_dictionary(tmp_path / "sae", model="tiny-llama", d_in=D)
    save_dictionary(clt, tmp_path / "clt")
    opened = load_any_dictionary(tmp_path / "clt", model_name="other")
    assert isinstance(opened, CrossLayerTranscoder)
    assert (opened.fingerprint, opened.origin.model_name) == (clt.fingerprint, "other")
    again = load_any_dictionary(tmp_path / "sae", dtype="bf16")
    assert isinstance(again, Dictionary)
    assert again.b_dec.dtype == torch.bfloat16
    torch.testing.assert_close(again.W_dec.float(), sae.W_dec, rtol=1e-2, atol=1e-2)
    with pytest.raises(ArtifactError, match="load_cross_layer_transcoder"):
        load_dictionary(tmp_path / "clt")
