"""One file of each kind becomes the documents that were put in, and a bad one is named."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microtome.common.errors import InputError
from microtome.text.documents import Document, file_format, html_to_text, read_documents

TEXTS = ['First text,\nwith two lines and a "quote".\n', "", "Zweiter: ä, ö, ü, ß", "第三 🦠"]


def _write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"text": t, "kind": "x"}) for t in TEXTS) + "\n\n", encoding="utf-8")


def _write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])


def _write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)


def _write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": t, "source": "x"} for t in TEXTS], indent=1), encoding="utf-8")


WRITERS: dict[str, Callable[[Path], None]] = {
    "jsonl": _write_jsonl,
    "json": _write_json,
    "csv": _write_csv,
    "parquet": _write_parquet,
}


def compress(path: Path, ending: str) -> Path:
    """`path` compressed beside itself: `.gz` by the standard library, `.zst` by Arrow."""
    target = path.with_name(path.name + ending)
    if ending == ".gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pa.output_stream(str(target), compression="zstd") as out:
            out.write(path.read_bytes())
    return target


def read(path: Path, column: str | None = None) -> list[Document]:
    return list(read_documents(path, path.name, column))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITERS)
def test_records_come_back_with_their_numbers(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"texts.{kind}"
    WRITERS[kind](path)
    path = compress(path, ending) if ending else path
    assert file_format(path) == (kind, {"": None, ".gz": "gzip", ".zst": "zstd"}[ending])
    assert read(path) == [Document(text, f"{path.name}#{i}") for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "no_ending"])
def test_a_text_file_is_one_document_taken_as_it_is(tmp_path: Path, name: str, ending: str) -> None:
    text = "One\r\ntwo\n\n  drei ä 🦠\n\n\n"
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # the byte-order mark is no text
    path = compress(path, ending) if ending else path
    assert read(path) == [Document(text, path.name)]


def test_a_large_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraph = "A line of tissue.\n" * 50_000 + "\n"
    path = tmp_path / "large.txt"
    path.write_text(paragraph * 24)
    documents = read(path)
    assert "".join(d.text for d in documents) == paragraph * 24
    assert [d.source for d in documents] == ["large.txt", "large.txt#1", "large.txt#2"]
    assert all(d.text.endswith("\n\n") for d in documents)


def test_html_gives_what_a_reader_sees() -> None:
    page = """<!doctype html><html><head><title>Slices</title><style>p {color: red}</style></head><body>
    <script>var x = "<p>no</p>";</script>
    <h1>How to  cut</h1> <p>A <b>thin</b> slice &amp; a
    <a href="x">blade</a>.</p><ul><li>one<li>two</ul><pre>
  for x in y:
      cut(x)</pre>end</body></html>"""
    expected = "Slices\n\nHow to cut\n\nA thin slice & a blade.\n\none\ntwo\n\n  for x in y:\n      cut(x)\nend"
    assert html_to_text(page).replace("\n\n\n", "\n\n") == html_to_text(page)
    assert html_to_text(page) == expected


def test_html_files_are_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<p>Hello <i>there</i></p>")
    assert read(compress(path, ".gz")) == [Document("Hello there", "page.html.gz")]


def test_the_only_string_column_is_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "body": ["x", None]}), path)
    assert [d.text for d in read(path)] == ["x", ""]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('{"n": 1, "body": "x"}\n{"n": 2, "body": null}\n"a bare string"\n')
    assert [d.text for d in read(jsonl)] == ["x", "", "a bare string"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_unclear_or_missing_column_is_an_error_that_lists_the_columns(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text('{"title": "t", "body": "b"}\n')
    elif kind == "csv":
        path.write_text("title,body\nt,b\n")
    else:
        pq.write_table(pa.table({"title": ["t"], "body": ["b"]}), path)
    with pytest.raises(InputError, match=r"not clear which column of .*a\.\w+ is the text.*'title', 'body'"):
        read(path)
    with pytest.raises(InputError, match=r"Column 'text' of .*a\.\w+ is not there.*'title', 'body'"):
        read(path, "text")
    assert [d.text for d in read(path, "body")] == ["b"]


def test_a_column_without_strings_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1], "body": ["b"]}), path)
    with pytest.raises(InputError, match="Column 'text' of a.parquet holds no strings.*strings in 'body'"):
        read(path)


BAD = {
    "binary.txt": (b"PK\x03\x04\n\x00\x01", r"binary\.txt is a binary file: it has a zero byte at offset 5"),
    "latin.txt": ("gr\u00fcn\n".encode("latin-1"), r"latin\.txt is not UTF-8: byte 0xfc at offset 2"),
    "later.txt": (b"fine\n" * 3 + b"no \xff", r"later\.txt is not UTF-8: byte 0xff at offset 18"),
    "mark.txt": (b"\xef\xbb\xbfab\xff", r"mark\.txt is not UTF-8: byte 0xff at offset 5"),
    "wide.txt": ("slice".encode("utf-16"), r"wide\.txt is not UTF-8: it begins with the mark of UTF-16"),
    "latin.csv": (b"text\ngr\xfcn\n", r"latin\.csv is not UTF-8: byte 0xfc at offset 7"),
    "latin.jsonl": (b'{"text": "gr\xfcn"}\n', r"latin\.jsonl is not UTF-8: byte 0xfc at offset 12"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"not JSON: line 2 of broken\.jsonl"),
    "list.jsonl": (b"[1]\n", r"A record is a JSON list: line 1 of list\.jsonl"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n', r"holds something else in line 2 of number\.jsonl\. Got: int"),
    "gone.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', r"Column 'text' of line 2 of gone\.jsonl is not there"),
    "broken.json": (b'["a", "b"', r"not JSON: broken\.json"),
    "number.json": (b'["a", 3]', r"A record is a JSON int: entry 1 of number\.json"),
    "ragged.csv": (b"id,text\n1,a\n2\n", r"Line 3 of ragged\.csv has 1 fields.*2, as in the header"),
    "open.csv": (b'text\n"never closed\n', r"Line 2 of open\.csv is not CSV"),
    "fake.parquet": (b"no parquet at all", r"fake\.parquet is damaged"),
    "fake.txt.gz": (b"not gzip", r"fake\.txt\.gz is damaged"),
    "cut.txt.gz": (gzip.compress(b"slice " * 1000)[:-12], r"cut\.txt\.gz is damaged"),
    "fake.txt.zst": (b"not zstd", r"fake\.txt\.zst is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_missing_file_or_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file .*gone.txt"):
        read(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_an_empty_file_is_an_empty_document_or_no_record(tmp_path: Path) -> None:
    for name, n in {"a.txt": 1, "a.csv": 0, "a.jsonl": 0}.items():
        (tmp_path / name).touch()
        assert [d.text for d in read(tmp_path / name)] == [""] * n


def test_a_csv_field_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "slice " * 40_000 + "\n")
    assert len(read(path)[0].text) == 240_000
    assert csv.field_size_limit() == before


def test_a_jsonl_record_may_name_its_own_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "source": "letter#7"}\n{"text": "two", "source": ""}\n')
    assert [d.source for d in read_documents(tmp_path / "a.jsonl", "a.jsonl", "text")] == ["letter#7", "a.jsonl#1"]
