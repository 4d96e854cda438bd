"""How the columns of a stream become the rows of a stack's members, and members become dictionaries again.

`Separate`: every member is a dictionary, and all read the same rows. `Layered`: the members are the layers of one
cross-layer transcoder; each reads, and has as its target, the columns of its own layer.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.device import derive_seed
from microtome.common.errors import ConfigError, ModelError, unknown_name
from microtome.dictionary.config import DictionaryConfig
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.decoders import CrossLayerDecoder, Decoder, OwnDecoder
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.fine_tuning import Start
from microtome.dictionary.stack import Stack
from microtome.model import HookName


@dataclass(frozen=True)
class Sites:
    """Where the hook points of a source are in its rows."""

    names: tuple[str, ...]
    widths: tuple[int, ...]

    def columns(self, wanted: Sequence[str]) -> list[slice]:
        """The columns of each point. Raises ConfigError for one that the source does not have."""
        starts = {name: sum(self.widths[:i]) for i, name in enumerate(self.names)}
        for name in wanted:
            if name not in starts:
                raise unknown_name("hook point of the source", name, self.names, ConfigError)
        return [slice(starts[name], starts[name] + self.widths[self.names.index(name)]) for name in wanted]


def take(rows: Float[Tensor, "*n d"], columns: Sequence[slice]) -> Float[Tensor, "*n part"]:
    """These columns of the rows, one behind the other."""
    pieces = [rows[..., each] for each in columns]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


class Layout(Protocol):
    """`members` is how long the stack is, `outputs` the points whose activations are predicted."""

    members: int
    d_in: int
    d_out: int
    outputs: tuple[str, ...]
    x_columns: list[slice]
    y_columns: list[slice]

    def decoder(self, d_sae: int) -> Decoder:
        """The decoder of all members."""

    def configs(self, configs: Sequence[DictionaryConfig]) -> list[DictionaryConfig]:
        """A config for each member, given one for each dictionary."""

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """A seed for each member, given one for each dictionary."""

    def x(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "s n d_in"]:
        """What the members read."""

    def y(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "s n d_out"]:
        """What they predict."""

    def figures(self, by_member: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The figures of each dictionary, given those of each member."""

    def begin_with(
        self, stack: Stack, which: int, start: Dictionary | CrossLayerTranscoder, scales: Float[Tensor, " d"]
    ) -> None:
        """The inverse of `export`: the dictionary with this place begins with the weights of another. Raises ConfigError for
        one of another kind or size."""

    def export(
        self, stack: Stack, which: int, origin: dict[str, Any], scales: Float[Tensor, " d"]
    ) -> Dictionary | CrossLayerTranscoder:
        """The dictionary with this place among those of the stack, on activations without `scales`."""


class _Points:
    """The columns of a config's inputs and outputs."""

    def __init__(self, config: DictionaryConfig, sites: Sites) -> None:
        self.inputs = config.inputs or sites.names
        self.outputs = config.outputs or self.inputs
        self.x_columns, self.y_columns = sites.columns(self.inputs), sites.columns(self.outputs)
        self.in_widths, self.out_widths = (
            tuple(c.stop - c.start for c in columns) for columns in (self.x_columns, self.y_columns)
        )

    def origin(self, about: dict[str, Any]) -> Origin:
        widths = self.out_widths if len(self.out_widths) > 1 else ()
        return Origin(inputs=self.inputs, outputs=self.outputs, widths=widths, **about)


class Separate(_Points):
    """Dictionaries side by side.

    Raises ConfigError for a tied crosscoder with unit norms: through rows whose norms at the points add up to one, the
    transpose of the decoder cannot give back what it reads.
    """

    def __init__(self, config: DictionaryConfig, members: int, sites: Sites) -> None:
        super().__init__(config, sites)
        self.members, self.d_in, self.d_out = members, sum(self.in_widths), sum(self.out_widths)
        if config.tied and config.unit_norms and len(self.outputs) > 1:
            raise ConfigError(
                "A tied crosscoder has free norms", got="unit norms", fix="Say norms='free', or leave out tied"
            )

    def decoder(self, d_sae: int) -> Decoder:
        return OwnDecoder(self.members, d_sae, self.out_widths)

    def configs(self, configs: Sequence[DictionaryConfig]) -> list[DictionaryConfig]:
        return list(configs)

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        return list(seeds)

    def x(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "1 n d_in"]:
        return take(rows, self.x_columns)[None]

    def y(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "1 n d_out"]:
        return take(rows, self.y_columns)[None]

    def figures(self, by_member: dict[str, Tensor]) -> list[dict[str, Any]]:
        lists = {name: values.tolist() for name, values in by_member.items()}
        return [{name: values[i] for name, values in lists.items()} for i in range(self.members)]

    def begin_with(
        self, stack: Stack, which: int, start: Dictionary | CrossLayerTranscoder, scales: Float[Tensor, " d"]
    ) -> None:
        if not isinstance(start, Dictionary):
            raise ConfigError(
                "What is to be fine-tuned is a cross-layer transcoder, and its config is of none",
                got="cross_layer=False",
                expected="cross_layer=True",
                fix="Say so, with its points as inputs and outputs, and use train_cross_layer",
            )
        stack.begin_with(which, start, take(scales, self.x_columns), take(scales, self.y_columns))

    def export(self, stack: Stack, which: int, origin: dict[str, Any], scales: Float[Tensor, " d"]) -> Dictionary:
        return stack.export(which, self.origin(origin), take(scales, self.x_columns), take(scales, self.y_columns))


