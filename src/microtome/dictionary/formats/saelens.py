"""SAELens: `cfg.json` and `sae_weights.safetensors`. Version 6, what came before, and the checkpoints of its training.

What SAELens does around the encoder is folded into the weights, in its own order: the scale of the activations
(`expected_average_only_in`), then the decoder norms where latents are chosen by them, then their whitening
(`covariance_whitening`). Read from SAELens 6.54.
"""

from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import AbsTopK, Activation, Gated, JumpReLU, ReLU, TopK
from microtome.dictionary.dictionary import Dictionary, InputNorm
from microtome.dictionary.formats.hooks import on_the_stream
from microtome.dictionary.formats.own import KEY, WEIGHTS
from microtome.dictionary.formats.reading import (
    Format,
    Hints,
    Reading,
    Weights,
    build,
    fold_centering,
    fold_selection_norms,
    fold_whitening,
    leftover,
)
from microtome.dictionary.formats.saelens_cfg import ACTIVATIONS, CFG, SCALAR, Pursuit, SaeLensCfg, parse_cfg
from microtome.dictionary.formats.temporal import TemporalCfg, build_temporal, notes_of
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.pursuit import MatchingPursuit

SPARSITY, SCALER, WHITENING = "sparsity.safetensors", "activation_scaler.json", "activation_whitening.safetensors"
NAME = "saelens"
# Tensors of some kinds alone, so that one which was not asked for belongs to another kind.
_OF_SOME = ("threshold", "log_threshold", "topk_threshold", "r_mag", "b_mag", "b_gate", "W_skip", "attn_layers")


def detect(folder: Path) -> bool:
    """Both files of the format, and no word that only Microtome reads it."""
    return (folder / CFG).is_file() and (folder / WEIGHTS).is_file() and KEY not in read_json(folder / CFG)


def read(folder: Path, hints: Hints) -> Reading:
    """A dictionary that SAELens saved."""
    cfg = parse_cfg(folder, read_json(folder / CFG))
    file = TensorFile(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), CFG)
    notes: list[str] = ["the layout from before version 6"] if cfg.legacy else []
    if cfg.pursuit:
        return _read_pursuit(folder, cfg, cfg.pursuit, hints, file, notes)
    if cfg.temporal:
        return _read_temporal(folder, cfg, cfg.temporal, hints, file, notes)
    W_enc = file.take("W_enc", cfg.d_in, cfg.d_sae)
    W_dec = file.take("W_dec", cfg.d_sae, cfg.d_out)
    b_dec = file.take("b_dec", cfg.d_out)
    skip = file.take("W_skip", cfg.d_out, cfg.d_in) if "skip" in cfg.architecture else None
    W_dec = _finetuning(folder, cfg, file, W_dec, notes)
    scale = _scale(folder, cfg, hints, notes)
    activation, b_enc = _activation(cfg, file, W_dec, scale)
    file.refuse(*_OF_SOME)
    made = build(
        folder,
        hints.applied(cfg.origin),
        activation,
        Weights(
            W_enc=W_enc * scale,
            W_dec=W_dec / scale,
            b_enc=b_enc,
            b_dec=b_dec / scale,
            W_skip=None if skip is None else skip.T,
        ),
        center=cfg.center,
        input_norm=_norm(cfg),
    )
    if cfg.rescale:
        fold_selection_norms(made)
        notes.append("latents are chosen by pre · ‖W_dec‖: the decoder norms were folded, each row has norm one")
    if cfg.normalize == "covariance_whitening":
        _whitening(made, folder, cfg.d_in, notes)
    _centering(made, cfg, hints, notes)
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(
    name=NAME,
    looks=f"{CFG} and {WEIGHTS}",
    detect=detect,
    read=read,
)


def log_sparsity(folder: str | Path) -> Tensor | None:
    """log10(how often each latent fired + 1e-10), [d_sae], as SAELens keeps it beside its dictionaries; None where it is
    not."""
    file = Path(folder) / SPARSITY
    if not file.is_file():
        return None
    tensors = read_safetensors(file)
    if "sparsity" not in tensors:
        raise ArtifactError(f"{file} is damaged", got=", ".join(tensors) or "no tensors", expected="sparsity")
    return tensors["sparsity"].float()


