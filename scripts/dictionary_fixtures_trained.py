"""The fixtures of SAELens's whitened activations, of AbsTopK and of matching pursuit; `dictionary_fixtures.py` makes them all."""

from typing import Any

import torch
from scripts.fixture_tools import ROOT, D, F, K, expect, inputs, keep_saelens, metadata, shake


def whitened() -> None:
    """What training on whitened activations leaves, and what SAELens makes of it for use."""
    from sae_lens.saes import gated_sae, jumprelu_sae, sae, standard_sae, topk_sae
    from sae_lens.training.activation_scaler import ActivationScaler

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "standard": (standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig, {}),
        "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig, {"k": K}),
        "jumprelu": (jumprelu_sae.JumpReLUTrainingSAE, jumprelu_sae.JumpReLUTrainingSAEConfig, {}),
        "gated": (gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig, {"apply_b_dec_to_input": False}),
    }
    scaler = ActivationScaler()
    scaler.estimate_whitening(D, iter([inputs() * 2 + 1, inputs().flip(1)]), 2)
    for name, (cls, config, more) in kinds.items():
        folder, final = ROOT / "saelens_checkpoint" / f"whitened_{name}", ROOT / "saelens" / f"trained_whitened_{name}"
        training = cls(
            config(d_in=D, d_sae=F, normalize_activations="covariance_whitening", **more, metadata=metadata())
        )
        shake(training)
        training.save_model(folder)
        scaler.save(str(folder / "activation_scaler.json"))
        found = scaler.whitening
        assert found is not None
        training.fold_activation_whitening(found.mean, found.matrix, found.inverse_matrix)
        training.save_inference_model(final)
        used = sae.SAE.load_from_disk(final)
        for where in (folder, final):
            expect(where, inputs(), used.encode(inputs()), used(inputs()))


def signed_and_pursued() -> None:
    """AbsTopK and matching pursuit: for use, and what training leaves with what SAELens makes of it for use."""
    from sae_lens.saes import abstopk_sae, matching_pursuit_sae, sae
    from sae_lens.training.activation_scaler import ActivationScaler

    torch.manual_seed(1)
    absolute, pursuit = abstopk_sae, matching_pursuit_sae
    several = {"residual_threshold": 0.0, "max_iterations": 6, "stop_on_duplicate_support": False}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "abstopk": ("abstopk", {"k": K}),
        "abstopk_by_norm": ("abstopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "matching_pursuit": ("pursuit", {}),
        "matching_pursuit_threshold": ("pursuit", {"residual_threshold": 2.5, "stop_on_duplicate_support": False}),
        "matching_pursuit_again": ("pursuit", several),
        "matching_pursuit_plain": ("pursuit", {"apply_b_dec_to_input": False, "max_iterations": 3}),
        "matching_pursuit_layer_norm": ("pursuit", {"normalize_activations": "layer_norm", "residual_threshold": 0.9}),
    }
    for name, (kind, more) in kinds.items():
        cls, config = (
            (absolute.AbsTopKSAE, absolute.AbsTopKSAEConfig)
            if kind == "abstopk"
            else (pursuit.MatchingPursuitSAE, pursuit.MatchingPursuitSAEConfig)
        )
        keep_saelens(name, cls(config(d_in=D, d_sae=F, metadata=metadata(), **more)))
    trained: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "abstopk": (absolute.AbsTopKTrainingSAE, absolute.AbsTopKTrainingSAEConfig, {"k": K}),
        "matching_pursuit": (
            pursuit.MatchingPursuitTrainingSAE,
            pursuit.MatchingPursuitTrainingSAEConfig,
            {"residual_threshold": 0.8, "decoder_init_norm": 1.0},
        ),
    }
    for name, (cls, config, more) in trained.items():
        folder, final = ROOT / "saelens_checkpoint" / name, ROOT / "saelens" / f"trained_{name}"
        scaled = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
        training = cls(config(**scaled, **more, metadata=metadata()))
        shake(training)
        training.save_model(folder)
        ActivationScaler(0.6).save(str(folder / "activation_scaler.json"))
        training.fold_activation_norm_scaling_factor(0.6)
        training.save_inference_model(final)
        used = sae.SAE.load_from_disk(final)
        for where in (folder, final):
            expect(where, inputs(), used.encode(inputs()), used(inputs()))
