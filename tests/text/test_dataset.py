"""A token dataset reads back what was packed, through views that share one file, and notices damage."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from microtome.common.errors import ArtifactError, InputError
from microtome.text import MemoryCorpus, TokenDataset, TokenizeConfig, tokenize_corpus
from microtome.text.document_table import DocumentRow, DocumentTable, DocumentTableWriter


@pytest.fixture(scope="module")
def made(
    tokenizer: Any, random_texts: Callable[[int], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> TokenDataset:
    out = tmp_path_factory.mktemp("dataset") / "tokens"
    return tokenize_corpus(MemoryCorpus.of(random_texts(5)), tokenizer, out, config=TokenizeConfig(context=16))


@pytest.fixture
def copy(made: TokenDataset, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(made.path, tmp_path / "tokens")
    return tmp_path / "tokens"


def test_opening_gives_the_same_dataset_memory_mapped(made: TokenDataset, tokenizer: Any) -> None:
    opened = TokenDataset.open(made.path)
    assert opened == made
    assert isinstance(opened.tokens, np.memmap)
    assert not opened.tokens.flags.writeable
    assert opened.tokens.shape == (opened.n_sequences, opened.context) == (len(made), 16)
    assert (opened.bos_id, opened.special_ids, opened.vocabulary_size) == (0, (0, 1), len(tokenizer))
    assert opened.tokens.tolist() == np.load(made.path / "tokens.npy").tolist()
    opened.verify()


def test_a_batch_is_int64_in_memory_and_within_bounds(made: TokenDataset) -> None:
    batch = made.batch(3, 7)
    assert batch.dtype == np.int64
    assert batch.tolist() == made.tokens[3:7].tolist()
    for start, stop in ((-1, 2), (0, len(made) + 1), (4, 4)):
        with pytest.raises(InputError, match="not in the dataset"):
            made.batch(start, stop)


def test_views_share_the_file_and_keep_the_links(made: TokenDataset) -> None:
    view = made.slice(10, 40).slice(5, 20)
    assert len(view) == 15
    assert view.tokens.tolist() == made.tokens[15:30].tolist()
    assert view.batch(2, 4).tolist() == made.batch(17, 19).tolist()
    assert [view.document_of(i) for i in range(15)] == [made.document_of(15 + i) for i in range(15)]
    with pytest.raises(InputError, match=r"15 to 16.*within 0 to 15"):
        view.document_of(15)
    assert len({made.fingerprint, view.fingerprint, made.slice(0, 15).fingerprint}) == 3
    assert made.slice(0, len(made)).fingerprint == made.fingerprint


def test_a_split_is_two_views_that_together_are_the_whole(made: TokenDataset) -> None:
    train, held_out = made.split(0.8)
    assert len(train) == round(0.8 * len(made))
    assert [*train.tokens.tolist(), *held_out.tokens.tolist()] == made.tokens.tolist()
    for fraction in (0.0, 1.0, -1.0, 0.001):
        with pytest.raises(InputError, match="leaves one part empty"):
            made.split(fraction)


def test_a_dataset_goes_to_another_process_without_its_tokens(made: TokenDataset) -> None:
    view = made.slice(4, 9)
    assert view.tokens.shape[0] == 5
    view.document_of(0)
    data = pickle.dumps(view)
    assert len(data) < 3000
    again = pickle.loads(data)
    assert again.tokens.tolist() == view.tokens.tolist()
    assert again.document_of(2) == view.document_of(2)


def test_the_document_table_finds_rows_over_many_row_groups(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, size=500)
    starts = np.cumsum([0, *(lengths + 1)])[:-1]  # one separator behind each
    rows = [DocumentRow(f"d#{i}", int(starts[i]), int(lengths[i])) for i in range(500)]
    with DocumentTableWriter(tmp_path / "documents.parquet", rows_per_group=7) as writer:
        for row in rows:
            writer.append(row)
    table = DocumentTable(tmp_path / "documents.parquet")
    end = int(starts[-1] + lengths[-1]) + 40
    for begin in range(0, end, 11):
        twin = [(i, r) for i, r in enumerate(rows) if r.start < begin + 25 and r.start + r.n_tokens > begin]
        assert list(table.between(begin, begin + 25)) == twin


def test_a_changed_byte_is_found_by_verify(copy: Path) -> None:
    with (copy / "tokens.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ArtifactError, match=r"tokens\.npy is damaged\. Got: SHA-256"):
        TokenDataset.open(copy).verify()


@pytest.mark.parametrize("name", ["tokens.npy", "documents.parquet"])
def test_a_cut_or_missing_file_is_found_when_opening(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-10])
    with pytest.raises(
        ArtifactError, match=rf"{name} is damaged\. Got: {len(data) - 10} bytes\. Expected: {len(data)}"
    ):
        TokenDataset.open(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is damaged\. Got: no"):
        TokenDataset.open(copy)
    (copy / "summary.json").unlink()
    with pytest.raises(ArtifactError, match=r"summary\.json is damaged\. Got: no file"):
        TokenDataset.open(copy)


def test_what_is_no_dataset_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no token_dataset at"):
        TokenDataset.open(tmp_path / "tokens")
    with pytest.raises(ArtifactError, match="no Microtome artifact"):
        TokenDataset.open(tmp_path)
