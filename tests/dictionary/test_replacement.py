"""The replacement model against the library's own modules with torch's hooks; sets of dictionaries against their members."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    DictionarySet,
    EvaluateConfig,
    Evaluation,
    LayeredDictionary,
    Origin,
    as_replacement,
    compare,
    evaluate,
    load_dictionary_or_set,
    load_dictionary_set,
    replacement_logits,
    save_dictionary,
)
from microtome.dictionary.activation import ReLU, TopK
from microtome.dictionary.splice import REPLACED
from microtome.dictionary.surface import SparseDictionary, decoder_rows
from microtome.model import HookedModel
from microtome.text import TokenDataset

from ..makers import random_cross_layer, topk_dictionary  # noqa: TID252 – shared by tests

LAYERS, D = 3, 32
INPUTS = tuple(f"blocks.{i}.hook_resid_mid" for i in range(LAYERS))
OUTPUTS = tuple(f"blocks.{i}.hook_mlp_out" for i in range(LAYERS))
SOME = EvaluateConfig(n_tokens=24 * 20, function_tokens=24 * 10, batch_tokens=100, whole_only=True)
Predict = Callable[[int, list[Tensor]], Tensor]
"""What stands in for an MLP: its number and the streams before it and all MLPs before it, to its output."""


def make_clt(*, skip: bool = False) -> CrossLayerTranscoder:
    clt = random_cross_layer("tiny-llama", INPUTS, OUTPUTS, d=D)
    if skip:
        clt.W_skip = nn.Parameter(torch.randn(LAYERS, D, D, generator=torch.Generator().manual_seed(1)) * 0.1)
    return clt.requires_grad_(False)


def make_transcoder(layer: int, *, skip: bool = False, d_sae: int = 40) -> Dictionary:
    origin = Origin(model_name="tiny-llama", inputs=(INPUTS[layer],), outputs=(OUTPUTS[layer],))
    made = Dictionary(D, d_sae, TopK(5), origin=origin, center=False, skip=skip)
    generator = torch.Generator().manual_seed(20 + layer)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return made.requires_grad_(False)


def make_set() -> DictionarySet:
    """The one in the middle has a skip path, and they are of different sizes."""
    return DictionarySet([make_transcoder(i, skip=i == 1, d_sae=40 + i) for i in range(LAYERS)])


def clt_prediction(clt: CrossLayerTranscoder) -> Predict:
    threshold = clt.activations[0].get_parameter("threshold").view(LAYERS, -1)

    def predict(layer: int, streams: list[Tensor]) -> Tensor:
        out = clt.b_dec[layer].expand_as(streams[0])
        for source in range(layer + 1):
            pre = streams[source] @ clt.encoder[source].T + clt.b_enc[source]
            codes = pre * (pre > threshold[source].clamp_min(0))
            out = out + codes @ clt.W_dec[source][:, layer - source]
        return out if clt.W_skip is None else out + streams[layer] @ clt.W_skip[layer]

    return predict


def set_prediction(members: Sequence[Dictionary]) -> Predict:
    def predict(layer: int, streams: list[Tensor]) -> Tensor:
        predicted: Tensor = members[layer](streams[layer])
        return predicted

    return predict


@torch.no_grad()
def plain_run(model: HookedModel, tokens: Tensor, where: Tensor, predict: Predict | None) -> Tensor:
    """Logits, with every MLP's output replaced where `where` holds by what is predicted from the streams of this run."""
    streams: list[Tensor] = []
    handles = []

    def output(layer: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_: nn.Module, __: object, out: Tensor) -> Tensor:
            if predict is None:
                return out
            new = out.clone()
            new[where] = predict(layer, streams)[where]
            return new

        return hook

    for layer, block in enumerate(model.hf.get_submodule("model.layers").children()):
        norm, mlp = block.get_submodule("post_attention_layernorm"), block.get_submodule("mlp")
        handles.append(norm.register_forward_pre_hook(lambda _, given: streams.append(given[0])))
        handles.append(mlp.register_forward_hook(output(layer)))
    try:
        logits: Tensor = model.hf(tokens).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


