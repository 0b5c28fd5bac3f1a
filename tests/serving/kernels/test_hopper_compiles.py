"""The GEMM in Gluon compiles for its GPU on any machine: its language says what it cannot take only there."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_form_of_the_gemm_for_hopper_compiles(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.kernels.compile_hopper"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout)
    assert len(sizes) == 6
    assert all(size > 1000 for size in sizes.values())
