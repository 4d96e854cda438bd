"""`import microtome`: which names it has, and that it stays light."""

import json
import subprocess
import sys

import pytest

import microtome

# The names of the contract that exist so far. A name may be added; taking one away breaks somebody's notebook.
SURFACE = {
    *("open_corpus", "TokenizeConfig", "tokenize_corpus", "TokenDataset"),
    *("load_model", "edits"),
    *("HarvestConfig", "harvest"),
    *(
        "TopKConfig",
        "BatchTopKConfig",
        "GatedConfig",
        "JumpReLUConfig",
        "MatryoshkaConfig",
        "PAnnealConfig",
        "ReLUConfig",
        "TrainConfig",
        "train",
        "train_cross_layer",
        "load_dictionary",
        "EvaluateConfig",
        "evaluate",
        "compare",
    ),
    *("IndexConfig", "build_index", "open_index"),
    "replicate",
    *("circuits", "toy"),
    "MicrotomeError",
    "__version__",
}
HEAVY = [
    "torch",
    "transformers",
    "numpy",
    "pyarrow",
    "duckdb",
    "rich",
    "tyro",
    "fastapi",
    "huggingface_hub",
    "jaxtyping",
]


def loaded_after(code: str) -> set[str]:
    """The modules in `sys.modules` of a fresh interpreter after it ran `code`."""
    script = f"import sys\n{code}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_names() -> None:
    assert set(microtome.__all__) == SURFACE
    assert set(dir(microtome)) >= SURFACE


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_each_name_is_there(name: str) -> None:
    assert getattr(microtome, name) is not None


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'; its names are open_corpus"):
        _ = microtome.load_modle  # type: ignore[attr-defined]  # type checkers know it too


def test_import_is_light() -> None:
    before = loaded_after("")
    loaded = loaded_after("import microtome") - before
    assert not loaded & set(HEAVY)
    assert "microtome" in loaded
    assert len(loaded) < 30, f"more than the few modules that a lazy package needs: {sorted(loaded)}"


def test_help_is_light() -> None:
    loaded = loaded_after("from microtome.cli.main import main\nassert main(['--help']) == 0")
    assert not loaded & set(HEAVY)
    assert not {m for m in loaded if m.startswith("microtome.cli.")} - {"microtome.cli.main", "microtome.cli.options"}
