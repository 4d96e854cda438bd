"""What to train: one config for each architecture, all with the same common part.

| config              | architecture | source                                                                 |
|---------------------|--------------|------------------------------------------------------------------------|
| `ReLUConfig`        | standard     | Bricken et al. 2023; Anthropic's update of April 2024                    |
| `PAnnealConfig`     | p_anneal     | Karvonen et al. 2024, arXiv 2408.00113                                  |
| `GatedConfig`       | gated        | Rajamanoharan et al. 2024, arXiv 2404.16014                             |
| `JumpReLUConfig`    | jumprelu     | Rajamanoharan et al. 2024, arXiv 2407.14435; Anthropic, January 2025      |
| `TopKConfig`        | topk         | Gao et al. 2024, arXiv 2406.04093                                       |
| `BatchTopKConfig`   | batchtopk    | Bussmann et al. 2024, arXiv 2412.06410                                  |
| `MatryoshkaConfig`  | matryoshka   | Bussmann et al. 2025, arXiv 2503.17547                                  |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from microtome.common.config import check_choices, from_dict, require, to_dict
from microtome.common.errors import ConfigError, unknown_name

_DEAD_AFTER = 1_000_000


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """What all dictionaries have.

    Where: `inputs` are the hook points that are read (none: the source's), `outputs` those that are predicted (none:
    the inputs). Other outputs than inputs make a transcoder, `skip` gives it a linear path; several points make a
    crosscoder, or with `cross_layer` a cross-layer transcoder.

    Weights: `norms` "unit" keeps decoder rows at unit norm, "free" lets them be ("auto": free for transcoders, and for
    ReLU autoencoders, see `L1Config`; else unit). `center` subtracts b_dec from an autoencoder's input; b_dec begins at
    `b_dec_start`. `tied` uses the decoder's rows as the encoder's; else an autoencoder's encoder begins as their
    transpose, or with `encoder_start` "random" with directions of its own, as long (a transcoder's always does).
    `fine_tune` begins with the weights of a dictionary on disk.

    Dead latents, those silent for `dead_after` tokens (None: a tenth of the training's, at most a million): `revival`
    "aux" lets `aux_k` of them (None: half of d_out) model the error, with the weight `aux_coefficient` (Gao et al. 2024,
    A.2); "resample" gives them new weights every `resample_every` steps until the share `resample_until` of the run
    (Bricken et al. 2023, "Neuron resampling"); "ghost" lets all of them model the error with exponential activations
    (Jermyn and Templeton 2024).

    Rows whose distance to b_dec is more than `outlier_cap` times the usual count less, so that attention sinks do not
    lead (None: all count alike). `lr` None takes the training's. Gradients longer than `clip_norm` are shortened.
    """

    architecture: ClassVar[str]

    d_sae: int
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    cross_layer: bool = False
    skip: bool = False
    norms: Literal["auto", "unit", "free"] = "auto"
    center: bool = True
    tied: bool = False
    b_dec_start: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    encoder_start: Literal["transpose", "random"] = "transpose"
    fine_tune: str | None = None
    revival: Literal["aux", "resample", "ghost", "none"] = "aux"
    dead_after: int | None = None
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32
    resample_every: int = 1000
    resample_until: float = 0.6
    outlier_cap: float | None = 3.0
    lr: float | None = None
    betas: tuple[float, ...] = (0.9, 0.999)
    clip_norm: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.d_sae > 0, "d_sae must be positive", got=self.d_sae)
        require(self.aux_k is None or 0 < self.aux_k <= self.d_sae, "aux_k must be between 1 and d_sae", got=self.aux_k)
        require(self.aux_coefficient >= 0, "aux_coefficient must not be negative", got=self.aux_coefficient)
        require(self.dead_after is None or self.dead_after > 0, "dead_after must be positive", got=self.dead_after)
        require(self.resample_every > 0, "resample_every must be positive", got=self.resample_every)
        require(0 <= self.resample_until <= 1, "resample_until must be in [0, 1]", got=self.resample_until)
        require(self.outlier_cap is None or self.outlier_cap > 0, "outlier_cap must be positive", got=self.outlier_cap)
        require(self.lr is None or self.lr > 0, "lr must be positive", got=self.lr)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive", got=self.clip_norm)
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas are two in [0, 1)", got=self.betas)
        require(
            not self.tied or not self.is_transcoder,
            "Only an autoencoder can be tied",
            got="cross_layer=True" if self.cross_layer else self.outputs,
            fix="Leave out tied",
        )
        require(not self.skip or self.is_transcoder, "Only a transcoder can have a skip path", got=self.outputs)
        require(
            not (self.tied and self.fine_tune) or self.unit_norms,
            "A tied dictionary can be fine-tuned with unit norms only",
            got=f"norms {self.norms}",
        )
        require(
            self.encoder_start == "transpose" or not (self.tied or self.fine_tune),
            "A dictionary that is tied or fine-tuned has no encoder to begin otherwise",
            got=f"encoder_start {self.encoder_start!r}",
            fix="Leave out encoder_start",
        )

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts other points than it reads."""
        return self.cross_layer or bool(self.outputs and self.outputs != self.inputs)

    def dead_after_in(self, n_tokens: int) -> int:
        """The tokens without a firing after which a latent is dead, in a training of so many."""
        return max(1, min(_DEAD_AFTER, n_tokens // 10)) if self.dead_after is None else self.dead_after

    @property
    def unit_norms(self) -> bool:
        """Whether decoder rows are kept at unit norm."""
        return self._unit_by_itself if self.norms == "auto" else self.norms == "unit"

    @property
    def _unit_by_itself(self) -> bool:
        return not self.is_transcoder

    @property
    def centered(self) -> bool:
        """Whether b_dec is taken from the input."""
        return self.center and not self.is_transcoder


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig(DictionaryConfig):
    """Architectures whose sparsity comes from a penalty of weight `coefficient` (λ, for inputs of mean norm √d), which
    rises from zero over the share `coefficient_warmup` of the run. The penalty counts each latent with the norm of its
    decoder row."""

    coefficient: float
    coefficient_warmup: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.coefficient >= 0, "coefficient must not be negative", got=self.coefficient)
        require(0 <= self.coefficient_warmup <= 1, "coefficient_warmup must be in [0, 1]", got=self.coefficient_warmup)


class L1Config(PenaltyConfig):
    """ReLU with a penalty that grows with f. Its rows have free norms unless said otherwise (or tied): they begin short
    (0.1), so that Adam, whose steps have one length, turns them more quickly than rows of unit norm. With those the penalty
    silences nearly all latents before they have learnt anything: on the built-in model's activations (layer 15, λ 5, 200
    steps of 1,024, lr 2e-3) L0 is 4 and FVU 0.35 even with λ rising over half of the run, with free norms 36 and 0.18."""

    @property
    def _unit_by_itself(self) -> bool:
        return self.tied


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(L1Config):
    """f = ReLU(pre), L1 penalty: λ Σ f ‖W_dec,i‖. With unit norms this is Towards Monosemanticity's form (the part of
    the gradient along a row is taken out), with free norms that of April 2024."""

    architecture = "standard"
    coefficient: float = 5.0


@dataclass(frozen=True, kw_only=True)
class PAnnealConfig(L1Config):
    """ReLU with λ Σ f^p; p falls from 1 to `p_end` between the shares `p_start_at` and 1 of the run, in `p_steps` steps
    at which λ is set anew so that the penalty stays the same."""

    architecture = "p_anneal"
    coefficient: float = 5.0
    p_end: float = 0.2
    p_start_at: float = 0.3
    p_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.p_end <= 1, "p_end must be in (0, 1]", got=self.p_end)
        require(0 <= self.p_start_at < 1, "p_start_at must be in [0, 1)", got=self.p_start_at)
        require(self.p_steps > 0, "p_steps must be positive", got=self.p_steps)


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PenaltyConfig):
    """A gate decides which latents fire, a tied magnitude how strongly; the penalty and an auxiliary reconstruction
    (through a frozen decoder) train the gate.

    A gate opens at first where the encoder's product is above `start_threshold`, in units of the encoder rows' norms (for
    inputs of mean norm √d the product is about 1 in these). From 0, where half of the latents fire on each row, the
    penalty has to shrink the encoder's rows to close them, and little is learnt meanwhile."""

    architecture = "gated"
    coefficient: float = 5.0
    start_threshold: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start_threshold >= 0, "start_threshold must not be negative", got=self.start_threshold)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(PenaltyConfig):
    """f = z·1[z > θ] with one threshold for each latent, learnt through a straight-through estimator of width
    `bandwidth`.

    `sparsity`: "step" is λ Σ 1[z > θ] (2407.14435, eq. 8); "tanh" is λ Σ tanh(c f ‖W_dec,i‖) with c = `tanh_scale`,
    and λ_P Σ ReLU(θ − z) ‖W_dec,i‖ with λ_P = `revive_coefficient` against dead latents (Anthropic, January 2025);
    "quadratic" is λ (L0 / `target_l0` − 1)².

    Thresholds and `bandwidth` are in units of z, for inputs of mean norm √d; there z is about 1 before training. A latent
    that fires at z takes about z² from the squared error and costs λ, so thresholds end near √λ. They begin at
    `start_threshold`, or if it is None at 2 √λ (at least 2; for "quadratic" at 1) times the encoder row's norm, from where
    latents are few and learn apart. Adam moves a threshold by at most `threshold_rate` times the learning rate a step; at 1
    a short run leaves them, and so L0, where they began.

    The published c is 4, for codes that begin far below 1. Where f is above θ ≈ 1 it makes tanh flat, and what is left of
    its gradient, at codes just below θ, only raises thresholds; with 1 both sparsities need about the same λ.
    """

    architecture = "jumprelu"
    coefficient: float = 1.0
    sparsity: Literal["step", "tanh", "quadratic"] = "step"
    bandwidth: float = 1.0
    start_threshold: float | None = None
    threshold_rate: float = 10.0
    tanh_scale: float = 1.0
    revive_coefficient: float = 3e-6
    target_l0: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bandwidth > 0, "bandwidth must be positive", got=self.bandwidth)
        start = self.start_threshold
        require(start is None or start >= 0, "start_threshold must not be negative", got=start)
        require(self.threshold_rate > 0, "threshold_rate must be positive", got=self.threshold_rate)
        require(self.tanh_scale > 0, "tanh_scale must be positive", got=self.tanh_scale)
        require(self.revive_coefficient >= 0, "revive_coefficient must not be negative", got=self.revive_coefficient)
        if self.sparsity == "quadratic":
            require(
                self.target_l0 is not None and 0 < self.target_l0 <= self.d_sae,
                "sparsity 'quadratic' needs a target_l0 between 0 and d_sae",
                got=self.target_l0,
            )

    @property
    def first_threshold(self) -> float:
        """The threshold with which latents begin, for encoder rows of norm one."""
        if self.start_threshold is not None:
            return self.start_threshold
        return 1.0 if self.sparsity == "quadratic" else 2 * max(1.0, self.coefficient**0.5)


