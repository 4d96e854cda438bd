"""Writes tests/dictionary/fixtures: small dictionaries made by other libraries' own code, with those libraries' own codes and
reconstructions of fixed inputs beside them, so that the tests need none of the libraries.

    pip install sae-lens dictionary-learning eai-sparsify circuit-tracer llamascopium
    python -m scripts.dictionary_fixtures

Each folder `library/name` has beside it `library/name.expected.safetensors` with x [12, d_in], codes [12, d_sae] (dense) and out
[12, d_out]. What no library writes (SAELens's layout from before version 6, the files of Gemma Scope and Gemma Scope 2, Llama
Scope's folder) is written here and read by SAELens, and Gemma Scope 2's cross-layer transcoders by circuit-tracer.
"""

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from scripts.dictionary_fixtures_others import (
    circuit_tracer,
    circuit_tracer_layers,
    dictionary_learning,
    llamascopium,
    sparsify,
)
from scripts.dictionary_fixtures_temporal import temporal
from scripts.dictionary_fixtures_trained import signed_and_pursued, whitened
from scripts.fixture_tools import POINT, ROOT, D, F, K, N, expect, inputs, keep_saelens, metadata, shake
from torch import Tensor

LIBRARIES = ("sae-lens", "dictionary-learning", "eai-sparsify", "circuit-tracer", "llamascopium", "torch")


def main() -> None:
    """Make everything anew."""
    shutil.rmtree(ROOT, ignore_errors=True)
    torch.manual_seed(0)
    with torch.no_grad():
        saelens()
        saelens_checkpoints()
        saelens_reads()
        dictionary_learning()
        sparsify()
        circuit_tracer()
        gemma_scope_2()
        whitened()
        llamascopium()
        signed_and_pursued()
        circuit_tracer_layers()
        qwen_scope()
        temporal()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    (ROOT / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


# ---- SAELens ----------------------------------------------------------------------------------------------------------------


def saelens() -> None:
    """Every architecture that SAELens saves for use, and what it does around the encoder."""
    from sae_lens.saes import gated_sae, jumprelu_sae, standard_sae, topk_sae, transcoder

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "standard": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig, {}),
        "standard_plain": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "layer_norm": (
            standard_sae.StandardSAE,
            standard_sae.StandardSAEConfig,
            {"normalize_activations": "layer_norm"},
        ),
        "constant_norm": (
            topk_sae.TopKSAE,
            topk_sae.TopKSAEConfig,
            {"k": K, "normalize_activations": "constant_norm_rescale"},
        ),
        "topk": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": K}),
        "topk_by_norm": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig, {}),
        "bfloat16": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig, {"dtype": "bfloat16"}),
        "gated": (gated_sae.GatedSAE, gated_sae.GatedSAEConfig, {}),
    }
    for name, (cls, config, more) in kinds.items():
        sae = cls(config(d_in=D, d_sae=F, metadata=metadata(), **more))
        keep_saelens(name, sae)
    hook_z = standard_sae.StandardSAE(
        standard_sae.StandardSAEConfig(
            d_in=D, d_sae=F, reshape_activations="hook_z", metadata=metadata("blocks.3.attn.hook_z")
        )
    )
    keep_saelens("hook_z", hook_z, heads=2)
    for name, cls, config in (
        ("transcoder", transcoder.Transcoder, transcoder.TranscoderConfig),
        ("skip_transcoder", transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig),
        ("jumprelu_transcoder", transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig),
        ("jumprelu_skip_transcoder", transcoder.JumpReLUSkipTranscoder, transcoder.JumpReLUSkipTranscoderConfig),
    ):
        meta = metadata("blocks.3.ln2.hook_normalized", hook_name_out="blocks.3.hook_mlp_out")
        keep_saelens(name, cls(config(d_in=D, d_out=6, d_sae=F, apply_b_dec_to_input=False, metadata=meta)))


def saelens_checkpoints() -> None:
    """What training leaves (unfolded, with its activation scale), and what SAELens itself makes of it for use."""
    from sae_lens.saes import (
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        sae,
        standard_sae,
        topk_sae,
    )
    from sae_lens.training.activation_scaler import ActivationScaler

    scaled = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
    batch, matryoshka = batchtopk_sae, matryoshka_batchtopk_sae
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "standard": (standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig, {}),
        "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig, {"k": K}),
        "gated": (gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig, {}),
        "jumprelu": (jumprelu_sae.JumpReLUTrainingSAE, jumprelu_sae.JumpReLUTrainingSAEConfig, {}),
        "batchtopk": (batch.BatchTopKTrainingSAE, batch.BatchTopKTrainingSAEConfig, {"k": K}),
        "matryoshka": (
            matryoshka.MatryoshkaBatchTopKTrainingSAE,
            matryoshka.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [4, F]},
        ),
    }
    for name, (cls, config, more) in kinds.items():
        folder, final = ROOT / "saelens_checkpoint" / name, ROOT / "saelens" / f"trained_{name}"
        training = cls(config(**scaled, **more, metadata=metadata()))
        shake(training)
        if "topk_threshold" in dict(training.named_buffers()):
            training.topk_threshold.fill_(0.7)
        training.save_model(folder)
        ActivationScaler(0.6).save(str(folder / "activation_scaler.json"))
        training.fold_activation_norm_scaling_factor(0.6)
        training.save_inference_model(final)
        used = sae.SAE.load_from_disk(final)
        for where in (folder, final):
            expect(where, inputs(), used.encode(inputs()), used(inputs()))


