"""Where thorforge keeps its state."""

import os
from pathlib import Path

STATE_VARIABLE = "THORFORGE_HOME"


def state_dir() -> Path:
    """Where thorforge keeps all its state: `$THORFORGE_HOME`, by default `.thorforge` of the working folder."""
    return Path(os.environ.get(STATE_VARIABLE, ".thorforge")).absolute()
