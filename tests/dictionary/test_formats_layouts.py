"""llamascopium's kinds against written-out formulas (`test_formats_reference.py` has them against its own code), and where the
formats say that a dictionary belongs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from microtome.common.errors import ArtifactError
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    load_cross_layer_transcoder,
    load_dictionary,
    save_dictionary,
)
from microtome.dictionary.formats import Hints, read_dictionary

D, F, K, H = 6, 10, 2, 3
FIXTURES = Path(__file__).parent / "fixtures"
POINTS = [f"blocks.{i}.hook_resid_post" for i in range(H)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def largest(pre: Tensor, k: int) -> Tensor:
    kept = pre.topk(k, -1).indices
    return torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept).relu())


# ---- llamascopium ---------------------------------------------------------------------------------------------------------


def llamascopium(folder: Path, kind: str, tensors: dict[str, Tensor], **config: object) -> Path:
    said = {"sae_type": kind, "d_model": D, "expansion_factor": F / D, "act_fn": "relu", "norm_activation": "inference"}
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def sae_tensors() -> dict[str, Tensor]:
    return {"W_E": randn(D, F), "b_E": randn(F), "W_D": randn(F, D), "b_D": randn(D)}


ACROSS = {"hook_point_in": "blocks.1.hook_resid_mid", "hook_point_out": "blocks.1.hook_mlp_out"}
SAME = {"hook_point_in": POINTS[1], "hook_point_out": POINTS[1]}
LOG = {"activation_function.log_jumprelu_threshold": randn(F, seed=9) * 0.2}


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("by_norm", [True, False], ids=["by-norm", "plain"])
def test_llamascopium_gates(act: str, by_norm: bool, tmp_path: Path) -> None:
    """f(pre · ‖W_D‖) / ‖W_D‖, without b_D at the input."""
    t = {**sae_tensors(), **(LOG if act == "jumprelu" else {})}
    config = {"act_fn": act, "top_k": K, "sparsity_include_decoder_norm": by_norm, **SAME}
    made, x = load_dictionary(llamascopium(tmp_path, "sae", t, **config)), randn(7, D)
    norms = t["W_D"].norm(dim=1) if by_norm else torch.ones(F)
    gated = (x @ t["W_E"] + t["b_E"]) * norms
    theta = LOG["activation_function.log_jumprelu_threshold"].exp()
    f = {"relu": gated.relu(), "jumprelu": gated * (gated > theta), "topk": largest(gated, K)}[act] / norms
    torch.testing.assert_close(made(x), f @ t["W_D"] + t["b_D"])
    ours = made.encode(x).to_dense()
    torch.testing.assert_close(ours, f * norms if act == "topk" else f)
    assert made.origin.inputs == (POINTS[1],)


def test_llamascopium_scales_a_transcoder_at_both_ends(tmp_path: Path) -> None:
    """Trained on √d/norm · x and √d/norm · y, each with its own mean norm."""
    norms = {f"dataset_average_activation_norm.{ACROSS['hook_point_in']}": torch.tensor(3.0)}
    norms |= {f"dataset_average_activation_norm.{ACROSS['hook_point_out']}": torch.tensor(0.7)}
    t = {**sae_tensors(), **LOG}
    config: dict[str, Any] = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", **ACROSS}
    made, x = load_dictionary(llamascopium(tmp_path, "sae", {**t, **norms}, **config)), randn(7, D)
    read, written = math.sqrt(D) / 3.0, math.sqrt(D) / 0.7
    pre, decoder = (x * read) @ t["W_E"] + t["b_E"], t["W_D"].norm(dim=1)
    f = pre * (pre * decoder > LOG["activation_function.log_jumprelu_threshold"].exp())
    torch.testing.assert_close(made(x), (f @ t["W_D"] + t["b_D"]) / written)
    assert made.is_transcoder
    with pytest.raises(ArtifactError, match="lacks the mean norm of blocks.1.hook_resid_mid"):
        load_dictionary(llamascopium(tmp_path, "sae", t, **config))


def test_llamascopium_token_wise(tmp_path: Path) -> None:
    t = sae_tensors()
    made, x = load_dictionary(llamascopium(tmp_path, "sae", t, norm_activation="token-wise", **SAME)), randn(7, D) * 4
    scale = math.sqrt(D) / x.norm(dim=1, keepdim=True)
    out = ((x * scale) @ t["W_E"] + t["b_E"]).relu() @ t["W_D"] + t["b_D"]
    torch.testing.assert_close(made(x), out / scale)


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
def test_llamascopium_crosscoder(act: str, tmp_path: Path) -> None:
    """Every point adds to one pre-activation; each has its own gate by its own decoder norm, and its own mean norm."""
    t = {"W_E": randn(H, D, F), "b_E": randn(H, F), "W_D": randn(H, F, D), "b_D": randn(H, D)}
    means = torch.tensor([1.0, 2.0, 5.0])
    norms = {f"dataset_average_activation_norm.{point}": mean for point, mean in zip(POINTS, means, strict=True)}
    config = {"act_fn": act, "norm_activation": "dataset-wise", "hook_points": POINTS, "top_k": K}
    folder = llamascopium(tmp_path, "crosscoder", {**t, **norms, **(LOG if act == "jumprelu" else {})}, **config)
    made, x = load_dictionary(folder), randn(7, H * D)
    scale = (math.sqrt(D) / means)[:, None]
    rows = x.view(7, H, D) * scale
    pre = torch.einsum("nhd,hdf->nf", rows, t["W_E"]) + t["b_E"].sum(0)
    gated = pre[:, None] * t["W_D"].norm(dim=2)
    theta = LOG["activation_function.log_jumprelu_threshold"].exp()
    f = {"relu": gated.relu(), "jumprelu": gated * (gated > theta), "topk": largest(gated, K)}[act] / t["W_D"].norm(
        dim=2
    )
    out = (torch.einsum("nhf,hfd->nhd", f, t["W_D"]) + t["b_D"]) / scale
    torch.testing.assert_close(made(x), out.flatten(1))
    assert made.d_sae == (F if act == "relu" else H * F)
    assert made.origin.inputs == made.origin.outputs == tuple(POINTS)


def clt_tensors() -> dict[str, Tensor]:
    tensors = {"W_E": randn(H, D, F), "b_E": randn(H, F)}
    for j in range(H):
        tensors |= {f"W_D.{j}": randn(j + 1, F, D), f"b_D.{j}": randn(D, seed=j)}
    return tensors


@pytest.mark.parametrize(
    ("act", "by_norm"), [("relu", True), ("jumprelu", True), ("topk", False), ("topk", True), ("layertopk", False)]
)
def test_llamascopium_cross_layer(act: str, by_norm: bool, tmp_path: Path) -> None:
    """W_D.j holds what layers 0 … j write to layer j."""
    t, log = clt_tensors(), randn(H, F, seed=3) * 0.2
    writes = [point.replace("resid_post", "mlp_out") for point in POINTS]
    config = {"act_fn": act, "top_k": K, "hook_points_in": POINTS, "hook_points_out": writes}
    more = {"activation_function.log_jumprelu_threshold": log} if act == "jumprelu" else {}
    folder = llamascopium(tmp_path, "clt", {**t, **more}, sparsity_include_decoder_norm=by_norm, **config)
    made, x = load_cross_layer_transcoder(folder), randn(7, H * D)
    pre = torch.einsum("nld,ldf->nlf", x.view(7, H, D), t["W_E"]) + t["b_E"]
    squares = [sum((t[f"W_D.{j}"][i] ** 2).sum(-1) for j in range(i, H)) for i in range(H)]
    norms = torch.stack([torch.as_tensor(square) for square in squares]).sqrt()
    gate = norms if by_norm else torch.ones_like(norms)
    f = {
        "relu": pre.relu(),
        "jumprelu": pre * (pre * norms > log.exp()),
        "topk": largest(pre * gate, K) / gate,
        "layertopk": largest(pre.flatten(1), K).view(7, H, F),
    }[act]
    out = [sum(f[:, i] @ t[f"W_D.{j}"][i] for i in range(j + 1)) + t[f"b_D.{j}"] for j in range(H)]
    folded = gate if act == "topk" else 1
    torch.testing.assert_close(made.encode(x).to_dense(), (f * folded).flatten(1))
    torch.testing.assert_close(made(x), torch.cat(out, 1))
    assert isinstance(made, CrossLayerTranscoder)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("lorsa", {}, "sae_type 'lorsa'"),
        ("sae", {"use_glu_encoder": True}, "use_glu_encoder"),
        ("sae", {"act_fn": "batchtopk"}, "depend on the batch"),
        ("sae", {"norm_activation": "batch-wise"}, "norm_activation 'batch-wise'"),
        ("sae", {"expansion_factor": 2}, "W_E of 10 latents on 6. Expected: 12 latents on 6"),
        ("sae", {"act_fn": "jumprelu"}, "log_jumprelu_threshold None"),
        ("sae", {"norm_activation": "token-wise", **ACROSS}, "several points"),
    ],
)
def test_llamascopium_kinds_that_cannot_be_read(
    kind: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(llamascopium(tmp_path, kind, sae_tensors(), **{**SAME, **config}))


def test_points_with_one_gate_share_their_latents(tmp_path: Path) -> None:
    """Decoder norms that are the same at every point open the same gates, so that a feature is one latent."""
    t = {"W_E": randn(H, D, F), "b_E": randn(H, F), "W_D": randn(1, F, D).repeat(H, 1, 1), "b_D": randn(H, D)}
    folder = llamascopium(tmp_path, "crosscoder", t, act_fn="topk", top_k=K, hook_points=POINTS)
    made = load_dictionary(folder)
    assert (made.d_sae, made.architecture, made.k) == (F, "topk", K)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning", "ignore:.*:FutureWarning")
def test_llamascopium_pickles_and_distributed_checkpoints(tmp_path: Path) -> None:
    """The command that the refusal gives makes a file that is read."""
    config = {"norm_activation": "dataset-wise", **SAME}
    tensors = {**sae_tensors(), f"dataset_average_activation_norm.{POINTS[1]}": torch.tensor(2.5)}
    made = load_dictionary(llamascopium(tmp_path, "sae", tensors, **config))
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "kept.safetensors")
    with pytest.raises(ArtifactError, match="has no weights. Got: none. Expected: sae_weights.safetensors or"):
        load_dictionary(tmp_path)
    save_checkpoint(tensors, checkpoint_id=tmp_path / "sae_weights.dcp", no_dist=True)
    with pytest.raises(ArtifactError, match="a distributed checkpoint, which is not read here.*pickle") as raised:
        load_dictionary(tmp_path)
    command = str(raised.value).partition("python -m ")[2].split()
    assert command[:2] == ["torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    dcp_to_torch_save(tmp_path / command[2], tmp_path / command[3].rstrip("."))
    assert load_dictionary(tmp_path).fingerprint == made.fingerprint
    torch.save({"sae": tensors, "version": "1"}, tmp_path / "sae_weights.pt")
    assert load_dictionary(tmp_path).fingerprint == made.fingerprint


def test_the_order_of_llamascopiums_weights_and_its_sizes(tmp_path: Path) -> None:
    """Pruned weights come before the final ones, and d_model · expansion_factor is cut to a whole number, as its own code does."""
    made = load_dictionary(llamascopium(tmp_path, "sae", sae_tensors(), expansion_factor=1.8, **SAME))  # 10.8
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "checkpoints/pruned.safetensors")
    save_file({**sae_tensors(), "b_D": torch.zeros(D)}, tmp_path / "checkpoints/final.safetensors")
    (tmp_path / "lm_config.json").write_text(json.dumps({"model_name": "pythia-70m", "prepend_bos": False}))
    again = load_dictionary(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert (made.model_name, again.model_name) == ("unknown", "EleutherAI/pythia-70m")
    assert not again.origin.prepend_bos


# ---- where a dictionary belongs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "reads", "writes"),
    [
        ("saelens/old", "tiny", "blocks.3.hook_resid_post", None),
        ("saelens/transcoder", "tiny", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"),
        ("dictionary_learning/AutoEncoder", "EleutherAI/pythia-70m-deduped", "blocks.3.hook_resid_post", None),
        ("dictionary_learning/interrupted", "tiny", "unknown", None),
        ("sparsify/layers.3", "tiny", "blocks.3.hook_resid_post", None),
        ("sparsify/layers.3.mlp", "tiny", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
        ("sparsify/layers.6/seed1", "tiny", "blocks.6.hook_resid_post", None),
        ("dictionary_learning/trained_PAnneal", "tiny", "blocks.3.hook_resid_post", None),
        ("dictionary_learning/trained_BatchTopK/checkpoints/ae_2.pt", "tiny", "blocks.3.hook_resid_post", None),
        ("llamascopium/transcoder", "tiny", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"),
        *(
            (f"gemma-scope-2b-pt-{name}/layer_3/width_16k/average_l0_5", "google/gemma-2-2b", *points)
            for name, points in (
                ("res", ("blocks.3.hook_resid_post", None)),
                ("transcoders", ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")),
            )
        ),
        ("llama_scope/Llama3_1-8B-Base-L3R-8x", "unknown", "blocks.3.hook_resid_post", None),
    ],
)
def test_origins(name: str, model: str, reads: str, writes: str | None) -> None:
    made = read_dictionary(FIXTURES / name).dictionary
    assert isinstance(made, Dictionary)
    assert (made.model_name, made.hook_name) == (model, reads)
    assert made.origin.outputs == (writes or reads,)
    assert made.is_transcoder == (writes is not None)


@pytest.mark.parametrize("model", ["google/gemma-2-2b", "allenai/OLMo-2-0425-1B", "tiny"])
def test_a_module_with_a_norm_behind_it(model: str) -> None:
    """sparsify writes a module's own output, which is not what such a block adds to the stream."""
    for name, is_part in (("layers.3.mlp", True), ("layers.3", False)):
        notes = read_dictionary(FIXTURES / "sparsify" / name, hints=Hints(model_name=model)).notes
        assert any("before the norm" in note for note in notes) == (is_part and model != "tiny")


