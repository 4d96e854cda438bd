"""Rows of a user's table, with the place of each for messages: JSONL (any other name), CSV (.csv, .tsv) or Parquet (.parquet)."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microtome.common.errors import InputError

Row = dict[str, Any]


def read_rows(path: Path, expected: str) -> Iterator[tuple[str, Row]]:
    """Each row and where it is. Raises InputError for a file that is not there, cannot be read, or holds no rows; `expected`
    says what it should hold."""
    if not path.is_file():
        raise InputError(f"There is no file {path}", expected=expected)
    read = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _jsonl)
    empty = True
    try:
        for found in read(path):
            empty = False
            yield found
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", expected=expected) from error
    if empty:
        raise InputError(f"{path} holds no rows", expected=expected)


def columns_missing(row: Row, names: tuple[str, ...], where: str, expected: str) -> None:
    """Raise InputError for a row without one of these columns, or with nothing in it."""
    for name in names:
        if name not in row:
            columns = ", ".join(map(repr, row)) or "none"
            raise InputError(f"{where} has no {name!r}", got=f"columns {columns}", expected=expected)
        value = row[name]
        if value is None or value == "" or value != value:  # noqa: PLR0124 – not a number, as tables mark a gap
            raise InputError(f"{where} has nothing in {name!r}", got=str(row)[:80], expected=expected)


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON: {error.msg}", got=line.strip()[:80]) from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is no object", got=line.strip()[:80], expected='{"column": value, …}')
            yield where, row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row:
                    raise InputError(
                        f"{where} has more cells than there are columns", got=len(row) + len(row[None]) - 1
                    )
                yield where, row
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num} is not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", expected="a Parquet file") from error
