"""`build_index` on a tiny real model: against plain arithmetic, killed and resumed, and with parts that do not fit."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from microtome.activations import HarvestConfig, harvest
from microtome.common.artifacts import read_json, write_json
from microtome.common.errors import ArtifactError, ConfigError, InputError, ModelError
from microtome.dictionary import Dictionary, Origin
from microtome.dictionary.activation import TopK
from microtome.features import IndexConfig, build_index, open_index
from microtome.features.build import _Pass
from microtome.features.weights import LatentWeights, logit_effects, nearest_latents
from microtome.model import HookedModel
from microtome.model.families import GPT2, LLAMA
from microtome.text import TokenDataset

from ..makers import random_dictionary, random_llama, tiny_text_tokenizer, tokenized_texts  # noqa: TID252 – shared by tests
from .tiny import BOS

HOOK = "blocks.1.hook_resid_pre"
CONFIG = IndexConfig(top=5, bands=3, per_band=2, window=8, batch=4, checkpoint_every=8)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    tokenizer = tiny_text_tokenizer()
    hf = random_llama(len(tokenizer), n_ctx=64)
    torch.nn.init.uniform_(hf.model.norm.weight, 0.5, 1.5)
    return HookedModel(hf, tokenizer, name="tiny-llama", spec=LLAMA)


@pytest.fixture(scope="module")
def dataset(model: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    assert model.tokenizer is not None
    return tokenized_texts(tmp_path_factory.mktemp("text"), model.tokenizer, times=6, context=24)


def make_sae(folder: Path, *, d_in: int = 24, name: str = "tiny-llama", hook: str = HOOK, seed: int = 0) -> Dictionary:
    return random_dictionary(folder, model=name, hook=hook, d_in=d_in, dead=[3], seed=seed)


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    return make_sae(tmp_path_factory.mktemp("sae") / "sae")


@pytest.fixture(scope="module")
def built(model: HookedModel, sae: Dictionary, dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "index"
    index = build_index(model, sae, dataset, out, config=CONFIG, metrics={"fvu": 0.5})
    assert index.summary.metrics == {"fvu": 0.5}
    return out


@pytest.mark.parametrize("share_of_sinks", [0.0, 0.3])
def test_index_equals_a_plain_run(
    share_of_sinks: float, model: HookedModel, sae: Dictionary, dataset: TokenDataset, built: Path, tmp_path: Path
) -> None:
    """Of all text tokens but those whose activation is too long: as a rule none here, or the longest 30 %."""
    tokens = torch.from_numpy(dataset.batch(0, dataset.n_sequences))
    with torch.no_grad():
        activations = model.activations(tokens, HOOK)[HOOK]
        dense = sae.encode(activations.flatten(0, 1)).to_dense().view(*tokens.shape, -1).numpy()
    text = np.isin(tokens.numpy(), dataset.special_ids, invert=True)
    n_text, lengths, index = int(text.sum()), activations.norm(dim=-1).numpy(), open_index(built)
    if share_of_sinks:
        limit = float(np.quantile(lengths[text], 1 - share_of_sinks))
        index = build_index(model, sae, dataset, tmp_path / "i", config=dataclasses.replace(CONFIG, sink_norm=limit))
        text &= lengths <= limit
        assert 0.6 * n_text < text.sum() < 0.8 * n_text
    dense = np.where(text[:, :, None], dense, 0)
    assert index.summary.n_tokens == text.sum()
    assert read_json(index.path / "summary.json")["n_sinks"] == n_text - text.sum()
    assert (index.summary.n_dead, index.summary.d_sae) == (int((dense.max((0, 1)) == 0).sum()), 40)
    for row in index.features(alive=None, sort="feature", descending=False).rows:
        fired = dense[:, :, row.feature][dense[:, :, row.feature] > 0]
        # A batch of other size may round otherwise, so that a latent on the edge of the top k falls out.
        assert abs(row.count - len(fired)) <= 2
        if len(fired):
            np.testing.assert_allclose([row.mean, row.max], [fired.mean(), fired.max()], rtol=1e-3)
            best = index.examples(row.feature)[0]
            assert dense[best.sequence, best.position, row.feature] == pytest.approx(best.value, rel=1e-4)
            assert best.token_ids == tokens[best.sequence, best.start : best.start + 8].tolist()
            document = next(
                (d for d in dataset.document_of(best.sequence) if d.start <= best.position < d.stop),
                None,
            )
            assert best.document == (document.source if document else None)
    assert not index.feature(3).row.alive


def test_top_token_has_the_most_activation_in_the_top_windows(built: Path) -> None:
    index = open_index(built)
    for f in range(40):
        totals: dict[int, float] = {}
        for example in index.examples(f):
            for token, value in zip(example.token_ids, example.activations, strict=True):
                totals[token] = totals.get(token, 0.0) + value
        best = min(totals, key=lambda t: (-totals[t], t)) if totals else -1
        row = index.feature(f).row
        assert row.top_token == best or totals[row.top_token] == pytest.approx(totals[best], rel=1e-6)


@pytest.mark.parametrize("killed_at", [0, 3, 9])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    model: HookedModel,
    sae: Dictionary,
    dataset: TokenDataset,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    class Killed(BaseException):
        pass

    seen: list[int] = []
    whole = _Pass.codes

    def codes(self: _Pass, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen.append(block)
        if len(seen) - 2 == killed_at:  # the first call chooses the histogram
            raise Killed
        return whole(self, block)

    monkeypatch.setattr(_Pass, "codes", codes)
    with pytest.raises(Killed):
        build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)
    assert not (tmp_path / "index").exists()
    with pytest.raises(ArtifactError, match="not finished"):
        open_index(tmp_path / "index")
    monkeypatch.setattr(_Pass, "codes", whole)
    build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)
    for name in ("features.parquet", "histogram.parquet", "examples.parquet", "tokenizer.json", "config.json"):
        assert (tmp_path / "index" / name).read_bytes() == (built / name).read_bytes(), name
    assert not (tmp_path / "index" / "state.npz").exists()


def test_resuming_does_not_run_the_first_batches_again(
    model: HookedModel, sae: Dictionary, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _Pass.codes
    seen: list[int] = []

    def codes(self: _Pass, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen.append(block)
        if block == 7:
            raise KeyboardInterrupt
        return whole(self, block)

    monkeypatch.setattr(_Pass, "codes", codes)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)
    assert seen == [0, *range(8), 0, 6, 7]


def test_the_same_again_opens_and_other_settings_are_refused(
    model: HookedModel, sae: Dictionary, dataset: TokenDataset, built: Path, tmp_path: Path
) -> None:
    before = (built / "examples.parquet").stat().st_mtime_ns
    assert build_index(model, sae, dataset, built, config=CONFIG).summary.n_tokens > 0
    assert (built / "examples.parquet").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match=r"settings.top: 5 there, 6 asked for"):
        build_index(model, sae, dataset, built, config=IndexConfig(top=6, bands=3, per_band=2, window=8, batch=4))
    small = dataset.slice(0, 8)
    build_index(model, sae, small, tmp_path / "index", config=CONFIG)
    with pytest.raises(ArtifactError, match="dataset_fingerprint"):
        build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)
    again = build_index(model, sae, dataset, tmp_path / "index", config=CONFIG, overwrite=True)
    assert again.summary.n_sequences == dataset.n_sequences


def test_a_damaged_checkpoint(
    model: HookedModel, sae: Dictionary, dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("microtome.features.build.weight_facts", _interrupted)
        build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)
    checkpoint = tmp_path / "index.partial" / "state.npz"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"checkpoint .* is damaged"):
        build_index(model, sae, dataset, tmp_path / "index", config=CONFIG)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_from_a_store_the_model_is_not_run(
    model: HookedModel, sae: Dictionary, dataset: TokenDataset, built: Path, tmp_path: Path
) -> None:
    store = harvest(model, dataset, HOOK, tmp_path / "store", config=HarvestConfig(dtype="fp32", batch_tokens=4 * 24))
    index = build_index(model, sae, dataset, tmp_path / "index", config=CONFIG, store=store)
    for name in ("features.parquet", "histogram.parquet", "examples.parquet"):
        assert pq.read_table(tmp_path / "index" / name).equals(pq.read_table(built / name))
    assert index.record.activations["kind"] == "store"
    renamed = HookedModel(model.hf, model.tokenizer, name="renamed", spec=LLAMA)
    with pytest.raises(InputError, match="of another model"):
        build_index(renamed, make_sae(tmp_path / "sae", name="renamed"), dataset, tmp_path / "other", store=store)
    with pytest.raises(InputError, match="another token dataset"):
        build_index(model, sae, dataset.slice(0, 4), tmp_path / "other", config=CONFIG, store=store)


def test_the_page_on_neuronpedia_is_known(model: HookedModel, dataset: TokenDataset, tmp_path: Path) -> None:
    sae = make_sae(tmp_path / "sae")
    cfg = read_json(tmp_path / "sae" / "cfg.json")
    write_json(tmp_path / "sae" / "cfg.json", cfg | {"metadata": cfg["metadata"] | {"neuronpedia_id": "tiny/1-res"}})
    index = build_index(model, sae, dataset.slice(0, 4), tmp_path / "index", config=CONFIG)
    assert index.summary.neuronpedia == "tiny/1-res"


def test_dictionaries_that_do_not_fit(model: HookedModel, dataset: TokenDataset, tmp_path: Path) -> None:
    out = tmp_path / "index"
    with pytest.raises(ConfigError, match="d_in 23"):
        build_index(model, make_sae(tmp_path / "a", d_in=23), dataset, out)
    with pytest.raises(ConfigError, match="another model"):
        build_index(model, make_sae(tmp_path / "b", name="other"), dataset, out)
    with pytest.raises(ModelError, match="hook_resid_pre"):
        build_index(model, make_sae(tmp_path / "c", hook="blocks.1.hook_resid_pr"), dataset, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_model_without_a_tokenizer(
    model: HookedModel, sae: Dictionary, dataset: TokenDataset, tmp_path: Path
) -> None:
    bare = HookedModel(model.hf, None, name=model.name, spec=LLAMA)
    with pytest.raises(ModelError, match="tokenizer"):
        build_index(bare, sae, dataset, tmp_path / "index")


def test_logit_effects_equal_the_plain_product(
    model: HookedModel, sae: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microtome.features.weights._CELLS", 3000)
    monkeypatch.setattr("microtome.features.weights._VOCABULARY_SLICE", 100)
    (top_ids, top_values), (low_ids, low_values) = logit_effects(model, LatentWeights.of(sae).direction, 7)
    assert model.weights.ln_final
    logits = (sae.W_dec * model.weights.ln_final.weight) @ model.W_U
    effects = (logits - logits.mean(1, keepdim=True)).numpy()
    order = np.argsort(-effects, axis=1)
    assert top_ids.tolist() == order[:, :7].tolist()
    assert low_ids.tolist() == order[:, ::-1][:, :7].tolist()
    np.testing.assert_allclose(top_values, np.take_along_axis(effects, top_ids, 1), rtol=1e-4)
    np.testing.assert_allclose(low_values, np.take_along_axis(effects, low_ids, 1), rtol=1e-4)


def test_logit_effects_are_what_an_edit_does() -> None:
    """On GPT-2's LayerNorm: adding a little of a decoder row before the final norm moves the logits in its direction."""
    torch.manual_seed(1)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    torch.nn.init.uniform_(hf.transformer.ln_f.weight, 0.5, 1.5)
    model = HookedModel(hf, None, name="tiny-gpt2", spec=GPT2)
    sae = Dictionary(16, 6, TopK(2), origin=Origin.at("tiny-gpt2", "blocks.0.hook_resid_post"))
    torch.nn.init.normal_(sae.W_dec)
    (ids, values), _ = logit_effects(model, sae.requires_grad_(False).W_dec, 50)
    tokens = torch.tensor([[3, 1, 4]])
    clean, cache = model.run_with_cache(tokens, "blocks.0.hook_resid_post")
    residual = cache["blocks.0.hook_resid_post"].double()
    weight, W_U = hf.transformer.ln_f.weight.double(), hf.lm_head.weight.double().T
    for latent in range(6):
        # The norm's derivative along d is (d − d̄)/σ minus a multiple of the normalised residual itself; take that part
        # off.
        x = residual[0, -1]
        sigma = (x.var(unbiased=False) + 1e-5).sqrt()
        unit = (x - x.mean()) / sigma
        d = sae.W_dec[latent].double()
        step = torch.nn.functional.layer_norm(x + 1e-6 * d, (16,), weight, None) - torch.nn.functional.layer_norm(
            x, (16,), weight, None
        )
        along = step / 1e-6 * sigma + unit * ((d - d.mean()) @ unit / 16) * weight
        logits = along @ W_U
        logits = logits - logits.mean()
        np.testing.assert_allclose(values[latent], logits[torch.from_numpy(ids[latent]).long()].numpy(), atol=2e-3)
    assert clean.shape == (1, 3, 50)


