"""Errors as JSON: `{"error": {kind, message, what, got, expected, fix}}`, with the status that fits."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from microtome.common.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    MicrotomeError,
    MissingDependencyError,
    ModelError,
)
from microtome.web.encoder import BusyError
from microtome.web.schemas import Problem

# The first kind that fits decides.
_STATUS: list[tuple[type[MicrotomeError], int]] = [
    (BusyError, 503),
    (InputError, 400),
    (ConfigError, 400),
    (ModelError, 503),
    (MissingDependencyError, 503),
    (ArtifactError, 500),
]


class NotFoundError(InputError):
    """An address under which there is nothing."""


def problem(error: MicrotomeError) -> dict[str, Any]:
    """The JSON body for an error."""
    body = Problem(
        kind=type(error).__name__,
        message=str(error),
        what=error.what,
        got=None if error.got is None else str(error.got),
        expected=None if error.expected is None else str(error.expected),
        fix=error.fix,
    )
    return {"error": body.model_dump()}


def status_of(error: MicrotomeError) -> int:
    """The HTTP status for an error."""
    if isinstance(error, NotFoundError):
        return 404
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this form."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MicrotomeError)
        status = status_of(error)
        return JSONResponse(problem(error), status, headers={"Retry-After": "2"} if status == 503 else None)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        got = repr(first.get("input"))
        shown = got if len(got) <= 100 else f"{got[:100]}…"
        return JSONResponse(problem(InputError(f"{place}: {first['msg']}", got=shown)), 422)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(problem(MicrotomeError(str(error.detail))), error.status_code, headers=error.headers)

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(MicrotomeError("The server failed", got=type(error).__name__, fix=_SEE_LOG)), 500)

    app.add_exception_handler(MicrotomeError, known)
    app.add_exception_handler(Exception, unknown)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


_SEE_LOG = "What happened is in the terminal where the server runs"
