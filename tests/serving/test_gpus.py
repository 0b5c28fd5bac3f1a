import math
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.gpus import find_gpus
from serving.metrics import Metrics

# What NVML has for this: a data-centre GPU, and a Jetson that says nothing of its memory (3: not supported).
_SOURCE = """
#include <stdlib.h>
static char handles[2];
int nvmlInit_v2(void) { return getenv("BROKEN_DRIVER") ? 9 : 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = &handles[index]; return 0; }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) { rates[0] = 37; rates[1] = 5; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    if (handle == &handles[1]) return 3;
    memory[0] = 80000000000ULL; memory[1] = 70000000000ULL; memory[2] = 10000000000ULL;
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library with NVML's interface."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "nvml.so", folder / "nvml.c"], check=True)
    return str(folder / "nvml.so")


def gpu_lines(metrics: Metrics) -> list[str]:
    return [line for line in metrics.render().decode().splitlines() if line.startswith("nvidia_gpu")]


def test_gpus_are_scraped_for_what_they_tell(driver: str) -> None:
    metrics = Metrics()
    metrics.watch_gpus(find_gpus(driver))
    assert gpu_lines(metrics) == [
        'nvidia_gpu_duty_cycle{gpu="0"} 37.0',
        'nvidia_gpu_duty_cycle{gpu="1"} 37.0',
        'nvidia_gpu_memory_usage_bytes{gpu="0"} 1e+10',
    ]


def test_driver_that_does_not_answer_is_logged_and_nothing_is_scraped(
    driver: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BROKEN_DRIVER", "1")
    assert find_gpus(driver) == ()
    assert "NVML answers 9" in caplog.text


def test_machine_without_a_driver_has_no_gpus(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.watch_gpus(find_gpus(str(tmp_path / "none.so")))
    assert gpu_lines(metrics) == []


@pytest.mark.gpu
def test_gpu_of_this_machine_tells() -> None:
    (gpu, *_) = find_gpus()
    assert 0 <= gpu.duty_percent() <= 100
    assert gpu.memory_bytes() > 0 or math.isnan(gpu.memory_bytes())
