"""Entities and their attributes, for disentanglement: a small table of cities, or a user's own.

A user's file is JSONL, one entity a line: `{"entity": "Paris", "attributes": {"country": "France", …}}`, and, in lines of
their own, the prompts: `{"attribute": "country", "prompt": "{entity} is a city in the country of"}`. The first token of
an attribute's value, with a space before it, is the answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from microtome.common.errors import InputError

_PLACE = "{entity}"


@dataclass(frozen=True, kw_only=True)
class Entities:
    """`values[entity][attribute]`, and a prompt with `{entity}` in it for each attribute."""

    name: str
    values: Mapping[str, Mapping[str, str]]
    prompts: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(self.prompts) < 2 or len(self.values) < 4:
            raise InputError(
                f"{self.name}: disentanglement needs two attributes with prompts, and four entities",
                got=f"{len(self.prompts)} prompts, {len(self.values)} entities",
            )
        for attribute, prompt in self.prompts.items():
            if prompt.count(_PLACE) != 1:
                raise InputError(f"{self.name}: a prompt needs {_PLACE} once", got=prompt)
            lacking = [entity for entity, values in self.values.items() if attribute not in values]
            if lacking:
                raise InputError(f"{self.name}: entities lack {attribute}", got=", ".join(lacking[:5]))


_CITIES = """
France Europe French: Paris Lyon Marseille Bordeaux
Germany Europe German: Berlin Munich Hamburg Cologne
Italy Europe Italian: Milan Naples Turin Florence
Spain Europe Spanish: Madrid Barcelona Seville Valencia
Russia Europe Russian: Moscow Kazan Sochi Smolensk
England Europe English: London Manchester Liverpool Leeds
Japan Asia Japanese: Tokyo Osaka Kyoto Nagoya
China Asia Chinese: Beijing Shanghai Wuhan Nanjing
Egypt Africa Arabic: Cairo Alexandria Luxor Aswan
Canada America English: Toronto Vancouver Ottawa Calgary
USA America English: Chicago Boston Seattle Dallas
Mexico America Spanish: Guadalajara Monterrey Tijuana Cancun
"""


def cities() -> Entities:
    """Four cities of each of a dozen countries: country, continent, language."""
    values: dict[str, dict[str, str]] = {}
    for line in _CITIES.strip().splitlines():
        about, _, names = line.partition(":")
        values |= {
            name: dict(zip(("country", "continent", "language"), about.split(), strict=True)) for name in names.split()
        }
    return Entities(
        name="cities",
        values=values,
        prompts={
            "country": "Rome is a city in the country of Italy. Seoul is a city in the country of Korea."
            " {entity} is a city in the country of",
            "continent": "Rome is a city on the continent of Europe. Seoul is a city on the continent of Asia."
            " {entity} is a city on the continent of",
            "language": "In the city of Rome, people speak Italian. In the city of Seoul, people speak Korean."
            " In the city of {entity}, people speak",
        },
    )


def read_entities(path: str | Path) -> Entities:
    """Entities and prompts from a JSONL file. Raises InputError for one that is not there or does not hold both."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}", expected="JSONL with entities and prompts")
    values: dict[str, dict[str, str]] = {}
    prompts: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "prompt" in row:
                prompts[row["attribute"]] = row["prompt"]
            else:
                values[row["entity"]] = {str(k): str(v) for k, v in row["attributes"].items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number} is neither an entity nor a prompt",
                got=line[:80],
                expected='{"entity": …, "attributes": {…}} or {"attribute": …, "prompt": …}',
            ) from error
    return Entities(name=path.stem, values=values, prompts=prompts)
