"""Corpora: `open_corpus(spec)` turns a name, a path, a glob, a Hugging Face dataset or several of them into documents.

A `Corpus` is iterated, as often as one likes and always in the same order, and describes itself for the provenance.
"""

import glob
import hashlib
import itertools
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import parse_qsl

from microtome.common.assets import DEMO, shipped
from microtome.common.config import JsonObject
from microtome.common.errors import ConfigError, InputError, unknown_name
from microtome.text.documents import FORMATS, Document, describe_files, file_format, read_documents
from microtome.text.hub import open_hub_dataset

STDLIB, HUB = "python-stdlib", "hf:"
_DEMO_FILE = "corpus.jsonl.zst"
_STDLIB_LEFT_OUT = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"))
_OPTIONS = re.compile(r"\?(\w+=[^?&]*(?:&\w+=[^?&]*)*)$")


@runtime_checkable
class Corpus(Protocol):
    """Documents in a fixed order. `describe()` is JSON that tells exactly which text this is."""

    @property
    def name(self) -> str: ...

    def __iter__(self) -> Iterator[Document]: ...

    def describe(self) -> JsonObject: ...


@dataclass(frozen=True)
class FileCorpus:
    """The documents of some files: `(name in the source of a document, path)` each, read in this order."""

    name: str
    files: tuple[tuple[str, Path], ...]
    column: str | None = None

    def __iter__(self) -> Iterator[Document]:
        for name, path in self.files:
            yield from read_documents(path, name, self.column)

    def describe(self) -> JsonObject:
        """Sizes and SHA-256 of the files, which are read once more for it."""
        return {"kind": "files", "name": self.name, "column": self.column, **describe_files(self.files)}


@dataclass(frozen=True)
class MemoryCorpus:
    """Documents that are in memory already."""

    name: str
    documents: tuple[Document, ...]

    @classmethod
    def of(cls, texts: Iterable[str], name: str = "memory") -> "MemoryCorpus":
        return cls(name, tuple(Document(text, f"{name}#{i}") for i, text in enumerate(texts)))

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def describe(self) -> JsonObject:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{len(document.text)}:{document.text}".encode())
        return {"kind": "memory", "name": self.name, "n_documents": len(self.documents), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class JoinedCorpus:
    """Several corpora, one behind the other."""

    parts: tuple[Corpus, ...]

    @property
    def name(self) -> str:
        return ",".join(part.name for part in self.parts)

    def __iter__(self) -> Iterator[Document]:
        for part in self.parts:
            yield from part

    def describe(self) -> JsonObject:
        return {"kind": "joined", "name": self.name, "parts": [part.describe() for part in self.parts]}


def open_corpus(spec: str | Path | Sequence[str | Path], *, column: str | None = None) -> Corpus:
    """The corpus that `spec` names. Nothing is read yet, except that files are looked up.

    `spec` is one of

    - `python-stdlib`: the sources of the running interpreter's standard library, without its tests;
    - `demo`: the small corpus that ships with Microtome;
    - a file, a folder (all files in it with a known ending) or a glob: txt, md, rst, html, jsonl, json, csv, Parquet, each
      also with `.gz` or `.zst`;
    - `hf:NAME?config=…&split=…&column=…&revision=…`: a Hugging Face dataset, or a local copy of one;
    - several of these, in a list or with commas between.

    `column` (or `?column=…` behind a path) says which column of a jsonl, csv or Parquet file is the text; without it that
    is "text", or the only column with strings. Raises ConfigError for an unknown name and InputError for files that are
    not there.
    """
    if not isinstance(spec, str | Path):
        if not spec:
            raise InputError("No corpus was named", expected="at least one")
        parts = tuple(open_corpus(part, column=column) for part in spec)
        return parts[0] if len(parts) == 1 else JoinedCorpus(parts)
    if isinstance(spec, str) and "," in spec and not Path(spec).exists():
        return open_corpus([part.strip() for part in spec.split(",") if part.strip()], column=column)
    where, options = _split_options(str(spec))
    if where.startswith(HUB):
        return open_hub_dataset(where.removeprefix(HUB), column=column, options=options)
    if unknown := set(options) - {"column"}:
        raise unknown_name("option", min(unknown), ["column"])
    column = options.get("column", column)
    if where == STDLIB:
        return _python_stdlib()
    if where == DEMO:
        return _demo()
    return FileCorpus(where, tuple(_find_files(where)), column)


def _split_options(spec: str) -> tuple[str, dict[str, str]]:
    """`"name?key=value&…"` in two. A `?` of a glob is not followed by `key=`."""
    found = _OPTIONS.search(spec)
    return (spec[: found.start()], dict(parse_qsl(found[1], keep_blank_values=True))) if found else (spec, {})


def _find_files(where: str) -> list[tuple[str, Path]]:
    """`(name, path)` of the files that a path or glob means, sorted by name.

    A name is relative to the folder, or to the part of the glob that has no wildcard. Hidden files are not taken.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        return _files_in(path)
    if glob.has_magic(where):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = _visible_files(root, str(path.relative_to(root)))
        if not found:
            hint = "Quote a glob so that the shell leaves it alone; ** goes into folders"
            raise InputError(f"No file matches {where}", fix=hint)
        return found
    if path.parent != Path() or path.suffix:
        raise InputError(f"There is no file or folder {path}")
    raise _unknown_corpus(where)


def _files_in(folder: Path) -> list[tuple[str, Path]]:
    """The files of a folder and its folders that have a known ending; not `.json`, which is mostly about the others."""
    found = _visible_files(folder, "**/*")
    known = [(name, path) for name, path in found if file_format(path)[0] not in (None, "json")]
    if not known:
        endings = ", ".join(sorted({path.suffix or "(none)" for _, path in found}))
        raise InputError(
            f"The folder {folder} holds no text file", got=f"endings {endings or 'none'}", expected=" ".join(FORMATS)
        )
    return known


def _visible_files(root: Path, pattern: str) -> list[tuple[str, Path]]:
    found = [(path.relative_to(root), path) for path in root.glob(pattern) if path.is_file()]
    return sorted((name.as_posix(), path) for name, path in found if not any(p.startswith(".") for p in name.parts))


def _unknown_corpus(name: str) -> ConfigError:
    near_files = [p.name for p in Path().iterdir()]
    error = unknown_name("corpus", name, [STDLIB, DEMO, *near_files])
    return ConfigError(
        f"Unknown corpus {name!r}",
        expected=f"{STDLIB}, {DEMO}, a file, a folder, a glob or {HUB}NAME",
        fix=error.fix,
    )


def _python_stdlib() -> FileCorpus:
    """The standard library's `.py` files in the order of their paths, without tests and what was installed later."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [(p.relative_to(root), p) for p in root.rglob("*.py")]
    kept = sorted(
        (relative.as_posix(), path)
        for relative, path in found
        if not _STDLIB_LEFT_OUT.intersection(relative.parts) and not relative.name.startswith("_sysconfigdata")
    )
    if not kept:
        raise InputError(f"This Python ({sys.version.split()[0]}) comes without the sources of its standard library")
    return FileCorpus(STDLIB, tuple(kept))


def _demo() -> FileCorpus:
    return FileCorpus(DEMO, ((_DEMO_FILE, shipped(f"{DEMO}/corpus/{_DEMO_FILE}")),), "text")
