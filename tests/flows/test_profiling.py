"""`thorforge profile`: what it refuses, what it runs here, and its table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows import profiling
from flows.cli import app
from flows.profiling import Profiled, as_table, profile_engine, profile_source
from serving.engines.bert import name_linear
from serving.engines.cuda_node import Node, find_problem
from tasks.errors import ProfileInvalid
from tasks.measurement.ceilings import Ceilings
from tasks.measurement.profile import summarise
from tasks.measurement.trace import Span, read_spans
from tasks.measurement.work import count_work
from tests.tasks.measurement.timelines import H100_MINILM, MINILM, lay_out

H200 = Ceilings(4.1e12, 7.9e14, 1.512e15)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "examine_node", lambda: Node("2.13.0+cpu", False, "3.7.1"))


def render(profiled: Profiled, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(as_table(profiled))
    return captured.get()


def test_profile_runs_the_twin_where_there_is_no_gpu_and_says_why(tiny_teacher: Path, tmp_path: Path) -> None:
    trace = tmp_path / "deep" / "trace.json"
    profiled = profile_source(str(tiny_teacher), "3x9", trace, "f8")
    rows = profiled.profile.rows
    assert {"query", "output", "up", "down"} == {row.linear for row in rows if row.linear}
    assert {"attention", "norms", "embedding"} <= {row.kind for row in rows}
    events = json.loads(trace.read_text())["traceEvents"]
    assert all({"ts", "dur", "pid", "tid"} <= event.keys() for event in events if event.get("ph") == "X")
    assert profiled.ceilings.flops_per_second > 1e6
    assert (profiled.compute, profiled.ceilings.narrow_flops_per_second) == ("f32", None)
    problem = find_problem(Node("2.13.0+cpu", False, "3.7.1"), "f8")
    assert problem is not None
    assert f"not the cuda engine: {problem.reason}" in render(profiled)
    assert "not the cuda engine" not in render(replace(profiled, problem=None))


@pytest.mark.parametrize(("batch", "message"), [("8", "not texts x tokens"), ("0x4", "0x4"), ("1x9999", "positions")])
def test_profile_refuses_a_batch_it_cannot_make(batch: str, message: str, tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match=message):
        profile_source(str(tiny_teacher), batch, tmp_path / "trace.json")


@pytest.mark.parametrize("compute", ["fp8", "f32", ""])
def test_profile_refuses_a_compute_that_no_kernel_has(compute: str, tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match=f"compute '{compute}' is unknown: give f16 or f8"):
        profile_source(str(tiny_teacher), "3x9", tmp_path / "trace.json", compute)
    with pytest.raises(ProfileInvalid, match="unknown"):
        profile_engine(tmp_path / "model.safetensors", 3, 9, tmp_path / "trace.json", compute)


@pytest.mark.parametrize(
    ("config", "message"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "is not a JSON object but list")],
)
def test_profile_names_a_config_that_cannot_be_read(config: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ProfileInvalid, match=message) as refused:
        profile_source(str(tmp_path), "3x9", tmp_path / "trace.json")
    assert str(tmp_path / "config.json") in str(refused.value)


def test_profile_json_holds_linear_layers_and_kernels(tiny_teacher: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = CliRunner().invoke(app, ["profile", str(tiny_teacher), "--batch", "2x8", "--trace", str(trace), "--json"])
    document = json.loads(done.stdout)
    (up,) = [row for row in document["profile"]["rows"] if row["linear"] == "up"]
    assert {"aten::linear", "aten::gelu"} == {kernel["name"] for kernel in up["kernels"]}
    assert (document["compute"], document["problem"]) == ("f32", "torch 2.13.0+cpu is built without CUDA")


def test_table_of_a_recorded_run_has_all_numbers_at_80_columns() -> None:
    profile = summarise(read_spans(H100_MINILM), 3, count_work(MINILM, [128] * 1024), H200)
    text = render(Profiled(profile, H200, "cuda 13.0 NVIDIA H100 f16", "f16", None, Path("trace.json")))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert lines["up"] == ["6", "1.751", "24.1%", "3027", "1729", "42%", "927.7", "529854", "67%"]
    assert lines["output"][-2:] == ["325763", "41%"]
    assert lines["norms"][:3] == ["12", "0.816", "11.2%"]
    assert "nvjet_sm90_hsh_192x192_64x4_1x2_h_badd_coopB_TNN" in "".join(text.split())
    assert "not told apart" not in text


def test_table_of_the_largest_numbers_is_whole_at_80_columns() -> None:
    config = replace(MINILM, hidden=1024, heads=16, layers=24, intermediate=4096)
    long = "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_f16_256x128_32x3_tn_align8<int, 4>>(Params)"
    layer = ["_linear_kernel", "_attention_kernel", "_linear_kernel", "_linear_kernel", long]
    spans = [Span(span.name, span.start * 100, span.end * 100) for span in lay_out(layer * 24)]
    profile = summarise(spans, 1, count_work(config, [512] * 256, "f8"), H200)
    text = render(Profiled(profile, H200, "cuda 13.0 NVIDIA H200 f8", "f8", None, Path("trace.json")))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    up = next(line for line in text.splitlines() if line.startswith("up f8"))
    flops, num_bytes = 24 * 2 * 131_072 * 1024 * 4096, 24 * (1024 * 4096 + 131_072 * 5120)
    assert up.split()[2:] == [
        "24", "24.0", "20.0%", f"{num_bytes / 1e6:.0f}", "675.3", "16%", f"{flops / 1e9:.0f}", "1099512", "73%",
    ]  # fmt: skip
    assert "cutlass::Kernel2" in "".join(text.split())
    assert "tensorop" not in "".join(text.split())


@pytest.mark.parametrize(("narrow", "says", "share"), [(1.512e15, "1512000 GFLOP/s", "%"), (None, "not measured", "?")])
def test_table_says_what_e4m3_is_held_against(narrow: float | None, says: str, share: str) -> None:
    config, ceilings = (
        replace(MINILM, layers=1, float16=frozenset({name_linear(0, 1)})),
        replace(H200, narrow_flops_per_second=narrow),
    )
    spans = lay_out(["gemm_wide", "attention_hopper", "gemm_wide", "feed_forward"])
    profile = summarise(spans, 1, count_work(config, [64] * 8, "f8"), ceilings)
    text = render(Profiled(profile, ceilings, "cuda 13.0 NVIDIA H200 f8", "f8", None, Path("trace.json")))
    assert f"product in f8: {says}" in text
    ends = {" ".join(line.split()[:2]): line.split()[-1] for line in text.splitlines() if len(line.split()) > 9}
    assert [ends[name][-1] for name in ("query f8", "block f8", "output f16")] == [share, share, "%"]


def test_table_says_that_linear_layers_are_not_told_apart() -> None:
    profile = summarise(lay_out(["gemm_wide"] * 3), 1, count_work(MINILM, [64] * 8), H200)
    text = render(Profiled(profile, H200, "cuda 13.0 NVIDIA H200 f16", "f16", None, Path("trace.json")))
    assert any(line.startswith("products ") for line in text.splitlines())
    assert "linear layers are not told apart" in text
    assert "3 products, 0 attentions and 0 blocks does not fit 6 layers" in " ".join(text.split())


def test_a_kind_of_many_kernels_names_the_longest() -> None:
    spans = [Span(f"aten::op{number}", 100 * number, 100 * number + number + 1) for number in range(7)]
    profile = summarise(spans, 1, count_work(MINILM, [64] * 8), H200)
    text = render(Profiled(profile, H200, "the CPU", "f32", None, Path("trace.json")))
    assert [name in text for name in ("aten::op6", "aten::op3", "aten::op2", "3 more")] == [True, True, False, True]
