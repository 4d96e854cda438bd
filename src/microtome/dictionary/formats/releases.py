"""Well-known releases by name: where each is on the hub, its format, and what is special about it (`releases.json`)."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from microtome.common.config import from_dict
from microtome.common.errors import ArtifactError
from microtome.dictionary.formats.reading import Hints

# By format: parts of each repository that are releases of their own elsewhere. The dictionary `release-res/id` is in the folder
# `resid_post/id`.
SETS: Mapping[str, Mapping[str, str]] = {
    "gemma_scope_2": {
        "res": "resid_post",
        "res-all": "resid_post_all",
        "mlp": "mlp_out",
        "mlp-all": "mlp_out_all",
        "att": "attn_out",
        "att-all": "attn_out_all",
        "transcoders": "transcoder",
        "transcoders-all": "transcoder_all",
    }
}


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release. `ids` maps the names of its dictionaries to folders, where these differ; `example` is one of them. Where
    each is a file, `ending` is what the names leave out."""

    repo: str
    format: str
    model: str
    example: str
    notes: tuple[str, ...] = ()
    ending: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)
    centered: bool = False
    norm_scaling_factors: Mapping[str, float] = field(default_factory=dict)
    uncertain: tuple[str, ...] = ()
    """What was not checked against the release itself."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One dictionary of a release, in the folder `inside`."""

    release: Release
    id: str
    inside: str = ""

    @property
    def repo(self) -> str:
        return self.release.repo

    @property
    def format(self) -> str:
        return self.release.format

    @property
    def folder(self) -> str:
        if self.id == ".":
            return self.inside or "."
        folder = self.release.ids.get(self.id, self.id.removesuffix(self.release.ending) + self.release.ending)
        return folder if not self.inside or folder.startswith(f"{self.inside}/") else f"{self.inside}/{folder}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.release.notes, *(f"not checked: {what}" for what in self.release.uncertain))

    def member(self, folder: str) -> "Found":
        """The dictionary in a folder of this one, or in a file there."""
        known = (id_ for id_, place in self.release.ids.items() if place == folder)
        return replace(self, id=next(known, folder))

    def hinted(self, hints: Hints) -> Hints:
        """The hints, with what the release knows where they say nothing."""
        factor = hints.norm_scaling_factor
        return replace(
            hints,
            model_name=hints.model_name or self.release.model,
            norm_scaling_factor=self.release.norm_scaling_factors.get(self.id) if factor is None else factor,
            centered=hints.centered or self.release.centered,
        )


@functools.cache
def releases() -> Mapping[str, Release]:
    """All releases by name."""
    text = Path(__file__).with_name("releases.json").read_text(encoding="utf-8")
    return {name: from_dict(Release, {**facts}) for name, facts in json.loads(text).items()}


@functools.cache
def _names() -> Mapping[str, tuple[Release, str]]:
    """Releases and their sets by name, each with its folder in the repository."""
    names = {name: (release, "") for name, release in releases().items()}
    sets = {
        f"{name}-{part}": (release, place)
        for name, (release, _) in names.items()
        for part, place in SETS.get(release.format, {}).items()
    }
    return {**sets, **names}


def find_release(name: str) -> Found | None:
    """The dictionary `release/id`, or with the id `.` the folder of all; None when `name` begins with no release. Raises
    ArtifactError for a release without id."""
    start, _, inside = name.partition("/")
    if start not in _names():
        return None
    release, folder = _names()[start]
    if not inside:
        example = release.example.removeprefix(release.example.partition("/")[0] + "/") if folder else release.example
        raise ArtifactError(
            f"{start} is a release of many dictionaries",
            fix=f"Name one, for example {start}/{example}, or open all of its folder as a set: {start}/.",
        )
    return Found(release=release, id=inside, inside=folder)
