"""The process environment of a run: all state below the working folder, no telemetry, no network for cached models.

Called before Prefect, MLflow or transformers are imported, because they read the environment at import.
"""

import os

from tasks.state import state_dir
from tasks.telemetry import disable_telemetry


def prepare_environment() -> None:
    """Set what is not set already, and make the state folder."""
    state = state_dir()
    (state / "prefect").mkdir(parents=True, exist_ok=True)
    defaults = {
        "PREFECT_HOME": str(state / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "TOKENIZERS_PARALLELISM": "true",
        "MPLCONFIGDIR": str(state / "matplotlib"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    disable_telemetry()
