"""Sampling: against the library's own greedy generation, seeds, recipes and resuming."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import StaticCache

from microtome.common.config import from_dict
from microtome.common.errors import ConfigError, ModelError
from microtome.model import HookedModel
from microtome.model.decoding import grouped_decoding
from microtome.model.sampling import CORPUS_FILE, CorpusRecipe, PromptKind, sample_continuations, sample_corpus

RECIPE = CorpusRecipe(
    documents=12,
    max_new_tokens=6,
    kinds=(PromptKind(name="a", weight=2, requests=(), openings=("The {animal} sat", "Goal!")),),
    words={"animal": ("cat", "dog")},
    chat_share=0.0,
    batch=5,
)


def test_greedy_sampling_is_the_librarys_greedy_generation(smol: HookedModel) -> None:
    prompts = [smol.to_tokens(text)[0].tolist() for text in ("The capital of France is", "1, 2, 3, 4,")]
    ours = sample_continuations(smol, prompts, max_new_tokens=8, top_k=1)
    for prompt, row in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        theirs = smol.hf.generate(ids, **settings)[0].tolist()  # type: ignore[operator] # typed as a submodule may be
        assert row == [token for i, token in enumerate(theirs) if i < len(prompt) or token != 2]


def test_grouped_decoding_gives_the_full_passes_logits(tiny_llama: HookedModel) -> None:
    tokens = torch.randint(2, 320, (3, 12), generator=torch.Generator().manual_seed(0))
    full = tiny_llama(tokens)
    cache = StaticCache(config=tiny_llama.hf.config, max_cache_len=20)
    with torch.no_grad(), grouped_decoding(tiny_llama.hf):
        steps = [tokens[:, :4], *tokens[:, 4:].split(1, dim=1)]
        pieces = [tiny_llama.hf(step, past_key_values=cache, use_cache=True).logits for step in steps]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-4)
    assert torch.equal(tiny_llama(tokens), full), "the model's own attention is back"


def test_a_seed_gives_one_text_and_another_seed_another(tiny_llama: HookedModel) -> None:
    prompts = [[0, 5, 6], [0, 7]]
    first, again, other = (sample_continuations(tiny_llama, prompts, max_new_tokens=10, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert all(row[: len(p)] == p and len(row) <= len(p) + 10 for p, row in zip(prompts, first, strict=True))


def test_draws_stay_in_the_nucleus(tiny_llama: HookedModel) -> None:
    """With a small top_p each token must be among the likeliest that hold that much probability."""
    [row] = sample_continuations(tiny_llama, [[0, 5, 6]], max_new_tokens=12, top_p=0.3, seed=3)
    probabilities = tiny_llama(torch.tensor([row]))[0].softmax(-1)
    for position in range(2, len(row) - 1):
        likelier = probabilities[position][probabilities[position] > probabilities[position, row[position + 1]] + 1e-6]
        assert likelier.sum() < 0.3 + 1e-4


def read(folder: Path) -> list[dict[str, str]]:
    data = pa.input_stream(str(folder / CORPUS_FILE), compression="zstd").read()
    return [json.loads(line) for line in data.decode().splitlines()]


def test_a_corpus_is_made_by_its_recipe_and_resumes(tiny_llama: HookedModel, tmp_path: Path) -> None:
    whole = sample_corpus(tiny_llama, RECIPE, tmp_path / "whole")
    rows = read(whole)
    assert [row["source"] for row in rows] == [f"a#{i}" for i in range(12)]
    assert all(row["text"].startswith(("The cat sat", "The dog sat", "Goal!")) for row in rows)

    # As a run that was stopped after its second batch leaves it.
    stopped = tmp_path / "stopped.partial"
    sample_corpus(tiny_llama, RECIPE, tmp_path / "other")
    (tmp_path / "other").rename(stopped)
    (stopped / CORPUS_FILE).unlink()
    (stopped / "provenance.json").unlink()
    assert read(sample_corpus(tiny_llama, RECIPE, tmp_path / "stopped")) == rows


def test_bad_recipes(tiny_llama: HookedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'documents'"):
        from_dict(CorpusRecipe, {"document": 3})
    with pytest.raises(ConfigError, match="temperature"):
        dataclasses.replace(RECIPE, temperature=0.0)
    chatty = dataclasses.replace(
        RECIPE, chat_share=1.0, kinds=(PromptKind(name="a", weight=1, requests=("Hi",), openings=()),)
    )
    with pytest.raises(ModelError, match="no chat template"):
        sample_corpus(tiny_llama, chatty, tmp_path / "chat")
