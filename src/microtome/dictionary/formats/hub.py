"""Dictionaries on the Hugging Face hub: `hf://owner/repo/folder`, from the cache on this disk when they are there.

Only the folder that is named is fetched, and the small configs above it that some formats keep there. What lies
three or more folders below the one that is named is left out: no set has its dictionaries so deep, and some repositories hold
terabytes there.
"""

import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from microtome.common.errors import ArtifactError
from microtome.common.progress import say
from microtome.dictionary.formats.circuit_tracer import listed
from microtome.model.hub import hub_in_reach

HUB = "hf://"
_WEIGHTS = ("*.safetensors", "*.npz", "*.pt")
_NEVER = "*examples.safetensors"  # Gemma Scope 2's texts, larger than its weights


class PartOfASetWarning(UserWarning):
    """What is in the cache may be some of a repository's dictionaries only, and the hub cannot be asked."""


def fetch(address: str, chosen: str | None = None, *, whole: bool = False) -> Path:
    """The folder (or file) on this disk of `hf://owner/repo[@revision][/folder or file]`; of what is in the folder only
    what is called as `chosen`, a glob, where one is given. `whole` is for several dictionaries: the hub is asked for all that
    the cache lacks. Before anything is fetched, a line on standard error says how much that is.

    Raises ArtifactError for an address of another form, one that the hub does not have, and when it is neither on this
    disk nor the hub in reach. Warns where the hub cannot be asked whether the cache has the whole.
    """
    name, revision, inside = _parsed(address)
    wanted = _Wanted(name, revision, *_patterns(inside, chosen))
    reachable = hub_in_reach()
    here = None if whole and reachable else _on_this_disk(wanted, inside, address, whole)
    if here is not None:
        return here
    if not reachable:
        raise ArtifactError(
            f"{address} is not on this disk, or not all of it, and the hub cannot be reached",
            fix="Connect, or give a local folder",
        )
    try:
        wanted.announce(address)
        place = Path(wanted.download()) / inside
    except Exception as error:  # the client lets its own client's errors through, which have no common base
        here = _on_this_disk(wanted, inside, address, whole) if whole else None
        if here is not None:
            return here
        raise ArtifactError(f"{address} could not be fetched: {f'{error}'.partition(chr(10))[0]}") from error
    if not place.exists():
        what = "/".join(filter(None, (inside, chosen))) or "weights in itself or the folders below it"
        raise ArtifactError(f"The hub's {name} has no {what}", fix=f"Look at huggingface.co/{name}/tree/main")
    return place


def _on_this_disk(wanted: "_Wanted", inside: str, address: str, whole: bool) -> Path | None:
    """The place in the cache; with a warning where the whole is asked for and nobody can tell whether it is."""
    place = wanted.cached(inside)
    if place is not None and whole and not wanted.is_listed():
        warnings.warn(
            f"{address}: the hub cannot be asked, and the cache may have some of its dictionaries only",
            PartOfASetWarning,
            stacklevel=3,
        )
    return place


class _Wanted:
    """Those files of a repository that match a pattern of `allow` and none of `ignore`."""

    def __init__(self, name: str, revision: str | None, allow: list[str], ignore: list[str]) -> None:
        self.name, self.revision, self.allow, self.ignore = name, revision, allow, ignore

    def download(self, local_files_only: bool = False) -> str:
        return snapshot_download(
            self.name,
            revision=self.revision,
            allow_patterns=self.allow,
            ignore_patterns=self.ignore,
            local_files_only=local_files_only,
        )

    def cached(self, inside: str) -> Path | None:
        """The place in the cache, when its weights are there: a fetch that was cut short does not count."""
        try:
            place = Path(self.download(local_files_only=True)) / inside
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
        complete = place.is_file() or any(any(place.rglob(pattern)) for pattern in _WEIGHTS) or bool(listed(place))
        return place if complete else None

    def is_listed(self) -> bool:
        """Whether the repository's list of files is in the cache, by which the client knew that none is missing."""
        cached_tree = getattr(huggingface_hub, "get_cached_repo_tree", None)  # the client has it from version 2 on
        try:
            return cached_tree is not None and bool(cached_tree(self.name, revision=self.revision))
        except Exception:  # the error of a list that is not there has a name that older clients do not know
            return False

    def announce(self, address: str) -> None:
        """Say how many files will come, and how large they are. Raises what the hub's client raises."""
        about = HfApi().model_info(self.name, revision=self.revision, files_metadata=True)
        coming = [
            file
            for file in about.siblings or ()
            if self._matches(file.rfilename)
            and not isinstance(try_to_load_from_cache(self.name, file.rfilename, revision=about.sha), str)
        ]
        if coming:
            say(f"{address}: files to fetch: {len(coming):,} ({sum(file.size or 0 for file in coming) / 1e9:,.2f} GB)")

    def _matches(self, file: str) -> bool:
        allowed, ignored = (any(fnmatchcase(file, pattern) for pattern in each) for each in (self.allow, self.ignore))
        return allowed and not ignored


def _parsed(address: str) -> tuple[str, str | None, str]:
    """Repository, revision and the place inside. The revision stands behind the repository, as `@revision`, or at the end,
    as `?revision=…`, which is how circuit-tracer's configs say it."""
    path, _, query = address.removeprefix(HUB).partition("?revision=")
    owner, _, rest = path.partition("/")
    repo, _, inside = rest.partition("/")
    repo, _, revision = repo.partition("@")
    inside = "" if inside in (".", "./") else inside.strip("/")
    if not owner or not repo or ".." in inside.split("/"):
        raise ArtifactError("No address on the hub", got=address, expected="hf://owner/repo/folder")
    return f"{owner}/{repo}", revision or query or None, inside


def _patterns(inside: str, chosen: str | None) -> tuple[list[str], list[str]]:
    """What to fetch and what not, as the hub's client matches names: `*` stands for slashes, too."""
    top = f"{inside}/" if inside else ""
    ignore = [_NEVER, f"{top}{chosen or '*'}/*/*/*"]
    above = [str(parent / file) for parent in Path(f"{top}x").parents for file in ("config.json", "config.yaml")]
    if chosen:
        return [f"{top}{chosen}", f"{top}{chosen}/*", *above], ignore
    if not inside:
        return [*_WEIGHTS, "*.json", "*.yaml"], ignore
    return [inside, f"{top}*", *above], ignore
