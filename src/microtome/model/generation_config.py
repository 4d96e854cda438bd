"""How text is generated, as one checked value. Needs no torch, so commands refuse bad settings at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from microtome.common.config import from_dict, require, to_dict

_SAMPLING = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of a generation; a model's own defaults play no part. Raises ConfigError for settings that cannot be.

    Greedy, unless a temperature, `top_k`, `top_p` or `min_p` asks for a draw (then `temperature` is 1 if not said).
    Penalties change the logits first, then the temperature, then top-k, top-p and min-p leave tokens out.
    """

    max_new_tokens: int = 40
    temperature: float | None = None
    """Divides the logits before the draw; 0 is greedy."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together hold this much probability."""
    min_p: float | None = None
    """Draw from the tokens with at least this share of the likeliest one's probability."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it was generated."""
    presence_penalty: float = 0.0
    """Taken from a token's logit if it was generated at all."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of all tokens of prompt and new text (arXiv 1909.05858 §4.1)."""
    no_repeat_ngram: int = 0
    """No run of so many tokens occurs twice in prompt and new text; 0 is no limit."""
    n_beams: int = 1
    """Keep this many of the likeliest beginnings (beam search); 1 is none."""
    length_penalty: float = 1.0
    """Finished beams are compared by log-probability / number of new tokens to this power."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    seed: int = 0
    """The same seed gives the same draws; each row of a batch has its own."""
    use_cache: bool = True
    """Keep keys and values; without, the whole text runs for each token (the same result, slower)."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "max_new_tokens must be positive", got=self.max_new_tokens)
        require(
            self.temperature is None or 0 <= self.temperature < math.inf,
            "temperature must be 0 or more",
            got=self.temperature,
        )
        require(self.top_k is None or self.top_k > 0, "top_k must be positive", got=self.top_k)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"{name} must be in (0, 1]", got=value)
        for name in ("frequency_penalty", "presence_penalty", "length_penalty"):
            require(math.isfinite(getattr(self, name)), f"{name} must be a finite number", got=getattr(self, name))
        require(
            0 < self.repetition_penalty < math.inf, "repetition_penalty must be positive", got=self.repetition_penalty
        )
        require(self.no_repeat_ngram >= 0, "no_repeat_ngram must be 0 or more", got=self.no_repeat_ngram)
        require(self.n_beams > 0, "n_beams must be positive", got=self.n_beams)
        require(all(self.stop), "A stop string is empty", got=list(self.stop))
        self._check_together()

    def _check_together(self) -> None:
        asked = [name for name in _SAMPLING if getattr(self, name) is not None]
        require(
            self.temperature != 0 or not asked,
            f"temperature=0 is greedy: there is no draw that {' and '.join(asked)} could shape",
            expected="a temperature above 0, or none said",
        )
        require(
            self.n_beams == 1 or not self.samples,
            "Beam search looks for the likeliest text and draws nothing",
            got=f"n_beams={self.n_beams} with {', '.join([*asked, *(['temperature'] if self.temperature else [])])}",
        )
        require(
            self.n_beams > 1 or self.length_penalty == 1,
            "length_penalty compares beams, and there is one",
            got=f"length_penalty={self.length_penalty}",
            expected="n_beams above 1",
        )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else the likeliest is taken."""
        if self.temperature is not None:
            return self.temperature > 0
        return any(getattr(self, name) is not None for name in _SAMPLING)

    @classmethod
    def of(cls, config: "GenerateConfig | None", settings: Mapping[str, Any]) -> "GenerateConfig":
        """A config with some settings changed. Raises ConfigError for an unknown one, naming the nearest."""
        changed = dict(settings)
        if isinstance(changed.get("stop"), str):
            changed["stop"] = (changed["stop"],)
        return from_dict(cls, {**(to_dict(config) if config else {}), **changed})
