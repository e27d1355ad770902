"""Typed values from JSON values, with errors that name the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxrmils.evaluation.simulate import EvaluationError

Value = TypeVar("Value")


def decode(kind: type[Value], value: Any, where: str = "") -> Value:
    """A dataclass from the dict that JSON made of it.

    Args:
      kind: a dataclass of numbers, strings, bools, tuples, dicts, optional values and dataclasses.
      value: the dict. Null stands for an entry's default. Entries that the class does not have are
        left alone, since a later version may have written them.
      where: the place of `value` in its document, for errors.

    Raises:
      EvaluationError: an entry without a default is missing, or one has another type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Point:
    ...     x: float
    ...     label: str = ""
    >>> decode(Point, {"x": 1, "colour": "red"})
    Point(x=1.0, label='')
    >>> try:
    ...     decode(Point, {"x": "1"}, "points[0]")
    ... except EvaluationError as error:
    ...     print(error)
    field points[0].x is '1'; a number was expected
    """
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    hints = typing.get_type_hints(kind)
    entries = {}
    for field in dataclasses.fields(typing.cast(Any, kind)):
        place = f"{where}.{field.name}" if where else field.name
        optional = not (field.default is field.default_factory is dataclasses.MISSING)
        if value.get(field.name) is not None or (field.name in value and not optional):
            entries[field.name] = _decode(hints[field.name], value[field.name], place)
        elif not optional:
            raise EvaluationError(f"field {place} is missing")
    return kind(**entries)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, np.generic):
        value = value.item()
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "an object")
        return {str(k): _decode(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(where, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if dataclasses.is_dataclass(kind):
        return decode(typing.cast(type, kind), value, where)
    return _scalar(kind, value, where)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, value, "a list")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise _wrong(where, value, f"a list of {len(arguments)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_decode(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(pairs))


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not kind:
        words = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}
        raise _wrong(where, value, words[kind])
    return value


def _wrong(where: str, value: Any, expected: str) -> EvaluationError:
    found = repr(value)
    found = found if len(found) < 60 else f"{found[:57]}..."
    return EvaluationError(f"field {where or 'report'} is {found}; {expected} was expected")
