"""The worker as a process under thousands of requests that no client should send."""

from pathlib import Path

import httpx
import psutil
import pytest

from tests.bundles import make_bundle
from tests.fuzz import run_schemathesis, send_bytes, spoil, statuses
from tests.worker import run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

_CASES_PER_OPERATION = 1200
_MIN_CASES = 5000
_AT_ONCE = 200
_MAX_GROWTH = 0.05


def test_five_thousand_requests_made_from_the_document_are_answered_as_documented(tmp_path: Path) -> None:
    make_bundle(tmp_path / "tiny")
    with run_worker(tmp_path / "tiny") as worker:
        assert run_schemathesis(worker.base_url, _CASES_PER_OPERATION) >= _MIN_CASES
        assert "Traceback" not in worker.log()


def test_spoilt_bytes_neither_break_nor_hang_nor_grow_the_worker(tmp_path: Path) -> None:
    make_bundle(tmp_path / "tiny")
    timeouts = [
        "--limits-header-timeout-seconds", "0.3", "--limits-body-timeout-seconds", "0.3",
        "--limits-keep-alive-seconds", "1", "--limits-max-header-bytes", "4096",
    ]  # fmt: skip
    seen: set[int] = set()
    with run_worker(tmp_path / "tiny", *timeouts) as worker:
        process = psutil.Process(worker.process.pid)
        sizes = []
        for start in range(0, 40 * _AT_ONCE, _AT_ONCE):
            payloads = [spoil(seed) for seed in range(start, start + _AT_ONCE)]
            for answer in send_bytes(worker.base_url, payloads):
                seen.update(statuses(answer))
            sizes.append(process.memory_info().rss)
        assert httpx.get(f"{worker.base_url}/healthz", trust_env=False).status_code == 200
        assert "Traceback" not in worker.log()
    assert not {500, 502, 503, 504} & seen
    assert sizes[-1] <= sizes[len(sizes) // 4] * (1 + _MAX_GROWTH)
