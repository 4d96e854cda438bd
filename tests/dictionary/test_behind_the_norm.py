"""Published dictionaries that read what the MLP reads (`mlp.hook_in`), on tiny models of their families, against the library's
own modules with torch's hooks: codes, figures with one layer replaced, and with all of them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from microtome.activations import HarvestConfig, harvest
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    DictionarySet,
    EvaluateConfig,
    TopKConfig,
    TrainConfig,
    evaluate,
    load_dictionary,
    load_dictionary_or_set,
    train,
)
from microtome.features import IndexConfig, build_index
from microtome.model import HookedModel
from microtome.model.families import family_of
from microtome.text import TokenDataset

FIXTURES = Path(__file__).parent / "fixtures"
D, LAYERS = 8, 4
SOME = EvaluateConfig(n_tokens=24 * 12, function_tokens=24 * 6, batch_tokens=100, whole_only=True)
SIZES = {
    "vocab_size": 320,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A fixture, the family whose model it is put on, and in a block of this the MLP and what adds its output to the stream."""

    name: str
    family: str
    adds: str = "mlp"


GEMMA = "post_feedforward_layernorm"
CASES = {
    "gemma scope 2": Case("gemma-scope-2-270m-pt/transcoder/layer_3_width_16k_l0_small", "gemma3_text", GEMMA),
    "gemma scope 2, affine": Case(
        "gemma-scope-2-270m-pt/transcoder_all/layer_3_width_16k_l0_small_affine", "gemma3_text", GEMMA
    ),
    "gemma scope 2, clt": Case("gemma-scope-2-270m-pt/clt/width_16k_l0_small", "gemma3_text", GEMMA),
    "circuit-tracer": Case("circuit_tracer/jump_relu_skip", "qwen3"),
    "sparsify": Case("sparsify/layers.3.mlp", "llama"),
    "clt": Case("clt/jump_relu", "gemma2", GEMMA),
}
EVERY = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def make(case: Case, tokenizer: PreTrainedTokenizerFast) -> HookedModel:
    """Random weights of four layers, the norms' away from one; called as the fixture's model is."""
    config = AutoConfig.for_model(case.family, **SIZES)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(parameter + torch.randn_like(parameter) * (0.4 if parameter.ndim == 1 else 0.3))
    spec = family_of(config)
    assert spec is not None
    name = "google/gemma-3-270m" if case.family == "gemma3_text" else "tiny"
    return HookedModel(hf, tokenizer, name=name, spec=spec)


def opened(case: Case, tmp_path: Path) -> Dictionary | CrossLayerTranscoder | DictionarySet:
    """The fixture; circuit-tracer's with the points of its releases for Qwen 3."""
    folder = FIXTURES / case.name
    if case.name.startswith(("circuit_tracer", "clt")):
        shutil.copytree(folder, tmp_path / "copy")
        folder = tmp_path / "copy"
        for file in folder.glob("*expected*"):
            file.unlink()
        output = "mlp.hook_out" if case.family == "qwen3" else "hook_mlp_out"
        said = f"model_name: tiny\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: {output}\n"
        (folder / "config.yaml").write_text(said)
    made = load_dictionary_or_set(folder)
    assert isinstance(made, Dictionary | CrossLayerTranscoder | DictionarySet)
    return made


Predict = Callable[[int, dict[int, Tensor]], Tensor]


@contextmanager
def replaced(
    model: HookedModel, case: Case, layers: dict[int, int], where: Tensor, predict: Predict | None
) -> Iterator[dict[int, Tensor]]:
    """Within the block, what the blocks `layers` (block: number) add is what is predicted from the inputs of the MLPs of this
    same run, where `where` holds. Gives these inputs."""
    inputs: dict[int, Tensor] = {}
    handles = []

    def reading(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[number] = args[0].clone()

        return hook

    def writing(number: int) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, __: object, out: Tensor) -> Tensor | None:
            if predict is None:
                return None
            return torch.where(where[..., None], predict(number, inputs), out)

        return hook

    for layer, number in layers.items():
        block = model.hf.get_submodule(f"model.layers.{layer}")
        handles.append(block.get_submodule("mlp").register_forward_pre_hook(reading(number)))
        handles.append(block.get_submodule(case.adds).register_forward_hook(writing(number)))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def prediction(made: Dictionary | CrossLayerTranscoder | DictionarySet) -> Predict:
    """From what MLPs read to what they add, by the weights alone."""
    if isinstance(made, CrossLayerTranscoder):

        def across(layer: int, inputs: dict[int, Tensor]) -> Tensor:
            out = made.b_dec[layer] + 0 * inputs[layer]
            for source in range(layer + 1):
                threshold = made.activations[0].get_parameter("threshold").view(made.n_layers, -1)[source]
                pre = inputs[source] @ made.encoder[source].T + made.b_enc[source]
                out = out + (pre * (pre > threshold.clamp_min(0))) @ made.W_dec[source][:, layer - source]
            return out if made.W_skip is None else out + inputs[layer] @ made.W_skip[layer]

        return across
    members = made.dictionaries if isinstance(made, DictionarySet) else [made]

    def alone(layer: int, inputs: dict[int, Tensor]) -> Tensor:
        out: Tensor = members[layer](inputs[layer].flatten(0, 1)).view_as(inputs[layer])
        return out

    return alone


