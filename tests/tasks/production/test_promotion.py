import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry.approval import ApprovalPolicy, decide
from registry.errors import (
    BundleIncomplete,
    BundleNotFound,
    BundleTooLarge,
    GateFailed,
    RegistryError,
    SignatureMissing,
)
from registry.events import Judged, Refused
from registry.gate import GateLimits
from registry.ledger import read_ledger
from registry.manifest import read_manifest
from registry.promotion import status
from registry.signing import make_keys
from registry.store import FolderStore
from tasks.production.case_page import describe_case
from tasks.production.delivery import WorkerConfig
from tasks.production.promotion import Case, judge_published, move, open_case, put_back, wanted_aliases
from tests.published import QUALITY, publish_bundle
from tests.servers import free_port


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "registry")


def open_published(store: FolderStore, digest: str, limits: GateLimits | None = None) -> Case:
    return open_case.fn(store, "tiny", digest, limits or GateLimits(), "linus", "a test")


def approve_and_move(case: Case) -> None:
    approval = decide("ada", case.digest, case.gate, "approve", ApprovalPolicy(), now=datetime.now(UTC))
    move.fn(case, [approval], ApprovalPolicy())


def test_case_of_a_good_bundle_passes_and_is_recorded(store: FolderStore, tmp_path: Path) -> None:
    digest = publish_bundle(store, tmp_path / "bundle")
    case = open_published(store, digest[:12])
    assert (case.digest, case.replaces, case.gate.verdict) == (digest, None, "pass")
    (entry,) = read_ledger(store, "tiny")
    assert entry.event == Judged(bundle=digest, report=case.gate)


@pytest.mark.parametrize(
    ("quality", "reason"),
    [
        (
            {name: QUALITY[name] for name in QUALITY if name != "recall_at_10_loss"},
            "recall_at_10_loss was not measured",
        ),
        (
            {name: QUALITY[name] for name in QUALITY if name != "engine_cosine_mean"},
            "engine_cosine_mean was not measured",
        ),
        ({**QUALITY, "engine_cosine_mean": 0.93}, "bad end 0.93 is under the limit 0.999"),
        ({**QUALITY, "cosine_mean": None}, "cosine_mean is not a finite measurement: value is nan"),
        ({**QUALITY, "cosine_mean": math.nan}, "cosine_mean is not a finite measurement: value is nan"),
        ({**QUALITY, "cosine_mean": 0.9}, "bad end 0.9 is under the limit 0.99"),
    ],
    ids=["missing", "engine unmeasured", "engine saturates", "null", "NaN", "worse"],
)
def test_case_that_fails_the_gate_is_refused_on_record(
    store: FolderStore, tmp_path: Path, quality: dict[str, float | None], reason: str
) -> None:
    digest = publish_bundle(store, tmp_path / "bundle", quality=quality)
    with pytest.raises(GateFailed, match=reason):
        open_published(store, digest)
    refusal, verdict = read_ledger(store, "tiny")
    assert isinstance(verdict.event, Judged)
    assert verdict.event.report.verdict == "fail"
    assert isinstance(refusal.event, Refused)
    assert (refusal.event.error, refusal.event.asked_by, refusal.event.bundle) == ("GateFailed", "linus", digest)
    assert reason in refusal.event.reason


def test_case_of_a_wrong_digest_is_refused_on_record(store: FolderStore, tmp_path: Path) -> None:
    publish_bundle(store, tmp_path / "bundle")
    with pytest.raises(BundleNotFound, match="0123456789ab"):
        open_published(store, "0123456789ab")
    (entry,) = read_ledger(store, "tiny")
    assert isinstance(entry.event, Refused)
    assert entry.event.bundle == "0123456789ab"


