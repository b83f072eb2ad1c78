"""msgspec's validation errors as one sentence: the field, what it accepts, and the value."""

import re
from typing import Any, Final

import msgspec
from msgspec import inspect

MAX_VALUE: Final = 80
"""Characters of a value that are quoted."""


def explain(error: msgspec.ValidationError, kind: type, given: object) -> str:
    """The sentence for an error of decoding `given` as `kind`. given: builtin types, or `...` if unknown."""
    what, _, place = str(error).partition(" - at `$")
    path = place.strip("`.")
    wanted: inspect.Type = inspect.type_info(kind)
    for step in re.findall(r"[^.\[\]]+", path):
        wanted, given = _below(wanted, given, step)
    if "unknown field" in what:
        struct = _struct(wanted)
        fields = () if struct is None else struct.fields
        known = ", ".join(f"`{field.encode_name}`" for field in fields) or "none"
        return f"unknown field {what.rpartition(' ')[2]}{f' in `{path}`' if path else ''}: known are {known}"
    if "missing required field" in what:
        return f"{f'`{path}`' if path else 'the object'} lacks the field {what.rpartition(' ')[2]}"
    if not what.startswith(("Expected", "Invalid enum value", "Number out of range")):
        what = what.replace("Integer value out", "an integer is out")  # else of a __post_init__, which names its fields
        return f"{what} in `{path}`" if path else what
    value = "" if given is ... else f", not {_quoted(given)}"
    return f"{f'`{path}`' if path else 'the message'} must be {takes(wanted)}{value}"


def _below(wanted: inspect.Type, given: object, step: str) -> tuple[inspect.Type, object]:
    """Type and value of a field or an item."""
    for option in _options(wanted):
        if isinstance(option, (inspect.ListType, inspect.VarTupleType)) and step.isdecimal():
            return option.item_type, _item(given, int(step))
        if isinstance(option, inspect.StructType):
            for field in option.fields:
                if field.encode_name == step:
                    return field.type, _item(given, step)
    return inspect.AnyType(), ...


def _item(given: Any, step: str | int) -> object:
    try:
        return given[step]
    except (LookupError, TypeError):  # such as a duplicate key
        return ...


def _options(wanted: inspect.Type) -> list[inspect.Type]:
    """The types that a value may be of, `null` left out."""
    if isinstance(wanted, inspect.Metadata):
        return _options(wanted.type)
    if isinstance(wanted, inspect.UnionType):
        return [kind for option in wanted.types for kind in _options(option)]
    return [] if isinstance(wanted, inspect.NoneType) else [wanted]


def _struct(wanted: inspect.Type) -> inspect.StructType | None:
    return next((option for option in _options(wanted) if isinstance(option, inspect.StructType)), None)


def takes(wanted: inspect.Type) -> str:
    """What a type accepts, in words; its description, if it has one."""
    if isinstance(wanted, inspect.Metadata):
        described: str | None = (wanted.extra_json_schema or {}).get("description")
        return described or takes(wanted.type)
    if isinstance(wanted, inspect.UnionType):
        return " or ".join(takes(option) for option in wanted.types if not isinstance(option, inspect.NoneType))
    if isinstance(wanted, inspect.LiteralType):
        return f"one of {', '.join(map(_quoted, wanted.values))}"
    if isinstance(wanted, inspect.BoolType):
        return "true or false"
    if isinstance(wanted, (inspect.IntType, inspect.FloatType)):
        return _number(wanted)
    if isinstance(wanted, inspect.StrType):
        return f"text{_length(wanted, 'characters')}"
    if isinstance(wanted, (inspect.ListType, inspect.VarTupleType)):
        return f"a list{_length(wanted, 'items')}"
    return "an object" if isinstance(wanted, inspect.StructType) else "a path"


def _number(wanted: inspect.IntType | inspect.FloatType) -> str:
    name = "an integer" if isinstance(wanted, inspect.IntType) else "a number"
    bounds = [("above", wanted.gt), ("at least", wanted.ge), ("below", wanted.lt), ("at most", wanted.le)]
    parts = [f"{how} {int(bound) if bound == int(bound) else bound}" for how, bound in bounds if bound is not None]
    return f"{name}, {' and '.join(parts)}" if parts else name


def _length(wanted: "inspect.StrType | inspect.ListType | inspect.VarTupleType", unit: str) -> str:
    least, most = wanted.min_length, wanted.max_length
    parts = [f"{how} {bound}" for how, bound in (("at least", least), ("at most", most)) if bound is not None]
    return f" of {' and '.join(parts)} {unit}" if parts else ""


def _quoted(value: object) -> str:
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…"
