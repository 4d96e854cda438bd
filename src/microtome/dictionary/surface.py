"""`SparseDictionary`: what every measurement asks of a dictionary, whatever its class.

Its activations x are those of `origin.inputs`, one behind the other along the last axis; y those of `origin.outputs`.
`Read` is one batch of both. Its rows are what `encode` takes: the activations themselves, unless the dictionary's codes
depend on the tokens before (`ContextDictionary`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.dictionary import Origin
from microtome.model import ActivationCache, HookedModel


@runtime_checkable
class SparseDictionary(Protocol):
    """A dictionary of `d_sae` latents from activations of width `d_in` to ones of width `d_out`."""

    origin: Origin
    d_in: int
    d_out: int
    d_sae: int

    def encode(self, x: Float[Tensor, "n d_in"], /) -> SparseCodes:
        """The codes of each row."""

    def decode(self, codes: SparseCodes, x: Float[Tensor, "n d_in"] | None = None, /) -> Float[Tensor, "n d_out"]:
        """The reconstruction or prediction from codes."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights: where they are and in which dtype."""


@runtime_checkable
class ContextDictionary(SparseDictionary, Protocol):
    """One whose codes depend on the tokens before (a temporal dictionary): it makes its rows from whole sequences."""

    def in_context(self, x: Float[Tensor, "batch pos d_in"], /) -> Float[Tensor, "batch pos d_row"]:
        """The rows of all tokens: the activation first, then what the tokens before say of it."""


@runtime_checkable
class LayeredDictionary(SparseDictionary, Protocol):
    """One whose latents read one input each, with as many outputs: a cross-layer transcoder, or a set of dictionaries.
    Layer i stands for input i and output i."""

    @property
    def by_layer(self) -> bool:
        """Whether a layer's codes depend on its own input alone."""

    def layer_latents(self) -> list[slice]:
        """The latents that read each input."""

    def sources(self, layer: int, /) -> Sequence[int]:
        """The layers whose latents write an output."""

    def encode_layer(self, layer: int, x: Float[Tensor, "n d"], /) -> SparseCodes:
        """The codes of one layer, over its own latents."""

    def decode_layer(
        self, layer: int, codes: Sequence[SparseCodes], x: Float[Tensor, "n d"] | None = None, /
    ) -> Float[Tensor, "n d_out"]:
        """One output, from the codes of its sources and its layer's input."""


@dataclass(frozen=True)
class Read:
    """The activations that dictionaries read and write, of one batch."""

    activations: ActivationCache

    @classmethod
    def of(
        cls, model: HookedModel, tokens: Int[Tensor, "batch pos"], dictionaries: Iterable[SparseDictionary]
    ) -> "Read":
        """Run the model up to the deepest point of all dictionaries."""
        return cls(model.activations(tokens, points(dictionaries)))

    def at(self, names: tuple[str, ...]) -> Float[Tensor, "batch pos d"]:
        """The activations at the points `names`, heads flattened, one behind the other, in float32."""
        return torch.cat([self.activations[name].flatten(2).float() for name in names], -1)

    def widths(self, names: tuple[str, ...]) -> list[int]:
        """How wide each of these points is, heads flattened."""
        return [self.activations[name].flatten(2).shape[-1] for name in names]

    def x(self, dictionary: SparseDictionary) -> Float[Tensor, "batch pos d_in"]:
        """What it reads, where its weights are."""
        return self.at(dictionary.origin.inputs).to(device_of(dictionary))

    def rows(self, dictionary: SparseDictionary) -> Float[Tensor, "batch pos d_row"]:
        """What its `encode` takes: x, or x in its context. The batch has to hold sequences from their first token on."""
        x = self.x(dictionary)
        return dictionary.in_context(x) if isinstance(dictionary, ContextDictionary) else x

    def y(self, dictionary: SparseDictionary) -> Float[Tensor, "batch pos d_out"]:
        """What it should give, where its weights are."""
        return self.at(dictionary.origin.outputs).to(device_of(dictionary))


def points(dictionaries: Iterable[SparseDictionary]) -> list[str]:
    """All hook points that they read or write, each once."""
    origins = [dictionary.origin for dictionary in dictionaries]
    return list(dict.fromkeys(name for origin in origins for name in (*origin.inputs, *origin.outputs)))


def latents_by_input(dictionary: SparseDictionary) -> list[tuple[str, slice]]:
    """Which latents read which input, of a dictionary whose latents read one input each (a cross-layer transcoder, a set);
    of the others, whose latents read all of them, nothing."""
    if not isinstance(dictionary, LayeredDictionary):
        return []
    return list(zip(dictionary.origin.inputs, dictionary.layer_latents(), strict=True))


def device_of(dictionary: SparseDictionary) -> torch.device:
    """Where its weights are."""
    return next(dictionary.parameters()).device


@torch.no_grad()
def decoder_rows(dictionary: SparseDictionary, *, chunk: int = 1024) -> Float[Tensor, "d_sae d_out"]:
    """What each latent adds to y for each unit of its code: W_dec, or for a class with several decoders its decoded unit
    vectors less what no code gives."""
    rows = getattr(dictionary, "W_dec", None)
    if isinstance(rows, Tensor) and rows.shape == (dictionary.d_sae, dictionary.d_out):
        return rows.detach().float()
    device = device_of(dictionary)
    x = torch.zeros(1, dictionary.d_in, device=device)
    nothing = dictionary.decode(_units(torch.tensor([0], device=device), dictionary.d_sae, 0.0), x)
    parts = [
        dictionary.decode(_units(latents, dictionary.d_sae, 1.0), x.expand(len(latents), -1)) - nothing
        for latents in torch.arange(dictionary.d_sae, device=device).split(chunk)
    ]
    return torch.cat(parts).float()


def _units(latents: Int[Tensor, " n"], d_sae: int, value: float) -> SparseCodes:
    weight = torch.full((len(latents), 1), value, device=latents.device)
    return SparseCodes(latents[:, None], weight, d_sae)