def saelens_reads() -> None:
    """Layouts that SAELens reads and no longer (or never) writes."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAE

    tensors = random_tensors()
    old = {
        "hook_point": POINT,
        "hook_point_layer": 3,
        "hook_point_head_index": None,
        "d_in": D,
        "d_sae": F,
        "model_name": "tiny",
    }
    for name, more, extra in (
        ("old", {}, {}),
        ("old_ones", {"activation_fn_str": "relu", "normalize_activations": None}, {"scaling_factor": torch.ones(F)}),
        (
            "old_topk",
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False},
            {},
        ),
    ):
        folder = ROOT / "saelens" / name
        folder.mkdir(parents=True)
        save_file({**tensors, **extra}, folder / "sae_weights.safetensors")
        save_file({"sparsity": torch.linspace(-6, -1, F)}, folder / "sparsity.safetensors")
        cfg = {**old, "dtype": "torch.float32", "device": "cpu", "context_size": 64, **more}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        if extra:  # version 6 takes the tensor away when it reads from the hub
            kept = ROOT / "old_ones"
            shutil.copytree(folder, kept)
            save_file(tensors, kept / "sae_weights.safetensors")
        sae = SAE.load_from_disk(kept if extra else folder)
        expect(folder, inputs(), sae.encode(inputs()), sae(inputs()))
        shutil.rmtree(ROOT / "old_ones", ignore_errors=True)
    for release, wide in (("res", False), ("transcoders", True)):
        folder = ROOT / f"gemma-scope-2b-pt-{release}" / "layer_3/width_16k/average_l0_5"
        folder.mkdir(parents=True)
        arrays = {**tensors, "threshold": torch.rand(F)}
        plain: dict[str, Any] = {k: v.numpy() for k, v in arrays.items()}
        np.savez(folder / "params.npz", **plain)
        loader = loaders.gemma_2_transcoder_huggingface_loader if wide else loaders.gemma_2_sae_huggingface_loader
        sizes = {"d_in": D, "d_sae": F, **({"d_out": D} if wide else {})}
        keep_read(folder, loader, f"google/gemma-scope-2b-pt-{release}", "layer_3/width_16k/average_l0_5", sizes)
    llama = ROOT / "llama_scope" / "Llama3_1-8B-Base-L3R-8x"
    (llama / "checkpoints").mkdir(parents=True)
    names = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"], "decoder.bias": tensors["b_dec"]}
    names["decoder.weight"] = tensors["W_dec"].T
    save_file({k: v.contiguous() for k, v in names.items()}, llama / "checkpoints/final.safetensors")
    norms = {"in": 4.5, "out": 4.5}
    hyper = {"d_model": D, "d_sae": F, "hook_point_in": POINT, "hook_point_out": POINT, "act_fn": "jumprelu"}
    hyper |= {"jump_relu_threshold": 0.4, "dataset_average_activation_norm": norms, "norm_activation": "dataset-wise"}
    (llama / "hyperparams.json").write_text(json.dumps(hyper))
    keep_read(
        llama, loaders.llama_scope_sae_huggingface_loader, "fnlp/x", llama.name, {"dtype": "float32"}, D**0.5 / 4.5
    )


def random_tensors() -> dict[str, Tensor]:
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}


def keep_read(folder: Path, loader: Any, repo: str, inside: str, sizes: dict[str, Any], scale: float = 1.0) -> None:
    """The outputs of SAELens on a layout of the hub that only it reads; `scale` is what its release table folds."""
    from sae_lens.saes.sae import SAE

    with local_hub(folder, inside):
        cfg, state, _ = loader(repo, inside, device="cpu", force_download=False, cfg_overrides=sizes)
    cfg = dict(cfg)
    cfg["normalize_activations"] = "none"
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    made = SAE.from_dict(handle_config_defaulting(cfg))
    made.load_state_dict(state)
    if scale != 1.0:
        made.fold_activation_norm_scaling_factor(scale)
    codes = made.encode(inputs())
    expect(folder, inputs(), codes, made(inputs()))


def qwen_scope() -> None:
    """One file for a layer, whose k is in the name of its repository."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    torch.manual_seed(2)
    name, file = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer3.sae.pt"
    folder = ROOT / "qwen_scope" / name
    folder.mkdir(parents=True)
    tensors = random_tensors()
    theirs = {**tensors, "W_enc": tensors["W_enc"].T.contiguous(), "W_dec": tensors["W_dec"].T.contiguous()}
    torch.save(theirs, folder / file)
    loader = loaders.qwen_scope_sae_huggingface_loader
    keep_read(folder, loader, f"Qwen/{name}", file, {"d_in": D, "d_sae": F})


