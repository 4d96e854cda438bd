"""The file formats of the field: each is read, and SAELens's version 6 (with Microtome's own cfg beside it) is written.

One file a format, with `detect` and `read`; `load` chooses among them, `sets` opens several together, `hub` and `releases`
find what is not on this disk, `saelens_write` writes.
"""

from microtome.dictionary.formats.load import (
    FORMATS,
    load_any_dictionary,
    load_cross_layer_transcoder,
    load_dictionary,
    read_dictionary,
)
from microtome.dictionary.formats.reading import Hints, Reading
from microtome.dictionary.formats.saelens import log_sparsity
from microtome.dictionary.formats.saelens_cfg import CFG
from microtome.dictionary.formats.saelens_write import save_dictionary
from microtome.dictionary.formats.sets import (
    DictionaryOrSet,
    load_dictionaries,
    load_dictionary_or_set,
    load_dictionary_set,
)

__all__ = [
    "CFG",
    "FORMATS",
    "DictionaryOrSet",
    "Hints",
    "Reading",
    "load_any_dictionary",
    "load_cross_layer_transcoder",
    "load_dictionaries",
    "load_dictionary",
    "load_dictionary_or_set",
    "load_dictionary_set",
    "log_sparsity",
    "read_dictionary",
    "save_dictionary",
]
