"""What circuits are studied on: prompts, and pairs of a clean and a corrupt prompt that agree position by position.

Texts of unequal length are padded on the left, so that the last token of each row is in the last column.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.circuits.effects import Axis, numbers, position_axis
from microtome.common.errors import InputError
from microtome.model.hooked import HookedModel, Input
from microtome.model.prompts import Prompts, checked


def aligned(model: HookedModel, prompt: Input) -> Prompts:
    """Any input of a run as prompts `[batch, pos]` whose rows all end in the last column.

    Raises InputError for tokens that the model cannot run, and for a mask with holes.
    """
    if isinstance(prompt, Prompts):
        return _ending_last(Prompts(checked(prompt.tokens, model.config, model.name), prompt.mask))
    if isinstance(prompt, Tensor):
        return Prompts(checked(prompt, model.config, model.name))
    return model.prompts(prompt, side="left")


@dataclass(frozen=True)
class Pair:
    """Clean and corrupt prompts `[prompts, pos]` of the same shape; row i of one belongs to row i of the other."""

    clean: Prompts
    corrupt: Prompts

    @property
    def n_prompts(self) -> int:
        return len(self.clean.tokens)

    @property
    def n_positions(self) -> int:
        return self.clean.tokens.shape[1]


def pair(model: HookedModel, clean: Input, corrupt: Input) -> Pair:
    """A clean and a corrupt input, checked against each other.

    Raises InputError for unequal numbers of prompts, for rows of unequal length, and where clean and corrupt are the same.
    """
    left, right = aligned(model, clean), aligned(model, corrupt)
    if len(left.tokens) != len(right.tokens):
        raise InputError(
            "There are not as many corrupt prompts as clean ones",
            got=f"{len(left.tokens)} clean, {len(right.tokens)} corrupt",
        )
    lengths, others = _lengths(left), _lengths(right)
    if bool((lengths != others).any()):
        row = int((lengths != others).nonzero()[0])
        raise InputError(
            "A clean prompt and its corrupt one have different numbers of tokens",
            got=f"{int(lengths[row])} and {int(others[row])} tokens in row {row}",
            fix="Choose words of equally many tokens, so that positions correspond",
        )
    if torch.equal(left.tokens, right.tokens):
        raise InputError(
            "The clean and the corrupt prompts are the same", fix="Let them differ in what is to be traced"
        )
    return Pair(left, right)


def position_labels(model: HookedModel, prompts: Prompts) -> Axis:
    """The axis of the columns of prompts: with the tokens' texts for a single prompt; columns of padded prompts are counted from
    the end, where all of them have a token."""
    n, size = prompts.tokens.shape
    if prompts.mask is not None:
        return Axis("position", tuple(str(i - size) for i in range(size)))
    if n == 1 and model.tokenizer is not None:
        return position_axis(model.to_str_tokens(prompts.tokens[0]))
    return Axis("position", numbers(size))


def _lengths(prompts: Prompts) -> Int[Tensor, " prompts"]:
    if prompts.mask is None:
        return torch.full((len(prompts.tokens),), prompts.tokens.shape[1])
    return prompts.mask.sum(-1).cpu()


def _ending_last(prompts: Prompts) -> Prompts:
    """The same rows with their padding on the left."""
    if prompts.mask is None or bool(prompts.mask[:, -1].all()):
        return prompts
    size, lengths = prompts.tokens.shape[1], prompts.mask.sum(-1)
    if bool((prompts.mask != (torch.arange(size, device=lengths.device) < lengths[:, None])).any()):
        raise InputError("Padding must be all before a text or all behind it", got="a mask with holes")
    columns = (torch.arange(size, device=lengths.device) - (size - lengths)[:, None]) % size
    return Prompts(prompts.tokens.gather(1, columns), prompts.mask.gather(1, columns))
