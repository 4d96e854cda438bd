"""Every format with every kind of bad input: each gives our error or a dictionary, never another exception and never a guess.

`test_formats_damage.py` asks what the errors say; here all tensors and all values of all configs are tried, one at a time.
"""

import copy
import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.dictionary.test_formats_openai import Autoencoder, topk
from torch import Tensor

from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary.formats import FORMATS, read_dictionary, save_dictionary

FIXTURES = Path(__file__).parent / "fixtures"
GEMMA_2 = "gemma-scope-2-270m-pt"
OURS = {  # written from these
    "microtome": "sparsify/layers.4",
    "microtome_layers": "llamascopium/clt_topk",
    "microtome_pursuit": "saelens/matching_pursuit",
}
# One or more of each format: a folder, a file with weights, and the tensors that may be missing or say nothing about the codes.
CASES: list[tuple[str, str, set[str]]] = [
    ("saelens/topk", "sae_weights.safetensors", set()),
    ("saelens/gated", "sae_weights.safetensors", set()),
    ("saelens/abstopk", "sae_weights.safetensors", set()),
    ("saelens_checkpoint/matching_pursuit", "sae_weights.safetensors", set()),
    ("microtome_pursuit", "sae_weights.safetensors", set()),
    ("saelens/jumprelu_skip_transcoder", "sae_weights.safetensors", set()),
    ("saelens_checkpoint/batchtopk", "sae_weights.safetensors", set()),
    ("saelens_checkpoint/whitened_gated", "activation_whitening.safetensors", set()),
    ("dictionary_learning/AutoEncoderTopK", "ae.pt", {"k", "threshold"}),
    ("dictionary_learning/trained_Matryoshka", "ae.pt", {"k", "group_sizes"}),
    ("dictionary_learning/GatedAutoEncoder", "ae.pt", set()),
    ("sparsify/layers.3.mlp", "sae.safetensors", set()),
    ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5", "params.npz", set()),
    (f"{GEMMA_2}/resid_post/layer_3_width_16k_l0_small", "params.safetensors", set()),
    (f"{GEMMA_2}/clt/width_16k_l0_small_affine", "params_layer_1.safetensors", set()),
    ("llamascopium/transcoder", "sae_weights.safetensors", set()),
    ("llamascopium/crosscoder_topk", "sae_weights.safetensors", set()),
    ("llamascopium/clt_jumprelu", "sae_weights.safetensors", set()),
    ("llama_scope/Llama3_1-8B-Base-L3R-8x", "checkpoints/final.safetensors", {"decoder.bias"}),
    ("clt/jump_relu", "W_enc_1.safetensors", set()),
    ("clt/relu", "W_dec_1.safetensors", set()),
    ("circuit_tracer", "layer_1.safetensors", {"activation_function.threshold", "W_skip"}),
    ("qwen_scope/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", "layer3.sae.pt", set()),
    ("microtome", "sae_weights.safetensors", set()),
    ("microtome_layers", "sae_weights.safetensors", set()),
    ("openai", "8.pt", {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}),
]
IDS = [f"{name}-{file}" for name, file, _ in CASES]


def folder_of(name: str, to: Path) -> Path:
    """A copy of one of the fixtures, in a folder of the same name."""
    folder = to / name
    if name == "circuit_tracer":  # one of its layers
        shutil.copytree(FIXTURES / "circuit_tracer/jump_relu_skip", folder)
        (folder / "layer_0.safetensors").unlink()
    elif name == "openai":
        Autoencoder(topk()).save(folder / "8.pt")
    elif name in OURS:
        folder.mkdir()
        made = read_dictionary(FIXTURES / OURS[name]).dictionary
        if name == "microtome_pursuit":
            made.get_parameter("b_enc").fill_(0.1)  # which SAELens's have not
        save_dictionary(made, folder)
    else:
        shutil.copytree(FIXTURES / name, folder)
    return folder


def stored(file: Path) -> dict[str, Any]:
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    values: dict[str, Any] = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    return values


def store(values: dict[str, Any], file: Path) -> None:
    if file.suffix == ".npz":
        plain: dict[str, Any] = {name: tensor.numpy() for name, tensor in values.items()}
        np.savez(file, **plain)
    elif file.suffix == ".pt":
        torch.save(values, file)
    else:
        save_file(values, file)


def outcome(path: Path) -> str:
    """What reading came to. Any other exception is the test's."""
    try:
        read_dictionary(path)
    except (ArtifactError, ConfigError):
        return "refused"
    return "read"


# ---- weights ------------------------------------------------------------------------------------------------------------------


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor[None].repeat(2)


def not_a_number(tensor: Tensor) -> Tensor:
    return tensor * torch.nan


