"""The workbench's server: `create_app` puts the parts together, `serve` runs them on a port until it is told to stop."""

import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response

import microtome
from microtome.common.errors import ConfigError
from microtome.features import FeatureIndex, open_index
from microtome.web import problems
from microtome.web.api import NotModified, make_router
from microtome.web.client import STATIC, make_client_router
from microtome.web.encoder import Encoder, Loader, index_loader
from microtome.web.security import Access, Guard

HOST, PORT = "127.0.0.1", 8700


def create_app(
    index: FeatureIndex,
    *,
    loader: Loader | None,
    access: Access | None = None,
    static: Path = STATIC,
) -> FastAPI:
    """The workbench over `index` as an ASGI application. Whoever opened the index closes it, after the application.

    `loader` opens the model and the dictionary for the text box (None: there is none, browsing works all the same);
    `access` says which hosts it answers to and which token it asks for (default: loopback names, no token).
    """
    encoder = Encoder(index, loader)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        encoder.close()

    app = FastAPI(
        title="Microtome workbench",
        version=microtome.__version__,
        openapi_url="/api/openapi.json",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(Guard, access=access or Access()), Middleware(GZipMiddleware, minimum_size=1000)],
    )

    @app.exception_handler(NotModified)
    async def not_modified(_: Request, __: Exception) -> Response:
        return Response(status_code=304)

    problems.install(app)
    app.include_router(make_router(index, encoder))
    app.include_router(make_client_router(static))
    return app


def serve(
    index_path: str | Path,
    *,
    host: str = HOST,
    port: int = PORT,
    allow_hosts: tuple[str, ...] = (),
    model: bool = True,
    loader: Loader | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the index at `index_path` until Ctrl-C. `ready` is called with the address once connections are taken.

    Port 0 takes any that is free. `model=False` never loads a model; `loader` replaces the index's own model and dictionary.
    Raises ArtifactError for an index that cannot be opened, ConfigError for a port or an address that cannot be had.
    """
    with open_index(index_path) as index, bind(host, port) as listening:
        access = Access.for_host(host, allow_hosts)
        app = create_app(index, loader=(loader or index_loader(index)) if model else None, access=access)
        address = address_of(host, listening.getsockname()[1], access.token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3
        )
        try:
            _Server(config, lambda: ready(address)).run(sockets=[listening])
        except KeyboardInterrupt:
            return  # uvicorn has closed everything before it passes the signal on


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`. Raises ConfigError, with what to do, when that cannot be."""
    if not 0 <= port <= 65535:
        raise ConfigError("There is no such port", got=port, expected="0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's delay of 40 ms off only for sockets that say they are TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            fix = "Stop the other server, choose another port (--port), or let one be found (--port 0)"
            raise ConfigError(f"Port {port} on {host} is in use", fix=fix) from error
        if error.errno == errno.EACCES:
            fix = "Choose a port above 1023 (--port), or let one be found (--port 0)"
            raise ConfigError(f"Port {port} may not be used by this user", fix=fix) from error
        fix = "Use 127.0.0.1 for this machine alone, or 0.0.0.0 for all its addresses"
        raise ConfigError(f"Cannot listen on {host}: {error.strerror or error}", fix=fix) from error
    return listening


def address_of(host: str, port: int, token: str | None) -> str:
    """The address to open in a browser."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 – a key
    return f"http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")
