"""Artifacts: folders with `config.json`, data files and `provenance.json`, published by one rename.

1. `draft(target, …)` makes (or, for a resumable kind, finds again) the folder `target.partial`.
2. The writer puts its files there. A resumable writer's files each appear by a rename of their own.
3. `Draft.publish(…)` writes the provenance and renames the folder to `target`.

So `target` is complete or absent, and what a killed writer finished is still in `target.partial`. Two writers of one
target at a time are not possible (`writers.py`).
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from microtome.common.config import JsonObject, difference
from microtome.common.errors import ArtifactError
from microtome.common.writers import Writer

CONFIG, PROVENANCE = "config.json", "provenance.json"
FORMAT = 1
_TRACKED = ("microtome", "torch", "transformers", "safetensors", "tokenizers", "numpy", "pyarrow", "duckdb")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An artifact in the making. `resumed` tells whether an earlier writer's files are in `folder`."""

    folder: Path
    target: Path
    kind: str
    config: JsonObject
    resumed: bool
    writer: Writer = field(repr=False)

    def publish(self, *, overwrite: bool = False, **provenance: Any) -> Path:
        """Write the provenance (`provenance` adds to what every artifact records) and rename into place."""
        write_json(self.folder / PROVENANCE, {**describe_run(), **provenance})
        if self.target.exists():
            if not overwrite:
                raise _exists(self.target)
            old = self.target.with_name(f"{self.target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
            self.folder.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(self.target)
        self.writer.release()
        return self.target

    def discard(self) -> None:
        """Remove what was made so far: for a kind that cannot be resumed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer.release()


def draft(
    target: str | Path,
    kind: str,
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Draft:
    """Begin the artifact `target`, or, with `resume`, go on with one that was begun with the same config.

    Raises ArtifactError when `target` exists and `overwrite` was not said, when a resumable draft was begun with another
    config (naming each difference), or while another process writes the same target.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise _exists(target)
    folder = target.with_name(f"{target.name}.partial")
    writer = Writer(folder)
    head = {"kind": kind, "format": FORMAT, "config": dict(config)}
    resumed = False
    if folder.exists():
        if resume and (folder / CONFIG).exists():
            _same_config(folder, head, overwrite=overwrite)
            resumed = read_json(folder / CONFIG) == json.loads(json.dumps(head))
        if not resumed:
            shutil.rmtree(folder)
        for scrap in folder.rglob(".*.tmp"):  # of a writer that was killed inside `atomic_file`
            scrap.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, head)
    return Draft(folder=folder, target=target, kind=kind, config=dict(config), resumed=resumed, writer=writer)


def _exists(target: Path) -> ArtifactError:
    return ArtifactError(
        f"{target} is already there",
        fix="Choose another folder, or say overwrite=True (--overwrite) to replace it",
    )


def _same_config(folder: Path, head: JsonObject, *, overwrite: bool) -> None:
    there = read_json(folder / CONFIG)
    rows = difference(there, json.loads(json.dumps(head)))
    if rows and not overwrite:
        raise ArtifactError(
            f"{folder} was begun with other settings",
            got="; ".join(rows),
            fix="Use the same settings to go on with it, another folder, or overwrite=True (--overwrite) to start anew",
        )


def read_head(path: str | Path, kind: str) -> JsonObject:
    """The saved config of the artifact at `path`, after checking that it is complete and of this `kind`.

    Raises ArtifactError for a missing, unfinished or foreign folder.
    """
    path = Path(path)
    if not path.is_dir():
        partial = path.with_name(f"{path.name}.partial")
        hint = (
            f"{partial.name} was begun and not finished: run its command again to go on" if partial.exists() else None
        )
        raise ArtifactError(f"There is no {kind} at {path}", fix=hint)
    if not (path / CONFIG).exists():
        raise ArtifactError(
            f"{path} is no Microtome artifact: it has no {CONFIG}", expected=f"a folder that holds a {kind}"
        )
    head = read_json(path / CONFIG)
    if head.get("kind") != kind:
        raise ArtifactError(f"{path} holds something else", got=f"a {head.get('kind')}", expected=f"a {kind}")
    if head.get("format") != FORMAT:
        raise ArtifactError(f"{path} has another format version", got=head.get("format"), expected=FORMAT)
    config = head["config"]
    assert isinstance(config, dict)
    return config


def describe_run() -> JsonObject:
    """What made an artifact: versions, platform, command, time."""
    versions = {}
    for name in _TRACKED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "",
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, the file written there becomes `path`.

    A full disk becomes an ArtifactError, and the half-written file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise ArtifactError(
                f"The disk is full while writing {path}",
                fix="Free some space and run the same command again: what was finished before is kept",
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> JsonObject:
    """The JSON object in `path`; ArtifactError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is damaged", got=type(value).__name__, expected="a JSON object")
    return value


def sha256(path: Path) -> str:
    """The file's SHA-256 as hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Mapping[str, Any]) -> str:
    """Sixteen hex digits that name a JSON object: equal objects have equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
