"""Bundles delivered to a real worker, through its admin API."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.client import push
from registry.errors import BundleNotFound
from registry.events import Proved, Refused
from registry.ledger import read_ledger
from registry.manifest import hash_file, payload_checksum, read_manifest, write_manifest
from registry.store import FolderStore
from tasks.errors import VerificationFailed
from tasks.production.delivery import WorkerClient, WorkerConfig, deliver, prove, read_golden_texts
from tests.bundles import GOLDEN_TEXTS, make_bundle
from tests.published import turn_golden_round
from tests.servers import free_port
from tests.worker import run_worker

TOKEN = "an-admin-token-of-a-test"


@dataclass(frozen=True)
class Node:
    """A registry with two bundles, and a worker that starts with the first."""

    store: FolderStore
    digests: tuple[str, str]
    worker: WorkerConfig


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    store, root, token = FolderStore(folder / "registry"), folder / "root", folder / "token"
    for seed in (0, 1):
        make_bundle(folder / str(seed), seed=seed)
    digests = (push(folder / "0", store), push(folder / "1", store))
    token.write_text(f"# of a test\n{TOKEN}\n")
    root.mkdir()
    options = ["--models-root", str(root), "--security-admin-tokens-file", str(token)]
    with run_worker(folder / "0", *options) as running:
        config = WorkerConfig(url=running.base_url, root=root, admin_token_file=token, timeout_seconds=20)
        yield Node(store, digests, config)


def test_delivery_swaps_and_proves_by_the_workers_answers(node: Node) -> None:
    for digest in (node.digests[1], node.digests[0], node.digests[0]):
        proof = deliver(node.worker, node.store, "tiny", digest)
        assert proof.digest == digest
        assert proof.live_texts == len(GOLDEN_TEXTS)
        assert proof.golden_mean == pytest.approx(1, abs=1e-5)
        assert proof.live_mean == pytest.approx(1, abs=1e-5)
        assert str(proof).startswith(f"{node.worker.url} serves fp32-onnx-")


def test_proof_and_its_failure_are_on_record(node: Node) -> None:
    proof = prove(node.worker, node.store, "tiny", node.digests[0], "ada")
    with pytest.raises(BundleNotFound):
        prove(node.worker, node.store, "tiny", "0" * 64, "ada")
    refused, proved = (entry.event for entry in read_ledger(node.store, "tiny", limit=2))
    assert isinstance(proved, Proved)
    assert (proved.bundle, proved.worker, proved.asked_by) == (node.digests[0], node.worker.url, "ada")
    assert (proved.live_texts, proved.live_mean) == (proof.live_texts, proof.live_mean)
    assert isinstance(refused, Refused)
    assert (refused.action, refused.bundle, refused.error) == ("verify", "0" * 64, "BundleNotFound")


@pytest.mark.parametrize("url", ["http://ada:secret@host", "http://host/?key=secret", "ftp://host"])
def test_url_of_a_worker_holds_no_secret(url: str) -> None:
    with pytest.raises(ValidationError):
        WorkerConfig(url=url)


def test_delivery_names_what_is_served_instead(node: Node) -> None:
    follower = node.worker.model_copy(update={"root": None, "timeout_seconds": 0.01})
    deliver(node.worker, node.store, "tiny", node.digests[0])
    with pytest.raises(VerificationFailed, match=rf"serves fp32-onnx-\w+ of tiny, not {node.digests[1]}, after 0.01 s"):
        deliver(follower, node.store, "tiny", node.digests[1])
    assert deliver(follower, node.store, "tiny", node.digests[0]).digest == node.digests[0]


def test_delivery_says_why_a_worker_refuses(node: Node, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("not-the-token\n")
    with pytest.raises(VerificationFailed, match=r"/api/v1/admin/models/swap answered 401"):
        deliver(node.worker.model_copy(update={"admin_token_file": wrong}), node.store, "tiny", node.digests[0])
    wrong.write_text("# nothing here\n")
    with pytest.raises(VerificationFailed, match="holds no key"):
        deliver(node.worker.model_copy(update={"admin_token_file": wrong}), node.store, "tiny", node.digests[0])
    dead = WorkerConfig(url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(VerificationFailed, match="ConnectError"):
        deliver(dead, node.store, "tiny", node.digests[0])
    with pytest.raises(BundleNotFound):
        deliver(node.worker, node.store, "tiny", "0" * 64)


def test_delivery_finds_vectors_that_are_not_the_teachers(node: Node, tmp_path: Path) -> None:
    """The worker serves the right digest, but what it embeds is the opposite of what the golden set asks."""
    opposite = tmp_path / "opposite"
    make_bundle(opposite)
    turn_golden_round(opposite)
    manifest = read_manifest(opposite)
    files = {**manifest.files, "golden.npz": hash_file(opposite / "golden.npz")}
    write_manifest(opposite, manifest.model_copy(update={"files": files, "checksum": payload_checksum(files)}))
    deliver(node.worker, node.store, "tiny", node.digests[0])
    with WorkerClient(node.worker, "tiny") as client:
        version = client.wait_until_served(node.digests[0], deadline=0)
        with pytest.raises(VerificationFailed, match=r"at cosine -1\.0000 to the teacher, at least 0\.99"):
            client.compare_live(opposite, version, 0.99)


def test_golden_texts_are_those_that_tokenise_alike(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    texts, embeddings = read_golden_texts(tmp_path / "bundle")
    assert texts == list(GOLDEN_TEXTS)
    assert embeddings.shape == (64, 8)
