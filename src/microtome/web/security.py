"""Who may talk to the server. One ASGI layer around everything else, so that no route can forget it.

1. Host: only names that this server is known by, so that a foreign page cannot reach it through a name of its own
   (DNS rebinding).
2. Origin: a request that a browser sends from another site is refused.
3. Token: where the server listens beyond loopback, each request carries the random token: once in the address,
   afterwards in a cookie, or in a header `Authorization: Bearer …`.
4. Size: a request's body may hold 64 KiB.
5. Every answer carries headers that forbid foreign scripts, frames and guessing at types.
"""

import ipaddress
import secrets
import socket
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microtome.common.errors import MicrotomeError
from microtome.web.problems import problem

MAX_BODY = 64 * 1024
COOKIE = "microtome_token"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, kw_only=True)
class Access:
    """The names that a request may ask for, and the token that it must carry (None: none is needed).

    `any_address` lets the Host be a bare IP address: a server on all interfaces has many, and an address cannot be rebound.
    """

    hosts: frozenset[str] = LOOPBACK
    token: str | None = field(default=None, repr=False)
    any_address: bool = False

    @classmethod
    def for_host(cls, host: str, allowed: tuple[str, ...] = ()) -> "Access":
        """What follows from the address to listen on: no token on loopback, a new random one elsewhere."""
        if is_loopback(host):
            return cls(hosts=LOOPBACK | {host.lower(), *map(str.lower, allowed)})
        every = host in ("", "0.0.0.0", "::")  # noqa: S104 – compared, not bound
        names = LOOPBACK | {host.lower(), socket.gethostname().lower(), *map(str.lower, allowed)}
        return cls(hosts=names, token=secrets.token_urlsafe(24), any_address=every)


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """The layer. Wrap the whole application in it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # There are no websockets here; "lifespan" comes from the server itself.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self.check(scope)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        await self.app(scope, _Body(receive).receive, _with_headers(send))

    def check(self, scope: Scope) -> Response | None:
        """The refusal of a request that may not pass, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._known(host):
            return _refuse(
                400, MicrotomeError("This server does not answer to that name", got=f"Host {host!r}", fix=_HOST_HINT)
            )
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if foreign or (headers.get("sec-fetch-site") == "cross-site" and scope["path"].startswith("/api/")):
            return _refuse(403, MicrotomeError("Requests from other sites are refused", got=f"Origin {origin!r}"))
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return _refuse(413, MicrotomeError(_TOO_LARGE))
        return None if self.access.token is None else self._token(scope, headers, self.access.token)

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.access.hosts:
            return True
        return self.access.any_address and _is_address(name)

    def _token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        in_address = dict(query).get("token")
        if in_address is not None and _same(in_address, token) and not scope["path"].startswith("/api/"):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            path = "/" + scope["path"].lstrip("/")  # "//other.site" would lead away
            response = RedirectResponse(f"{path}?{rest}" if rest else path, status_code=303)
            response.set_cookie(COOKIE, token, httponly=True, samesite="lax", path="/")
            return response
        bearer = headers.get("authorization", "").removeprefix("Bearer ").strip()
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        if _same(bearer, token) or _same(cookie, token):
            return None
        return _refuse(401, MicrotomeError("This workbench asks for its token", fix=_HINT))


class _Body:
    """Counts what is received, for bodies that come without a length."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size = receive, 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > MAX_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sending


def _refuse(status: int, error: MicrotomeError) -> Response:
    return JSONResponse(problem(error), status, headers={"Cache-Control": "no-store"})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


_HOST_HINT = "Use http://localhost, or name this host when you start the server (--allow-host)"
_HINT = "Open the address that `microtome serve` printed; it ends in ?token=…"
_TOO_LARGE = f"The request is larger than {MAX_BODY:,} bytes"
