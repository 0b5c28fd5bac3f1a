"""`make ui`: the MLflow and Prefect pages over this folder's own runs, on this machine only."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from flows.environment import make_state_folder, prepare_environment
from tasks.state import state_dir
from tasks.tracking import default_tracking_uri


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both servers until Ctrl-C, or until one of them ends. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description=__doc__)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    parser.add_argument("--prefect-port", type=int, default=4200)
    ports = parser.parse_args(arguments)
    prepare_environment()
    make_state_folder()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not (state_dir() / "mlflow").is_dir():
        print(f"error: {state_dir()} has no runs to show: run make demo first", file=sys.stderr)
        return 1
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_tracking_uri()]
    mlflow = [*server, "--host", "127.0.0.1", "--port", str(ports.mlflow_port)]
    server = [sys.executable, "-m", "prefect", "server", "start"]
    prefect = [*server, "--host", "127.0.0.1", "--port", str(ports.prefect_port)]
    # Or Prefect's pages would ask port 4200 wherever they are.
    env = {**os.environ, "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{ports.prefect_port}/api"}
    with ExitStack() as stack:
        for command in (mlflow, prefect):
            process = stack.enter_context(subprocess.Popen(command, env=env))
            stack.callback(process.send_signal, signal.SIGTERM)
        print(
            f"MLflow: http://127.0.0.1:{ports.mlflow_port}   Prefect: http://127.0.0.1:{ports.prefect_port}   "
            "(Ctrl-C ends both)",
            flush=True,
        )
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        except KeyboardInterrupt:
            return 0
    print("error: a server ended, see above; where its port is in use, give another one", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
