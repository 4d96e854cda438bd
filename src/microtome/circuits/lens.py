"""The logit lens: what the model would say if it stopped at each depth (nostalgebraist 2020).

The residual stream at a depth goes through the model's own final norm, at the state's own denominator, and its unembedding:

    logits(h) = cap(norm(h) W_U + b_U)

At the last depth these are the model's own logits. A tuned lens (`tuned_lens.py`) first puts each state through a learned
affine map. Logits `[batch, pos, d_vocab]` are made for one depth at a time, when they are asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.circuits.effects import Axis, Effects
from microtome.circuits.metrics import Answers, answer_ids
from microtome.circuits.pairs import aligned, position_labels
from microtome.common.errors import InputError, ModelError
from microtome.model.folding import unknown_inside
from microtome.model.hooked import HookedModel, Input
from microtome.model.prompts import Prompts
from microtome.model.reading import ScoredToken, likeliest

Logits = Float[Tensor, "batch pos d_vocab"]
PerPlace = Float[Tensor, "depth batch pos"]


@runtime_checkable
class Translator(Protocol):
    """What puts a state at a depth into the terms of the last: `TunedLens` is one."""

    def translate(self, label: str, state: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The state at the depth `label`, translated."""

    def check_fit(self, model: HookedModel) -> None:
        """Raise ConfigError for a model that this is not for."""


@dataclass(frozen=True, eq=False)
class Readout:
    """The end of a model, from a state of the stream to logits: its own modules, so its own numbers."""

    model: HookedModel

    def __post_init__(self) -> None:
        if unknown_inside(self.model.spec):
            raise ModelError(f"The final norm of {self.model.name} is not known: its family has no spec")

    @property
    def softcap(self) -> float | None:
        """The bound that the model's logits are pressed into (Gemma-2: 30), None for none."""
        cap: float | None = getattr(self.model.hf.config, "final_logit_softcapping", None)
        return cap

    def __call__(
        self, state: Float[Tensor, "*batch d_model"], *, capped: bool = True
    ) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of a state: through the final norm, the unembedding, and (`capped`) the soft-cap if there is one."""
        spec, hf = self.model.spec, self.model.hf
        x = state.to(self.model.dtype)
        for path in (spec.ln_final, spec.unembed_in, spec.unembed):
            x = hf.get_submodule(path)(x) if path else x
        return self.cap(x) if capped else x

    def cap(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """cap · tanh(logits / cap), as the model does it."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class Lens:
    """Each state of the stream of one run, read as logits. `labels` name the depths: `"0_pre"` (the input of block 0),
    `"1_pre"`, …, `"final_post"`, with `"0_mid"` … between attention and MLP if asked for.

    Rows of unequal length are padded on the left, so the last column is each prompt's last token. All figures are over
    all columns; those before a prompt begins mean nothing.
    """

    readout: Readout
    labels: tuple[str, ...]
    states: Float[Tensor, "depth batch pos d_model"]
    prompts: Prompts
    translator: Translator | None = None

    # ---- logits -------------------------------------------------------------------------------------------------------

    def logits(self, depth: int | str, *, capped: bool = True) -> Logits:
        """The logits at one depth, by number (negative: from the end) or label. With `capped=False` those before a
        soft-cap, in models that have one; elsewhere the same."""
        i = self._depth(depth)
        state = self.states[i]
        if self.translator is not None:
            state = self.translator.translate(self.labels[i], state)
        return self.readout(state, capped=capped)

    def __iter__(self) -> Iterator[Logits]:
        """The logits of each depth in turn."""
        return (self.logits(i) for i in range(len(self.labels)))

    # ---- figures ------------------------------------------------------------------------------------------------------

    def probability(self, answer: Answers) -> PerPlace:
        """The probability of the answer (one for all prompts, or one each) at each depth and position."""
        ids = self._answers(answer)
        return torch.stack([picked(x.float().softmax(-1), ids) for x in self])

    def logit(self, answer: Answers, *, capped: bool = True) -> PerPlace:
        """The answer's logit."""
        ids = self._answers(answer)
        return torch.stack([picked(self.logits(i, capped=capped).float(), ids) for i in range(len(self.labels))])

    def rank(self, answer: Answers) -> Int[Tensor, "depth batch pos"]:
        """How many tokens have a higher logit than the answer: 0 where it is the likeliest."""
        ids = self._answers(answer)
        return torch.stack([(x > picked(x, ids)[..., None]).sum(-1) for x in self])

    def kl(self) -> PerPlace:
        """KL(model ‖ lens) in nats: how far each depth's distribution is from the model's own. 0 at the end."""
        final = self.logits(-1).float().log_softmax(-1)
        return torch.stack([divergence(final, x.float().log_softmax(-1)) for x in self])

    def confidence(self) -> PerPlace:
        """The probability of the likeliest token at each depth and position."""
        return torch.stack([x.float().softmax(-1).amax(-1) for x in self])

    def top_tokens(self, k: int = 5, *, position: int = -1, row: int = 0) -> list[list[ScoredToken]]:
        """The k likeliest tokens of each depth at one position of one prompt. `score` is the probability."""
        n_rows, n_positions = self.prompts.tokens.shape
        if not (-n_positions <= position < n_positions and 0 <= row < n_rows):
            raise InputError("There is no such place", got=f"row {row}, position {position}")
        strings = self.readout.model._strings  # noqa: SLF001
        return [likeliest(x[row, position], k, strings) for x in self]

    def effects(self, answer: Answers) -> Effects:
        """The answer's probability as a grid of depth × position, with prompts: for charts and intervals."""
        values = self.probability(answer).permute(0, 2, 1).cpu()
        return Effects(
            values=values, axes=(Axis("depth", self.labels), self.positions), what="probability", notes=self.notes
        )

    @property
    def positions(self) -> Axis:
        """The axis of positions (`position_labels`)."""
        return position_labels(self.readout.model, self.prompts)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the numbers were made."""
        kind = "tuned lens" if self.translator is not None else "logit lens"
        cap = self.readout.softcap
        notes = (f"{kind}: each state through the final norm at its own denominator",)
        return notes if cap is None else (*notes, f"logits soft-capped at {cap:g}")

    def to_json(self, k: int = 5, *, answer: Answers | None = None, row: int = 0) -> dict[str, Any]:
        """The likeliest tokens at the last position by depth, and the answer's probability, rank and logit there."""
        strings = self.readout.model._strings  # noqa: SLF001
        ids = None if answer is None else self._answers(answer).expand(len(self.prompts.tokens))
        depths: list[dict[str, Any]] = []
        for label, logits in zip(self.labels, self, strict=True):
            last = logits[row, -1].float()
            top = likeliest(last, k, strings)
            depth: dict[str, Any] = {"depth": label, "top": [_plain(token) for token in top]}
            if ids is not None:
                own = last[ids[row]]
                figures = {"probability": last.softmax(-1)[ids[row]], "rank": (last > own).sum(), "logit": own}
                depth |= {name: value.item() for name, value in figures.items()}
            depths.append(depth)
        return {"depths": depths, "notes": list(self.notes)}

    def _depth(self, depth: int | str) -> int:
        n = len(self.labels)
        if isinstance(depth, str):
            if depth not in self.labels:
                raise InputError("There is no such depth", got=depth, expected=f"one of {', '.join(self.labels)}")
            return self.labels.index(depth)
        if not -n <= depth < n:
            raise InputError("There is no such depth", got=depth, expected=f"{-n} to {n - 1}")
        return depth % n

    def _answers(self, answer: Answers) -> Int[Tensor, " answers"]:
        ids, n = answer_ids(self.readout.model, answer), len(self.prompts.tokens)
        if len(ids) not in (1, n):
            raise InputError("There must be one answer, or one for each prompt", got=len(ids), expected=n)
        return ids.to(self.states.device)


