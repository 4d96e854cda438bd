"""The API's endpoints.

An index never changes while it is served, so what is read from it carries one ETag: the fingerprint of all that the summary tells.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import Field

import microtome
from microtome.common.artifacts import fingerprint
from microtome.features import FeatureIndex
from microtome.web import convert, schemas
from microtome.web.encoder import Encoder
from microtome.web.glance import Glances
from microtome.web.problems import NotFoundError

Sort = Literal["density", "max", "mean", "std", "count", "n_sequences", "feature"]
MAX_ROWS = 500
# DuckDB's integers end here; an offset beyond any list is simply an empty page.
_LAST = 2**31 - 1
Share = Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)]
Level = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]
Offset = Annotated[int, Field(ge=0, le=_LAST)]
FeatureId = Annotated[int, Path(ge=0, le=_LAST)]


class ListQuery(schemas.Wire):
    """The feature list's query. `token`: part of the peak token of some top example; `text`: words to search for;
    `layer`: the block that a feature reads."""

    sort: Sort = "density"
    descending: bool = True
    offset: Offset = 0
    limit: int = Field(default=100, ge=1, le=MAX_ROWS)
    min_density: Share = None
    max_density: Share = None
    min_max: Level = None
    alive: bool | None = None
    token: str | None = Field(default=None, max_length=100)
    text: str | None = Field(default=None, max_length=200)
    layer: int | None = Field(default=None, ge=0, le=_LAST)


class ExamplesQuery(schemas.Wire):
    """Which examples: the strongest, or those sampled from one band, or (without `band`) from all, strongest first."""

    kind: Literal["top", "sample"] = "top"
    band: int | None = Field(default=None, ge=0, le=1000)
    offset: Offset = 0
    limit: int = Field(default=20, ge=1, le=MAX_ROWS)


class NotModified(Exception):  # noqa: N818 – not an error: the browser has the answer already
    """The browser's copy is still good."""


def make_router(index: FeatureIndex, encoder: Encoder) -> APIRouter:
    """The endpoints under /api."""
    glances = Glances(index)
    about = convert.summary(index)
    etag = f'W/"{fingerprint({"version": microtome.__version__, **about.model_dump()})}"'

    def revalidate(request: Request, response: Response) -> None:
        if etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
            raise NotModified
        response.headers["ETag"] = etag
        response.headers["Cache-Control"] = "no-cache"

    api = APIRouter(prefix="/api")
    kept = APIRouter(dependencies=[Depends(revalidate)])

    @kept.get("/summary")
    def summary() -> schemas.Summary:
        """What the index is of."""
        return about

    @kept.get("/features")
    def features(query: Annotated[ListQuery, Query()]) -> schemas.FeaturePage:
        """Some rows of the feature list, sorted and filtered."""
        page = index.features(**query.model_dump())
        return schemas.FeaturePage(
            total=page.total, offset=query.offset, rows=[convert.row(r, glances) for r in page.rows]
        )

    @kept.get("/features/{feature}")
    def feature(feature: FeatureId) -> schemas.Feature:
        """All about one feature but its examples."""
        _exists(index, feature)
        return convert.feature(index.feature(feature), index, glances)

    @kept.get("/features/{feature}/examples")
    def examples(feature: FeatureId, query: Annotated[ExamplesQuery, Query()]) -> schemas.ExamplePage:
        """Windows of text in which the feature fires."""
        _exists(index, feature)
        return _examples(index, feature, query)

    @api.post("/encode")
    async def encode(request: schemas.EncodeRequest, response: Response) -> schemas.Encoded:
        """The features that fire on a text."""
        found, seconds = await encoder.encode(request.text, request.k)
        response.headers["Cache-Control"] = "no-store"
        return convert.encoded(found, index.record.bos_id, request.k, seconds, glances)

    @api.get("/health")
    def health(response: Response) -> schemas.Health:
        """That the server is up, and whether it can encode."""
        response.headers["Cache-Control"] = "no-store"
        return schemas.Health(
            version=microtome.__version__, fingerprint=index.summary.fingerprint, encoder=encoder.state()
        )

    api.include_router(kept)
    return api


def _exists(index: FeatureIndex, feature: int) -> None:
    if feature >= len(index):
        raise NotFoundError("There is no such feature", got=feature, expected=f"0…{len(index) - 1}")


def _examples(index: FeatureIndex, feature: int, query: ExamplesQuery) -> schemas.ExamplePage:
    """The index keeps a feature's samples as one list, the strongest band first: a band is a run of it."""
    found = index.feature(feature)
    sampled = {band.band: band.sampled for band in found.bands}
    if query.kind == "top":
        start, total = 0, found.n_top
    elif query.band is None:
        start, total = 0, sum(sampled.values())
    elif query.band in sampled:
        start, total = sum(n for band, n in sampled.items() if band > query.band), sampled[query.band]
    else:
        known = ", ".join(map(str, sampled)) or "none"
        raise NotFoundError("This feature has no such band", got=query.band, expected=f"one of {known}")
    limit = max(0, min(query.limit, total - query.offset))
    rows = index.examples(feature, query.kind, limit, start + query.offset) if limit else []
    return schemas.ExamplePage(total=total, offset=query.offset, examples=[convert.example(e) for e in rows])
