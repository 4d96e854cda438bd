"""What cannot be read is refused by name: damaged files, wrong shapes, code in pickles, kinds that are not known, doubt."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary import load_dictionary, save_dictionary
from microtome.dictionary.formats import FORMATS, read_dictionary

FIXTURES = Path(__file__).parent / "fixtures"


def copy(name: str, to: Path) -> Path:
    shutil.copytree(FIXTURES / name, to / Path(name).name)
    return to / Path(name).name


def change_cfg(folder: Path, name: str = "cfg.json", /, **values: object) -> None:
    cfg = json.loads((folder / name).read_text())
    kept = {key: value for key, value in {**cfg, **values}.items() if value != "gone"}
    (folder / name).write_text(json.dumps(kept))


def change_weights(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# ---- SAELens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("topk", {"architecture": "matching_pursuit"}, "a tensor W_enc, which another kind has"),
        ("matching_pursuit", {"architecture": "topk", "k": 3}, r"W_enc None. Expected: W_enc \(8, 16\)"),
        ("matching_pursuit", {"residual_threshold": "low"}, "residual_threshold 'low'. Expected: a number"),
        ("matching_pursuit", {"residual_threshold": float("nan")}, "residual_threshold nan. Expected: a number"),
        ("matching_pursuit", {"residual_threshold": 10**400}, "residual_threshold 1000.*Expected: a number"),
        ("matching_pursuit", {"max_iterations": 0}, "max_iterations 0. Expected: a positive integer"),
        ("matching_pursuit", {"stop_on_duplicate_support": "no"}, "stop_on_duplicate_support 'no'. Expected: true or"),
        ("matching_pursuit", {"normalize_activations": "covariance_whitening"}, "pursuit on whitened activations"),
        ("abstopk", {"k": 17}, "k 17, d_sae 16"),
        ("topk", {"architecture": "sparsemax"}, "architecture 'sparsemax'"),
        ("standard", {"architecture": "gated"}, r"r_mag None. Expected: r_mag \(16,\)"),
        ("jumprelu", {"architecture": "jumprelu_transcoder"}, "apply_b_dec_to_input True"),
        ("topk", {"k": 17}, "k 17, d_sae 16"),
        ("topk", {"k": "many"}, "k 'many'"),
        ("topk", {"k": 0}, "k 0"),
        ("topk", {"d_in": 9}, r"W_enc \(8, 16\). Expected: W_enc \(9, 16\)"),
        ("topk", {"d_sae": True}, "d_sae True"),
        ("topk", {"normalize_activations": "covariance_whitening"}, "activation_whitening.safetensors"),
        ("topk", {"normalize_activations": "batch_norm"}, "normalize_activations 'batch_norm'"),
        ("topk", {"reshape_activations": "hook_q"}, "hook_q"),
        ("topk", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input 'yes'"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, "norm_scaling_factor"),
        ("transcoder", {"normalize_activations": "layer_norm"}, "only an autoencoder of one point"),
        *[
            (
                "standard",
                {"metadata": {"sae_lens_version": "6.1.0", "hook_name": hook, "hook_head_index": head}},
                message,
            )
            for hook, head, message in (
                (
                    "blocks.3.hook_resid_pre",
                    3,
                    "head_index 3. Expected: null, because blocks.3.hook_resid_pre is no point",
                ),
                ("blocks.3.attn.hook_z", -1, "hook_head_index -1. Expected: the number of a head, or null"),
                ("blocks.3.attn.hook_z", True, "hook_head_index True"),
                (None, 3, "hook_head_index 3. Expected: null, because unknown is no point with heads"),
            )
        ],
    ],
)
def test_saelens_configs(name: str, values: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = copy(f"saelens/{name}", tmp_path)
    change_cfg(folder, "cfg.json", **values)
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_enc"), "b_enc None"),
        (lambda t: t.update(W_dec=t["W_dec"].T.contiguous()), r"W_dec \(8, 16\)"),
        (lambda t: t["W_enc"][3].fill_(torch.nan), "W_enc with 16 values that are NaN"),
        (lambda t: t["b_dec"].fill_(torch.inf), "b_dec with 8 values"),
        (lambda t: t.update(threshold=t["threshold"][:3].clone()), r"threshold \(3,\)"),
    ],
    ids=["missing", "transposed", "nan", "infinite", "short"],
)
def test_saelens_weights(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    folder = copy("saelens/jumprelu", tmp_path)
    change_weights(folder / "sae_weights.safetensors", change)
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(folder)


def test_a_scaling_factor_that_the_config_denies(tmp_path: Path) -> None:
    """SAELens refuses it too. With the config's word it multiplies the codes before they are decoded."""
    folder = copy("saelens/old", tmp_path)
    plain, factor = load_dictionary(folder), torch.linspace(0.5, 2, 16)
    change_weights(folder / "sae_weights.safetensors", lambda t: t.update(scaling_factor=factor))
    with pytest.raises(ArtifactError, match="scaling_factor that is not one"):
        load_dictionary(folder)
    change_cfg(folder, finetuning_scaling_factor=True)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    wanted = (plain.encode(x).to_dense() * factor) @ plain.W_dec + plain.b_dec
    torch.testing.assert_close(load_dictionary(folder)(x), wanted)


