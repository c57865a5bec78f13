"""Load a config by name, apply ``path=value`` overrides, and convert configs to plain JSON values and back."""

import dataclasses
import difflib
import importlib
import json
import math
import os
import pkgutil
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from comi_jax.checks import one_of, require, shown
from comi_jax.config import Config, Model
from comi_jax.errors import ConfigError

PATHS = (
    "model.path",
    "model.tokenizer",
    "train.output",
)  # a leading ~ is the home folder; words of data have their own


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """The inverse of ``to_dict``. Raises ConfigError with the name of an unknown, missing or wrongly typed entry."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{where} has unknown entries {shown(unknown)}; known are {sorted(hints)}")
    needed = [f.name for f in dataclasses.fields(cls) if {f.default, f.default_factory} == {dataclasses.MISSING}]
    missing = [name for name in needed if name not in values]
    require(not missing, f"{where} lacks {', '.join(missing)}")
    values = Model.upgraded(values) if cls is Model else values
    return cls(**{name: _coerce(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config ``configs/<name>.py`` with ``path=value`` overrides applied, e.g. ``train.steps=100``.

    Raises ConfigError for an unknown config, an unknown path or a value of the wrong type, with the nearest valid
    names.
    """
    import comi_jax.configs

    names = sorted(module.name for module in pkgutil.iter_modules(comi_jax.configs.__path__))
    require(name in names, f"there is no config {shown(name)}{_nearest(name, names)}; there are: {', '.join(names)}")
    config = importlib.import_module(f"comi_jax.configs.{name}").get_config()
    return override(dataclasses.replace(config, name=name), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with all ``path=value`` applied before any is validated, as some settings only work together."""
    values, valid = to_dict(config), settings()
    for word in overrides:
        path, equals, text = word.partition("=")
        require(bool(equals), f"{shown(word)} is not an override; write path=value, e.g. train.steps=100")
        section, _, leaf = path.partition(".")
        require(path in valid, f"there is no setting {shown(path)}{_nearest(path, valid)}")
        if path == "system":
            values[path] = text
            continue
        hint = typing.get_type_hints(typing.get_type_hints(Config)[section])[leaf]
        values[section][leaf] = _parse(text, hint, path)
    return from_dict(Config, values)


def settings() -> list[str]:
    """The paths of all settings that ``override`` takes."""
    sections = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    return [f"{name}.{leaf}" for name, hint in sections.items() for leaf in typing.get_type_hints(hint)] + ["system"]


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.4)
    if not close:  # a bare leaf such as "steps", or a path of the right section
        close = [v for v in valid if v.split(".")[-1] == name or v.split(".")[0] == name.split(".")[0]][:8]
    return f"; the nearest are {', '.join(close)}" if close else ""


def _parse(text: str, hint: Any, path: str) -> Any:
    """The text of an override as a JSON value that ``_coerce`` accepts for ``hint``."""
    if hint is str:
        return os.path.expanduser(text) if path in PATHS else text
    if hint is bool:
        one_of(path, text.lower(), ("true", "false"))
        return text.lower() == "true"
    if typing.get_origin(hint) is tuple:
        parts = (part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text))  # "\," is a comma within a part
        return [_parse(part, typing.get_args(hint)[0], path) for part in parts if part]
    try:
        return int(text.replace("_", "")) if hint is int else float(text)
    except ValueError:
        text = text if text.isprintable() and len(text) <= 80 else shown(text)
        raise ConfigError(f"{path}={text} is not {_type_name(hint)}") from None


def _coerce(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{where} is {shown(value)}; expected an object")
        return from_dict(hint, value, where)
    if isinstance(hint, types.UnionType):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return None if value is None else _coerce(value, inner[0], where)
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), f"{where} is {shown(value)}; expected a list")
        return tuple(_coerce(v, typing.get_args(hint)[0], where) for v in value)
    if type(value) is int:  # first, as Python refuses to format or convert very large integers
        require(abs(value) < 2**63, f"{where} is a whole number beyond 64 bits")
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{where} is {shown(value)}, not {_type_name(hint)}")
    require(hint is not float or math.isfinite(value), f"{where} is {value}; it must be finite")
    if isinstance(value, str):
        require(
            "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value),
            f"{where} is {shown(value)}; text must not hold NUL characters or lone surrogates",
        )
    return value


def _type_name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, str(hint))
