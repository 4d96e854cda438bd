"""`ActivationCache`: the activations of one run, by hook name or by short form; parts of them, and the residual stream taken
apart (`decomposition.py`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome.common.artifacts import atomic_file, draft, read_head
from microtome.common.errors import ArtifactError, InputError, ModelError, unknown_name
from microtome.model.capture import head_axis, select
from microtome.model.decomposition import Decomposition, ResidualStream
from microtome.model.names import ALIASES, KV_HEADS, PATTERN, HookName, canonical
from microtome.model.specs import Gated
from microtome.model.weights import Weights

Key = str | tuple[str, int] | tuple[str, int, str] | HookName
Places = int | slice | Sequence[int]
_KIND, _FILE = "activation cache", "activations.safetensors"


class ActivationCache(Mapping[str, Tensor]):
    """A read-only mapping from hook names to tensors, in the order of the forward pass.

    `cache["blocks.5.hook_resid_pre"]` and the short forms `cache["resid_pre", 5]`, `cache["z", 5]`,
    `cache["scale", 5, "ln1"]` and `cache["embed"]` are the same as in TransformerLens; other spellings of a name
    (`blocks.5.attn.o.hook_in`) work too. An entry that was not asked for is a ModelError that lists the nearest ones.

    A run gives its cache the model's `weights`, from which heads and neurons are made.
    """

    def __init__(self, activations: Mapping[HookName, Tensor], weights: Weights | None = None) -> None:
        self._activations = {name: activations[name] for name in sorted(activations)}
        self._by_name = {str(name): tensor for name, tensor in self._activations.items()}
        self._weights = weights

    # ---- a mapping --------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> Tensor:
        found = self._find(key)
        if found is not None:
            return found
        shown = f"blocks.{key[1]}.{key[0]}" if isinstance(key, tuple) else str(key)
        raise unknown_name("activation in this cache", shown, self._by_name, ModelError)

    def get(self, key: Key, default: Any = None, /) -> Any:
        """The activation, or `default` if it was not kept."""
        found = self._find(key)
        return default if found is None else found

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple | HookName) and self._find(key) is not None

    def _find(self, key: Key) -> Tensor | None:
        return next((self._by_name[name] for name in self._spellings(key) if name in self._by_name), None)

    def _spellings(self, key: Key) -> list[str]:
        if isinstance(key, tuple):
            point, layer, *part = key
            prefix = f"blocks.{layer}."
            of_block = ("hook_",) if f"hook_{point}" in ALIASES else ("", "hook_", "attn.hook_", "mlp.hook_")
            forms = (f"{part[0]}.hook_", f"{part[0]}.") if part else of_block  # ("in", 5) is never the MLP's
            return [self._canonical(f"{prefix}{form}{point}") for form in forms]
        text = str(key)
        return [self._canonical(text), f"hook_{text}", f"ln_final.hook_{text}"]

    def _canonical(self, text: str) -> str:
        gated = self._weights is not None and isinstance(self._weights.spec.mlp, Gated)
        return canonical(text, gated=gated)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        rows = [f"  {name}: {list(tensor.shape)} {tensor.dtype}" for name, tensor in self._by_name.items()]
        return "\n".join(["ActivationCache(", *rows, ")"])

    @property
    def weights(self) -> Weights:
        """The weights of the model that was run. Raises ModelError for a cache that has none (gradients, a saved cache)."""
        if self._weights is None:
            raise ModelError(
                "This cache does not know its model", fix="ActivationCache.load(path, weights=model.weights) tells it"
            )
        return self._weights

    # ---- parts of it ------------------------------------------------------------------------------------------------

    def rows(self, which: Places) -> "ActivationCache":
        """Some rows of the batch, as a cache; the axis stays. Raises InputError for a row that is not there, and
        ModelError for activations of single experts, which are not kept by row."""

        def some(name: HookName, tensor: Tensor) -> Tensor:
            if name.axes[0] != "batch":
                raise ModelError(f"The activations at {name} are of all rows together", got=", ".join(name.axes))
            shared = name.point == "hook_pos_embed" and len(tensor) == 1
            return tensor if shared else select(tensor, 0, _places(which), f"row of {name}")

        return self._map(some)

    def positions(self, which: Places) -> "ActivationCache":
        """Some positions (of a pattern: of its queries), as a cache; the axis stays. Errors as for `rows`."""

        def some(name: HookName, tensor: Tensor) -> Tensor:
            if name.axes[0] != "batch":
                raise ModelError(f"The activations at {name} are of all positions together", got=", ".join(name.axes))
            axis = name.axes.index("query") if name.axes == PATTERN else 1
            return select(tensor, axis, _places(which), f"position of {name}")

        return self._map(some)

    def heads(self, which: Places) -> "ActivationCache":
        """Some heads of the points that have them, as a cache; the axis stays. Keys and values count their own heads."""

        def some(name: HookName, tensor: Tensor) -> Tensor:
            axis = head_axis(name)
            return tensor if axis is None else select(tensor, axis, _places(which), f"head of {name}")

        return self._map(some)

    def to(self, to: torch.device | torch.dtype | str) -> "ActivationCache":
        """On another device, or in another dtype (whole numbers stay whole)."""

        def moved(name: HookName, tensor: Tensor) -> Tensor:
            if isinstance(to, torch.dtype) and not tensor.is_floating_point():
                return tensor
            return tensor.to(to)

        return self._map(moved)

    def ungrouped(self, key: Key) -> Float[Tensor, "batch pos n_heads d_head"]:
        """Keys or values with one head for each query head: query head h reads key/value head h // (n_heads / n_kv_heads).

        Raises InputError for a point of another kind.
        """
        tensor, config = self[key], self.weights.config
        if not any(tensor is known and name.axes == KV_HEADS for name, known in self._activations.items()):
            raise InputError(
                "Only keys and values are grouped", got=key, expected="a point such as 'blocks.0.attn.hook_k'"
            )
        return tensor.repeat_interleave(config.n_heads // config.n_kv_heads, dim=2)

    def _map(self, change: Callable[[HookName, Tensor], Tensor]) -> "ActivationCache":
        changed = {name: change(name, tensor) for name, tensor in self._activations.items()}
        return ActivationCache(changed, self._weights)

    # ---- the residual stream, taken apart ---------------------------------------------------------------------------

    @property
    def _stream(self) -> ResidualStream:
        return ResidualStream(self, self.weights)

    def accumulated_residual(self, layer: int | None = None, *, mid: bool = False) -> Decomposition:
        """The residual stream at each depth up to the input of block `layer` (None: to the end), `mid` between too."""
        return self._stream.accumulated(layer, mid=mid)

    def decompose_residual(self, layer: int | None = None, *, mid: bool = False) -> Decomposition:
        """The stream at `layer` as the sum of embeddings and of what each attention and MLP before it wrote."""
        return self._stream.by_layer(layer, mid=mid)

    def head_results(self, layer: int | None = None, *, mid: bool = False) -> Decomposition:
        """The stream at `layer` as the sum of what each head before it wrote, the attention biases, and all else."""
        return self._stream.by_head(layer, mid=mid)

    def neuron_results(
        self, layer: int | None, neurons: Sequence[tuple[int, int]], *, mid: bool = False
    ) -> Decomposition:
        """The stream at `layer` (None: at the end) as the sum of what the chosen `neurons` (block, neuron) wrote, and all else."""
        return self._stream.by_neuron(layer, neurons, mid=mid)

    def apply_final_norm(self, components: Decomposition) -> Decomposition:
        """Components as the unembedding reads them: their sum times `model.W_U`, plus `model.b_U`, is the logits before any
        soft-cap. Needs `ln_final.hook_scale`."""
        return self._stream.final_norm(components)

    # ---- on the disk ------------------------------------------------------------------------------------------------

    def save(
        self, path: str | Path, *, tokens: Int[Tensor, "batch pos"] | None = None, overwrite: bool = False
    ) -> Path:
        """Write to one file (`….safetensors`) or to an artifact folder; names are kept. `tokens` go in as `hook_tokens`.

        Raises ArtifactError for a path that is already there, unless `overwrite`.
        """
        path = Path(path)
        tensors = self._by_name | ({} if tokens is None else {"hook_tokens": tokens})
        if path.suffix == ".safetensors":
            if path.exists() and not overwrite:
                raise ArtifactError(f"{path} is already there", fix="Choose another name, or say overwrite=True")
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(tensors, path)
            return path
        artifact = draft(path, _KIND, {"names": list(tensors)}, overwrite=overwrite)
        _write(tensors, artifact.folder / _FILE)
        return artifact.publish(overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, weights: Weights | None = None) -> "ActivationCache":
        """What `save` wrote. `weights` (`model.weights`) are needed for decompositions only.

        Raises ArtifactError for a path that holds no cache.
        """
        path = Path(path)
        file = path
        if path.suffix != ".safetensors":
            read_head(path, _KIND)
            file = path / _FILE
        try:
            activations = {HookName.parse(name): tensor for name, tensor in load_file(file).items()}
        except (OSError, SafetensorError, ModelError) as error:
            raise ArtifactError(
                f"{file} cannot be read", got=error, expected="what ActivationCache.save wrote"
            ) from error
        return cls(activations, weights)


def _places(which: Places) -> slice | Sequence[int]:
    return [which] if isinstance(which, int) else which


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    """The format takes no two tensors that share memory, as the end of a block and the start of the next may."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        own[name] = whole.clone() if memory in seen else whole
        seen.add(memory)
    with atomic_file(file) as temporary:
        save_file(own, temporary)
