"""Which document each token is from: one Parquet row a document, written as they come, read a row group at a time."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ROWS_PER_GROUP = 1 << 16


@dataclass(frozen=True)
class DocumentRow:
    """A document's source, its place in the stream of all tokens (no BOS counted), and its length in tokens."""

    source: str
    start: int
    n_tokens: int


class DocumentTableWriter:
    """Appends rows in the order of `start`; a context manager that closes the file."""

    def __init__(self, path: Path, rows_per_group: int = ROWS_PER_GROUP) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.rows_per_group = rows_per_group
        columns = [("source", pa.string()), ("start", pa.int64()), ("n_tokens", pa.int64())]
        self.schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])
        self.file = pq.ParquetWriter(path, self.schema, compression="zstd")
        self.rows: list[DocumentRow] = []

    def append(self, row: DocumentRow) -> None:
        self.rows.append(row)
        if len(self.rows) == self.rows_per_group:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = {name: [getattr(row, name) for row in self.rows] for name in self.schema.names}
        self.file.write_table(pa.table(columns, schema=self.schema), row_group_size=self.rows_per_group)
        self.rows = []

    def __enter__(self) -> "DocumentTableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.rows:
            self._flush()
        self.file.close()


class DocumentTable:
    """Finds documents by place. Keeps the starts of the row groups and the row group last used in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._groups: list[tuple[int, int]] | None = None
        self._recent: tuple[int, dict[str, Any]] | None = None

    def between(self, begin: int, end: int) -> Iterator[tuple[int, DocumentRow]]:
        """`(number, row)` of the documents with a token at the places `begin … end - 1`, in order."""
        groups = self._group_starts()
        group = max(bisect.bisect_right([start for _, start in groups], begin) - 1, 0)
        while group < len(groups) and groups[group][1] < end:
            table = self._row_group(group)
            low = max(int(np.searchsorted(table["start"], begin, side="right")) - 1, 0)
            high = int(np.searchsorted(table["start"], end, side="left"))
            for i in range(low, high):
                start, n_tokens = int(table["start"][i]), int(table["n_tokens"][i])
                if start + n_tokens > begin:
                    yield groups[group][0] + i, DocumentRow(table["source"][i].as_py(), start, n_tokens)
            group += 1

    def _group_starts(self) -> list[tuple[int, int]]:
        """`(number, start)` of the first document of each row group, from the statistics in the file's footer."""
        import pyarrow.parquet as pq

        if self._groups is None:
            with pq.ParquetFile(self.path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                at = file.metadata.schema.names.index("start")
            first = np.cumsum([0, *(group.num_rows for group in groups)])
            self._groups = [(int(first[i]), int(group.column(at).statistics.min)) for i, group in enumerate(groups)]
        return self._groups

    def _row_group(self, group: int) -> dict[str, Any]:
        import pyarrow.parquet as pq

        if self._recent is None or self._recent[0] != group:
            with pq.ParquetFile(self.path) as file:
                table = file.read_row_group(group)
            numbers = {name: table[name].to_numpy() for name in ("start", "n_tokens")}
            self._recent = group, {"source": table["source"], **numbers}
        return self._recent[1]

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the path, not what was read."""
        return {"path": self.path, "_groups": None, "_recent": None}
