"""Build: TensorRT plans of a candidate's graph, one for each recipe of a sweep; without TensorRT, the reason."""

import shutil
import time
from itertools import product
from pathlib import Path

import numpy as np
from prefect import task
from pydantic import BaseModel, ConfigDict

from registry.manifest import EngineEntry
from serving.engines.plans import (
    TIMING_CACHE_NAME,
    BuildRecipe,
    make_profiles,
    opt_length,
    write_recipe,
)
from serving.engines.tensorrt import Node, TensorRtEngine, read_timing_cache
from serving.engines.tensorrt_plan import build_plan, name_vendor, read_types
from serving.errors import EngineUnavailable
from tasks.artifacts import CACHED, Artifact, draft
from tasks.quantize import Candidate
from tasks.settings import BuildConfig

_TIMED_RUNS = 50
_WARM_UP_RUNS = 10


def list_recipes(config: BuildConfig, candidate: Candidate) -> list[BuildRecipe]:
    """Every recipe of the sweep for a candidate."""
    common = {
        "precision": candidate.variant.precision,
        "profiles": make_profiles(candidate.max_seq_length),
        "tactic_sources": config.tactic_sources,
        "version_compatible": config.version_compatible,
        "hardware_compatibility": config.hardware_compatibility,
    }
    sweep = product(config.workspaces_mb, config.builder_levels)
    return [BuildRecipe.model_validate({**common, "workspace_mb": w, "builder_level": b}) for w, b in sweep]


class NotBuilt(BaseModel):
    """A variant that was meant to be built and was not, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    reason: str


class EngineBuild(BaseModel):
    """What became of one recipe: a folder with graph, tokenizer and recipe, and either a plan on this node or a reason.

    Latencies are medians in ms of a batch of each profile's opt shape; `types` are the built engine's tensors by type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    recipe: BuildRecipe
    artifact: Artifact
    engine: EngineEntry
    reason: str | None = None
    build_seconds: float | None = None
    latencies_ms: dict[str, float] = {}
    types: dict[str, int] = {}

    @property
    def is_built(self) -> bool:
        """Whether there is a plan."""
        return self.reason is None


def describe_tensorrt() -> str:
    """The library and GPU that plans would be built with and for, or why none can be: part of a build's cache key."""
    try:
        node = Node.examine()
    except EngineUnavailable as error:
        return f"no TensorRT: {error}"
    return f"{name_vendor(node.trt)} sm {node.sm} driver {node.driver}"


@task(
    task_run_name="build-{candidate.variant.name}", cache_policy=CACHED, persist_result=True, result_serializer="json"
)
def build_engine(candidate: Candidate, recipe: BuildRecipe, node: str) -> EngineBuild:
    """Build one recipe's plan, check it and time it; `node` is `describe_tensorrt()`.

    A build that fails, here or on every machine, is recorded with its reason and fails nothing else.
    """
    graph = candidate.engine.file
    built, reason, seconds = None, None, None
    with draft(candidate.variant.name) as work:
        shutil.copytree(candidate.artifact.folder, work.folder, dirs_exist_ok=True)
        write_recipe(work.folder, recipe)
        started = time.perf_counter()
        try:
            trt = Node.examine().trt
            built = build_plan(trt, work.folder / graph, recipe, read_timing_cache(work.folder / graph, recipe))
        except EngineUnavailable as error:
            reason = str(error)
        else:
            seconds = time.perf_counter() - started
            (work.folder / TIMING_CACHE_NAME).write_bytes(built.timing_cache)
    build = EngineBuild(
        variant=candidate.variant.name,
        recipe=recipe,
        artifact=work.artifact,
        engine=candidate.engine.model_copy(update={"runtime": "tensorrt", "profiles": recipe.profiles}),
        reason=reason,
        build_seconds=seconds,
    )
    if built is None:
        return build
    try:
        engine = TensorRtEngine(work.artifact.folder / graph, built)
    except EngineUnavailable as error:
        return build.model_copy(update={"reason": str(error)})
    return _time_build(build, engine)


def choose_build(builds: list[EngineBuild]) -> EngineBuild:
    """The built recipe with the least summed latency over the profiles; where none was built, the first."""
    built = [build for build in builds if build.is_built]
    return min(built, key=lambda build: sum(build.latencies_ms.values()), default=builds[0])


def with_engine(candidate: Candidate, build: EngineBuild) -> Candidate:
    """The candidate as it will be judged and served: the chosen recipe and its timing cache beside the graph."""
    folder = build.artifact.folder
    return candidate.model_copy(
        update={"artifact": build.artifact, "engine": build.engine, "disk_bytes": _size_of(folder)}
    )


def _time_build(build: EngineBuild, engine: TensorRtEngine) -> EngineBuild:
    latencies = {}
    try:
        for profile in build.recipe.profiles:
            ids = np.ones((profile.opt_batch, opt_length(profile)), dtype=np.int64)
            latencies[profile.name] = _median_ms(engine, ids)
        types = dict(read_types(engine.describe()))
        sm, version = engine.bound_to
    finally:
        engine.close()
    entry = build.engine.model_copy(update={"sm": sm, "trt_version": version})
    return build.model_copy(update={"latencies_ms": latencies, "types": types, "engine": entry})


def _median_ms(engine: TensorRtEngine, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    seconds = []
    for _ in range(_WARM_UP_RUNS + _TIMED_RUNS):
        started = time.perf_counter()
        engine.embed(ids, np.ones_like(ids))
        seconds.append(time.perf_counter() - started)
    return 1e3 * float(np.median(seconds[_WARM_UP_RUNS:]))


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
