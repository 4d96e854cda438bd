"""An index of a temporal dictionary: its codes are those of whole sequences, from the model or from a store."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from microtome.activations import HarvestConfig, harvest
from microtome.dictionary import TemporalDictionary, load_any_dictionary, save_dictionary
from microtome.features import IndexConfig, build_index
from microtome.model import HookedModel
from microtome.model.families import LLAMA
from microtome.text import TokenDataset

from ..makers import random_llama, random_temporal, tiny_text_tokenizer, tokenized_texts  # noqa: TID252 – shared by tests

HOOK = "blocks.1.hook_resid_pre"
CONFIG = IndexConfig(top=5, bands=3, per_band=2, window=8, batch=4, checkpoint_every=8)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    tokenizer = tiny_text_tokenizer()
    return HookedModel(random_llama(len(tokenizer), n_ctx=64), tokenizer, name="tiny-llama", spec=LLAMA)


@pytest.fixture(scope="module")
def dataset(model: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    assert model.tokenizer is not None
    return tokenized_texts(tmp_path_factory.mktemp("text"), model.tokenizer, times=6, context=24)


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> TemporalDictionary:
    folder = tmp_path_factory.mktemp("sae") / "sae"
    save_dictionary(random_temporal("tiny-llama", HOOK, d_in=24, scale=0.5), folder)
    made = load_any_dictionary(folder)
    assert isinstance(made, TemporalDictionary)
    return made


def test_the_index_has_the_codes_of_whole_sequences(
    model: HookedModel, sae: TemporalDictionary, dataset: TokenDataset, tmp_path: Path
) -> None:
    tokens = torch.from_numpy(dataset.batch(0, dataset.n_sequences))
    with torch.no_grad():
        rows = sae.in_context(model.activations(tokens, HOOK)[HOOK])
        dense = sae.encode(rows.flatten(0, 1)).to_dense().view(*tokens.shape, -1).numpy()
        shuffled = sae.in_context(rows[..., :24].flip(1)).flip(1)
    assert (shuffled[..., 24:] - rows[..., 24:]).norm() > 0.1 * rows[..., 24:].norm()  # order counts here
    text = np.isin(tokens.numpy(), dataset.special_ids, invert=True)
    dense = np.where(text[:, :, None], dense, 0)
    index = build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)
    summary = index.summary
    assert (summary.architecture, summary.d_in, summary.d_sae, summary.k) == ("temporal", 24, 48, 4)
    assert summary.n_tokens == text.sum()
    seen = 0
    for row in index.features(alive=None, sort="feature", descending=False, limit=100).rows:
        fired = dense[:, :, row.feature][dense[:, :, row.feature] > 0]
        assert abs(row.count - len(fired)) <= 2
        if len(fired):
            seen += 1
            np.testing.assert_allclose([row.mean, row.max], [fired.mean(), fired.max()], rtol=1e-3)
            best = index.examples(row.feature)[0]
            assert dense[best.sequence, best.position, row.feature] == pytest.approx(best.value, rel=1e-4)
    assert seen > 30
    prompt = "The court held the train"
    fires = index.top_features(prompt, model=model, dictionary=sae)
    x = model.activations(model.to_tokens(prompt), HOOK)[HOOK]
    plain = sae.encode(sae.in_context(x)[0]).to_dense()
    assert [{f for f, _ in each} for each in fires.features[1:]] == [
        set(each.nonzero()[:, 0].tolist()) for each in plain[1:]
    ]


def test_a_store_gives_the_same_index(
    model: HookedModel, sae: TemporalDictionary, dataset: TokenDataset, tmp_path: Path
) -> None:
    store = harvest(model, dataset, HOOK, tmp_path / "store", config=HarvestConfig(dtype="fp32", batch_tokens=4 * 24))
    build_index(model, sae, dataset, tmp_path / "a", config=CONFIG)
    build_index(model, sae, dataset, tmp_path / "b", config=CONFIG, store=store)
    for name in ("features.parquet", "histogram.parquet", "examples.parquet"):
        assert pq.read_table(tmp_path / "a" / name).equals(pq.read_table(tmp_path / "b" / name))
