"""What tests of training cross-layer transcoders share: sizes, and a config of every kind."""

from typing import Any

import torch

from microtome.dictionary import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
)
from microtome.dictionary.config import DictionaryConfig

L, N, D, F, K = 3, 40, 6, 16, 4
VARIANCE = torch.tensor([4.0, 6.0, 8.0])
CAP = 2.0
COMMON: dict[str, Any] = {"d_sae": F, "cross_layer": True, "aux_k": 3, "outlier_cap": CAP}
LAMBDA: dict[str, Any] = {"coefficient": 0.7, "coefficient_warmup": 0.0}
CONFIGS: dict[str, DictionaryConfig] = {
    "relu": ReLUConfig(**COMMON, **LAMBDA),
    "gated": GatedConfig(**COMMON, **LAMBDA),
    "jumprelu": JumpReLUConfig(**COMMON, **LAMBDA, bandwidth=0.8, start_threshold=0.5, sparsity="tanh"),
    "topk": TopKConfig(**COMMON, k=K),
    "batchtopk": BatchTopKConfig(**COMMON, k=K),
    "matryoshka": MatryoshkaConfig(**COMMON, k=K, prefixes=(0.25, 1.0)),
    "relu-unit": ReLUConfig(**COMMON, **LAMBDA, norms="unit"),
    "topk-unit": TopKConfig(**COMMON, k=K, norms="unit"),
    "topk-skip": TopKConfig(**COMMON, k=K, skip=True),
    "gated-skip": GatedConfig(**COMMON, **LAMBDA, skip=True),
}
