"""Selection and sparse products, with their gradients, against dense twins."""

from typing import Literal

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.common.errors import ConfigError
from microtome.dictionary import Dictionary, Origin, SparseCodes
from microtome.dictionary.activation import Activation, GroupMax, GroupTopK, TopK
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
    describe,
    parse_config,
)
from microtome.dictionary.kept import DenseKept, SparseKept
from microtome.dictionary.products import Transpose, sampled_products, weighted_sums
from microtome.dictionary.rules import Step
from microtome.dictionary.selection import PreActivations, batch_top_k, kth_largest, top_k
from microtome.dictionary.stack import DataStatistics, Stack

S, N, D, F, K = 2, 20, 7, 33, 4


@pytest.fixture
def mask() -> Bool[Tensor, "S n F"]:
    chosen = torch.rand(S, N, F, generator=torch.Generator().manual_seed(0)) < 0.15
    chosen[0, 3] = False  # a row without entries
    chosen[:, :, 5] = False  # a latent without entries
    return chosen


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SELECTED: dict[str, Tensor] = {
    "normal": normal(50, 1024),
    "many equal": normal(50, 1024).mul(2).round(),
    "mostly negative": normal(50, 1024) - 2.5,
    "all negative": -normal(50, 1024).abs() - 1,
    "one row has all": torch.cat([normal(1, 1024) + 10, normal(49, 1024)]),
    "no groups": normal(50, 1001),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("k", [3, 20, 300])
def test_top_k_finds_the_largest_of_each_row(name: str, dtype: torch.dtype, k: int) -> None:
    pre = SELECTED[name].to(dtype)
    found = top_k(pre, k)
    assert all(len(set(row)) == k for row in found.tolist())
    largest = pre.relu().sort(1).values[:, -k:]
    assert torch.equal(pre.gather(1, found).relu().sort(1).values, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("k", [90, 50 * 20, 50 * 1000])
def test_batch_top_k_finds_the_largest_positive_of_the_batch(name: str, dtype: torch.dtype, k: int) -> None:
    pre = SELECTED[name].to(dtype)
    flat = pre.flatten()
    edge = flat.sort(descending=True).values[k - 1].clamp_min(0)
    expected = ((flat >= edge) & (flat > 0)).nonzero().squeeze(1)
    places = batch_top_k(pre, k)
    assert torch.equal(places.sort().values, expected)
    assert bool(((places // pre.shape[1]).diff() >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_top_k_of_more_columns_than_sixteen_bits_number(dtype: torch.dtype) -> None:
    pre = normal(3, (1 << 16) + 5).to(dtype)  # in no groups
    pre[:, -2] = 9.0
    found = top_k(pre, 4)
    assert torch.equal(pre.gather(1, found).sort(1).values, pre.sort(1).values[:, -4:])
    assert bool((found == pre.shape[1] - 2).any(1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=["fp32", "bf16", "int32"])
@pytest.mark.parametrize("k", [1, 7, 100, 200])
def test_kth_largest(dtype: torch.dtype, k: int) -> None:
    values = normal(100).mul(10).to(dtype)
    assert float(kth_largest(values, k)) == sorted(values.tolist(), reverse=True)[min(k, 100) - 1]


def test_blocks_of_rows_are_the_whole_and_need_it_not() -> None:
    rows, encoder, b_enc = normal(S, 1100, D), normal(S, F, D, seed=2), normal(S, F, seed=3)
    pre = PreActivations(rows, encoder, b_enc, torch.float32)
    expected = rows @ encoder.mT + b_enc[:, None]
    blocks = list(pre.blocks())
    assert len(blocks) > 1
    torch.testing.assert_close(torch.cat(blocks, 1), expected)
    torch.testing.assert_close(pre.whole, expected)
    memory = pre.whole.untyped_storage().data_ptr()
    assert all(block.untyped_storage().data_ptr() == memory for block in pre.blocks())


def test_pieces_of_whole_matrices_are_the_rows_in_order(mask: Bool[Tensor, "S n F"]) -> None:
    numbers = normal(S, 300, F)
    pre = PreActivations(torch.zeros(S, 300, D), torch.zeros(S, F, D), torch.zeros(S, F), torch.float32)
    pre.whole = numbers
    masks = torch.cat([mask] * -(-300 // N), 1)[:, :300]
    pieces = list(DenseKept(pre, masks).pieces())
    assert [numbers[:, rows].shape[1] for rows, _ in pieces] == [128, 128, 44]
    for rows, piece in pieces:
        assert isinstance(piece, DenseKept)
        assert piece.mask is not None
        assert torch.equal(piece.pre.whole, numbers[:, rows])
        assert torch.equal(piece.mask, masks[:, rows])
    (rows, alone), *others = SparseKept.of_mask(mask).pieces()
    assert not others
    assert rows == slice(None)
    assert alone.shape == mask.shape


@pytest.mark.parametrize(("d_sae", "k", "sparsely"), [(40, 5, True), (39, 5, False), (512, 65, False), (520, 66, True)])
def test_topk_takes_sparse_products_where_few_of_its_latents_are_kept(d_sae: int, k: int, sparsely: bool) -> None:
    """On a CPU, from eight latents for each one kept; and with many latents anyway."""
    configs: list[DictionaryConfig] = [TopKConfig(d_sae=d_sae, k=k)]
    rule = make_rule(configs)
    pre = PreActivations(normal(1, 16, D), normal(1, d_sae, D), torch.zeros(1, d_sae), torch.float32)
    numbers = torch.zeros(1, d_sae)
    kept = rule.keep(pre, Step(0.0, torch.ones(1, 16), numbers, numbers, lambda: numbers))
    assert isinstance(kept, SparseKept if sparsely else DenseKept)


@pytest.mark.parametrize("norms", ["unit", "free"])
def test_latents_of_many_rows_are_those_of_a_plain_selection(norms: Literal["unit", "free"]) -> None:
    d_sae = 1024
    configs: list[DictionaryConfig] = [TopKConfig(d_sae=d_sae, k=K, norms=norms, seed=i) for i in range(S)]
    stack = Stack(configs, make_rule(configs), D, D)
    rows = normal(1, 1100, D)
    center = torch.zeros(S, D)
    stack.initialise(DataStatistics(center, center, 1.0), [0, 1])
    with torch.no_grad():
        stack.W_dec.mul_(1 + torch.rand(S, d_sae, 1, generator=torch.Generator().manual_seed(0)) * (norms == "free"))
    kept = stack.rule.keep(
        stack.pre_activations(rows, torch.float32),
        Step(0.0, torch.ones(S, 1100), stack.norms(), stack.b_enc, lambda: torch.zeros(S, d_sae)),
    )
    scores = ((rows - stack.b_dec[:, None]) @ stack.encoder.mT + stack.b_enc[:, None]) * stack.norms()[:, None]
    expected = scores.topk(K, dim=2).indices.sort(2).values
    assert isinstance(kept, SparseKept)
    found = kept.latents.view(S, 1100, K) - torch.arange(S)[:, None, None] * d_sae
    assert torch.equal(found.sort(2).values, expected)


def test_entries_at_places_are_those_of_a_mask(mask: Bool[Tensor, "S n F"]) -> None:
    kept = SparseKept.of_mask(mask)
    member, row, latent = mask.nonzero(as_tuple=True)
    assert torch.equal(kept.latents, member * F + latent)
    assert torch.equal(kept.rows, member * N + row)


def test_products_at_entries_are_those_of_dense_matrices(mask: Bool[Tensor, "S n F"]) -> None:
    one, x, weight = mask[0], normal(N, D), normal(F, D, seed=2)
    kept = SparseKept.of_mask(mask[:1])
    values = normal(len(kept.latents), seed=3)
    dense = torch.zeros(N, F)
    dense[one] = values
    torch.testing.assert_close(weighted_sums(kept.latents, kept.starts, values, weight), dense @ weight)
    torch.testing.assert_close(sampled_products(kept.latents, kept.starts, x, weight), (x @ weight.T)[one])
    torch.testing.assert_close(Transpose(kept.latents, kept.rows, F).times(values, x), dense.T @ x)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_both_kinds_of_products_have_the_same_values_and_gradients(
    mask: Bool[Tensor, "S n F"], shared: bool, centred: bool
) -> None:
    x = normal(1 if shared else S, N, D)
    found = []
    for sparsely in (True, False):
        encoder, W_dec = (normal(S, F, D, seed=seed).requires_grad_() for seed in (2, 3))
        b_enc, b_dec = normal(S, F, seed=9).requires_grad_(), normal(S, D, seed=4).requires_grad_()
        whole = (x - b_dec[:, None] * centred) @ encoder.mT + b_enc[:, None]
        kept = SparseKept.of_mask(mask) if sparsely else DenseKept(_pre(whole), mask)
        pre = kept.pre_activations(x, b_dec if centred else None, encoder, b_enc)
        f = (pre * kept.latent(normal(S, F, seed=5)) * kept.row(normal(S, N, seed=6))).relu()
        out = kept.decode(f, W_dec)
        ((out * normal(S, N, D, seed=7)).sum() + kept.member_sums(f.square()) @ torch.tensor([1.0, 2.0])).backward()
        gradients = [p.grad for p in (encoder, W_dec, b_enc, *([b_dec] if centred else []))]
        sums = (
            kept.latent_sums(f.detach()),
            kept.member_minima(f.detach()),
            kept.member_sums(f.detach()),
            kept.firings(f.detach()),
        )
        found.append([out, *gradients, *sums])
    for sparse, dense in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-4)


def _pre(whole: Float[Tensor, "S N F"]) -> PreActivations:
    """These pre-activations, whatever they come from."""
    pre = PreActivations(torch.zeros(S, N, D), torch.zeros(S, F, D), torch.zeros(S, F), torch.float32)
    pre.whole = whole.detach()
    return pre


def test_parts_of_the_latents_and_edges(mask: Bool[Tensor, "S n F"]) -> None:
    W_dec, numbers = normal(S, F, D, seed=3), normal(S, N, F, seed=8).abs()
    sparse, dense = SparseKept.of_mask(mask), DenseKept(_pre(numbers), mask)
    assert sparse.ends == mask.sum((1, 2)).cumsum(0).tolist()
    entries = numbers[mask]
    for first, stop in ((0, 10), (10, F)):
        a, part = sparse.within(first, stop)
        b, whole = dense.within(first, stop)
        torch.testing.assert_close(a.decode(entries[part], W_dec), b.decode(numbers[whole], W_dec))
    for k in (3, 40):
        assert torch.equal(sparse.edges(entries, k).expand(len(entries)), dense.edges(numbers, k).expand(S, N, F)[mask])


def test_fixed_numbers_of_latents_are_entries_too() -> None:
    pre = normal(S, N, F)
    indices = top_k(pre.view(S * N, F), K).view(S, N, K)
    kept = SparseKept.of_indices(indices, F)
    mask = torch.zeros(S, N, F, dtype=torch.bool).scatter_(2, indices, True)
    ones = torch.ones(len(kept.latents))
    torch.testing.assert_close(kept.latent_sums(ones), mask.float().sum(1))
    assert torch.equal(kept.rows, torch.arange(S * N).repeat_interleave(K))


def test_codes_to_dense_and_back() -> None:
    f: Float[Tensor, "n f"] = normal(N, F).relu() * (normal(N, F, seed=2) > 0)
    f[3] = 0
    codes = SparseCodes.of_dense(f)
    assert torch.equal(codes.to_dense(), f)
    torch.testing.assert_close(codes.l0, (f > 0).sum(1).float())
    W_dec = normal(F, D)
    torch.testing.assert_close(codes.times(W_dec), f @ W_dec)
    assert SparseCodes.of_dense(torch.zeros(2, F)).indices.shape == (2, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architecture": "topk", "d_sae": 8, "k": 9}, "k must be"),
        ({"architecture": "topk", "d_sae": 8, "k": 0}, "k must be"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "k_start": 1}, "k_start"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "aux_k": 0}, "aux_k"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "dead_after": 0}, "dead_after"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "outputs": ["b"], "tied": True, "inputs": ["a"]}, "tied"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "skip": True}, "skip"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "betas": [0.9, 1.0]}, "betas"),
        ({"architecture": "topk", "d_sae": 8, "k": 2, "revival": "prayer"}, "revival"),
        ({"architecture": "standard", "d_sae": 8, "coefficient": -1.0}, "coefficient"),
        ({"architecture": "jumprelu", "d_sae": 8, "sparsity": "quadratic"}, "target_l0"),
        ({"architecture": "jumprelu", "d_sae": 8, "bandwidth": 0.0}, "bandwidth"),
        ({"architecture": "p_anneal", "d_sae": 8, "p_end": 0.0}, "p_end"),
        ({"architecture": "matryoshka", "d_sae": 8, "k": 2, "prefixes": [0.5, 0.25, 1.0]}, "prefixes"),
        ({"architecture": "batchtopk", "d_sae": 8, "k": 2, "threshold_decay": 1.0}, "threshold_decay"),
        ({"architecture": "topkk", "d_sae": 8, "k": 2}, "Did you mean"),
        ({"architecture": "topk", "d_sae": 8, "kk": 2}, "kk"),
        ({"d_sae": 8, "k": 2}, "names its architecture"),
    ],
)
def test_configs_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(wrong)


