"""The client's files: the page for each address, long-lived assets, and what is said when nothing is built."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from microtome.features import FeatureIndex
from microtome.web.server import create_app

from .conftest import BASE


@pytest.fixture
def built(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<title>the page</title>")
    (tmp_path / "assets/index-AbC1.js").write_text("let app = 1;")
    (tmp_path / "icon.svg").write_text("<svg/>")
    return tmp_path


def test_every_address_of_the_client_is_its_page(index: FeatureIndex, built: Path) -> None:
    with TestClient(create_app(index, loader=None, static=built), base_url=BASE) as client:
        for address in ("/", "/index.html", "/features", "/features/12?band=2", "/text?q=a.b", "/who/knows"):
            answer = client.get(address)
            assert (answer.status_code, answer.text) == (200, "<title>the page</title>"), address
            assert answer.headers["cache-control"] == "no-cache"
        asset = client.get("/assets/index-AbC1.js")
        assert "immutable" in asset.headers["cache-control"]
        assert asset.headers["content-type"].startswith("text/javascript")
        assert client.get("/icon.svg").headers["content-type"] == "image/svg+xml"
        assert client.head("/").status_code == 200
        for missing in ("/assets/other.js", "/robots.txt", "/assets/old-hash.css"):
            assert client.get(missing).status_code == 404


def test_without_a_build_the_page_says_how_to_make_one(index: FeatureIndex, tmp_path: Path) -> None:
    with TestClient(create_app(index, loader=None, static=tmp_path / "none"), base_url=BASE) as client:
        answer = client.get("/features")
        assert answer.status_code == 503
        assert "npm run build" in answer.text
        assert client.get("/api/summary").status_code == 200
