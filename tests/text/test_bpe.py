"""A tokenizer learned from a corpus."""

import pytest

from microtome.common.errors import ConfigError, InputError
from microtome.text import MemoryCorpus, bos_id, separator_id, tokenizer_fingerprint, train_tokenizer

TEXTS = ["the cat sat on the mat, the dog looked on", "def main():\n    return 3\n", "naïve café 🙂 "] * 5


def test_every_text_comes_back() -> None:
    tokenizer = train_tokenizer(MemoryCorpus.of(TEXTS), 290)
    assert len(tokenizer) == 290
    for text in [*TEXTS[:3], "  never seen: ŽžЖ漢 \x00\n\t"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat")["input_ids"]) < len("the cat")
    assert (bos_id(tokenizer), separator_id(tokenizer)) == (0, 1)


def test_the_same_corpus_gives_the_same_tokenizer() -> None:
    a, b = (train_tokenizer(MemoryCorpus.of(TEXTS), 290) for _ in range(2))
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b)
    assert tokenizer_fingerprint(a) != tokenizer_fingerprint(train_tokenizer(MemoryCorpus.of(TEXTS), 280))


def test_a_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"each byte.*200.*258"):
        train_tokenizer(MemoryCorpus.of(TEXTS), 200)
    with pytest.raises(InputError, match="too little text for 5000"):
        train_tokenizer(MemoryCorpus.of(TEXTS), 5000)
