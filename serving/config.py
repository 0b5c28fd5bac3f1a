"""Settings: one table of names, types, defaults and help, filled from flags, environment, `config.toml` and defaults.

Precedence: flag > environment (`AKIDB_EMBEDDING_<SECTION>_<KEY>`) > file > default. An unknown key stops the process.
"""

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import BaseModel, SecretStr, ValidationError

from serving.errors import ConfigInvalid
from serving.settings import ModelSource, Settings

ENV_PREFIX = "AKIDB_EMBEDDING_"
_SECTION = "embedding"

Document = dict[str, Any]
KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the table. `path` is its place below `[embedding]`."""

    path: KeyPath
    description: str
    default: object
    choices: tuple[str, ...]
    is_secret: bool

    @property
    def is_json(self) -> bool:
        """Whether variable and flag hold a JSON list or table."""
        return isinstance(self.default, tuple | dict) and not self.is_secret

    @property
    def name(self) -> str:
        """As the file and the log spell it: `embedding.batching.max_batch_size`."""
        return ".".join((_SECTION, *self.path))

    @property
    def variable(self) -> str:
        """As the environment spells it: `AKIDB_EMBEDDING_BATCHING_MAX_BATCH_SIZE`."""
        return ENV_PREFIX + "_".join(self.path).upper()

    @property
    def flag(self) -> str:
        """As the command line spells it: `--batching-max-batch-size`."""
        return "--" + "-".join(self.path).replace("_", "-")


def iterate_keys(section: type[BaseModel] = Settings, path: KeyPath = ()) -> Iterator[Key]:
    """Every setting, in the order of the table."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from iterate_keys(field.annotation, (*path, name))
        else:
            arguments = get_args(field.annotation)
            choices = tuple(choice for choice in arguments if isinstance(choice, str))
            yield Key((*path, name), field.description or "", field.default, choices, SecretStr in arguments)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as every other setting does: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigInvalid(f"command line: {message} (--help lists the flags)")


def build_parser() -> argparse.ArgumentParser:
    """The command line: `--bundle`, `--config` and one flag per key."""
    parser = _Parser(
        prog="python -m serving",
        description="Serve a bundle over HTTP.",
        epilog=f"Every flag is also a key of config.toml and a variable {ENV_PREFIX}*; flag, then variable, then file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--bundle", metavar="DIR", action="append", help="bundle to serve; given again: one more (see models.available)"
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="config.toml to read")
    for key in iterate_keys():
        if key.path == ("models", "available"):
            continue  # --bundle is its flag
        default = "" if key.default is None else f" (default {key.default})"
        metavar = "|".join(key.choices) or key.path[-1].rpartition("_")[2].upper()
        parser.add_argument(key.flag, dest=key.name, metavar=metavar, help=key.description + default)
    return parser


def load_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Settings of this process. Raises ConfigInvalid, which names the key and where it was set."""
    flags = vars(build_parser().parse_args(argv))
    document: Document = {}
    origins: dict[KeyPath, str] = {}
    config = flags["config"]
    if config is not None:
        document = _read_file(config)
        origins[()] = str(config)
    for key, value in _read_environment(environ):
        _put(document, key.path, value)
        origins[key.path] = key.variable
    for key in iterate_keys():
        if flags.get(key.name) is not None:
            if key.is_secret:
                raise ConfigInvalid(
                    f"{key.flag}: every user of the machine sees a command line: set {key.variable} or {key.flag}-file"
                )
            _put(document, key.path, _parse_text(key, key.flag, flags[key.name]))
            origins[key.path] = key.flag
    if flags["bundle"] is not None:
        _put(document, ("models", "available"), [{"path": path} for path in flags["bundle"]])
        origins["models", "available"] = "--bundle"
    return _check_models(_validate(document, origins))


def describe_settings(settings: Settings) -> str:
    """The effective settings as one `key=value` line; of secrets only how many there are."""
    document = settings.model_dump(mode="json")
    document["models"]["available"] = [
        source.model_dump(mode="json", exclude_defaults=True) for source in settings.models.available
    ]
    values: list[str] = []
    for key in iterate_keys():
        value: Any = document
        for part in key.path:
            value = value[part]
        shown = f"({len(value)} not shown)" if key.is_secret else json.dumps(value) if key.is_json else value
        values.append(f"{key.name}={shown}")
    return " ".join(values)


def _read_file(path: Path) -> Document:
    """The `[embedding]` table of a TOML file, its keys checked against the table of settings."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} is not TOML: {error}") from None
    _refuse_unknown(path.name, document.keys(), (_SECTION,), "")
    section = document.get(_SECTION, {})
    _check_keys(path.name, section, Settings, _SECTION)
    return dict(section)


