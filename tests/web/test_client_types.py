"""The client's TypeScript types are those of the server's answers."""

import importlib.util
from pathlib import Path

from microtome.web import schemas

ROOT = Path(__file__).parents[2]


def test_the_generated_types_are_current() -> None:
    spec = importlib.util.spec_from_file_location("client_types", ROOT / "scripts/client_types.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = script.TARGET.read_text(encoding="utf-8")
    assert written == script.typescript(), "run `python scripts/client_types.py`"
    for name in ("Summary", "FeaturePage", "Feature", "ExamplePage", "Encoded", "EncodeRequest", "Health", "Problem"):
        assert hasattr(schemas, name)
        assert f"export interface {name} {{" in written


def test_the_lock_file_names_no_registry() -> None:
    lock = (ROOT / "web/client/package-lock.json").read_text(encoding="utf-8")
    assert '"integrity": "sha512-' in lock
    assert '"resolved"' not in lock
