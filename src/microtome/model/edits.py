"""Edits: interventions as values, to be listed, printed, compared, saved, and put around any run.

    with model.edited([edits.zero("blocks.9.attn.hook_z", head=9), edits.steer("blocks.12.hook_resid_post", v, scale=4.0)]):
        …any run, capture, gradient or generation…

Each function here makes one `Edit`. `name` is a hook point, an alias or a glob; `positions` (numbers or a slice), `head` or
`heads`, `rows` (of the batch) and `units` (entries of the last axis: neurons) say which part of it is meant, and what is
not addressed does not change by a bit. Positions count in each row's own text, also while decoding; negative ones from the
prompt's end. Of a pattern, positions are queries and units are keys. A tensor has the axes of the point or the last few of
them, and a size of 1 broadcasts.
"""

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.artifacts import atomic_file
from microtome.common.errors import ArtifactError, ConfigError, InputError, MicrotomeError, ModelError, unknown_name
from microtome.common.progress import progress
from microtome.model.cache import ActivationCache
from microtome.model.editing import ANY, KINDS, Edit
from microtome.model.hook_point import HookPoint
from microtome.model.hooked import HookedModel
from microtome.model.names import PATTERN, ROUTED, HookName
from microtome.model.places import Where
from microtome.model.points import Names
from microtome.model.prompts import Prompts
from microtome.text import TokenDataset

__all__ = [
    "Edit",
    "clamp",
    "fn",
    "load",
    "mean",
    "mean_of",
    "patch",
    "project_out",
    "resample",
    "save",
    "scale",
    "steer",
]
__all__ += ["zero"]
Name = str | HookName
Source = Tensor | Mapping[str, Tensor]
FORMAT = 1
_HEAD = "microtome.edits"


class Address(TypedDict, total=False):
    """Which part of a point is meant; what is left out means all."""

    positions: int | slice | Sequence[int] | None
    head: int | None
    heads: Sequence[int] | None
    rows: int | Sequence[int] | None
    units: int | Sequence[int] | None


def zero(name: Name, **address: Unpack[Address]) -> Edit:
    """Zeros."""
    return Edit("zero", str(name), _where(address))


def mean(name: Name, value: Source | float, **address: Unpack[Address]) -> Edit:
    """A fixed value in place of the activation: its mean over data, as `mean_of` gives it, or any other."""
    return Edit("mean", str(name), _where(address), tensors=_tensors(name, value))


def patch(name: Name, source: Source, **address: Unpack[Address]) -> Edit:
    """Another run's activation: a tensor, or a cache that has the point (or all points of a glob).

    A source `[batch, pos, …]` lies upon the prompt, column for column; with `positions` it may instead have one entry for
    each of them.
    """
    return Edit("patch", str(name), _where(address), tensors=_tensors(name, source))


def resample(name: Name, source: Source, *, seed: int = 0, **address: Unpack[Address]) -> Edit:
    """Another run's activation with its rows shuffled: each row of the batch gets that of another row, positions kept.

    Raises InputError for a source of one row.
    """
    tensors = _tensors(name, source)
    for tensor in tensors.values():
        if tensor.ndim < 2 or len(tensor) < 2:
            raise InputError("To resample takes several rows", got=list(tensor.shape), expected="[batch, pos, …]")
    return Edit("resample", str(name), _where(address), {"seed": seed}, tensors)


def scale(name: Name, factor: float, **address: Unpack[Address]) -> Edit:
    """The activation times a number."""
    return Edit("scale", str(name), _where(address), {"factor": _number("factor", factor)})


def steer(name: Name, vector: Source | float, *, scale: float = 1.0, **address: Unpack[Address]) -> Edit:
    """`scale` times the vector added. A vector that requires a gradient gets one from what is computed in the block."""
    return Edit("steer", str(name), _where(address), {"scale": _number("scale", scale)}, _tensors(name, vector))


def clamp(
    name: Name,
    *,
    min: float | None = None,  # noqa: A002 - as torch calls them
    max: float | None = None,  # noqa: A002
    direction: Source | None = None,
    **address: Unpack[Address],
) -> Edit:
    """Each number kept between `min` and `max`; with a direction `[d]`, the activation's length along it.

    On `attn.hook_attn_scores`, `max=-inf` takes keys away from a query, and the softmax shares its attention among the rest.
    """
    bounds = {"min": min, "max": max}
    numbers = {key: _number(key, value) for key, value in bounds.items() if value is not None}
    if not numbers or numbers.get("min", -math.inf) > numbers.get("max", math.inf):
        raise ConfigError("clamp needs a min, a max or both, in order", got=bounds)
    tensors = {} if direction is None else _tensors(name, direction)
    where = _where(address)
    if tensors and where.units is not None:
        raise InputError("clamp along a direction acts on whole vectors, it cannot be told units", got=where.units)
    for tensor in tensors.values():
        if tensor.ndim != 1 or not tensor.norm() > 0:
            raise InputError(
                "The direction to clamp along must be a vector [d] that is not zero", got=list(tensor.shape)
            )
    return Edit("clamp", str(name), where, numbers, tensors)


