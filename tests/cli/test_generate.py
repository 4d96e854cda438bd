"""`microtome generate`: against the library's own texts, streamed or not, with edits, from a file, by a recipe."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from microtome.cli.generate import Options
from microtome.cli.main import main
from microtome.model import HookedModel, edits
from microtome.model.generation_config import GenerateConfig

MODEL = ("--model", "model", "--device", "cpu")


@pytest.fixture
def here(tiny_llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in it, as the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama.hf.save_pretrained("model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained("model")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", *MODEL, *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_prompt_is_continued_as_by_the_library(
    here: Path, tiny_llama: HookedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = str(tiny_llama.generate("The cat", max_new_tokens=8))
    assert printed(capsys, "The cat", "--max-new-tokens", "8") == f"The cat{wanted}\n"
    words = (
        "--max-new-tokens",
        "8",
        "--temperature",
        "0.7",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "--presence-penalty",
        "1",
    )
    drawn = tiny_llama.generate("The cat", max_new_tokens=8, temperature=0.7, top_p=0.9, seed=3, presence_penalty=1)
    assert printed(capsys, "The cat", *words) == f"The cat{drawn}\n"
    assert drawn != wanted


def test_several_prompts_and_a_file_of_them(
    here: Path, tiny_llama: HookedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["The cat", "In 1969 the"]
    wanted = tiny_llama.generate(texts, max_new_tokens=6, n_beams=2)
    Path("prompts.txt").write_text("The cat\n\nIn 1969 the\n")
    sizes = ("--max-new-tokens", "6", "--n-beams", "2")
    shown = "\n\n".join(text + new for text, new in zip(texts, wanted, strict=True)) + "\n"
    assert printed(capsys, *texts, *sizes) == shown
    assert printed(capsys, "--prompts", "prompts.txt", *sizes) == shown


def test_json_has_tokens_and_log_probabilities(
    here: Path, tiny_llama: HookedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    result: dict[str, Any] = json.loads(printed(capsys, "The cat", "--max-new-tokens", "6", "--json"))
    [row] = result["texts"]
    [made] = tiny_llama.generate_details("The cat", max_new_tokens=6)
    assert (row["prompt"], row["text"], row["finish"]) == ("The cat", made.text, made.finish)
    assert row["tokens"] == made.tokens.tolist()
    assert row["logprobs"] == pytest.approx(made.logprobs.tolist(), abs=1e-5)


def test_edits_and_stop_strings_are_active(
    here: Path, tiny_llama: HookedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [edits.zero("blocks.*.hook_mlp_out")]
    edits.save("list.safetensors", made)
    with tiny_llama.edited(made):
        wanted = str(tiny_llama.generate("The cat", max_new_tokens=8))
    words = ("--max-new-tokens", "8", "--edits", "list.safetensors")
    assert printed(capsys, "The cat", *words) == f"The cat{wanted}\n"
    assert wanted != tiny_llama.generate("The cat", max_new_tokens=8)
    assert (
        printed(capsys, "The cat", *words, "--stop", wanted[2:4]) == f"The cat{wanted[: wanted.index(wanted[2:4])]}\n"
    )


def test_a_recipe_still_makes_a_corpus(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"name": "a", "weight": 1, "requests": [], "openings": ["The {animal} sat"]}
    recipe = {"documents": 3, "max_new_tokens": 4, "kinds": [kind], "words": {"animal": ["cat"]}, "chat_share": 0.0}
    Path("recipe.json").write_text(json.dumps(recipe))
    result = json.loads(printed(capsys, "--recipe", "recipe.json", "--out", "corpus", "--json"))
    assert result["documents"] == 3
    assert Path("corpus/corpus.jsonl.zst").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either a prompt"),
        (("a", "--prompts", "model/config.json"), "either a prompt"),
        (("--prompts", "none.txt"), "no file none.txt"),
        (("a", "--edits", "none.safetensors"), "no file none.safetensors"),
        (("a", "--edits", "model/config.json"), "cannot be read"),
        (("--prompts", "empty.txt"), "holds no prompt"),
        (("",), "empty"),
        (("a", "--temperature", "0", "--top-k", "5"), "greedy"),
        (("a", "--n-beams", "2", "--top-k", "5"), "draws nothing"),
        (("a", "--max-new-tokens", "64"), "at most 64 together"),
        (("--recipe", "model/config.json"), "Say --out"),
        (("--recipe", "model/config.json", "--out", "c", "--edits", "model/config.json"), "Edits go with prompts"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_message(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    Path("empty.txt").write_text("\n")
    assert main(["generate", *MODEL, *words]) == 1
    assert message in capsys.readouterr().err


def test_the_command_has_every_setting_with_the_same_default() -> None:
    settings = {field.name: field.default for field in fields(GenerateConfig)}
    offered = {field.name: field.default for field in fields(Options)}
    assert settings.keys() - offered.keys() == {"use_cache"}, "the text is the same with and without a cache"
    assert {name: offered[name] for name in settings.keys() & offered.keys()} == {
        name: default for name, default in settings.items() if name != "use_cache"
    }
