"""Releases with a file for each layer: circuit-tracer's transcoders and Qwen Scope. Codes and outputs are compared in
`test_formats_reference.py`."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from microtome.common.errors import ArtifactError
from microtome.dictionary import load_dictionary, load_dictionary_or_set, load_dictionary_set, read_dictionary
from microtome.dictionary.dictionary_set import DictionarySet
from microtome.dictionary.formats import Hints

FIXTURES = Path(__file__).parent / "fixtures"
SKIP = FIXTURES / "circuit_tracer/jump_relu_skip"
QWEN = FIXTURES / "qwen_scope/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"


def test_a_folder_of_layers_is_a_set(tmp_path: Path) -> None:
    """All layers in their order, 2 before 10."""
    shutil.copytree(SKIP, tmp_path / "all")
    for file in ("expected.safetensors", "layer_0.safetensors.expected.safetensors"):
        (tmp_path / "all" / file).unlink(missing_ok=True)
    shutil.copy(SKIP / "layer_1.safetensors", tmp_path / "all/layer_10.safetensors")
    shutil.copy(SKIP / "layer_0.safetensors", tmp_path / "all/layer_2.safetensors")
    made = load_dictionary_or_set(tmp_path / "all")
    assert isinstance(made, DictionarySet)
    assert made.origin.inputs == tuple(f"blocks.{i}.ln2.hook_normalized" for i in (0, 1, 2, 10))
    assert made.origin.outputs == tuple(f"blocks.{i}.hook_mlp_out" for i in (0, 1, 2, 10))
    assert (made.origin.model_name, made.architecture) == ("tiny", "jumprelu_skip_transcoder_set")
    expected = [load_file(SKIP / f"layer_{i}.safetensors.expected.safetensors") for i in (0, 1, 0, 1)]
    x = torch.cat([each["x"] for each in expected], 1)
    torch.testing.assert_close(made(x), torch.cat([each["out"] for each in expected], 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ArtifactError, match="There is no dictionary at .*Open them together with load_dictionary_set"):
        load_dictionary(tmp_path / "all")


def test_what_the_files_of_a_layer_do_not_say(tmp_path: Path) -> None:
    shutil.copy(SKIP / "layer_1.safetensors", tmp_path)
    assert read_dictionary(tmp_path).notes == (
        "config.yaml is not there: give hook_name, hook_name_out and model_name",
    )
    hints = Hints(hook_name="blocks.1.hook_resid_mid", hook_name_out="blocks.1.hook_mlp_out", model_name="mine")
    made = read_dictionary(tmp_path / "layer_1.safetensors", hints=hints).dictionary
    assert (made.origin.inputs, made.origin.outputs) == (("blocks.1.hook_resid_mid",), ("blocks.1.hook_mlp_out",))
    (tmp_path / "config.yaml").write_text("model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\n")
    [missing] = read_dictionary(tmp_path).notes
    assert missing == "config.yaml does not name both hook points: give hook_name, hook_name_out and model_name"


QWEN3 = "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"


def test_the_points_of_the_releases_for_qwen_3(tmp_path: Path) -> None:
    """As their config names them; the largest has none, and SAELens takes its points to be the others'."""
    for name, config in (("qwen3-4b-transcoders", QWEN3), ("qwen3-14b-transcoders", None)):
        folder = tmp_path / f"models--mwhanna--{name}"
        folder.mkdir()
        shutil.copy(SKIP / "layer_1.safetensors", folder)
        if config:
            (folder / "config.yaml").write_text(config)
        reading = read_dictionary(folder)
        origin = reading.dictionary.origin
        assert (origin.inputs, origin.outputs) == (("blocks.1.mlp.hook_in",), ("blocks.1.hook_mlp_out",))
        assert origin.model_name == f"Qwen/Qwen3-{'4' if config else '14'}B"
        assert [note.partition(":")[0] for note in reading.notes] == ([] if config else ["config.yaml is not there"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"activation_function.threshold": torch.full((16,), -0.5)}, "codes could be below zero. Got: .* down to -0.5"),
        ({"activation_function.threshold": torch.zeros(15)}, r"threshold \(15,\). Expected: .* \(16,\)"),
        ({"activation_function.log_threshold": torch.zeros(16)}, "which another kind has"),
        ({"W_dec": torch.zeros(8, 16)}, r"W_dec \(8, 16\). Expected: W_dec \(16, 8\)"),
        ({"W_skip": torch.zeros(8)}, r"W_skip \(8,\)"),
    ],
    ids=["negative", "short", "log", "transposed", "skip"],
)
def test_damaged_layers(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file({**load_file(SKIP / "layer_0.safetensors"), **tensors}, tmp_path / "layer_0.safetensors")
    with pytest.raises(ArtifactError, match=message):
        read_dictionary(tmp_path)


def test_the_k_of_qwen_scope_is_in_its_repositorys_name(tmp_path: Path) -> None:
    """Wherever the folder is, also in the hub's cache, and never a guess."""
    place = tmp_path / "models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_2" / "snapshots/abc"
    place.mkdir(parents=True)
    shutil.copy(QWEN / "layer3.sae.pt", place / "layer12.sae.pt")
    made = load_dictionary(place / "layer12.sae.pt")
    assert (made.k, made.hook_name, made.model_name) == (2, "blocks.12.hook_resid_post", "Qwen/Qwen3.5-27B")
    shutil.copy(QWEN / "layer3.sae.pt", tmp_path)
    with pytest.raises(ArtifactError, match="does not say its k, .*SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"):
        load_dictionary(tmp_path)
    shutil.copy(QWEN / "layer3.sae.pt", place / "layer2.sae.pt")
    assert load_dictionary_set(place).origin.inputs == ("blocks.2.hook_resid_post", "blocks.12.hook_resid_post")
