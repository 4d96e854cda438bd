"""Documents, and how a file becomes documents: text, Markdown, HTML, JSON lines, CSV, Parquet, each also `.gz` or `.zst`.

Files are read as streams, record by record, so a file may be larger than memory. Text must be UTF-8 and is taken as it
is; anything else is an error that names the file and the byte.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from microtome.common.artifacts import fingerprint, sha256
from microtome.common.config import JsonObject
from microtome.common.errors import InputError

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# A plain text file up to this size is one document. A larger one is cut at the next blank line, again and again.
_PIECE_BYTES = 8 << 20
_MOST_FILES_LISTED = 1000
_LONGEST_CSV_FIELD = 1 << 30
_HTML_BLOCKS = re.compile(
    "address|article|aside|blockquote|br|d[dlt]|div|figcaption|footer|form|h[1-6r]|header|li|main|nav|[ou]l|p|pre|section"
    "|table|t[dhr]|title"
)
_HTML_HIDDEN = frozenset(("script", "style", "template", "noscript"))


@dataclass(frozen=True)
class Document:
    """A text and where it is from: `file.txt`, or `file.jsonl#12` for record 12 (from 0) of a file."""

    text: str
    source: str


def file_format(path: Path) -> tuple[str | None, str | None]:
    """`(format, compression)` by the name's endings; a format of None means an ending that is not known."""
    compression = _COMPRESSED.get(path.suffix.lower())
    inner = Path(path.stem) if compression else path
    return FORMATS.get(inner.suffix.lower()), compression


