"""Packing loses nothing silently, gives the same bytes each time, and leaves nothing half-made behind."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.common.config import from_dict, to_dict
from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.text import BosWarning, MemoryCorpus, TokenDataset, TokenizeConfig, open_corpus, tokenize_corpus
from microtome.text.document_table import DocumentTableWriter
from microtome.text.packing import Packer, TokenFileWriter

Texts = Callable[[int], list[str]]


def plain_sequences(rows: Sequence[list[int]], context: int, bos: int | None, separator: int | None) -> list[list[int]]:
    """The twin: packing as its definition says it, all in lists."""
    start = [] if bos is None else [bos]
    body = context - len(start)
    stream: list[int] = []
    for ids in rows:
        if ids:
            stream += ids
            if separator is not None and not (start and len(stream) % body == 0):
                stream.append(separator)
    return [start + stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("context", [2, 7, 64])
@pytest.mark.parametrize(("bos", "separator"), [("auto", "auto"), ("none", "none"), ("auto", "<s>"), ("none", "</s>")])
def test_packing_equals_the_plain_twin(
    tokenizer: Any, random_texts: Texts, tmp_path: Path, seed: int, context: int, bos: str, separator: str
) -> None:
    texts = random_texts(seed)
    config = TokenizeConfig(context=context, bos=bos, separator=separator, batch_documents=1 + 6 * seed)
    dataset = tokenize_corpus(MemoryCorpus.of(texts), tokenizer, tmp_path / "tokens", config=config)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = {"auto": 1, "<s>": 0, "</s>": 1, "none": None}
    expected = plain_sequences(rows, context, None if bos == "none" else 0, ids[separator])
    assert dataset.tokens.tolist() == expected
    assert dataset.n_tokens == len(expected) * context

    # Every token of a document that is in the dataset is where the links say, and the counts account for the others.
    kept = np.zeros(len(texts), dtype=int)
    numbers = [i for i, row in enumerate(rows) if row]
    for sequence in range(dataset.n_sequences):
        for span in dataset.document_of(sequence):
            text = numbers[span.document]
            length = span.stop - span.start
            assert span.source == f"memory#{text}"
            assert span.offset == kept[text]
            assert expected[sequence][span.start : span.stop] == rows[text][span.offset : span.offset + length]
            kept[text] += length
    summary = dataset.summary
    assert summary["n_text_tokens"] == kept.sum()
    assert summary["n_text_tokens"] + summary["n_text_tokens_left_out"] == sum(map(len, rows))
    assert summary["n_documents_empty"] == sum(not row for row in rows)
    assert summary["n_documents"] == np.count_nonzero(kept)
    assert summary["n_documents"] + summary["n_documents_left_out"] == len(numbers)


def test_a_bos_that_is_also_the_separator_is_never_doubled(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="<s>")  # as GPT-2 has it
    corpus = MemoryCorpus.of(["a", "ab", "abc", "abcd"] * 20)
    dataset = tokenize_corpus(corpus, tokenizer, tmp_path / "t", config=TokenizeConfig(context=3))
    tokens = dataset.tokens
    assert (tokens[:, 0] == 0).all()
    assert (tokens == 0).sum() > len(tokens)
    assert not ((tokens[:, :-1] == 0) & (tokens[:, 1:] == 0)).any()


def test_max_tokens_bounds_the_dataset_and_is_said_in_the_summary(
    tokenizer: Any, random_texts: Texts, tmp_path: Path
) -> None:
    corpus = MemoryCorpus.of(random_texts(0))
    whole = tokenize_corpus(corpus, tokenizer, tmp_path / "all", config=TokenizeConfig(context=16))
    assert not whole.summary["stopped_at_max_tokens"]
    for batch in (1, 7, 100):
        config = TokenizeConfig(context=16, max_tokens=330, batch_documents=batch)
        part = tokenize_corpus(corpus, tokenizer, tmp_path / "some", config=config, overwrite=True)
        assert part.n_tokens == 320
        assert part.tokens.tolist() == whole.tokens[:20].tolist()
        assert part.summary["stopped_at_max_tokens"]
        last = part.document_of(19)[-1]
        n_used = len(
            tokenizer(corpus.documents[int(last.source.split("#")[1])].text, add_special_tokens=False).input_ids
        )
        assert part.summary["n_text_tokens_left_out"] == n_used - (last.offset + last.stop - last.start)


def test_the_same_command_gives_the_same_bytes_whatever_the_batch(
    tokenizer: Any, random_texts: Texts, tmp_path: Path
) -> None:
    corpus = MemoryCorpus.of(random_texts(1))
    folders: list[Path] = []
    for batch in (256, 256, 3):
        folders.append(tmp_path / f"t{len(folders)}")
        tokenize_corpus(corpus, tokenizer, folders[-1], config=TokenizeConfig(context=16, batch_documents=batch))
    for name in ("config.json", "tokens.npy", "documents.parquet", "summary.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    assert len({TokenDataset.open(folder).fingerprint for folder in folders}) == 1


def test_ids_take_two_bytes_where_the_vocabulary_fits_and_four_elsewhere(tmp_path: Path) -> None:
    for size, kind in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        path = tmp_path / f"{size}.npy"
        with TokenFileWriter(path, 2, size) as writer:
            writer.append(np.array([[0, size - 1]]))
        loaded = np.load(path)
        assert loaded.dtype.str == kind
        assert loaded.tolist() == [[0, size - 1]]


def test_memory_holds_one_batch_and_not_the_dataset(tmp_path: Path) -> None:
    config, ids = TokenizeConfig(context=128), list(range(5000))
    with (
        TokenFileWriter(tmp_path / "tokens.npy", 128, 5000) as tokens,
        DocumentTableWriter(tmp_path / "documents.parquet", rows_per_group=256) as documents,
    ):
        packer = Packer(tokens, documents, config, bos=0, separator=1)
        packer.add("first", ids)  # what is imported or made once is not counted
        packer.flush()
        tracemalloc.start()
        for batch in range(100):
            for number in range(30):
                packer.add(f"{batch}#{number}", ids)
            packer.flush()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "tokens.npy").stat().st_size > 29_000_000
    assert peak < 3_000_000


def test_the_provenance_describes_the_corpus_and_the_config_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A slice of tissue. " * 50)
    tokenize_corpus(open_corpus(path), tokenizer, tmp_path / "tokens", config=TokenizeConfig(context=8))
    provenance = json.loads((tmp_path / "tokens" / "provenance.json").read_text())
    assert provenance["corpus"]["files"][0]["bytes"] == path.stat().st_size
    head = json.loads((tmp_path / "tokens" / "config.json").read_text())["config"]
    assert head["tokenize"]["context"] == 8
    assert head["tokenizer"]["vocabulary_size"] == len(tokenizer)


def test_the_config_survives_json_and_refuses_what_cannot_be() -> None:
    config = TokenizeConfig(context=64, max_tokens=640, bos="<s>")
    assert from_dict(TokenizeConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match=r"context shorter than two tokens.*Got: 1"):
        TokenizeConfig(context=1)
    with pytest.raises(ConfigError, match=r"max_tokens is less than one sequence.*Got: 100.*128 or more"):
        TokenizeConfig(max_tokens=100)
    with pytest.raises(ConfigError, match="at least one document"):
        TokenizeConfig(batch_documents=0)


def test_a_context_longer_than_model_or_tokenizer_take_is_an_error(
    tokenizer: Any, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    corpus, out = MemoryCorpus.of(["a slice " * 99]), tmp_path / "tokens"
    with pytest.raises(ConfigError, match=r"128 tokens is longer than the model takes.*64 or less"):
        tokenize_corpus(corpus, tokenizer, out, max_context=64)
    with pytest.raises(ConfigError, match=r"128 tokens is longer than the tokenizer takes.*100 or less"):
        tokenize_corpus(corpus, make_tokenizer(model_max_length=100), out, max_context=500)
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_text_or_with_too_little_is_an_error_and_leaves_nothing(
    tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"memory has no text\. Got: 2 documents, each empty"):
        tokenize_corpus(MemoryCorpus.of(["", ""]), tokenizer, tmp_path / "t")
    with pytest.raises(InputError, match=r"does not fill one sequence\. Got: \d+ tokens\. Expected: at least 127"):
        tokenize_corpus(MemoryCorpus.of(["short"]), tokenizer, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_bad_file_in_the_middle_is_named_and_leaves_nothing(tokenizer: Any, tmp_path: Path) -> None:
    prose = tmp_path / "prose"
    prose.mkdir()
    (prose / "a.txt").write_text("A slice of tissue. " * 500)
    (prose / "b.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8: byte 0xfc at offset 2"):
        tokenize_corpus(open_corpus(prose), tokenizer, tmp_path / "t", config=TokenizeConfig(batch_documents=1))
    assert [path.name for path in tmp_path.iterdir()] == ["prose"]


def test_text_that_spells_the_bos_is_kept_counted_and_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    corpus = MemoryCorpus.of(["<s>A slice", "of <s> tissue"] * 10)
    with pytest.warns(BosWarning, match="The text of memory itself spells the BOS token 20 times"):
        dataset = tokenize_corpus(corpus, tokenizer, tmp_path / "t", config=TokenizeConfig(context=4))
    assert dataset.summary["n_bos_in_text"] == 20


def test_a_dataset_is_replaced_only_when_told(tokenizer: Any, tmp_path: Path) -> None:
    first, second = (MemoryCorpus.of([text * 99]) for text in ("a slice ", "tissue "))
    config, out = TokenizeConfig(context=16), tmp_path / "tokens"
    before = tokenize_corpus(first, tokenizer, out, config=config).fingerprint
    with pytest.raises(ArtifactError, match="is already there"):
        tokenize_corpus(second, tokenizer, out, config=config)
    assert TokenDataset.open(out).fingerprint == before
    # A replacement that fails leaves the old one whole.
    with pytest.raises(InputError):
        tokenize_corpus(MemoryCorpus.of([""]), tokenizer, out, config=config, overwrite=True)
    assert TokenDataset.open(out).fingerprint == before
    assert tokenize_corpus(second, tokenizer, out, config=config, overwrite=True).fingerprint != before
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


ENDLESS = """
import os, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from microtome.common.errors import ArtifactError
from microtome.text import Document, TokenizeConfig, tokenize_corpus

