"""Serves the built client: its files, and its one page for every address that is a page of the client.

The files are listed once, at the start. A request is looked up in that list and never joined to a path, so no request can leave the
folder.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, HTMLResponse, Response

from microtome.web.problems import NotFoundError

STATIC = Path(__file__).parent / "static"
_FOREVER = "public, max-age=31536000, immutable"


def make_client_router(folder: Path = STATIC) -> APIRouter:
    """The routes of the client built in `folder`; if it is not there, each page says how to build it."""
    files = {f"/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
    page = files.get("/index.html")
    router = APIRouter(include_in_schema=False)

    @router.api_route("/{path:path}", methods=["GET", "HEAD"])
    def client(path: str) -> Response:
        address = f"/{path}"
        if address in files and address != "/index.html":
            # Files under assets/ have a hash of their content in their names.
            cache = _FOREVER if address.startswith("/assets/") else "no-cache"
            return FileResponse(files[address], headers={"Cache-Control": cache})
        last = address.rsplit("/", 1)[-1]
        if path.startswith("api/") or path == "api" or ("." in last and address != "/index.html"):
            raise NotFoundError("There is nothing here", got=address)
        if page is None:
            return HTMLResponse(_NOT_BUILT, 503, headers={"Cache-Control": "no-store"})
        return FileResponse(page, headers={"Cache-Control": "no-cache"})

    return router


_NOT_BUILT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Microtome</title></head>
<body><h1>The workbench's pages are not built yet</h1>
<p>In a checkout of the repository, with Node.js 20 or later, run</p>
<pre>cd web/client
npm ci
npm run build</pre>
<p>and start the server again. An installed package brings its pages with it. The API works without them:
see <a href="/api/summary">/api/summary</a>.</p></body></html>
"""
