"""How the demo ends when it does not come to its end."""

import json

import pytest

from flows import demo
from tasks.errors import CorpusRejected


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CorpusRejected("the corpus is empty"), "the corpus is empty"),
        (KeyboardInterrupt(), "interrupted: finished steps are kept, and the next run goes on from them"),
    ],
)
def test_demo_that_ends_early_says_why_and_still_prints_its_document(
    error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(demo, "run_demo", fail)
    assert demo.main() == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"ok": False, "error": reason}
    assert printed.err == f"error: {reason}\n"