def test_case_of_a_bundle_that_may_not_be_pulled_is_refused_on_record(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish_bundle(store, tmp_path / "bundle")
    make_keys(tmp_path / "release.pem", tmp_path / "release.pub")
    (store.root / "models" / "tiny" / digest / "link").symlink_to(tmp_path / "release.pem")
    cases: list[tuple[str, str, type[RegistryError]]] = [
        ("THORFORGE_CACHE_BYTES", "1", BundleIncomplete),
        ("THORFORGE_PUBLIC_KEY", str(tmp_path / "release.pub"), SignatureMissing),
        ("THORFORGE_MAX_BUNDLE_BYTES", "100", BundleTooLarge),
    ]
    for variable, value, error in cases:
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(error):
                open_published(store, digest)
        refused = next(read_ledger(store, "tiny")).event
        assert isinstance(refused, Refused)
        assert (refused.action, refused.error, refused.bundle) == ("promote", error.__name__, digest)
        (store.root / "models" / "tiny" / digest / "link").unlink(missing_ok=True)


def test_case_counts_speed_only_beside_the_bundle_in_production(store: FolderStore, tmp_path: Path) -> None:
    first = publish_bundle(store, tmp_path / "first")
    approve_and_move(open_published(store, first))
    beside_it = publish_bundle(store, tmp_path / "second", seed=1, champion=first)
    beside_another = publish_bundle(store, tmp_path / "third", seed=2, champion="f" * 64)
    case = open_published(store, beside_it)
    assert (case.gate.verdict, case.replaces) == ("pass", first)
    assert "latency_ratio_vs_champion" in {result.metric for result in case.gate.results}
    with pytest.raises(GateFailed, match="latency_ratio_vs_champion was not measured"):
        open_published(store, beside_another)


def test_case_that_is_in_production_already_is_not_judged_again(store: FolderStore, tmp_path: Path) -> None:
    digest = publish_bundle(store, tmp_path / "bundle")
    approve_and_move(open_published(store, digest))
    before = len(list(read_ledger(store, "tiny")))
    assert open_published(store, digest).is_in_production
    assert len(list(read_ledger(store, "tiny"))) == before


def test_gate_needs_the_reports(store: FolderStore, tmp_path: Path) -> None:
    publish_bundle(store, tmp_path / "bundle")
    (tmp_path / "bundle" / "reports" / "quality.json").write_text("{")
    with pytest.raises(BundleIncomplete, match=r"quality\.json cannot be read"):
        judge_published(tmp_path / "bundle", read_manifest(tmp_path / "bundle"), GateLimits(), None)


def test_aliases_follow_the_channels(store: FolderStore, tmp_path: Path) -> None:
    assert wanted_aliases(store, "tiny") == {"champion": None, "previous": None, "candidate": None}
    first = publish_bundle(store, tmp_path / "first")
    approve_and_move(open_published(store, first))
    second = publish_bundle(store, tmp_path / "second", seed=1, champion=first)
    approve_and_move(open_published(store, second))
    assert wanted_aliases(store, "tiny") == {"champion": second, "previous": first, "candidate": None}


def test_promotion_that_fails_is_put_back_on_record(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channel first, then workers and aliases: those that cannot be reached are named, and stop nothing."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    first = publish_bundle(store, tmp_path / "first")
    only = open_published(store, first)
    approve_and_move(only)
    dead = f"http://127.0.0.1:{free_port()}"
    workers = [WorkerConfig(url=dead)]
    said = put_back.fn(only, workers, {}, dead, "a worker failed")
    assert said.startswith(f"production points nowhere again; {dead} is left as it is: what it served before is not")
    assert status(store, "tiny") is None
    approve_and_move(open_published(store, first))
    case = open_published(store, publish_bundle(store, tmp_path / "second", seed=1, champion=first))
    approve_and_move(case)
    said = put_back.fn(case, workers, {}, dead, "a worker failed")
    assert said.startswith(f"production is {first} again; {dead}/api/v1/models: ConnectError")
    assert "thorforge reconcile --repair" in said
    production = status(store, "tiny")
    assert production is not None
    assert (production.channel.digest, production.channel.sequence) == (first, 5)
    assert production.move is not None
    assert (production.move.kind, production.move.reason) == ("rollback", "promotion undone: a worker failed")
    refused = next(read_ledger(store, "tiny")).event
    assert isinstance(refused, Refused)
    assert (refused.action, refused.bundle, refused.error) == ("verify", first, "VerificationFailed")


def test_page_holds_what_an_approver_needs(store: FolderStore, tmp_path: Path) -> None:
    limits = GateLimits(cosine_mean_pass=0.9995)
    case = open_published(store, publish_bundle(store, tmp_path / "bundle"), limits)
    policy = ApprovalPolicy(approvers=("ada", "grace"), required=2, refuse_requester=True)
    page = describe_case(case, policy, (), "ApproverUnknown: mallory may not approve", "http://mlflow/report.html")
    for part in (
        "The gate says caution",
        "A yes takes an override",
        "ApproverUnknown: mallory may not approve",
        "under the limit 0.9995",
        "0 of 2",
        "ada, grace",
        "not linus",
        case.digest[:12],
        "(http://mlflow/report.html)",
    ):
        assert part in page
    assert max(map(len, page.split())) <= 60, "Prefect's dialog does not break longer words"
