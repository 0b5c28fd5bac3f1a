"""The process environment of a run: all state below the working folder, no telemetry, no server left behind.

Called before Prefect, MLflow or transformers are imported, because they read the environment at import.
"""

import os

import psutil

from serving.telemetry import disable_telemetry
from tasks.state import describe_process, is_dead, state_dir

_OWNER_VARIABLE = "THORFORGE_OWNER"


def prepare_environment() -> None:
    """Set what is not set already."""
    state = state_dir()
    defaults = {
        "PREFECT_HOME": str(state / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Its own limit of 20 s is missed on a slow or busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "TOKENIZERS_PARALLELISM": "true",
        # Inherited by the temporary Prefect server, so that the next run can tell whose it was.
        _OWNER_VARIABLE: describe_process(os.getpid()),
        "MPLCONFIGDIR": str(state / "matplotlib"),
        "HF_HOME": str(state / "hub"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    disable_telemetry()


def make_state_folder() -> None:
    """Make the folders that Prefect expects to find. Commands that keep no state make none."""
    (state_dir() / "prefect").mkdir(parents=True, exist_ok=True)


def end_orphans() -> int:
    """End temporary Prefect servers whose run was killed before it could stop them; returns how many there were.

    Only processes of this user and this state folder whose owner is dead are touched.
    """
    orphans = [process for process in psutil.process_iter() if _is_orphan(process)]
    for process in orphans:
        process.terminate()
    psutil.wait_procs(orphans, timeout=10)
    return len(orphans)


def _is_orphan(process: psutil.Process) -> bool:
    try:
        environment = process.environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    owner = environment.get(_OWNER_VARIABLE)
    same_home = environment.get("PREFECT_HOME") == os.environ.get("PREFECT_HOME")
    return owner is not None and same_home and is_dead(owner)
