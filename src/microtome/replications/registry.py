"""`replicate(name)`: find a replication, run it on a model, and put into the report what made it."""

import importlib
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from microtome.common.artifacts import describe_run
from microtome.common.config import JsonObject, from_dict, to_dict
from microtome.common.errors import ArtifactError, InputError, unknown_name
from microtome.common.progress import Timer, progress
from microtome.model import HookedModel, load_model
from microtome.replications.frame import Replication
from microtome.views import Report
from microtome.views.canvas import require_matplotlib

# Each module holds one `REPLICATION`.
REPLICATIONS = {
    "towards_monosemanticity": "microtome.replications.towards_monosemanticity",
    "indirect_object_identification": "microtome.replications.indirect_object_identification",
    "sampling": "microtome.replications.sampling",
    "toy_models_of_superposition": "microtome.replications.toy_models_of_superposition",
    "induction_circuit": "microtome.replications.induction_circuit",
    "induction_heads": "microtome.replications.induction_heads",
}


def find(name: str) -> Replication[Any]:
    """The replication of this name. Raises InputError for one that is not there, naming the nearest."""
    if name not in REPLICATIONS:
        raise unknown_name("replication", name, REPLICATIONS, InputError)
    found = importlib.import_module(REPLICATIONS[name]).REPLICATION
    assert isinstance(found, Replication)
    return found


def replicate(
    name: str | Replication[Any],
    model: HookedModel | str | Path | None = None,
    *,
    preset: str = "full",
    out: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> Report:
    """Run the replication `name` (or a `Replication` of your own) on `model`, an open model or what `load_model` takes.

    Without a model each replication takes its default one. `settings` change single fields of the preset's config. With
    `out`, the report is written to that folder too. Raises InputError for an unknown replication and ConfigError for an
    unknown preset or setting, each naming the nearest; with `out`, MissingDependencyError where matplotlib is not
    installed and ArtifactError for a folder that cannot be made, before anything runs.
    """
    if out is not None:
        require_matplotlib()
        _make(Path(out))
    replication = find(name) if isinstance(name, str) else name
    chosen = replication.preset(preset)
    config = from_dict(type(chosen), {**to_dict(chosen), **settings, "seed": seed})
    opened = _opened(replication.default_model if model is None else model)
    with progress(replication.steps(config), replication.name) as bar, Timer() as timer:
        report = replication.run(config, opened, bar)
    provenance = _provenance(replication.name, preset, config, opened, timer.seconds)
    report = replace(report, source=report.source or replication.source, provenance={**provenance, **report.provenance})
    if out is not None:
        report.save(out)
    return report


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"The report's folder {folder} cannot be made", got=error.strerror) from None


def _opened(model: HookedModel | str | Path | None) -> HookedModel | None:
    return model if model is None or isinstance(model, HookedModel) else load_model(model)


def _provenance(name: str, preset: str, config: Any, model: HookedModel | None, seconds: float) -> JsonObject:
    """What made the report, as JSON; a replication that makes its own model adds it itself."""
    about = {} if model is None else {"model": _about(model)}
    return {
        "replication": name,
        "preset": preset,
        "config": to_dict(config),
        "seed": config.seed,
        **about,
        **describe_run(),
        "seconds": round(seconds, 2),
        "machine": _machine(),
    }


def _about(model: HookedModel) -> JsonObject:
    c = model.config
    sizes = {"n_layers": c.n_layers, "n_heads": c.n_heads, "d_model": c.d_model, "d_vocab": c.d_vocab}
    return {
        "name": model.name,
        "revision": model.revision,
        "family": c.family,
        **sizes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _machine() -> JsonObject:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "gpu": gpu,
    }