@pytest.mark.parametrize(("name", "file", "free"), CASES, ids=IDS)
@pytest.mark.parametrize("damage", [not_a_number, longer, None], ids=["nan", "longer", "missing"])
def test_every_tensor(
    name: str, file: str, free: set[str], damage: Callable[[Tensor], Tensor] | None, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    whole = stored(folder / file)
    tensors = [key for key, value in whole.items() if isinstance(value, Tensor)]
    assert set(tensors) > free
    for key in tensors:
        if damage is not_a_number and not whole[key].is_floating_point():
            continue
        rest = {other: value for other, value in whole.items() if other != key}
        store(rest if damage is None else {**rest, key: damage(whole[key])}, folder / file)
        assert outcome(folder) == "refused" or key in free, f"{key} was not needed"


@pytest.mark.parametrize(("name", "file", "free"), CASES, ids=IDS)
def test_a_tensor_too_many_is_named(name: str, file: str, free: set[str], tmp_path: Path) -> None:
    del free
    folder = folder_of(name, tmp_path)
    store({**stored(folder / file), "mystery": torch.ones(2)}, folder / file)
    if "whitening" in file:
        assert outcome(folder) == "read"  # beside the weights
    else:
        assert "tensors that were not used: mystery" in read_dictionary(folder).notes


@pytest.mark.parametrize(("name", "file", "free"), CASES, ids=IDS)
@pytest.mark.parametrize("left", [7, 0.99])
def test_files_that_were_cut_short(name: str, file: str, free: set[str], left: float, tmp_path: Path) -> None:
    del free
    folder = folder_of(name, tmp_path)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(left if left > 1 else len(whole) * left)])
    assert outcome(folder) == "refused"


class Bomb:
    """A pickle that makes a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(("name", "file", "free"), CASES, ids=IDS)
def test_pickles_by_another_name(name: str, file: str, free: set[str], tmp_path: Path) -> None:
    """Bytes of a pickle, of a torch.save and of an object array in the place of the weights: refused, and no code runs."""
    del free
    folder, mark = folder_of(name, tmp_path), tmp_path / "mark"
    (folder / file).write_bytes(pickle.dumps({"W_enc": Bomb(mark)}, protocol=2))
    assert outcome(folder) == "refused"
    torch.save({"W_enc": Bomb(mark)}, folder / file)
    assert outcome(folder) == "refused"
    np.savez(tmp_path / "x.npz", W_enc=np.array([Bomb(mark)], dtype=object))
    shutil.copy(tmp_path / "x.npz", folder / file)
    assert outcome(folder) == "refused"
    torch.save([torch.ones(2)], folder / file)
    assert outcome(folder) == "refused"
    assert not mark.exists()


# ---- configs ------------------------------------------------------------------------------------------------------------------

CONFIGS = [
    ("saelens/topk", "cfg.json"),
    ("saelens/old_topk", "cfg.json"),
    ("saelens/abstopk", "cfg.json"),
    ("saelens_checkpoint/matching_pursuit", "cfg.json"),
    ("microtome_pursuit", "cfg.json"),
    ("saelens/jumprelu_skip_transcoder", "cfg.json"),
    ("saelens_checkpoint/standard", "cfg.json"),
    ("saelens_checkpoint/standard", "activation_scaler.json"),
    ("microtome", "cfg.json"),
    ("microtome_layers", "cfg.json"),
    ("dictionary_learning/trained_TopK", "config.json"),
    ("dictionary_learning/AutoEncoder", "config.json"),
    ("sparsify/layers.3.mlp", "cfg.json"),
    ("llamascopium/jumprelu", "config.json"),
    ("llamascopium/jumprelu", "lm_config.json"),
    ("llamascopium/crosscoder_topk", "config.json"),
    ("llamascopium/clt_topk", "config.json"),
    ("llama_scope/Llama3_1-8B-Base-L3R-8x", "hyperparams.json"),
    (f"{GEMMA_2}/transcoder/layer_3_width_16k_l0_small", "config.json"),
    (f"{GEMMA_2}/clt/width_16k_l0_small", "config.json"),
]
GONE = object()
VALUES: list[Any] = [GONE, None, "x", -1, 0, 3.5, True, 10**9, [], {}, ["x"], {"x": 1}]


def places(config: dict[str, Any], start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, also those of objects inside."""
    for key, value in config.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from places(value, (*start, key))


