"""Hugging Face datasets: local copies of three kinds, with no network at all."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microtome.common.errors import ConfigError, InputError, MissingDependencyError
from microtome.text import HubCorpus, open_corpus

datasets = pytest.importorskip("datasets")

TEXTS = ["first", "", "third ä"]


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    root.mkdir()
    pq.write_table(pa.table({"id": [0, 1, 2], "text": TEXTS, "note": ["x", "y", "z"]}), root / "train.parquet")
    pq.write_table(pa.table({"id": [3], "text": ["held out"], "note": ["w"]}), root / "test.parquet")
    return root


def texts(spec: str, column: str | None = None) -> list[str]:
    return [document.text for document in open_corpus(spec, column=column)]


def test_a_folder_of_parquet_is_streamed_by_split_and_column(parquet_folder: Path) -> None:
    spec = f"hf:{parquet_folder}"
    assert texts(spec) == TEXTS
    assert texts(f"{spec}?split=test") == ["held out"]
    assert texts(f"{spec}?split=test&column=note") == texts(f"{spec}?split=test", "note") == ["w"]
    corpus = open_corpus(spec)
    assert [document.source for document in corpus] == [f"hf:{parquet_folder}/train#{i}" for i in range(3)]
    assert list(corpus) == list(corpus)


def test_a_folder_of_jsonl_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "a", "n": 1}\n{"body": "b", "n": 2}\n')
    assert texts(f"hf:{tmp_path}") == ["a", "b"]


def test_a_dataset_saved_to_disk_is_read_with_and_without_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert texts(f"hf:{tmp_path / 'one'}") == texts(f"hf:{tmp_path / 'two'}") == TEXTS
    assert texts(f"hf:{tmp_path / 'two'}?split=test") == ["first"]
    with pytest.raises(InputError, match="Unknown split of .*two 'tset'.*Did you mean 'test'"):
        open_corpus(f"hf:{tmp_path / 'two'}?split=tset")
    with pytest.raises(InputError, match="Unknown split of .*one 'test'"):
        open_corpus(f"hf:{tmp_path / 'one'}?split=test")


def test_the_description_names_split_column_and_files(parquet_folder: Path) -> None:
    corpus = open_corpus(f"hf:{parquet_folder}?split=test")
    assert isinstance(corpus, HubCorpus)
    about = corpus.describe()
    assert (about["split"], about["column"]) == ("test", "text")
    assert [file["name"] for file in about["files"]] == ["test.parquet", "train.parquet"]


def test_what_is_not_in_the_dataset_is_an_error(parquet_folder: Path) -> None:
    spec = f"hf:{parquet_folder}"
    with pytest.raises(InputError, match=r"split 'dev'\) cannot be opened: .*Available splits"):
        open_corpus(f"{spec}?split=dev")
    with pytest.raises(InputError, match=r"config wiki, .*cannot be opened"):
        open_corpus(f"{spec}?config=wiki")
    with pytest.raises(InputError, match="Column 'body' of .* is not there.*'id', 'text', 'note'"):
        open_corpus(f"{spec}?column=body")
    with pytest.raises(ConfigError, match=r"Unknown option 'spilt'.*'split'"):
        open_corpus(f"{spec}?spilt=test")


def test_a_copy_that_breaks_off_says_how_far_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"text": "slice 0"}\n{"text": "slice 1"}\n')
    (tmp_path / "train-1.jsonl").write_text('{"text": "never ends\n')
    read: list[str] = []
    with pytest.raises(InputError, match=r"Reading hf:.*/train failed after 2 rows"):
        read.extend(document.text for document in open_corpus(f"hf:{tmp_path}"))
    assert read == ["slice 0", "slice 1"]


def test_an_empty_split_and_a_folder_without_data_are_errors(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "train.csv").write_text("text\n")
    with pytest.raises(InputError, match="Split 'train' of the dataset .*none is empty"):
        open_corpus(f"hf:{tmp_path / 'none'}")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="bare .*cannot be opened"):
        open_corpus(f"hf:{tmp_path / 'bare'}")


def run_offline(code: str, cache: Path) -> str:
    """What a fresh interpreter prints whose Hugging Face cache is `cache` and which may not use the network."""
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_in_the_cache_needs_no_network(parquet_folder: Path, tmp_path: Path) -> None:
    # The library fills its cache itself; only the folder is then named as for a dataset of the hub.
    prepare = f"""
from datasets.packaged_modules.parquet.parquet import Parquet
Parquet(cache_dir={str(tmp_path / "cache")!r}, dataset_name="tiny", config_id="default", hash="abc123",
        data_files={{"train": [{str(parquet_folder / "train.parquet")!r}]}}).download_and_prepare()
"""
    read = """
from microtome.text import open_corpus
corpus = open_corpus("hf:someone/tiny?column=text")
print([d.text for d in corpus], corpus.describe()["revision"], [d.source for d in corpus][0])
"""
    run_offline(prepare, tmp_path / "cache")
    (tmp_path / "cache" / "tiny").rename(tmp_path / "cache" / "someone___tiny")
    assert run_offline(read, tmp_path / "cache").strip() == f"{TEXTS} abc123 hf:someone/tiny/train#0"


def test_no_network_and_no_copy_says_what_to_do(tmp_path: Path) -> None:
    code = """
from microtome.common.errors import InputError
from microtome.text import open_corpus
try:
    open_corpus("hf:someone/nothing")
except InputError as error:
    print(error)
"""
    message = run_offline(code, tmp_path)
    assert "someone/nothing is not on this machine and the Hugging Face hub cannot be reached" in message
    assert "save_to_disk" in message


def test_without_the_package_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python itself does for a package that is not there
    with pytest.raises(MissingDependencyError, match=r"needs the package datasets.*pip install 'microtome\[hub\]'"):
        open_corpus(f"hf:{tmp_path}")