def _read_pursuit(
    folder: Path, cfg: SaeLensCfg, pursuit: Pursuit, hints: Hints, file: TensorFile, notes: list[str]
) -> Reading:
    """A matching pursuit: W_dec is its encoder as well, and b_dec is in its output only where it is taken from its input."""
    if cfg.normalize == "covariance_whitening":
        raise ArtifactError(
            f"The dictionary at {folder} is a matching pursuit on whitened activations, which cannot be folded into one",
            got=cfg.normalize,
        )
    file.refuse("W_enc", "b_enc", "scaling_factor", "finetuning_scaling_factor", *_OF_SOME)
    W_dec, b_dec = file.take("W_dec", cfg.d_sae, cfg.d_in), file.take("b_dec", cfg.d_in)
    # On activations without the scale the same rows find the same latents, with codes in the activations' own units.
    scale = _scale(folder, cfg, hints, notes)
    made = build(
        folder,
        hints.applied(cfg.origin),
        MatchingPursuit(
            pursuit.max_iterations,
            pursuit.residual_threshold / scale,
            stop_on_duplicate_support=pursuit.stop_on_duplicate_support,
        ),
        Weights(W_enc=W_dec.T, W_dec=W_dec, b_dec=b_dec / scale if cfg.center else None),
        center=cfg.center,
        input_norm=_norm(cfg),
    )
    _centering(made, cfg, hints, notes)
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


def _read_temporal(
    folder: Path, cfg: SaeLensCfg, temporal: TemporalCfg, hints: Hints, file: TensorFile, notes: list[str]
) -> Reading:
    """A temporal dictionary. What is folded into the others changes what attention predicts, but for one scale."""
    centered = hints.centered or cfg.model_kwargs.get("center_writing_weights")
    if cfg.normalize == "covariance_whitening" or centered:
        raise ArtifactError(
            f"The dictionary at {folder} is a temporal one on whitened or centred activations, which cannot be folded into it",
            got="center_writing_weights" if centered else cfg.normalize,
        )
    file.refuse("b_enc", "scaling_factor", "finetuning_scaling_factor", *(set(_OF_SOME) - {"attn_layers"}))
    scale = temporal.factor if cfg.normalize == SCALAR else _scale(folder, cfg, hints, [])
    made = build_temporal(
        folder,
        hints.applied(cfg.origin),
        file,
        temporal,
        d_in=cfg.d_in,
        d_sae=cfg.d_sae,
        center=cfg.center,
        scale=scale,
        input_norm=_norm(cfg),
    )
    return Reading(dictionary=made, format=NAME, notes=(*notes, *notes_of(made), *leftover(file.left)))


def _norm(cfg: SaeLensCfg) -> InputNorm:
    return cast(InputNorm, cfg.normalize) if cfg.normalize in get_args(InputNorm) else "none"


def _activation(cfg: SaeLensCfg, file: TensorFile, W_dec: Tensor, scale: float) -> tuple[Activation, Tensor]:
    """The activation, and the encoder's bias. Biases and thresholds are of the scaled activations and stay."""
    kind = ACTIVATIONS[cfg.architecture]
    if kind == "gated":
        activation: Activation = Gated(file.take("r_mag", cfg.d_sae), file.take("b_mag", cfg.d_sae))
        return activation, file.take("b_gate", cfg.d_sae)
    b_enc = file.take("b_enc", cfg.d_sae)
    if kind in ("topk", "abstopk"):
        assert cfg.k is not None
        return (TopK if kind == "topk" else AbsTopK)(cfg.k), b_enc
    if kind == "jumprelu":
        if "log_threshold" in file:  # of old checkpoints
            return JumpReLU(file.take("log_threshold", cfg.d_sae).exp()), b_enc
        return JumpReLU(file.take("threshold", cfg.d_sae)), b_enc
    if kind == "batchtopk":
        threshold = file.take("topk_threshold").expand(cfg.d_sae).clone()
        # It is compared with pre · ‖W_dec‖ where those choose: divided here, `fold_decoder_norms` multiplies it again.
        norms = W_dec.norm(dim=1)
        return JumpReLU(threshold / norms.where(norms > 0, 1.0) if cfg.rescale else threshold), b_enc
    return ReLU(), b_enc


