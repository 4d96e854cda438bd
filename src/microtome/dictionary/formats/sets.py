"""`load_dictionary_set`: the dictionaries of one folder, a hub repository or a release, as one or as a list.

1. The name is split into a folder and, where it has one, a glob: `hf://owner/repo/layer_[0-7].safetensors`.
2. The members are what the folder holds, or what circuit-tracer's `config.yaml` in it names.
3. Each is read as `load_dictionary` reads it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.dictionary_set import DictionarySet
from microtome.dictionary.formats.circuit_tracer import listed
from microtome.dictionary.formats.load import (
    Place,
    find,
    inside,
    is_dictionary,
    listing,
    plain,
    read_place,
    to_device,
)
from microtome.dictionary.formats.reading import AnyDictionary, Hints

DictionaryOrSet = AnyDictionary | DictionarySet
_MAGIC = re.compile(r"[*?\[]")


def load_dictionaries(name: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> list[Dictionary]:
    """All dictionaries in a folder of folders (of any formats), or of files of single layers, in the order of their names, 2
    before 10; or those that circuit-tracer's `config.yaml` names, in its order.

    `name` is a folder on this disk, `hf://owner/repo[/folder]`, or `release/.`; behind the folder may stand a glob that
    chooses among them, as in `hf://owner/repo/layer_[0-7].safetensors`.

    Raises ArtifactError when there is none, or one cannot be fetched or read; ConfigError for an unknown device or dtype.
    """
    return [plain(to_device(read_place(each), device, dtype), str(each.path)) for each in _members(name)[1]]


def load_dictionary_set(name: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DictionarySet:
    """The dictionaries of a folder as one: transcoders of several layers, say, as `microtome train --per-layer` writes
    them. Names are those of `load_dictionaries`; raises as it does, and ConfigError for dictionaries that make no set."""
    folder, places = _members(name)
    members = []
    for each in places:
        member = to_device(read_place(each), device, dtype)
        if not isinstance(member, Dictionary):
            several = isinstance(member, CrossLayerTranscoder)
            raise ConfigError(
                f"The dictionaries in {name} are no set: those of a set have one point each, and codes of its rows alone",
                got=f"a {'cross-layer transcoder' if several else 'temporal dictionary'} in {each.path.name}",
                fix=f"Name one of them ({each.path}), or compare them (microtome compare)",
            )
        members.append(member)
    made = DictionarySet(members)
    made.path = folder
    return made


def load_dictionary_or_set(name: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DictionaryOrSet:
    """Whatever `name` holds: a dictionary of any class, or several that make a set. Names and errors are those of
    `load_dictionary` and `load_dictionary_set`."""
    if _Name.of(name).chosen is None:
        place = find(name, Hints())
        if is_dictionary(place.path) or not (inside(place.path) or listed(place.path)):
            return to_device(read_place(place), device, dtype)
    return load_dictionary_set(name, device=device, dtype=dtype)


@dataclass(frozen=True)
class _Name:
    """A folder, and the glob behind it."""

    folder: str
    chosen: str | None

    @classmethod
    def of(cls, name: str | Path) -> "_Name":
        text = str(name)
        if Path(name).exists() or not _MAGIC.search(text):
            return cls(text, None)
        parts = text.split("/")
        first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        folder = "/".join(parts[:first])
        return cls(f"{folder}/." if first == 1 else folder or ".", "/".join(parts[first:]))


def _members(name: str | Path) -> tuple[Path, list[Place]]:
    """What stands for all of them as a path, and each. Raises ArtifactError when there is none."""
    split = _Name.of(name)
    place = find(split.folder, Hints(), split.chosen)
    if split.chosen is None and (named := listed(place.path)):
        return place.path, [find(each.name, each.hints) for each in named]
    found = inside(place.path, split.chosen or "*")
    if not found:
        raise ArtifactError(
            f"There are no dictionaries in {place.path}" + (f" called {split.chosen}" if split.chosen else ""),
            got=listing(place.path),
            expected="a folder for each, or a file for each layer",
        )
    return place.path / (split.chosen or ""), [place.member(each) for each in found]
