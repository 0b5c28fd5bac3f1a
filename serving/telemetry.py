"""No telemetry of our libraries: what has to be said to them before they are imported."""

import os
import sys


def disable_telemetry() -> None:
    """Keep onnxruntime, OpenVINO, NNCF, MLflow and the hub from reporting home, and from keeping files there for it.

    Works only before they are imported. OpenVINO and NNCF have no setting of their own: without the package
    `openvino_telemetry` they fall back to stubs, so it is made to look as if it were not installed.
    """
    for name in ("ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an entry of None: ImportError
