"""The fixtures of SAELens's temporal dictionaries; `dictionary_fixtures.py` makes them all.

They read sequences, so `library/name.expected.safetensors` has x [2, 6, d_in], codes [2, 6, d_sae] of what is new, and out
[2, 6, d_in].
"""

from typing import Any
from unittest import mock

import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import save_file
from scripts.fixture_tools import ROOT, D, F, K, expect, inputs, metadata, shake

SEQUENCES = 2
SMALL = {"n_heads": 2, "bottleneck_factor": 4}


def temporal() -> None:
    """Every option of the kind, saved by SAELens; and the layout of the release, read by SAELens."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

    torch.manual_seed(2)
    scalar = {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.3}
    kinds: dict[str, dict[str, Any]] = {
        "topk": {"kval_topk": K},
        "plain": {"kval_topk": K, "apply_b_dec_to_input": False},
        "relu": {"sae_diff_type": "relu", "tied_weights": False, "n_attn_layers": 2},
        "untied_plain": {"kval_topk": K, "tied_weights": False, "apply_b_dec_to_input": False},
        "scaled": {"kval_topk": K, "tied_weights": False, "n_attn_layers": 3, **scalar},
        "layer_norm": {"kval_topk": K, "normalize_activations": "layer_norm"},
        "constant_norm": {"kval_topk": K, "normalize_activations": "constant_norm_rescale"},
    }
    x = inputs().unflatten(0, (SEQUENCES, -1))
    for name, more in kinds.items():
        sae = TemporalSAE(TemporalSAEConfig(d_in=D, d_sae=F, metadata=metadata(), **SMALL, **more))
        shake(sae)
        folder = ROOT / "saelens_temporal" / name
        sae.save_model(folder)
        expect(folder, x, sae.encode(x), sae(x))
    folder = ROOT / "temporal" / "layer_3"
    folder.mkdir(parents=True)
    said = {
        "llm": {"dimin": D},
        "sae": {
            "exp_factor": F / D,
            "n_heads": 2,
            "n_attn_layers": 1,
            "bottleneck_factor": 4,
            "sae_diff_type": "topk",
            "kval_topk": K,
            "tied_weights": False,
            "scaling_factor": 0.25,
        },
        "data": {"dtype": "float32"},
    }
    (folder / "conf.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    source = TemporalSAE(TemporalSAEConfig(d_in=D, d_sae=F, kval_topk=K, tied_weights=False, **SMALL))
    shake(source)
    theirs = {"W_dec": "D", "W_enc": "E", "b_dec": "b"}
    save_file(
        {theirs.get(name, name): tensor.clone() for name, tensor in source.state_dict().items()},
        folder / "latest_ckpt.safetensors",
    )
    with mock.patch.object(loaders, "hf_hub_download", lambda filename, **_: str(ROOT / "temporal" / filename)):
        cfg, weights, _ = loaders.temporal_sae_huggingface_loader("temporal", "layer_3")
    sae = TemporalSAE(TemporalSAEConfig.from_dict(cfg))
    sae.load_state_dict(weights)
    expect(folder, x, sae.encode(x), sae(x))