@torch.no_grad()
def logit_lens(model: HookedModel, prompt: Input, *, mid: bool = False, tuned: Translator | None = None) -> Lens:
    """The stream of one run at the input of every block and at the end, read as logits; `mid` adds the places between
    attention and MLP (which a tuned lens does not know). `tuned` reads through a tuned lens instead.

    Raises ModelError for a model whose blocks have no such places, ConfigError for a tuned lens of another model.
    """
    readout = Readout(model)
    if tuned is not None:
        tuned.check_fit(model)
        if mid:
            raise InputError("A tuned lens has no map for the places between attention and MLP", fix="mid=False")
    if mid and model.spec.parallel:
        raise ModelError(f"Attention and MLP of {model.name} read the same stream side by side", fix="mid=False")
    prompts = aligned(model, prompt)
    n = model.config.n_layers
    names = [
        "blocks.*.hook_resid_pre",
        *(["blocks.*.hook_resid_mid"] if mid else []),
        f"blocks.{n - 1}.hook_resid_post",
    ]
    stream = model.activations(prompts, names).accumulated_residual(mid=mid)
    return Lens(readout, stream.labels, stream.values, prompts, tuned)


def _plain(token: ScoredToken) -> dict[str, Any]:
    return {"token": token.token, "text": token.text, "probability": token.score}


def picked(values: Float[Tensor, "batch pos d_vocab"], answers: Int[Tensor, " answers"]) -> Float[Tensor, "batch pos"]:
    """Each row's own answer's value, at every position."""
    index = answers.expand(len(values)) if len(answers) == 1 else answers
    return values.gather(-1, index[:, None, None].expand(*values.shape[:2], 1))[..., 0]


def divergence(
    target: Float[Tensor, "*batch d_vocab"], found: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(target ‖ found) in nats, of log-probabilities."""
    return (target.exp() * (target - found)).sum(-1)