def project_out(name: Name, directions: Source, **address: Unpack[Address]) -> Edit:
    """The activation without its part in the space of the directions `[k, d]` (which need not be orthogonal), or `[d]`."""
    bases = {key: _orthonormal(tensor) for key, tensor in _tensors(name, directions).items()}
    return Edit("project_out", str(name), _where(address), tensors=bases)


def fn(name: Name, function: Callable[[Tensor, HookPoint], Tensor | None], **address: Unpack[Address]) -> Edit:
    """What `function(activation, hook)` makes of the whole activation, taken at the addressed places. Cannot be saved."""
    return Edit("fn", str(name), _where(address), function=function)


# ---- means --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_of(
    model: HookedModel,
    data: TokenDataset | Prompts | Tensor | str | Sequence[str],
    names: Names,
    *,
    positions: slice | None = None,
    batch: int = 16,
) -> ActivationCache:
    """The mean activation at each point over all rows and positions of some text, `[…]` in float64, padding left out.

    `positions=slice(1, None)` leaves out the first token, whose activations are unlike all others. Raises ModelError for
    attention patterns and the points of single experts, of which there is no mean.
    """
    points = model.resolve(names)
    for name in points:
        if name.axes in (PATTERN, ROUTED) or len(name.axes) < 3:
            raise ModelError(f"There is no mean over positions of {name}", got=", ".join(name.axes))
    sums: dict[HookName, Tensor] = {}
    n = 0
    total, batches = _batches(model, data, batch)
    with progress(total, "mean activations", "sequences") as bar:
        for part in batches:
            mask = torch.ones_like(part.tokens, dtype=torch.bool) if part.mask is None else part.mask
            mask = mask if positions is None else mask[:, positions]
            seen = model.activations(part, points, positions=positions)
            n += int(mask.sum())
            for name in points:
                wide = seen[str(name)].expand(
                    len(mask), *[-1] * (len(name.axes) - 1)
                )  # position embeddings are one row
                added = wide[mask].double().sum(0)
                sums[name] = sums[name] + added if name in sums else added
            bar.advance(len(mask))
    if not n:
        raise InputError("There is nothing to take a mean of: no position is left", got=f"positions {positions}")
    return ActivationCache({name: total / n for name, total in sums.items()})


def _batches(model: HookedModel, data: Any, batch: int) -> tuple[int, Iterator[Prompts]]:
    """How many sequences there are, and batches of them."""
    if isinstance(data, TokenDataset):
        size = data.n_sequences
        rows = (data.batch(i, min(i + batch, size)) for i in range(0, size, batch))
        return size, (Prompts(torch.from_numpy(ids).to(model.device)) for ids in rows)
    whole = data if isinstance(data, Prompts) else Prompts(data) if isinstance(data, Tensor) else model.prompts(data)
    masks = [None] * len(whole.tokens) if whole.mask is None else whole.mask.split(batch)
    parts = zip(whole.tokens.split(batch), masks, strict=False)
    return len(whole.tokens), (Prompts(ids, mask) for ids, mask in parts)


# ---- files --------------------------------------------------------------------------------------------------------------


def save(path: str | Path, edits: Sequence[Edit]) -> Path:
    """Write a list of edits as one safetensors file, the tensors as such and the rest as JSON in its metadata.

    Raises ConfigError for an `fn` edit, which holds code.
    """
    tensors: dict[str, Tensor] = {}
    rows = []
    for i, edit in enumerate(edits):
        if edit.function is not None:
            raise ConfigError(f"An edit made of a function cannot be saved: {edit!r}", fix="Save the others without it")
        keys = {f"{i}.{key}": tensor for key, tensor in edit.tensors.items()}
        tensors |= {key: tensor.detach().cpu().clone().contiguous() for key, tensor in keys.items()}
        where = {key: _plain(value) for key, value in vars(edit.where).items() if value is not None}
        rows.append({"kind": edit.kind, "name": edit.name, "where": where, "numbers": dict(edit.numbers)})
    head = json.dumps({"format": FORMAT, "edits": rows})
    with atomic_file(Path(path)) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={_HEAD: head})
    return Path(path)


