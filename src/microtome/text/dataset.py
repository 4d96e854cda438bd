"""`TokenDataset`: token ids on disk as one array `[n_sequences, context]`, memory-mapped, and where each is from.

The artifact is a folder of

- `tokens.npy`: the ids, `uint16` if the vocabulary fits and else `uint32`, little endian;
- `documents.parquet`: one row a document, in order: `source`, `start` (its first token's place in the stream of all
  tokens, the BOS of the sequences not counted) and `n_tokens`;
- `summary.json`: what was kept and what was left out, and the checksums of these two files.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from microtome.common.artifacts import fingerprint, read_head, read_json, sha256
from microtome.common.config import JsonObject
from microtome.common.errors import ArtifactError, InputError
from microtome.text.document_table import DocumentTable

KIND = "token_dataset"
TOKENS, DOCUMENTS, SUMMARY = "tokens.npy", "documents.parquet", "summary.json"


@dataclass(frozen=True, kw_only=True)
class DocumentSpan:
    """The part of one document that lies in one sequence."""

    document: int  # number of the document, from 0; documents without tokens have none
    source: str
    start: int  # first and behind-last position in the sequence
    stop: int
    offset: int  # how many tokens of the document lie before `start`


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """Sequences `first … last - 1` of the artifact at `path`. Opening reads no tokens; views share one file.

    `config` is what the dataset was made with and `summary` what came of it.
    """

    path: Path
    config: JsonObject
    summary: JsonObject
    first: int
    last: int
    documents: DocumentTable = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> "TokenDataset":
        """The whole dataset at `path`. Raises ArtifactError if there is none, or a file is missing or has another length."""
        path = Path(path)
        config = read_head(path, KIND)
        if not (path / SUMMARY).is_file():
            raise _damaged(path / SUMMARY, "no file", "the counts and checksums")
        summary = read_json(path / SUMMARY)
        for name, about in summary["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else "no"
            if size != about["bytes"]:
                raise _damaged(path / name, f"{size} bytes", f"{about['bytes']} bytes")
        documents = DocumentTable(path / DOCUMENTS)
        return cls(path=path, config=config, summary=summary, first=0, last=summary["n_sequences"], documents=documents)

    def __len__(self) -> int:
        return self.n_sequences

    @property
    def n_sequences(self) -> int:
        return self.last - self.first

    @property
    def n_tokens(self) -> int:
        """Tokens in this view, the BOS of each sequence counted."""
        return self.n_sequences * self.context

    @property
    def context(self) -> int:
        return int(self.config["tokenize"]["context"])

    @property
    def bos_id(self) -> int | None:
        """The id at position 0 of every sequence; None if sequences start with text."""
        bos: int | None = self.config["bos_id"]
        return bos

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that packing put in (BOS, separator), sorted.

        Models give such tokens activations unlike any text's, so they are left out of training and statistics.
        """
        ids = (self.config["bos_id"], self.config["separator_id"])
        return tuple(sorted({int(i) for i in ids if i is not None}))

    @property
    def vocabulary_size(self) -> int:
        return int(self.config["tokenizer"]["vocabulary_size"])

    @property
    def fingerprint(self) -> str:
        """Names the tokens of this view: equal for equal content, wherever it is."""
        about = {"sha256": self.summary["files"][TOKENS]["sha256"], "context": self.context, "bos_id": self.bos_id}
        whole = self.n_sequences == self.summary["n_sequences"]
        return fingerprint(about if whole else {**about, "first": self.first, "last": self.last})

    @cached_property
    def tokens(self) -> UInt[np.ndarray, "sequence context"]:
        """All ids of this view, memory-mapped and read-only."""
        tokens: np.ndarray = np.load(self.path / TOKENS, mmap_mode="r")
        return tokens[self.first : self.last]

    def batch(self, start: int, stop: int) -> Int[np.ndarray, "sequence context"]:
        """Sequences `start … stop - 1` as int64 in memory. Raises InputError outside the dataset."""
        self._within(start, stop)
        return self.tokens[start:stop].astype(np.int64)

    def slice(self, start: int, stop: int) -> "TokenDataset":
        """A view of sequences `start … stop - 1`, numbered from 0 again."""
        self._within(start, stop)
        return replace(self, first=self.first + start, last=self.first + stop)

    def split(self, first: float) -> tuple["TokenDataset", "TokenDataset"]:
        """Two views: the first `first` (between 0 and 1) of the sequences, and the rest.

        No sequence is in both; a document that lies across the border has tokens in both. Raises InputError if one part
        would be empty.
        """
        border = round(self.n_sequences * first)
        if not 0 < border < self.n_sequences:
            raise InputError(
                f"A split at {first} leaves one part empty",
                got=f"{self.n_sequences} sequences",
                expected="0 < first < 1",
            )
        return self.slice(0, border), self.slice(border, self.n_sequences)

    def document_of(self, sequence: int) -> list[DocumentSpan]:
        """The documents in a sequence, in order. A separator belongs to none."""
        self._within(sequence, sequence + 1)
        n_bos = int(self.bos_id is not None)
        body = self.context - n_bos
        begin = (self.first + sequence) * body
        return [
            DocumentSpan(
                document=number,
                source=row.source,
                start=n_bos + max(row.start - begin, 0),
                stop=n_bos + min(row.start + row.n_tokens - begin, body),
                offset=max(begin - row.start, 0),
            )
            for number, row in self.documents.between(begin, begin + body)
        ]

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises ArtifactError at the first that differs."""
        for name, about in self.summary["files"].items():
            found = sha256(self.path / name)
            if found != about["sha256"]:
                raise _damaged(self.path / name, f"SHA-256 {found}", about["sha256"])

    def _within(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.n_sequences:
            raise InputError(
                "These sequences are not in the dataset",
                got=f"{start} to {stop}",
                expected=f"within 0 to {self.n_sequences}",
            )

    def __getstate__(self) -> dict[str, Any]:
        """For another process: where the tokens are, not the tokens."""
        return {key: value for key, value in self.__dict__.items() if key != "tokens"}


def _damaged(path: Path, got: object, expected: object) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged",
        got=got,
        expected=expected,
        fix="Make the dataset again with the command in its provenance",
    )
