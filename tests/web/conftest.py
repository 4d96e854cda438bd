"""What the server's tests share: the tiny index, a client in process, and a hostile copy of the index."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from microtome.features import FeatureIndex, open_index
from microtome.web.server import create_app

from ..features.tiny import make_tiny_index  # noqa: TID252 – tests share their tiny index

BASE = "http://127.0.0.1:8700"


@pytest.fixture(scope="session")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_index(tmp_path_factory.mktemp("web") / "index")


@pytest.fixture(scope="session")
def index(index_path: Path) -> Iterator[FeatureIndex]:
    with open_index(index_path) as index:
        yield index


@pytest.fixture(scope="session")
def client(index: FeatureIndex) -> Iterator[TestClient]:
    """The workbench without a model, as a browser on this machine sees it."""
    with TestClient(create_app(index, loader=None), base_url=BASE) as client:
        yield client


@pytest.fixture(scope="session")
def live_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with its model and dictionary beside it."""
    from .live import make_live_index  # needs torch, which most of these tests do not

    return make_live_index(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="session")
def hostile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny index with a token and a document whose names are markup."""
    from .live import make_hostile_index

    return make_hostile_index(tmp_path_factory.mktemp("hostile") / "index")