def read_documents(path: Path, name: str, column: str | None = None) -> Iterator[Document]:
    """The documents of the file at `path`, in order; their source is `name`, with `#record` where a file holds many.

    Raises InputError for a file that is missing, binary, not UTF-8, damaged, or without the text column.
    """
    kind, compression = file_format(path)
    try:
        with _open(path, compression) as stream:
            yield from _READERS[kind or "text"](stream, name, column)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}") from error
    except OSError as error:
        # Arrow reports a damaged or cut-off stream as an OSError without a number; the operating system's own have one.
        if error.errno is None:
            raise InputError(
                f"{name} is damaged: {error}", expected=f"a readable {compression or kind} file"
            ) from error
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def describe_files(files: Sequence[tuple[str, Path]]) -> JsonObject:
    """Sizes and SHA-256 of `(name, path)` files for a provenance; of over a thousand files only what they come to."""
    rows: list[JsonObject] = [
        {"name": name, "bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files
    ]
    whole = {
        "n_files": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "fingerprint": fingerprint({"files": rows}),
    }
    return {**whole, "files": rows} if len(rows) <= _MOST_FILES_LISTED else whole


def _open(path: Path, compression: str | None) -> io.BufferedReader:
    import pyarrow as pa

    raw: Any = pa.input_stream(str(path), compression=compression) if compression else path.open("rb", buffering=0)
    return io.BufferedReader(raw, buffer_size=1 << 18)


def text_column(columns: Mapping[str, bool], wanted: str | None, where: str) -> str:
    """Which of `columns` (name → whether it holds strings) is the text: `wanted`, else "text", else the only string one."""
    strings = [name for name, is_text in columns.items() if is_text]
    if wanted is None and "text" in columns:
        wanted = "text"
    if wanted is None and len(strings) == 1:
        return strings[0]
    if wanted in strings:
        return wanted
    if wanted is not None:
        fault = "holds no strings" if wanted in columns else "is not there"
        raise InputError(
            f"Column {wanted!r} of {where} {fault}",
            got=f"columns {_listed(columns)}, with strings in {_listed(strings)}",
        )
    raise InputError(
        f"It is not clear which column of {where} is the text",
        got=f"columns {_listed(columns)}, of which {_listed(strings)} hold strings",
        fix='Name one: column="…", or ?column=… behind the name',
    )


def text_cell(text: object, where: str) -> str:
    """The text in a cell of a table: null is no text. Raises InputError, which names `where`, for what is no string."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"The text column holds something else in {where}", got=type(text).__name__, expected="a string"
        )
    return text


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _lines(stream: io.BufferedReader, name: str) -> Iterator[str]:
    """The decoded lines of a UTF-8 file, each with its newline; a byte-order mark at the start is left out."""
    offset = 0
    for line in stream:
        yield _decode(line, name, offset)
        offset += len(line)


def _decode(data: bytes, name: str, offset: int) -> str:
    """`data`, found at byte `offset` of the file, as text."""
    if offset == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name} is not UTF-8: it begins with the mark of UTF-16", fix=_CONVERT)
    if b"\0" in data:
        raise InputError(
            f"{name} is a binary file: it has a zero byte at offset {offset + data.index(0)}", expected="UTF-8 text"
        )
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start + (3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0)
        raise InputError(f"{name} is not UTF-8: byte {data[at - offset]:#04x} at offset {at}", fix=_CONVERT) from error


_CONVERT = "Convert it to UTF-8 first (iconv -f LATIN1 -t UTF-8), or leave it out"


def _read_text(stream: io.BufferedReader, name: str, _column: str | None) -> Iterator[Document]:
    offset = number = 0
    while lines := stream.readlines(_PIECE_BYTES):
        while lines[-1].strip() and (line := stream.readline()):
            lines.append(line)
        piece = b"".join(lines)
        yield Document(_decode(piece, name, offset), f"{name}#{number}" if number else name)
        offset, number = offset + len(piece), number + 1
    if number == 0:
        yield Document("", name)


def _read_html(stream: io.BufferedReader, name: str, _column: str | None) -> Iterator[Document]:
    yield Document(html_to_text(_decode(stream.read(), name, 0)), name)


def _read_jsonl(stream: io.BufferedReader, name: str, column: str | None) -> Iterator[Document]:
    number = 0
    for at, line in enumerate(_lines(stream, name), start=1):
        if line.strip():
            where = f"line {at} of {name}"
            row = _parse_json(line, where)
            column, text = _json_text(row, column, where)
            yield Document(text, _own_source(row) or f"{name}#{number}")
            number += 1


def _own_source(row: object) -> str | None:
    """What a record says of its own source; the corpora that Microtome writes do."""
    source = row.get("source") if isinstance(row, dict) else None
    return source if isinstance(source, str) and source else None


def _read_json(stream: io.BufferedReader, name: str, column: str | None) -> Iterator[Document]:
    rows = _parse_json(_decode(stream.read(), name, 0), name)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        column, text = _json_text(row, column, f"entry {number} of {name}")
        yield Document(text, f"{name}#{number}")


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"This is not JSON: {where} ({error})", got=repr(text[:60])) from error


def _json_text(row: object, column: str | None, where: str) -> tuple[str | None, str]:
    """The text column (found, if it was not known) and the text of a record: an object, or the bare text."""
    if isinstance(row, str):
        return column, row
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise InputError(f"A record is a JSON {kind}: {where}", expected="an object with a text column, or a string")
    if column is None or column not in row:
        column = text_column({key: isinstance(value, str | None) for key, value in row.items()}, column, where)
    return column, text_cell(row[column], where)


def _read_csv(stream: io.BufferedReader, name: str, column: str | None) -> Iterator[Document]:
    # The limit is the csv module's own and guards against a quote that is never closed; documents may be longer.
    previous = csv.field_size_limit(_LONGEST_CSV_FIELD)
    try:
        rows = csv.reader(_lines(stream, name), strict=True)
        header = next(rows, None)
        if header is None:
            return
        at = header.index(text_column(dict.fromkeys(header, True), column, name))
        for number, row in enumerate(row for row in rows if row):
            if len(row) != len(header):
                raise InputError(
                    f"Line {rows.line_num} of {name} has {len(row)} fields", expected=f"{len(header)}, as in the header"
                )
            yield Document(row[at], f"{name}#{number}")
    except csv.Error as error:
        raise InputError(f"Line {rows.line_num} of {name} is not CSV: {error}") from error
    finally:
        csv.field_size_limit(previous)


def _read_parquet(stream: io.BufferedReader, name: str, column: str | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    seekable = pa.BufferReader(stream.read()) if isinstance(stream.raw, pa.NativeFile) else stream
    try:
        file = pq.ParquetFile(seekable)
        types = {
            field.name: pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            for field in file.schema_arrow
        }
        column = text_column(types, column, name)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield Document(text_cell(text, f"row {number} of {name}"), f"{name}#{number}")
                number += 1
    except pa.ArrowInvalid as error:
        raise InputError(f"{name} is damaged: {error}", expected="a Parquet file") from error


class _HtmlText(HTMLParser):
    """Collects what a reader sees, one line a block; `pre` keeps its line breaks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in _HTML_HIDDEN
        self.verbatim += tag == "pre"
        if _HTML_BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in _HTML_HIDDEN))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if _HTML_BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if self.verbatim:
            self.parts.append(data)
            return
        inline = " ".join(data.split())
        after = " " if data[-1:].isspace() else ""
        before = " " if inline and data[:1].isspace() else ""
        if not self.parts or self.parts[-1].endswith(("\n", " ")):
            before, after = "", after if inline else ""
        self.parts.append(f"{before}{inline}{after}")


def html_to_text(html: str) -> str:
    """The visible text of a page: blocks on lines of their own, at most one blank line between; no scripts."""
    parser = _HtmlText()
    parser.feed(html)
    parser.close()
    lines: list[str] = []
    for line in map(str.rstrip, "".join(parser.parts).split("\n")):
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")


_READERS: dict[str, Callable[[io.BufferedReader, str, str | None], Iterator[Document]]] = {
    "text": _read_text,
    "html": _read_html,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".py"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
