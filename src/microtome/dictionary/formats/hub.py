"""Dictionaries on the Hugging Face hub: `hf://owner/repo/folder`, from the cache on this disk when they are there.

Only the folder that is named is fetched, and the small configs above it that some formats keep there.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from microtome.common.errors import ArtifactError
from microtome.model.hub import hub_in_reach

HUB = "hf://"
_WEIGHTS = ("*.safetensors", "*.npz", "*.pt")
_NEVER = ["*examples.safetensors"]  # Gemma Scope 2's texts, larger than its weights


def fetch(address: str) -> Path:
    """The folder (or file) on this disk of `hf://owner/repo[@revision][/folder or file]`.

    Raises ArtifactError for an address of another form, one that the hub does not have, and when it is neither on this
    disk nor the hub in reach.
    """
    owner, _, rest = address.removeprefix(HUB).partition("/")
    repo, _, inside = rest.partition("/")
    repo, _, revision = repo.partition("@")
    inside = "" if inside in (".", "./") else inside.strip("/")
    if not owner or not repo or ".." in inside.split("/"):
        raise ArtifactError("No address on the hub", got=address, expected="hf://owner/repo/folder")
    name = f"{owner}/{repo}"
    patterns = _patterns(inside)
    cached = _cached(name, revision or None, patterns, inside)
    if cached is not None:
        return cached
    if not hub_in_reach():
        raise ArtifactError(
            f"{address} is not on this disk, and the hub cannot be reached", fix="Connect, or give a local folder"
        )
    try:
        root = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=_NEVER))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(f"{address} could not be fetched: {str(error).splitlines()[0]}") from error
    if not (root / inside).exists():
        raise ArtifactError(f"The hub's {name} has no {inside}", fix=f"Look at huggingface.co/{name}/tree/main")
    return root / inside


def _patterns(inside: str) -> list[str]:
    if not inside:
        return [*_WEIGHTS, "*.json", "*.yaml"]
    above = [f"{parent}/config.json".removeprefix("./") for parent in Path(inside).parents]
    return [inside, f"{inside}/*", *above, "config.yaml"]


def _cached(name: str, revision: str | None, patterns: list[str], inside: str) -> Path | None:
    """The place in the cache, when its weights are there: a fetch that was cut short does not count."""
    try:
        root = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    place = root / inside
    complete = place.is_file() or any(any(place.rglob(pattern)) for pattern in _WEIGHTS)
    return place if complete else None
