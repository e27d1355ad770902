"""Config files (`get_config()` returns a ConfigDict) and their overrides from the command line."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A config file or an override that cannot be used."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Runs a config file's `get_config()` and applies overrides.

    Args:
      path: a Python file.
      overrides: `config.field.name=value` with or without leading dashes.

    Returns:
      The config, locked: fields can't be added.

    Raises:
      ConfigError: the file is missing, fails or has no `get_config`; an override is malformed, has
        the wrong type or names an unknown field.
    """
    config = _run_file(Path(path), "get_config")()
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict"
        )
    return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> Any:
    """A copy of the config with fields replaced; see `load_config`.

    >>> from jaxrmils.cli.defaults import base_config
    >>> apply_overrides(base_config(), ["--config.policy.mu=0.3"]).policy.mu
    0.3
    """
    config = ConfigDict(config.to_dict())
    config.lock()
    for text in overrides:
        name, separator, value = text.lstrip("-").partition("=")
        prefix, dot, field = name.partition(".")
        if not separator or prefix != "config" or not dot:
            raise ConfigError(f"can't read the override {text!r}; write --config.field=value")
        _set(config, field, value)
    return config


def _set(config: ConfigDict, field: str, text: str) -> None:
    known = dict(_fields(config))
    if field not in known:
        near = difflib.get_close_matches(field, known, n=3) or _same_ending(field, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"fields: {', '.join(known)}"
        raise ConfigError(f"unknown config field {field!r}; {hint}")
    value = _parse(text, known[field])
    try:
        config.update_from_flattened_dict({field: value})
    except (TypeError, ValueError, KeyError) as error:
        expected = type(known[field]).__name__
        raise ConfigError(
            f"config field {field}: {text!r} is no {expected} (now {known[field]!r})"
        ) from error


def _fields(config: ConfigDict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same_ending(field: str, known: Iterable[str]) -> list[str]:
    names = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(field.rpartition(".")[2], names, n=3)
    return [names[n] for n in near]


def _parse(text: str, current: Any) -> Any:
    """The value of an override; a single word is enough for a tuple of words."""
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if not isinstance(current, tuple):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(value)
    return tuple(text.split(",")) if isinstance(value, str) else (value,)


def resolve_function(
    name: str, config_path: str | Path | None = None, known: Sequence[str] = ()
) -> Any:
    """The function that `package.module:function` or `file.py:function` names.

    Args:
      name: what to load; a relative file is looked for beside the config file, then here.
      config_path: the config file.
      known: names of tasks, for messages.

    Raises:
      ConfigError: it can't be found.
    """
    module, separator, function = name.rpartition(":")
    if not separator:
        words = ", ".join((*known, "package.module:function"))
        raise ConfigError(f"task {name!r}: write {words} or file.py:function")
    if module.endswith(".py"):
        beside = Path(config_path).parent / module if config_path else Path(module)
        return _run_file(beside if beside.exists() else Path(module), function)
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"task {name!r}: can't import {module}: {error}") from error
    if not hasattr(loaded, function):
        raise ConfigError(f"task {name!r}: {module} has no function {function}")
    return getattr(loaded, function)


def _run_file(path: Path, function: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"jaxrmils_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{path} has no function {function}()")
    return getattr(module, function)
