"""The fixtures of dictionary_learning, sparsify, circuit-tracer and llamascopium; `dictionary_fixtures.py` makes them all."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from scripts.fixture_tools import POINT, ROOT, D, F, K, N, expect, inputs, shake


def dictionary_learning() -> None:
    """Each class with its own state dict, and the config that its trainers write."""
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    made = {
        "AutoEncoder": d.AutoEncoder(D, F),
        "AutoEncoderNew": d.AutoEncoderNew(D, F),
        "GatedAutoEncoder": d.GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": d.JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": top_k.AutoEncoderTopK(D, F, K),
        "BatchTopKSAE": batch_top_k.BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, F, K, [4, F - 4]),
    }
    for name, ae in made.items():
        folder = ROOT / "dictionary_learning" / name
        folder.mkdir(parents=True)
        shake(ae)
        if "BatchTopK" in name:
            ae.threshold.fill_(0.8)
        torch.save({k: v.cpu() for k, v in ae.state_dict().items()}, folder / "ae.pt")
        trainer = {
            "dict_class": name,
            "activation_dim": D,
            "dict_size": F,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m-deduped",
        }
        trainer |= {"submodule_name": "resid_post_layer_3", **({"k": K} if "TopK" in name else {})}
        (folder / "config.json").write_text(
            json.dumps({"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}})
        )
        expect(folder, inputs(), ae.encode(inputs()), ae(inputs()))
    # What an interrupted run leaves: the state of training on x / norm_factor. The library's own scale_biases undoes it.
    ae, folder = made["BatchTopKSAE"], ROOT / "dictionary_learning" / "interrupted"
    folder.mkdir()
    state = {k: v.clone() for k, v in ae.state_dict().items()}
    config = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F, "k": K, "layer": 3, "lm_name": "tiny"}
    torch.save({"step": 7, "ae": state, "optimizer": {}, "config": config, "norm_factor": 2.5}, folder / "ae.pt")
    ae.scale_biases(2.5)
    expect(folder, inputs(), ae.encode(inputs()), ae(inputs()))
    dictionary_learning_trained()


@torch.enable_grad()
def dictionary_learning_trained() -> None:
    """What each trainer leaves after four steps, and one leaves on the way, with its own config; read back by their classes."""
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers import batch_top_k, gated_anneal, gdm, jumprelu, p_anneal, standard, top_k
    from dictionary_learning.trainers import matryoshka_batch_top_k as matryoshka

    common = {
        "steps": 4,
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "tiny",
        "device": "cpu",
        "lr": 0.05,
    }
    common |= {"submodule_name": "resid_post_layer_3", "warmup_steps": 0, "seed": 0}
    penalty = {"sparsity_warmup_steps": 0}
    kept = {"k": K, "threshold_start_step": 0}
    runs: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "Standard": (standard.StandardTrainer, d.AutoEncoder, penalty),
        "StandardApril": (standard.StandardTrainerAprilUpdate, d.AutoEncoder, penalty),
        "StandardAprilNew": (
            standard.StandardTrainerAprilUpdate,
            d.AutoEncoderNew,
            {**penalty, "dict_class": d.AutoEncoderNew},
        ),
        "PAnneal": (p_anneal.PAnnealTrainer, d.AutoEncoder, penalty),
        "GatedAnneal": (gated_anneal.GatedAnnealTrainer, d.GatedAutoEncoder, penalty),
        "Gated": (gdm.GatedSAETrainer, d.GatedAutoEncoder, penalty),
        "JumpRelu": (jumprelu.JumpReluTrainer, d.JumpReluAutoEncoder, penalty),
        "TopK": (top_k.TopKTrainer, top_k.AutoEncoderTopK, kept),
        "BatchTopK": (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE, kept),
        "Matryoshka": (
            matryoshka.MatryoshkaBatchTopKTrainer,
            matryoshka.MatryoshkaBatchTopKSAE,
            {**kept, "group_fractions": [0.25, 0.75]},
        ),
    }
    for name, (trainer, cls, more) in runs.items():
        known = trainer.__init__.__code__.co_varnames
        config = {key: value for key, value in common.items() if key in known}
        folder = ROOT / "dictionary_learning" / f"trained_{name}"
        # AutoEncoderNew has no scale_biases, which the norming of activations needs.
        _train_into(folder, {"trainer": trainer, **config, **more}, normed=cls is not d.AutoEncoderNew)
        if name != "BatchTopK":
            shutil.rmtree(folder / "checkpoints")
        with torch.no_grad():
            for file in folder.rglob("*.pt"):
                ae = cls.from_pretrained(str(file), **({"normalize_decoder": False} if cls is d.AutoEncoder else {}))
                expect(folder if file.name == "ae.pt" else file, inputs(), ae.encode(inputs()), ae(inputs()))


def _train_into(folder: Path, config: dict[str, Any], *, normed: bool) -> None:
    """Train four steps with dictionary_learning's own loop, and put what it leaves into the folder."""
    from dictionary_learning import training

    batches = [torch.randn(64, D, generator=torch.Generator().manual_seed(i)) * 2 for i in range(4)]
    with tempfile.TemporaryDirectory() as run:
        training.trainSAE(
            batches, [config], 4, save_dir=run, save_steps=[2], device="cpu", normalize_activations=normed
        )
        shutil.copytree(f"{run}/trainer_0", folder)


