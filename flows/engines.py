"""Engines: candidates whose engine is compiled on the node, through a sweep of recipes; what cannot be is set aside.

So is a default variant of an engine of our own that does not know the model.
"""

from collections.abc import Iterable

from flows.config import OptimizeConfig
from serving.engines import avx512, cuda_node
from serving.errors import EngineUnavailable
from tasks.build import NotBuilt, build_engine, choose_build, describe_tensorrt, list_recipes, with_engine
from tasks.errors import NothingBuilt
from tasks.models.teacher import Teacher
from tasks.quantize import Candidate
from tasks.settings import BuildConfig
from tasks.variants import KERNEL_VARIANTS, Variant


def without_misfits(config: OptimizeConfig, teacher: Teacher) -> tuple[OptimizeConfig, list[NotBuilt]]:
    """`config` without variants of our own engines that nobody asked for by name and that do not fit, with reasons.

    Where `variants` names one, `check_engine` refuses it.
    """
    ours = [] if "variants" in config.model_fields_set else [n for n in config.variants if n in KERNEL_VARIANTS]
    if not ours:
        return config, []
    from tasks.encoder import check_fits  # noqa: PLC0415  torch: seconds that no other variant pays

    misfits = []
    for name in ours:
        try:
            check_fits(KERNEL_VARIANTS[name], teacher)
        except EngineUnavailable as error:
            misfits.append(NotBuilt(variant=name, reason=str(error)))
    gone = {misfit.variant for misfit in misfits}
    kept = tuple(name for name in config.variants if name not in gone)
    return (config.model_copy(update={"variants": kept}) if gone else config), misfits


def check_engine(variant: Variant, teacher: Teacher) -> None:
    """Raises EngineUnavailable where a variant of an engine of our own cannot run here, or not with the model."""
    from tasks.encoder import check_fits  # noqa: PLC0415  torch: seconds that no other variant pays

    check_fits(variant, teacher)
    is_avx512 = variant.runtime == "avx512"
    problem = avx512.find_problem() if is_avx512 else cuda_node.find_problem(cuda_node.examine_node(), variant.compute)
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
