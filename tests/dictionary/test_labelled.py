"""Labelled texts: the built-in tasks, a user's file, and what a model and a dictionary make of them."""

import json
from pathlib import Path

import pytest
import torch

from microtome.common.errors import ConfigError, InputError
from microtome.dictionary import LabelledTexts, built_in_tasks, encode_texts, read_labelled
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.labelled import in_decoder_units
from microtome.dictionary.probe_tasks import BUILT_IN
from microtome.model import HookedModel

from .test_points import ORIGINS, random_at

TEXTS = ("The cat", "In 1969 the first people walked on the Moon.", "Goal!", "def main():\n    return 3\n")
LABELS = (True, False, False, True)


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_each_text_is_read_over_its_own_tokens(tiny_llama: HookedModel, readout: str) -> None:
    """Against each text run alone, without padding."""
    sae = random_at(ORIGINS["transcoder"], 32, 32, center=False, skip=True)
    task = LabelledTexts(name="t", texts=TEXTS, attributes={"a": LABELS}, readout=readout)  # type: ignore[arg-type]
    found = encode_texts(tiny_llama, sae, task, batch_tokens=60)
    for i, text in enumerate(TEXTS):
        _, cache = tiny_llama.run_with_cache(text)
        x, y = (cache[name][0, 1:] for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"))
        for mine, direct in ((found.x, x), (found.y, y), (found.codes, sae.encode(x).to_dense())):
            expected = direct[-1] if readout == "last" else direct.mean(0)
            torch.testing.assert_close(mine[i], expected, atol=1e-5, rtol=1e-4)
    assert found.labels[:, 0].tolist() == list(LABELS)
    direct_y = found.y - found.codes[:, [3, 5]] @ sae.W_dec[[3, 5]]
    torch.testing.assert_close(found.without(torch.tensor([3, 5])), direct_y)


def test_codes_of_a_normalising_dictionary_are_in_units_of_the_output() -> None:
    source = random_at(ORIGINS["autoencoder"], 32, 32)
    sae = Dictionary(32, 50, source.activation, origin=source.origin, input_norm="layer_norm")
    sae.load_state_dict(source.state_dict())
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)) * 7 + 2
    plain = sae.encode(x)
    direct = plain.to_dense() * (x.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(in_decoder_units(sae, x), direct, atol=1e-4, rtol=1e-4)


def test_built_in_tasks_are_balanced_and_without_doubles() -> None:
    tasks = built_in_tasks(n_texts=96)
    assert [task.name for task in tasks] == list(BUILT_IN)
    for task in tasks:
        assert len(set(task.texts)) == len(task.texts) >= 90, task.name
        for labels in task.attributes.values():
            share = sum(labels) / len(labels)
            assert share in (0.25, 0.5), task.name
        if len(task.attributes) == 2:
            cells = list(zip(*task.attributes.values(), strict=True))
            assert all(cells.count(cell) == len(cells) // 4 for cell in set(cells)), task.name
    assert built_in_tasks(("topic",), n_texts=96) == [tasks[list(BUILT_IN).index("topic")]]


def test_unknown_and_tiny_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="topic"):
        built_in_tasks(("topics",))
    with pytest.raises(ConfigError, match="32 texts"):
        built_in_tasks(n_texts=8)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_users_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"text": "one", "label": 1},
        {"text": "two", "label": 0},
        {"task": "kinds", "text": "x", "label": "red", "readout": "last"},
        {"task": "kinds", "text": "y", "label": "blue"},
        {"task": "kinds", "text": "z", "label": "green"},
        {"task": "pair", "text": "p", "label": "yes", "spurious": "him"},
        {"task": "pair", "text": "q", "label": "no", "spurious": "her"},
    )
    mine, kinds, pair = read_labelled(path)
    assert (mine.name, mine.attributes) == ("mine", {"1": (True, False)})
    assert kinds.attributes == {
        "blue": (False, True, False),
        "green": (False, False, True),
        "red": (True, False, False),
    }
    assert kinds.readout == "last"
    assert pair.attributes == {"label yes": (True, False), "spurious him": (True, False)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no texts"),
        (({"text": "a", "label": 1}, {"text": "b", "label": 1}), "two classes"),
        (({"text": "a"},), "line 1 is no labelled text"),
        (({"text": "", "label": 1},), "no labelled text"),
        (("a",), "no labelled text"),
    ],
    ids=["empty", "one class", "no label", "no text", "no object"],
)
def test_bad_files_are_refused(tmp_path: Path, rows: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labelled(write(tmp_path / "bad.jsonl", *rows))


def test_files_that_are_no_json_or_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{oops", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 is not JSON"):
        read_labelled(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="There is no file"):
        read_labelled(tmp_path / "none.jsonl")


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="a label for each text"):
        LabelledTexts(name="t", texts=("a", "b"), attributes={"x": (True,)})
    with pytest.raises(InputError, match="nothing to tell apart"):
        LabelledTexts(name="t", texts=("a", "b"), attributes={"x": (True, True)})


def test_a_text_without_text_tokens_is_refused(tiny_llama: HookedModel) -> None:
    sae = random_at(ORIGINS["transcoder"], 32, 32, center=False)
    task = LabelledTexts(name="t", texts=("</s>", "a", "b"), attributes={"x": (True, False, True)})
    with pytest.raises(InputError, match="no text tokens"):
        encode_texts(tiny_llama, sae, task)
