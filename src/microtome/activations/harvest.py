"""`harvest`: run a model over a token dataset once and keep what flows at some hook points.

1. The dataset is cut into shards of whole sequences, and each shard into batches that start with it.
2. One forward pass per batch serves all hook points and stops at the deepest.
3. A shard appears by a rename when it is complete. A harvest that was killed goes on with the first shard that is
   missing; as batches never cross shards, it ends with the same bytes as one that was not.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from microtome.activations.store import KIND, MANIFEST, ActivationStore, Shard
from microtome.common.artifacts import Draft, atomic_file, draft, read_json, sha256, write_json
from microtome.common.config import JsonObject, difference, require, to_dict
from microtome.common.device import DTypeName, parse_dtype
from microtome.common.errors import ArtifactError, InputError
from microtome.common.progress import progress
from microtome.model import HookedModel
from microtome.text import TokenDataset

_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """How to harvest: the dtype on disk, tokens per forward pass and tokens per shard (both rounded to whole
    sequences). A shard is in memory until it is written, so one of many hook points has fewer tokens: it is of at most a
    GiB, or one batch."""

    dtype: DTypeName = "bf16"
    batch_tokens: int = 4096
    shard_tokens: int = 131_072

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        require(self.batch_tokens > 0, "batch_tokens must be positive", got=self.batch_tokens)
        require(
            self.shard_tokens >= self.batch_tokens,
            "A shard must hold at least one batch",
            got=f"shard_tokens {self.shard_tokens}, batch_tokens {self.batch_tokens}",
        )


def harvest(
    model: HookedModel,
    dataset: TokenDataset,
    names: str | Sequence[str],
    out: str | Path,
    *,
    config: HarvestConfig | None = None,
    overwrite: bool = False,
) -> ActivationStore:
    """Write the activations of `dataset` at the hook points `names` (exact or globs) as a store at `out`, and open it.

    Goes on with a harvest that was stopped, and simply opens one that is complete and was made with the same settings.
    Raises ArtifactError when `out` holds, or was begun with, other settings (each difference is named), and InputError
    when an activation does not fit the dtype.
    """
    config = config or HarvestConfig()
    settings = _settings(model, dataset, names, config)
    out = Path(out)
    if out.exists() and not overwrite:
        return _open_same(out, settings)
    made = draft(out, KIND, settings, overwrite=overwrite, resume=True)
    per_shard = _sequences_per_shard(config, dataset.context, sum(settings["hook_points"].values()))
    shards = []
    with progress(dataset.n_tokens, f"harvest {model.name}", "tokens") as bar:
        for number, start in enumerate(range(0, dataset.n_sequences, per_shard)):
            stop = min(start + per_shard, dataset.n_sequences)
            shards.append(
                _shard(made, number, model, dataset.slice(start, stop), start, list(settings["hook_points"]), config)
            )
            bar.advance((stop - start) * dataset.context)
    write_json(made.folder / MANIFEST, {"shards": [asdict(shard) for shard in shards]})
    for number in range(len(shards)):
        _receipt(made.folder, number).unlink()
    made.publish(overwrite=overwrite, dataset=str(dataset.path))
    return ActivationStore.open(out)


def _sequences_per_shard(config: HarvestConfig, context: int, width: int) -> int:
    """How many sequences are in a shard, given how wide all hook points are together."""
    row = width * parse_dtype(config.dtype).itemsize
    tokens = min(config.shard_tokens, max(config.batch_tokens, _SHARD_BYTES // row))
    return max(1, tokens // context)


def _settings(
    model: HookedModel, dataset: TokenDataset, names: str | Sequence[str], config: HarvestConfig
) -> JsonObject:
    if dataset.vocabulary_size > model.config.d_vocab:
        raise InputError(
            f"The dataset {dataset.path} was made with another tokenizer than {model.name}'s",
            got=f"a vocabulary of {dataset.vocabulary_size}",
            expected=f"at most {model.config.d_vocab}",
        )
    probe = model.activations(torch.from_numpy(dataset.batch(0, 1)[:, :2]), names)
    return {
        "model": {"name": model.name, "revision": model.revision, "dtype": str(model.dtype).removeprefix("torch.")},
        "dataset": {
            "fingerprint": dataset.fingerprint,
            "n_sequences": dataset.n_sequences,
            "context": dataset.context,
            "special_ids": list(dataset.special_ids),
        },
        "hook_points": {name: activation[0, 0].numel() for name, activation in probe.items()},
        "harvest": to_dict(config),
    }


def _open_same(out: Path, settings: JsonObject) -> ActivationStore:
    store = ActivationStore.open(out)
    rows = difference(store.config, settings)
    if rows:
        raise ArtifactError(
            f"{out} holds a store that was made with other settings",
            got="; ".join(rows),
            fix="Choose another folder, or say overwrite=True (--overwrite) to replace it",
        )
    return store


def _receipt(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def _shard(
    made: Draft,
    number: int,
    model: HookedModel,
    part: TokenDataset,
    start: int,
    names: list[str],
    config: HarvestConfig,
) -> Shard:
    """The shard's row of the manifest; the shard is made unless an earlier run left it complete, with its receipt."""
    receipt = _receipt(made.folder, number)
    if receipt.exists():
        there = Shard(**read_json(receipt))
        if (there.start, there.stop) == (start, start + part.n_sequences):
            return there
    file = made.folder / f"shard-{number:05d}.safetensors"
    tensors = _activations(model, part, names, config)
    with atomic_file(file) as temporary:
        save_file(tensors, temporary)
    shard = Shard(
        file=file.name, start=start, stop=start + part.n_sequences, bytes=file.stat().st_size, sha256=sha256(file)
    )
    write_json(receipt, asdict(shard))
    return shard


@torch.no_grad()
def _activations(model: HookedModel, part: TokenDataset, names: list[str], config: HarvestConfig) -> dict[str, Tensor]:
    """All activations of one shard, each `[sequences, context, d]`, with the axes of heads joined."""
    dtype = parse_dtype(config.dtype)
    per_batch = max(1, config.batch_tokens // part.context)
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, part.n_sequences, per_batch):
        tokens = torch.from_numpy(part.batch(start, min(start + per_batch, part.n_sequences)))
        cache = model.activations(tokens, names, dtype=dtype, device="cpu")
        for name in names:
            pieces[name].append(cache[name].flatten(2))
    tensors = {name: torch.cat(pieces.pop(name)) for name in names}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"An activation at {name} is not finite in {config.dtype}",
                got=f"a value beyond what {config.dtype} can hold, or NaN from the model",
                fix="Harvest in bf16 or fp32",
            )
    tensors["tokens"] = torch.from_numpy(part.batch(0, part.n_sequences)).to(torch.int32)
    return tensors
