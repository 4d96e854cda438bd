"""dictionary_learning: `ae.pt` (in training `checkpoints/ae_1000.pt`), a pickle that is read with `weights_only`, and
`config.json` with `trainer` and `buffer`.

The class that made it (`trainer.dict_class`) says what the tensors mean. nn.Linear classes keep encoder.weight [F, d]
and decoder.weight [d, F], the others W_enc [d, F] and W_dec [F, d]. Read from dictionary_learning 0.1.0.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import Activation, Gated, JumpReLU, ReLU, TopK
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.hooks import hub_model, of_submodule
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover
from microtome.dictionary.formats.tensors import TensorFile, only_tensors, read_pickle
from microtome.dictionary.formats.values import damaged, is_number, is_whole, table

WEIGHTS, CONFIG, NAME = "ae.pt", "config.json", "dictionary_learning"
# The name of the decoder's bias in each class, and whether it is taken from the input.
CLASSES = {
    "AutoEncoder": ("bias", True),
    "AutoEncoderNew": ("decoder.bias", False),
    "GatedAutoEncoder": ("decoder_bias", True),
    "AutoEncoderTopK": ("b_dec", True),
    "BatchTopKSAE": ("b_dec", True),
    "JumpReluAutoEncoder": ("b_dec", False),
    "MatryoshkaBatchTopKSAE": ("b_dec", True),
}


def detect(path: Path) -> bool:
    """A folder with `ae.pt`, or a file of a run's `checkpoints`."""
    return (path / WEIGHTS).is_file() or (path.is_file() and re.fullmatch(r"ae_\d+\.pt", path.name) is not None)


def read(path: Path, hints: Hints) -> Reading:
    """A dictionary of any of the library's classes; of a run that was interrupted, its state."""
    weights = path if path.is_file() else path / WEIGHTS
    values = read_pickle(weights)
    folder = weights.parent
    if folder.name == "checkpoints" and not (folder / CONFIG).is_file():
        folder = folder.parent
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    factor, notes = 1.0, []
    if isinstance(values.get("ae"), dict):
        notes.append(f"of a run that was interrupted at step {values.get('step')}")
        config = {**({"trainer": values["config"]} if isinstance(values.get("config"), dict) else {}), **config}
        factor = _factor(weights, values)
        values = values["ae"]
        if factor != 1.0:
            notes.append(f"trained on activations over {factor:.6g}: its biases and thresholds were multiplied by that")
    trainer, buffer = (table(folder / CONFIG, config, key) for key in ("trainer", "buffer"))
    tensors = only_tensors(values)
    cls = _class(folder, trainer, tensors, notes)
    file = TensorFile(weights, tensors, f"{CONFIG} ({cls})")
    W_enc, W_dec = _matrices(file)
    (d_in, d_sae), bias = W_enc.shape, CLASSES[cls][0]
    for key, size in (("activation_dim", d_in), ("dict_size", d_sae)):
        if trainer.get(key, size) != size:
            raise file.misfit(f"{key} {size}", f"{key} {trainer[key]}")
    activation, b_enc = _activation(folder, cls, file, trainer, d_sae)
    origin = _origin(trainer, buffer)
    if buffer.get("io") == "in_and_out":
        raise ArtifactError(f"The dictionary at {folder} is a transcoder, which dictionary_learning never finished")
    if origin.inputs[0] == UNKNOWN and hints.hook_name is None:
        notes.append("the config does not name the hook point: give hook_name")
    activation.scale_(W_enc.new_tensor(factor))
    made = build(
        path,
        hints.applied(origin),
        activation,
        Weights(
            W_enc=W_enc,
            W_dec=W_dec,
            b_enc=b_enc * factor,
            b_dec=file.take(bias, d_in) * factor,
        ),
        center=CLASSES[cls][1],
    )
    return Reading(dictionary=made, format=NAME, notes=(f"class {cls}", *notes, *leftover(file.left)))


FORMAT = Format(name=NAME, looks=f"{WEIGHTS} and {CONFIG}", detect=detect, read=read)


def _class(folder: Path, trainer: dict[str, Any], tensors: dict[str, Tensor], notes: list[str]) -> str:
    cls = trainer.get("dict_class")
    # This trainer writes the name of its default class, whatever class it was given.
    april = (cls, trainer.get("trainer_class")) == ("AutoEncoder", "StandardTrainerAprilUpdate")
    if april and "decoder.bias" in tensors and "bias" not in tensors:
        notes.append("its config says AutoEncoder, as this trainer always does; its tensors are an AutoEncoderNew's")
        return "AutoEncoderNew"
    if not isinstance(cls, str) or cls not in CLASSES:
        raise ArtifactError(
            f"{folder / CONFIG} does not name a class that can be read",
            got=f"trainer.dict_class {cls!r}",
            expected=f"one of {', '.join(CLASSES)}",
        )
    return cls


def _factor(file: Path, values: dict[str, Any]) -> float:
    """What the activations of an interrupted run were divided by."""
    factor = values.get("norm_factor", 1.0)
    if factor is None:
        return 1.0
    if not is_number(factor) or not 0 < factor < float("inf"):
        raise damaged(file, "norm_factor", factor, "a positive number")
    return float(factor)


def _matrices(file: TensorFile) -> tuple[Tensor, Tensor]:
    """W_enc [d, F] and W_dec [F, d]."""
    if "W_enc" in file:
        d_in, d_sae = file.shape("W_enc", 2)
        return file.take("W_enc", d_in, d_sae), file.take("W_dec", d_sae, d_in)
    d_sae, d_in = file.shape("encoder.weight", 2)
    return file.take("encoder.weight", d_sae, d_in).T, file.take("decoder.weight", d_in, d_sae).T


def _activation(
    folder: Path, cls: str, file: TensorFile, trainer: dict[str, Any], d_sae: int
) -> tuple[Activation, Tensor]:
    if cls == "GatedAutoEncoder":
        activation: Activation = Gated(file.take("r_mag", d_sae), file.take("mag_bias", d_sae))
        return activation, file.take("gate_bias", d_sae)
    b_enc = file.take("b_enc" if "b_enc" in file else "encoder.bias", d_sae)
    if cls == "JumpReluAutoEncoder":
        return JumpReLU(file.take("threshold", d_sae)), b_enc
    file.skip("k", "group_sizes")
    if cls == "AutoEncoderTopK":
        file.skip("threshold")  # measured in training, and used only when asked for
        return TopK(_k(file, trainer)), b_enc
    if cls in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = file.take("threshold")
        if threshold < 0:
            raise ArtifactError(
                f"The {cls} at {folder} has no threshold yet",
                got=f"threshold {threshold.item():g}",
                expected="zero or more",
                fix="Train past threshold_start_step (1,000 steps): until then its codes depend on the batch",
            )
        return JumpReLU(threshold.expand(d_sae).clone()), b_enc
    return ReLU(), b_enc


def _k(file: TensorFile, trainer: dict[str, Any]) -> int:
    inside = int(file.tensors["k"]) if "k" in file and file.tensors["k"].numel() == 1 else None
    said = trainer.get("k", inside)
    if not is_whole(said) or inside not in (None, said):
        raise file.misfit(f"k {inside} in the weights", f"k {said!r}")
    return said


def _origin(trainer: dict[str, Any], buffer: dict[str, Any]) -> Origin:
    context = buffer.get("ctx_len")
    return Origin(
        model_name=hub_model(str(trainer.get("lm_name") or UNKNOWN)),
        inputs=(of_submodule(trainer.get("submodule_name"), trainer.get("layer")),),
        context=context if isinstance(context, int) else None,
    )