def _scale(folder: Path, cfg: SaeLensCfg, hints: Hints, notes: list[str]) -> float:
    """What the activations were multiplied by in training and no longer are when the dictionary is used."""
    if cfg.normalize != "expected_average_only_in":
        return 1.0
    scaler = folder / SCALER
    factor = hints.norm_scaling_factor
    if factor is None and scaler.is_file():
        saved = read_json(scaler)
        if saved.get("has_whitening"):
            raise ArtifactError(f"{scaler} does not fit {CFG}", got="has_whitening true", expected=cfg.normalize)
        factor = saved.get("scaling_factor")
        notes.append("a checkpoint of training: its activation scale was folded into the weights")
    if not isinstance(factor, int | float) or factor <= 0:
        raise ArtifactError(
            f"The dictionary at {folder} was trained on scaled activations, and the scale is not in its files",
            got="normalize_activations 'expected_average_only_in'",
            expected=f"a positive scaling_factor in {SCALER}",
            fix="Give norm_scaling_factor (√d_in over the mean norm of the activations at its hook point)",
        )
    notes.append(f"trained on activations times {factor:.6g}, which was folded into the weights")
    return float(factor)


def _whitening(made: Dictionary, folder: Path, d_in: int, notes: list[str]) -> None:
    """Fold in the affine map before the encoder, which only checkpoints have beside them."""
    if not (folder / WHITENING).is_file():
        raise ArtifactError(
            f"The dictionary at {folder} was trained on whitened activations, and the whitening is not in its files",
            got="normalize_activations 'covariance_whitening'",
            expected=WHITENING,
            fix="Take the dictionary that SAELens wrote at the end of training, which has it in its weights",
        )
    file = TensorFile(folder / WHITENING, read_safetensors(folder / WHITENING), CFG)
    mean, matrix = file.take("mean", d_in), file.take("matrix", d_in, d_in)
    fold_whitening(made, mean, matrix, file.take("inverse_matrix", d_in, d_in))
    notes.append("a checkpoint of training: the whitening of its activations was folded into the weights")


def _finetuning(folder: Path, cfg: SaeLensCfg, file: TensorFile, W_dec: Tensor, notes: list[str]) -> Tensor:
    """W_dec with the old tensor `scaling_factor`, which multiplied the codes before decoding."""
    name = "finetuning_scaling_factor" if "finetuning_scaling_factor" in file else "scaling_factor"
    factor = file.take_if_there(name, cfg.d_sae)
    if factor is None or torch.equal(factor, torch.ones_like(factor)):
        return W_dec
    if not cfg.finetuned:
        raise ArtifactError(
            f"The dictionary at {folder} has a scaling_factor that is not one, and its {CFG} says that it has none",
            got="finetuning_scaling_factor false",
            expected="true",
        )
    notes.append("fine-tuned: the scaling_factor of its codes was folded into W_dec")
    return W_dec * factor[:, None]


def _centering(made: Dictionary, cfg: SaeLensCfg, hints: Hints, notes: list[str]) -> None:
    others = {key: value for key, value in cfg.model_kwargs.items() if key != "center_writing_weights"}
    if others:
        told = ", ".join(f"{key}={value}" for key, value in others.items())
        notes.append(f"trained on a model that was loaded in TransformerLens with {told}")
    asked = hints.centered or cfg.model_kwargs.get("center_writing_weights")
    if not asked or not on_the_stream(made.hook_name):
        return
    if made.input_norm == "constant_norm_rescale" or not made.activation.at_once:
        what = made.activation.name if made.input_norm == "none" else "normalize_activations 'constant_norm_rescale'"
        raise ArtifactError(
            f"The dictionary at {made.path} reads activations of mean zero in a way that cannot be folded into its weights",
            got=f"center_writing_weights with {what}",
        )
    fold_centering(made)
    notes.append(
        "trained on a model with centred writing weights: the mean over d_model is taken away inside the encoder, and the "
        "output has mean zero"
    )
