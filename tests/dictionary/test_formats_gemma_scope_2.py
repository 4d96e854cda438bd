"""Gemma Scope 2 by its documented layout: where its dictionaries belong, several layers at once, releases by name, bad files.

That codes and outputs are those of SAELens's reader and of circuit-tracer's is in `test_formats_reference.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome.common.errors import ArtifactError
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    load_any_dictionary,
    load_cross_layer_transcoder,
    load_dictionary,
    save_dictionary,
)
from microtome.dictionary.formats import read_dictionary
from microtome.dictionary.formats.reading import Hints
from microtome.dictionary.formats.releases import find_release

TOP = Path(__file__).parent / "fixtures/gemma-scope-2-270m-pt"
RESID = "resid_post/layer_3_width_16k_l0_small"
ACROSS = "transcoder/layer_3_width_16k_l0_small"
AFFINE = "transcoder_all/layer_3_width_16k_l0_small_affine"
CROSS, CLT = "crosscoder/layer_5_9_12_width_16k_l0_small", "clt/width_16k_l0_small"
D, L = 8, 3
MLP = (tuple(f"blocks.{i}.mlp.hook_in" for i in range(L)), tuple(f"blocks.{i}.hook_mlp_out" for i in range(L)))
ORIGINS = {
    RESID: (("blocks.3.hook_resid_post",), ("blocks.3.hook_resid_post",)),
    "mlp_out_all/layer_3_width_16k_l0_small": (("blocks.3.hook_mlp_out",), ("blocks.3.hook_mlp_out",)),
    "attn_out/layer_3_width_16k_l0_small": (("blocks.3.attn.hook_z",), ("blocks.3.attn.hook_z",)),
    ACROSS: (("blocks.3.mlp.hook_in",), ("blocks.3.hook_mlp_out",)),
    AFFINE: (("blocks.3.mlp.hook_in",), ("blocks.3.hook_mlp_out",)),
    CROSS: (tuple(f"blocks.{i}.hook_resid_post" for i in (5, 9, 12)),) * 2,
    CLT: MLP,
    f"{CLT}_affine": MLP,
}


def copy(name: str, to: Path) -> Path:
    """One of the fixtures, with the folders above it."""
    shutil.copytree(TOP / name, to / TOP.name / name)
    return to / TOP.name / name


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def tensors_of(folder: Path, layer: int | None = None) -> dict[str, Tensor]:
    name = "params.safetensors" if layer is None else f"params_layer_{layer}.safetensors"
    tensors: dict[str, Tensor] = load_file(folder / name)
    return tensors


def rows(d: int) -> Tensor:
    return torch.randn(20, d, generator=torch.Generator().manual_seed(3)) * 2


# ---- where it belongs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ORIGINS))
@pytest.mark.parametrize("config", [True, False], ids=["config", "path"])
def test_origins(name: str, config: bool, tmp_path: Path) -> None:
    """From the config, and without it from the path, as SAELens has to take it for some."""
    folder = copy(name, tmp_path)
    if not config:
        (folder / "config.json").unlink(missing_ok=True)
    reading = read_dictionary(folder)
    origin = reading.dictionary.origin
    assert (origin.inputs, origin.outputs) == ORIGINS[name]
    assert origin.model_name == "google/gemma-3-270m"  # the hub's id has no -pt
    assert any("no config.json" in note for note in reading.notes) == (not config or name == AFFINE)


def test_a_point_and_a_path_that_say_nothing(tmp_path: Path) -> None:
    folder = copy(RESID, tmp_path)
    change(folder, hf_hook_point_in="model.vision.7", hf_hook_point_out="model.vision.7", model_name="gemma-v3-4b-it")
    reading = read_dictionary(folder)
    assert reading.dictionary.origin.inputs == ("unknown",)
    assert reading.dictionary.model_name == "google/gemma-3-4b-it"
    assert "give hook_name" in reading.notes[-1]
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain/config.json").unlink()
    made = load_dictionary(tmp_path / "plain", hook_name="blocks.1.hook_resid_post", model_name="tiny")
    assert (made.hook_name, made.model_name) == ("blocks.1.hook_resid_post", "tiny")
    assert load_dictionary(tmp_path / "plain/params.safetensors").model_name == "unknown"


@pytest.mark.parametrize("key", ["hf_hook_point_in", "hf_hook_point_out"])
@pytest.mark.parametrize("said", ["model.vision.7", None], ids=["unknown", "none"])
@pytest.mark.parametrize("name", [ACROSS, CLT])
def test_what_reads_one_point_and_writes_another_is_never_an_autoencoder(
    name: str, said: str | None, key: str, tmp_path: Path
) -> None:
    """Whichever of its points is not known, or not named at all."""
    folder = copy(name, tmp_path)
    change(folder, **{key: said})
    reading = read_dictionary(folder)
    origin = reading.dictionary.origin
    assert (set(origin.inputs), set(origin.outputs)) == ({"unknown"}, {"unknown output"})
    assert len(origin.inputs) == len(origin.outputs) == (L if name == CLT else 1)
    wanted = "set `.origin`" if name == CLT else "give hook_name and hook_name_out"
    assert reading.notes[-1] == f"where it belongs is not known: {wanted}"


def test_an_autoencoder_whose_output_is_another_point(tmp_path: Path) -> None:
    folder = copy(RESID, tmp_path)
    change(folder, hf_hook_point_out="model.vision.7")
    assert load_dictionary(folder).origin.inputs == ("unknown",)
    config = json.loads((folder / "config.json").read_text())
    del config["hf_hook_point_out"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_dictionary(folder).origin.outputs == ("blocks.3.hook_resid_post",)


def test_the_notes_ask_for_what_was_not_given(tmp_path: Path) -> None:
    folder = copy(ACROSS, tmp_path)
    change(folder, hf_hook_point_in="model.vision.7", model_name=3)
    shutil.copytree(folder, tmp_path / "plain")
    told = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out", "model_name": "tiny"}
    for n in range(len(told) + 1):
        reading = read_dictionary(tmp_path / "plain", hints=Hints(**dict(list(told.items())[:n])))  # type: ignore[arg-type]
        missing = " and ".join(list(told)[n:])
        notes = [note for note in reading.notes if "not known" in note]
        assert notes == ([f"where it belongs is not known: give {missing}"] if missing else [])
    assert (reading.dictionary.origin.inputs, reading.dictionary.origin.outputs) == ORIGINS[ACROSS]


# ---- several layers at once ---------------------------------------------------------------------------------------------------


def written_out(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, layers · F] and outputs [n, layers · d] of any multi-layer folder, a layer at a time."""
    files = [tensors_of(folder, layer) for layer in range(L)]
    points = x.view(len(x), L, D).unbind(1)
    codes, outs = [], [file["b_dec"].expand(len(x), D) for file in files]
    for source, (file, point) in enumerate(zip(files, points, strict=True)):
        pre = point @ file["w_enc"] + file["b_enc"]
        codes.append(torch.where(pre > file["threshold"], pre.relu(), 0))
        outs = [out + codes[-1] @ file["w_dec"][:, target] for target, out in enumerate(outs)]
        if "affine_skip_connection" in file:
            outs[source] = outs[source] + point @ file["affine_skip_connection"]
    return torch.cat(codes, 1), torch.cat(outs, 1)


