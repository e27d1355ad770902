"""JSON as artifacts use it: strict to read, and one entry to a line to write."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike


def dump_json(document: Any, depth: int) -> bytes:
    r"""UTF-8 text in which containers down to `depth` spread over lines and deeper ones do not.

    >>> print(dump_json({"kind": "x", "layers": {"a": [1, 2], "b": [3]}}, depth=2).decode(), end="")
    {
      "kind": "x",
      "layers": {
        "a": [1, 2],
        "b": [3]
      }
    }
    """
    return (_text(document, depth, "") + "\n").encode()


def _text(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    if isinstance(value, dict):
        items = [
            f"{json.dumps(k, ensure_ascii=False)}: {_text(v, depth - 1, inner)}"
            for k, v in value.items()
        ]
    else:
        items = [_text(v, depth - 1, inner) for v in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return first + "\n" + ",\n".join(inner + item for item in items) + f"\n{indent}{last}"


def parse_json(data: bytes, path: PathLike) -> dict[str, Any]:
    """A JSON object from a file's content.

    Raises:
      ArtifactError: not UTF-8, not JSON, not an object, or a key twice in one object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ArtifactError(
                    f"{path}: the key {key!r} is there twice; remove one of the two"
                )
            result[key] = value
        return result

    try:
        # "-sig": some editors put a byte order mark first.
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is no valid JSON ({error}); it is damaged or was edited wrongly. Mend it at "
            "that place, or save it again"
        ) from error
    if not isinstance(document, dict):
        raise ArtifactError(
            f"{path} holds a JSON {type(document).__name__}; an object was expected"
        )
    return document


def check_json(value: Any, what: str, path: PathLike) -> None:
    """Raises ArtifactError unless JSON gives the value back exactly as it is.

    Tuples, NaN, arrays and keys that are no strings do not come back as they were.
    """
    for key, entry in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str) or not _survives(entry):
            raise ArtifactError(
                f"{path}: {what} has the entry {key!r}: {entry!r}, which JSON can't give back as "
                "it is; use string keys, and strings, numbers (no NaN), lists and dicts as values"
            )
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: {what} is a {type(value).__name__}; a dict was expected")


def _survives(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


@contextlib.contextmanager
def decoding(path: PathLike) -> Iterator[None]:
    """Turns the errors of reading a document with missing or wrong entries into ArtifactError."""
    try:
        yield
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"{path} is incomplete or was changed ({type(error).__name__}: {error}), though its "
            "format version is known; save the artifact again"
        ) from error
