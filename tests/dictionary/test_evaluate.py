"""Every figure of `evaluate`, against direct computation from one big tensor."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from microtome.common.errors import ConfigError, InputError, ModelError
from microtome.dictionary import Dictionary, EvaluateConfig, evaluate
from microtome.dictionary.evaluate import Moments, density_histogram
from microtome.dictionary.moments import is_sink
from microtome.model import HookedModel
from microtome.text import TokenDataset

from ..makers import random_dictionary  # noqa: TID252 – shared by tests

HOOK = "blocks.1.hook_resid_pre"
EVERYTHING = EvaluateConfig(n_tokens=10**9, function_tokens=24 * 30, batch_tokens=100)


def make(folder: Path, *, d_in: int = 32, hook: str = HOOK, model: str = "tiny-llama") -> Dictionary:
    return random_dictionary(folder, model=model, hook=hook, d_in=d_in, d_sae=200, k=5, dead=range(50))


def test_reconstruction_figures(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    sae = make(tmp_path / "sae")
    found = evaluate(tiny_llama, sae, tiny_dataset, EVERYTHING)
    tokens = torch.from_numpy(tiny_dataset.batch(0, tiny_dataset.n_sequences))
    x = tiny_llama.run_with_cache(tokens)[1][HOOK].double()
    text = ~torch.isin(tokens, torch.tensor([0, 1]))  # not BOS, not the separator
    rows, decoded = x[text], sae(x[text].float()).double()
    codes = sae.encode(rows.float()).to_dense()

    def fvu(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().sum() / (a - a.mean(0)).square().sum())

    assert found.n_tokens == int(text.sum())
    assert found.l0 == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert found.fvu == pytest.approx(fvu(rows, decoded), rel=1e-5)
    loudest = rows.var(0).topk(2).indices.sort().values
    quiet = [i for i in range(32) if i not in loudest]
    assert found.outlier_dimensions == tuple(loudest.tolist())
    assert found.outlier_variance == pytest.approx(float(rows.var(0)[loudest].sum() / rows.var(0).sum()), rel=1e-5)
    assert found.fvu_without_outliers == pytest.approx(fvu(rows[:, quiet], decoded[:, quiet]), rel=1e-5)
    everywhere = x.flatten(0, 1)
    assert found.fvu_all_positions == pytest.approx(fvu(everywhere, sae(everywhere.float()).double()), rel=1e-5)
    assert found.cosine == pytest.approx(float(functional.cosine_similarity(rows, decoded).mean()), rel=1e-5)
    assert found.norm_ratio == pytest.approx(float((decoded.norm(dim=1) / rows.norm(dim=1)).mean()), rel=1e-5)
    fired = (codes > 0).sum(0)
    assert found.n_dead == int((fired == 0).sum()) >= 50
    assert found.dead_fraction == found.n_dead / 200
    assert sum(found.density_counts) == 200 - found.n_dead


def test_sinks_are_rows_of_outsized_squared_norm() -> None:
    x = torch.eye(4).repeat(5, 1)
    x[3] *= 3.1  # squared 9.61
    x[7] *= 3.2  # squared 10.24
    assert is_sink(x).nonzero().flatten().tolist() == [7]


def test_attention_sinks_can_be_left_out(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    """One word of a very long embedding stands for them."""
    sae, tokens = make(tmp_path / "sae"), torch.from_numpy(tiny_dataset.batch(0, tiny_dataset.n_sequences))
    embedding, word = tiny_llama.hf.get_parameter("model.embed_tokens.weight").data, int(tokens[0, 5])
    embedding[word] *= 100
    try:
        found = evaluate(tiny_llama, sae, tiny_dataset, EVERYTHING)
        rows = tiny_llama.run_with_cache(tokens)[1][HOOK][~torch.isin(tokens, torch.tensor([0, 1]))]
    finally:
        embedding[word] /= 100
    usual = rows.square().sum(1) < 10 * rows.square().sum(1).median()
    assert found.n_sinks == int((~usual).sum()) == int((tokens == word).sum())
    rows = rows[usual].double()
    error = (rows - sae(rows.float()).double()).square().sum()
    assert found.fvu_without_sinks == pytest.approx(float(error / (rows - rows.mean(0)).square().sum()), rel=1e-5)
    assert abs(found.fvu_without_sinks - found.fvu) > 0.05


def test_function_figures(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    """The block's own layers called one after another on replaced activations, with no hooks."""
    sae = make(tmp_path / "sae")
    found = evaluate(tiny_llama, sae, tiny_dataset, EVERYTHING)
    tokens = torch.from_numpy(tiny_dataset.batch(0, 30))
    text = ~torch.isin(tokens, torch.tensor([0, 1]))
    x = tiny_llama.run_with_cache(tokens)[1][HOOK]
    rotary = tiny_llama.hf.get_submodule("model.rotary_emb")(x, torch.arange(24)[None])

    def log_probabilities(activation: Tensor) -> Tensor:
        for layer in list(tiny_llama.hf.get_submodule("model.layers").children())[1:]:
            activation = layer(activation, position_embeddings=rotary, attention_mask=None)
        normed = tiny_llama.hf.get_submodule("model.norm")(activation)
        log_p: Tensor = (normed @ tiny_llama.W_U).double().log_softmax(-1)
        return log_p[:, :-1][text[:, 1:]]

    target = tokens[:, 1:][text[:, 1:]][:, None]
    replaced = {"clean": x, "spliced": x.clone(), "zero": x.clone()}
    replaced["spliced"][text] = sae(x[text])
    replaced["zero"][text] = 0
    log_p = {name: log_probabilities(activation) for name, activation in replaced.items()}
    ce = {name: float(-lp.gather(1, target).mean()) for name, lp in log_p.items()}
    kl = {name: float((log_p["clean"].exp() * (log_p["clean"] - lp)).sum(-1).mean()) for name, lp in log_p.items()}
    assert found.n_function_tokens == len(target)
    assert (found.ce_clean, found.ce_spliced, found.ce_zero) == pytest.approx(tuple(ce.values()), rel=1e-4)
    assert (found.kl_spliced, found.kl_zero) == pytest.approx((kl["spliced"], kl["zero"]), rel=1e-3)
    assert found.ce_recovered == pytest.approx((ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]), rel=1e-3)
    assert found.kl_recovered == pytest.approx((kl["zero"] - kl["spliced"]) / kl["zero"], rel=1e-3)


