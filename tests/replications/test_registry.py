"""The frame: finding a replication, its settings, what it is given, and what the report says of how it was made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import microtome as mt
from microtome.common.errors import ArtifactError, ConfigError, InputError, MissingDependencyError
from microtome.common.progress import Progress
from microtome.model import HookedModel
from microtome.replications import REPLICATIONS, Replication, find
from microtome.views import Bars, Claim, Report, Section, at_least


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """How far to count, and whether that is far."""

    n: int = 3
    least: float = 2.0
    seed: int = 0


def count(config: CountConfig, model: HookedModel | None, progress: Progress) -> Report:
    for i in range(config.n):
        progress.advance(1, str(i))
    return Report(
        title="Counting",
        summary="One, two, three.",
        claims=[Claim("far", "It counts far", at_least(config.least), config.n)],
        sections=[Section("Count", [Bars(["count"], [config.n])])],
        provenance={"model": "made here"} if model is None else {},
    )


def counting(**changed: Any) -> Replication[CountConfig]:
    settings: dict[str, Any] = {
        "name": "counting",
        "title": "Counting",
        "source": "Somebody 2026",
        "about": "counts",
        "smoke": CountConfig(n=1, least=1),
        "full": CountConfig(),
        "run": count,
        "steps": lambda config: config.n,
        "default_model": None,
    }
    return Replication(**(settings | changed))


def test_each_replication_is_what_its_name_says() -> None:
    for name in REPLICATIONS:
        found = find(name)
        assert found.name == name
        assert found.title
        assert found.source
        assert found.steps(found.smoke) > 0
        assert found.smoke != found.full


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown replication 'samplign'.*Did you mean 'sampling'"):
        mt.replicate("samplign")


def test_presets_settings_and_seed_reach_the_run() -> None:
    assert mt.replicate(counting())["far"].measured == 3
    assert mt.replicate(counting(), preset="smoke")["far"].measured == 1
    report = mt.replicate(counting(), preset="smoke", n=7, seed=5)
    assert report["far"].measured == 7
    assert report.provenance["config"] == {"n": 7, "least": 1.0, "seed": 5}
    assert report.provenance["seed"] == 5


def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")

    def never(config: CountConfig, model: HookedModel | None, progress: Progress) -> Report:
        raise AssertionError("it ran")

    with pytest.raises(ArtifactError, match="cannot be made"):
        mt.replicate(counting(run=never), out=tmp_path / "file")


def test_an_unknown_setting_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown key 'leest'.*Did you mean 'least'"):
        mt.replicate(counting(), leest=1.0)
    with pytest.raises(ConfigError, match="wrong type"):
        mt.replicate(counting(), n="many")
    with pytest.raises(ConfigError, match="Unknown preset"):
        mt.replicate(counting(), preset="big")


def test_presets_are_checked() -> None:
    @dataclass(frozen=True, kw_only=True)
    class NoSeed:
        n: int = 1

    with pytest.raises(ConfigError, match="field `seed`"):
        counting(smoke=NoSeed(), full=NoSeed())
    with pytest.raises(ConfigError, match="two kinds"):
        counting(smoke=NoSeed())


def test_the_provenance_says_what_made_it(tiny_llama: HookedModel) -> None:
    made = mt.replicate(counting(), tiny_llama).provenance
    assert made["replication"] == "counting"
    assert made["preset"] == "full"
    assert made["model"] == {
        "name": "tiny-llama",
        "revision": None,
        "family": "llama",
        "n_layers": 3,
        "n_heads": 4,
        "d_model": 32,
        "d_vocab": 320,
        "dtype": "float32",
        "device": "cpu",
    }
    assert made["versions"]["microtome"] == mt.__version__
    assert made["machine"]["cores"] >= 1
    assert made["seconds"] >= 0
    assert json.loads(json.dumps(made)) == made
    # One that makes its own model says so itself.
    assert mt.replicate(counting()).provenance["model"] == "made here"
    assert mt.replicate(counting()).source == "Somebody 2026"


def test_a_model_can_be_named(tiny_llama: HookedModel, tmp_path: Path) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    assert mt.replicate(counting(), tmp_path / "model").provenance["model"]["d_model"] == 32
    assert mt.replicate(counting(default_model=str(tmp_path / "model"))).provenance["model"]["d_model"] == 32


def test_the_report_is_written_where_asked(tmp_path: Path) -> None:
    report = mt.replicate(counting(), out=tmp_path / "report")
    assert json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8")) == report.data()
    assert (tmp_path / "report/figures/1.svg").exists()


def test_a_missing_matplotlib_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(config: CountConfig, model: HookedModel | None, progress: Progress) -> Report:
        ran.append(config)
        return count(config, model, progress)

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="plots"):
        mt.replicate(counting(run=run), out=tmp_path / "report")
    assert ran == []
    assert mt.replicate(counting(run=run)).failed == ()
    assert len(ran) == 1
