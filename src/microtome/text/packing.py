"""From a corpus to a `TokenDataset`: tokenize in batches, join the documents to one stream, cut it into sequences.

    documents    d1 d1 d1 | d2 d2 | d3 …
    stream       d1 d1 d1 SEP d2 d2 SEP d3 …
    sequences    BOS d1 d1 d1      BOS d2 d2 SEP      BOS d3 …

The stream is cut every `context - 1` tokens (`context` where there is no BOS), so no token is lost at a cut. Where a
document ends exactly at the end of a sequence, the next BOS separates already and the separator is left out. What does
not fill the last sequence is left out and counted. Tokens go to the disk as they come: memory holds one batch.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Integer

from microtome.common.artifacts import atomic_file, draft, sha256, write_json
from microtome.common.config import JsonObject, require, to_dict
from microtome.common.errors import ConfigError, InputError
from microtome.common.progress import progress
from microtome.text.bos import AUTO, BosWarning, Tokenizer, bos_id, encode_plain, separator_id, tokenizer_fingerprint
from microtome.text.corpora import Corpus
from microtome.text.dataset import DOCUMENTS, KIND, SUMMARY, TOKENS, TokenDataset
from microtome.text.document_table import DocumentRow, DocumentTableWriter
from microtome.text.documents import Document

_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """How a corpus becomes sequences.

    `context` is the length of a sequence, its BOS counted. `bos` and `separator` are "auto", "none" or a token (see
    `microtome.text.bos`). `max_tokens` bounds the tokens of the dataset, BOS counted. `batch_documents` changes the
    speed and nothing else.
    """

    context: int = 128
    bos: str = AUTO
    separator: str = AUTO
    max_tokens: int | None = None
    batch_documents: int = 256

    def __post_init__(self) -> None:
        require(
            self.context >= 2,
            "A context shorter than two tokens has nothing to predict",
            got=self.context,
            expected="2 or more",
        )
        require(self.batch_documents >= 1, "A batch holds at least one document", got=self.batch_documents)
        enough = self.max_tokens is None or self.max_tokens >= self.context
        require(enough, "max_tokens is less than one sequence", got=self.max_tokens, expected=f"{self.context} or more")


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    config: TokenizeConfig | None = None,
    max_context: int | None = None,
    overwrite: bool = False,
) -> TokenDataset:
    """Tokenize `corpus` into the artifact `out` and open it.

    `max_context` is the longest input that the model takes, where it is known. The same corpus, tokenizer and config give
    the same bytes. Interrupted, it leaves nothing behind. Raises ConfigError for a context that is too long, InputError
    for a corpus that cannot be read or does not fill one sequence, ArtifactError if `out` is there or the disk is full.
    """
    config = config or TokenizeConfig()
    _check_context(config.context, tokenizer, max_context)
    bos, separator = bos_id(tokenizer, config.bos), separator_id(tokenizer, config.separator)
    head = _head(corpus.name, tokenizer, config, bos, separator)
    artifact = draft(out, KIND, head, overwrite=overwrite)
    try:
        with (
            atomic_file(artifact.folder / TOKENS) as tokens_path,
            atomic_file(artifact.folder / DOCUMENTS) as documents_path,
            TokenFileWriter(tokens_path, config.context, head["tokenizer"]["vocabulary_size"]) as tokens,
            DocumentTableWriter(documents_path) as documents,
        ):
            packer = Packer(tokens, documents, config, bos, separator)
            _pack(corpus, tokenizer, config, packer)
            counts = packer.finish(corpus.name)
        files = {name: _about(artifact.folder / name) for name in (TOKENS, DOCUMENTS)}
        write_json(artifact.folder / SUMMARY, {**counts, "files": files})
        artifact.publish(overwrite=overwrite, corpus=corpus.describe())
    except BaseException:
        artifact.discard()
        raise
    if counts["n_bos_in_text"]:
        warnings.warn(
            f"The text of {corpus.name} itself spells the BOS token {counts['n_bos_in_text']} times: these stand inside "
            "sequences, where a model may take them for a start",
            BosWarning,
            stacklevel=2,
        )
    return TokenDataset.open(out)


def _check_context(context: int, tokenizer: Tokenizer, max_context: int | None) -> None:
    limits = {"the model": max_context, "the tokenizer": tokenizer.model_max_length}
    for whose, limit in limits.items():
        if limit is not None and context > limit:
            raise ConfigError(
                f"A context of {context} tokens is longer than {whose} takes", expected=f"{limit} or less"
            )


def _head(
    corpus: str, tokenizer: Tokenizer, config: TokenizeConfig, bos: int | None, separator: int | None
) -> JsonObject:
    """What goes into `config.json`: all that the tokens depend on. The size of a batch is not of it."""
    about_tokenizer = {
        "name": Path(tokenizer.name_or_path).name if Path(tokenizer.name_or_path).exists() else tokenizer.name_or_path,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocabulary_size": max(tokenizer.get_vocab().values()) + 1,
    }
    settings = to_dict(config)
    del settings["batch_documents"]
    return {
        "tokenize": settings,
        "corpus": corpus,
        "tokenizer": about_tokenizer,
        "bos_id": bos,
        "separator_id": separator,
    }


def _about(path: Path) -> JsonObject:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _pack(corpus: Corpus, tokenizer: Tokenizer, config: TokenizeConfig, packer: "Packer") -> None:
    with progress(config.max_tokens, f"tokenize {corpus.name}", "tokens") as bar:
        for batch in _batches(corpus, config.batch_documents):
            for document, ids in zip(batch, encode_plain(tokenizer, [d.text for d in batch]), strict=True):
                packer.add(document.source, ids)
            bar.advance(packer.flush())
            if packer.full:
                return


def _batches(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    """Up to `most` documents at a time, fewer where they are long."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= most or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class TokenFileWriter:
    """A `.npy` file of `[n, context]` that grows row by row; a context manager. The header gets its `n` at the end."""

    def __init__(self, path: Path, context: int, vocabulary_size: int) -> None:
        self.dtype = np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")
        self.context = context
        self.n_sequences = 0
        self.file = path.open("wb")
        self._write_header()

    def append(self, rows: Integer[np.ndarray, "sequence context"]) -> None:
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.n_sequences += len(rows)

    def _write_header(self) -> None:
        """NumPy leaves room in the header for the first axis to grow, so the second one is as long as the first."""
        shape = (self.n_sequences, self.context)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.file:
            if kind is None:
                self.file.seek(0)
                self._write_header()


