"""TensorRT plans, a node's cache: the recipe of a build, the fingerprint of its result, and the files of both."""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.manifest import Precision, Profile, describe_validation, hash_file
from serving.errors import EngineUnavailable

RECIPE_NAME = "tensorrt.json"
TIMING_CACHE_NAME = "timing.cache"
_OPT_LENGTH = 64
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_NO_DRIVER = "unknown"


def make_profiles(max_length: int) -> tuple[Profile, ...]:
    """The three profiles, for texts up to `max_length` tokens (at most 512)."""
    shapes = {"low_latency": (1, 1, 2), "balanced": (2, 4, 8), "high_throughput": (8, 16, 32)}
    return tuple(
        Profile.model_validate(
            {"name": name, "min_batch": a, "opt_batch": b, "max_batch": c, "max_length": min(max_length, 512)}
        )
        for name, (a, b, c) in shapes.items()
    )


def opt_length(profile: Profile) -> int:
    """The length that a profile is tuned for."""
    return min(_OPT_LENGTH, profile.max_length)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BuildRecipe(_Part):
    """Everything that decides what a plan is, besides the graph and the machine."""

    precision: Precision
    profiles: tuple[Profile, ...] = Field(min_length=1)
    workspace_mb: int = Field(default=1024, ge=1)
    builder_level: int = Field(default=3, ge=0, le=5)
    tactic_sources: tuple[str, ...] | None = None  # None: the library's own choice
    version_compatible: bool = False
    hardware_compatibility: Literal["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"] = "NONE"
    compute_capabilities: tuple[str, ...] = ()  # tensorrt_rtx alone can build for GPUs that are not there; (): this one

    @property
    def digest(self) -> str:
        """Names the recipe's plan file."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


class Fingerprint(_Part):
    """What a plan was built from and for: it runs nowhere else."""

    sm: str
    tensorrt: str
    driver: str
    onnx_sha256: str
    recipe: BuildRecipe

    def differences(self, other: "Fingerprint") -> str:
        """`sm 8.9, not 11.0; …`: what `self` has and `other` does not; empty when they are equal."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return "; ".join(
            "recipe differs" if name == "recipe" else f"{name} {mine}, not {theirs}"
            for name, mine, theirs in pairs
            if mine != theirs
        )


class PlanRecord(_Part):
    """What lies beside a plan: whose it is, its bytes' digest, and the parity it showed before it was kept."""

    fingerprint: Fingerprint
    sha256: str
    parity: float


class PlanStale(Exception):
    """A plan that must be built again; the message says why. Never leaves this package."""


def weights_of(graph: Path) -> Path:
    """Where the weights of a graph lie that are too large for its own file."""
    return graph.with_name(f"{graph.name}.data")


def hash_graph(graph: Path) -> str:
    """SHA-256 of a graph's file and, where they lie beside it, of that and its weights'."""
    own, beside = hash_file(graph).sha256, weights_of(graph)
    return hashlib.sha256(f"{own}{hash_file(beside).sha256}".encode()).hexdigest() if beside.is_file() else own


def write_recipe(folder: Path, recipe: BuildRecipe) -> None:
    """Put the recipe beside the graph it is for."""
    (folder / RECIPE_NAME).write_text(recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> BuildRecipe:
    """The recipe beside a graph. Raises EngineUnavailable."""
    path = folder / RECIPE_NAME
    try:
        return BuildRecipe.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineUnavailable(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise EngineUnavailable(f"{path}: {describe_validation(error)}") from None


def plan_path(graph: Path, recipe: BuildRecipe) -> Path:
    """Where the plan of a graph lies: beside the folder, which is immutable and the same on every node."""
    folder = graph.parent
    return folder.with_name(f"{folder.name}.plans") / f"{graph.stem}-{recipe.digest}.plan"


def read_plan(path: Path, wanted: Fingerprint) -> tuple[bytes, PlanRecord]:
    """A plan that is whole and was made for this node. Raises PlanStale, which says what is wrong with it."""
    try:
        record = PlanRecord.model_validate_json(_record_path(path).read_bytes())
        plan = path.read_bytes()
    except FileNotFoundError:
        raise PlanStale("there is none yet") from None
    except (OSError, ValidationError) as error:
        raise PlanStale(f"its record cannot be read ({type(error).__name__})") from None
    if differences := record.fingerprint.differences(wanted):
        raise PlanStale(f"it was built for {differences}")
    if hashlib.sha256(plan).hexdigest() != record.sha256:
        raise PlanStale("its bytes are not those that were built")
    return plan, record


def write_plan(path: Path, plan: bytes, fingerprint: Fingerprint, parity: float) -> None:
    """Keep a plan. Killed in the middle it leaves none, or one whose digest does not fit, which counts as none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = PlanRecord(fingerprint=fingerprint, sha256=hashlib.sha256(plan).hexdigest(), parity=parity)
    replace_file(path, plan)
    replace_file(_record_path(path), json.dumps(record.model_dump(mode="json"), indent=1).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def driver_version() -> str:
    """The NVIDIA driver's version, as its kernel module says it; `unknown` where there is none."""
    try:
        words = _DRIVER_FILE.read_text(encoding="utf-8").split()
    except OSError:
        return _NO_DRIVER
    return next((word for word in words if word[0].isdigit() and "." in word), _NO_DRIVER)


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