@dataclass(frozen=True, kw_only=True)
class TopKConfig(DictionaryConfig):
    """The k largest pre-activations of each row. With free norms they are compared as pre · ‖W_dec,i‖.

    k falls from `k_start` to `k` over the share `k_anneal` of the run.
    """

    architecture = "topk"
    k: int
    k_start: int | None = None
    k_anneal: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.k <= self.d_sae, "k must be between 1 and d_sae", got=f"k {self.k}, d_sae {self.d_sae}")
        require(
            self.k_start is None or self.k <= self.k_start <= self.d_sae,
            "k_start must be between k and d_sae",
            got=self.k_start,
        )
        require(0 <= self.k_anneal <= 1, "k_anneal must be in [0, 1]", got=self.k_anneal)

    def k_at(self, fraction: float) -> int:
        """k after this share of the run."""
        if self.k_start is None or fraction >= self.k_anneal:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * fraction / self.k_anneal)


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(TopKConfig):
    """The k · n largest pre-activations of a batch of n rows. In use a latent fires above a threshold: the mean over
    training, with decay `threshold_decay` (less in the first steps), of the smallest value kept."""

    architecture = "batchtopk"
    threshold_decay: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold_decay < 1, "threshold_decay must be in [0, 1)", got=self.threshold_decay)


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """BatchTopK whose first latents must do alone: the loss is the mean over nested prefixes of the dictionary, which
    hold the shares `prefixes` of the latents."""

    architecture = "matryoshka"
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip((0.0, *self.prefixes), self.prefixes, strict=False))
        require(rising and self.prefixes[-1:] == (1.0,), "prefixes must rise from above 0 to 1", got=self.prefixes)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where each prefix ends."""
        return tuple(max(1, round(share * self.d_sae)) for share in self.prefixes)


ARCHITECTURES: dict[str, type[DictionaryConfig]] = {
    config.architecture: config
    for config in (
        ReLUConfig,
        PAnnealConfig,
        GatedConfig,
        JumpReLUConfig,
        TopKConfig,
        BatchTopKConfig,
        MatryoshkaConfig,
    )
}


def parse_config(data: Mapping[str, Any]) -> DictionaryConfig:
    """The config that `data` describes, `{"architecture": "topk", "d_sae": …}`. Raises ConfigError for an unknown
    architecture or key."""
    settings = dict(data)
    name = settings.pop("architecture", None)
    if name is None:
        raise ConfigError("A dictionary's config names its architecture", expected=f"one of {', '.join(ARCHITECTURES)}")
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", str(name), ARCHITECTURES, ConfigError)
    return from_dict(ARCHITECTURES[name], settings)


def describe(config: DictionaryConfig) -> dict[str, Any]:
    """The inverse of `parse_config`."""
    return {"architecture": config.architecture, **to_dict(config)}
