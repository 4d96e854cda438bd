"""Prints `constraints.txt`: the installed version of every package that `microtome[dev]` needs, directly or not.

Run it in an environment where `pip install -e '.[dev]'` was done and the tests pass.
"""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAD = """\
# The exact versions that `make` and the continuous integration install. To renew: make an empty virtual environment,
# `pip install -e '.[dev]'`, run the tests, and write down the closure with `python scripts/pin.py > constraints.txt`.
# torch is pinned by version alone, so that the index's own build (CPU or CUDA) is taken."""
LEFT_OUT = {"microtome", "setuptools", "pip"}


def closure(package: str, extra: str) -> dict[str, str]:
    """Package name → version, over everything that `package[extra]` pulls in here."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(package, ""), (package, extra)]
    while waiting:
        name, asked = waiting.pop()
        if (name, asked) in seen:
            continue
        seen.add((name, asked))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        versions[name] = found.version.partition("+")[0]
        for line in found.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": asked}):
                waiting += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return versions


if __name__ == "__main__":
    print(HEAD)
    for name, version in sorted(closure("microtome", "dev").items()):
        if name not in LEFT_OUT:
            print(f"{name}=={version}")
