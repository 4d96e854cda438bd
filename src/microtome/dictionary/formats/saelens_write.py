"""Writing: SAELens's version 6 for all that it can hold, Microtome's own cfg in the same two files for the rest."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from microtome.common.artifacts import atomic_file, write_json
from microtome.common.errors import ConfigError
from microtome.dictionary.activation import Gated, JumpReLU
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.formats.own import WEIGHTS, cfg_of, tensors_of
from microtome.dictionary.formats.reading import AnyDictionary
from microtome.dictionary.formats.saelens import SPARSITY
from microtome.dictionary.formats.saelens_cfg import ACTIVATIONS, CFG, split_head
from microtome.dictionary.formats.temporal import cfg_of_temporal, tensors_of_temporal
from microtome.dictionary.pursuit import MatchingPursuit
from microtome.dictionary.temporal import TemporalDictionary

_FORMAT_VERSION = "6.0.0"  # the oldest SAELens whose reader takes this layout


def save_dictionary(
    made: AnyDictionary,
    folder: Path | str,
    *,
    fold_decoder_norms: bool = False,
    log_sparsity: Tensor | None = None,
) -> None:
    """Write both files of the format into a folder, which is made where there is none. Weights are written in their own dtype.

    What SAELens has no name for (a crosscoder, a TopK transcoder, GroupMax …) is written in the same two files with an
    `architecture` that it refuses and a key `microtome`. With `fold_decoder_norms` the written decoder rows have norm
    one and the codes are larger by what they had; `log_sparsity` [d_sae] goes into `sparsity.safetensors`.

    Raises ConfigError for `fold_decoder_norms` where the folding would change which latents fire.
    """
    if fold_decoder_norms:
        made = _folded(made)
    if isinstance(made, TemporalDictionary):
        cfg, tensors = _common(made.novel) | cfg_of_temporal(made), tensors_of_temporal(made)
    elif isinstance(made, Dictionary) and saelens_holds(made):
        cfg, tensors = saelens_cfg(made), _tensors(made)
    else:
        cfg, tensors = cfg_of(made), tensors_of(made)
    plain, folder = _apart(tensors), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(plain, temporary)
    if log_sparsity is not None:
        with atomic_file(folder / SPARSITY) as temporary:
            save_file({"sparsity": log_sparsity.detach().cpu().float().contiguous()}, temporary)
    write_json(folder / CFG, cfg)


def saelens_holds(made: Dictionary) -> bool:
    """Whether SAELens has an architecture that means just this dictionary."""
    if len(made.origin.inputs) > 1 or len(made.origin.outputs) > 1 or made.architecture not in ACTIVATIONS:
        return False
    if isinstance(made.activation, MatchingPursuit) and not _tied(made):
        return False
    if made.is_transcoder:
        return not made.center and made.input_norm == "none"
    return made.W_skip is None and made.d_in == made.d_out


def _tied(made: Dictionary) -> bool:
    """Whether it has what SAELens's matching pursuit has: W_dec as its encoder, no b_enc, no b_dec in the output alone."""
    free = made.b_enc.any() or (made.b_dec.any() and not made.center)
    return torch.equal(made.encoder, made.W_dec) and not free


def saelens_cfg(made: Dictionary) -> dict[str, Any]:
    """The cfg.json of a dictionary that SAELens holds."""
    cfg = _common(made)
    if made.is_transcoder:
        hook, head = split_head(made.origin.outputs[0])
        cfg["d_out"] = made.d_out
        cfg["metadata"] |= {"hook_name_out": hook, "hook_head_index_out": head}
    if isinstance(made.activation, MatchingPursuit):
        cfg |= {
            "residual_threshold": made.activation.residual_threshold,
            "max_iterations": made.activation.max_iterations,
            "stop_on_duplicate_support": made.activation.stop_on_duplicate_support,
        }
    if made.architecture in ("topk", "abstopk"):
        cfg |= {"k": made.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _common(made: Dictionary) -> dict[str, Any]:
    """What a cfg.json says of every kind."""
    origin, (hook, head) = made.origin, split_head(made.hook_name)
    heads = made.origin.inputs[0].endswith("hook_z") and not made.is_transcoder
    return {
        "architecture": made.architecture,
        "d_in": made.d_in,
        "d_sae": made.d_sae,
        "dtype": str(made.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": made.center,
        "normalize_activations": made.input_norm,
        "reshape_activations": "hook_z" if heads else "none",
        "metadata": {
            "sae_lens_version": _FORMAT_VERSION,
            "sae_lens_training_version": None,
            "model_name": origin.model_name,
            "hook_name": hook,
            "hook_head_index": head,
            "context_size": origin.context,
            "prepend_bos": origin.prepend_bos,
            "dataset_path": origin.dataset,
        },
    }


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, none in another's memory (tied weights are): the file's format wants it so."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        places = {other.untyped_storage().data_ptr() for other in apart.values()}
        apart[name] = plain.clone() if plain.untyped_storage().data_ptr() in places else plain
    return apart


def _tensors(made: Dictionary) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"W_dec": made.W_dec, "b_dec": made.b_dec}
    if isinstance(made.activation, MatchingPursuit):
        return tensors
    tensors["W_enc"] = made.W_enc
    if isinstance(made.activation, Gated):
        tensors |= {"b_gate": made.b_enc, "r_mag": made.activation.r_mag, "b_mag": made.activation.b_mag}
    else:
        tensors["b_enc"] = made.b_enc
    if isinstance(made.activation, JumpReLU):
        tensors["threshold"] = made.activation.threshold
    if made.W_skip is not None:
        tensors["W_skip"] = made.W_skip.T
    return tensors


def _folded(made: AnyDictionary) -> Dictionary:
    if not isinstance(made, Dictionary):
        why = "attention reads its codes" if isinstance(made, TemporalDictionary) else "a latent has several rows"
        raise ConfigError(f"The decoder norms of this dictionary cannot be folded: {why}", got=made.architecture)
    norms = made.W_dec.norm(dim=1)
    if not made.activation.at_once and torch.allclose(norms, torch.ones_like(norms)):
        return made  # a rounding error between encoder and decoder would make it another kind than SAELens's
    if (made.k is not None or not made.activation.at_once) and not torch.allclose(norms, norms.mean()):
        raise ConfigError(
            "Folding the decoder norms would change which latents are the largest",
            got=f"{made.activation.name} with norms from {norms.min():.3g} to {norms.max():.3g}",
            fix="Write it without fold_decoder_norms",
        )
    made = copy.deepcopy(made)
    made.fold_decoder_norms()
    return made