@pytest.mark.parametrize("name", [CROSS, CLT, f"{CLT}_affine"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_several_layers(name: str, causal: bool, tmp_path: Path) -> None:
    """Compact where each layer writes only to itself and later ones; otherwise as one dictionary of all points."""
    folder = copy(name, tmp_path)
    if not causal:
        tensors = tensors_of(folder, 2)
        tensors["w_dec"][4, 0] = 1.5
        save_file(tensors, folder / "params_layer_2.safetensors")
    made, x = load_any_dictionary(folder), rows(L * D)
    codes, out = written_out(folder, x)
    torch.testing.assert_close(made.encode(x).to_dense(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(x), out, atol=1e-4, rtol=1e-5)
    assert isinstance(made, CrossLayerTranscoder if causal else Dictionary)
    assert (made.W_skip is not None) == name.endswith("affine")
    assert any("nearly all of it zeros" in note for note in read_dictionary(folder).notes) == (not causal)
    assert load_any_dictionary(folder / "params_layer_0.safetensors").fingerprint == made.fingerprint


@pytest.mark.parametrize("name", list(ORIGINS))
def test_what_was_read_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    made = load_any_dictionary(TOP / name)
    save_dictionary(made, tmp_path)
    again = load_any_dictionary(tmp_path)
    assert (again.fingerprint, again.origin) == (made.fingerprint, made.origin)
    assert read_dictionary(tmp_path).format == ("saelens" if "layer_3" in name else "microtome")


# ---- by name ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inside", "model"),
    [
        ("gemma-scope-2-270m-pt-res/layer_3_width_16k_l0_small", RESID, "google/gemma-3-270m"),
        (
            "gemma-scope-2-4b-it-res-all/layer_3_width_16k_l0_small",
            RESID.replace("post", "post_all"),
            "google/gemma-3-4b-it",
        ),
        ("gemma-scope-2-12b-pt-transcoders/transcoder/layer_3_width_16k_l0_small", ACROSS, "google/gemma-3-12b-pt"),
        ("gemma-scope-2-12b-pt-transcoders/layer_3_width_16k_l0_small", ACROSS, "google/gemma-3-12b-pt"),
        (f"gemma-scope-2-1b-pt/{CROSS}", CROSS, "google/gemma-3-1b-pt"),
        (f"gemma-scope-2-270m-it/{CLT}", CLT, "google/gemma-3-270m-it"),
    ],
)
def test_releases(name: str, inside: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens's names, and each repository as a whole; from a cache as the hub's client lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    release = find_release(name)
    assert release is not None
    top = tmp_path / f"models--{release.repo.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs/main").write_text("0" * 40)
    shutil.copytree(TOP / inside.replace("post_all", "post"), top / "snapshots" / ("0" * 40) / inside)
    reading = read_dictionary(name)
    assert (reading.format, reading.dictionary.model_name) == ("gemma_scope_2", model)
    assert reading.dictionary.origin.inputs == ORIGINS[inside.replace("post_all", "post")][0]


def test_a_release_without_an_id() -> None:
    with pytest.raises(ArtifactError, match="for example gemma-scope-2-1b-pt-res/layer_13_width_16k_l0_big"):
        load_dictionary("gemma-scope-2-1b-pt-res")
    assert find_release("gemma-scope-2-1b-pt-attention/layer_3") is None


# ---- bad files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (RESID, {"architecture": "topk"}, "architecture 'topk', type 'sae'"),
        (RESID, {"type": "lorsa"}, "type 'lorsa'"),
        (RESID, {"width": 32}, "16 latents. Expected: width 32"),
        (RESID, {"type": "clt"}, "params.safetensors of the type 'clt'"),
        (CLT, {"type": "sae"}, "params_layer_2.safetensors of the type 'sae'"),
        (ACROSS, {"affine_connection": True}, "no tensor affine_skip_connection. Expected: affine_connection True"),
        (f"{CLT}_affine", {"affine_connection": False}, "a tensor affine_skip_connection"),
        (CLT, {"width": 16}, "48 latents. Expected: width 16"),
        (CROSS, {"hf_hook_point_in": "model.layers.{5,9}.output"}, "3 layers. Expected: 2 layers"),
    ],
)
def test_configs_that_do_not_fit(name: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = copy(name, tmp_path)
    if "hf_hook_point_in" in values:
        values = {**values, "hf_hook_point_out": values["hf_hook_point_in"]}
    change(folder, **values)
    with pytest.raises(ArtifactError, match=message):
        load_any_dictionary(folder)


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    folder = copy(CLT, tmp_path)
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        load_cross_layer_transcoder(folder)
    (folder / "params_layer_2.safetensors").rename(folder / "params_layer_1.safetensors")
    change(folder, width=32)
    with pytest.raises(ArtifactError, match=r"w_dec \(16, 3, 8\). Expected: w_dec \(16, 2, 8\)"):
        load_cross_layer_transcoder(folder)
    save_file(tensors_of(TOP / RESID), folder / "params.safetensors")
    with pytest.raises(ArtifactError, match="does not fit its config.json. Got"):
        load_cross_layer_transcoder(folder)
    shutil.copytree(TOP / RESID, tmp_path / "clt/layer_3")
    (tmp_path / "clt/layer_3/config.json").unlink()
    with pytest.raises(ArtifactError, match="does not fit its path.*params.safetensors of the type 'clt'"):
        load_cross_layer_transcoder(tmp_path / "clt/layer_3")