@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(d_sae=8, k=2, inputs=("a", "b")),
        BatchTopKConfig(d_sae=8, k=2, lr=1e-3),
        MatryoshkaConfig(d_sae=8, k=2, prefixes=(0.5, 1.0)),
        ReLUConfig(d_sae=8, betas=(0.0, 0.999)),
        JumpReLUConfig(d_sae=8, sparsity="tanh", outlier_cap=None),
    ],
    ids=lambda config: config.architecture,
)
def test_a_config_comes_back_from_its_description(config: TopKConfig) -> None:
    assert parse_config(describe(config)) == config


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (TopK(9), "k must be at most"),
        (GroupMax(3), "8 latents in 3 groups"),
        (GroupTopK(6, 3), "8 latents in 3 groups"),
        (GroupTopK(10, 2), "k must be at most"),
    ],
    ids=["topk", "groupmax", "grouptopk", "grouptopk-k"],
)
def test_activations_that_do_not_fit_the_dictionary(activation: Activation, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dictionary(4, 8, activation, origin=Origin.at("tiny", "blocks.0.hook_resid_pre"))


def test_groups_of_no_rows_have_no_codes() -> None:
    codes = GroupTopK(4, 2).codes(torch.zeros(0, 8), torch.zeros(8))
    assert (codes.indices.shape, codes.values.shape, codes.d_sae) == ((0, 4), (0, 4), 8)


def test_groups_that_keep_unequally_many() -> None:
    with pytest.raises(ConfigError, match="Each group keeps equally many. Got: k 4, 3 groups"):
        GroupTopK(4, 3)


def test_pre_activations_are_taken_once_and_cast_weights_are_shared() -> None:
    """What makes a step hold one piece's numbers, and one copy of the decoder in its dtype."""
    x, encoder, W_dec = torch.randn(1, 600, D), torch.randn(1, F, D), torch.randn(1, F, D)
    pre = PreActivations(x, encoder, torch.zeros(1, F), torch.bfloat16)
    plain = pre.whole.clone()
    (rows, first), (_, second) = list(DenseKept(pre).pieces())[:2]
    assert isinstance(first, DenseKept)
    assert isinstance(second, DenseKept)
    values = first.pre_activations(x[:, rows], None, encoder.requires_grad_(), torch.zeros(1, F))
    torch.testing.assert_close(values.detach(), plain[:, rows])
    assert "whole" not in vars(first.pre)
    assert not pre.whole.requires_grad
    assert first.pre.cast(W_dec) is second.pre.cast(W_dec)
    torch.testing.assert_close(first.pre.cast(W_dec), W_dec.to(torch.bfloat16))


def test_a_prefix_adds_its_gradient_to_its_own_rows(mask: Bool[Tensor, "S n F"]) -> None:
    """To those that are there already, and to no others; and such a part has no pre-activations."""
    kept = SparseKept.of_mask(mask)
    inside, part = kept.within(10, 20)
    values, W_dec = torch.rand(len(kept.latents))[part], torch.randn(S, F, D).requires_grad_()
    dense = torch.zeros(S, N, F)
    dense[mask] = torch.zeros(int(mask.sum())).index_copy(0, part, values)
    W_dec.grad = torch.ones(S, F, D)
    g = torch.randn(S, N, D)
    (inside.decode(values, W_dec) * g).sum().backward()
    torch.testing.assert_close(W_dec.grad, 1 + dense.mT @ g)
    with pytest.raises(AssertionError, match="for decoding alone"):
        inside.pre_activations(torch.zeros(1, N, D), None, torch.zeros(S, F, D), torch.zeros(S, F))
