"""`microtome COMMAND …`: finds the command's module, parses its options, runs it, prints the result.

1. `COMMANDS` names each command, its module and its summary; so `microtome --help` imports none of them.
2. The chosen module has `Options` (a frozen dataclass that tyro fills), `run(options) -> dict`, `show(result) -> str`.
3. The result goes to standard output, as JSON with `--json`; progress and errors go to standard error.

Exit status: 0 done; 1 a MicrotomeError, a file that cannot be read or written, or a result with `"ok": False`; 2 a command
line that cannot be read; 130 stopped.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import microtome
from microtome.cli.options import CommandOptions, split_commas
from microtome.common.errors import MicrotomeError, unknown_name


@dataclass(frozen=True)
class Command:
    """One line of `microtome --help`. `resumes`: started again, the command goes on from where it was stopped."""

    module: str
    summary: str
    resumes: bool = False


COMMANDS = {
    "demo": Command("microtome.cli.demo", "open the workbench on features of the built-in model", resumes=True),
    "doctor": Command("microtome.cli.doctor", "look at this machine and say what to do about each problem"),
    "models": Command("microtome.cli.models", "list the models that can be opened here"),
    "generate": Command("microtome.cli.generate", "continue prompts, or sample a corpus by a recipe", resumes=True),
    "lens": Command("microtome.cli.lens", "what a model would say at each depth: logit lens or tuned lens"),
    "tune-lens": Command("microtome.cli.tune_lens", "train a tuned lens for a model"),
    "heads": Command("microtome.cli.heads", "which attention heads do what: induction, previous token and others"),
    "patch": Command(
        "microtome.cli.patch", "patch activations or paths between two prompts, and see which carry the answer"
    ),
    "attribute": Command("microtome.cli.attribute", "estimate which parts or edges a task depends on"),
    "circuit": Command("microtome.cli.circuit", "find the circuit of a task, and measure how faithful it is"),
    "harvest": Command("microtome.cli.harvest", "run a model over text and keep its activations", resumes=True),
    "train": Command("microtome.cli.train", "train a dictionary on activations", resumes=True),
    "train-lm": Command("microtome.cli.train_lm", "train a small language model from nothing", resumes=True),
    "evaluate": Command("microtome.cli.evaluate", "measure a dictionary on text it was not trained on"),
    "compare": Command("microtome.cli.compare", "measure several dictionaries side by side, and draw their trade-off"),
    "convert": Command("microtome.cli.convert", "read a dictionary of any format and write it as SAELens does"),
    "index": Command(
        "microtome.cli.index", "one pass over text: statistics and examples of every latent", resumes=True
    ),
    "serve": Command("microtome.cli.serve", "look at a feature index in the browser"),
    "replicate": Command("microtome.cli.replicate", "measure a paper's claims again on a model"),
    "bench": Command("microtome.cli.bench", "measure speeds against other tools, side by side"),
}
_KEPT = "What was finished is kept: run the same command again to go on."


@runtime_checkable
class CommandModule(Protocol):
    """What a command's module holds."""

    Options: type[CommandOptions]
    run: Callable[[CommandOptions], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` without the program by default) and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"microtome {microtome.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(f"microtome: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    return _run(name, rest)


def usage() -> str:
    """The text of `microtome --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    more = "`microtome COMMAND --help` lists a command's options; `microtome --version` says which Microtome this is."
    return f"usage: microtome COMMAND [options]\n\n{rows}\n\n{more}"


def load_command(name: str) -> CommandModule:
    """Import the module of the command `name`."""
    return cast(CommandModule, importlib.import_module(COMMANDS[name].module))


def parse(name: str, arguments: Sequence[str]) -> CommandOptions:
    """The options of the command `name`, from its part of the command line. Raises SystemExit when it cannot be
    read."""
    import tyro

    options = load_command(name).Options
    return tyro.cli(
        options,
        prog=f"microtome {name}",
        args=split_commas(options, arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _run(name: str, arguments: Sequence[str]) -> int:
    try:
        options = parse(name, arguments)
        command = load_command(name)
        result = command.run(options)
        print(json.dumps(result, ensure_ascii=False, default=str) if options.json else command.show(result), flush=True)
    except MicrotomeError as error:
        print(f"microtome {name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"microtome {name}: {error.strerror or error}. Got: {error.filename or 'no file name'}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = _KEPT if COMMANDS[name].resumes else "Nothing was changed."
        print(f"\nmicrotome {name}: stopped. {kept}", file=sys.stderr)
        return 130
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