def test_tensors_that_nobody_asked_for_are_named(tmp_path: Path) -> None:
    folder = copy("saelens/standard", tmp_path)
    change_weights(folder / "sae_weights.safetensors", lambda t: t.update(mystery=torch.ones(2)))
    assert read_dictionary(folder).notes == ("tensors that were not used: mystery",)


def test_a_checkpoint_of_whitened_activations(tmp_path: Path) -> None:
    folder = copy("saelens_checkpoint/standard", tmp_path)
    change_cfg(folder, "activation_scaler.json", has_whitening=True)
    with pytest.raises(ArtifactError, match="does not fit cfg.json. Got: has_whitening true"):
        load_dictionary(folder)
    folder = copy("saelens_checkpoint/whitened_standard", tmp_path)
    change_weights(folder / "activation_whitening.safetensors", lambda t: t.pop("mean"))
    with pytest.raises(ArtifactError, match="mean None"):
        load_dictionary(folder)


def test_a_scale_that_only_the_caller_knows(tmp_path: Path) -> None:
    """The same weights with the scale in the file and from the caller."""
    folder = copy("saelens_checkpoint/topk", tmp_path)
    known = load_dictionary(folder).fingerprint
    (folder / "activation_scaler.json").unlink()
    with pytest.raises(ArtifactError, match="scale is not in its files"):
        load_dictionary(folder)
    assert load_dictionary(folder, norm_scaling_factor=0.6).fingerprint == known


def test_rows_of_zeros_are_never_chosen_by_their_norm(tmp_path: Path) -> None:
    folder = copy("saelens/topk_by_norm", tmp_path)
    change_weights(folder / "sae_weights.safetensors", lambda t: (t["W_dec"][5].zero_(), t["b_enc"][5].fill_(100.0)))
    made = load_dictionary(folder)
    codes = made.encode(torch.randn(20, 8, generator=torch.Generator().manual_seed(0))).to_dense()
    assert codes[:, 5].max() == 0
    assert ((codes > 0).sum(1) == 3).float().mean() > 0.5


# ---- pickles and arrays ---------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that would make a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["ae.pt", "layer_8.pt"])
def test_code_in_a_pickle_does_not_run(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "dictionary", tmp_path / "mark"
    folder.mkdir()
    torch.save({"encoder.weight": torch.zeros(4, 2), "evil": Bomb(mark)}, folder / name)
    with pytest.raises(ArtifactError, match="could run code"):
        load_dictionary(folder)
    (folder / name).write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(ArtifactError, match="could run code|damaged"):
        load_dictionary(folder / name)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())  # it would have
    assert mark.exists()


