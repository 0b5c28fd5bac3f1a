"""The node: what keeps the engine of a variant of our own from running on it."""

from serving.engines import avx512, cuda_node
from tasks.variants import KERNEL_VARIANTS, Variant


def find_problem(variant: Variant) -> str | None:
    """Why the engine of a variant of our own cannot run here and what to do; None where it can.

    Torch, which starts CUDA, is asked only where the kernel has an NVIDIA driver.
    """
    if variant.runtime == "avx512":
        return avx512.find_problem()
    problem = cuda_node.find_problem_here(variant.compute)
    return None if problem is None else str(problem)


def list_runnable() -> list[str]:
    """The variants of our own engines that can run here, whatever the model."""
    return [name for name, variant in KERNEL_VARIANTS.items() if find_problem(variant) is None]