@pytest.mark.parametrize(("name", "file"), CONFIGS)
def test_every_value_of_a_config(name: str, file: str, tmp_path: Path) -> None:
    """Whatever a value is replaced by: our error, or a dictionary whose weights are those of the file."""
    folder = folder_of(name, tmp_path)
    whole = json.loads((folder / file).read_text())
    for place in places(whole):
        for value in VALUES:
            config = copy.deepcopy(whole)
            inside = config
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = value
            if value is GONE:
                del inside[place[-1]]
            (folder / file).write_text(json.dumps(config))
            try:
                outcome(folder)
            except Exception as error:
                raise AssertionError(f"{file}: {'.'.join(place)} = {value} gives {error!r}") from error
    for text in ("[]", "3", "{", "\xff"):
        (folder / file).write_bytes(text.encode("latin-1"))
        assert outcome(folder) == "refused"


@pytest.mark.parametrize(
    ("name", "file", "changes", "tensor"),
    [
        ("saelens/jumprelu", "cfg.json", {"architecture": "standard"}, "threshold"),
        ("saelens/jumprelu", "cfg.json", {"architecture": "topk", "k": 3}, "threshold"),
        ("saelens/skip_transcoder", "cfg.json", {"architecture": "transcoder"}, "W_skip"),
        ("saelens_checkpoint/batchtopk", "cfg.json", {"architecture": "topk", "k": 3}, "topk_threshold"),
        ("sparsify/layers.3.mlp", "cfg.json", {"skip_connection": False}, "W_skip"),
        ("llamascopium/jumprelu", "config.json", {"act_fn": "relu"}, "activation_function.log_jumprelu_threshold"),
        ("llamascopium/relu", "config.json", {"use_decoder_bias": False}, "b_D"),
        ("llamascopium/clt_relu", "config.json", {"use_decoder_bias": False}, "b_D.0"),
        ("microtome", "cfg.json", {"microtome": {"skip": False}}, "W_skip"),
    ],
)
def test_configs_that_say_another_kind(
    name: str, file: str, changes: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    """The weights have all that the other kind needs, and one tensor more."""
    folder = folder_of(name, tmp_path)
    if name == "microtome":
        (folder / file).unlink()
        save_dictionary(read_dictionary(FIXTURES / "llamascopium/crosscoder_jumprelu").dictionary, folder)
        tensors = stored(folder / "sae_weights.safetensors")
        store({**tensors, "W_skip": torch.ones(2)}, folder / "sae_weights.safetensors")
    config = json.loads((folder / file).read_text())
    inside = {key: {**config[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    (folder / file).write_text(json.dumps({**config, **inside}))
    with pytest.raises(ArtifactError, match=f"Got: a tensor {tensor}, which another kind has"):
        read_dictionary(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_factor", "much", "norm_factor 'much'. Expected: a positive number"),
        ("norm_factor", -2.0, "norm_factor -2.0"),
        ("config", ["x"], "trainer.dict_class None"),
        ("ae", ["x"], "trainer.dict_class None"),
    ],
)
def test_values_of_an_interrupted_run(key: str, value: object, message: str, tmp_path: Path) -> None:
    folder = folder_of("dictionary_learning/interrupted", tmp_path)
    store({**stored(folder / "ae.pt"), key: value}, folder / "ae.pt")
    with pytest.raises(ArtifactError, match=message):
        read_dictionary(folder)


def test_a_yaml_that_is_no_text(tmp_path: Path) -> None:
    folder = folder_of("clt/relu", tmp_path)
    (folder / "config.yaml").write_bytes(b"model_name: \xff\xfe")
    with pytest.raises(ArtifactError, match="config.yaml is damaged"):
        read_dictionary(folder)


# ---- two formats in one folder ------------------------------------------------------------------------------------------------

ONE_EACH = [
    "saelens/topk",
    "dictionary_learning/AutoEncoder",
    "sparsify/layers.3",
    "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5",
    f"{GEMMA_2}/resid_post/layer_3_width_16k_l0_small",
    "llamascopium/relu",
    "llama_scope/Llama3_1-8B-Base-L3R-8x",
    "clt/relu",
    "circuit_tracer",
    "qwen_scope/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3",
    "openai",
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(ONE_EACH, 2)))
def test_the_marks_of_two_formats(one: str, other: str, tmp_path: Path) -> None:
    """Files of two formats side by side, where one's do not overwrite the other's."""
    folder = tmp_path / "both"
    for name in (one, other):
        shutil.copytree(folder_of(name, tmp_path), folder, dirs_exist_ok=True)
    found = [name for name, each in FORMATS.items() if each.detect(folder)]
    if "openai" in (one, other) and len(found) == 1:
        assert any(folder.glob("*.json"))  # whose .pt has no config: with one, the folder is the other's
        return
    assert len(found) > 1
    with pytest.raises(ArtifactError, match="could be of several formats"):
        read_dictionary(folder)
