"""The commands and their options, frozen: whoever changes one changes it here and in docs/cli.md too, on purpose."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from microtome.cli.main import COMMANDS, load_command, usage
from microtome.cli.options import CommandOptions

COMMON = ["json"]
MODEL = ["model", "dtype", "device"]
TEXT = [*MODEL, "corpus", "tokens", "context", "max_tokens", "part"]
SURFACE = {
    "demo": ["from_scratch", "out", "part", "train_tokens", "no_serve", "port", "open"],
    "doctor": ["offline", "timeout"],
    "models": [],
    "generate": [
        *("prompt", "prompts", "model", "dtype", "device", "edits", "max_new_tokens", "temperature", "top_k", "top_p"),
        *("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "no_repeat_ngram", "n_beams"),
        *("length_penalty", "stop", "seed", "recipe", "out", "overwrite"),
    ],
    "lens": ["prompt", *MODEL, "answer", "top", "tuned", "mid", "figure"],
    "tune-lens": [
        *TEXT,
        *("out", "steps", "batch_size", "positions", "lr", "optimiser", "valid_tokens", "seed", "overwrite"),
    ],
    "heads": [*MODEL, "kinds", "length", "repeats", "batch", "no_bos", "seed", "rows", "top", "figure"],
    "patch": [
        *(
            "clean",
            "corrupt",
            "answer",
            "wrong",
            "over",
            "by_position",
            "direction",
            "normalize",
            "receivers",
            "senders",
        ),
        *("freeze_mlps", *MODEL, "max_rows", "top", "figure"),
    ],
    "attribute": [
        *(
            "clean",
            "corrupt",
            "answer",
            "wrong",
            "level",
            "method",
            "over",
            "rule",
            "steps",
            "direction",
            "by_position",
        ),
        *(*MODEL, "batch_size", "top", "figure"),
    ],
    "circuit": [
        *("clean", "corrupt", "answer", "wrong", "circuit", "edges", "method", "rule", "steps", "tau", "how", "by"),
        *("replace", "curve", "seed", *MODEL, "rows", "top", "out", "figure", "overwrite"),
    ],
    "harvest": [*TEXT, "hooks", "out", "store_dtype", "batch_tokens", "shard_tokens", "overwrite"],
    "train": [
        *TEXT,
        *(
            "out",
            "store",
            *("hook", "output_hook", "per_layer", "cross_layer", "architecture", "d_sae", "k", "coefficient"),
            *("target_l0", "revival", "aux_k", "dead_after", "set", "sweep", "configs"),
            "train_tokens",
            "batch_size",
            "buffer_size",
            "lr",
        ),
        *("warmup_steps", "decay_fraction", "seed", "checkpoint_every", "log_to", "overwrite"),
    ],
    "train-lm": [
        *TEXT[3:],
        *("out", "tokenizer", "tokenizer_size", "n_layers", "d_model", "n_heads", "d_mlp", "positions"),
        *("normalization", "activation", "tied", "steps", "batch_size", "lr", "warmup_steps", "weight_decay"),
        *("checkpoint_every", "seed", "dtype", "device", "overwrite"),
    ],
    "evaluate": [
        *(*TEXT, "dictionary", "n_tokens", "function_tokens", "whole_only"),
        *("metrics", "probe_data", "entity_data", "mask_steps", "mask_sparsity", "out"),
    ],
    "compare": [*TEXT, "dictionaries", "n_tokens", "function_tokens", "whole_only", "similarity", "out"],
    "convert": [
        *("source", "out", "format", "model_name", "hook_name", "hook_name_out", "norm_scaling_factor"),
        *("fold_decoder_norms", "split_signs", "dtype", "overwrite"),
    ],
    "index": [*TEXT, "dictionary", "out", "store", "top", "bands", "per_band", "window", "seed", "overwrite"],
    "serve": ["index", "host", "port", "open", "no_model", "allow_host"],
    "replicate": ["name", "list", "smoke", *MODEL, "report", "seed", "set", "strict"],
    "bench": ["name", "set"],
}
ROOT = Path(__file__).parents[2]


def test_the_commands() -> None:
    assert list(COMMANDS) == list(SURFACE)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options(name: str) -> None:
    options = load_command(name).Options
    assert [field.name for field in dataclasses.fields(options)] == [*COMMON, *SURFACE[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_keeps_the_house_pattern(name: str) -> None:
    command = load_command(name)
    assert issubclass(command.Options, CommandOptions)
    assert command.Options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(command.Options))
    assert callable(command.run)
    assert callable(command.show)
    assert command.Options.__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_importing_a_command_loads_no_torch(name: str) -> None:
    code = f"import sys, {COMMANDS[name].module}\nassert 'torch' not in sys.modules\nassert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_the_models_loads_no_torch() -> None:
    code = "import sys; from microtome.cli.main import main; assert main(['models']) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'transformers' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a", "--temperature", "-1"],
        ["a", "--n-beams", "2", "--top-p", "0.9"],
        ["--recipe", "none.json", "--out", "a"],
    ],
    ids=" ".join,
)
def test_bad_words_to_generate_are_refused_before_torch_is_loaded(words: list[str]) -> None:
    code = f"import sys; from microtome.cli.main import main; assert main({['generate', *words]}) == 1"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_usage_names_each_command() -> None:
    rows = [line.split()[0] for line in usage().splitlines() if line.startswith("  ")]
    assert rows == list(COMMANDS)


def test_the_page_of_commands_is_up_to_date() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "scripts/cli_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
