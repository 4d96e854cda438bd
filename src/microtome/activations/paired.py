"""`PairedSource`: two sources over the same tokens, side by side. A crosscoder of two models reads it."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.activations.source import ActivationSource, side_by_side
from microtome.common.config import JsonObject, require
from microtome.common.errors import InputError


class PairedSource(ActivationSource):
    """Row i is row i of `first` followed by row i of `second`: the same token, seen by two models.

    Each point is named by its model and itself (`"base:blocks.3.hook_resid_pre"`); `names` says what to call the two,
    which is needed when their models have one name. Raises InputError when the sources are not over the same tokens in
    the same blocks, ConfigError for names that do not tell the two apart.
    """

    def __init__(
        self, first: ActivationSource, second: ActivationSource, *, names: tuple[str, str] | None = None
    ) -> None:
        self.names = names or (first.model_name, second.model_name)
        require(self.names[0] != self.names[1], "The two sources need two names; say names=(…, …)", got=self.names)
        _check_same_rows(first, second)
        self.first, self.second = first, second
        self.hook_names = tuple(
            f"{name}:{point}"
            for name, side in zip(self.names, (first, second), strict=True)
            for point in side.hook_names
        )
        self.widths = first.widths + second.widths
        self.model_name = "+".join(self.names)
        self.n_blocks = first.n_blocks

    @property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return self.first.block_rows

    @torch.no_grad()
    def read(self, block: int) -> Float[Tensor, "row d"]:
        return side_by_side([self.first.read(block), self.second.read(block)])

    def describe(self) -> JsonObject:
        return {
            "kind": "paired",
            "hook_names": list(self.hook_names),
            "dataset": self.first.describe()["dataset"],
            "sides": {name: side.describe() for name, side in zip(self.names, (self.first, self.second), strict=True)},
        }


def _check_same_rows(first: ActivationSource, second: ActivationSource) -> None:
    left, right = first.describe()["dataset"], second.describe()["dataset"]
    unequal = [f"{key} {left.get(key)} and {right.get(key)}" for key in left | right if left.get(key) != right.get(key)]
    if unequal:
        raise InputError(
            "The two sources are not over the same tokens",
            got="; ".join(unequal),
            fix="Make both from one token dataset; the models must share its tokenizer",
        )
    if not np.array_equal(first.block_rows, second.block_rows):
        raise InputError(
            "The two sources are cut into different blocks",
            got=f"{first.n_blocks} blocks with {first.block_rows.sum()} rows and {second.n_blocks} with "
            f"{second.block_rows.sum()}",
            fix="Give both the same sequences_per_block (of arrays: rows_per_block)",
        )
