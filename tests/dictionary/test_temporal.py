"""Temporal dictionaries: against a loop over tokens and heads, and wherever else dictionaries are used."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.dictionary import (
    ContextDictionary,
    Dictionary,
    Entities,
    EvaluateConfig,
    LabelledTexts,
    Origin,
    TemporalDictionary,
    compare,
    encode_texts,
    evaluate,
    geometry,
    load_any_dictionary,
    load_dictionary,
    load_dictionary_or_set,
    save_dictionary,
)
from microtome.dictionary.absorption import encode_words
from microtome.dictionary.activation import AbsTopK, JumpReLU, TopK
from microtome.dictionary.asking import ask, states_of
from microtome.dictionary.fine_tuning import checked
from microtome.dictionary.temporal import CodeAttention
from microtome.model import HookedModel
from microtome.text import TokenDataset

from ..makers import random_temporal  # noqa: TID252 – shared by tests
from .test_absorption import made_task
from .test_disentanglement import answered  # noqa: F401 – a fixture
from .test_points import text_of

HOOK = "blocks.1.hook_resid_pre"
D = 32
SMALL = EvaluateConfig(n_tokens=24 * 20, function_tokens=24 * 10, batch_tokens=100)


def of_tiny(**more: object) -> TemporalDictionary:
    return random_temporal("tiny-llama", HOOK, d_in=D, **more)  # type: ignore[arg-type]


def sequences_of(n: int = 3, pos: int = 7) -> Tensor:
    return torch.randn(n, pos, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def plain_sequence(made: TemporalDictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and output of one sequence [pos, d], a token and a head at a time, in float64."""
    novel = made.novel.double()
    inside = novel.inside(x.double())
    rest = inside
    for layer in made.layers:
        layer.double()
        z = (rest @ novel.W_enc).relu()
        predicted = []
        for t in range(len(z)):
            seen = torch.stack([torch.zeros_like(z[0]), *z[:t]])  # zeros, then all tokens before
            q, keys, values = layer.q_target(z[t]), layer.k_ctx(seen), layer.v_ctx(seen)
            each, of_values = layer.d_attn // layer.n_heads, made.d_sae // layer.n_heads
            heads = []
            for h in range(layer.n_heads):
                mine, own = slice(h * each, (h + 1) * each), slice(h * of_values, (h + 1) * of_values)
                weight = torch.softmax(keys[:, mine] @ q[mine] / each**0.5, 0)
                heads.append(weight @ values[:, own])
            p = layer.c_proj(torch.cat(heads)).relu() @ made.W_dec
            predicted.append(p * (p @ rest[t]) / (p.norm() + 1e-6 / made.scale) ** 2)
        rest = rest - torch.stack(predicted)
    pre = (rest @ novel.W_enc).relu()
    if made.k is not None:
        pre = pre * (pre >= pre.topk(made.k, 1).values[:, -1:])
    return pre, novel.outside(pre @ made.W_dec + (inside - rest) + made.b_dec, x.double())


# ---- what it computes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"layers": 1, "k": None}, {"scale": 0.25, "layers": 3}, {"input_norm": "layer_norm"}],
    ids=["topk", "relu", "scaled", "normed"],
)
def test_codes_and_output_are_those_of_a_loop_over_tokens(more: dict[str, object]) -> None:
    made, x = of_tiny(**more), sequences_of()
    rows = made.in_context(x)
    torch.testing.assert_close(rows[..., :D], x)
    codes = made.encode(rows.flatten(0, 1)).to_dense().view(*x.shape[:2], -1)
    found = made(x)
    assert (codes > 0).sum(-1).float().mean() > 2
    for i, sequence in enumerate(x):
        plain, out = plain_sequence(of_tiny(**more), sequence)
        torch.testing.assert_close(codes[i].double(), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[i].double(), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made(sequence), found[i], rtol=1e-5, atol=1e-6)