def test_without_function_tokens_there_are_no_function_figures(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    found = evaluate(tiny_llama, make(tmp_path / "sae"), tiny_dataset, EvaluateConfig(n_tokens=500, function_tokens=0))
    assert found.ce_recovered is None
    assert found.n_tokens <= 504


def test_moments_do_not_lose_a_small_variance_beside_a_large_mean() -> None:
    """In single precision, the sum of squares of such data has no digit left for the variance."""
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 1000.0
    moments = Moments(3)
    for batch in x.split(700):
        moments.add(batch, batch + 0.05)
    expected = (x - (x + 0.05)).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert moments.fvu() == pytest.approx(float(expected), rel=1e-6)


def test_the_density_histogram_counts_each_living_latent_once() -> None:
    counts, edges = density_histogram(torch.tensor([0, 1, 10, 10, 1000]), 1000)
    where = {round(edges[i], 3): c for i, c in enumerate(counts) if c}
    assert where == {-3.0: 1, -2.0: 2, -0.125: 1}


def test_a_dictionary_that_does_not_fit_is_refused(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"d_in 16.*32"):
        evaluate(tiny_llama, make(tmp_path / "a", d_in=16), tiny_dataset)
    with pytest.raises(ConfigError, match="another model"):
        evaluate(tiny_llama, make(tmp_path / "b", model="gpt2"), tiny_dataset)
    broken = make(tmp_path / "d")
    with torch.no_grad():
        broken.W_dec[3, 1] = torch.nan
    with pytest.raises(InputError, match="no numbers"):
        evaluate(tiny_llama, broken, tiny_dataset)
    with pytest.raises(ModelError, match="layer from 0 to 2"):
        evaluate(tiny_llama, make(tmp_path / "c", hook="blocks.9.hook_resid_pre"), tiny_dataset)
