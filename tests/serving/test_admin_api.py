"""The admin API over a real socket: who may use it, what it changes, and where its names lead."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serving.api.admin_requests import BundleRequest
from serving.models import load_model
from serving.settings import ModelSource
from tests.serving.conftest import make_settings, serve

TOKEN, KEY = "token-of-an-admin", "key-of-a-client"
ADMIN = "/api/v1/admin"
ROUTES = [
    ("GET", "/models"), ("POST", "/models/load"), ("POST", "/models/swap"), ("POST", "/models/unload"),
    ("PUT", "/traffic"),
]  # fmt: skip


class Admin(httpx.Client):
    """A client that holds the admin token."""

    def __init__(self, url: str) -> None:
        super().__init__(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=20)

    def change(self, path: str, status: int = 200, verb: str = "POST", **body: Any) -> Any:
        answer = self.request(verb, ADMIN + path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()


@pytest.fixture
def admin(bundles: Path) -> Iterator[Admin]:
    """An admin of a worker that serves `v0`, with the other bundles below its root."""
    security = {"admin_tokens": [TOKEN], "api_keys": [KEY], "open_paths": ["/readyz", "/api/v1/embed", "/metrics"]}
    models = {"available": [{"path": bundles / "v0"}], "root": bundles}
    prepared = load_model(ModelSource(path=bundles / "v0"))
    settings = make_settings(bundles, models=models, security=security)
    with serve(settings, prepared) as (url, _), Admin(url) as client:
        yield client


def embed(admin: Admin, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{admin.base_url}/api/v1/embed", json={"text": "red cat"}, headers=named, timeout=20)


def version(bundles: Path, name: str) -> str:
    return load_model(ModelSource(path=bundles / name)).manifest.version


@pytest.mark.parametrize(("verb", "path"), ROUTES)
def test_admin_api_wants_its_own_token(admin: Admin, verb: str, path: str) -> None:
    for headers in ({}, {"authorization": f"Bearer {KEY}"}, {"authorization": "Bearer wrong"}):
        answer = httpx.request(verb, f"{admin.base_url}{ADMIN}{path}", headers=headers, json={})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert not any(secret in answer.text for secret in (TOKEN, KEY, "wrong"))


@pytest.mark.parametrize(("verb", "path"), ROUTES)
def test_admin_api_without_a_token_configured_says_how_to_get_one(url: str, verb: str, path: str) -> None:
    answer = httpx.request(verb, f"{url}{ADMIN}{path}", headers={"authorization": "Bearer x"}, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_disabled")
    assert "embedding.security.admin_tokens_file" in answer.json()["error"]["message"]


def test_api_key_opens_the_rest_and_refusals_are_counted(admin: Admin) -> None:
    body = {"input": "red", "model": "tiny"}
    for headers, status in (
        ({}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
    ):
        answer = httpx.post(f"{admin.base_url}/v1/embeddings", json=body, headers=headers)
        assert answer.status_code == status
    metrics = admin.get("/metrics").text
    assert 'akidb_embed_requests_total{model="none",model_version="none",status="401"} 2.0' in metrics
    assert 'akidb_embed_errors_total{error="invalid_api_key",model="none",model_version="none"} 2.0' in metrics


def test_version_is_loaded_weighed_swapped_in_and_unloaded(admin: Admin, bundles: Path) -> None:
    first, second, third = (version(bundles, name) for name in ("v0", "v1", "v2"))
    loaded = admin.change("/models/load", bundle="v1")
    assert (loaded["model"], loaded["model_version"], loaded["loaded"], loaded["retired"]) == ("tiny", second, True, [])
    assert embed(admin).json()["model_version"] == first
    assert embed(admin, x_model_version=second).json()["model_version"] == second
    missing = embed(admin, x_model_version="v9")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert first in missing.json()["error"]["message"]

    weights = admin.change("/traffic", verb="PUT", model="tiny", weights={first: 1, second: 1})["weights"]
    assert weights == {first: 1, second: 1}
    by_key = [{embed(admin, x_traffic_key=key).json()["model_version"] for _ in range(3)} for key in "abcdefgh"]
    assert all(len(versions) == 1 for versions in by_key)
    assert set.union(*by_key) == {first, second}
    listed = {model["version"]: model for model in admin.get(f"{ADMIN}/models").json()["models"]}
    assert {name: (model["weight"], model["state"]) for name, model in listed.items()} == {
        first: (1, "serving"), second: (1, "serving"),
    }  # fmt: skip

    swapped = admin.change("/models/swap", bundle="v2")
    assert (swapped["model_version"], sorted(swapped["retired"])) == (third, sorted([first, second]))
    assert embed(admin, x_traffic_key="a").json()["model_version"] == third
    again = admin.change("/models/swap", bundle="v2")
    assert (again["loaded"], again["retired"], again["digest"]) == (False, [], swapped["digest"])
    assert f'akidb_model_swaps_total{{model="tiny",model_version="{third}"}} 1.0' in admin.get("/metrics").text
    key = {"authorization": f"Bearer {KEY}"}
    (openai,) = httpx.get(f"{admin.base_url}/v1/models", headers=key).json()["data"]
    assert openai["versions"] == [{"version": third, "weight": 1, "state": "serving"}]


def test_errors_say_whose_they_are_while_two_versions_share_a_model(admin: Admin, bundles: Path) -> None:
    first, second = (version(bundles, name) for name in ("v0", "v1"))
    admin.change("/models/load", bundle="v1")
    for name, number in ((first, 1), (second, 2)):
        body = {"text": "red cat", "dimensions": 10_000}
        for _ in range(number):
            headers = {"x-model-version": name}
            answer = httpx.post(f"{admin.base_url}/api/v1/embed", json=body, headers=headers, timeout=20)
            assert answer.status_code == 400
    metrics = admin.get("/metrics").text
    for name, number in ((first, 1), (second, 2)):
        labels = f'error="invalid_request",model="tiny",model_version="{name}"'
        assert f"akidb_embed_errors_total{{{labels}}} {number}.0" in metrics


def test_model_is_loaded_under_a_name_and_unloaded(admin: Admin) -> None:
    assert admin.get("/readyz", params={"model": "second"}).status_code == 404
    assert admin.change("/models/load", bundle="v0", name="second", engine="onnxruntime", num_threads=1)["loaded"]
    assert admin.get("/readyz", params={"model": "second"}).json() == {"status": "ready"}
    refused = admin.change("/models/unload", status=409, model="tiny")
    assert refused["error"]["code"] == "change_refused"
    assert len(admin.change("/models/unload", model="second")["retired"]) == 1
    assert admin.change("/models/unload", status=404, model="second")["error"]["code"] == "model_not_found"


def test_bundle_that_cannot_be_served_says_why_and_changes_nothing(admin: Admin, bundles: Path) -> None:
    before = embed(admin).json()
    for path in ("/models/load", "/models/swap"):
        error = admin.change(path, status=422, bundle="damaged")["error"]
        assert (error["code"], error["message"][:24]) == ("load_failed", "damaged is not served: m")
    assert embed(admin).json()["embedding"] == before["embedding"]
    assert 'akidb_model_load_failures_total{model="none"} 2.0' in admin.get("/metrics").text


@pytest.mark.parametrize("name", ["/etc", "../v1", "v1/../../v1", "nowhere", "v1/model.onnx", "v1\\x", "", "x" * 2000])
def test_name_that_leads_out_of_the_root_is_refused(admin: Admin, bundles: Path, name: str) -> None:
    error = admin.change("/models/swap", status=400, bundle=name)["error"]
    assert error["code"] == "invalid_request"
    assert str(bundles) not in error["message"]


def test_link_that_leads_out_of_the_root_is_refused(admin: Admin, bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles / "v1", tmp_path / "v1")
    (bundles / "link").symlink_to(tmp_path / "v1")
    try:
        assert "no such folder" in admin.change("/models/swap", status=400, bundle="link")["error"]["message"]
    finally:
        (bundles / "link").unlink()


def test_without_a_root_only_configured_bundles_have_names(bundles: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "current"
    pointer.write_text(str(bundles / "v1"))
    models = {"available": [{"path": pointer}, {"path": bundles / "v0", "name": "mine"}]}
    settings = make_settings(bundles, models=models, security={"admin_tokens": [TOKEN]})
    with serve(settings, load_model(ModelSource(path=bundles / "v0"))) as (url, _), Admin(url) as admin:
        assert admin.get(f"{ADMIN}/models").json()["bundles"] == ["current", "mine"]
        assert "embedding.models.root" in admin.change("/models/swap", status=400, bundle="v1")["error"]["message"]
        assert admin.change("/models/swap", bundle="current")["model_version"] == version(bundles, "v1")
        assert admin.change("/models/load", bundle="mine")["model"] == "mine"


@pytest.mark.parametrize(
    ("verb", "path", "body", "message"),
    [
        ("POST", "/models/load", b"{", "the body is not a BundleRequest"),
        ("POST", "/models/load", b"{}", "bundle: Field required"),
        ("POST", "/models/load", b'{"bundle": "v1", "path": "/x"}', "path: unknown key"),
        ("POST", "/models/load", b'{"bundle": "v1", "engine": "cudnn"}', "engine: "),
        ("POST", "/models/load", b'{"bundle": "v1", "num_threads": 9999}', "num_threads: "),
        ("POST", "/models/swap", b'{"bundle": "v1", "name": "../x"}', "name: "),
        ("POST", "/models/unload", b"[]", "document: "),
        ("PUT", "/traffic", b'{"model": "tiny", "weights": {"v": NaN}}', "the body is not a TrafficRequest"),
        ("PUT", "/traffic", b'{"model": "tiny", "weights": {"v": -1}}', "weights.v: "),
        ("PUT", "/traffic", b'{"model": "tiny", "weights": {"v9": 1}}', "not served"),
        ("PUT", "/traffic", b'{"model": "tiny", "weights": {}}', "all weights are 0"),
    ],
)
def test_bad_body_names_its_fault(admin: Admin, verb: str, path: str, body: bytes, message: str) -> None:
    answer = admin.request(verb, ADMIN + path, content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_load_can_set_what_the_settings_of_a_bundle_can() -> None:
    assert BundleRequest.model_fields.keys() - {"bundle"} == ModelSource.model_fields.keys() - {"path"}
    values = {"engine": ("cuda", "cudnn"), "num_threads": (1024, 1025), "num_instances": (64, 65)}
    for name, (good, bad) in values.items():
        for kind, least in ((BundleRequest, {"bundle": "v1"}), (ModelSource, {"path": "v1"})):
            assert getattr(kind.model_validate({**least, name: good}), name) == good
            with pytest.raises(ValidationError):
                kind.model_validate({**least, name: bad})


def test_large_body_and_wrong_method_are_refused(admin: Admin) -> None:
    assert admin.post(f"{ADMIN}/models/load", content=b"x" * 70_000).status_code == 413
    assert admin.get(f"{ADMIN}/traffic").status_code == 405
    assert admin.get(f"{ADMIN}/nope").status_code == 404