def test_codes_depend_on_tokens_before_and_on_none_behind() -> None:
    made, x = of_tiny(), sequences_of(1)
    changed = x.clone()
    changed[0, 3] += 1
    a, b = (made.encode(made.in_context(each)[0]).to_dense() for each in (x, changed))
    torch.testing.assert_close(a[:3], b[:3])
    assert (a[4:] != b[4:]).any(1).all()
    # The first token has only zeros before it, whatever comes behind.
    torch.testing.assert_close(made.encode(made.in_context(x[:, :1])[0]).to_dense(), a[:1])


def test_what_it_is() -> None:
    made = of_tiny()
    assert isinstance(made, ContextDictionary)
    assert not isinstance(Dictionary(4, 8, TopK(2), origin=made.origin), ContextDictionary)
    assert (made.architecture, made.k, made.d_in, made.d_sae, made.hook_name) == ("temporal", 4, D, 48, HOOK)
    other = of_tiny()
    assert other.fingerprint == made.fingerprint
    with torch.no_grad():
        other.layers[1].v_ctx.bias[0] += 1
    assert other.fingerprint != made.fingerprint
    assert geometry(made).n_latents == 48


def test_rows_without_their_context_are_refused() -> None:
    made, x = of_tiny(), sequences_of()
    with pytest.raises(InputError, match=r"depend on the tokens before.*width 32.*Expected: 64.*in_context"):
        made.encode(x[0])
    codes = made.encode(made.in_context(x)[0])
    with pytest.raises(InputError, match="depend on the tokens before"):
        made.decode(codes, x[0])
    with pytest.raises(InputError, match="decodes only beside its input"):
        made.decode(codes)


