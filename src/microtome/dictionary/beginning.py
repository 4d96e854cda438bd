"""The tokens with which many prompts begin, read once.

The model keeps its keys and values of them, and goes on from there with each prompt's own end. That gives what a run of the
whole prompt gives, up to rounding: nothing looks back at what comes later.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from microtome.model import ActivationCache, HookedModel
from microtome.model.hook_point import HookPoint
from microtome.model.names import HookName
from microtome.model.taps import StopForward


@dataclass(frozen=True, eq=False)
class Beginning:
    """A model after `n` tokens. Hooks around `logits` see the positions behind them only."""

    model: HookedModel
    n: int
    past: DynamicCache | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedModel, tokens: Int[Tensor, " pos"]) -> "Beginning":
        """After these tokens; after none for a model that keeps something else than keys and values."""
        if len(tokens) == 0:
            return cls(model, 0, None)
        past = model.hf(input_ids=tokens[None].to(model.device), use_cache=True).past_key_values
        plain = type(past) is DynamicCache and all(hasattr(layer, "keys") for layer in past.layers)
        return cls(model, len(tokens), past) if plain else cls(model, 0, None)

    def logits(
        self, tokens: Int[Tensor, "row pos"], there: Bool[Tensor, "row pos"] | None = None
    ) -> Float[Tensor, "row d_vocab"]:
        """The logits behind `tokens`, whole prompts that all begin so; `there` is where they have tokens, of rows padded on
        the right."""
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": tokens[:, self.n :].to(device), "use_cache": self.past is not None}
        if self.past is not None:
            past = copy.deepcopy(self.past)
            past.batch_repeat_interleave(len(tokens))
            inputs["past_key_values"] = past
        last = torch.full((len(tokens),), tokens.shape[1] - 1)
        if there is not None:
            inputs["attention_mask"] = there.long().to(device)
            last = there.sum(1) - 1
        if "logits_to_keep" in inspect.signature(type(self.model.hf).forward).parameters:
            inputs["logits_to_keep"] = tokens.shape[1] - int(last.min())
        found: Tensor = self.model.hf(**inputs).logits
        return found[torch.arange(len(tokens)), last - (tokens.shape[1] - found.shape[1])]

    def activations(self, tokens: Int[Tensor, "row pos"], names: Sequence[str]) -> ActivationCache:
        """The activations at these points behind the first `n` of `tokens`; the run ends at the deepest of them."""
        wanted, kept = self.model.resolve(names), dict[HookName, Tensor]()

        def keeping(name: HookName, activation: Tensor, _: HookPoint) -> None:
            kept[name] = activation
            if len(kept) == len(wanted):
                raise StopForward

        with self.model.hooks([(str(name), partial(keeping, name)) for name in wanted]), suppress(StopForward):
            self.logits(tokens)
        return ActivationCache(kept)
