"""A small real tokenizer, trained here on a few sentences, and ways to make others of it."""

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TRAINING_TEXT = [
    "A microtome cuts tissue into slices thin enough to see through.",
    "The blade moves down, the block moves forward, and a slice falls off.",
    "Slices are laid on glass, stained, and looked at under a lens.",
    "for slice in slices:\n    print(slice)\n",
]

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Builds a byte-level BPE tokenizer; `adds_bos` gives it a template that puts its BOS in front by itself."""

    def make(*, adds_bos: bool = False, **special: object) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TRAINING_TEXT, trainer)
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        make_fast: MakeTokenizer = PreTrainedTokenizerFast
        return make_fast(tokenizer_object=backend, **special)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """BOS `<s>` (0), EOS `</s>` (1), pad `<pad>` (2); adds none of them by itself."""
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def random_texts() -> Callable[[int], list[str]]:
    """Some dozens of texts of very unequal lengths, a few of them empty, the same for the same seed."""

    def texts(seed: int) -> list[str]:
        chance = random.Random(seed)
        alphabet = "abc slices of tissue é 日本 \n\t"
        return ["".join(chance.choices(alphabet, k=chance.choice([0, 1, 5, 40, 300]))) for _ in range(60)]

    return texts
