"""`microtome serve INDEX`: the workbench over a feature index, until Ctrl-C."""

import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtome.cli.doors import door
from microtome.cli.options import CommandOptions


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Look at a feature index in the browser. Ctrl-C stops the server."""

    index: Annotated[Path, tyro.conf.Positional]
    """The folder that `microtome index` wrote."""
    host: str = "127.0.0.1"
    """The address to listen on. Any other than this machine's own asks every visitor for a random token."""
    port: int = 8700
    """The port to listen on; 0 takes any that is free."""
    open: bool = False
    """Open the page in the browser."""
    no_model: bool = False
    """Never load the model: browse only, without the text box."""
    allow_host: tuple[str, ...] = ()
    """Further names by which the server may be reached, when it stands behind another one."""


def run(options: Options) -> dict[str, Any]:
    """Serve until stopped."""
    serve = door("workbench", extra="web")
    addresses: list[str] = []

    def ready(address: str) -> None:
        addresses.append(address)
        print(f"The workbench is ready; Ctrl-C stops it. Open\n{address}", file=sys.stderr, flush=True)
        if options.open:
            webbrowser.open(address)

    serve(
        options.index,
        host=options.host,
        port=options.port,
        allow_hosts=options.allow_host,
        model=not options.no_model,
        ready=ready,
    )
    return {"address": addresses[0] if addresses else None, "stopped": True}


def show(result: dict[str, Any]) -> str:
    """What is said when the server has stopped."""
    return "Stopped."
