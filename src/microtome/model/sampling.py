"""Sampling a corpus from a model: a recipe of prompts in, JSON lines of documents out.

A batch of prompts of unequal length needs no padding here: all rows start at position 0 and each is *forced* along its
prompt, then sampled. Prompts of like length share a batch. The keys and values live in a static cache, and a step reads
them once per key/value head (`decoding.py`). Batch `b` depends on the recipe and the seed alone, so a stopped run goes
on with the next batch and ends with the same corpus.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StaticCache

from microtome.common.artifacts import atomic_file, draft, read_json, write_json
from microtome.common.config import require, to_dict
from microtome.common.device import derive_seed, generator
from microtome.common.errors import ModelError
from microtome.common.progress import progress
from microtome.model.decoding import grouped_decoding
from microtome.model.hooked import HookedModel

CORPUS_FILE = "corpus.jsonl.zst"


@dataclass(frozen=True, kw_only=True)
class PromptKind:
    """One kind of text: how often it is drawn, requests for the chat format, and openings to continue as plain text."""

    name: str
    weight: int
    requests: tuple[str, ...]
    openings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """What to sample. `{topic}`-like gaps in prompts are filled from `words`; `chat_share` of the prompts are chat
    requests."""

    documents: int
    max_new_tokens: int
    kinds: tuple[PromptKind, ...]
    words: dict[str, tuple[str, ...]]
    chat_share: float = 0.5
    temperature: float = 1.0
    top_k: int = 200
    top_p: float = 0.95
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.documents > 0, "documents must be positive", got=self.documents)
        require(self.max_new_tokens > 0, "max_new_tokens must be positive", got=self.max_new_tokens)
        require(self.temperature > 0, "temperature must be positive", got=self.temperature)
        require(0 < self.top_p <= 1, "top_p must be in (0, 1]", got=self.top_p)
        require(self.top_k > 0 and self.batch > 0, "top_k and batch must be positive", got=(self.top_k, self.batch))
        require(0 <= self.chat_share <= 1, "chat_share must be in [0, 1]", got=self.chat_share)
        require(bool(self.kinds), "a recipe needs at least one kind of text")


@dataclass(frozen=True)
class _Prompt:
    number: int
    kind: str
    ids: list[int]
    kept_from: int  # the document begins here: at 0 for an opening, behind the request for a chat


def sample_corpus(model: HookedModel, recipe: CorpusRecipe, out: str | Path, *, overwrite: bool = False) -> Path:
    """Sample the recipe's documents into the folder `out` (`corpus.jsonl.zst`, rows `{"text", "source"}`).

    Resumes at the next batch when an earlier run was stopped. Returns the folder.
    """
    config = {"model": model.name, "dtype": str(model.dtype), "recipe": to_dict(recipe)}
    made = draft(out, "corpus", config, overwrite=overwrite, resume=True)
    prompts = sorted(_prompts(model, recipe), key=lambda prompt: (len(prompt.ids), prompt.number))
    batches = [prompts[i : i + recipe.batch] for i in range(0, len(prompts), recipe.batch)]
    parts = [made.folder / f"part-{i:05d}.json" for i in range(len(batches))]
    with progress(len(prompts), "sample a corpus", "documents") as bar:
        for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            if not part.exists():
                write_json(
                    part, {"rows": _sample_batch(model, recipe, batch, seed=derive_seed(recipe.seed, "batch", i))}
                )
            bar.advance(len(batch))
    rows = [row for part in parts for row in read_json(part)["rows"]]
    rows.sort(key=lambda row: row["number"])
    n_tokens = sum(row["n_tokens"] for row in rows)
    with atomic_file(made.folder / CORPUS_FILE) as file, pa.CompressedOutputStream(str(file), "zstd") as stream:
        for row in rows:
            line = {"text": row["text"], "source": f"{row['kind']}#{row['number']}"}
            stream.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    for part in parts:
        part.unlink()
    return made.publish(overwrite=overwrite, seed=recipe.seed, n_documents=len(prompts), n_tokens=n_tokens)


def _prompts(model: HookedModel, recipe: CorpusRecipe) -> list[_Prompt]:
    """All prompts of the recipe, in order, each drawn from its own seed."""
    weights = [kind.weight for kind in recipe.kinds]
    prompts = []
    for i in range(recipe.documents):
        draw = random.Random(derive_seed(recipe.seed, "prompt", i))
        kind = draw.choices(recipe.kinds, weights)[0]
        chat = draw.random() < recipe.chat_share
        text = draw.choice(kind.requests if chat else kind.openings)
        for gap, words in recipe.words.items():
            if "{" + gap + "}" in text:
                text = text.replace("{" + gap + "}", draw.choice(words))
        if chat:
            ids = _chat_ids(model, text)
            prompts.append(_Prompt(i, kind.name, ids, len(ids)))
        else:
            prompts.append(_Prompt(i, kind.name, model.to_tokens(text)[0].tolist(), 0))
    return prompts


def _chat_ids(model: HookedModel, request: str) -> list[int]:
    if model.tokenizer is None or not model.tokenizer.chat_template:
        raise ModelError(
            f"{model.name} has no chat template", fix="Use a recipe with chat_share 0: plain openings only"
        )
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": request}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _sample_batch(
    model: HookedModel, recipe: CorpusRecipe, batch: Sequence[_Prompt], *, seed: int
) -> list[Mapping[str, str | int]]:
    drawn = sample_continuations(
        model,
        [prompt.ids for prompt in batch],
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        seed=seed,
    )
    assert model.tokenizer is not None
    rows: list[Mapping[str, str | int]] = []
    for prompt, ids in zip(batch, drawn, strict=True):
        kept = ids[prompt.kept_from :]
        text = str(model.tokenizer.decode(kept, skip_special_tokens=True))
        rows.append({"number": prompt.number, "kind": prompt.kind, "text": text, "n_tokens": len(kept)})
    return rows


@torch.inference_mode()
def sample_continuations(
    model: HookedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 200,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[list[int]]:
    """Each prompt's ids followed by up to `max_new_tokens` sampled ones; a row ends before its first end-of-sequence
    token.

    The nucleus (`top_p`) is taken within the `top_k` likeliest tokens.
    """
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    total = int(lengths.max()) + max_new_tokens
    rows = torch.zeros(len(prompts), total, dtype=torch.long, device=model.device)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=model.device)
    cache = StaticCache(config=model.hf.config, max_cache_len=total)
    draws = generator(seed, "sample", device=model.device)
    ends = _end_ids(model)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    shortest = int(lengths.min())
    step = rows[:, :shortest]
    with grouped_decoding(model.hf):
        for position in range(shortest, total):
            logits = model.hf(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            choice = _draw(logits / temperature, top_k, top_p, draws)
            forced = position < lengths
            over = position >= lengths + max_new_tokens
            ended |= (torch.isin(choice, ends) & ~forced) | over
            rows[:, position] = torch.where(forced, rows[:, position], torch.where(ended, ends[0], choice))
            if bool(ended.all()):
                break
            step = rows[:, position : position + 1]
    return [
        _cut(row.tolist(), len(prompt), max_new_tokens, set(ends.tolist()))
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def _draw(
    logits: Float[Tensor, "batch d_vocab"], top_k: int, top_p: float, draws: torch.Generator
) -> Int[Tensor, " batch"]:
    """One token per row from the nucleus of the `top_k` likeliest."""
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=draws)).squeeze(1)


def _end_ids(model: HookedModel) -> Int[Tensor, " ends"]:
    named = getattr(model.hf.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    if model.tokenizer is not None:
        ids = [*ids, model.tokenizer.eos_token_id, model.tokenizer.unk_token_id]
    known = sorted({i for i in ids if isinstance(i, int)})
    return torch.tensor(known or [-1], device=model.device)


def _cut(row: list[int], n_prompt: int, max_new_tokens: int, ends: set[int]) -> list[int]:
    drawn = row[n_prompt : n_prompt + max_new_tokens]
    stop = next((i for i, token in enumerate(drawn) if token in ends), len(drawn))
    return row[:n_prompt] + drawn[:stop]
