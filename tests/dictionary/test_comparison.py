"""`compare`: the same figures as alone, and who is on the front."""

from pathlib import Path
from typing import Any

import pytest
import torch

from microtome.activations import ArraySource
from microtome.common.errors import InputError
from microtome.dictionary import (
    BatchTopKConfig,
    EvaluateConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    compare,
    evaluate,
    train,
)
from microtome.dictionary.comparison import COLUMNS, _fronts, trained_as
from microtome.dictionary.measures import finite
from microtome.model import HookedModel
from microtome.text import TokenDataset

from ..makers import random_dictionary  # noqa: TID252 – shared by tests
from .handmade import perfect_dictionary
from .test_points import ORIGINS, SOME


def test_a_comparison_has_what_each_has_alone(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    few, many = (
        random_dictionary(tmp_path / name, model="tiny-llama", d_in=32, d_sae=64, k=k)
        for name, k in (("few", 2), ("many", 9))
    )
    perfect = perfect_dictionary(ORIGINS["autoencoder"], 32)
    names = ["few", "many", "perfect"]
    found = compare(tiny_llama, [few, many, perfect], tiny_dataset, SOME, names=names, similarities=True)
    assert found["many"].evaluation == evaluate(tiny_llama, many, tiny_dataset, SOME)
    table = {row["name"]: row for row in found.table()}
    assert list(table) == names
    assert tuple(table["few"]) == COLUMNS
    assert (table["few"]["l0"], table["few"]["architecture"], table["few"]["d_sae"]) == (2, "topk", 64)
    assert table["perfect"]["fvu"] == pytest.approx(0, abs=1e-9)
    assert table["perfect"]["on_front"]
    assert found.similarities["few", "many"].matched == pytest.approx(1, abs=1e-6)
    assert set(found.similarities) == {("few", "many"), ("few", "perfect"), ("many", "perfect")}
    folders = compare(tiny_llama, [few, many], tiny_dataset, EvaluateConfig(n_tokens=200, function_tokens=0))
    assert [row.name for row in folders.rows] == ["few", "many"]
    assert [row.on_ce_front for row in folders.rows] == [None, None]


def test_a_dictionary_is_called_what_it_was_trained_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = {"d_sae": 16, "k": 2}
    configs = [MatryoshkaConfig(**sizes), BatchTopKConfig(**sizes), TopKConfig(**sizes)]
    made = train(configs, ArraySource(rows), out=tmp_path / "sae", config=TrainConfig(n_tokens=256, batch_size=128))
    assert [each.architecture for each in made] == ["jumprelu", "jumprelu", "topk"]
    assert [trained_as(each) for each in made] == ["matryoshka", "batchtopk", "topk"]
    monkeypatch.chdir(tmp_path / "sae/0")  # whose config is not that of a dictionary which lies nowhere
    assert trained_as(perfect_dictionary(ORIGINS["autoencoder"], 32)) != "matryoshka"
    Path("config.json").write_text('{"config": null}')
    assert trained_as(made[0]) == "jumprelu"
    Path("config.json").unlink()
    assert trained_as(made[0]) == "jumprelu"


def test_a_transcoder_is_called_so_beside_what_it_was_trained_as(tmp_path: Path) -> None:
    source = ArraySource(
        torch.randn(256, 12, generator=torch.Generator().manual_seed(0)), hook_names=("a", "b"), widths=(8, 4)
    )
    places: dict[str, Any] = {"inputs": ("a",), "outputs": ("b",), "d_sae": 16}
    configs = [BatchTopKConfig(**places, k=2), BatchTopKConfig(**places, k=2, skip=True), ReLUConfig(**places)]
    made = train(configs, source, out=tmp_path / "sae", config=TrainConfig(n_tokens=256, batch_size=128))
    assert [trained_as(each) for each in made] == ["batchtopk_transcoder", "batchtopk_skip_transcoder", "transcoder"]


def test_the_front_is_of_those_that_no_other_beats() -> None:
    a, b = ("a",), ("b",)
    outputs = [a, a, a, a, b, a]
    l0 = [10.0, 20, 20, 40, 90, 10]
    cost = [0.5, 0.3, 0.4, 0.3, 0.9, 0.5]
    # The third is beaten by the second, the fourth too (as good, less sparse); the fifth has no rival; equals both stay.
    assert _fronts(outputs, l0, cost) == [True, True, False, False, True, True]
    assert _fronts([a, a], [1.0, 2], [None, 0.1]) == [None, True]


def test_nothing_and_equal_names_are_refused(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    sae = perfect_dictionary(ORIGINS["autoencoder"], 32)
    with pytest.raises(InputError, match="no dictionary"):
        compare(tiny_llama, [], tiny_dataset)
    with pytest.raises(InputError, match="a name of its own"):
        compare(tiny_llama, [sae, sae], tiny_dataset, names=["x", "x"])


def test_what_is_no_number_is_null_in_json() -> None:
    assert finite({"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": "x"}}) == {
        "a": [1.5, None],
        "b": {"c": None, "d": "x"},
    }
