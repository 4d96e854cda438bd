"""`open_corpus` finds the text that a spec means, always in the same order, and says clearly when there is none."""

import hashlib
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest

from microtome.common.errors import ConfigError, InputError
from microtome.text import Corpus, Document, FileCorpus, JoinedCorpus, MemoryCorpus, open_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text in several forms and depths, with things between that are none."""
    root = tmp_path / "prose"
    (root / "sub" / ".hidden").mkdir(parents=True)
    (root / "b.txt").write_text("b")
    (root / "a.md").write_text("a")
    (root / "sub" / "c.jsonl").write_text('{"text": "c0"}\n{"text": "c1"}\n')
    (root / "sub" / ".hidden" / "d.txt").write_text("hidden")
    (root / "package.json").write_text('{"name": "prose", "version": "1"}')
    (root / "picture.png").write_bytes(b"\x89PNG\0")
    return root


def sources(corpus: Corpus) -> list[str]:
    return [document.source for document in corpus]


def test_the_standard_library_is_read_in_order_without_tests_and_packages() -> None:
    corpus = open_corpus("python-stdlib")
    names = sources(corpus)
    assert names == sorted(names) == sources(open_corpus("python-stdlib"))
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    one = next(document for document in corpus if document.source == "json/decoder.py")
    assert one.text == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_text(encoding="utf-8")


def test_the_demo_corpus_ships_with_the_package() -> None:
    documents = list(open_corpus("demo"))
    assert len(documents) == 6656
    assert all(document.text for document in documents[:200])
    assert documents[0].source == "python#0"
    assert {document.source.split("#")[0] for document in documents} >= {"news", "law", "french", "recipe", "sport"}


def test_a_folder_gives_its_text_files_at_any_depth(folder: Path) -> None:
    corpus = open_corpus(folder)
    assert list(corpus) == list(corpus)
    assert list(corpus) == [
        Document("a", "a.md"),
        Document("b", "b.txt"),
        Document("c0", "sub/c.jsonl#0"),
        Document("c1", "sub/c.jsonl#1"),
    ]


def test_a_glob_gives_the_files_it_matches(folder: Path) -> None:
    assert sources(open_corpus(f"{folder}/*.txt")) == ["b.txt"]
    assert sources(open_corpus(f"{folder}/**/*.jsonl")) == ["sub/c.jsonl#0", "sub/c.jsonl#1"]
    (folder / "e.json").write_text('["e0", "e1"]')
    assert sources(open_corpus(f"{folder}/e.json*")) == ["e.json#0", "e.json#1"]
    assert sources(open_corpus(f"{folder}/?.md")) == ["a.md"]
    assert sources(open_corpus(f"{folder.parent}/*/[ab].*")) == ["prose/a.md", "prose/b.txt"]


def test_relative_specs_start_at_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert sources(open_corpus("b.txt")) == ["b.txt"]
    assert sources(open_corpus("*.md")) == ["a.md"]
    assert sources(open_corpus("sub")) == ["c.jsonl#0", "c.jsonl#1"]


def test_several_corpora_are_joined_in_the_order_given(folder: Path) -> None:
    expected = ["b.txt", "c.jsonl#0", "c.jsonl#1"]
    parts = [folder / "b.txt", folder / "sub"]
    joined = open_corpus(parts)
    assert isinstance(joined, JoinedCorpus)
    assert sources(joined) == sources(open_corpus(f"{parts[0]}, {parts[1]}")) == expected
    assert [part["name"] for part in joined.describe()["parts"]] == [str(part) for part in parts]
    assert isinstance(open_corpus([folder]), FileCorpus)
    with pytest.raises(InputError, match="No corpus was named"):
        open_corpus([])


def test_a_path_with_a_comma_in_its_name_is_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "a,b.txt").write_text("x")
    assert sources(open_corpus(tmp_path / "a,b.txt")) == sources(open_corpus(f"{tmp_path}/a,b.txt")) == ["a,b.txt"]


def test_the_column_is_said_beside_the_spec_or_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("title,body\nt,b\n")
    assert [d.text for d in open_corpus(path, column="title")] == ["t"]
    assert [d.text for d in open_corpus(f"{path}?column=body")] == ["b"]
    assert [d.text for d in open_corpus(f"{tmp_path}/?.csv?column=body")] == ["b"]
    with pytest.raises(ConfigError, match="Unknown option 'colum'.*'column'"):
        open_corpus(f"{path}?colum=body")


def test_a_description_tells_sizes_and_checksums_and_nothing_of_the_machine(folder: Path) -> None:
    about = open_corpus(f"{folder}/*.txt").describe()
    checksum = hashlib.sha256(b"b").hexdigest()
    assert about["files"] == [{"name": "b.txt", "bytes": 1, "sha256": checksum}]
    assert json.loads(json.dumps(about)) == about
    (folder / "b.txt").write_text("B")
    assert open_corpus(f"{folder}/*.txt").describe()["fingerprint"] != about["fingerprint"]


def test_texts_in_memory_are_a_corpus_too() -> None:
    corpus = MemoryCorpus.of(["one", "two"], name="mine")
    assert isinstance(corpus, Corpus)
    assert list(corpus) == [Document("one", "mine#0"), Document("two", "mine#1")]
    assert corpus.describe() != MemoryCorpus.of(["onet", "wo"], name="mine").describe()


def test_an_unknown_name_lists_the_nearest_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Unknown corpus 'python-stblib'\..*Did you mean 'python-stdlib'\?"):
        open_corpus("python-stblib")
    (tmp_path / "letters").mkdir()
    with pytest.raises(ConfigError, match=r"Unknown corpus 'leters'\..*Did you mean 'letters'\?"):
        open_corpus("leters")


def test_a_path_glob_or_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file or folder .*gone.txt"):
        open_corpus(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"No file matches .*\*\.txt"):
        open_corpus(f"{tmp_path}/*.txt")
    (tmp_path / "picture.png").touch()
    with pytest.raises(InputError, match=r"holds no text file\. Got: endings \.png\. Expected: \.txt"):
        open_corpus(tmp_path)


def test_zstd_in_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    for part in ("one\n", "two\n"):
        frame = pa.Codec("zstd").compress(part.encode(), asbytes=True)
        with path.open("ab") as file:
            file.write(frame)
    assert [d.text for d in open_corpus(path)] == ["one\ntwo\n"]
