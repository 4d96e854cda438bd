"""`ActivationStore`: activations on disk, cut into shards of whole sequences, with their token ids.

The artifact is a folder of

- `shard-00000.safetensors` …: for each hook point a tensor `[sequences, context, d]`, and `tokens` `[sequences,
  context]` int32;
- `manifest.json`: for each shard its sequences, bytes and SHA-256;
- `config.json`: the model, dataset, hook points and dtype that it was made with.

A shard's checksum is compared when it is first read.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microtome.common.artifacts import fingerprint, read_head, read_json, sha256
from microtome.common.config import JsonObject
from microtome.common.device import parse_dtype
from microtome.common.errors import ArtifactError, ConfigError, InputError, unknown_name
from microtome.model.names import canonical, is_glob, no_match

KIND = "activation_store"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Sequences `start … stop - 1` of the dataset, in one file."""

    file: str
    start: int
    stop: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ActivationStore:
    """An opened store. Opening reads no activations; `read` maps only the tensors that it needs."""

    path: Path
    config: JsonObject
    shards: tuple[Shard, ...]
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """The store at `path`. Raises ArtifactError when it is missing, unfinished, or a shard is not as long as it
        was."""
        path = Path(path)
        config = read_head(path, KIND)
        shards = tuple(Shard(**row) for row in read_json(path / MANIFEST)["shards"])
        for shard in shards:
            file = path / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                raise _damaged(file, "no file" if size is None else f"{size} bytes", f"{shard.bytes} bytes")
        return cls(path, config, shards)

    @property
    def hook_names(self) -> tuple[str, ...]:
        return tuple(self.config["hook_points"])

    @property
    def model_name(self) -> str:
        return str(self.config["model"]["name"])

    @property
    def dtype(self) -> torch.dtype:
        return parse_dtype(self.config["harvest"]["dtype"])

    @property
    def context(self) -> int:
        return int(self.config["dataset"]["context"])

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Token ids whose activations are not text's (BOS, separator)."""
        return tuple(self.config["dataset"]["special_ids"])

    @property
    def n_sequences(self) -> int:
        return self.shards[-1].stop

    @property
    def n_tokens(self) -> int:
        return self.n_sequences * self.context

    @cached_property
    def fingerprint(self) -> str:
        """Names the content: equal for equal shards."""
        return fingerprint({"shards": [shard.sha256 for shard in self.shards]})

    def width(self, hook_name: str) -> int:
        """The size of the activation at a hook point. Raises ConfigError for one that is not in the store."""
        self.check_hook(hook_name)
        return int(self.config["hook_points"][hook_name])

    def check_hook(self, hook_name: str) -> None:
        if hook_name not in self.hook_names:
            raise unknown_name(f"hook point in {self.path}", hook_name, self.hook_names, ConfigError)

    def resolve(self, names: str | Sequence[str]) -> list[str]:
        """The store's hook points behind names, aliases and globs (`"blocks.*.hook_mlp_out"`), in the order in which they are
        given, those of a glob in the store's; each once.

        Raises ConfigError for one that is not in the store, with the nearest that are.
        """
        wanted = [names] if isinstance(names, str) else names
        return list(dict.fromkeys(found for name in wanted for found in self._resolved(name)))

    def _resolved(self, name: str) -> list[str]:
        if is_glob(name):
            found = [point for point in self.hook_names if fnmatch.fnmatchcase(point, name)]
            if not found:
                raise no_match(name, self.hook_names, str(self.path), ConfigError)
            return found
        full = next(
            (full for gated in (True, False) if (full := canonical(name, gated=gated)) in self.hook_names), name
        )
        self.check_hook(full)
        return [full]

    def read(self, hook_name: str, start: int, stop: int) -> Float[Tensor, "sequence context d"]:
        """The activations of sequences `start … stop - 1`, in the store's dtype."""
        self.check_hook(hook_name)
        return self._read(hook_name, start, stop)

    def tokens(self, start: int, stop: int) -> Int[Tensor, "sequence context"]:
        """The token ids of sequences `start … stop - 1`."""
        return self._read("tokens", start, stop)

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        if not 0 <= start < stop <= self.n_sequences:
            raise InputError(
                "These sequences are not in the store",
                got=f"{start} to {stop}",
                expected=f"within 0 to {self.n_sequences}",
            )
        pieces = []
        for shard in self.shards:
            low, high = max(start, shard.start), min(stop, shard.stop)
            if low < high:
                self._verify_once(shard)
                pieces.append(_read_slice(self.path / shard.file, key, low - shard.start, high - shard.start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _verify_once(self, shard: Shard) -> None:
        if shard.file not in self._verified:
            self._verify(shard)
            self._verified.add(shard.file)

    def _verify(self, shard: Shard) -> None:
        found = sha256(self.path / shard.file)
        if found != shard.sha256:
            raise _damaged(self.path / shard.file, f"SHA-256 {found[:16]}…", f"{shard.sha256[:16]}…")

    def verify(self) -> None:
        """Compare the checksum of every shard. Raises ArtifactError at the first that differs."""
        for shard in self.shards:
            self._verify(shard)


def _read_slice(file: Path, key: str, start: int, stop: int) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_slice(key)[start:stop]
            return tensor
    except SafetensorError as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error


def _damaged(file: Path, got: str, expected: str) -> ArtifactError:
    return ArtifactError(f"{file} is damaged", got=got, expected=expected, fix="Delete the store and harvest it again")
