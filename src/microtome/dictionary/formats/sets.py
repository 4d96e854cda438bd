"""`load_dictionary_set`: the dictionaries of one folder, a hub repository or a release, as one or as a list.

1. The name is split into a folder and, where it has one, a glob: `hf://owner/repo/layer_[0-7].safetensors`.
2. The members are what circuit-tracer's `config.yaml` in it names, or where there is no such list, what the folder holds.
3. Each is read as `load_dictionary` reads it.
"""

import re
from dataclasses import dataclass
from functools import cached_property
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
    wanted = _Choice.of(name)
    return [plain(to_device(read_place(each), device, dtype), str(each.path)) for each in wanted.members()]


def load_dictionary_set(name: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DictionarySet:
    """The dictionaries of a folder as one: transcoders of several layers, say, as `microtome train --per-layer` writes
    them. Names are those of `load_dictionaries`; raises as it does, and ConfigError for dictionaries that make no set."""
    return _joined(_Choice.of(name), device, dtype)


def load_dictionary_or_set(name: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DictionaryOrSet:
    """Whatever `name` holds: a dictionary of any class, or several that make a set. Names and errors are those of
    `load_dictionary` and `load_dictionary_set`."""
    wanted = _Choice.of(name)
    one = wanted.chosen is None and not listed(wanted.place.path)
    if one and (is_dictionary(wanted.place.path) or not wanted.found):
        return to_device(read_place(wanted.place), device, dtype)
    return _joined(wanted, device, dtype)


def split_glob(name: str | Path) -> tuple[str, str | None]:
    """The folder that a name begins with, and the glob that chooses in it; None where it has none, as the name of what is on
    this disk. Raises ArtifactError for a glob that leads out of the folder, or is none."""
    text = str(name)
    place, mark, revision = text.partition("?revision=")
    if Path(text).exists() or not _MAGIC.search(place):
        return text, None
    parts = place.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    chosen = parts[first:]
    if ".." in chosen or any("**" in part and part != "**" for part in chosen):
        raise ArtifactError("No glob in a folder", got="/".join(chosen), expected="names with *, ? or [...] in them")
    folder = "/".join(parts[:first])
    return (f"{folder}/." if first == 1 else folder or ".") + mark + revision, "/".join(chosen)


def _joined(wanted: "_Choice", device: str, dtype: str) -> DictionarySet:
    members = []
    for each in wanted.members():
        member = to_device(read_place(each), device, dtype)
        if not isinstance(member, Dictionary):
            several = isinstance(member, CrossLayerTranscoder)
            raise ConfigError(
                f"The dictionaries in {wanted.place.path} are no set: those of a set have one point each, and codes of its "
                "rows alone",
                got=f"a {'cross-layer transcoder' if several else 'temporal dictionary'} in {each.path.name}",
                fix=f"Name one of them ({each.path}), or compare them (microtome compare)",
            )
        members.append(member)
    made = DictionarySet(members)
    made.path = wanted.place.path / (wanted.chosen or "")
    return made


@dataclass(frozen=True)
class _Choice:
    """A folder with dictionaries, and the glob that chooses among them, where one is given."""

    place: Place
    chosen: str | None

    @classmethod
    def of(cls, name: str | Path) -> "_Choice":
        """What `name` says. Raises ArtifactError for a folder that cannot be fetched."""
        folder, chosen = split_glob(name)
        return cls(find(folder, Hints()) if chosen is None else find(folder, Hints(), chosen), chosen)

    @cached_property
    def found(self) -> list[Place]:
        """What the folder's config names, as circuit-tracer reads it, or where it names nothing, what the folder holds."""
        named = [] if self.chosen else [find(each.name, each.hints) for each in listed(self.place.path)]
        return named or [self.place.member(each) for each in inside(self.place.path, self.chosen or "*")]

    def members(self) -> list[Place]:
        """`found`. Raises ArtifactError when that is nothing."""
        if not self.found:
            raise ArtifactError(
                f"There are no dictionaries in {self.place.path}" + (f" called {self.chosen}" if self.chosen else ""),
                got=listing(self.place.path),
                expected="a folder for each, or a file for each layer",
            )
        return self.found