CASES: dict[str, tuple[Callable[[], LayeredDictionary], Callable[[], Predict]]] = {
    "clt": (make_clt, lambda: clt_prediction(make_clt())),
    "clt with a skip path": (lambda: make_clt(skip=True), lambda: clt_prediction(make_clt(skip=True))),
    "set": (make_set, lambda: set_prediction(make_set().dictionaries)),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluate_has_the_figures_of_the_replacement_model(
    case: str, tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    make, prediction = CASES[case]
    found = evaluate(tiny_llama, make(), tiny_dataset, SOME)
    tokens = torch.from_numpy(tiny_dataset.batch(0, 10))
    text = ~torch.isin(tokens, torch.tensor([0, 1]))
    clean, replaced = (
        plain_run(tiny_llama, tokens, text, predict).double().log_softmax(-1)[:, :-1][text[:, 1:]]
        for predict in (None, prediction())
    )
    target = tokens[:, 1:][text[:, 1:]][:, None]
    ce_clean, ce = (float(-each.gather(1, target).mean()) for each in (clean, replaced))
    assert found.ce_clean == pytest.approx(ce_clean, rel=1e-5)
    assert found.ce_replaced == pytest.approx(ce, rel=1e-5)
    assert found.delta_ce_replaced == pytest.approx(ce - ce_clean, abs=2e-5)
    assert found.kl_replaced == pytest.approx(float((clean.exp() * (clean - replaced)).sum(-1).mean()), rel=1e-3)
    same = (clean.argmax(-1) == replaced.argmax(-1)).double().mean()
    assert found.top1_replaced == pytest.approx(float(same))
    assert 0 < float(same) < 1
    assert found.ce_spliced is not None
    assert abs(found.ce_spliced - ce) > 0.01  # there the later layers do not see what the earlier ones got wrong
    for name in REPLACED:
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high
    table = compare(tiny_llama, [make()], tiny_dataset, SOME, names=["it"]).table()
    assert table[0]["top1_replaced"] == found.top1_replaced


def test_special_tokens_keep_what_the_model_gives(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    tokens = torch.from_numpy(tiny_dataset.batch(0, 4))
    nowhere = torch.zeros(tokens.shape, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(replacement_logits(tiny_llama, tokens, make_clt(), nowhere), tiny_llama(tokens))


def test_of_one_layer_both_runs_are_the_same(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    found = evaluate(tiny_llama, DictionarySet([make_transcoder(1)]), tiny_dataset, SOME)
    alone = evaluate(tiny_llama, make_transcoder(1), tiny_dataset, SOME)
    assert (found.ce_replaced, found.kl_replaced) == pytest.approx((alone.ce_spliced, alone.kl_spliced), rel=1e-5)
    assert found.top1_replaced == found.top1_spliced == alone.top1_spliced
    assert (alone.ce_replaced, alone.top1_replaced) == (None, None)
    assert "ce_replaced" not in alone.intervals


def test_autoencoders_at_several_points_read_what_those_before_them_wrote(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    points = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    saes = [topk_dictionary(D, 48, 6, origin=Origin.at("tiny-llama", point), seed=i) for i, point in enumerate(points)]
    tokens = torch.from_numpy(tiny_dataset.batch(0, 4))
    everywhere = torch.ones(tokens.shape, dtype=torch.bool)
    with torch.no_grad():
        got = replacement_logits(tiny_llama, tokens, DictionarySet(saes), everywhere)
        hooks = [(point, lambda act, _, sae=sae: sae(act)) for point, sae in zip(points, saes, strict=True)]
        torch.testing.assert_close(got, tiny_llama.run_with_hooks(tokens, hooks))


@pytest.mark.parametrize("turned", [1, -1])
def test_what_one_member_writes_is_what_another_reads_at_that_point(
    turned: int, tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    mlp = make_transcoder(0)
    sae = topk_dictionary(D, 48, 6, origin=Origin.at("tiny-llama", INPUTS[1]))
    origin = Origin(model_name="tiny-llama", inputs=(OUTPUTS[0],), outputs=(OUTPUTS[1],))
    onward = topk_dictionary(D, 48, 6, origin=origin, seed=3)
    made = DictionarySet([mlp, sae, onward][::turned])
    tokens = torch.from_numpy(tiny_dataset.batch(0, 4))
    seen: dict[str, Tensor] = {}

    def first(act: Tensor, _: object) -> Tensor:
        seen["onward"] = onward(mlp(seen["mlp"]))
        return mlp(seen["mlp"])  # type: ignore[no-any-return]

    hooks = [
        (INPUTS[0], lambda act, _: seen.update(mlp=act)),
        (OUTPUTS[0], first),
        (INPUTS[1], lambda act, _: sae(act)),
        (OUTPUTS[1], lambda act, _: seen["onward"]),
    ]
    with torch.no_grad():
        got = replacement_logits(tiny_llama, tokens, made, torch.ones(tokens.shape, dtype=torch.bool))
        torch.testing.assert_close(got, tiny_llama.run_with_hooks(tokens, hooks))


def test_what_cannot_stand_in_a_running_model(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    origin = Origin(model_name="tiny-llama", inputs=INPUTS, outputs=OUTPUTS)
    backwards = Origin(model_name="tiny-llama", inputs=INPUTS[::-1], outputs=OUTPUTS[::-1])
    behind = Origin(model_name="tiny-llama", inputs=(OUTPUTS[1],), outputs=(OUTPUTS[0],))
    one_choice = CrossLayerTranscoder(D, 10, TopK(4), origin=origin)
    cannot: list[SparseDictionary] = [
        make_transcoder(0),
        Dictionary(2 * D, 8, ReLU(), origin=Origin(model_name="tiny-llama", inputs=INPUTS[:2])),
        one_choice,
        CrossLayerTranscoder(D, 10, ReLU(), origin=backwards),
        DictionarySet([Dictionary(D, 8, ReLU(), origin=behind, center=False)]),
    ]
    assert [as_replacement(tiny_llama, each) for each in cannot] == [None] * 5
    can: list[LayeredDictionary] = [
        make_clt(),
        CrossLayerTranscoder(D, 10, ReLU(), origin=origin),
        make_set(),
        DictionarySet(make_set().dictionaries[::-1]),
    ]
    assert [as_replacement(tiny_llama, each) for each in can] == can
    with pytest.raises(ConfigError, match="one choice of 4 latents among those of 3 layers"):
        one_choice.encode_layer(0, torch.zeros(2, D))
    found = evaluate(tiny_llama, one_choice.requires_grad_(False), tiny_dataset, SOME)
    assert found.ce_spliced is not None
    assert found.ce_replaced is None


# ---- sets -----------------------------------------------------------------------------------------------------------


def test_a_set_is_its_members_side_by_side() -> None:
    made = make_set()
    members = made.dictionaries
    x = torch.randn(7, LAYERS * D, generator=torch.Generator().manual_seed(0))
    rows = x.split(D, 1)
    codes = made.encode(x)
    expected = torch.cat([m.encode(row).to_dense() for m, row in zip(members, rows, strict=True)], 1)
    assert (made.d_in, made.d_out, made.d_sae, made.k) == (96, 96, 123, 15)
    torch.testing.assert_close(codes.to_dense(), expected)
    out = torch.cat([m(row) for m, row in zip(members, rows, strict=True)], 1)
    torch.testing.assert_close(made.decode(codes, x), out)
    torch.testing.assert_close(made(x), out)
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    mixed = type(codes)(codes.indices[:, shuffled], codes.values[:, shuffled], 123)
    torch.testing.assert_close(made.decode(mixed, x), out)
    with pytest.raises(InputError, match="another dictionary"):
        made.decode(members[0].encode(rows[0]), x)
    with pytest.raises(InputError, match="skip path"):
        made.decode(codes)
    table = decoder_rows(made)
    torch.testing.assert_close(table[45, D : 2 * D], members[1].W_dec[5])
    assert float(table[45].abs().sum()) == pytest.approx(float(members[1].W_dec[5].abs().sum()), rel=1e-5)


def test_a_folder_of_dictionaries_is_opened_as_a_set(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    members = make_set().dictionaries
    for i, member in enumerate(members):
        (tmp_path / f"set/{i}").mkdir(parents=True)
        save_dictionary(member, tmp_path / f"set/{i}")
    opened = load_dictionary_or_set(tmp_path / "set")
    assert isinstance(opened, DictionarySet)
    assert opened.fingerprint == make_set().fingerprint == load_dictionary_set(tmp_path / "set").fingerprint
    assert opened.fingerprint != DictionarySet(members[::-1]).fingerprint
    assert (opened.path, opened.architecture) == (tmp_path / "set", "dictionary_set")
    found, expected = (evaluate(tiny_llama, each, tiny_dataset, SOME) for each in (opened, make_set()))
    assert found == expected
    assert [layer.n_latents for layer in found.layers] == [40, 41, 42]
    _each_alone(found, tiny_llama, tiny_dataset)
    alone = load_dictionary_or_set(tmp_path / "set/1")
    assert isinstance(alone, Dictionary)
    assert alone.fingerprint == members[1].fingerprint
    with pytest.raises(ArtifactError, match="no dictionaries"):
        load_dictionary_set(tmp_path / "set/1")
    with pytest.raises(ArtifactError, match="no dictionary"):
        load_dictionary_or_set(tmp_path / "nothing")
    (tmp_path / "set/3").mkdir()
    save_dictionary(make_clt(), tmp_path / "set/3")
    with pytest.raises(ConfigError, match="a cross-layer transcoder in 3"):
        load_dictionary_or_set(tmp_path / "set")


def _each_alone(found: Evaluation, model: HookedModel, dataset: TokenDataset) -> None:
    for i, member in enumerate(make_set().dictionaries):
        alone = evaluate(model, member, dataset, SOME)
        assert found.points[i].fvu == pytest.approx(alone.fvu, rel=1e-5)
        assert found.layers[i].l0 == pytest.approx(alone.l0)
        assert found.layers[i].n_dead == alone.n_dead


def test_what_makes_no_set() -> None:
    one = make_transcoder(0)
    with pytest.raises(ConfigError, match="at least one"):
        DictionarySet([])
    with pytest.raises(ConfigError, match=r"different points.*blocks.0.hook_resid_mid.*compare"):
        DictionarySet([one, make_transcoder(0)])
    crosscoder = Dictionary(2 * D, 8, ReLU(), origin=Origin(model_name="tiny-llama", inputs=INPUTS[:2]))
    with pytest.raises(ConfigError, match="one point each"):
        DictionarySet([one, crosscoder])
    other = Dictionary(D, 8, ReLU(), origin=Origin.at("gpt2", "blocks.1.hook_resid_pre"))
    with pytest.raises(ConfigError, match="gpt2, tiny-llama"):
        DictionarySet([one, other])
    bare = Origin(model_name="tiny-llama", inputs=(INPUTS[1],), prepend_bos=False)
    with pytest.raises(ConfigError, match="all with a BOS or all without. Got: prepend_bos True, False"):
        DictionarySet([one, Dictionary(D, 8, ReLU(), origin=bare)])


def test_a_set_says_of_its_text_what_is_true_of_all_members() -> None:
    origins = [Origin.at("tiny-llama", INPUTS[i], context=16 * (i + 1), dataset="texts") for i in (0, 1)]
    found = DictionarySet([Dictionary(D, 8, ReLU(), origin=origin) for origin in origins]).origin
    assert (found.context, found.dataset, found.prepend_bos) == (None, "texts", True)
    alone = DictionarySet([Dictionary(D, 8, ReLU(), origin=origins[1])]).origin
    assert (alone.context, alone.dataset) == (32, "texts")


def test_what_many_points_alone_will_cost_is_said(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of runs is that of the model's own forward passes, after one to check the widths and one to read the inputs."""
    names = [f"blocks.{i}.hook_resid_{part}" for i in range(LAYERS) for part in ("pre", "mid", "post")]
    members = [topk_dictionary(D, 24, 3, origin=Origin.at("tiny-llama", name)) for name in names]
    passes: list[int] = []
    counting = tiny_llama.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = EvaluateConfig(n_tokens=96, function_tokens=96, batch_tokens=96)
    try:
        for n_points, whole_only, said in (
            (9, False, "32 times.*9 points.*--whole-only.*5 times"),
            (9, True, ""),
            (8, False, ""),
        ):
            passes.clear()
            evaluate(tiny_llama, DictionarySet(members[:n_points]), tiny_dataset, replace(batch, whole_only=whole_only))
            shown = capsys.readouterr().err
            assert bool(shown) == bool(said)
            assert re.search(said, shown)
            assert len(passes) == 2 + (5 if whole_only else 5 + 3 * n_points)
    finally:
        counting.remove()
