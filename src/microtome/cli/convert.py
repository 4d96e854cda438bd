"""`microtome convert`: a dictionary of any format, written as SAELens reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtome.cli.options import CommandOptions, lines
from microtome.common.device import DTypeName


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Read a dictionary of any format (docs/dictionary_formats.md) and write it in SAELens's, or in Microtome's own where
    SAELens has no name for it."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder or file, demo, hf://owner/repo/folder, or release/id of a known release."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    format: str | None = None
    """The format of the source, where its files leave that open."""
    model_name: str | None = None
    """The model that it belongs to, where the files do not say."""
    hook_name: str | None = None
    """The hook point that it reads, where the files do not say."""
    hook_name_out: str | None = None
    """The hook point that a transcoder writes, where the files do not say."""
    norm_scaling_factor: float | None = None
    """The scale of the activations in training, where the files do not say."""
    fold_decoder_norms: bool = False
    """Write decoder rows of norm one, and the codes larger by what they had."""
    split_signs: bool = False
    """Write an AbsTopK dictionary as a TopK with a latent for each sign, which can be indexed."""
    dtype: DTypeName = "fp32"
    """The dtype of the written weights."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Read, write, and say what was read."""
    from microtome.common.artifacts import draft
    from microtome.common.device import parse_dtype
    from microtome.dictionary import split_signs
    from microtome.dictionary.formats import Hints, log_sparsity, read_dictionary, save_dictionary

    hints = Hints(
        model_name=options.model_name,
        hook_name=options.hook_name,
        hook_name_out=options.hook_name_out,
        norm_scaling_factor=options.norm_scaling_factor,
    )
    reading = read_dictionary(options.source, options.format, hints)
    made = reading.dictionary.to(dtype=parse_dtype(options.dtype))
    beside = made.path
    if options.split_signs:
        made = split_signs(made)
    settings = {
        "source": options.source,
        "format": reading.format,
        "fold_decoder_norms": options.fold_decoder_norms,
        "split_signs": options.split_signs,
    }
    out = draft(options.out, "dictionary", settings, overwrite=options.overwrite)
    save_dictionary(
        made,
        out.folder,
        fold_decoder_norms=options.fold_decoder_norms,
        log_sparsity=log_sparsity(beside) if beside.is_dir() and not options.split_signs else None,
    )
    out.publish(overwrite=options.overwrite, source=options.source, notes=list(reading.notes))
    written = read_dictionary(options.out)
    return {
        "out": str(options.out),
        "read_as": reading.format,
        "written_as": written.format,
        "architecture": made.architecture,
        "d_in": made.d_in,
        "d_sae": made.d_sae,
        "d_out": made.d_out,
        "k": made.k,
        "model": made.model_name,
        "reads": list(made.origin.inputs),
        "writes": list(made.origin.outputs),
        "b_dec_from_input": getattr(made, "center", False),
        "input_norm": getattr(made, "input_norm", "none"),
        "notes": list(reading.notes),
        "fingerprint": written.dictionary.fingerprint,
    }


def show(result: dict[str, Any]) -> str:
    """What was read, and below it what is special about it."""
    table = lines({key: value for key, value in result.items() if key != "notes"})
    return "\n".join([table, *(f"note: {note}" for note in result["notes"])])
