"""What `make e2e` needs from the system: installed where that is allowed, otherwise named."""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

# Program → Debian package. PostgreSQL's server is not on the path there, but by version below /usr/lib.
_PROGRAMS = {"chromium": "chromium", "postgres": "postgresql"}
_ELSEWHERE = {"postgres": "/usr/lib/postgresql/*/bin/postgres"}
# Beside the packages, among which those of torch's CUDA build may be.
_COMPILER = ("nvidia-cuda-nvrtc==13.5.37", "cuda-bindings==13.0.3", "cuda-pathfinder==1.9.1")
COMPILER_FOLDER = Path(sys.prefix) / "nvrtc"


def main() -> int:
    """Install NVIDIA's compiler, and missing system packages as root on Debian; otherwise say which. Returns the exit
    status."""
    if not COMPILER_FOLDER.exists():
        quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(COMPILER_FOLDER)]
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *_COMPILER], check=True)
    missing = [package for program, package in _PROGRAMS.items() if not _is_there(program)]
    if not missing:
        return 0
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.stderr.write(f"error: make e2e needs {', '.join(missing)}: install with your system's package manager\n")
        return 1
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing]
    for command in (["apt-get", "update", "--quiet"], install):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return 0


def _is_there(program: str) -> bool:
    return shutil.which(program) is not None or bool(glob(_ELSEWHERE.get(program, "")))


if __name__ == "__main__":
    sys.exit(main())
