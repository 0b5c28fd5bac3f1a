"""Progress of long work: a bar on a terminal, lines in a log, and a Prefect progress artifact."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from tqdm import tqdm

_REPORT_SECONDS = 3.0

Advance = Callable[[int], None]


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show `label` advancing to `total`; yields `advance(steps)`.

    Inside a Prefect task it also feeds a progress artifact, at most once every 3 seconds.
    """
    in_task = TaskRunContext.get() is not None
    logger = get_run_logger() if in_task else getLogger("thorforge")
    artifact: UUID | None = None
    if in_task:
        key = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
        artifact = cast(UUID, create_progress_artifact(progress=0.0, key=key, description=label))
    done, reported = 0, time.monotonic()
    with tqdm(total=total, desc=label, disable=None, leave=False) as bar:

        def advance(steps: int) -> None:
            nonlocal done, reported
            done += steps
            bar.update(steps)
            if time.monotonic() - reported >= _REPORT_SECONDS and done < total:
                reported = time.monotonic()
                logger.info("%s: %d of %d (%.0f %%)", label, done, total, 100 * done / total)
                if artifact is not None:
                    update_progress_artifact(artifact, progress=100 * done / total)

        yield advance
    if artifact is not None:
        update_progress_artifact(artifact, progress=100.0)
