"""What keeps the cuda engine from running is named, with the way out."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from serving.engines.cuda_node import Node, describe, examine_node, find_problem, find_problem_here

GOOD = Node(
    "2.11.0", True, "3.6.0", None, "NVIDIA H200", (9, 0), ("sm_80", "sm_90", "compute_90"), "/usr/bin/gcc", True
)


@pytest.mark.parametrize("compute", ["f16", "f8"])
def test_a_complete_node_has_no_problem(compute: str) -> None:
    assert find_problem(GOOD, compute) is None


@pytest.mark.parametrize(
    ("changes", "compute", "message"),
    [
        ({}, "f32", "has no f32: it computes in f16 or f8"),
        ({"torch_version": None}, "f16", "torch is not installed: pip install"),
        ({"triton_version": None}, "f16", "triton is not installed: pip install"),
        ({"is_cuda_build": False}, "f16", "built without CUDA: install a CUDA build"),
        ({"start_error": "Found no NVIDIA driver on your system."}, "f16", "no NVIDIA GPU"),
        ({"start_error": "No CUDA GPUs are available"}, "f16", "give it to the container"),
        (
            {"start_error": "The NVIDIA driver on your system is too old (found version 12020)"},
            "f16",
            "update the driver",
        ),
        ({"start_error": "CUDA unknown error"}, "f16", r"CUDA does not start \(CUDA unknown error\): see nvidia-smi"),
        ({"capability": (7, 5)}, "f16", r"compute capability 7\.5: f16 needs 8\.0"),
        ({"capability": (8, 6)}, "f8", r"compute capability 8\.6: f8 needs 8\.9"),
        ({"architectures": ("sm_80", "sm_86")}, "f16", "built for sm_80, sm_86, NVIDIA H200 is sm_90: install a build"),
        ({"architectures": ("sm_80", "sm_120", "compute_120")}, "f16", "is sm_90"),
        ({"compiler": None}, "f16", "C compiler and finds none: install gcc"),
        (
            {"compiler": None, "cc": "ccache gcc"},
            "f16",
            "CC is 'ccache gcc', which is no program .*: set it to a C comp",
        ),
        ({"has_headers": False}, "f16", "headers and finds none: install python3-dev"),
    ],
)
def test_find_problem_names_what_is_missing(changes: dict[str, object], compute: str, message: str) -> None:
    problem = find_problem(replace(GOOD, **changes), compute)  # type: ignore[arg-type]
    assert problem is not None
    assert re.search(message, str(problem)), str(problem)


@pytest.mark.parametrize(
    ("capability", "architecture"), [((11, 0), "compute_90"), ((8, 9), "sm_86"), ((9, 0), "sm_90a")]
)
def test_a_build_runs_on_later_gpus_of_its_kind(capability: tuple[int, int], architecture: str) -> None:
    assert find_problem(replace(GOOD, capability=capability, architectures=(architecture,)), "f16") is None


def test_examine_node_sees_the_libraries_that_are_here() -> None:
    node = examine_node()
    assert node.torch_version is not None
    assert node.gpu == "" or node.capability > (0, 0)


@pytest.mark.parametrize(
    ("cc", "found"),
    [
        (None, "gcc"),
        ("my-cc", "my-cc"),
        ("my-cc -m64", None),
        ("", None),
        ("/nonexistent/cc", None),
    ],
)
def test_cc_is_a_compiler_where_it_is_a_program(
    cc: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    for name in ("gcc", "my-cc"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    node = examine_node()
    assert (node.cc, node.compiler) == (cc, found and str(tmp_path / found))
    problem = find_problem(replace(GOOD, cc=node.cc, compiler=node.compiler), "f16")
    assert str(problem).startswith("None" if found else f"CC is {cc!r}, ")


def test_find_problem_here_looks_at_the_node_only_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines._DRIVER_PATHS", ())
    monkeypatch.setattr("serving.engines.cuda_node.examine_node", lambda: GOOD)
    assert str(find_problem_here("f16")).startswith("no NVIDIA GPU that this machine has a driver for: install it")
    assert str(find_problem_here("f32")).startswith("the cuda engine has no f32")
    monkeypatch.setattr("serving.engines._DRIVER_PATHS", ("/",))
    assert find_problem_here("f16") is None


def test_describe_tells_what_the_gpu_computes_in_or_what_to_do() -> None:
    assert describe(GOOD) == {"is_present": True, "detail": "NVIDIA H200, torch 2.11.0, f16 and f8", "remedy": ""}
    older = describe(replace(GOOD, capability=(8, 0)))
    assert older["is_present"]
    assert "no f8: NVIDIA H200 has compute capability 8.0" in str(older["detail"])
    missing = describe(replace(GOOD, compiler=None))
    assert (missing["is_present"], missing["remedy"]) == (False, "install gcc or set CC")
