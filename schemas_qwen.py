"""Tools as the model is told of them: names, descriptions, JSON schemas, and checking arguments against these."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import get_json_schema

# The checkpoints were trained on these words and spaces.
_TOOL = (
    "{name_for_model}: Call this tool to interact with the {name_for_human} API. What is the {name_for_human} API "
    "useful for? {description} Parameters: {parameters} Format the arguments as a JSON object."
)
_NO_ARGUMENTS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """What the model is told about a tool, and how it is run.

    Args:
        name: what the model calls it.
        description: what it is good for.
        parameters: JSON schema of an object; or a list in the older form, `[{"name", "description", "required",
            "schema"}, …]`.
        function: what `run_tools` calls, with the arguments by their names; None where a tool is only described.
        name_for_human: a second name in the prompt; default: `name`.

    Raises:
        ValueError: a name or a schema that can't be one.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] = field(default_factory=lambda: _NO_ARGUMENTS)
    function: Callable[..., Any] | None = None
    name_for_human: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name != " ".join(self.name.split()):
            raise ValueError(f"The tool name {self.name!r} must be a text on one line, without spaces around it.")
        for part, value in (("description", self.description), ("name_for_human", self.name_for_human)):
            if not isinstance(value, str):
                raise ValueError(f"{part}={value!r:.80} of the tool {self.name!r} must be a text.")
        if self.function is not None and not callable(self.function):
            raise ValueError(f"function={self.function!r:.80} of the tool {self.name!r} can't be called.")
        if inspect.iscoroutinefunction(self.function):
            raise ValueError(f"The function of the tool {self.name!r} is async: wrap it in one that waits for it.")
        try:
            self.unchecked()  # what can't be a schema is an error here, not when a call is read
            json.dumps(self.parameters)
        except (TypeError, AttributeError, KeyError, ValueError, RecursionError, re.error) as error:
            raise ValueError(
                f"parameters={self.parameters!r:.200} of {self.name!r} is no JSON schema: {error}"
            ) from None

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of the arguments, whichever form `parameters` has."""
        if isinstance(self.parameters, Mapping):
            return self.parameters or _NO_ARGUMENTS
        return {
            "type": "object",
            "properties": {parameter["name"]: parameter.get("schema", {}) for parameter in self.parameters},
            "required": [parameter["name"] for parameter in self.parameters if parameter.get("required")],
        }

    def unchecked(self) -> list[str]:
        """Keywords of the schema that `faults` leaves unchecked."""
        if self.schema.get("type", "object") != "object":
            raise ValueError(f"type={self.schema['type']!r} must be 'object', with the arguments by their names")
        return sorted(set(_unchecked(self.schema)))

    def faults(self, arguments: Any) -> list[str]:
        """What is wrong with arguments, by the schema; empty where nothing is."""
        # Whatever else a schema allows in their place: a function is called with an object's names.
        return list(_faults(arguments, {**self.schema, "type": "object", "nullable": False}, "the arguments"))

    def describe(self) -> str:
        """The paragraph of the prompt."""
        return _TOOL.format(
            name_for_model=self.name,
            name_for_human=self.name_for_human or self.name,
            description=self.description,
            parameters=json.dumps(self.parameters, ensure_ascii=False),
        )


def as_tools(tools: Iterable[Any]) -> dict[str, Tool]:
    """Tools by their names.

    Args:
        tools: each a `Tool`, a function with type hints and a docstring in Google's style, a schema in OpenAI's form
            (`{"type": "function", "function": {…}}` or what is in it), or a description in QWen's older form
            (`name_for_model`, `name_for_human`, `description_for_model`, `parameters`).

    Raises:
        ValueError: none, two of one name, or something else.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise ValueError(f"tools={tools!r:.80} must be a list of tools.")
    named: dict[str, Tool] = {}
    for given in tools:
        tool = _as_tool(given)
        if tool.name in named:
            raise ValueError(f"Two tools have the name {tool.name!r}: rename one of them.")
        named[tool.name] = tool
    if not named:
        raise ValueError("tools=[] has no tool in it: give one, or None to talk without tools.")
    return named


def _as_tool(given: Any) -> Tool:
    if isinstance(given, Tool):
        return given
    function = None
    if callable(given):
        function = given
        try:
            given = get_json_schema(given)
        except Exception as error:  # two kinds of its own, and whatever a strange type hint raises
            raise ValueError(
                f"No schema can be made of {function!r:.80}: {error} Give it type hints and a docstring with `Args:`, "
                "or pass Tool(name, description, parameters, function)."
            ) from error
    inner = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(inner, Mapping):
        raise ValueError(f"tools has the entry {given!r:.80}: each must be a function, a JSON schema or a Tool.")
    name = inner.get("name_for_model", inner.get("name"))
    return Tool(
        name=name,
        description=inner.get("description_for_model", inner.get("description")) or "",
        parameters=_NO_ARGUMENTS if inner.get("parameters") is None else inner["parameters"],
        function=function,
        name_for_human=inner.get("name_for_human") or "",
    )


