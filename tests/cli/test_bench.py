"""`microtome bench`: each benchmark at tiny sizes through the command; what its figures mean; what it says when it cannot run.
No speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import attribute as attribute_benchmark
from benchmarks import model as model_benchmark
from benchmarks import parity as parity_benchmark
from benchmarks import patch as patch_benchmark
from benchmarks import synthetic as synthetic_benchmark
from benchmarks import train as train_benchmark
from benchmarks import train_worker
from benchmarks.agreement import TOP, Agreement, common_top
from benchmarks.common import in_turn, rate, ratio, resident_bytes, summary
from benchmarks.harvest import bare_activations
from benchmarks.model_sides import Inputs, works
from benchmarks.train_sides import Config, Task

from microtome.circuits import Graph
from microtome.cli.bench import NAMES, load, sizes
from microtome.cli.main import main
from microtome.common.device import cpu_has_bf16
from microtome.common.errors import ConfigError, MissingDependencyError
from microtome.dictionary import Dictionary, Origin, save_dictionary
from microtome.dictionary.activation import ReLU, TopK
from microtome.model import HookedModel

HARVEST = ["layer=1", "context=24", "batch_tokens=120", "tokens=480", "rounds=3", "compare_tokens=960", "device=cpu"]
MODEL = [
    *("layer=1", "context=24", "batch=3", "prompt_tokens=6", "new_tokens=4", "rounds=3", "starts=1", "device=cpu"),
]


def bench(capsys: pytest.CaptureFixture[str], name: str, *words: str) -> dict[str, Any]:
    assert main(["bench", name, "--json", "--set", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["benchmark", "machine", "sizes", "figures", "ratios", "notes"]
    assert result["benchmark"] == name
    assert result["machine"]["cores"] >= 1
    return dict(result)


def quotient(figures: dict[str, float], ours: str, theirs: str) -> float | None:
    return figures[ours] / figures[theirs] if ours in figures and theirs in figures else None


def test_harvest(tiny_inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dictionary"
    folder.mkdir()
    torch.manual_seed(0)
    origin = Origin.at(tiny_inputs[0].removeprefix("model="), "blocks.1.hook_resid_pre")
    sae = Dictionary(32, 64, TopK(4), origin=origin)
    for parameter in (sae.encoder, sae.W_dec):
        torch.nn.init.normal_(parameter)
    save_dictionary(sae, folder)

    result = bench(capsys, "harvest", *tiny_inputs, *HARVEST, f"dictionary={folder}")

    speed, seconds = result["figures"]["tokens_per_second"], result["figures"]["seconds"]
    dtypes = ["fp32", "bf16"] if cpu_has_bf16() else ["fp32"]
    assert list(speed) == [
        side.format(d) for d in dtypes for side in ("huggingface_{}", "microtome_{}", "microtome_{}_with_disk")
    ]
    assert result["sizes"]["tokens"] == 480
    assert {len(some) for some in seconds.values()} == {3}
    for name, some in seconds.items():
        assert speed[name] == pytest.approx(480 / sorted(some)[1])
    assert result["ratios"] == {
        "fp32_vs_huggingface": quotient(speed, "microtome_fp32", "huggingface_fp32"),
        "bf16_vs_fp32": quotient(speed, "microtome_bf16", "microtome_fp32"),
        "bf16_vs_huggingface_bf16": quotient(speed, "microtome_bf16", "huggingface_bf16"),
        "fp32_with_disk_vs_huggingface": quotient(speed, "microtome_fp32_with_disk", "huggingface_fp32"),
        "bf16_with_disk_vs_huggingface_bf16": quotient(speed, "microtome_bf16_with_disk", "huggingface_bf16"),
    }
    agreement = result["figures"]["bf16_against_fp32"]
    if "bf16" in dtypes:
        assert result["notes"] == []
        assert 0 < agreement["fvu"] < 0.01
        assert 0.5 < agreement["fired_jaccard"] < 1
        assert agreement["latents_compared"] > 0
        assert 0.5 < agreement["top_examples_common"] <= 1
    else:
        assert agreement is None
        assert "bf16 is left out" in result["notes"][0]


def test_both_sides_of_harvest_compute_the_same(tiny_llama: HookedModel) -> None:
    tokens = torch.arange(48).view(2, 24)
    ours = tiny_llama.activations(tokens, "blocks.2.hook_resid_pre")["blocks.2.hook_resid_pre"]
    assert torch.equal(ours, bare_activations(tiny_llama.hf, tokens, 2))
    assert not tiny_llama.hf.model.layers[2]._forward_pre_hooks


def test_model(tiny_inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(model_benchmark, "PEER", "a_package_that_is_not_there")
    result = bench(capsys, "model", *tiny_inputs, *MODEL)
    figures = result["figures"]
    speed, seconds = figures["tokens_per_second"], figures["seconds"]
    ours = ["forward", "one_point", "all_residual", "full_cache", "generate"]
    assert set(speed) == {f"{work}/microtome" for work in ours} | {"forward/huggingface", "generate/huggingface"}
    for name, some in seconds.items():
        assert len(some) == 3
        assert speed[name] == pytest.approx((12 if name.startswith("generate") else 72) / sorted(some)[1])
    for key in ("import_seconds", "load_seconds", "loaded_bytes"):
        assert list(figures[key]) == ["huggingface", "microtome"]
        assert min(figures[key].values()) > 0
    for name, peak in figures["peak_bytes"].items():
        assert peak >= 0.9 * figures["loaded_bytes"][name.partition("/")[2]]
    ratios = result["ratios"]
    for work in ("forward", "one_point", "all_residual"):
        assert ratios[f"{work}_vs_huggingface"] == speed[f"{work}/microtome"] / speed["forward/huggingface"]
    assert ratios["generate_vs_huggingface"] == speed["generate/microtome"] / speed["generate/huggingface"]
    assert ratios["full_cache_vs_transformerlens"] is None
    assert ratios["forward_vs_transformerlens"] is None
    assert "pip install 'transformer-lens" in result["notes"][0]


def test_both_sides_of_model_do_the_same_work(tiny_llama: HookedModel) -> None:
    tokens = torch.arange(40).view(2, 20)
    inputs = Inputs(
        tokens=tokens.tolist(),
        prompt_tokens=8,
        new_tokens=6,
        point="blocks.1.hook_resid_pre",
        full_cache=["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_mid"],
        device="cpu",
    )
    bare, ours = works("huggingface", tiny_llama.hf, inputs), works("microtome", tiny_llama, inputs)
    logits = bare["forward"]()
    assert torch.equal(ours["forward"](), logits)
    kept = {"one_point": {inputs.point}, "full_cache": set(inputs.full_cache)}
    kept["all_residual"] = {f"blocks.{i}.hook_resid_{p}" for i in range(3) for p in ("pre", "mid", "post")}
    for name, points in kept.items():
        captured_logits, cache = ours[name]()
        assert torch.equal(captured_logits, logits) or name == "full_cache"
        assert set(map(str, cache)) == points
    made = bare["generate"]()[:, 8:]
    for row, generation in zip(made, ours["generate"](), strict=True):
        assert generation.tokens.tolist() == row[: len(generation.tokens)].tolist()
        assert len(generation.tokens) == 6


def test_parity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(parity_benchmark, "PEER", "a_package_that_is_not_there")
    monkeypatch.setattr(parity_benchmark, "KINDS", ("gpt2", "llama", "gemma2"))
    result = bench(capsys, "parity", "rows=2", "context=9")
    table = result["figures"]["huggingface"]
    assert list(table) == [f"{kind}/{dtype}" for kind in ("gpt2", "llama", "gemma2") for dtype in ("fp32", "bf16")]
    for name, row in table.items():
        assert row["logits"] == row["logits, all captured"] == row["residual"] == 0
        if name.endswith("fp32"):
            assert row["pattern, first layer"] < 1e-5
            assert row["pattern"] < 1e-5
    assert result["figures"]["transformerlens"] == {}
    assert "pip install 'transformer-lens" in result["notes"][0]


def test_parity_finds_the_largest_difference_at_each_point() -> None:
    pattern = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    ours = {
        "blocks.0.hook_resid_pre": torch.zeros(1, 2, 3),
        "blocks.1.hook_resid_pre": torch.zeros(1, 2, 3),
        "blocks.0.attn.hook_attn_scores": torch.tensor([[[[1.0, -torch.inf], [2.0, 2.0]]]]),
        "blocks.0.attn.hook_pattern": pattern,
        "hook_embed": torch.ones(1, 2, 3),
    }
    theirs = {
        "blocks.0.hook_resid_pre": torch.full((1, 2, 3), 0.25),
        "blocks.1.hook_resid_pre": torch.full((1, 2, 3), -0.5),
        "blocks.0.attn.hook_attn_scores": torch.tensor([[[[1.0, -1e30], [2.0, 2.125]]]]),
        "blocks.0.attn.hook_pattern": pattern,
        "hook_elsewhere": torch.ones(1),
    }
    expected = {"hook_resid_pre": 0.5, "attn.hook_attn_scores": 0.125, "attn.hook_pattern": 0.0}
    assert parity_benchmark.at_points(ours, theirs) == expected


@pytest.fixture
def names(tiny_llama: HookedModel) -> tuple[str, ...]:
    """Words that are one token of the tiny model with the space in front, as names are for a real one."""
    words = [str(tiny_llama.to_string(torch.tensor([i]))) for i in range(320)]
    found = tuple(word[1:] for word in words if word[0] == " " and word[1:].isalpha())
    assert len(found) > 5
    return found


def test_patch(
    tiny_inputs: list[str],
    names: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(patch_benchmark, "PEER", "a_package_that_is_not_there")
    monkeypatch.setattr(patch_benchmark, "_NAMES", names)
    monkeypatch.setattr(patch_benchmark, "_SENTENCE", "a {} {} and {}")
    result = bench(capsys, "patch", tiny_inputs[0], "rounds=1", "path_prompts=3", "device=cpu")
    assert result["figures"]["largest_difference"].keys() == {"resid_sweep/microtome", "head_sweep/microtome"}
    assert max(result["figures"]["largest_difference"].values()) < 1e-4
    took = result["figures"]["sweep_seconds"]
    assert result["ratios"]["resid_sweep_vs_naive"] == took["resid_sweep/naive"] / took["resid_sweep/microtome"]
    assert (
        result["ratios"]["names_head_sweep_vs_naive"] == took["head_sweep/naive"] / took["names_head_sweep/microtome"]
    )
    assert result["ratios"]["resid_sweep_vs_transformerlens"] is None
    assert "pip install 'transformer-lens" in result["notes"][0]
    assert result["figures"]["path_patching_seconds"]["3 prompts"] > 0


def test_a_missing_peer_is_null_and_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train_worker,
        "PEERS",
        {"saelens_fp32": replace(train_worker.PEERS["saelens_fp32"], package="a_package_that_is_not_there")},
    )
    monkeypatch.setattr(train_benchmark, "PEERS", train_worker.PEERS)
    assert train_worker.sides_of(Task(Config(), "topk", 0)) == ["microtome"]
    assert train_benchmark._notes() == [
        "a_package_that_is_not_there is not installed here: pip install 'sae-lens>=6,<7'"
    ]


def test_text_shows_figures_and_ratios(tiny_inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in HARVEST if not word.startswith("rounds")]
    assert main(["bench", "harvest", "--set", *tiny_inputs, *words, "rounds=1", "compare_tokens=240"]) == 0
    out = capsys.readouterr().out
    assert "fp32 vs huggingface" in out
    assert "microtome fp32 with disk" in out


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = in_turn({"a": lambda: side("a"), "b": lambda: side("b")}, 2, "test")
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_rate_and_ratio() -> None:
    assert rate(100, [1.0, 50.0, 2.0]) == 50.0
    assert ratio(6.0, 3.0) == 2.0
    assert ratio(6.0, None) is None
    assert ratio(None, 3.0) is None


def test_memory_is_this_process() -> None:
    assert 10_000_000 < resident_bytes("VmRSS") <= resident_bytes("VmHWM")


def test_common_top_against_a_plain_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(40, 12, generator=generator)
    b = a + 0.3 * torch.rand(40, 12, generator=generator)
    a[:, 0] = 0  # fires nowhere
    b[TOP - 1 :, 1] = 0  # in too few sequences
    expected = []
    for latent in range(2, 12):
        tops = [set(sorted(range(40), key=lambda i: -float(m[i, latent]))[:TOP]) for m in (a, b)]
        expected.append(len(tops[0] & tops[1]) / TOP)
    assert common_top(a, b).tolist() == pytest.approx(expected)
    assert 0 < sum(expected) < len(expected)


def test_agreement_leaves_special_tokens_out() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    is_text = torch.ones(3, 5, dtype=torch.bool)
    is_text[:, 0] = False
    other = x.clone()
    other[:, 0] += 100
    agreement = Agreement(8, 3, None)
    agreement.add(x, other, is_text)
    figures = agreement.figures()
    assert figures["fvu"] == 0
    assert figures["text_tokens"] == 12


def test_an_unknown_benchmark_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "harvst"]) == 1
    err = capsys.readouterr().err
    assert all(name in err for name in NAMES)
    assert "Did you mean 'harvest'" in err


def test_without_the_repository(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="Clone the repository"):
        load("harvest", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_size_is_answered_with_the_right_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"patch": ("rounds", "roundz"), "attribute": ("rounds", "roundz"), "synthetic": ("features", "featurs")}
    names["scaling"] = ("rounds", "roundz")
    right, wrong = names.get(name, ("context", "contxt"))
    assert main(["bench", name, "--set", f"{wrong}=3"]) == 1
    assert right in capsys.readouterr().err


def test_sizes() -> None:
    assert sizes(["rounds=3", "lr=0.001", "corpus=demo", "model=a=b"]) == {
        "rounds": 3,
        "lr": 0.001,
        "corpus": "demo",
        "model": "a=b",
    }
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        sizes(["rounds"])


def test_attribute(
    tiny_inputs: list[str],
    tiny_llama: HookedModel,
    names: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(attribute_benchmark, "NAMES", names)
    result = bench(capsys, "attribute", tiny_inputs[0], "prompts=2", "batch_size=2", "rounds=1", "device=cpu")
    best = result["figures"]["median_seconds"]
    assert result["ratios"] == {f"{name}_vs_passes": best[name] / best["passes"] for name in ("heads", "eap", "eap_ig")}
    assert result["sizes"]["edges"] == Graph.of(tiny_llama).n_edges
    assert set(result["figures"]["peak_bytes"]) == {"passes", "heads", "eap"}


SYNTHETIC = [
    *("features=8", "d=8", "l0=2", "d_sae=12", "seeds=2", "rows=2048", "held_out=512", "tokens=12800", "batch_size=64"),
    *('data=["zipf"]', 'architectures=["topk", "standard"]', "lr=0.01"),
]


def test_synthetic(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(capsys, "synthetic", *SYNTHETIC)
    figures = result["figures"]["zipf"]
    assert list(figures) == ["topk", "standard"]
    for row in figures.values():
        assert {len(row[name]["seeds"]) for name in ("mmcs", "recall", "f1", "fvu", "l0", "dead")} == {2}
        for name in ("mmcs", "recall", "f1"):
            assert 0 <= min(row[name]["seeds"]) <= row[name]["mean"] <= max(row[name]["seeds"]) <= 1
    assert figures["topk"]["l0"]["mean"] == pytest.approx(2.0, abs=0.1)
    assert figures["topk"]["mmcs"]["mean"] > 0.8  # eight random directions in eight dimensions come to about 0.6
    assert figures["standard"]["coefficient"] > 0
    assert "| topk |" in result["notes"][0]


@pytest.mark.parametrize("kind", synthetic_benchmark.DATA)
def test_synthetic_data_has_the_l0_that_was_said(kind: str) -> None:
    config = synthetic_benchmark.Config(features=16, d=12, l0=3)
    x, codes = synthetic_benchmark.make_data(kind, config, 0).sample(20_000, torch.Generator().manual_seed(0))
    assert x.shape == (20_000, 12)
    assert float((codes > 0).sum(1).double().mean()) == pytest.approx(3.0, rel=0.05)


def test_synthetic_scores_by_hand() -> None:
    """Two features in the plane, three latents: the first exact, the second turned by 36.9°, the third never fires."""
    sae = Dictionary(2, 3, ReLU(), origin=Origin.at("synthetic", "synthetic"), center=False).requires_grad_(False)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]))
    codes = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    x = codes.clone()
    x[3] = torch.tensor([0.0, 1.0])  # the second latent fires, and its feature does not
    found = synthetic_benchmark.scores(sae, torch.eye(2), x, codes, found=0.9)
    assert found.mmcs == pytest.approx((1.0 + 0.8) / 2)
    assert found.recall == 0.5
    assert found.f1 == pytest.approx((1.0 + 2 / 3) / 2)
    assert found.l0 == pytest.approx(4 / 4)
    assert found.dead == 1
    # Errors: row 1 (1.2, 1.6) − (0, 2) = (1.2, −0.4); row 3 (0.6, 0.8) − (0, 1) = (0.6, −0.2).
    variance = (x - x.mean(0)).square().sum()
    assert found.fvu == pytest.approx((1.44 + 0.16 + 0.36 + 0.04) / float(variance))


def test_intervals_over_seeds_are_student_s() -> None:
    found = summary([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["interval"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])
    assert summary([1.0])["interval"] is None