def sparsify() -> None:
    """Autoencoders, a GroupMax one, one of several seeds, and transcoders with and without skip paths."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    run = ROOT / "sparsify"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": "tiny", "ctx_len": 64, "dataset": "abc"}))
    for name, more in (
        ("layers.3", {}),
        ("layers.4", {"activation": "groupmax", "k": 4}),
        ("layers.5", {"num_latents": 12, "multi_topk": True, "normalize_decoder": False}),
        ("layers.6/seed1", {}),
        ("layers.3.mlp", {"transcode": True, "skip_connection": True}),
        ("layers.4.mlp", {"transcode": True}),
    ):
        coder = SparseCoder(D, SparseCoderConfig(**{"expansion_factor": 2, "k": K, **more}))
        shake(coder)
        coder.save_to_disk(run / name)
        found = coder.encode(inputs())
        codes = torch.zeros(N, coder.num_latents).scatter_(1, found.top_indices, found.top_acts)
        # With multi_topk its forward gives the reconstruction from 4 k latents, which is one of its losses.
        out = coder.decode(found.top_acts, found.top_indices) if coder.cfg.multi_topk else coder(inputs()).sae_out
        expect(run / name, inputs(), codes, out)


def circuit_tracer() -> None:
    """Cross-layer transcoders of three layers."""
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    for name in ("relu", "jump_relu"):
        clt = CrossLayerTranscoder(3, F, D, name, lazy_decoder=False, dtype=torch.float32, device=torch.device("cpu"))
        shake(clt)
        if name == "jump_relu":
            clt.activation_function.threshold.copy_(torch.rand_like(clt.activation_function.threshold))
        folder = ROOT / "clt" / name
        clt.to_safetensors(str(folder))
        said = 'model_name: "tiny"\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n'
        (folder / "config.yaml").write_text(said)
        x = inputs(3 * D)
        layers = x.view(N, 3, D).transpose(0, 1)
        codes = clt.encode(layers)
        out = clt.decode(codes)
        expect(folder, x, codes.transpose(0, 1).reshape(N, -1), out.transpose(0, 1).reshape(N, -1))


def circuit_tracer_layers() -> None:
    """Transcoders of two layers, one file each, with what the library makes of the files."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
        load_transcoder_set,
    )

    torch.manual_seed(3)
    cpu = torch.device("cpu")
    points = ("ln2.hook_normalized", "hook_mlp_out")
    for name, skip in (("relu", False), ("jump_relu_skip", True)):
        layers = {}
        for i in range(2):
            act: Any = JumpReLU(torch.zeros(F), 0.1) if skip else torch.nn.functional.relu
            layers[i] = SingleLayerTranscoder(D, F, act, i, skip_connection=skip, device=cpu, dtype=torch.float32)
            shake(layers[i])
            if skip:
                act.threshold.copy_(torch.rand(F))
        folder = ROOT / "circuit_tracer" / name
        TranscoderSet(layers, *points).to_safetensors(str(folder))
        said = f"model_name: tiny\nmodel_kind: transcoder_set\nfeature_input_hook: {points[0]}\n"
        (folder / "config.yaml").write_text(f"{said}feature_output_hook: {points[1]}\n")
        paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(2)}
        lazy = {"lazy_encoder": False, "lazy_decoder": False}
        read = load_transcoder_set(paths, "tiny", *points, device=cpu, dtype=torch.float32, **lazy)
        for i, path in paths.items():
            codes = read[i].encode(inputs())
            expect(Path(path), inputs(), codes, read[i].decode(codes, inputs()))