def test_the_embedding_of_gemma_scope(tmp_path: Path) -> None:
    """√d goes from the activations into the weights."""
    source = FIXTURES / "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5"
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    (folder / "params.npz").write_bytes((source / "params.npz").read_bytes())
    made, plain, x = load_dictionary(folder), load_dictionary(source), randn(5, 8)
    torch.testing.assert_close(made.encode(x).to_dense(), plain.encode(x / 8**0.5).to_dense())
    torch.testing.assert_close(made.W_dec, plain.W_dec * 8**0.5)
    assert made.hook_name == "hook_embed"


def with_skip_paths(folder: Path, layers: int = 3) -> Path:
    """The fixture of circuit-tracer with skip paths beside the encoders, as its later versions save them."""
    shutil.copytree(FIXTURES / "clt/jump_relu", folder)
    for layer in range(layers):
        file = folder / f"W_enc_{layer}.safetensors"
        d = load_file(file)[f"b_dec_{layer}"].shape[0]
        save_file({**load_file(file), f"W_skip_{layer}": randn(d, d, seed=layer)}, file)
    return folder


def test_skip_paths_of_a_cross_layer_transcoder(tmp_path: Path) -> None:
    """circuit-tracer adds `inputs @ W_skip` to what the latents write."""
    made = load_cross_layer_transcoder(with_skip_paths(tmp_path / "clt"))
    plain = load_cross_layer_transcoder(FIXTURES / "clt/jump_relu")
    x, d = randn(5, made.d_in), made.d_model
    expected = [rows @ randn(d, d, seed=layer) for layer, rows in enumerate(x.split(d, 1))]
    torch.testing.assert_close(made(x) - plain(x), torch.cat(expected, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.encode(x).to_dense(), plain.encode(x).to_dense())
    (tmp_path / "own").mkdir()
    save_dictionary(made, tmp_path / "own")
    assert load_cross_layer_transcoder(tmp_path / "own").fingerprint == made.fingerprint
    assert read_dictionary(tmp_path / "clt").notes == read_dictionary(FIXTURES / "clt/jump_relu").notes
    with pytest.raises(ArtifactError, match=r"have skip paths and others have none. Got: 2 of 3 layers"):
        load_cross_layer_transcoder(with_skip_paths(tmp_path / "some", layers=2))


def test_the_points_of_a_cross_layer_transcoder() -> None:
    made = load_cross_layer_transcoder(FIXTURES / "clt/relu")
    assert made.origin.inputs == tuple(f"blocks.{i}.hook_resid_mid" for i in range(3))
    assert made.origin.outputs == tuple(f"blocks.{i}.hook_mlp_out" for i in range(3))
    assert made.model_name == "tiny"
