"""Labelled texts: the built-in tasks, a user's file, and what a model and a dictionary make of them."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from microtome.common.errors import ConfigError, InputError, MicrotomeError
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


ROWS = [
    {"text": 'one, "quoted"', "label": "red"},
    {"text": "two\nlines", "label": "blue"},
    {"text": "dré", "label": "red"},
]


def as_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name says, written by the standard library and Arrow."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        write(path, *rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_tasks(tmp_path: Path, suffix: str) -> None:
    [found] = read_labelled(as_file(tmp_path / f"mine{suffix}", ROWS))
    assert (found.name, found.texts) == ("mine", tuple(row["text"] for row in ROWS))
    assert found.attributes == {"red": (True, False, True)}
    numbered = as_file(tmp_path / f"numbers{suffix}", [{**row, "label": i % 2} for i, row in enumerate(ROWS)])
    assert read_labelled(numbered)[0].attributes == {"1": (False, True, False)}
    tasks = [{**row, "task": "a" if i < 2 else "b"} for i, row in enumerate([*ROWS, {"text": "x", "label": "blue"}])]
    assert [task.name for task in read_labelled(as_file(tmp_path / f"two{suffix}", tasks))] == ["a", "b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "two classes"),
        ([{"text": "a", "kind": 1}], r"has no 'label'. Got: columns 'text', 'kind'"),
        ([{"body": "a", "label": 1}], r"has no 'text'. Got: columns 'body', 'label'"),
        ([{"text": "", "label": 1}], "has nothing in 'text'"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], "has nothing in 'label'"),
        (
            [{"text": "a", "label": 1, "spurious": 1}, {"text": "b", "label": 0, "spurious": None}],
            "'b' has nothing in 'sp",
        ),
        ([{"text": "a", "label": 1, "readout": "first"}, {"text": "b", "label": 0}], "unknown readout"),
    ],
    ids=["empty", "one class", "no label", "no text", "empty text", "empty label", "a gap in spurious", "readout"],
)
def test_bad_tables_are_refused(tmp_path: Path, suffix: str, rows: list[dict[str, Any]], message: str) -> None:
    path = as_file(tmp_path / f"bad{suffix}", rows)
    with pytest.raises(MicrotomeError, match=message):
        read_labelled(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.jsonl", b"{oops", "line 1 is not JSON"),
        ("bad.jsonl", b'"a"', "line 1 is no object"),
        ("bad.jsonl", b'{"text": 3, "label": 1}', "no text in 'text'"),
        ("bad.jsonl", b'{"text": "a", "label": NaN}', "has nothing in 'label'"),
        ("bad.jsonl", b"\xff\xfe{}", "not UTF-8"),
        ("bad.csv", b"text,label\na,b,c\n", "more cells than there are columns. Got: 3"),
        ("bad.csv", b'text,label\n"a,1\n', "is not CSV"),
        ("bad.csv", b"text,label\n", "no rows"),
        ("bad.parquet", b"PAR1 or not", "cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_labelled(tmp_path / name)
    with pytest.raises(InputError, match="There is no file"):
        read_labelled(tmp_path / f"none{Path(name).suffix}")


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
