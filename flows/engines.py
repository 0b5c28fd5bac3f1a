"""Engines: candidates whose engine is compiled on the node, through a sweep of recipes; what cannot be is set aside."""

from collections.abc import Iterable

from tasks.build import EngineBuild, build_engine, choose_build, describe_tensorrt, list_recipes, with_engine
from tasks.errors import NothingBuilt
from tasks.quantize import Candidate
from tasks.settings import BuildConfig


def build_engines(candidates: Iterable[Candidate], config: BuildConfig) -> tuple[list[Candidate], list[EngineBuild]]:
    """The candidates that can run here, those of TensorRT with their best plan, and what was not built, with reasons.

    Raises NothingBuilt when no candidate is left.
    """
    ready: list[Candidate] = []
    not_built: list[EngineBuild] = []
    node = describe_tensorrt()
    for candidate in candidates:
        if candidate.variant.runtime != "tensorrt":
            ready.append(candidate)
            continue
        sweep = [build_engine.submit(candidate, recipe, node) for recipe in list_recipes(config, candidate)]
        chosen = choose_build([future.result() for future in sweep])
        if chosen.is_built:
            ready.append(with_engine(candidate, chosen))
        else:
            not_built.append(chosen)
    if not ready:
        raise NothingBuilt("; ".join(f"{build.variant} was not built: {build.reason}" for build in not_built))
    return ready, not_built