def test_no_logit_effects_outside_the_residual_stream(
    model: HookedModel, tmp_path: Path, dataset: TokenDataset
) -> None:
    sae = make_sae(tmp_path / "mlp", d_in=48, hook="blocks.0.mlp.hook_post")
    index = build_index(model, sae, dataset.slice(0, 8), tmp_path / "index", config=CONFIG)
    feature = index.feature(index.features().rows[0].feature)
    assert (feature.top_logits, feature.bottom_logits) == ([], [])
    assert len(feature.neighbours) == 10
    word = index.feature(index.features().rows[0].feature).row.top_token_string.strip()
    assert index.search(word) != []


def test_nearest_latents_equal_a_plain_sort(sae: Dictionary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.features.weights._CELLS", 300)
    ids, cosines = nearest_latents(sae.W_dec, 6)
    unit = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).numpy()
    plain = unit @ unit.T
    np.fill_diagonal(plain, -9)
    assert ids.tolist() == np.argsort(-plain, axis=1)[:, :6].tolist()
    np.testing.assert_allclose(cosines, -np.sort(-plain, axis=1)[:, :6], atol=1e-6)
    assert nearest_latents(sae.W_dec[:3], 10)[0].shape == (3, 2)


def test_prompts(model: HookedModel, sae: Dictionary, built: Path, tmp_path: Path) -> None:
    index = open_index(built)
    found = index.top_features("The court held the train 🙂", model=model, dictionary=sae, k=3)
    assert found.tokens[0] == BOS
    assert found.features[0] == []
    assert "".join(found.tokens[1:]).endswith("🙂")
    tokens = model.to_tokens("The court held the train 🙂")
    dense = sae.encode(model.activations(tokens, HOOK)[HOOK][0]).to_dense()
    for i, fired in enumerate(found.features[1:], start=1):
        values, latents = dense[i].topk(3)
        assert [f for f, v in fired if v > 0] == [int(f) for f, v in zip(latents, values, strict=True) if v > 0]
    with pytest.raises(ArtifactError, match="not the dictionary"):
        index.top_features("a", model=model, dictionary=make_sae(tmp_path / "other", seed=5))
    with pytest.raises(InputError, match="empty"):
        index.top_features("", model=model, dictionary=sae)
