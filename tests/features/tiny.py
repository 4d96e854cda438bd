"""A small feature index made by the real writer: 64 latents with a seed, no model and no torch. The server's tests use
it too.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from microtome.common.artifacts import draft, write_json
from microtome.common.config import to_dict
from microtome.features.config import KIND, IndexConfig, IndexRecord, PointLatents, histogram_edges
from microtome.features.summary import FeatureSummary
from microtome.features.write import WeightFacts, write_tables

TEXTS = [
    "The court held that the contract was void, and the appeal was dismissed with costs.",
    "Whisk the eggs with sugar until pale, then fold in the flour and bake for forty minutes.",
    "def area(radius):\n\treturn 3.14159 * radius ** 2\n\nprint(area(2))\n",
    "Le café était déjà fermé quand nous sommes arrivés à la gare de Genève.",
    "She laughed 🙂 and waved; the train 🚂 was leaving, and nobody had told the children 👩‍👩‍👧.",
    "東京は雨が降っています。明日は晴れるでしょう。",
    "In 1969 the first people walked on the Moon; the last so far left it in 1972.",
    "“Who is there?” asked the old man. – “It is only me,” said the wind.",
    "Goal! Two minutes before the end the keeper could do nothing: 2–1 to the visitors.",
    "<b>Bold</b> & <script>alert('no')</script> are shown as they are written.",
    "The enzyme binds its substrate, lowers the activation energy and is released unchanged.",
    "Dear Ms Hall, thank you for your letter of 3 May. We regret the delay. Yours sincerely, T. Okafor",
]
BOS = "<|bos|>"
D_SAE, D_IN, CONTEXT, N_SEQUENCES, K = 64, 16, 32, 96, 6
DEAD = (7, 40)
WORDS = {
    1: " court",
    2: " sugar",
    3: "return",
    4: " gare",
    5: " wind",
    6: " train",
    8: " Moon",
    9: " enzyme",
    10: " letter",
}
"""Latents that answer to one word above all, so that a test knows what a search must find."""


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer trained on `TEXTS`; small, so that rare characters fall into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(BOS, special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def make_tokens(tokenizer: Tokenizer, seed: int = 0) -> np.ndarray:
    """int64 [N_SEQUENCES, CONTEXT]: `TEXTS` in random order, packed, with a BOS at each start."""
    rng = np.random.default_rng(seed)
    bos = tokenizer.token_to_id(BOS)
    stream: list[int] = []
    while len(stream) < N_SEQUENCES * (CONTEXT - 1):
        stream += tokenizer.encode(TEXTS[rng.integers(len(TEXTS))]).ids
    body = np.array(stream[: N_SEQUENCES * (CONTEXT - 1)], np.int64).reshape(N_SEQUENCES, CONTEXT - 1)
    return np.concatenate([np.full((N_SEQUENCES, 1), bos, np.int64), body], axis=1)


def make_codes(tokens: np.ndarray, tokenizer: Tokenizer, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes (indices, values), each [tokens without BOS, K]: every latent likes a few tokens and follows what it likes.

    The latents in `DEAD` never fire, and some rows have fewer than K firings.
    """
    rng = np.random.default_rng(seed)
    liking = rng.gamma(0.05, 3.0, (tokenizer.get_vocab_size(), D_SAE))
    for latent, word in WORDS.items():
        liking[tokenizer.token_to_id(word.replace(" ", "Ġ")), latent] = 25.0
    drive = liking[tokens]
    drive[:, 2:] += 0.35 * drive[:, 1:-1]
    drive = drive[:, 1:].reshape(-1, D_SAE) * rng.uniform(0.8, 1.25, (1, D_SAE))
    drive[:, list(DEAD)] = 0.0
    drive[drive < 0.02] = 0.0
    indices = np.argsort(-drive, axis=1, kind="stable")[:, :K].astype(np.int32)
    return indices, np.take_along_axis(drive, indices, 1).astype(np.float32)


def make_facts(n_vocab: int, seed: int = 0) -> WeightFacts:
    """Logit effects and neighbours of a random dictionary, by plain arithmetic."""
    rng = np.random.default_rng(seed)
    W_dec, W_U = rng.normal(size=(D_SAE, D_IN)), rng.normal(size=(D_IN, n_vocab))
    effect = W_dec @ W_U
    effect -= effect.mean(axis=1, keepdims=True)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    cosine = unit @ unit.T - 2 * np.eye(D_SAE)
    high, low, near = (np.argsort(x, axis=1)[:, :10] for x in (-effect, effect, -cosine))
    return WeightFacts(
        top_logit_ids=high.astype(np.int32),
        top_logit_values=np.take_along_axis(effect, high, 1).astype(np.float32),
        bottom_logit_ids=low.astype(np.int32),
        bottom_logit_values=np.take_along_axis(effect, low, 1).astype(np.float32),
        neighbour_ids=near.astype(np.int32),
        neighbour_cosines=np.take_along_axis(cosine, near, 1).astype(np.float32),
        encoder_norm=rng.uniform(0.5, 1.5, D_SAE).astype(np.float32),
        decoder_norm=np.linalg.norm(W_dec, axis=1).astype(np.float32),
        bias=rng.normal(size=D_SAE).astype(np.float32),
    )


def make_tiny_index(folder: Path, *, layers: tuple[PointLatents, ...] = ()) -> Path:
    """Write the index into `folder` (which must not exist) and return it; with `layers` it says that its latents read
    several points. Takes about 0.1 s."""
    tokenizer = make_tokenizer()
    tokens = make_tokens(tokenizer)
    config = IndexConfig(top=12, per_band=3, window=16, histogram_top=8)
    summary = FeatureSummary(D_SAE, CONTEXT, config)
    counted = np.ones(tokens.shape, np.bool_)
    counted[:, 0] = False
    summary.update(0, tokens, counted, *make_codes(tokens, tokenizer))
    record = IndexRecord(
        model="tiny-model",
        dictionary="tiny-dictionary",
        dictionary_fingerprint="0123456789abcdef",
        hook_name="blocks.1.hook_resid_pre",
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        architecture="topk",
        dataset="tiny-texts",
        dataset_fingerprint="fedcba9876543210",
        n_sequences=N_SEQUENCES,
        context=CONTEXT,
        bos_id=tokenizer.token_to_id(BOS),
        layers=layers,
        histogram_edges=histogram_edges(8),
        settings=config,
    )
    making = draft(folder, KIND, to_dict(record))
    write_tables(making.folder, summary, make_facts(tokenizer.get_vocab_size()), tokens, lambda s, _: f"texts.txt#{s}")
    (making.folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str())), encoding="utf-8")
    write_json(making.folder / "summary.json", {"n_tokens": summary.n_tokens, "n_sequences": N_SEQUENCES})
    write_json(making.folder / "metrics.json", {"l0": 5.5, "fvu": 0.12, "ce_recovered": 0.93})
    return making.publish()
