"""`load_dictionary`: finds out which format a folder or file has, reads it, and says what is special about it.

A name is, in this order: a folder or file on this disk, `"demo"`, `hf://owner/repo/folder`, or `release/id` of a release that
`releases.json` lists.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from microtome.common.assets import shipped_or
from microtome.common.device import parse_device, parse_dtype
from microtome.common.errors import ArtifactError, ConfigError, unknown_name
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.dictionary_set import DictionarySet
from microtome.dictionary.formats.circuit_tracer import FILE as LAYER_FILE
from microtome.dictionary.formats.circuit_tracer import FORMAT as CIRCUIT_TRACER
from microtome.dictionary.formats.dictionary_learning import FORMAT as DICTIONARY_LEARNING
from microtome.dictionary.formats.gemma_scope import FORMAT as GEMMA_SCOPE
from microtome.dictionary.formats.gemma_scope_2 import FORMAT as GEMMA_SCOPE_2
from microtome.dictionary.formats.hub import HUB, fetch
from microtome.dictionary.formats.llama_scope import FORMAT as LLAMA_SCOPE
from microtome.dictionary.formats.llamascopium import FORMAT as LLAMASCOPIUM
from microtome.dictionary.formats.mntss import FORMAT as MNTSS
from microtome.dictionary.formats.openai import FORMAT as OPENAI
from microtome.dictionary.formats.own import FORMAT as OWN
from microtome.dictionary.formats.qwen_scope import FILE as QWEN_FILE
from microtome.dictionary.formats.qwen_scope import FORMAT as QWEN_SCOPE
from microtome.dictionary.formats.reading import AnyDictionary, Format, Hints, Reading
from microtome.dictionary.formats.releases import find_release
from microtome.dictionary.formats.saelens import FORMAT as SAELENS
from microtome.dictionary.formats.sparsify import FORMAT as SPARSIFY
from microtome.dictionary.formats.temporal import FORMAT as TEMPORAL
from microtome.dictionary.temporal import TemporalDictionary

DictionaryOrSet = AnyDictionary | DictionarySet
FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        SAELENS,
        OWN,
        DICTIONARY_LEARNING,
        SPARSIFY,
        GEMMA_SCOPE,
        GEMMA_SCOPE_2,
        OPENAI,
        LLAMASCOPIUM,
        LLAMA_SCOPE,
        MNTSS,
        CIRCUIT_TRACER,
        QWEN_SCOPE,
        TEMPORAL,
    )
}


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Files on this disk, and what the name that led to them says."""

    path: Path
    format: str | None = None
    hints: Hints = field(default_factory=Hints)
    notes: tuple[str, ...] = ()


def read_dictionary(name: str | Path, format: str | None = None, hints: Hints | None = None) -> Reading:  # noqa: A002
    """A dictionary of any format, in float32 on the CPU, with the name of the format and notes on what is special.

    Raises ArtifactError for a name that leads nowhere, a folder of no known format (or of several), damaged files, and
    kinds that cannot be read; ConfigError for an unknown `format`.
    """
    place = _find(name, hints or Hints())
    chosen = format or place.format
    if chosen is not None and chosen not in FORMATS:
        raise unknown_name("dictionary format", chosen, FORMATS)
    reader = FORMATS[chosen] if chosen else detect_format(place.path)
    if chosen and not reader.detect(place.path):
        raise ArtifactError(
            f"{place.path} is not of the format {chosen}", got=_listing(place.path), expected=reader.looks
        )
    with torch.no_grad():
        reading = reader.read(place.path, place.hints)
    reading.dictionary.requires_grad_(False)
    return Reading(dictionary=reading.dictionary, format=reading.format, notes=(*place.notes, *reading.notes))