class Packer:
    """Takes documents as ids and gives out whole sequences, to `tokens`, and whose they are, to `documents`.

    `place` is where in the stream the next token goes. `full` says that `max_tokens` is reached: what is added then is
    not counted.
    """

    def __init__(
        self,
        tokens: TokenFileWriter,
        documents: DocumentTableWriter,
        config: TokenizeConfig,
        bos: int | None,
        separator: int | None,
    ) -> None:
        self.tokens, self.documents = tokens, documents
        self.bos, self.separator = bos, separator
        self.context = config.context
        self.body = config.context - (bos is not None)
        self.most = None if config.max_tokens is None else config.max_tokens // config.context
        self.place = 0
        self.waiting: list[Integer[np.ndarray, " pos"]] = []  # tokens that are in no sequence yet
        self.waiting_rows: deque[DocumentRow] = deque()  # documents of which no token is in a sequence yet
        self.last_row: DocumentRow | None = None  # of those that went to the file
        self.n_documents = self.n_empty = self.n_given = self.n_bos_in_text = 0

    @property
    def full(self) -> bool:
        return self.most is not None and self.place >= self.most * self.body

    def add(self, source: str, ids: list[int]) -> None:
        """Put one document, and the separator behind it, at the end of the stream."""
        if self.full:
            return
        if not ids:
            self.n_empty += 1
            return
        array = np.array(ids, dtype=self.tokens.dtype)
        self.waiting.append(array)
        self.waiting_rows.append(DocumentRow(source, self.place, len(ids)))
        self.place += len(ids)
        self.n_given += len(ids)
        if self.bos is not None:
            self.n_bos_in_text += int(np.count_nonzero(array == self.bos))
        bos_follows = self.bos is not None and self.place % self.body == 0
        if self.separator is not None and not bos_follows:
            self.waiting.append(np.array([self.separator], dtype=self.tokens.dtype))
            self.place += 1

    def flush(self) -> int:
        """Write the sequences that are complete; how many tokens that were, BOS counted."""
        stream = np.concatenate(self.waiting) if self.waiting else np.empty(0, self.tokens.dtype)
        n = len(stream) // self.body
        if self.most is not None:
            n = min(n, self.most - self.tokens.n_sequences)
        rows = np.empty((n, self.context), dtype=self.tokens.dtype)
        if self.bos is not None:
            rows[:, 0] = self.bos
        rows[:, self.context - self.body :] = stream[: n * self.body].reshape(n, self.body)
        self.tokens.append(rows)
        self.waiting = [stream[n * self.body :].copy()]
        self._write_documents()
        return n * self.context

    def _write_documents(self) -> None:
        end = self.tokens.n_sequences * self.body
        while self.waiting_rows and self.waiting_rows[0].start < end:
            self.last_row = self.waiting_rows.popleft()
            self.documents.append(self.last_row)
            self.n_documents += 1

    def finish(self, corpus: str) -> JsonObject:
        """What was kept and what was left out. Raises InputError if there is not one sequence."""
        n_sequences = self.tokens.n_sequences
        if self.place == 0:
            raise InputError(
                f"The corpus {corpus} has no text", got=f"{self.n_empty} documents, each empty", expected="some text"
            )
        if n_sequences == 0:
            raise InputError(
                f"The corpus {corpus} does not fill one sequence",
                got=f"{self.n_given} tokens",
                expected=f"at least {self.body}",
                fix="Use a shorter context or more text",
            )
        end = n_sequences * self.body
        cut = 0 if self.last_row is None else max(self.last_row.start + self.last_row.n_tokens - end, 0)
        return {
            "n_sequences": n_sequences,
            "n_tokens": n_sequences * self.context,
            "n_documents": self.n_documents,
            "n_documents_empty": self.n_empty,
            "n_documents_left_out": len(self.waiting_rows),
            "n_text_tokens": self.n_given - cut - sum(row.n_tokens for row in self.waiting_rows),
            "n_text_tokens_left_out": cut + sum(row.n_tokens for row in self.waiting_rows),
            "n_bos_in_text": self.n_bos_in_text,
            "stopped_at_max_tokens": self.full,
        }
