"""Texts through a model that the server loads itself: what fires, what is refused, what is said when it cannot load."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from microtome.features import FeatureIndex, open_index
from microtome.web.encoder import MAX_CHARACTERS, MAX_TOKENS, MAX_WAITING, Loader, index_loader
from microtome.web.server import create_app

from .conftest import BASE
from .live import K


def workbench(index: FeatureIndex, loader: Loader) -> TestClient:
    return TestClient(create_app(index, loader=loader), base_url=BASE)


@pytest.fixture(scope="module")
def live(live_path: Path) -> Iterator[TestClient]:
    with open_index(live_path) as index, workbench(index, index_loader(index)) as client:
        yield client


def test_what_fires_is_what_the_library_says(live: TestClient, live_path: Path) -> None:
    assert live.get("/api/health").json()["encoder"]["status"] == "not loaded"
    text = "The court held 🙂 that\n<b>sugar</b>"
    answer = live.post("/api/encode", json={"text": text, "k": 5})
    assert answer.status_code == 200
    found = answer.json()
    with open_index(live_path) as index:
        plain = index.top_features(text)
    assert found["tokens"] == plain.tokens
    assert found["skipped"] == 1
    assert found["firings"][0] == []
    for firings, expected in zip(found["firings"], plain.features, strict=True):
        assert [(f["feature"], f["value"]) for f in firings] == [(i, pytest.approx(v)) for i, v in expected[:5]]
    assert live.get("/api/health").json()["encoder"]["status"] == "ready"
    assert answer.headers["cache-control"] == "no-store"


def test_features_of_the_text_come_strongest_first(live: TestClient) -> None:
    found = live.post("/api/encode", json={"text": "She laughed and waved", "k": K}).json()
    peaks = [feature["peak"] for feature in found["features"]]
    assert peaks == sorted(peaks, reverse=True)
    for feature in found["features"]:
        values = [
            firing["value"] if firing else 0.0
            for firing in (
                next((f for f in firings if f["feature"] == feature["feature"]), None) for firings in found["firings"]
            )
        ]
        assert max(values) == feature["peak"] == values[feature["at"]]
        assert sum(value > 0 for value in values) == feature["n_tokens"]


def test_long_texts_are_refused_before_the_model_sees_them(live: TestClient) -> None:
    characters = live.post("/api/encode", json={"text": "a" * (MAX_CHARACTERS + 1)})
    assert characters.status_code == 400
    assert f"at most {MAX_CHARACTERS:,}" in characters.json()["error"]["expected"]
    tokens = live.post("/api/encode", json={"text": "🜚" * (MAX_TOKENS // 2)})
    assert tokens.status_code == 400
    assert "tokens" in tokens.json()["error"]["got"]
    assert (
        live.post("/api/encode", json={"text": "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")}).status_code
        == 200
    )


def test_a_lone_surrogate_is_no_crash(live: TestClient) -> None:
    body = b'{"text": "a\\ud800b"}'
    answer = live.post("/api/encode", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 422)


@pytest.mark.parametrize("name", ["sae", "another-name"])
def test_a_dictionary_that_moved_with_its_index_is_found(name: str, live_path: Path, tmp_path: Path) -> None:
    shutil.copytree(live_path, tmp_path / "index")
    shutil.copytree(live_path.parent / "sae", tmp_path / name)
    with open_index(tmp_path / "index") as index, workbench(index, index_loader(index)) as client:
        object.__setattr__(index.record, "dictionary", "/nowhere/sae")
        assert client.post("/api/encode", json={"text": "wind"}).status_code == 200


def test_a_model_that_cannot_be_opened_is_named_and_browsing_goes_on(live_path: Path, tmp_path: Path) -> None:
    shutil.copytree(live_path, tmp_path / "index")  # alone: no dictionary is beside it
    with open_index(tmp_path / "index") as index, workbench(index, index_loader(index)) as client:
        object.__setattr__(index.record, "dictionary", "/nowhere/at-all")
        answer = client.post("/api/encode", json={"text": "wind"})
        assert answer.status_code == 503
        assert "/nowhere/at-all" in answer.json()["error"]["message"]
        state = client.get("/api/health").json()["encoder"]
        assert state["status"] == "unavailable"
        assert "/nowhere/at-all" in state["reason"]
        assert client.get("/api/features/1").status_code == 200


def test_a_crash_in_the_loader_is_an_answer_too(live_path: Path) -> None:
    def loader() -> None:
        raise OSError("the disk went away")

    with open_index(live_path) as index, workbench(index, loader) as client:  # type: ignore[arg-type]
        answer = client.post("/api/encode", json={"text": "wind"})
        assert answer.status_code == 503
        assert "the disk went away" in answer.json()["error"]["message"]
        assert client.get("/api/health").json()["encoder"]["waiting"] == 0


def test_a_full_queue_refuses_and_browsing_goes_on(live_path: Path) -> None:
    gate = threading.Event()

    def slow_loader():  # type: ignore[no-untyped-def]
        assert gate.wait(60)
        return index_loader(index)()

    with (
        open_index(live_path) as index,
        workbench(index, slow_loader) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        waiting = [pool.submit(client.post, "/api/encode", json={"text": f"text {i}"}) for i in range(MAX_WAITING)]
        while client.get("/api/health").json()["encoder"]["waiting"] < MAX_WAITING:
            pass
        assert client.get("/api/health").json()["encoder"]["status"] == "loading"
        refused = client.post("/api/encode", json={"text": "one more"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2"
        assert "busy" in refused.json()["error"]["what"]
        assert client.get("/api/features/1").status_code == 200
        gate.set()
        assert {answer.result().status_code for answer in waiting} == {200}
        assert client.get("/api/health").json()["encoder"]["waiting"] == 0
