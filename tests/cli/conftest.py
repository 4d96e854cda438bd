"""What the tests of several benchmarks share."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from microtome.model import HookedModel

TEXT = "The cat sat on the mat, and the dog looked on.\nIn 1969 the first people walked on the Moon.\n"


@pytest.fixture
def tiny_inputs(tiny_llama: HookedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> list[str]:
    """`--set` words that name a tiny model and a corpus, both on disk."""
    model, corpus = tmp_path / "model", tmp_path / "corpus.txt"
    tiny_llama.hf.save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    corpus.write_text(TEXT * 60, encoding="utf-8")
    return [f"model={model}", f"corpus={corpus}"]
