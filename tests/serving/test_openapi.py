"""The OpenAPI document is what the worker does."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.manifest import read_manifest
from serving.access import ADMIN_PREFIX
from serving.api.admin import admin_routes
from serving.api.embeddings import DIALECTS
from serving.api.openapi import build_openapi
from serving.api.requests import NATIVE_FIELDS, OPENAI_FIELDS, TEI_FIELDS
from serving.api.system import system_routes
from serving.models import load_model
from serving.settings import ModelSource, Settings
from serving.worker import Worker
from tests.fuzz import run_schemathesis
from tests.serving.conftest import make_settings, serve

DOCUMENT = build_openapi("tiny")


def schema_of(path: str, verb: str, status: str = "200") -> dict[str, Any]:
    content = DOCUMENT["paths"][path][verb]["responses"][status]["content"]
    schema: dict[str, Any] = next(iter(content.values()))["schema"]
    return schema


KINDS = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None)}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` fits the part of JSON Schema this document uses."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "const" in schema:
        return bool(value == schema["const"])
    if "type" not in schema:
        return sum(conforms(value, option) for option in schema["oneOf"]) == 1
    if schema["type"] == "array":
        return isinstance(value, list) and all(conforms(item, schema["items"]) for item in value)
    if "additionalProperties" in schema and "properties" not in schema:
        return all(conforms(item, schema["additionalProperties"]) for item in value.values())
    if schema["type"] == "object":
        return isinstance(value, dict) and object_conforms(value, schema)
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return any(isinstance(value, KINDS[name]) for name in names)


def object_conforms(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    known, required = schema["properties"], set(schema["required"])
    return required <= value.keys() <= known.keys() and all(conforms(value[name], known[name]) for name in value)


@pytest.mark.parametrize("path", ["/api/v1/embed", "/v1/embeddings", "/embed"])
def test_examples_work_and_are_answered_as_documented(url: str, path: str) -> None:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    for name, example in content["examples"].items():
        assert conforms(example["value"], content["schema"]), name
        answer = httpx.post(url + path, json=example["value"])
        assert answer.status_code == 200, (name, answer.text)
        assert conforms(answer.json(), schema_of(path, "post")), name


@pytest.mark.parametrize("path", [path for path, verbs in DOCUMENT["paths"].items() if "get" in verbs])
def test_get_paths_are_answered_as_documented(url: str, path: str) -> None:
    if path.startswith(ADMIN_PREFIX):
        refused = httpx.get(url + path)
        assert (refused.status_code, conforms(refused.json(), schema_of(path, "get", "403"))) == (403, True)
        return
    answer = httpx.get(url + path.replace("{model}", "tiny"))
    assert answer.status_code == 200
    is_json = answer.headers["content-type"] == "application/json"
    assert conforms(answer.json() if is_json else answer.text, schema_of(path, "get"))


def test_admin_answers_are_as_documented(bundles: Path) -> None:
    models = {"available": [{"path": bundles / "v0"}], "root": bundles}
    settings = make_settings(bundles, models=models, security={"admin_tokens": ["token"]})
    version = read_manifest(bundles / "v1").version
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("post", "models/load", {"bundle": "v1"}),
        ("put", "traffic", {"model": "tiny", "weights": {version: 1}}),
        ("get", "models", {}),
        ("post", "models/swap", {"bundle": "v0"}),
        ("post", "models/load", {"bundle": "other"}),
        ("post", "models/unload", {"model": "other"}),
    ]
    with serve(settings, load_model(ModelSource(path=bundles / "v0"))) as (url, _):
        for verb, path, body in bodies:
            answer = httpx.request(
                verb, f"{url}{ADMIN_PREFIX}{path}", json=body, headers={"authorization": "bearer token"}
            )
            assert answer.status_code == 200, answer.text
            assert conforms(answer.json(), schema_of(ADMIN_PREFIX + path, verb)), path


def test_example_answers_fit_their_schemas() -> None:
    contents = [
        content
        for verbs in DOCUMENT["paths"].values()
        for operation in verbs.values()
        for content in operation["responses"]["200"]["content"].values()
    ]
    assert len(contents) == len(DOCUMENT["paths"])
    assert all(conforms(content["example"], content["schema"]) for content in contents)


def test_errors_are_answered_as_documented(url: str) -> None:
    for path, status in (("/v1/embeddings", 400), ("/embed", 422)):
        answer = httpx.post(url + path, json={})
        assert answer.status_code == status
        assert conforms(answer.json(), schema_of(path, "post", str(status)))


def test_every_path_that_is_served_is_documented_or_a_page(url: str) -> None:
    known = {*DOCUMENT["paths"], "/", "/docs", "/openapi.json"}
    worker = Worker(Settings())
    routed = {route.path for route in (*system_routes(worker), *admin_routes(worker))}
    assert routed | {dialect.path for dialect in DIALECTS} == known


@pytest.mark.filterwarnings("default")
def test_requests_made_from_the_document_are_answered_as_documented(url: str) -> None:
    assert run_schemathesis(url, cases_per_operation=60) >= 200


@pytest.mark.parametrize(
    ("path", "fields", "least"),
    [
        ("/api/v1/embed", NATIVE_FIELDS, {"text": "red"}),
        ("/v1/embeddings", OPENAI_FIELDS, {"input": "red", "model": "tiny"}),
        ("/embed", TEI_FIELDS, {"inputs": "red"}),
    ],
)
def test_parser_accepts_the_documented_fields_and_requires_the_required(
    url: str, path: str, fields: dict[str, Any], least: dict[str, Any]
) -> None:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    documented = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert documented["properties"].keys() == fields.keys()
    samples = {"string": "query", "integer": 3, "boolean": True, "array": ["red"]}
    for name, field in fields.items():
        value = field.get("default", field["enum"][0] if "enum" in field else samples.get(field.get("type", "")))
        given = {"model": "tiny", "use_custom_kernels": False}.get(name, value)  # true is refused without a GPU
        body = {name: given} if name == "texts" else {**least, name: given or least.get(name)}
        assert httpx.post(url + path, json=body).status_code == 200, name
    for name in documented["required"]:
        assert httpx.post(url + path, json={key: least[key] for key in least if key != name}).is_client_error


def test_document_and_page_are_served(url: str) -> None:
    assert httpx.get(f"{url}/openapi.json").json() == DOCUMENT
    assert "openapi.json" in httpx.get(f"{url}/docs").text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(url: str, path: str) -> None:
    page = httpx.get(url + path)
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none';")
    # No address with a host but the name of SVG, no import, no style sheet.
    text = page.text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|src=|@import|rel=.stylesheet", text)