def text_of(dataset: TokenDataset, n: int) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(dataset.batch(0, n))
    return tokens, ~torch.isin(tokens, torch.tensor([0, 1]))


def loss(logits: Tensor, tokens: Tensor, text: Tensor) -> float:
    log_p, scored = logits.double().log_softmax(-1)[:, :-1], text[:, 1:]
    return float(-log_p[scored].gather(1, tokens[:, 1:][scored][:, None]).mean())


@EVERY
def test_figures_are_those_of_the_librarys_modules(
    case: Case, tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    model, made = make(case, tiny_tokenizer), opened(case, tmp_path)
    numbers = [int(name.split(".")[1]) for name in made.origin.inputs]
    assert made.origin.inputs == tuple(f"blocks.{i}.mlp.hook_in" for i in numbers)
    assert made.origin.outputs == tuple(f"blocks.{i}.hook_mlp_out" for i in numbers)
    layers, predict = {layer: i for i, layer in enumerate(numbers)}, prediction(made)
    tokens, text = text_of(tiny_dataset, 12)
    found = evaluate(model, made, tiny_dataset, SOME)
    with torch.no_grad():
        with replaced(model, case, layers, text, None) as inputs:
            clean = model.hf(tokens).logits
        x = torch.cat([inputs[i][text] for i in range(len(layers))], -1)
        codes = made.encode(x).to_dense()
        assert found.l0 == pytest.approx(float((codes != 0).sum(1).float().mean()), rel=1e-5)
        tokens, text = tokens[:6], text[:6]
        with replaced(model, case, layers, text, predict):
            run = model.hf(tokens).logits
    assert found.ce_clean == pytest.approx(loss(clean[:6], tokens, text), rel=1e-5)
    value = found.ce_spliced if len(layers) == 1 else found.ce_replaced
    assert value == pytest.approx(loss(run, tokens, text), rel=1e-5)
    assert value != pytest.approx(found.ce_clean, rel=1e-3)


@pytest.mark.parametrize("name", ["gemma scope 2", "gemma scope 2, affine"])
def test_the_norms_weight_is_in_the_point_or_in_the_encoder(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    """The same dictionary before the weight, this multiplied into what reads it: equal figures."""
    model, made = make(CASES[name], tiny_tokenizer), opened(CASES[name], tmp_path)
    assert isinstance(made, Dictionary)
    wanted = evaluate(model, made, tiny_dataset, SOME)
    weight = 1 + model.hf.get_submodule("model.layers.3.pre_feedforward_layernorm").get_parameter("weight")
    with torch.no_grad():
        made.encoder.mul_(weight)
        if made.W_skip is not None:
            made.W_skip.mul_(weight[:, None])
    assert evaluate(model, made, tiny_dataset, SOME).fvu != pytest.approx(wanted.fvu, rel=1e-2)
    made.origin = replace(made.origin, inputs=("blocks.3.ln2.hook_normalized",))
    found = evaluate(model, made, tiny_dataset, SOME)
    for figure in ("fvu", "l0", "ce_spliced", "kl_spliced", "cosine"):
        assert getattr(found, figure) == pytest.approx(getattr(wanted, figure), rel=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_one_is_harvested_trained_measured_and_indexed(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    model = make(Case("", family), tiny_tokenizer)
    points = ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"]
    store = harvest(model, tiny_dataset, points, out=tmp_path / "acts", config=HarvestConfig(dtype="fp32"))
    tokens, text = text_of(tiny_dataset, 4)
    with replaced(model, Case("", family), {2: 0}, text, None) as inputs:
        model.hf(tokens)
    kept = store.read(points[0], 0, 4)
    torch.testing.assert_close(kept, inputs[0], rtol=1e-5, atol=1e-5)
    config = TopKConfig(d_sae=64, k=8, inputs=(points[0],), outputs=(points[1],))
    recipe = TrainConfig(n_tokens=6_000, batch_size=200, warmup_steps=2, seed=0)
    train(config, store, out=tmp_path / "made", config=recipe)
    made = load_dictionary(tmp_path / "made")
    assert (made.origin.inputs, made.origin.outputs) == ((points[0],), (points[1],))
    found = evaluate(model, made, tiny_dataset, SOME)
    assert found.fvu < 0.6
    assert found.ce_recovered is not None
    assert found.ce_recovered > 0.5
    index = build_index(model, made, tiny_dataset.slice(0, 20), out=tmp_path / "index", config=IndexConfig(top=3))
    assert index.record.hook_name == points[0]
