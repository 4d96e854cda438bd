"""`microtome bench harvest`: tokens per second of a harvest, against the bare Hugging Face model, in fp32 and bf16.

The sides work on the same batches, in turn:

- `huggingface_*`  the module alone: a forward pre-hook on the layer keeps its input and ends the run;
- `microtome_*`    `model.activations`, which a harvest calls for each batch;
- `microtome_*_with_disk`  the whole `harvest` to a store in bf16, with token ids, checksums and all.

Then both dtypes' activations are compared on more text (`agreement.py`).
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.agreement import Agreement
from benchmarks.common import ModelAndText, in_turn, machine, rate, ratio, timed, tokens_of
from microtome.activations import HarvestConfig, harvest
from microtome.activations.source import text_mask
from microtome.common.config import require, to_dict
from microtome.common.device import fast_dtype, parse_device
from microtome.common.errors import MicrotomeError
from microtome.common.progress import progress
from microtome.dictionary import Dictionary, load_dictionary
from microtome.dictionary.fit import check_fit
from microtome.model import HookedModel, load_model
from microtome.text import TokenDataset


@dataclass(frozen=True, kw_only=True)
class Config(ModelAndText):
    """`tokens` are run in each turn of each side, `rounds` times; on `compare_tokens` the two dtypes are compared, through
    `dictionary` too ("demo": the one that ships)."""

    batch_tokens: int = 4096
    tokens: int = 16_384
    rounds: int = 5
    compare_tokens: int = 65_536
    dictionary: str = "demo"

    def __post_init__(self) -> None:
        require(self.rounds > 0, "rounds must be positive", got=self.rounds)
        require(
            min(self.tokens, self.compare_tokens, self.batch_tokens) >= self.context,
            "tokens, compare_tokens and batch_tokens must each hold a sequence",
            got=f"context {self.context}",
        )


def run(config: Config) -> dict[str, Any]:
    """Measure, and return the machine, the sizes, the figures, the ratios and what there is to note."""
    device = parse_device(config.device)
    about, notes = machine(device), []
    models = {"fp32": load_model(config.model, dtype="fp32", device=config.device)}
    if fast_dtype(device) is torch.bfloat16:
        models["bf16"] = load_model(config.model, dtype="bf16", device=config.device)
    else:
        notes.append("bf16 is left out: this hardware does not multiply it")
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as scratch:
        n_tokens = max(config.tokens, config.compare_tokens)
        dataset = tokens_of(models["fp32"], config, n_tokens, Path(scratch) / "tokens")
        part = dataset.slice(0, min(config.tokens // config.context, dataset.n_sequences))
        seconds = in_turn(_sides(models, part, config, Path(scratch)), config.rounds, "bench harvest")
        speed = {name: rate(part.n_tokens, some) for name, some in seconds.items()}
        agreement = None
        if "bf16" in models:
            sae = _dictionary(models["fp32"], config, notes)
            agreement = _agreement(models, dataset, sae, config)
        tokens_compared = dataset.n_tokens if agreement else 0
    return {
        "benchmark": "harvest",
        "machine": about,
        "sizes": {**to_dict(config), "tokens": part.n_tokens, "compare_tokens": tokens_compared},
        "figures": {"tokens_per_second": speed, "seconds": seconds, "bf16_against_fp32": agreement},
        "ratios": {
            "fp32_vs_huggingface": ratio(speed["microtome_fp32"], speed["huggingface_fp32"]),
            "bf16_vs_fp32": ratio(speed.get("microtome_bf16"), speed["microtome_fp32"]),
            "bf16_vs_huggingface_bf16": ratio(speed.get("microtome_bf16"), speed.get("huggingface_bf16")),
            "fp32_with_disk_vs_huggingface": ratio(speed["microtome_fp32_with_disk"], speed["huggingface_fp32"]),
            "bf16_with_disk_vs_huggingface_bf16": ratio(
                speed.get("microtome_bf16_with_disk"), speed.get("huggingface_bf16")
            ),
        },
        "notes": notes,
    }


# ---- the sides --------------------------------------------------------------------------------------------------------


def _sides(
    models: dict[str, HookedModel], part: TokenDataset, config: Config, scratch: Path
) -> dict[str, Callable[[], float]]:
    batches = list(_batches(part, config))
    sides: dict[str, Callable[[], float]] = {}
    for dtype, model in models.items():
        sides[f"huggingface_{dtype}"] = _huggingface(model, batches, config)
        sides[f"microtome_{dtype}"] = _microtome(model, batches, config)
        sides[f"microtome_{dtype}_with_disk"] = _with_disk(model, part, config, scratch / dtype)
    return sides


def _batches(dataset: TokenDataset, config: Config) -> Iterator[Tensor]:
    per_batch = config.batch_tokens // config.context
    for start in range(0, dataset.n_sequences, per_batch):
        yield torch.from_numpy(dataset.batch(start, min(start + per_batch, dataset.n_sequences)))


def _huggingface(model: HookedModel, batches: list[Tensor], config: Config) -> Callable[[], float]:
    def work() -> None:
        for tokens in batches:
            bare_activations(model.hf, tokens.to(model.device), config.layer).to("cpu")

    return lambda: timed(work, model.device)


class _Seen(Exception):  # noqa: N818 - not an error: it ends the run
    pass


@torch.no_grad()
def bare_activations(hf: nn.Module, tokens: Tensor, layer: int) -> Tensor:
    """What enters layer `layer` of a Hugging Face model, `[batch, pos, d_model]`, with PyTorch's means alone."""
    layers = next(module for module in hf.modules() if isinstance(module, nn.ModuleList) and len(module) > layer)
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _Seen

    handle = layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        hf(input_ids=tokens, use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
    return kept[0]


def _microtome(model: HookedModel, batches: list[Tensor], config: Config) -> Callable[[], float]:
    @torch.no_grad()
    def work() -> None:
        for tokens in batches:
            model.activations(tokens, config.hook_name, device="cpu")

    return lambda: timed(work, model.device)


def _with_disk(model: HookedModel, part: TokenDataset, config: Config, folder: Path) -> Callable[[], float]:
    def side() -> float:
        wanted = HarvestConfig(batch_tokens=config.batch_tokens)
        seconds = timed(lambda: harvest(model, part, config.hook_name, folder, config=wanted), model.device)
        shutil.rmtree(folder)
        return seconds

    return side


# ---- bf16 against fp32 ------------------------------------------------------------------------------------------------


def _dictionary(model: HookedModel, config: Config, notes: list[str]) -> Dictionary | None:
    """The dictionary to compare features with. The default one may be missing or of another model: then a note says so."""
    try:
        sae = load_dictionary(config.dictionary)
        check_fit(model, sae)
        require(
            sae.hook_name == config.hook_name,
            "The dictionary was trained at another hook point",
            got=sae.hook_name,
            expected=config.hook_name,
        )
    except MicrotomeError as error:
        if config.dictionary != Config.dictionary:
            raise
        notes.append(f"Features are not compared: {error}")
        return None
    return sae


def _agreement(
    models: dict[str, HookedModel], dataset: TokenDataset, sae: Dictionary | None, config: Config
) -> dict[str, float | int | None]:
    agreement = Agreement(models["fp32"].config.d_model, dataset.n_sequences, sae)
    with progress(dataset.n_tokens, "compare bf16 with fp32", "tokens") as bar:
        for tokens in _batches(dataset, config):
            kept = {
                dtype: model.activations(tokens, config.hook_name, device="cpu")[config.hook_name]
                for dtype, model in models.items()
            }
            agreement.add(kept["fp32"], kept["bf16"], text_mask(tokens, dataset.special_ids))
            bar.advance(tokens.numel())
    return agreement.figures()
