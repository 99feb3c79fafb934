"""From a JSON schema to a GBNF grammar, for engines that speak GBNF.

`llama_cpp.llama_grammar` converts, but passes silently over what it can't hold and lets two things through
that are no JSON; this module refuses the one and mends the other. Imports `llama_cpp` when first used.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from uvm.mind.backends import Schema

_SAY_NOTHING = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_DEFINITIONS = {"$defs", "definitions"}
# What the converter holds: of each schema it looks at one of these groups and at nothing beside it.
_GROUPS: tuple[set[str], ...] = (
    {"$ref"},
    {"anyOf"},
    {"oneOf"},
    {"type", "const"},
    {"type", "enum"},
    {"type", "properties", "required", "additionalProperties"},
    {"type", "items", "minItems", "maxItems"},
    {"type", "prefixItems"},
    {"type", "pattern"},
    {"type", "format"},
    {"type", "minLength", "maxLength"},
)
_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_FORMATS = {"date", "time", "date-time", "uuid"}
_LITERAL_ESCAPES = {"\\": "\\\\", '"': '\\"', "\r": "\\r", "\n": "\\n"}


def grammar_of(schema: Schema) -> str:
    """Returns the grammar of all JSON texts that follow `schema`.

    Objects are closed unless `additionalProperties` opens them, and their properties come in the schema's
    order, the required ones first.

    Raises:
        ValueError: the grammar can't hold part of the schema; the text says which.
    """
    _check(schema, "schema")
    return _convert(json.dumps(schema))


def _check(schema: Any, path: str) -> None:
    if not isinstance(schema, dict):
        raise ValueError(f"{path} is no object")
    keywords = schema.keys() - _SAY_NOTHING - _DEFINITIONS
    if not any(keywords <= group for group in _GROUPS):
        raise ValueError(f"{path}: a grammar can't hold {', '.join(sorted(keywords))} together")
    if keywords & {"minItems", "maxItems"} and "items" not in keywords:
        raise ValueError(f"{path}: minItems and maxItems need items")
    if unknown := {*_listed(schema.get("type"))} - _TYPES:
        raise ValueError(f"{path}: no such type: {', '.join(map(str, unknown))}")
    if unknown := {*_listed(schema.get("format"))} - _FORMATS:
        raise ValueError(f"{path}: a grammar can't hold the format {', '.join(map(str, unknown))}")
    for name, child in _children(schema):
        _check(child, f"{path}.{name}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _children(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for keyword in ("properties", *_DEFINITIONS):
        found += schema.get(keyword, {}).items()
    for keyword in ("anyOf", "oneOf", "prefixItems"):
        found += [(f"{keyword}[{index}]", child) for index, child in enumerate(schema.get(keyword, []))]
    if "items" in schema:
        found.append(("items", schema["items"]))
    if not isinstance(schema.get("additionalProperties", False), bool):
        found.append(("additionalProperties", schema["additionalProperties"]))
    return found


@lru_cache(maxsize=64)
def _convert(schema: str) -> str:
    from llama_cpp.llama_grammar import SchemaConverter

    converter = SchemaConverter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    converter._format_literal = _literal  # its own leaves backslashes unescaped
    try:
        converter.visit(converter.resolve_refs(json.loads(schema), ""), "")
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"a grammar can't hold this schema: {error}") from None
    # Its strings may hold raw line ends, which JSON forbids.
    return str(converter.format_grammar()).replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')


def _literal(text: str) -> str:
    """Returns a JSON text as a literal of the grammar, in the letters in which a model would write it."""
    text = json.dumps(json.loads(text), ensure_ascii=False)
    return '"' + re.sub(r'[\\"\r\n]', lambda match: _LITERAL_ESCAPES[match.group()], text) + '"'
