"""Configs to JSON and back, strictly."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from microtome.common.config import check_choices, difference, from_dict, require, to_dict
from microtome.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Knife:
    """A nested part."""

    width: float = 0.5
    kind: Literal["steel", "glass"] = "steel"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One field of every type that configs use."""

    depth: int
    name: str | None = None
    knife: Knife = Knife()
    layers: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = field(default_factory=dict)
    threshold: int | float = 1
    extra: Any = None
    dry: bool = False

    def __post_init__(self) -> None:
        require(self.depth > 0, "depth must be positive", got=self.depth)


FULL = Cut(
    depth=3, name="a", knife=Knife(width=2.0, kind="glass"), layers=(4,), weights={"x": 1.0}, extra=[1, {"k": None}]
)


@pytest.mark.parametrize("config", [Cut(depth=1), FULL])
def test_round_trip_through_json(config: Cut) -> None:
    assert from_dict(Cut, json.loads(json.dumps(to_dict(config)))) == config


def test_plain_values() -> None:
    assert to_dict(FULL)["layers"] == [4]
    assert to_dict(FULL)["knife"] == {"width": 2.0, "kind": "glass"}
    assert to_dict(Cut(depth=1, extra=Path("a/b")))["extra"] == "a/b"


@pytest.mark.parametrize("value", [{"depth": 1}, Cut, None])
def test_only_instances_are_saved(value: object) -> None:
    with pytest.raises(ConfigError, match="dataclass instance"):
        to_dict(value)


def test_an_integer_is_a_float_but_not_the_other_way() -> None:
    width = from_dict(Knife, {"width": 2}).width
    assert isinstance(width, float)
    with pytest.raises(ConfigError, match=r"Cut\.depth has the wrong type. Got: 1\.5. Expected: int"):
        from_dict(Cut, {"depth": 1.5})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"depht": 1}, "Unknown key 'depht' in Cut.*Did you mean 'depth'"),
        ({}, "Cut lacks depth"),
        ({"depth": True}, r"Cut\.depth has the wrong type"),
        ({"depth": "3"}, r"Cut\.depth has the wrong type. Got: '3'"),
        ({"depth": 0}, "depth must be positive. Got: 0"),
        ({"depth": 1, "name": 4}, r"Cut\.name has the wrong type"),
        ({"depth": 1, "knife": {"kind": "wood"}}, r"Knife\.kind has a value that it cannot take. Got: 'wood'"),
        ({"depth": 1, "knife": {"wide": 1}}, "Unknown key 'wide' in Knife.*Did you mean 'width'"),
        ({"depth": 1, "layers": ["a"]}, r"Cut\.layers has the wrong type"),
        ({"depth": 1, "layers": 3}, r"Cut\.layers has the wrong type"),
        ({"depth": 1, "weights": {"x": "heavy"}}, r"Cut\.weights has the wrong type"),
    ],
)
def test_bad_data_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Cut, data)


def test_difference_names_each_value_with_its_path() -> None:
    there = to_dict(FULL)
    asked = to_dict(Cut(depth=3, name="b", knife=Knife(width=2.0), layers=(4,), weights={"x": 1.0}, extra=None))
    assert difference(there, asked) == [
        "extra: [1, {'k': None}] there, None asked for",
        "knife.kind: 'glass' there, 'steel' asked for",
        "name: 'a' there, 'b' asked for",
    ]
    assert difference(there, there) == []


def test_difference_sees_absent_keys() -> None:
    assert difference({"a": 1}, {"b": 2}) == ["a: 1 there, None asked for", "b: None there, 2 asked for"]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A config that looks at its choices itself."""

    kind: Literal["steel", "glass"] = "steel"
    width: float = 0.5

    def __post_init__(self) -> None:
        check_choices(self)


def test_a_config_made_in_python_takes_no_other_choice() -> None:
    assert Checked(kind="glass").kind == "glass"
    with pytest.raises(ConfigError, match=r"Checked.kind has a value .* 'wood'.*steel"):
        Checked(kind="wood")  # type: ignore[arg-type]