def _check_order(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Latents of a layer write to the layers behind it in the list, which must lie behind it in the model as well. Points
    that are no hook points of a model have no order."""
    try:
        reads, writes = ([HookName.parse(name) for name in names] for names in (inputs, outputs))
    except ModelError:
        return
    if reads != sorted(reads) or writes != sorted(writes) or any(r > w for r, w in zip(reads, writes, strict=True)):
        raise ConfigError(
            "The layers of a cross-layer transcoder come in the model's order, and each is read before it is written",
            got=f"inputs {', '.join(inputs)}; outputs {', '.join(outputs)}",
            fix="Name the inputs, and the outputs, from the first layer to the last",
        )


class Layered(_Points):
    """The layers of a cross-layer transcoder.

    Raises ConfigError unless there are as many outputs as inputs, in the order in which the model reaches them, and all
    points are of one width.
    """

    def __init__(self, config: DictionaryConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.members = len(self.inputs)
        if len(self.outputs) != self.members:
            raise ConfigError(
                "A cross-layer transcoder writes as many points as it reads",
                got=f"{self.members} inputs, {len(self.outputs)} outputs",
            )
        _check_order(self.inputs, self.outputs)
        widths = {*self.in_widths, *self.out_widths}
        if len(widths) > 1:
            raise ConfigError(
                "The points of a cross-layer transcoder are of one width",
                got=dict(zip((*self.inputs, *self.outputs), (*self.in_widths, *self.out_widths), strict=True)),
            )
        self.d_in = self.d_out = widths.pop()

    def decoder(self, d_sae: int) -> Decoder:
        return CrossLayerDecoder(self.members, d_sae, self.d_out)

    def configs(self, configs: Sequence[DictionaryConfig]) -> list[DictionaryConfig]:
        return [configs[0]] * self.members

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        return [derive_seed(seeds[0], "layer", layer) for layer in range(self.members)]

    def x(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "s n d_in"]:
        return torch.stack([rows[:, each] for each in self.x_columns])

    def y(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "s n d_out"]:
        return torch.stack([rows[:, each] for each in self.y_columns])

    def figures(self, by_member: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Means over the layers (`dead`: their sum), and the FVU of each."""
        means = {name: float(values.float().mean()) for name, values in by_member.items()}
        return [{**means, "dead": int(by_member["dead"].sum()), "fvu_by_layer": by_member["fvu"].tolist()}]

    @torch.no_grad()
    def begin_with(
        self, stack: Stack, which: int, start: Dictionary | CrossLayerTranscoder, scales: Float[Tensor, " d"]
    ) -> None:
        if not isinstance(start, CrossLayerTranscoder):
            raise ConfigError(
                "Only a cross-layer transcoder is fine-tuned to one",
                got=start.architecture,
                expected="the folder of a cross-layer transcoder",
                fix="Leave out cross_layer, or name another folder",
            )
        sizes, found = (self.members, self.d_in, stack.d_sae), (start.n_layers, start.d_model, start.width)
        if sizes != found:
            raise ConfigError(
                "The cross-layer transcoder to fine-tune is of other sizes than its config",
                got=f"(layers, d_model, latents of a layer) = {found}",
                expected=sizes,
                fix="Take its points as inputs and outputs, and its latents of a layer as d_sae",
            )
        skips = (start.W_skip is not None, stack.W_skip is not None)
        if skips[0] != skips[1]:
            found_skip, wanted_skip = ("with" if skip else "without" for skip in skips)
            raise ConfigError(
                "Of the cross-layer transcoder to fine-tune and its config one alone has a skip path",
                got=f"one {found_skip} it",
                expected=f"one {wanted_skip} it",
                fix=f"Say skip={skips[0]}",
            )
        begun = copy.deepcopy(start).to(stack.b_enc.device, torch.float32)
        inputs, outputs = self._scales(scales)
        begun.fold_scales(1 / inputs, 1 / outputs)
        if stack.config.unit_norms:  # rows have unit norm in scaled units
            begun.fold_decoder_norms()
        for layer, weight in enumerate(begun.W_dec):
            stack.decoder.rows(layer).copy_(weight.flatten(1))
        for layer, (activation, norms) in enumerate(zip(begun.layer_activations(), stack.norms(), strict=True)):
            stack.rule.begin_with(layer, Start(activation, begun.encoder[layer], begun.b_enc[layer], norms))
        for name in ("encoder", "b_enc", "b_dec", *_skip(stack)):
            getattr(stack, name).copy_(getattr(begun, name))

    @torch.no_grad()
    def export(
        self, stack: Stack, which: int, origin: dict[str, Any], scales: Float[Tensor, " d"]
    ) -> CrossLayerTranscoder:
        """Codes are in units of their decoder rows' norms, as those of dictionaries are."""
        activations = [stack.rule.activation(layer, norms) for layer, norms in enumerate(stack.norms())]
        made = CrossLayerTranscoder(
            self.d_in, stack.d_sae, activations, origin=self.origin(origin), skip=stack.W_skip is not None
        ).to(stack.b_enc.device)
        for name in ("encoder", "b_enc", "b_dec", *_skip(stack)):
            getattr(made, name).copy_(getattr(stack, name))
        for layer, weight in enumerate(made.W_dec):
            weight.copy_(stack.decoder.rows(layer).view_as(weight))
        if not stack.config.unit_norms:
            made.fold_decoder_norms()
        made.fold_scales(*self._scales(scales))
        return made.requires_grad_(False)

    def _scales(self, scales: Float[Tensor, " d"]) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
        """Those of the inputs and those of the outputs: every point has one."""
        inputs, outputs = (
            torch.stack([scales[c.start] for c in columns]) for columns in (self.x_columns, self.y_columns)
        )
        return inputs, outputs


def _skip(stack: Stack) -> list[str]:
    return ["W_skip"] if stack.W_skip is not None else []
