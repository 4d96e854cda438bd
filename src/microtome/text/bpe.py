"""A tokenizer of one's own: byte-level byte-pair encoding, learned from a corpus.

It starts from the 256 bytes, so that no text is unknown to it, and joins the most frequent pair of neighbours again and
again until it has as many tokens as asked for (Sennrich et al. 2016, arXiv 1508.07909; on bytes: Radford et al. 2019).
"""

from microtome.common.config import require
from microtome.common.errors import InputError
from microtome.text.bos import Tokenizer
from microtome.text.corpora import Corpus

BOS, SEPARATOR = "<s>", "<|endoftext|>"
SMALLEST = 256 + 2


def train_tokenizer(corpus: Corpus, size: int) -> Tokenizer:
    """A tokenizer of `size` tokens, two of them special: `<s>` begins a sequence, `<|endoftext|>` ends a document.

    The same corpus and size give the same tokenizer. Raises ConfigError for a size that does not hold the bytes, InputError
    for a corpus that has too little text to learn so many tokens from.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    require(
        size >= SMALLEST,
        "A tokenizer holds at least each byte and two special tokens",
        got=size,
        expected=f"≥ {SMALLEST}",
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in corpus), trainer)
    if backend.get_vocab_size() < size:
        raise InputError(
            f"The corpus {corpus.name} has too little text for {size} tokens",
            got=f"{backend.get_vocab_size()} found",
            fix="Ask for fewer, or give more text",
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=SEPARATOR)