def load_dictionary(
    name: str | Path,
    format: str | None = None,  # noqa: A002 - the word that users look for
    *,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
    norm_scaling_factor: float | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Dictionary:
    """Open the dictionary `name`: a folder or file, `"demo"` (the one that ships with Microtome), `hf://owner/repo/folder`,
    or `release/id` (docs/dictionary_formats.md lists both formats and releases).

    `format` is found out from the files. `hook_name`, `hook_name_out` and `model_name` say where it belongs when the files do not
    (or say it wrongly); `norm_scaling_factor` is the scale of its activations in training, where that is not saved.

    Raises ArtifactError for a name that leads nowhere, a folder of no format or of several, and a dictionary that is damaged or
    of a kind that cannot be read; ConfigError for an unknown format, device or dtype.
    """
    hints = _hints(hook_name, hook_name_out, model_name, norm_scaling_factor)
    made = _placed(read_dictionary(name, format, hints), device, dtype)
    if isinstance(made, CrossLayerTranscoder):
        raise ArtifactError(f"{name} is a cross-layer transcoder", fix="Open it with load_cross_layer_transcoder")
    if isinstance(made, TemporalDictionary):
        raise ArtifactError(
            f"{name} is a temporal dictionary, whose codes depend on the tokens before",
            fix="Open it with load_any_dictionary",
        )
    return made


def load_cross_layer_transcoder(
    name: str | Path,
    format: str | None = None,  # noqa: A002
    *,
    model_name: str | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> CrossLayerTranscoder:
    """Open a cross-layer transcoder; names and errors are those of `load_dictionary`."""
    made = load_any_dictionary(name, format, model_name=model_name, device=device, dtype=dtype)
    if not isinstance(made, CrossLayerTranscoder):
        raise ArtifactError(
            f"{name} is no cross-layer transcoder", got=made.architecture, fix="Open it with load_dictionary"
        )
    return made


def load_any_dictionary(
    name: str | Path,
    format: str | None = None,  # noqa: A002
    *,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
    norm_scaling_factor: float | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> AnyDictionary:
    """Open a dictionary of any class, for what works with all of them, a temporal one among them; names, hints and errors
    are those of `load_dictionary`."""
    hints = _hints(hook_name, hook_name_out, model_name, norm_scaling_factor)
    return _placed(read_dictionary(name, format, hints), device, dtype)


def _placed(reading: Reading, device: str, dtype: str) -> AnyDictionary:
    return reading.dictionary.to(device=parse_device(device), dtype=parse_dtype(dtype))


def load_dictionaries(path: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> list[Dictionary]:
    """All dictionaries in a folder of folders (of any formats), or of files of single layers, in the order of their names, 2
    before 10.

    Raises ArtifactError when there is none, or one cannot be read.
    """
    return [load_dictionary(each, device=device, dtype=dtype) for each in _members(Path(path))]


def load_dictionary_set(path: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DictionarySet:
    """The dictionaries of a folder of folders as one: transcoders of several layers, say, as `microtome train --per-layer`
    writes them. Raises as `load_dictionaries` does, and ConfigError for dictionaries that make no set."""
    folder, members = Path(path), []
    for each in _members(folder):
        member = load_any_dictionary(each, device=device, dtype=dtype)
        if not isinstance(member, Dictionary):
            several = isinstance(member, CrossLayerTranscoder)
            raise ConfigError(
                f"The dictionaries in {folder} are no set: those of a set have one point each, and codes of its rows alone",
                got=f"a {'cross-layer transcoder' if several else 'temporal dictionary'} in {each.name}",
                fix=f"Name one of them ({each}), or compare them (microtome compare)",
            )
        members.append(member)
    made = DictionarySet(members)
    made.path = folder
    return made


def load_dictionary_or_set(name: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DictionaryOrSet:
    """Whatever `name` holds: a dictionary of either class, or a folder of several that make a set. Names and errors are
    those of `load_dictionary` and `load_dictionary_set`."""
    path = Path(name)
    if path.is_dir() and not _is_dictionary(path) and _folders(path):
        return load_dictionary_set(path, device=device, dtype=dtype)
    return load_any_dictionary(name, device=device, dtype=dtype)


def _folders(path: Path) -> list[Path]:
    """What is in this folder and holds a dictionary, 2 before 10: folders, and the files of releases with one for each layer."""
    inside = [each for each in path.iterdir() if each.is_dir() or _of_a_layer(each)] if path.is_dir() else []
    return [each for each in sorted(inside, key=_natural) if _is_dictionary(each)]


def _of_a_layer(file: Path) -> bool:
    return any(name.fullmatch(file.name) for name in (LAYER_FILE, QWEN_FILE))


def _members(path: Path) -> list[Path]:
    """All in it that holds a dictionary. Raises ArtifactError when there is none."""
    found = _folders(path)
    if not found:
        raise ArtifactError(f"There are no dictionaries in {path}", got=_listing(path), expected="a folder for each")
    return found


def _is_dictionary(path: Path) -> bool:
    return any(each.detect(path) for each in FORMATS.values())


def detect_format(path: Path) -> Format:
    """The one format that a folder or file has. Raises ArtifactError when that is none or more than one."""
    if not path.exists():
        raise ArtifactError(f"There is no dictionary at {path}", got="no such folder or file", expected=_looks())
    found = [each for each in FORMATS.values() if each.detect(path)]
    if len(found) == 1:
        return found[0]
    if not found:
        fix = "Open them together with load_dictionary_set" if _folders(path) else None
        raise ArtifactError(f"There is no dictionary at {path}", got=_listing(path), expected=_looks(), fix=fix)
    raise ArtifactError(
        f"{path} could be of several formats",
        got=f"{_listing(path)}: {' or '.join(each.name for each in found)}",
        fix=f"Say which: format={found[0].name!r}",
    )


def _find(name: str | Path, hints: Hints) -> _Place:
    path = shipped_or(name, "dictionary")
    if path.exists():
        return _Place(path=_unit(path), hints=hints)
    text = re.sub("^hf:/+", HUB, str(name))  # a Path has only one of the slashes
    if text.startswith(HUB):
        return _Place(path=_unit(fetch(text)), hints=hints)
    release = find_release(text)
    if release is None:
        return _Place(path=path, hints=hints)
    fetched = fetch(f"{HUB}{release.repo}/{release.folder}")
    return _Place(path=_unit(fetched), format=release.format, hints=release.hinted(hints), notes=release.notes)


def _unit(path: Path) -> Path:
    """A weights file that has its config beside it stands for its folder."""
    names = {
        "ae.pt",
        "params.npz",
        "params.safetensors",
        "params_layer_0.safetensors",
        "sae.safetensors",
        "sae_weights.safetensors",
        "sae_weights.pt",
        "cfg.json",
        "config.json",
    }
    return path.parent if path.is_file() and path.name in names else path


def _hints(hook: str | None, hook_out: str | None, model: str | None, factor: float | None) -> Hints:
    return Hints(hook_name=hook, hook_name_out=hook_out, model_name=model, norm_scaling_factor=factor)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _listing(path: Path) -> str:
    if not path.is_dir():
        return f"the file {path.name}" if path.exists() else "nothing"
    names = sorted(each.name for each in path.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"a folder with {', '.join(names[:8]) or 'nothing in it'}{more}"


def _looks() -> str:
    return "; ".join(f"{each.looks} ({each.name})" for each in FORMATS.values())
