"""Engines: candidates whose engine is compiled on the node, through a sweep of recipes; what cannot be is set aside.

So is a default variant of an engine of our own that does not know the model, or that a GPU's node cannot run.
"""

from collections.abc import Iterable

from flows.config import OptimizeConfig
from flows.node import find_problem
from serving.engines import has_nvidia_driver
from serving.errors import EngineUnavailable
from tasks.build import NotBuilt, build_engine, choose_build, describe_tensorrt, list_recipes, with_engine
from tasks.errors import NothingBuilt
from tasks.models.teacher import Teacher
from tasks.quantize import Candidate
from tasks.settings import BuildConfig
from tasks.variants import KERNEL_VARIANTS, Variant


def without_misfits(config: OptimizeConfig, teacher: Teacher) -> tuple[OptimizeConfig, list[NotBuilt]]:
    """`config` without variants of our own engines that nobody asked for by name and that do not fit, with reasons.

    Those of cuda that cannot run here although there is a driver have one too. Where `variants` names what does not
    fit or cannot run, `check_engine` refuses it.
    """
    if "variants" in config.model_fields_set:
        return config, []
    idle, ours = _list_idle(config), [name for name in config.variants if name in KERNEL_VARIANTS]
    if not ours:
        return config, idle
    from tasks.encoder import check_fits  # noqa: PLC0415  torch: seconds that no other variant pays

    misfits = []
    for name in ours:
        try:
            check_fits(KERNEL_VARIANTS[name], teacher)
        except EngineUnavailable as error:
            misfits.append(NotBuilt(variant=name, reason=str(error)))
    gone = {misfit.variant for misfit in misfits}
    kept = tuple(name for name in config.variants if name not in gone)
    return (config.model_copy(update={"variants": kept}) if gone else config), [*idle, *misfits]


def _list_idle(config: OptimizeConfig) -> list[NotBuilt]:
    """The variants of cuda that are not among the default ones although there is a driver, with what is missing."""
    if not has_nvidia_driver():
        return []
    absent = [each for name, each in KERNEL_VARIANTS.items() if each.runtime == "cuda" and name not in config.variants]
    problems = [(variant.name, find_problem(variant)) for variant in absent]
    return [NotBuilt(variant=name, reason=f"cannot run here: {problem}") for name, problem in problems if problem]


def check_engine(variant: Variant, teacher: Teacher) -> None:
    """Raises EngineUnavailable where a variant of an engine of our own cannot run here, or not with the model."""
    from tasks.encoder import check_fits  # noqa: PLC0415  torch: seconds that no other variant pays

    check_fits(variant, teacher)
    problem = find_problem(variant)
    if problem:
        raise EngineUnavailable(f"{variant.name} cannot run here: {problem}")


def build_engines(candidates: Iterable[Candidate], config: BuildConfig) -> tuple[list[Candidate], list[NotBuilt]]:
    """The candidates that can run here, those of TensorRT with their best plan, and what was not built, with reasons.

    Raises NothingBuilt when no candidate is left.
    """
    ready: list[Candidate] = []
    not_built: list[NotBuilt] = []
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
            not_built.append(NotBuilt(variant=chosen.variant, reason=chosen.reason or ""))
    if not ready:
        raise NothingBuilt("; ".join(f"{each.variant} was not built: {each.reason}" for each in not_built))
    return ready, not_built
