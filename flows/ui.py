"""`make ui`: the MLflow and Prefect pages over this folder's own runs, on this machine only."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

from flows.environment import make_state_folder, prepare_environment
from tasks.state import state_dir
from tasks.tracking import default_tracking_uri

_MLFLOW_PORT, _PREFECT_PORT = 5000, 4200


def main() -> int:
    """Run both servers until Ctrl-C. Returns the exit status."""
    prepare_environment()
    make_state_folder()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tracking = default_tracking_uri()
    if not (state_dir() / "mlflow").is_dir():
        print(f"error: {state_dir()} has no runs to show: run make demo first", file=sys.stderr)
        return 1
    mlflow = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking]
    mlflow += ["--host", "127.0.0.1", "--port", str(_MLFLOW_PORT)]
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(_PREFECT_PORT)]
    with ExitStack() as stack:
        for command in (mlflow, prefect):
            process = stack.enter_context(subprocess.Popen(command, env=os.environ))
            stack.callback(process.send_signal, signal.SIGTERM)
        print(
            f"MLflow: http://127.0.0.1:{_MLFLOW_PORT}   Prefect: http://127.0.0.1:{_PREFECT_PORT}   (Ctrl-C ends both)"
        )
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
