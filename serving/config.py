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
from typing import Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.manifest import SafeName
from serving.errors import ConfigInvalid

ENV_PREFIX = "AKIDB_EMBEDDING_"
_SECTION = "embedding"

Document = dict[str, Any]
KeyPath = tuple[str, ...]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BatchingSettings(_Section):
    """`[embedding.batching]`: what one engine run may hold, and when the queue is full."""

    max_batch_size: int = Field(default=64, ge=1, le=4096, description="texts in one engine run")
    max_batch_tokens: int = Field(default=8192, ge=16, description="tokens in one engine run, padding included")
    max_queue_tokens: int = Field(
        default=65_536, ge=1, description="a request that finds this many tokens waiting gets 429"
    )
    max_queue_size: int = Field(default=4096, ge=1, description="a request that finds this many texts waiting gets 429")
    max_wait_time_ms: float = Field(
        default=0.0, ge=0, le=10, description="how long an idle engine waits for more; 0: no timer"
    )
    max_texts_per_request: int = Field(default=2048, ge=1, description="texts one request may hold")


class ModelSource(_Section):
    """`[[embedding.models.available]]`: a bundle to serve and the engine to run it on."""

    path: Path = Field(description="folder of the bundle")
    name: SafeName | None = Field(default=None, description="name clients use; the manifest's when absent")
    engine: Literal["auto", "onnxruntime", "openvino", "cuda"] = Field(
        default="auto", description="auto: the first that loads"
    )
    num_threads: int = Field(default=0, ge=0, le=1024, description="threads of the engine; 0: one per core")


class ModelsSettings(_Section):
    """`[embedding.models]`: what is served."""

    default: SafeName | None = Field(default=None, description="model of a request that names none")
    available: tuple[ModelSource, ...] = Field(default=(), description="bundles to serve, a JSON list when a variable")


class Settings(_Section):
    """`[embedding]`: the whole table."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65_535, description="port to listen on; 0: a free one, printed at start")
    drain_seconds: float = Field(
        default=30, gt=0, description="after SIGTERM, the time accepted requests have to finish"
    )
    drain_grace_seconds: float = Field(
        default=1, ge=0, description="part of it in which new requests are still answered"
    )
    request_timeout_seconds: float = Field(default=30, gt=0, description="a request older than this gets 504")
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, description="larger request bodies get 413")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe line to log"
    )
    batching: BatchingSettings = BatchingSettings()
    models: ModelsSettings = ModelsSettings()


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the table. `path` is its place below `[embedding]`."""

    path: KeyPath
    description: str
    default: object
    choices: tuple[str, ...]

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
            choices = tuple(choice for choice in get_args(field.annotation) if isinstance(choice, str))
            yield Key((*path, name), field.description or "", field.default, choices)


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
    parser.add_argument("--bundle", metavar="DIR", help="folder of the bundle to serve")
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
            _put(document, key.path, flags[key.name])
            origins[key.path] = key.flag
    if flags["bundle"] is not None:
        _put(document, ("models", "available"), [{"path": flags["bundle"]}])
        origins["models", "available"] = "--bundle"
    return _check_models(_validate(document, origins))


def describe_settings(settings: Settings) -> str:
    """The effective settings as one `key=value` line."""
    values: list[str] = []
    for key in iterate_keys():
        value: Any = settings
        for part in key.path:
            value = getattr(value, part)
        if isinstance(value, tuple):
            value = json.dumps([item.model_dump(mode="json", exclude_defaults=True) for item in value])
        values.append(f"{key.name}={value}")
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
    """Keys set as variables; lists are JSON."""
    keys = {key.variable: key for key in iterate_keys()}
    given = {name: value for name, value in environ.items() if name.startswith(ENV_PREFIX)}
    _refuse_unknown("environment", given, keys, "")
    for name, value in given.items():
        if isinstance(keys[name].default, tuple):
            try:
                yield keys[name], json.loads(value)
            except ValueError:
                raise ConfigInvalid(f'{name} is not JSON: give a list such as [{{"path": "/bundle"}}]') from None
        else:
            yield keys[name], value


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
        value = first["input"] if isinstance(first["input"], str | int | float) else type(first["input"]).__name__
        where = f"{origins[key]}: " if key in origins else ""
        raise ConfigInvalid(f"{where}{'.'.join((_SECTION, *path))} = {value!r}: {first['msg']}") from None


def _check_models(settings: Settings) -> Settings:
    """Exactly one bundle is served for now."""
    available = settings.models.available
    if not available:
        raise ConfigInvalid("no model to serve: give --bundle DIR or [[embedding.models.available]] in config.toml")
    if len(available) > 1:
        raise ConfigInvalid(f"embedding.models.available has {len(available)} models: this worker serves one")
    if settings.drain_grace_seconds > settings.drain_seconds:
        raise ConfigInvalid(
            f"embedding.drain_grace_seconds = {settings.drain_grace_seconds} is more than "
            f"embedding.drain_seconds = {settings.drain_seconds}, of which it is a part"
        )
    return settings