# --- checking against a schema ---

_TYPES: dict[str, type | tuple[type, ...]] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "null": type(None),
    "number": (int, float),
    "object": dict,
    "string": str,
}
_LIMITS: dict[str, tuple[type | tuple[type, ...], Callable[[Any, Any], bool]]] = {
    "exclusiveMaximum": ((int, float), lambda value, limit: value < limit),
    "exclusiveMinimum": ((int, float), lambda value, limit: value > limit),
    "maxItems": (list, lambda value, limit: len(value) <= limit),
    "maxLength": (str, lambda value, limit: len(value) <= limit),
    "maximum": ((int, float), lambda value, limit: value <= limit),
    "minItems": (list, lambda value, limit: len(value) >= limit),
    "minLength": (str, lambda value, limit: len(value) >= limit),
    "minimum": ((int, float), lambda value, limit: value >= limit),
    "pattern": (str, lambda value, limit: re.search(limit, value) is not None),
}
"""Keyword -> what it applies to, and whether a value keeps to it."""
_NESTED = {"additionalProperties", "anyOf", "enum", "items", "nullable", "properties", "required", "type"}
_ANNOTATIONS = {"$schema", "default", "deprecated", "description", "examples", "title"}


def _unchecked(schema: Mapping[str, Any]) -> Iterator[str]:
    """Keywords of a schema, and of those in it, that are no check of `_faults`; raises where it can't be a schema."""
    yield from schema.keys() - _LIMITS.keys() - _NESTED - _ANNOTATIONS
    for keyword in schema.keys() & _LIMITS.keys():
        _LIMITS[keyword][1]({str: "", list: []}.get(_LIMITS[keyword][0], 0), schema[keyword])  # type: ignore[call-overload]
    yield from (f"type {name}" for name in _type_names(schema) if name not in _TYPES)
    for keyword in ("enum", "required"):
        if not isinstance(schema.get(keyword, []), (list, tuple)):
            raise ValueError(f"{keyword}={schema[keyword]!r:.80} must be a list")
    if not all(isinstance(name, str) for name in (*_type_names(schema), *schema.get("required", []))):
        raise ValueError("type and required must hold texts")
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]
    inner += [
        schema[name] for name in ("items", "additionalProperties") if not isinstance(schema.get(name, True), bool)
    ]
    for part in inner:
        yield from _unchecked(part)


def _type_names(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else list(names)


def _faults(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    if value is None and schema.get("nullable"):
        return
    names = _type_names(schema)
    if names and not any(_is_of_type(value, name) for name in names):
        yield f"{place} must be of type {' or '.join(names)}, got {value!r:.80}"
        return
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        yield f"{place} must be one of {list(schema['enum'])}, got {value!r:.80}"
    if "anyOf" in schema and all(any(_faults(value, choice, place)) for choice in schema["anyOf"]):
        yield f"{place} fits none of the forms in {list(schema['anyOf'])!r:.200}, got {value!r:.80}"
    for keyword in sorted(schema.keys() & _LIMITS.keys()):
        kind, keeps = _LIMITS[keyword]
        if isinstance(value, kind) and not isinstance(value, bool) and not keeps(value, schema[keyword]):
            yield f"{place} has {keyword} {schema[keyword]!r}, got {value!r:.80}"
    if isinstance(value, dict):
        yield from _faults_of_object(value, schema, place)
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for index, item in enumerate(value):
            yield from _faults(item, schema["items"], f"{place}[{index}]")


def _faults_of_object(value: dict[str, Any], schema: Mapping[str, Any], place: str) -> Iterator[str]:
    properties = schema.get("properties")
    yield from (f"{place} lack {name!r}" for name in schema.get("required", []) if name not in value)
    # JSON schema lets unknown names pass where it says nothing of them; a function can't take them.
    others = schema.get("additionalProperties", properties is None)
    for name, item in value.items():
        if name in (properties or {}):
            yield from _faults(item, properties[name], f"{name!r}")  # type: ignore[index]
        elif isinstance(others, Mapping):
            yield from _faults(item, others, f"{name!r}")
        elif not others:
            yield f"{place} have the unknown name {name!r:.80}; known are {list(properties or ())}"


def _is_of_type(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name != "boolean":
        return name not in _TYPES
    return name not in _TYPES or isinstance(value, _TYPES[name])


def _same(value: Any, choice: Any) -> bool:
    return bool(value == choice) and isinstance(value, bool) == isinstance(choice, bool)
