"""The door: exit statuses, what goes to which stream, and that a stopped command says so."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import microtome
from microtome.cli import bench, harvest, train
from microtome.cli.main import main, parse
from microtome.cli.options import lines, size

MICROTOME = [sys.executable, "-m", "microtome.cli.main"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MICROTOME, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out.startswith("usage: microtome COMMAND")


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"microtome {microtome.__version__}\n"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docter"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Did you mean 'doctor'" in err


@pytest.mark.parametrize("arguments", [["--timeuot", "3"], ["--timeout", "soon"], ["extra"]])
def test_unreadable_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert arguments[-1] in err or arguments[0] in err


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--help"])
    assert caught.value.code == 0
    assert "--timeout FLOAT" in capsys.readouterr().out


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert all(model["name"] in text for model in result["built_in"])
    assert result["cache_folder"] in text


def test_an_error_is_a_message_without_a_traceback() -> None:
    failed = run("generate")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr == "microtome generate: Say either a prompt, --prompts FILE or --recipe FILE.\n"


def test_ctrl_c_is_said_and_is_130() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a hub that never answers
        silent.settimeout(120)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        command = [*MICROTOME, "doctor", "--timeout", "100"]
        with (
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as stopped,
            silent.accept()[0],
        ):
            stopped.send_signal(signal.SIGINT)
            _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "microtome doctor: stopped." in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [*MICROTOME, "doctor", "--offline"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_installed_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("microtome")
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout == f"microtome {microtome.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        "--hooks a b --out c",
        "--hooks a,b --out c",
        "--out c --hooks=a,b",
        "--out c --hooks a, b",
        "--out=c --hooks ,a,b",
    ],
)
def test_several_values_have_spaces_or_commas_between(words: str) -> None:
    options = parse("harvest", words.split())
    assert isinstance(options, harvest.Options)
    assert (options.hooks, options.out) == (("a", "b"), Path("c"))


def test_which_commas_separate() -> None:
    sized = parse("bench", ["train", "--set", "rounds=3,corpus=a,b,lr=0.1", "model=c"])
    assert isinstance(sized, bench.Options)
    assert (sized.name, sized.set) == ("train", ("rounds=3", "corpus=a,b", "lr=0.1", "model=c"))
    logged = parse("train", ["--log_to", "tensorboard,wandb", "--out", "a,b"])
    assert isinstance(logged, train.Options)
    assert (logged.log_to, logged.out) == (("tensorboard", "wandb"), Path("a,b"))
    with pytest.raises(SystemExit):
        parse("train", ["--log-to", "tensorboard,paper", "--out", "a"])


def test_lines() -> None:
    result = {"out": "runs/x", "n_tokens": 1_234_567, "fvu": 0.12345, "ok": True, "names": ["a", "b"], "none": None}
    assert lines(result | {"rates": {"cpu": 2.0}}) == (
        "out       runs/x\nn tokens  1,234,567\nfvu       0.1235\nok        yes\nnames     a, b\nrates     cpu 2"
    )
    assert lines({}) == ""


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 bytes"), (999, "999 bytes"), (98_000_000, "98 MB"), (1.44e9, "1.4 GB"), (5e12, "5000.0 GB")]
)
def test_size(n: float, text: str) -> None:
    assert size(n) == text
