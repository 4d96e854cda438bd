"""The ground of the circuits part: metrics, nodes, effects, pairs; each against a plain computation."""

import math

import pytest
import torch
from tests.model.families import make
from torch import Tensor
from torch.nn import functional

from microtome.circuits import metrics
from microtome.circuits.effects import Axis, Effects, bootstrap
from microtome.circuits.nodes import Node, parse_node, parse_nodes
from microtome.circuits.pairs import aligned, pair, position_labels
from microtome.common.errors import InputError
from microtome.model.hooked import HookedModel
from microtome.model.prompts import Prompts


@pytest.fixture(scope="module")
def gpt2() -> HookedModel:
    return make("gpt2")


@pytest.fixture(scope="module")
def grouped() -> HookedModel:
    return make("llama")


def test_columns_are_labelled_by_tokens_or_from_where_the_padding_is_not(
    tiny_llama: HookedModel, gpt2: HookedModel
) -> None:
    one = tiny_llama.prompts(["The cat"], side="left")
    strings = tiny_llama.to_str_tokens(one.tokens[0])
    assert position_labels(tiny_llama, one).labels == tuple(f"{i} {text}" for i, text in enumerate(strings))
    two = aligned(tiny_llama, ["The cat sat on the mat", "The cat"])
    n = two.tokens.shape[1]
    assert position_labels(tiny_llama, two).labels == tuple(str(i) for i in range(-n, 0))
    assert position_labels(gpt2, Prompts(torch.zeros(2, 3, dtype=torch.long))).labels == ("0", "1", "2")


def test_there_is_no_top_of_nothing() -> None:
    effects = Effects(
        values=torch.eye(2)[..., None], axes=(Axis("a", ("0", "1")), Axis("b", ("0", "1"))), what="effect"
    )
    assert len(effects.top(3)) == 3
    for k in (0, -1):
        with pytest.raises(InputError, match=f"the top {k}"):
            effects.top(k)


def logits(batch: int = 3, pos: int = 4, d_vocab: int = 7) -> Tensor:
    return torch.randn(batch, pos, d_vocab, generator=torch.Generator().manual_seed(0))


def test_logit_difference_is_of_each_rows_own_prompt(gpt2: HookedModel) -> None:
    metric = metrics.logit_difference(gpt2, [1, 2], [3, 4])
    x = logits()
    found = metric(x, torch.tensor([1, 0, 1]))
    wanted = torch.stack([x[0, -1, 2] - x[0, -1, 4], x[1, -1, 1] - x[1, -1, 3], x[2, -1, 2] - x[2, -1, 4]])
    assert torch.equal(found, wanted)


def test_other_metrics_against_plain_sums(gpt2: HookedModel) -> None:
    x = logits()
    p = [math.exp(x[i, -1, 5]) / sum(math.exp(v) for v in x[i, -1].tolist()) for i in range(3)]
    assert metrics.probability(gpt2, 5)(x).tolist() == pytest.approx(p, abs=1e-6)
    assert metrics.log_probability(gpt2, 5)(x).tolist() == pytest.approx([math.log(v) for v in p], abs=1e-6)
    y = logits().roll(1, 0)
    kl = [
        functional.kl_div(x[i, -1].log_softmax(-1), y[i, -1].log_softmax(-1), log_target=True, reduction="sum")
        for i in range(3)
    ]
    assert torch.allclose(metrics.kl_divergence(y)(x), torch.stack(kl), atol=1e-6)
    tokens = torch.tensor([[0, 1, 2, 3]])
    ce = [functional.cross_entropy(x[i, 1:-1], tokens[0, 2:]) for i in range(3)]
    assert torch.allclose(metrics.loss(tokens, start=1)(x), torch.stack(ce), atol=1e-6)


def test_any_callable_is_a_metric() -> None:
    x = logits()
    assert torch.equal(metrics.as_metric(lambda of: of[:, 0, 0], 3)(x), x[:, 0, 0])
    assert metrics.as_metric(lambda of: of.sum(), 3)(x).tolist() == pytest.approx([float(x.sum())] * 3)


def test_bad_metrics_and_answers(gpt2: HookedModel) -> None:
    with pytest.raises(InputError, match="one value for each row"):
        metrics.as_metric(lambda of: of, 3)(logits())
    with pytest.raises(InputError, match="NaN"):
        metrics.as_metric(lambda of: of[:, 0, 0] * torch.nan, 3)(logits())
    with pytest.raises(InputError, match="same token"):
        metrics.logit_difference(gpt2, [1, 2], [3, 2])
    with pytest.raises(InputError, match="more answers"):
        metrics.logit_difference(gpt2, [1, 2, 3], [3, 2])
    with pytest.raises(InputError, match="outside the vocabulary"):
        metrics.probability(gpt2, 10**6)
    with pytest.raises(InputError, match="another number of prompts"):
        metrics.as_metric(metrics.probability(gpt2, [1, 2]), 3)


