"""Sources of several hook points, of two models and of rows in memory: against the model's own cache, point by point."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from microtome.activations import (
    ActivationStore,
    ActivationStream,
    ArraySource,
    HarvestConfig,
    ModelSource,
    PairedSource,
    StoreSource,
    StreamConfig,
    harvest,
)
from microtome.common.errors import ArtifactError, ConfigError, InputError, MicrotomeError, ModelError
from microtome.model import HookedModel
from microtome.text import TokenDataset

MakeTiny = Callable[[str], HookedModel]
POINTS = ["blocks.2.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"]
WIDTHS = (32, 32, 64)


@pytest.fixture(scope="module")
def part(tiny_dataset: TokenDataset) -> TokenDataset:
    return tiny_dataset.slice(0, 37)


@pytest.fixture(scope="module")
def store(tiny_llama: HookedModel, part: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    config = HarvestConfig(dtype="fp32", batch_tokens=96)
    return harvest(tiny_llama, part, POINTS, tmp_path_factory.mktemp("s") / "store", config=config)


def plain_rows(model: HookedModel, part: TokenDataset, names: list[str]) -> Tensor:
    """One sequence at a time, all layers, token by token."""
    rows = []
    for i in range(part.n_sequences):
        tokens = torch.from_numpy(part.batch(i, i + 1))
        _, cache = model.run_with_cache(tokens, names)
        for position, token in enumerate(tokens[0].tolist()):
            if token not in part.special_ids:
                rows.append(torch.cat([cache[name][0, position].flatten() for name in names]))
    return torch.stack(rows)


def all_rows(source: ModelSource | StoreSource | PairedSource | ArraySource) -> Tensor:
    blocks = [source.read(block) for block in range(source.n_blocks)]
    assert [len(block) for block in blocks] == source.block_rows.tolist()
    return torch.cat(blocks)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1]])
def test_several_points_stand_side_by_side_in_the_order_asked_for(
    tiny_llama: HookedModel, part: TokenDataset, store: ActivationStore, order: list[int]
) -> None:
    names = [POINTS[i] for i in order]
    from_model = ModelSource(tiny_llama, part, names, sequences_per_block=5)
    from_store = StoreSource(store, names, sequences_per_block=5)
    expected = plain_rows(tiny_llama, part, names)
    for source in (from_model, from_store):
        assert source.hook_names == tuple(names)
        assert source.widths == tuple(WIDTHS[i] for i in order)
        assert source.d == expected.shape[1]
        assert source.describe()["hook_names"] == names
        torch.testing.assert_close(all_rows(source), expected)


def test_a_glob_is_its_points_in_the_order_of_the_pass_each_once(tiny_llama: HookedModel, part: TokenDataset) -> None:
    source = ModelSource(tiny_llama, part, ["blocks.*.mlp.hook_post", "hook_embed", "blocks.1.mlp.hook_post"])
    assert source.hook_names == (*(f"blocks.{i}.mlp.hook_post" for i in range(3)), "hook_embed")
    assert source.widths == (64, 64, 64, 32)


def test_one_pass_serves_all_points_and_stops_at_the_deepest(tiny_llama: HookedModel, part: TokenDataset) -> None:
    source = ModelSource(tiny_llama, part, ["blocks.1.mlp.hook_post", "blocks.0.attn.hook_z"])
    ran: list[int] = []
    layers = tiny_llama.hf.model.layers
    handles = [layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    source.read(0)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_the_hook_name_of_one_point_and_not_of_several(
    tiny_llama: HookedModel, part: TokenDataset, store: ActivationStore
) -> None:
    assert ModelSource(tiny_llama, part, POINTS[1]).hook_name == POINTS[1]
    with pytest.raises(ConfigError, match="source of one hook point"):
        _ = StoreSource(store, POINTS[:2]).hook_name
    with pytest.raises(ConfigError, match=r"several hook points.*Say which"):
        StoreSource(store)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("blocks.1.hook_resid_prex", ModelError, "Unknown hook point"),
        ("blocks.9.hook_resid_pre", ModelError, "a layer from 0 to 2"),
        ([], ConfigError, "at least one hook point"),
        ("blocks.0.attn.hook_pattern", ConfigError, "not one row per token"),
        (["hook_embed", "blocks.*.nothing"], ModelError, "No hook point"),
    ],
    ids=["name", "layer", "none", "pattern", "glob"],
)
def test_points_that_cannot_be(
    tiny_llama: HookedModel,
    part: TokenDataset,
    names: str | list[str],
    error: type[MicrotomeError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        ModelSource(tiny_llama, part, names)


# ---- two models -------------------------------------------------------------------------------------------------------


def test_two_models_side_by_side(
    tiny_llama: HookedModel, tiny: MakeTiny, part: TokenDataset, store: ActivationStore
) -> None:
    other = tiny("gpt2")
    first = StoreSource(store, POINTS[0], sequences_per_block=5)
    second = ModelSource(other, part, ["blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"], sequences_per_block=5)
    pair = PairedSource(first, second)
    assert pair.hook_names == (
        "tiny-llama:blocks.2.hook_resid_pre",
        "tiny-gpt2:blocks.1.attn.hook_z",
        "tiny-gpt2:blocks.1.hook_resid_pre",
    )
    assert (pair.widths, pair.model_name) == ((32, 32, 32), "tiny-llama+tiny-gpt2")
    expected = [plain_rows(tiny_llama, part, POINTS[:1]), plain_rows(other, part, list(second.hook_names))]
    torch.testing.assert_close(all_rows(pair), torch.cat(expected, 1))
    assert pair.describe()["dataset"] == first.describe()["dataset"]
    batch = next(ActivationStream(pair, StreamConfig(batch_size=16, buffer_size=64)))
    assert batch.shape == (16, 96)


def test_a_pair_that_is_no_pair(tiny_llama: HookedModel, part: TokenDataset, tiny_dataset: TokenDataset) -> None:
    source = ModelSource(tiny_llama, part, POINTS[0])
    with pytest.raises(ConfigError, match="two names"):
        PairedSource(source, source)
    names = ("base", "tuned")
    assert PairedSource(source, source, names=names).hook_names == (f"base:{POINTS[0]}", f"tuned:{POINTS[0]}")
    with pytest.raises(InputError, match=r"not over the same tokens.*n_sequences 37 and 36"):
        PairedSource(source, ModelSource(tiny_llama, tiny_dataset.slice(0, 36), POINTS[0]), names=names)
    with pytest.raises(InputError, match=r"different blocks.*sequences_per_block"):
        PairedSource(source, ModelSource(tiny_llama, part, POINTS[0], sequences_per_block=4), names=names)


# ---- rows in memory and in files --------------------------------------------------------------------------------------

ROWS = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["tensor", "npy", "safetensors", "key"])
def test_rows_of_each_kind_come_back_block_by_block(tmp_path: Path, kind: str) -> None:
    rows: Tensor | Path = ROWS
    if kind == "npy":
        rows = tmp_path / "rows.npy"
        np.save(rows, ROWS.numpy())
    elif kind != "tensor":
        rows = tmp_path / "rows.safetensors"
        save_file({"x": ROWS} if kind == "safetensors" else {"a": ROWS[:3].clone(), "x": ROWS}, rows)
    source = ArraySource(rows, key="x" if kind == "key" else None, rows_per_block=16)
    assert source.block_rows.tolist() == [16, 16, 16, 2]
    assert torch.equal(all_rows(source), ROWS)
    assert (source.hook_name, source.d, source.describe()["dataset"]["n_rows"]) == ("rows", 6, 50)


def test_the_columns_of_several_points_and_the_fingerprint() -> None:
    source = ArraySource(ROWS, hook_names=("a", "b"), widths=(2, 4), model_name="none")
    assert (source.hook_names, source.widths, source.d) == (("a", "b"), (2, 4), 6)
    assert source.fingerprint == ArraySource(ROWS.clone(), rows_per_block=7).fingerprint
    changed = ROWS.clone()
    changed[49, 5] += 1
    assert ArraySource(changed).fingerprint != source.fingerprint
    assert ArraySource(ROWS.bfloat16()).fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"widths": (2, 3)}, ConfigError, "Each hook point needs a width"),
        ({"hook_names": ("a", "b"), "widths": (2, 3)}, ConfigError, "add up to d"),
        ({"hook_names": ("a", "a"), "widths": (2, 4)}, ConfigError, "Each hook point needs a width"),
    ],
    ids=["one name", "sum", "twice"],
)
def test_columns_that_do_not_fit(settings: dict[str, tuple[object, ...]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ArraySource(ROWS, **settings)  # type: ignore[arg-type]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no file"):
        ArraySource(tmp_path / "rows.npy")
    (tmp_path / "rows.npy").write_bytes(b"not an array")
    (tmp_path / "rows.safetensors").write_bytes(b"not a tensor")
    (tmp_path / "rows.csv").write_text("1,2")
    for name in ("rows.npy", "rows.safetensors"):
        with pytest.raises(ArtifactError, match="cannot be read"):
            ArraySource(tmp_path / name)
    with pytest.raises(ArtifactError, match="no known kind"):
        ArraySource(tmp_path / "rows.csv")
    np.save(tmp_path / "whole.npy", np.arange(12).reshape(3, 4))
    with pytest.raises(InputError, match=r"floating matrix.*int64"):
        ArraySource(tmp_path / "whole.npy")
    save_file({"a": ROWS, "b": ROWS.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="several tensors"):
        ArraySource(tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"Unknown tensor.*'c'"):
        ArraySource(tmp_path / "two.safetensors", key="c")
