"""Several dictionaries of one repository on the hub. A server on this machine stands for the hub, a folder for its cache."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.dictionary.stand_in_hub import FIXTURES, copy, put, served, use_cache

from microtome.cli.evaluate import place
from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary import (
    DictionarySet,
    load_dictionaries,
    load_dictionary,
    load_dictionary_or_set,
    load_dictionary_set,
)
from microtome.dictionary.formats.hub import PartOfASetWarning
from microtome.dictionary.formats.sets import split_glob

LAYERS = ("layer_0.safetensors", "layer_1.safetensors", "config.yaml")
HOOKS = tuple(f"blocks.{i}.ln2.hook_normalized" for i in range(2))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub of the repositories in `tmp_path/hub`, and the files that it was asked for."""
    with served(tmp_path / "hub") as (address, asked):
        use_cache(tmp_path / "cache", monkeypatch, address)
        yield asked


def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize("name", ["hf://mwhanna/qwen3-4b-transcoders", "mwhanna-qwen3-4b-transcoders/."])
def test_all_layers_of_a_repository(
    name: str, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy("circuit_tracer/relu", tmp_path / "hub/mwhanna/qwen3-4b-transcoders", *LAYERS)
    (tmp_path / "hub/mwhanna/qwen3-4b-transcoders/features.bin").write_bytes(b"large")
    made = load_dictionary_set(name)
    assert sorted(hub) == sorted(LAYERS)
    assert ": files to fetch: 3 (0.00 GB)" in capsys.readouterr().err
    assert made.origin.inputs == HOOKS
    copy("circuit_tracer/relu", tmp_path / "local", *LAYERS)
    assert made.fingerprint == load_dictionary_set(tmp_path / "local").fingerprint
    assert made.origin.model_name == ("Qwen/Qwen3-4B" if name.endswith(".") else "tiny")
    opened = load_dictionary_or_set(name)
    assert isinstance(opened, DictionarySet)
    assert [each.fingerprint for each in load_dictionaries(name)] == [each.fingerprint for each in opened.dictionaries]
    with pytest.raises(ArtifactError, match="Open them together with load_dictionary_set"):
        load_dictionary(name)
    offline(tmp_path, monkeypatch)
    assert load_dictionary_set(name).fingerprint == made.fingerprint  # no warning: the hub's list is in the cache
    assert len(hub) == len(LAYERS)


@pytest.mark.usefixtures("hub")
def test_layers_that_a_glob_chooses(tmp_path: Path) -> None:
    top = tmp_path / "hub/someone/transcoders"
    copy("circuit_tracer/relu", top, *LAYERS)
    shutil.copy(top / "layer_1.safetensors", top / "layer_10.safetensors")
    shutil.copy(top / "layer_0.safetensors", top / "layer_2.safetensors")
    made = load_dictionary_set("hf://someone/transcoders/layer_[1-9]*.safetensors")
    fetched = sorted(file.name for file in made.path.parent.iterdir())
    assert fetched == ["config.yaml", *(f"layer_{i}.safetensors" for i in (1, 10, 2))]  # as text is sorted
    assert made.origin.inputs == tuple(f"blocks.{i}.ln2.hook_normalized" for i in (1, 2, 10))
    again = load_dictionary_or_set(made.path)  # what an index remembers
    assert again.fingerprint == made.fingerprint
    with pytest.raises(
        ArtifactError,
        match=r"no dictionaries in .* called layer_7\*. Got: a folder with config.yaml, layer_1",
    ):
        load_dictionary_set("hf://someone/transcoders/layer_7*")


def test_one_layer_in_the_cache_is_not_the_set(hub: list[str], tmp_path: Path) -> None:
    copy("circuit_tracer/relu", tmp_path / "hub/someone/transcoders", *LAYERS)
    assert load_dictionary("hf://someone/transcoders/layer_1.safetensors").hook_name == HOOKS[1]
    assert "layer_0.safetensors" not in hub
    made = load_dictionary_or_set("hf://someone/transcoders")
    assert isinstance(made, DictionarySet)
    assert made.origin.inputs == HOOKS
    assert sorted(hub) == sorted(LAYERS)


def test_one_layer_in_the_cache_and_no_hub(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy("circuit_tracer/relu", tmp_path / "hub/someone/transcoders", *LAYERS)
    load_dictionary("hf://someone/transcoders/layer_1.safetensors")
    offline(tmp_path, monkeypatch)
    with pytest.raises(ArtifactError, match="is not on this disk, or not all of it, and the hub cannot be reached"):
        load_dictionary_set("hf://someone/transcoders")
    put(
        tmp_path / "cache", "someone/other", "", "circuit_tracer/relu", *LAYERS[:1]
    )  # as clients before version 2 left it
    with pytest.warns(PartOfASetWarning, match="may have some of its dictionaries only"):
        made = load_dictionary_set("hf://someone/other")
    assert made.origin.inputs == ("unknown",)  # its config.yaml is one of the files that are missing


def test_deep_folders_are_not_fetched(hub: list[str], tmp_path: Path) -> None:
    """A repository of many widths and sparsities of each layer: terabytes, and none lies where a set's members do."""
    inside = "layer_3/width_16k/average_l0_5"
    copy(f"gemma-scope-2b-pt-res/{inside}", tmp_path / "hub/google/gemma-scope-2b-pt-res" / inside, "params.npz")
    for name in ("hf://google/gemma-scope-2b-pt-res", "gemma-scope-2b-pt-res/."):
        with pytest.raises(ArtifactError, match="has no weights in itself or the folders below it"):
            load_dictionary_set(name)
    assert hub == []
    made = load_dictionary_set("gemma-scope-2b-pt-res/layer_*/width_16k/average_l0_[4-6]")
    assert hub == [f"{inside}/params.npz"]
    assert (made.origin.inputs, made.origin.model_name) == (("blocks.3.hook_resid_post",), "google/gemma-2-2b")


def test_members_know_what_the_release_knows(hub: list[str], tmp_path: Path) -> None:
    """The scale of the activations is that of each member's id, which is not the name of its folder."""
    top = tmp_path / "hub/jbloom/Gemma-2b-Residual-Stream-SAEs"
    inside = "gemma_2b_blocks.12.hook_resid_post_16384"
    copy("saelens_checkpoint/standard", top / inside, "cfg.json", "sae_weights.safetensors")
    made = load_dictionary_set("gemma-2b-res-jb/.")
    alone = load_dictionary(FIXTURES / "saelens_checkpoint/standard", norm_scaling_factor=0.21381938399317255)
    assert [each.fingerprint for each in made.dictionaries] == [alone.fingerprint]
    assert f"{inside}/cfg.json" in hub


@pytest.mark.usefixtures("hub")
def test_what_makes_no_set(tmp_path: Path) -> None:
    copy("sparsify/layers.3", tmp_path / "hub/someone/saes/a/layers.3")
    copy("sparsify/layers.3", tmp_path / "hub/someone/saes/b/layers.3")
    with pytest.raises(ArtifactError, match="has no c"):
        load_dictionary_set("hf://someone/saes/c")
    with pytest.raises(ArtifactError, match="could not be fetched: "):
        load_dictionary_set("hf://nobody/nothing")
    with pytest.raises(ArtifactError, match="There are no dictionaries in .*a folder with cfg.json"):
        load_dictionary_set("hf://someone/saes/a/layers.3")
    assert not isinstance(load_dictionary_or_set("hf://someone/saes/a/layers.3"), DictionarySet)
    with pytest.raises(ConfigError, match="read different points"):
        load_dictionary_set("hf://someone/saes/*/layers.3")
    with pytest.raises(ArtifactError, match="gpt2-small-res-jb is a release of many dictionaries.*gpt2-small-res-jb/."):
        load_dictionary_set("gpt2-small-res-jb")


def test_transcoders_that_a_config_names(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `mntss/gemma-scope-transcoders` does: no weights, and a file of another repository for each layer."""
    inside = "layer_3/width_16k/average_l0_5"
    source = "gemma-scope-2b-pt-transcoders"
    for layer in range(2):
        copy(f"{source}/{inside}", tmp_path / f"hub/google/{source}/layer_{layer}/width_16k/average_l0_5", "params.npz")
    names = [f"hf://google/{source}/layer_{layer}/width_16k/average_l0_5/params.npz" for layer in (1, 0)]
    top = tmp_path / "hub/mntss/gemma-scope-transcoders"
    top.mkdir(parents=True)
    (top / "config.yaml").write_text(CONFIG + "".join(f'  - "{name}"  # one\n' for name in names))
    made = load_dictionary_or_set("hf://mntss/gemma-scope-transcoders")
    assert isinstance(made, DictionarySet)
    assert (made.origin.inputs, made.origin.model_name) == (HOOKS, "google/gemma-2-2b")  # by their place in the list
    assert made.origin.outputs == ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    alone = [load_dictionary(name).fingerprint for name in names]
    assert [each.fingerprint for each in load_dictionaries(made.path)] == alone
    assert len(hub) == 2  # the config, and the weights, whose content is the same
    with pytest.raises(ArtifactError, match="Open them together with load_dictionary_set"):
        load_dictionary("hf://mntss/gemma-scope-transcoders")
    offline(tmp_path, monkeypatch)
    assert load_dictionary_set("hf://mntss/gemma-scope-transcoders").fingerprint == made.fingerprint


CONFIG = """model_name: "google/gemma-2-2b"
model_kind: transcoder_set
feature_input_hook: ln2.hook_normalized
feature_output_hook: hook_mlp_out
transcoders:
"""


@pytest.mark.parametrize(
    "listed",
    [
        "- a/layer_0.safetensors\n- 'b/layer_1.safetensors'",
        "  # two\n\n  - a/layer_0.safetensors\n  - b/layer_1.safetensors\nscan: x",
    ],
    ids=["flat", "indented"],
)
def test_a_config_that_names_files_on_this_disk(listed: str, tmp_path: Path) -> None:
    copy("circuit_tracer/relu", tmp_path / "a", "layer_0.safetensors")
    copy("circuit_tracer/relu", tmp_path / "b", "layer_1.safetensors")
    (tmp_path / "config.yaml").write_text(CONFIG + listed)
    made = load_dictionary_set(tmp_path)
    assert made.origin.inputs == HOOKS
    assert [each.fingerprint for each in made.dictionaries] == [
        load_dictionary(FIXTURES / f"circuit_tracer/relu/layer_{i}.safetensors").fingerprint for i in range(2)
    ]
    (tmp_path / "config.yaml").write_text(CONFIG.strip() + " [a/layer_0.safetensors, 'b/layer_1.safetensors']")
    assert load_dictionary_set(tmp_path).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            f"{CONFIG}  - id: one\n    filepath: hf://a/b/c",
            "names a transcoder that cannot be opened. Got: {'id': 'one'",
        ),
        (f"{CONFIG}  - nowhere.safetensors", "cannot be opened. Got: nowhere.safetensors. Expected: a list of hf://"),
        (f"{CONFIG}  - hf://google", "No address on the hub"),
        (f"{CONFIG}  - hf://google/nothing/x.npz", "could not be fetched|cannot be reached"),
        (
            CONFIG.replace("transcoder_set", "cross_layer_transcoder")
            + "  - hf://google/clt/x/params_layer_0.safetensors",
            "Open the folder of its files, hf://google/clt/x, with load_cross_layer_transcoder",
        ),
        (CONFIG, "There are no dictionaries in .* a folder with config.yaml"),
    ],
    ids=["mapping", "missing", "address", "hub", "cross-layer", "none"],
)
def test_configs_whose_transcoders_cannot_be_opened(
    config: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(tmp_path, monkeypatch)
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(ArtifactError, match=message):
        load_dictionary_set(tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "chosen"),
    [
        ("hf://o/r/layer_[0-7].safetensors", "hf://o/r", "layer_[0-7].safetensors"),
        ("hf://o/r/x?revision=abc", "hf://o/r/x?revision=abc", None),
        ("hf://o/r/layer_*?revision=abc", "hf://o/r?revision=abc", "layer_*"),
        ("release/layer_*", "release/.", "layer_*"),
        ("layer_*", ".", "layer_*"),
        ("runs/a/b/c", "runs/a/b/c", None),
    ],
)
def test_names_and_their_globs(name: str, folder: str, chosen: str | None) -> None:
    assert split_glob(name) == (folder, chosen)


@pytest.mark.parametrize("name", ["runs/x/a**", "hf://o/r/*/../../y"])
def test_what_is_no_glob(name: str) -> None:
    with pytest.raises(ArtifactError, match="No glob in a folder"):
        split_glob(name)


def test_a_folder_on_this_disk_may_be_called_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    assert split_glob(tmp_path / "a[1]") == (str(tmp_path / "a[1]"), None)
    assert place(str(tmp_path / "a[1]")) == tmp_path / "a[1]"
    (tmp_path / "x").mkdir()
    # What a glob chooses is not the folder: its figures must not become the folder's.
    assert place(str(tmp_path / "x/layer_[0-3]")) == Path("x-layer_0_3")
    assert place("hf://o/r") == Path("r")


def test_what_a_config_names_comes_first_in_both(tmp_path: Path) -> None:
    """Also where the folder's own file would be a dictionary by itself."""
    copy("circuit_tracer/relu", tmp_path, "layer_0.safetensors")
    copy("circuit_tracer/relu", tmp_path / "other", "layer_1.safetensors")
    (tmp_path / "config.yaml").write_text(f"{CONFIG}  - layer_0.safetensors\n  - other/layer_1.safetensors")
    made = load_dictionary_or_set(tmp_path)
    assert isinstance(made, DictionarySet)
    assert made.fingerprint == load_dictionary_set(tmp_path).fingerprint
    assert len(made.dictionaries) == 2


def test_config_values_that_are_no_texts(tmp_path: Path) -> None:
    copy("circuit_tracer/relu", tmp_path, "layer_0.safetensors")
    for line, said in (("model_name: 7", "model_name 7"), ("feature_input_hook: [1]", r"feature_input_hook \[1\]")):
        (tmp_path / "config.yaml").write_text(line)
        with pytest.raises(ArtifactError, match=f"config.yaml is damaged. Got: {said}. Expected: a text"):
            load_dictionary(tmp_path)
    (tmp_path / "config.yaml").write_text(f"{CONFIG}  - {'x' * 5000}")
    with pytest.raises(ArtifactError, match="names a transcoder that cannot be opened"):
        load_dictionary_set(tmp_path)
