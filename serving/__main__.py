"""`python -m serving --bundle DIR`: the worker's process."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from prometheus_client import disable_created_metrics

from serving.access import warn_if_open
from serving.config import describe_settings, load_settings
from serving.errors import ServingError
from serving.server import WorkerServer, base_url, bind, configure_logging
from serving.worker import Worker

_log = logging.getLogger("serving")


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serve until a signal. Returns the exit status; what is wrong is one `error:` line on stderr.

    Once requests are welcome, one line on stdout says where: `ready url=... model=... model_version=... engine=...`.
    """
    try:
        settings = load_settings(argv, environ)
        configure_logging(settings)
        _log.info("settings %s", describe_settings(settings))
        warn_if_open(settings)
        listener = bind(settings)
        url = base_url(listener, is_tls=settings.tls.certificate is not None)
        _log.info("listening url=%s", url)
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when a series began nobody asks
        worker = Worker(settings)

        def announce() -> None:
            for service in worker.services:
                model = service.model
                print(
                    f"ready url={url} model={model.name} model_version={model.manifest.version} "
                    f"engine={model.engine.runtime.replace(' ', '-')}",
                    flush=True,
                )

        server = WorkerServer(worker, announce)
        server.run(sockets=[listener])
        if server.failure is not None:
            raise server.failure
    except ServingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