def test_code_in_an_npz_does_not_run(tmp_path: Path) -> None:
    arrays = {"W_enc": np.array([Bomb(tmp_path / "mark")], dtype=object)}
    np.savez(tmp_path / "params.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="is refused"):
        load_dictionary(tmp_path)
    assert not (tmp_path / "mark").exists()


TRUNCATED = [
    ("saelens/topk", "sae_weights.safetensors"),
    ("saelens/topk", "cfg.json"),
    ("dictionary_learning/AutoEncoder", "ae.pt"),
    ("dictionary_learning/AutoEncoder", "config.json"),
    ("sparsify/layers.3", "sae.safetensors"),
    ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5", "params.npz"),
    ("llama_scope/Llama3_1-8B-Base-L3R-8x", "checkpoints/final.safetensors"),
    ("clt/relu", "W_dec_1.safetensors"),
]


@pytest.mark.parametrize(("name", "file"), TRUNCATED)
@pytest.mark.parametrize("left", [0, 0.5])
def test_files_that_were_cut_short(name: str, file: str, left: float, tmp_path: Path) -> None:
    folder = copy(name, tmp_path)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(ArtifactError, match="damaged|refused"):
        read_dictionary(folder)


# ---- the other formats ------------------------------------------------------------------------------------------------------


def test_a_batchtopk_without_a_threshold(tmp_path: Path) -> None:
    folder = copy("dictionary_learning/BatchTopKSAE", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(ArtifactError, match="no threshold yet. Got: threshold -1.*threshold_start_step"):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dict_class": "CrossCoder"}, "trainer.dict_class 'CrossCoder'.*AutoEncoder"),
        ({"dict_class": "GatedAutoEncoder"}, "r_mag None"),
        ({"dict_class": "AutoEncoder"}, "bias None"),
        ({"dict_size": 17}, "dict_size 16. Expected: dict_size 17"),
        ({"k": 5}, "k 3 in the weights. Expected: k 5"),
    ],
)
def test_dictionary_learning_configs(values: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = copy("dictionary_learning/AutoEncoderTopK", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trainer": {**config["trainer"], **values}}))
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(folder)


def test_the_config_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """A config.json in the folder above is a run's only where the weights are in its `checkpoints`."""
    folder = copy("dictionary_learning/AutoEncoderTopK", tmp_path)
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ArtifactError, match="AutoEncoderTopK/config.json does not name a class"):
        load_dictionary(folder)
    folder.rename(tmp_path / "checkpoints")
    assert load_dictionary(tmp_path / "checkpoints").k == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "batchtopk"}, "activation 'batchtopk'"),
        ({"signed": True}, "signed codes"),
        ({"k": None}, "k None"),
        ({"k": 100}, "k 100, d_sae 16"),
        ({"expansion_factor": 0}, "expansion_factor 0"),
        ({"activation": "groupmax"}, "16 latents in 3 groups"),
        ({"skip_connection": True}, "W_skip None"),
    ],
)
def test_sparsify_configs(values: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = copy("sparsify/layers.3", tmp_path)
    change_cfg(folder, "cfg.json", **values)
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(folder)


def test_layers_that_do_not_fit_each_other(tmp_path: Path) -> None:
    folder = copy("clt/jump_relu", tmp_path)
    change_weights(folder / "W_enc_1.safetensors", lambda t: t.pop("threshold_1"))
    with pytest.raises(ArtifactError, match="2 of 3 layers"):
        read_dictionary(folder)
    (folder / "W_dec_2.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        read_dictionary(folder)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": 2}, "another format version. Got: 2. Expected: 1"),
        ({"activations": [{"name": "softmax"}]}, "softmax"),
        ({"activations": [{"name": "groupmax", "k": 7}]}, "16 latents in 7 groups"),
        ({"activations": []}, "is damaged"),
        ({"origin": {"model_name": "tiny"}}, "inputs"),
        ({"skip": True}, "W_skip None"),
        ({"skip": "gone"}, "is damaged. Got: skip None. Expected: true or false"),
        ({"center": "gone"}, "is damaged. Got: center None. Expected: true or false"),
    ],
)
def test_microtomes_own_configs(facts: dict[str, object], message: str, tmp_path: Path) -> None:
    save_dictionary(read_dictionary(FIXTURES / "sparsify/layers.4").dictionary, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    kept = {key: value for key, value in {**cfg["microtome"], **facts}.items() if value != "gone"}
    change_cfg(tmp_path, microtome=kept)
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(tmp_path)


def test_an_older_cross_layer_transcoder_says_nothing_of_a_skip_path(tmp_path: Path) -> None:
    made = read_dictionary(FIXTURES / "llamascopium/clt_topk").dictionary
    save_dictionary(made, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    change_cfg(tmp_path, microtome={key: value for key, value in cfg["microtome"].items() if key != "skip"})
    assert read_dictionary(tmp_path).dictionary.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "a positive norm for in and for out"),
        ({"dataset_average_activation_norm": "gone"}, "a positive norm"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold None"),
        ({"jump_relu_threshold": True}, "jump_relu_threshold True"),
        ({"act_fn": "topk", "top_k": True}, "top_k True. Expected: .*a positive integer top_k"),
        ({"dataset_average_activation_norm": {"in": True, "out": 1}}, "a positive norm"),
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"d_sae": 32768}, "32768 latents of size 8"),
    ],
)
def test_llama_scope_configs(values: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = copy("llama_scope/Llama3_1-8B-Base-L3R-8x", tmp_path)
    change_cfg(folder, "hyperparams.json", **values)
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(folder)


def test_gemma_scope_without_a_threshold(tmp_path: Path) -> None:
    with np.load(FIXTURES / "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5/params.npz") as arrays:
        kept = {f"w{name[1:]}" if name.startswith("W") else name: arrays[name] for name in arrays.files}
    np.savez(tmp_path / "params.npz", **kept)
    assert load_dictionary(tmp_path).architecture == "jumprelu"  # also with w_enc and w_dec in small letters
    kept.pop("threshold")
    np.savez(tmp_path / "params.npz", **kept)
    with pytest.raises(ArtifactError, match="threshold None"):
        load_dictionary(tmp_path)


# ---- which format -----------------------------------------------------------------------------------------------------------


def test_nothing_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ArtifactError, match="a folder with model.bin") as raised:
        load_dictionary(tmp_path)
    assert all(f"({name})" in str(raised.value) for name in FORMATS)
    with pytest.raises(ArtifactError, match="no such folder or file"):
        load_dictionary(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no such folder or file"):
        load_dictionary("no-such-release/layer_3")


def test_more_than_one_format(tmp_path: Path) -> None:
    folder = copy("saelens/topk", tmp_path)
    shutil.copytree(FIXTURES / "dictionary_learning/AutoEncoder", folder, dirs_exist_ok=True)
    with pytest.raises(ArtifactError, match="several formats.*saelens or dictionary_learning"):
        load_dictionary(folder)
    assert load_dictionary(folder, "saelens").k == 3
    assert load_dictionary(folder, "dictionary_learning").k is None
    with pytest.raises(ArtifactError, match="is not of the format sparsify"):
        load_dictionary(folder, "sparsify")
    with pytest.raises(ConfigError, match="Did you mean 'saelens'"):
        load_dictionary(folder, "saelense")


def test_a_weights_file_stands_for_its_folder() -> None:
    folder = FIXTURES / "dictionary_learning/AutoEncoder"
    assert load_dictionary(folder / "ae.pt").fingerprint == load_dictionary(folder).fingerprint