def load(path: str | Path) -> list[Edit]:
    """The edits of a file that `save` wrote. Raises ArtifactError for another or a damaged file."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            head = (file.metadata() or {}).get(_HEAD)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a safetensors file ({error})") from error
    if head is None:
        raise ArtifactError(f"{path} holds no edits", expected="a file that microtome.edits.save wrote")
    try:
        data = _exactly(json.loads(head), {"format", "edits"})
        if data["format"] != FORMAT:
            raise ArtifactError(f"{path} has another format version", got=data["format"], expected=FORMAT)
        made = [_edit(row, i, tensors) for i, row in enumerate(data["edits"])]
    except (MicrotomeError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} does not hold a list of edits. {error}") from error
    if tensors:
        raise ArtifactError(f"{path} holds tensors of no edit", got=", ".join(tensors))
    return made


def _edit(row: Any, i: int, tensors: dict[str, Tensor]) -> Edit:
    row = _exactly(row, {"kind", "name", "where", "numbers"})
    unknown = row["where"].keys() - vars(Where()).keys()
    if unknown:
        raise unknown_name("part of an address", min(unknown), vars(Where()))
    found = row["where"]
    rest = {key: _places(key, found.get(key)) for key in ("heads", "rows", "units")}
    where = Where(positions=_rich(found.get("positions")), **rest)
    numbers = {key: _number(key, value) for key, value in row["numbers"].items()}
    mine = [key for key in tensors if key.startswith(f"{i}.")]
    own = {key.partition(".")[2]: tensors.pop(key) for key in mine}
    made = Edit(row["kind"], str(row["name"]), where, numbers, own)
    if made.kind == "fn" or (bool(own) != bool(KINDS[made.kind].tensor) and made.kind != "clamp"):
        raise ConfigError(f"The {made.kind} edit at {made.name} lacks a part or has one too many")
    return made


def _exactly(data: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict) or data.keys() != keys:
        raise ConfigError("The keys are others", got=sorted(data), expected=sorted(keys))
    return data


def _plain(value: slice | tuple[int, ...]) -> list[int] | dict[str, int | None]:
    if isinstance(value, slice):
        return {"start": value.start, "stop": value.stop, "step": value.step}
    return list(value)


def _rich(value: Any) -> slice | tuple[int, ...] | None:
    if isinstance(value, dict):
        parts = _exactly(value, {"start", "stop", "step"})
        return _positions(slice(parts["start"], parts["stop"], parts["step"]))
    return _places("positions", value)


# ---- reading what callers give ------------------------------------------------------------------------------------------


def _where(address: Address) -> Where:
    known = Address.__annotations__
    unknown = address.keys() - known.keys()
    if unknown:
        raise unknown_name("part of an address", min(unknown), known)
    head, heads = address.get("head"), address.get("heads")
    if head is not None and heads is not None:
        raise ConfigError("Say either head or heads", got=f"head {head}, heads {heads}")
    return Where(
        positions=_positions(address.get("positions")),
        heads=_places("heads", heads if head is None else head),
        rows=_places("rows", address.get("rows")),
        units=_places("units", address.get("units")),
    )


def _positions(value: Any) -> slice | tuple[int, ...] | None:
    if not isinstance(value, slice):
        return _places("positions", value)
    bounds = (value.start, value.stop, value.step)
    if not all(bound is None or isinstance(bound, int) for bound in bounds) or (value.step or 1) < 1:
        raise ConfigError("A slice of positions has whole bounds and goes forward", got=value)
    return value


def _places(what: str, value: Any) -> tuple[int, ...] | None:
    """Places along an axis: a number, or several, each once."""
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    listed = [value] if isinstance(value, int) else list(value)
    if not listed or not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise ConfigError(f"{what} must be one or several whole numbers", got=value)
    if len(set(listed)) < len(listed):
        raise ConfigError(f"{what} names a place twice", got=value)
    return tuple(listed)


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or math.isnan(value):
        raise ConfigError(f"{what} must be a number", got=value)
    return float(value)


def _tensors(name: Name, source: Source | float) -> dict[str, Tensor]:
    """One tensor for all points of a name, or those of a mapping that the name covers (which is known with the model)."""
    if isinstance(source, Mapping):
        if not any(c in str(name) for c in "*?["):
            return {ANY: source[str(name)]}
        found = {key: tensor for key, tensor in source.items() if fnmatch.fnmatchcase(key, str(name))}
        if not found:
            raise ModelError(f"Nothing in the cache matches {name}", got=", ".join(list(source)[:5]))
        return found
    tensor = torch.as_tensor(source)
    if tensor.is_floating_point() and not tensor.isfinite().all() and not str(name).endswith("attn_scores"):
        raise InputError(f"The tensor for {name} holds values that are not finite", got=list(tensor.shape))
    return {ANY: tensor}


def _orthonormal(directions: Tensor) -> Float[Tensor, "rank d"]:
    """An orthonormal basis of the space of the rows of `[k, d]` or of `[d]`, in float32. Raises InputError if there is none."""
    rows = torch.atleast_2d(directions.detach())
    if rows.ndim != 2 or not rows.is_floating_point():
        raise InputError("Directions to project out are [k, d] or [d]", got=f"{rows.dtype} {list(directions.shape)}")
    _, sizes, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    kept: Tensor = basis[sizes > sizes[0] * max(rows.shape) * torch.finfo(torch.float32).eps]
    if not len(kept) or not sizes[0] > 0:
        raise InputError("The directions to project out are all zero", got=list(directions.shape))
    return kept.float()
