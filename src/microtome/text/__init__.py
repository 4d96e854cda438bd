"""Floor 1: text. Corpora become documents, documents become token datasets; BOS and padding are decided here only.

`open_corpus` finds text, `tokenize_corpus` packs it into `[n_sequences, context]` on the disk, and `TokenDataset`
reads it back.
"""

from microtome.text.bos import BosWarning, adds_bos, bos_id, encode, pad, pad_id, separator_id, tokenizer_fingerprint
from microtome.text.bpe import train_tokenizer
from microtome.text.corpora import Corpus, FileCorpus, JoinedCorpus, MemoryCorpus, open_corpus
from microtome.text.dataset import DocumentSpan, TokenDataset
from microtome.text.documents import Document
from microtome.text.hub import HubCorpus
from microtome.text.packing import TokenizeConfig, tokenize_corpus

__all__ = [
    "BosWarning",
    "Corpus",
    "Document",
    "DocumentSpan",
    "FileCorpus",
    "HubCorpus",
    "JoinedCorpus",
    "MemoryCorpus",
    "TokenDataset",
    "TokenizeConfig",
    "adds_bos",
    "bos_id",
    "encode",
    "open_corpus",
    "pad",
    "pad_id",
    "separator_id",
    "tokenize_corpus",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
