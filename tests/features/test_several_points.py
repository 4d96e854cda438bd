"""An index of dictionaries that read several points: cross-layer transcoders, crosscoders and sets, against plain runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from microtome.activations import harvest
from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary import (
    Dictionary,
    DictionaryOrSet,
    DictionarySet,
    Origin,
    load_dictionary_or_set,
    save_dictionary,
)
from microtome.dictionary.activation import TopK
from microtome.features import IndexConfig, build_index, open_index
from microtome.features.build import short_name
from microtome.features.prompt import dictionary_of
from microtome.features.weights import LatentWeights
from microtome.model import HookedModel
from microtome.model.families import LLAMA
from microtome.model.hook_point import HookFn, HookPoint
from microtome.text import TokenDataset

from ..makers import (  # noqa: TID252 – shared by tests
    random_cross_layer,
    random_llama,
    tiny_text_tokenizer,
    tokenized_texts,
    topk_dictionary,
)

D = 24
CONFIG = IndexConfig(top=5, bands=3, per_band=2, window=8, batch=4)
READS, WRITES = (tuple(f"blocks.{i}.{point}" for i in (0, 1)) for point in ("hook_resid_mid", "hook_mlp_out"))
STREAM = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def model() -> HookedModel:
    tokenizer = tiny_text_tokenizer()
    hf = random_llama(len(tokenizer), n_ctx=64)
    torch.nn.init.uniform_(hf.model.norm.weight, 0.5, 1.5)
    return HookedModel(hf, tokenizer, name="tiny-llama", spec=LLAMA)


@pytest.fixture(scope="module")
def dataset(model: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    assert model.tokenizer is not None
    return tokenized_texts(tmp_path_factory.mktemp("text"), model.tokenizer, times=4, context=24)


def random_at(inputs: tuple[str, ...], outputs: tuple[str, ...] = (), *, seed: int = 0) -> Dictionary:
    origin = Origin(model_name="tiny-llama", inputs=inputs, outputs=outputs)
    d_out = D * len(origin.outputs)
    made = Dictionary(D * len(inputs), 30, TopK(4), origin=origin, d_out=d_out, center=False)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return made.requires_grad_(False)


def clt() -> DictionaryOrSet:
    return random_cross_layer("tiny-llama", READS, WRITES, d=D)


def crosscoder() -> DictionaryOrSet:
    return random_at(STREAM)


def per_layer() -> DictionaryOrSet:
    return DictionarySet([random_at(READS[i : i + 1], WRITES[i : i + 1], seed=i) for i in (0, 1)])


CASES: dict[str, tuple[Callable[[], DictionaryOrSet], tuple[str, ...], str, list[int | None], int]] = {
    "clt": (clt, READS, "blocks.{0,1}.hook_resid_mid", [0, 1], 40),
    "crosscoder": (crosscoder, STREAM, "blocks.{0,1}.hook_resid_post", [None], 30),
    "set": (per_layer, READS, "blocks.{0,1}.hook_resid_mid", [0, 1], 30),
}


@pytest.mark.parametrize("case", CASES)
def test_every_latent_is_in_it_with_its_layer(
    case: str, model: HookedModel, dataset: TokenDataset, tmp_path: Path
) -> None:
    make, points, shown, layers, width = CASES[case]
    made = make()
    if case != "set":
        (tmp_path / "made").mkdir()
        save_dictionary(made, tmp_path / "made")  # type: ignore[arg-type]
    index = build_index(model, made, dataset, tmp_path / "index", config=CONFIG)
    tokens = torch.from_numpy(dataset.batch(0, dataset.n_sequences))
    cache = model.activations(tokens, list(points))
    x = torch.cat([cache[point] for point in points], -1)
    dense = made.encode(x.flatten(0, 1)).to_dense().view(*tokens.shape, -1).numpy()
    text = np.isin(tokens.numpy(), dataset.special_ids, invert=True)
    dense = np.where(text[:, :, None], dense, 0)
    rows = index.features(alive=None, sort="feature", descending=False, limit=200).rows
    assert len(rows) == made.d_sae == index.summary.d_sae
    for row in rows:
        fired = dense[:, :, row.feature][dense[:, :, row.feature] > 0]
        assert abs(row.count - len(fired)) <= 2
        assert row.layer == layers[row.feature // width]
        if len(fired) > 2:
            np.testing.assert_allclose([row.mean, row.max], [fired.mean(), fired.max()], rtol=1e-2)
            best = index.examples(row.feature)[0]
            assert dense[best.sequence, best.position, row.feature] == pytest.approx(best.value, rel=1e-3)
    assert (index.summary.hook_name, index.summary.k) == (shown, made.k)
    assert index.summary.layers == tuple(layer for layer in layers if layer is not None)
    for layer in index.summary.layers:
        found = [row.feature for row in index.features(alive=None, layer=layer, limit=200, sort="feature").rows]
        assert sorted(found) == list(range(layer * width, (layer + 1) * width))
        assert index.features(layer=layer).total < index.features().total
    with pytest.raises(ConfigError, match=r"no latents of this layer alone. Got: 7"):
        index.features(layer=7)
    again = open_index(tmp_path / "index")
    assert again.summary.layers == index.summary.layers
    word = next(row.top_token_string.strip() for row in rows if row.count and len(row.top_token_string.strip()) > 2)
    assert index.search(word)
    fires = index.top_features("The court held the train", model=model, dictionary=made)
    cache = model.activations(model.to_tokens("The court held the train"), list(points))
    plain = made.encode(torch.cat([cache[point][0] for point in points], -1)).to_dense()
    assert [len(each) for each in fires.features[1:]] == (plain[1:] > 0).sum(1).tolist()
    with pytest.raises(ArtifactError, match="not the dictionary"):
        index.top_features("a", model=model, dictionary=random_at(STREAM, seed=9))


def test_the_store_gives_the_same_index(model: HookedModel, dataset: TokenDataset, tmp_path: Path) -> None:
    store = harvest(model, dataset, [*READS[::-1], "blocks.0.hook_resid_pre"], out=tmp_path / "acts")
    one, other = (
        build_index(model, clt(), dataset, tmp_path / name, config=CONFIG, store=given)
        for name, given in (("a", store), ("b", None))
    )
    assert one.features(limit=200, sort="feature").total == other.features(limit=200).total
    counts, others = ([row.count for row in each.features(sort="feature", limit=200).rows] for each in (one, other))
    assert np.abs(np.subtract(counts, others)).max() <= 3  # a store of bf16 rounds


def test_a_cross_layer_transcoders_effect_is_what_it_adds_to_the_stream_in_all_layers(model: HookedModel) -> None:
    made = random_cross_layer("tiny-llama", READS, WRITES, d=D)
    weights = LatentWeights.of(made)
    assert weights.direction.shape == (80, D)
    for latent in (0, 5, 40, 79):
        layer, i = divmod(latent, 40)
        rows = made.W_dec[layer][i]
        torch.testing.assert_close(weights.direction[latent], rows.sum(0))
        assert float(weights.decoder_norm[latent]) == pytest.approx(float(rows.norm()), rel=1e-5)
        assert float(weights.encoder_norm[latent]) == pytest.approx(float(made.encoder[layer, i].norm()), rel=1e-5)
        assert float(weights.bias[latent]) == float(made.b_enc[layer, i])
    # Without attention or MLPs that answer, what is added to the MLP outputs is in the last residual stream as it is.
    tokens = torch.tensor([[3, 1, 4]])
    last = "blocks.1.hook_resid_post"

    def stream(more: Tensor) -> Tensor:
        def instead(piece: Tensor) -> HookFn:
            return lambda act, _: piece.expand_as(act)

        found: list[Tensor] = []

        def see(act: Tensor, _: HookPoint) -> None:
            found.append(act)

        hooks = [(WRITES[layer], instead(more[layer])) for layer in range(2)]
        model.run_with_hooks(tokens, [*hooks, ("blocks.1.hook_attn_out", instead(torch.zeros(()))), (last, see)])
        return found[0]

    with torch.no_grad():
        moved = stream(made.W_dec[0][5]) - stream(torch.zeros(2, D))
    torch.testing.assert_close(moved, weights.direction[5].expand_as(moved), atol=1e-5, rtol=1e-4)


def test_a_crosscoders_effect_is_that_of_its_deepest_state_or_of_all_that_it_adds() -> None:
    states = random_at(STREAM)
    torch.testing.assert_close(LatentWeights.of(states).direction, states.W_dec[:, D:])
    torch.testing.assert_close(LatentWeights.of(states).row, states.W_dec)
    norms = states.W_dec[:, :D].norm(dim=1) + states.W_dec[:, D:].norm(dim=1)
    torch.testing.assert_close(LatentWeights.of(states).decoder_norm, norms)
    backwards = random_at(STREAM[::-1])
    torch.testing.assert_close(LatentWeights.of(backwards).direction, backwards.W_dec[:, :D])
    causal = random_cross_layer("tiny-llama", STREAM, STREAM, d=D)
    torch.testing.assert_close(
        LatentWeights.of(causal).direction, torch.cat([causal.W_dec[0][:, 1], causal.W_dec[1][:, 0]])
    )
    added = random_at(READS, WRITES)
    torch.testing.assert_close(LatentWeights.of(added).direction, added.W_dec[:, :D] + added.W_dec[:, D:])


def test_a_set_of_several_widths_shares_no_space() -> None:
    other = topk_dictionary(48, 30, 4, origin=Origin.at("tiny-llama", "blocks.0.mlp.hook_post"))
    with pytest.raises(ConfigError, match=r"several widths.*24, 48.*one by one"):
        LatentWeights.of(DictionarySet([random_at(READS[:1], WRITES[:1]), other]))


def test_several_widths_are_refused_before_the_pass(model: HookedModel, dataset: TokenDataset, tmp_path: Path) -> None:
    other = topk_dictionary(48, 30, 4, origin=Origin.at("tiny-llama", "blocks.0.mlp.hook_post"))
    with pytest.raises(ConfigError, match="several widths"):
        build_index(model, DictionarySet([random_at(READS[:1], WRITES[:1]), other]), dataset, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []  # no draft was begun


def test_what_adds_nothing_to_the_stream_has_no_direction() -> None:
    normalized = tuple(f"blocks.{i}.ln2.hook_normalized" for i in (0, 1))
    assert LatentWeights.of(random_at(READS, normalized)).direction.shape == (30, 0)
    assert LatentWeights.of(random_cross_layer("tiny-llama", READS, normalized, d=D)).direction.shape == (80, 0)
    # The deepest state has seen what was added before it; what is added behind it comes on top, and nothing else.
    points = (WRITES[1], normalized[1], READS[1], WRITES[0])
    mixed = random_at(READS, points)
    after, _, state, _ = mixed.W_dec.split(D, 1)
    torch.testing.assert_close(LatentWeights.of(mixed).direction, after + state)


def test_nearest_latents_outside_the_stream_are_of_the_same_member(
    model: HookedModel, dataset: TokenDataset, tmp_path: Path
) -> None:
    members = [
        topk_dictionary(48, n, 4, origin=Origin.at("tiny-llama", f"blocks.{i}.mlp.hook_post"), seed=i)
        for i, n in enumerate((6, 30))
    ]
    members[1].W_dec.data[:6] = members[0].W_dec.data  # equal numbers at another point mean nothing
    index = build_index(model, DictionarySet(members), dataset, tmp_path / "index", config=CONFIG)
    for latents, member in zip((range(6), range(6, 36)), members, strict=True):
        unit = torch.nn.functional.normalize(member.W_dec.detach(), dim=1)
        cosines = (unit @ unit.T).fill_diagonal_(-9)
        for latent in (latents[0], latents[-1]):
            found = index.feature(latent)
            expected = cosines[latent - latents[0]].topk(5)
            assert [near.feature - latents[0] for near in found.neighbours] == expected.indices.tolist()
            np.testing.assert_allclose([near.cosine for near in found.neighbours], expected.values, atol=1e-6)
            assert found.top_logits == []
    inside = LatentWeights.of(per_layer())
    assert inside.spaces == (60,)


def test_a_set_that_was_moved_with_its_index_is_found(
    model: HookedModel, dataset: TokenDataset, tmp_path: Path
) -> None:
    for i in (0, 1):
        (tmp_path / f"old/set/{i}").mkdir(parents=True)
        save_dictionary(random_at(READS[i : i + 1], WRITES[i : i + 1], seed=i), tmp_path / f"old/set/{i}")
    made = load_dictionary_or_set(tmp_path / "old/set")
    built = build_index(model, made, dataset, tmp_path / "old/index", config=CONFIG)
    expected = built.top_features("The court held the train", model=model)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = open_index(tmp_path / "new/index")
    assert dictionary_of(moved.record, moved.path) == tmp_path / "new/set"
    assert moved.top_features("The court held the train", model=model) == expected
    # An index of its dictionary's name is not taken for it.
    renamed = moved.path.rename(tmp_path / "new/set2")
    record = dataclasses.replace(moved.record, dictionary="gone/set2")
    assert dictionary_of(record, renamed) == Path("gone/set2")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"], "blocks.{0,1}.attn.hook_z"),
        (["blocks.0.attn.hook_z.2", "blocks.1.attn.hook_z.2"], "blocks.{0,1}.attn.hook_z.2"),
        (["blocks.1.attn.hook_z.0", "blocks.1.attn.hook_z.2"], "blocks.1.attn.hook_z.0, blocks.1.attn.hook_z.2"),
        (["hook_embed", "blocks.0.hook_resid_pre"], "hook_embed, blocks.0.hook_resid_pre"),
        (["blocks.0.attn.hook_z.2"], "blocks.0.attn.hook_z.2"),
    ],
)
def test_several_points_in_one_line(names: list[str], short: str) -> None:
    assert short_name(names) == short