def _check_keys(source: str, table: object, section: type[BaseModel], name: str) -> None:
    """Walk a TOML table along the settings classes; types are left to pydantic."""
    if not isinstance(table, dict):
        raise ConfigInvalid(f"{source}: {name} is not a table")
    _refuse_unknown(source, table.keys(), section.model_fields.keys(), f"{name}.")
    for key, value in table.items():
        annotation = section.model_fields[key].annotation
        if annotation == tuple[ModelSource, ...] and isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(source, item, ModelSource, f"{name}.{key}[{index}]")
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _check_keys(source, value, annotation, f"{name}.{key}")


def _refuse_unknown(source: str, given: Sequence[str] | Any, known: Sequence[str] | Any, prefix: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ConfigInvalid(f"{source}: unknown key {prefix}{key}: {hint}")


def _read_environment(environ: Mapping[str, str]) -> Iterator[tuple[Key, object]]:
    """Keys set as variables."""
    keys = {key.variable: key for key in iterate_keys()}
    given = {name: value for name, value in environ.items() if name.startswith(ENV_PREFIX)}
    _refuse_unknown("environment", given, keys, "")
    for name, value in given.items():
        yield keys[name], _parse_text(keys[name], name, value)


def _parse_text(key: Key, origin: str, text: str) -> object:
    """The value of a variable or flag."""
    if not key.is_json:
        return text
    try:
        return json.loads(text)
    except ValueError:
        example = (
            '{"name": {"version": 1}}'
            if isinstance(key.default, dict)
            else '["/path"], [0, 1] or [{"path": "/bundle"}]'
        )
        raise ConfigInvalid(f"{origin} is not JSON: {key.name} looks like {example}") from None


def _put(document: Document, path: KeyPath, value: object) -> None:
    for part in path[:-1]:
        document[part] = document = dict(document.get(part, {}))
    document[path[-1]] = value


def _validate(document: Document, origins: Mapping[KeyPath, str]) -> Settings:
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"])
        key = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in origins), ())
        where = f"{origins[key]}: " if key in origins else ""
        raise ConfigInvalid(
            f"{where}{'.'.join((_SECTION, *path))}{_show_input(path, first['input'])}: {first['msg']}"
        ) from None


def _show_input(path: KeyPath, value: object) -> str:
    """` = 'value'`, and nothing for a secret."""
    if any(key.is_secret and path[: len(key.path)] == key.path for key in iterate_keys()):
        return ""
    return f" = {value if isinstance(value, str | int | float) else type(value).__name__!r}"


def _check_models(settings: Settings) -> Settings:
    """What the sections cannot check alone."""
    available = settings.models.available
    if not available:
        raise ConfigInvalid("no model to serve: give --bundle DIR or [[embedding.models.available]] in config.toml")
    if settings.drain_grace_seconds > settings.drain_seconds:
        raise ConfigInvalid(
            f"embedding.drain_grace_seconds = {settings.drain_grace_seconds} is more than "
            f"embedding.drain_seconds = {settings.drain_seconds}, of which it is a part"
        )
    return settings
