"""The tiny index, made once for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from microtome.features import FeatureIndex, open_index

from .tiny import make_tiny_index


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_index(tmp_path_factory.mktemp("tiny") / "index")


@pytest.fixture(scope="session")
def tiny_index(tiny_path: Path) -> Iterator[FeatureIndex]:
    with open_index(tiny_path) as index:
        yield index
