"""`microtome bench parity`: is what Microtome shows the model's own, and the same as what TransformerLens shows?

On tiny random models with all weights away from zero:

- against the bare Hugging Face model, for every kind of model and dtype: logits of a plain run and of one in which every
  point is captured, the residual stream against `output_hidden_states`, and the recomputed patterns against
  `output_attentions` of eager attention. 0 is bit-identical.
- against TransformerLens, unprocessed weights, fp32: each point that both have, the largest difference over all layers.
"""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tests.model.families import KINDS, VOCABULARY, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import installed, machine
from benchmarks.model_sides import open_side
from microtome.common.config import require, to_dict
from microtome.common.progress import progress
from microtome.model import HookedModel
from microtome.model.names import POINTS, HookName

PEER = "transformer_lens"
PEER_KINDS = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
Differences = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A batch of random tokens, `rows` of `context`, through models made from `seed`."""

    rows: int = 4
    context: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rows > 0 and 1 < self.context <= 64, "rows of 2 to 64 tokens are needed", got=f"{self.context}")

    @property
    def tokens(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        return torch.randint(3, VOCABULARY, (self.rows, self.context), generator=random)  # special tokens are left out


def run(config: Config) -> dict[str, Any]:
    """Compare, and return the machine, the sizes, the largest differences and what there is to note."""
    about, notes = machine(torch.device("cpu")), []
    kinds = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
    peers = PEER_KINDS if installed(PEER) else ()
    if not peers:
        notes.append(
            "TransformerLens is not installed here: pip install 'transformer-lens>=3', or '.[bench]' from the repository"
        )
    with torch.no_grad(), progress(len(kinds) + len(peers), "bench parity", "models") as bar:
        bare, peer = {}, {}
        for kind, dtype in kinds:
            bare[f"{kind}/{dtype}"] = against_huggingface(make(kind, DTYPES[dtype], seed=config.seed), config.tokens)
            bar.advance(1, kind)
        for kind in peers:
            peer[kind] = against_transformerlens(make(kind, seed=config.seed), config.tokens)
            bar.advance(1, kind)
    return {
        "benchmark": "parity",
        "machine": about,
        "sizes": to_dict(config),
        "figures": {"huggingface": bare, "transformerlens": peer},
        "ratios": {},
        "notes": notes,
    }


# ---- the bare model ---------------------------------------------------------------------------------------------------


def against_huggingface(model: HookedModel, tokens: Tensor) -> Differences:
    """The largest differences to the module alone. None where the library does not show what to compare with."""
    bare = model.hf(input_ids=tokens, use_cache=False, output_hidden_states=True)
    patterns = _eager(model)(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    plain = model(tokens)
    logits, cache = model.run_with_cache(tokens, lambda name: True)
    streams = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(model.config.n_layers)]
    shown = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(model.config.n_layers)]
    return {
        "logits": largest([plain], [bare.logits]),
        "logits, all captured": largest([logits], [bare.logits]),
        "residual": largest(streams, bare.hidden_states[: len(streams)]),
        "pattern, first layer": largest(shown[:1], patterns[:1]) if patterns else None,
        "pattern": largest(shown, patterns) if patterns else None,
    }


def _eager(model: HookedModel) -> Any:
    """A copy of the module with eager attention."""
    config = copy.deepcopy(model.hf.config)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=model.dtype)
    hf.load_state_dict(model.hf.state_dict())
    return hf.eval()


def largest(ours: list[Tensor], theirs: Any) -> float:
    """The largest absolute difference between tensors pair by pair. Raises ValueError where there are not as many."""
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(ours, theirs, strict=True))


# ---- TransformerLens --------------------------------------------------------------------------------------------------


def against_transformerlens(model: HookedModel, tokens: Tensor) -> Differences:
    """The largest difference at each point that both have, over all layers, then at the logits. The peer opens what the
    module saves in a folder, with a tokenizer, as it will have one."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token=_SPECIAL["eos_token"]))
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as folder:
        model.hf.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, **_SPECIAL).save_pretrained(folder)
        logits, theirs = open_side("transformerlens", folder, "cpu").run_with_cache(tokens)
    own_logits, ours = model.run_with_cache(tokens)
    return {**at_points(ours, theirs), "logits": largest([own_logits], [logits])}


def at_points(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference at each point that both caches have. Scores are compared where attention may look:
    behind the mask the one has -inf, the other the lowest number."""
    found: dict[str, float] = {}
    for name, mine in ours.items():
        text, point = str(name), HookName.parse(str(name)).point
        if text not in theirs:
            continue
        difference = (mine.float() - theirs[text].float()).abs()  # a positional embedding's batch axis may be 1
        if point == "attn.hook_attn_scores":
            seen = ours[text.replace("attn_scores", "pattern")] > 0
            difference = difference[seen]
        found[point] = max(found.get(point, 0.0), float(difference.max()))
    return {point: found[point] for point in POINTS if point in found}
