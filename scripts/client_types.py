"""Write the client's TypeScript types from the server's response models: `python scripts/client_types.py`.

Each pydantic model in `microtome.web.schemas` becomes one interface of the same name. `tests/web/test_client_types.py` fails
when the file that is checked in is not what this script writes.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from microtome.web import schemas

TARGET = Path(__file__).parents[1] / "web/client/src/lib/api/types.ts"
HEAD = "// Written by scripts/client_types.py from src/microtome/web/schemas.py. Do not edit.\n"
PLAIN = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}


def typescript() -> str:
    """The whole file: one interface for each model, in the order of the schemas."""
    models = [value for value in vars(schemas).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    return HEAD + "".join(interface(model) for model in models if model not in (BaseModel, schemas.Wire))


def interface(model: type[BaseModel]) -> str:
    """One `export interface`, with the model's docstring above it. Fields with a default may be left out of a request."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    about = " ".join((model.__doc__ or "").split())
    fields = [
        f"  {name}{'' if name in required else '?'}: {type_of(field)};" for name, field in schema["properties"].items()
    ]
    return "\n".join([f"\n/** {about} */", f"export interface {model.__name__} {{", *fields, "}", ""])


def type_of(field: dict[str, Any]) -> str:
    """The TypeScript type of one JSON-schema node."""
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "enum" in field:
        return " | ".join(f'"{value}"' for value in field["enum"])
    if "anyOf" in field:
        return " | ".join(type_of(option) for option in field["anyOf"])
    if field.get("type") == "array":
        inner = type_of(field["items"])
        return f"({inner})[]" if " " in inner else f"{inner}[]"
    if field.get("type") == "object":
        inside = field.get("additionalProperties")
        return f"Record<string, {type_of(inside) if isinstance(inside, dict) else 'unknown'}>"
    return PLAIN[field["type"]]


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(typescript(), encoding="utf-8")
    print(TARGET)
