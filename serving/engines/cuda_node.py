"""What the CUDA engine needs of a machine: the first thing that is missing, and what to do about it."""

import json
import os
import shutil
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from serving.engines import has_nvidia_driver

LEAST_CAPABILITY = {"f16": (8, 0), "f8": (8, 9)}
_INSTALL = "pip install '.[gpu]'"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the engine cannot run, and the way out."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Node:
    """What was found. `start_error`: what CUDA said when it was started; `architectures`: those torch was built for.

    `cc` is what the environment's CC says, `compiler` the program that triton would start.
    """

    torch_version: str | None = None
    is_cuda_build: bool = False
    triton_version: str | None = None
    start_error: str | None = None
    gpu: str = ""
    capability: tuple[int, int] = (0, 0)
    architectures: tuple[str, ...] = ()
    compiler: str | None = None
    has_headers: bool = False
    cc: str | None = None


def examine_node() -> Node:
    """Look at this machine; starts CUDA where torch has it."""
    try:
        import torch  # noqa: PLC0415  only this engine needs it
    except ImportError:
        return Node()
    try:
        import triton  # noqa: PLC0415  likewise
    except ImportError:
        return Node(torch.__version__, torch.backends.cuda.is_built())
    found = Node(
        torch.__version__,
        torch.backends.cuda.is_built(),
        triton.__version__,
        compiler=_find_compiler(os.environ.get("CC")),
        has_headers=(Path(sysconfig.get_path("include")) / "Python.h").exists(),
        cc=os.environ.get("CC"),
    )
    if not found.is_cuda_build:
        return found
    return _ask_gpu(found)


def _find_compiler(cc: str | None) -> str | None:
    """As triton does: CC, where it is set, is the name of one program, so that arguments in it are part of the name."""
    return shutil.which("gcc") or shutil.which("clang") if cc is None else shutil.which(cc)


def _ask_gpu(found: Node) -> Node:
    import torch  # noqa: PLC0415  it is there

    try:
        torch.cuda.init()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        return replace(found, start_error=str(error).strip().splitlines()[0])
    return replace(found, gpu=name, capability=capability, architectures=tuple(torch.cuda.get_arch_list()))


def find_problem(node: Node, compute: str) -> Problem | None:
    """The first thing that keeps the engine from computing in `compute` there; None when nothing does."""
    if compute not in LEAST_CAPABILITY:
        return Problem(f"the cuda engine has no {compute}", f"it computes in {' or '.join(LEAST_CAPABILITY)}")
    for name, version in (("torch", node.torch_version), ("triton", node.triton_version)):
        if version is None:
            return Problem(f"{name} is not installed", _INSTALL)
    if not node.is_cuda_build:
        return Problem(f"torch {node.torch_version} is built without CUDA", "install a CUDA build of it")
    if node.start_error is not None:
        return _explain_start(node.start_error)
    return _check_capability(node, compute) or _check_compiler(node)


def find_problem_here(compute: str) -> Problem | None:
    """`find_problem` of this machine; torch is not loaded to find that there is no driver."""
    if compute in LEAST_CAPABILITY and not has_nvidia_driver():
        return Problem(
            "no NVIDIA GPU that this machine has a driver for",
            "install it if there is one, and give it to the container",
        )
    return find_problem(examine_node(), compute)


def _explain_start(error: str) -> Problem:
    if "too old" in error:
        return Problem(f"the NVIDIA driver is too old for this torch ({error})", "update the driver, see nvidia-smi")
    if "no NVIDIA driver" in error or "No CUDA GPUs" in error:
        return Problem(f"no NVIDIA GPU ({error})", "install the driver if there is one, and give it to the container")
    return Problem(f"CUDA does not start ({error})", "see nvidia-smi and the kernel's log")


def _check_capability(node: Node, compute: str) -> Problem | None:
    (major, minor), least = node.capability, LEAST_CAPABILITY[compute]
    if node.capability < least:
        needed = f"{compute} needs {least[0]}.{least[1]}"
        return Problem(f"{node.gpu} has compute capability {major}.{minor}", f"{needed}, take another GPU or engine")
    if any(_runs(name, node.capability) for name in node.architectures):
        return None
    has = ", ".join(node.architectures)
    return Problem(
        f"torch {node.torch_version} is built for {has}, {node.gpu} is sm_{major}{minor}", "install a build for it"
    )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code (sm_89) runs on its major version from its minor on, intermediate code (compute_89) on all later."""
    kind, _, number = architecture.partition("_")
    built = divmod(int(number.rstrip("af")), 10)
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _check_compiler(node: Node) -> Problem | None:
    if node.compiler is None and node.cc is not None:
        return Problem(
            f"CC is {node.cc!r}, which is no program that triton can start",
            "set it to a C compiler's name or path without arguments, or unset it to use gcc or clang",
        )
    if node.compiler is None:
        return Problem("triton needs a C compiler and finds none", "install gcc or set CC")
    if not node.has_headers:
        return Problem("triton needs Python's headers and finds none", "install python3-dev")
    return None


def describe(node: Node) -> dict[str, object]:
    """What `doctor` shows: whether the engine can run, in what, and otherwise why not and what to do."""
    wide, narrow = (find_problem(node, compute) for compute in LEAST_CAPABILITY)
    if wide is not None:
        return {"is_present": False, "detail": wide.reason, "remedy": wide.remedy}
    also = " and f8" if narrow is None else f"; no f8: {narrow.reason}"
    return {"is_present": True, "detail": f"{node.gpu}, torch {node.torch_version}, f16{also}", "remedy": ""}


if __name__ == "__main__":
    print(json.dumps(describe(examine_node())))  # noqa: T201  what doctor reads
