"""Hugging Face datasets as corpora: `hf:NAME?config=…&split=…&column=…&revision=…`.

A dataset is streamed, never loaded whole. NAME is a dataset of the hub, a folder that `save_to_disk` wrote, or a local
folder of data files. With no network, what an earlier run left in the Hugging Face cache is used. Needs the optional
package `datasets`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtome.common.config import JsonObject
from microtome.common.errors import InputError, MissingDependencyError, unknown_name
from microtome.text.documents import Document, describe_files, text_cell, text_column

OPTIONS = ("config", "split", "column", "revision")
_DEFAULT_SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """One split of one dataset. `rows` is the opened dataset: an iterable of `{column: value}`."""

    dataset: str
    config: str | None
    split: str
    column: str
    revision: str | None
    rows: Any

    @property
    def name(self) -> str:
        return f"hf:{self.dataset}" + (f"/{self.config}" if self.config else "")

    def __iter__(self) -> Iterator[Document]:
        label, number = f"{self.name}/{self.split}", 0
        try:
            for row in self.rows.select_columns([self.column]):
                yield Document(text_cell(row[self.column], f"row {number} of {label}"), f"{label}#{number}")
                number += 1
        except (OSError, ValueError) as error:
            raise InputError(f"Reading {label} failed after {number} rows: {error}", fix="Check the network") from error

    def describe(self) -> JsonObject:
        """Name, config, split, column and revision; for a local folder also its files with sizes and checksums."""
        names = ("dataset", "config", "split", "column", "revision")
        about: JsonObject = {"kind": "huggingface", "name": self.name, **{name: getattr(self, name) for name in names}}
        local = Path(self.dataset)
        if local.is_dir():
            about |= describe_files(
                [(p.relative_to(local).as_posix(), p) for p in sorted(local.rglob("*")) if p.is_file()]
            )
        return about


def open_hub_dataset(name: str, *, column: str | None = None, options: Mapping[str, str] | None = None) -> HubCorpus:
    """Open the dataset and find its text column.

    Raises MissingDependencyError without the package `datasets`, ConfigError for an unknown option, and InputError when
    the dataset, its config, split or column is not there, or cannot be reached.
    """
    given = dict(options or {})
    for option in given:
        if option not in OPTIONS:
            raise unknown_name("option", option, OPTIONS)
    config = given.get("config")
    if _is_saved(name):
        rows, split, revision = *_open_saved(name, given.get("split")), None
    else:
        split = given.get("split", _DEFAULT_SPLIT)
        rows, revision = _stream(name, config, split, given.get("revision"))
    try:
        first = next(iter(rows), None)
    except (OSError, ValueError) as error:
        raise InputError(f"The dataset {name} cannot be read: {error}") from error
    if first is None:
        raise InputError(f"Split {split!r} of the dataset {name} is empty")
    column = text_column({k: isinstance(v, str | None) for k, v in first.items()}, given.get("column", column), name)
    return HubCorpus(dataset=name, config=config, split=split, column=column, revision=revision, rows=rows)


def _is_saved(name: str) -> bool:
    """Whether NAME is a folder that `save_to_disk` wrote."""
    return any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "Reading a Hugging Face dataset needs the package datasets", fix="pip install 'microtome[hub]'"
        ) from error
    return datasets


def _open_saved(name: str, split: str | None) -> tuple[Any, str]:
    """The rows of one split of what `save_to_disk` wrote, and its name. A dataset with no splits is its own train split."""
    saved = _datasets().load_from_disk(name)
    if isinstance(saved, dict):
        splits = saved
    else:
        own = str(saved.split or _DEFAULT_SPLIT)
        splits, split = {own: saved}, split or own
    split = split or _DEFAULT_SPLIT
    if split not in splits:
        raise unknown_name(f"split of {name}", split, splits, InputError)
    return splits[split], split


def _stream(name: str, config: str | None, split: str, revision: str | None) -> tuple[Any, str | None]:
    """The rows of one split, read as they are asked for, and the revision that was found."""
    datasets = _datasets()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        return builder.as_streaming_dataset(split=split), _revision(builder)
    except ConnectionError as error:
        raise InputError(
            f"The dataset {name} is not on this machine and the Hugging Face hub cannot be reached",
            fix="Check the network, or copy the dataset here (save_to_disk, or its files) and name the folder: hf:./folder",
        ) from error
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"The dataset {name} (config {config}, split {split!r}) cannot be opened: {error}") from error


def _revision(builder: Any) -> str | None:
    """The commit of a hub dataset, from an address like `hf://datasets/NAME@COMMIT`; else the hash of a cached copy."""
    _, at, commit = str(builder.base_path or "").partition("@")
    return commit.split("/")[0] if at else builder.hash