class Endless:
    name = "endless"
    def describe(self):
        return {}
    def __iter__(self):
        for i in range(10**9):
            if i == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGINT)
            yield Document("A slice of tissue, thin enough to see through. " * 20, f"endless#{i}")

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
try:
    tokenize_corpus(Endless(), tokenizer, Path(sys.argv[2]) / "tokens", config=TokenizeConfig(batch_documents=8))
except KeyboardInterrupt:
    print("interrupted", [p.name for p in Path(sys.argv[2]).iterdir()])
except ArtifactError as error:
    print(error, [p.name for p in Path(sys.argv[2]).iterdir()])
"""


def test_ctrl_c_leaves_nothing_half_made(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "tokenizer"), str(tmp_path / "out"), "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "interrupted []\n", done.stderr


def test_a_full_disk_is_said_and_leaves_nothing_half_made(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(ENDLESS)
    (tmp_path / "small").mkdir()
    # A real file system of 256 KiB, in a mount namespace of its own, so that it goes away with the process.
    inside = 'mount -t tmpfs -o size=256k small "$1/small" && exec "$2" "$1/script.py" "$1/tokenizer" "$1/small" -1'
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    can = shutil.which("unshare") and subprocess.run(
        [*namespace, "mount", "-t", "tmpfs", "none", str(tmp_path / "small")], capture_output=True, check=False
    )
    if not can or can.returncode != 0:
        pytest.skip("this machine does not let a test mount a file system")
    command = [*namespace, "sh", "-c", inside, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "The disk is full while writing" in done.stdout, done.stderr
    assert done.stdout.endswith(" []\n")
