"""doctor: what hardware, engines and libraries this node has, and what each missing one would bring."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from serving.engines import has_nvidia_driver, num_cores
from serving.engines.avx512 import find_problem
from tasks.measurement.hardware import INT8_FLAGS, cpu_flags, cpu_model, memory_gib
from tasks.state import state_dir

_ENGINES = (
    ("onnxruntime", "serve", "the fp32-onnx, int8-dynamic and int8-static variants on the CPU"),
    ("openvino", "openvino", "the int8-openvino and bf16-openvino variants on the CPU"),
    ("tensorrt", "gpu", "TensorRT engines on an NVIDIA GPU"),
    ("triton", "gpu", "the kernels of the CUDA engine on an NVIDIA GPU"),
)
_LIBRARIES = (
    ("torch", "forge", "loading and exporting teachers"),
    ("sentence-transformers", "forge", "the teacher's own embeddings, which everything is judged against"),
    ("nncf", "forge", "calibrated INT8 for OpenVINO"),
    ("prefect", "forge", "running and scheduling the flows"),
    ("mlflow", "forge", "tracking and comparing runs"),
    ("uvloop", "serve", "a faster event loop for the worker"),
)
_NO_DRIVER, _INSTALL_DRIVER = "no driver found", "install the NVIDIA driver, if there is a GPU"
_DRIVER_SECONDS, _TORCH_SECONDS = 30.0, 120.0
_ROOT = Path(__file__).parent.parent
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for: whether it is there, what it is, and what it brings or would bring."""

    subject: str
    is_present: bool
    detail: str
    brings: str
    remedy: str = ""


def examine_node() -> list[Finding]:
    """Look at processor, accelerator, disk, engines and libraries; nothing heavy is imported."""
    flags = set(cpu_flags())
    return [
        Finding("processor", True, f"{cpu_model()}, {num_cores()} cores, {memory_gib():.0f} GiB memory", "everything"),
        Finding(
            "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}", "everything"
        ),
        _instructions("fast int8", flags & INT8_FLAGS, "int8 variants faster than fp32"),
        _instructions("fast bf16", flags & _BF16_FLAGS, "bf16-openvino; without it OpenVINO computes in fp32"),
        _avx512_engine(),
        _gpu(),
        _cuda_engine(),
        _disk(),
        *(_package(*entry) for entry in (*_ENGINES, *_LIBRARIES)),
    ]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON values."""
    return [asdict(finding) for finding in findings]


def _instructions(subject: str, found: set[str], brings: str) -> Finding:
    return Finding(subject, bool(found), " ".join(sorted(found)) or "no such instructions", brings, "another processor")


def _avx512_engine() -> Finding:
    brings = "8-bit integers on kernels of our own: the int8-avx512 variant"
    problem = find_problem()
    return Finding(
        "AVX-512 engine",
        problem is None,
        problem or "compiled, and the processor has it",
        brings,
        "what it says, or another variant",
    )


def _gpu() -> Finding:
    brings = "the TensorRT and CUDA engines"
    if shutil.which("nvidia-smi") is None:
        if has_nvidia_driver():  # a Jetson or a slim container
            detail, remedy = "a driver, but no nvidia-smi that names the GPU", "the engines do without nvidia-smi"
            return Finding("NVIDIA GPU", False, detail, brings, remedy)
        return Finding("NVIDIA GPU", False, _NO_DRIVER, brings, _INSTALL_DRIVER)
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    check = "check the driver: run nvidia-smi"
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("NVIDIA GPU", False, f"nvidia-smi does not answer in {_DRIVER_SECONDS:g} s", brings, check)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return Finding("NVIDIA GPU", False, "nvidia-smi finds no GPU", brings, check)
    return Finding("NVIDIA GPU", True, "; ".join(lines), brings)


def _cuda_engine() -> Finding:
    """Asked in a process of its own, and only where there is a driver: torch takes seconds and the GPU's memory."""
    brings = "packed inference on kernels of our own: the cuda-fp16 and cuda-fp8 variants"
    if not has_nvidia_driver():
        return Finding("CUDA engine", False, _NO_DRIVER, brings, _INSTALL_DRIVER)
    command = [sys.executable, "-m", "serving.engines.cuda_node"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TORCH_SECONDS, cwd=_ROOT)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return Finding(
            "CUDA engine", False, f"cannot be asked: {type(error).__name__}", brings, "run its module by hand"
        )
    return Finding("CUDA engine", **answer, brings=brings)


def _disk() -> Finding:
    folder = state_dir()
    existing = folder if folder.exists() else Path.cwd()
    free = shutil.disk_usage(existing).free / 1e9
    return Finding("disk", free > 2, f"{free:.1f} GB free for {folder}", "about 1 GB a model", "free some space")


def _package(name: str, extra: str, brings: str) -> Finding:
    remedy = f"pip install '.[{extra}]' in the checkout"
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return Finding(name, False, "not installed", brings, remedy)
    try:
        return Finding(name, True, version(name), brings)
    except PackageNotFoundError:
        return Finding(name, True, "version unknown", brings)