def test_answers_of_several_tokens_are_refused(smol: HookedModel) -> None:
    assert metrics.answer_ids(smol, [" Mary", " John"]).shape == (2,)
    with pytest.raises(InputError, match="one token|single token"):
        metrics.probability(smol, " antidisestablishmentarianism")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("embed", "embed"), ("logits", "logits"), ("L1.H3", "L1.H3"), ("1.3", "L1.H3"), ("a1.h3", "L1.H3"), ("m1", "L1.mlp"),
        ("L1.H3.q", "L1.H3.q"), ("l1.h3.V", "L1.KV3.v"), ("L1.KV0.k", "L1.KV0.k"), ("L0.MLP", "L0.mlp"),
        ("L1.resid_mid", "L1.resid_mid"),
    ],
)  # fmt: skip
def test_nodes_are_read_and_written(gpt2: HookedModel, text: str, shown: str) -> None:
    node = parse_node(text, gpt2.config)
    assert str(node) == shown
    assert parse_node(shown, gpt2.config) == node


def test_nodes_that_are_not_there(gpt2: HookedModel, grouped: HookedModel) -> None:
    for text in ("L99.H0", "L0.H99", "L0.KV99.k", "nothing", "L0", "", f"L0.H{'1' * 5000}", f"L{'1' * 5000}.mlp"):
        with pytest.raises(InputError):
            parse_node(text, gpt2.config)
    with pytest.raises(InputError, match="KV0.k is read by the query heads 0 to 1 together"):
        parse_node("L0.H1.k", grouped.config)
    with pytest.raises(InputError, match="side by side"):
        parse_node("L0.resid_mid", gpt2.config, parallel=True)
    with pytest.raises(InputError, match="No node"):
        parse_nodes([], gpt2.config)


def test_what_feeds_what() -> None:
    head, mlp, late = Node("head", 1, 0), Node("mlp", 1), Node("q", 2, 0)
    assert head.feeds(mlp)
    assert not head.feeds(mlp, parallel=True)
    assert head.feeds(late)
    assert mlp.feeds(late)
    assert Node("embed").feeds(Node("q", 0, 0))
    assert not head.feeds(Node("q", 1, 1))
    assert not late.feeds(mlp)
    assert not mlp.feeds(Node("resid_mid", 1))
    assert mlp.feeds(Node("resid_post", 1))
    assert mlp.feeds(Node("logits"))
    assert not Node("logits").feeds(mlp)


def test_effects_have_means_intervals_and_places() -> None:
    values = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[-5.0, -5.0], [1.0, 0.0]]])
    effects = Effects(values=values, axes=(Axis("layer", ("0", "1")), Axis("head", ("a", "b"))), what="effect")
    assert effects.mean.tolist() == [[2.0, 0.0], [-5.0, 0.5]]
    assert effects.top(2) == [(("1", "a"), -5.0), (("0", "a"), 2.0)]
    assert effects.top(1, by_size=False) == [(("0", "a"), 2.0)]
    low, high = effects.interval()
    assert (float(low[0, 0]), float(high[0, 0])) == (1.0, 3.0)
    assert (float(low[1, 0]), float(high[1, 0])) == (-5.0, -5.0)
    assert effects.to_json()["axes"][1] == {"name": "head", "labels": ["a", "b"]}
    with pytest.raises(InputError, match="axes"):
        Effects(values=values, axes=(Axis("layer", ("0", "1")),), what="effect")


def test_a_bootstrap_interval_is_about_as_wide_as_theory_says() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap(values, 0.95, draws=4000)
    width = 2 * 1.96 * float(values.std()) / 20
    assert float(high - low) == pytest.approx(width, rel=0.08)
    assert low < values.mean() < high


def test_prompts_end_in_the_last_column(gpt2: HookedModel) -> None:
    tokens = torch.tensor([[1, 2, 3, 9, 9], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    found = aligned(gpt2, Prompts(tokens, mask))
    assert found.tokens[0, 2:].tolist() == [1, 2, 3]
    assert found.tokens[1].tolist() == [4, 5, 6, 7, 8]
    assert found.mask is not None
    assert found.mask[0].tolist() == [False, False, True, True, True]
    with pytest.raises(InputError, match="holes"):
        aligned(gpt2, Prompts(tokens, torch.tensor([[True, False, True, False, False], [True] * 5])))


def test_pairs_correspond(gpt2: HookedModel) -> None:
    a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]])
    assert pair(gpt2, a, b).n_positions == 3
    with pytest.raises(InputError, match="are the same"):
        pair(gpt2, a, a)
    with pytest.raises(InputError, match="different numbers of tokens"):
        pair(gpt2, a, b[:, :2])
    with pytest.raises(InputError, match="as many corrupt"):
        pair(gpt2, a, torch.cat([b, b]))