def test_what_cannot_be_is_refused() -> None:
    origin = Origin.at("m", HOOK)
    layer = CodeAttention(16, 2, 4)
    for novel, layers, more, message in (
        (Dictionary(8, 16, AbsTopK(2), origin=origin), [layer], {}, "ReLU or a TopK.*abstopk"),
        (Dictionary(8, 16, JumpReLU(torch.ones(16)), origin=origin), [layer], {}, "jumprelu"),
        (Dictionary(8, 16, TopK(2), origin=origin), [], {}, "layers none"),
        (Dictionary(8, 32, TopK(2), origin=origin), [layer], {}, "d_sae 32"),
        (Dictionary(8, 16, TopK(2), origin=origin), [layer, CodeAttention(16, 4, 4)], {}, "are alike"),
        (Dictionary(8, 16, TopK(2), origin=origin), [layer], {"scale": 0.0}, "scale is positive"),
        (Dictionary(8, 16, TopK(2), origin=origin, input_norm="layer_norm"), [layer], {"scale": 2.0}, "scale 2"),
        (
            Dictionary(8, 16, TopK(2), origin=Origin(model_name="m", inputs=("a",), outputs=("b",)), center=False),
            [layer],
            {},
            "autoencoder of one hook point.*a to b",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            TemporalDictionary(novel, layers, **more)
    with pytest.raises(ConfigError, match="equally large.*3 heads, d_sae 16"):
        CodeAttention(16, 3, 6)


# ---- where dictionaries are used ----------------------------------------------------------------------------------------


def test_evaluation_is_of_whole_sequences(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    made = of_tiny(scale=0.5)
    found = evaluate(tiny_llama, made, tiny_dataset, SMALL)
    tokens, text = text_of(tiny_dataset, 20)
    x = tiny_llama.activations(tokens, HOOK)[HOOK]
    plain = [plain_sequence(of_tiny(scale=0.5), each) for each in x]
    codes, out = (torch.stack(parts) for parts in zip(*plain, strict=True))
    y, out_text = x[text].double(), out[text]
    fvu = float((y - out_text).square().sum() / (y - y.mean(0)).square().sum())
    assert found.fvu == pytest.approx(fvu, rel=1e-4)
    assert found.l0 == pytest.approx(float((codes[text] > 0).sum(1).double().mean()), rel=1e-5)
    assert found.n_dead == int((codes[text] == 0).all(0).sum())
    tokens, text, out = tokens[:10], text[:10], out[:10]

    def hook(_: object, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        new = given[0].clone()
        new[text] = out.float()[text]
        return new, *given[1:]

    block = tiny_llama.hf.get_submodule("model.layers.1")
    handle = block.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            logits = tiny_llama.hf(tokens).logits
    finally:
        handle.remove()
    scored = text[:, 1:]
    ce = torch.nn.functional.cross_entropy(logits[:, :-1][scored].double(), tokens[:, 1:][scored])
    assert found.ce_spliced == pytest.approx(float(ce), rel=1e-5)


def test_comparison_with_another(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    save_dictionary(of_tiny(), tmp_path / "temporal")
    save_dictionary(of_tiny().novel, tmp_path / "plain")
    opened = [load_dictionary_or_set(tmp_path / name) for name in ("temporal", "plain")]
    rows = compare(tiny_llama, opened, tiny_dataset, SMALL).rows
    assert [row.architecture for row in rows] == ["temporal", "topk"]
    assert rows[0].evaluation.fvu != rows[1].evaluation.fvu


def test_labelled_texts_words_and_entities(tiny_llama: HookedModel, answered: Entities) -> None:  # noqa: F811
    """Their vectors are those of whole texts, also where prompts begin alike and the model reads that once."""
    made = of_tiny()
    texts = ("the cat sat on the mat", "a dog ran", "the dog sat", "a cat ran home and slept")
    labelled = LabelledTexts(name="t", texts=texts, attributes={"a": (True, False, True, False)}, readout="last")
    found = encode_texts(tiny_llama, made, labelled)
    for i, text in enumerate(texts):
        x = tiny_llama.activations(tiny_llama.to_tokens(text), HOOK)[HOOK]
        torch.testing.assert_close(found.x[i], x[0, -1], rtol=1e-4, atol=1e-5)
        codes = made.encode(made.in_context(x)[0, -1:]).to_dense()[0]
        torch.testing.assert_close(found.codes[i], codes, rtol=1e-4, atol=1e-5)
    task = made_task(3)
    words = encode_words(tiny_llama, made, task, rows=40)
    x = tiny_llama.activations(task.prompts, HOOK)[HOOK]
    torch.testing.assert_close(words.x, x[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(words.codes, made.encode(made.in_context(x)[:, -1]).to_dense(), rtol=1e-4, atol=1e-5)
    asked = ask(tiny_llama, answered, next(iter(answered.prompts)))
    states = states_of(made, asked, 3)
    for i, place in enumerate(asked.place.tolist()):
        x = tiny_llama.activations(asked.prompts.tokens[i : i + 1, : place + 1], HOOK)[HOOK]
        codes = made.encode(made.in_context(x)[0, -1:]).to_dense()[0]
        torch.testing.assert_close(states.codes[i], codes, rtol=1e-4, atol=1e-5)


def test_what_takes_each_activation_by_itself_refuses_it(tmp_path: Path) -> None:
    made = of_tiny()
    save_dictionary(made, tmp_path / "set/one")
    with pytest.raises(ArtifactError, match="is a temporal dictionary.*load_any_dictionary"):
        load_dictionary(tmp_path / "set/one")
    with pytest.raises(ConfigError, match="no set.*a temporal dictionary in one"):
        load_dictionary_or_set(tmp_path / "set")
    with pytest.raises(ConfigError, match="fine-tune has codes that depend on the tokens before"):
        checked(load_any_dictionary(tmp_path / "set/one"))
    with pytest.raises(ConfigError, match="attention reads its codes"):
        save_dictionary(made, tmp_path / "folded", fold_decoder_norms=True)


def test_it_moves_to_other_dtypes() -> None:
    made, x = of_tiny(), sequences_of()
    half = of_tiny().to(torch.bfloat16)
    rows = half.in_context(x)
    assert rows.dtype == torch.bfloat16
    assert half(x).dtype == torch.float32
    assert (half(x) - made(x)).norm() < 0.2 * made(x).norm()
