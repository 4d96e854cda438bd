"""What tests of all floors share: the built-in model, tiny random models of each family, and a small token dataset."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from microtome.model import HookedModel, load_model
from microtome.model.families import family_of
from microtome.text import TokenDataset, TokenizeConfig, tokenize_corpus
from microtome.text.corpora import MemoryCorpus

TINY_VOCABULARY = 320
SENTENCES = [
    "The cat sat on the mat, and the dog looked on.",
    "def main():\n    return 3\n",
    "In 1969 the first people walked on the Moon.",
    "Goal! Two minutes before the end the keeper could do nothing.",
    "Whisk the eggs with sugar until pale, then fold in the flour.",
]


def pytest_collection_finish() -> None:
    """Let garbage collection pass over what importing made, which stays: half a second each time with all tests collected."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def smol() -> HookedModel:
    """The built-in model in fp32."""
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens, BOS `<s>` = 0, EOS `</s>` = 1."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


MakeTiny = Callable[[str], HookedModel]


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer: PreTrainedTokenizerFast) -> MakeTiny:
    """Makes a random three-layer model of a family; the same for the same family."""

    def make(family: str) -> HookedModel:
        torch.manual_seed(0)
        hf: LlamaForCausalLM | GPT2LMHeadModel
        if family == "llama":
            hf = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=TINY_VOCABULARY,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    initializer_range=0.3,
                )
            )
        else:
            hf = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=TINY_VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3
                )
            )
        spec = family_of(hf.config)
        assert spec is not None
        return HookedModel(hf, tiny_tokenizer, name=f"tiny-{family}", spec=spec)

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny: MakeTiny) -> HookedModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def tiny_dataset(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """About 150 sequences of 24 tokens: the sentences in many orders."""
    folder: Path = tmp_path_factory.mktemp("tokens") / "tiny"
    texts = [" ".join(SENTENCES[(i * j) % 5] for j in range(1, 4)) for i in range(50)]
    return tokenize_corpus(MemoryCorpus.of(texts), tiny_tokenizer, folder, config=TokenizeConfig(context=24))