def gemma_scope_2() -> None:
    """Single layers through SAELens's reader; several through circuit-tracer's, which knows only cross-layer transcoders."""
    top, said = ROOT / "gemma-scope-2-270m-pt", {"model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu"}
    mlp = {
        f"hf_hook_point_{way}": f"model.layers.{{}}.{norm}_feedforward_layernorm.output"
        for way, norm in (("in", "pre"), ("out", "post"))
    }
    points: dict[str, dict[str, str]] = {
        "resid_post": {"hf_hook_point_in": "model.layers.{}.output"},
        "mlp_out_all": {"hf_hook_point_in": mlp["hf_hook_point_out"]},
        "attn_out": {"hf_hook_point_in": "model.layers.{}.self_attn.o_proj.input"},
        "transcoder": mlp,
        "transcoder_all": mlp,  # without a config: SAELens looks at the path then
        "crosscoder": {"hf_hook_point_in": "model.layers.{}.output"},
        "clt": mlp,
    }
    for site, where in points.items():
        affine, several = site == "transcoder_all", site in ("crosscoder", "clt")
        for end in ("", "_affine") if site == "clt" else ("_affine" if affine else "",):
            layer = {"crosscoder": "{5,9,12}", "clt": "{all}"}.get(site, "3")
            start = "" if site == "clt" else f"layer_{layer.strip('{}').replace(',', '_')}_"
            folder = top / site / f"{start}width_16k_l0_small{end}"
            folder.mkdir(parents=True)
            config = {key: value.replace("{}", layer) for key, value in where.items()}
            config |= {"hf_hook_point_out": config.get("hf_hook_point_out", config["hf_hook_point_in"]), **said}
            more = {
                "width": F * 3 if several else F,
                "l0": 20,
                "affine_connection": bool(end),
                "type": site.removesuffix("_all"),
            }
            more["type"] = more["type"] if more["type"] in ("transcoder", "crosscoder", "clt") else "sae"
            if not affine:
                (folder / "config.json").write_text(json.dumps({**config, **more}))
            (keep_layers if several else keep_layer)(folder, site, bool(end))


def keep_layer(folder: Path, site: str, affine: bool) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    tensors = {name.lower(): tensor for name, tensor in random_tensors().items()} | {"threshold": torch.rand(F)}
    save_file(
        tensors | ({"affine_skip_connection": torch.randn(D, D)} if affine else {}), folder / "params.safetensors"
    )
    keep_read(
        folder, loaders.gemma_3_sae_huggingface_loader, "google/gemma-scope-2-270m-pt", f"{site}/{folder.name}", {}
    )


def keep_layers(folder: Path, site: str, affine: bool) -> None:
    from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt

    del site
    for layer in range(3):
        tensors = {"w_enc": torch.randn(D, F) * 0.5, "w_dec": torch.randn(F, 3, D) * 0.5, "threshold": torch.rand(F)}
        tensors["w_dec"][:, :layer] = 0
        tensors |= {"b_enc": torch.randn(F) * 0.5, "b_dec": torch.randn(D) * 0.5}
        save_file(
            tensors | ({"affine_skip_connection": torch.randn(D, D)} if affine else {}),
            folder / f"params_layer_{layer}.safetensors",
        )
    paths = {i: str(folder / f"params_layer_{i}.safetensors") for i in range(3)}
    paths[3] = ""  # its loader leaves out the layer of the highest number
    clt = load_gemma_scope_2_clt(paths, device=torch.device("cpu"), dtype=torch.float32)
    x = inputs(3 * D)
    layers = x.view(N, 3, D).transpose(0, 1)
    codes = clt.encode(layers)
    out = clt.decode(codes, layers) if affine else clt.decode(codes)
    expect(folder, x, codes.transpose(0, 1).reshape(N, -1), out.transpose(0, 1).reshape(N, -1))


@contextlib.contextmanager
def local_hub(folder: Path, inside: str) -> Iterator[None]:
    """SAELens's downloads, answered from a folder on this disk."""

    def here(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        del repo_id
        file = folder / f"{subfolder}/{filename}".removeprefix(f"{inside}/").removeprefix("/").removeprefix(
            f"{inside}/"
        )
        if not file.is_file():
            raise EntryNotFoundError(str(file))
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in load_file(here(repo_id, filename)).items()}

    loaders = "sae_lens.loading.pretrained_sae_loaders."
    with mock.patch(f"{loaders}hf_hub_download", here), mock.patch(f"{loaders}get_safetensors_tensor_shapes", shapes):
        yield


if __name__ == "__main__":
    main()
    print(f"{sum(file.stat().st_size for file in ROOT.rglob('*') if file.is_file()):,} bytes in {ROOT}")