def llamascopium() -> None:
    """Autoencoders, transcoders, crosscoders and cross-layer transcoders, on activations as its trainer scales them."""
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    mlp = ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")
    points = [f"blocks.{i}.hook_resid_post" for i in range(3)]
    writes = [point.replace("resid_post", "mlp_out") for point in points]
    plain, scaled = {"norm_activation": "inference"}, {"norm_activation": "dataset-wise"}
    no_norm = {"sparsity_include_decoder_norm": False}
    saes: dict[str, tuple[str, str, dict[str, Any]]] = {
        "relu": (POINT, POINT, {"act_fn": "relu", **plain}),
        "relu_token_wise": (
            POINT,
            POINT,
            {"act_fn": "relu", "norm_activation": "token-wise", "use_decoder_bias": False},
        ),
        "jumprelu": (POINT, POINT, {"act_fn": "jumprelu", **scaled}),
        "jumprelu_plain": (POINT, POINT, {"act_fn": "jumprelu", **plain, **no_norm}),
        "topk": (POINT, POINT, {"act_fn": "topk", "top_k": K, **scaled}),
        "topk_plain": (POINT, POINT, {"act_fn": "topk", "top_k": K, **plain, **no_norm}),
        "transcoder": (*mlp, {"act_fn": "jumprelu", **scaled}),
    }
    for name, (reads, written, more) in saes.items():
        sae = SAEConfig(hook_point_in=reads, hook_point_out=written, d_model=D, expansion_factor=F / D, **more)
        keep_llamascopium(name, SparseAutoEncoder(sae))
    for act in ("relu", "jumprelu", "topk"):
        cross = CrosscoderConfig(hook_points=points, d_model=D, expansion_factor=F / D, act_fn=act, top_k=K, **scaled)
        keep_llamascopium(f"crosscoder_{act}", Crosscoder(cross))
    for name, more in (
        ("relu", {"act_fn": "relu", **plain}),
        ("jumprelu", {"act_fn": "jumprelu", **scaled}),
        ("topk", {"act_fn": "topk", "top_k": K, **scaled}),
        ("layertopk", {"act_fn": "layertopk", "top_k": 2 * K, **plain}),
    ):
        clt = CLTConfig(hook_points_in=points, hook_points_out=writes, d_model=D, expansion_factor=F / D, **more)
        keep_llamascopium(f"clt_{name}", CrossLayerTranscoder(clt))


def keep_llamascopium(name: str, model: Any) -> None:
    from llamascopium.backend.language_model import LanguageModelConfig

    folder: Path = ROOT / "llamascopium" / name
    folder.mkdir(parents=True)
    shake(model)
    reads, writes = model.cfg.hooks_in, model.cfg.hooks_out
    model.set_dataset_average_activation_norm({point: 1.5 + i for i, point in enumerate(dict.fromkeys(reads + writes))})
    model.save_pretrained(folder)
    model.cfg.save_hyperparameters(folder)
    LanguageModelConfig(model_name="tiny").save_lm_config(str(folder))
    x = inputs(len(reads) * D)
    batch = dict(zip(reads, x.split(D, 1), strict=True))
    scales = [model.compute_norm_factor(rows, hook_point=point) for point, rows in batch.items()]
    prepared, encoding, decoding = model.prepare_input(model.normalize_activations(batch))
    codes = model.encode(prepared, **encoding)
    kind = model.cfg.sae_type
    out = model.decode(codes, **decoding, **({"batch_first": True} if kind == "clt" else {})).reshape(N, -1)
    parts = zip(out.split(D, 1), writes, strict=True)
    out = torch.cat(
        [part / model.compute_norm_factor(batch.get(point, part), hook_point=point) for part, point in parts], 1
    )
    # Codes here are for activations as they are, in theirs for scaled ones; TopK's decoder norms are folded here.
    constant = kind != "clt" and model.cfg.norm_activation == "dataset-wise"
    units = torch.full(codes.shape[1:], float(torch.stack(scales).mean()) if constant else 1.0)
    if "topk" in model.cfg.act_fn and model.cfg.sparsity_include_decoder_norm:
        units = units / (model.decoder_norm_per_feature() if kind == "clt" else model.decoder_norm())
    if kind == "crosscoder" and model.cfg.act_fn == "relu":  # the same codes at each point
        assert torch.allclose(codes, codes[:, :1].expand_as(codes), atol=1e-5)
        codes, units = codes[:, 0], units[0]
    expect(folder, x, codes.reshape(N, -1), out, units.flatten())
