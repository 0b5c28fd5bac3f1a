"""The OpenAPI document, built from the tables the parsers use, so that page and behaviour cannot part."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from serving.access import ADMIN_PREFIX
from serving.api.admin_requests import BundleRequest, TrafficRequest, UnloadRequest
from serving.api.requests import NATIVE_FIELDS, OPENAI_FIELDS, TEI_FIELDS
from serving.api.tei import ERROR_TYPES, tei_error
from serving.errors import STATUS, Overloaded

Json = dict[str, Any]

_NUMBER, _INTEGER, _STRING, _BOOLEAN = ({"type": name} for name in ("number", "integer", "string", "boolean"))
_VECTOR: Json = {"oneOf": [{"type": "array", "items": _NUMBER}, {**_STRING, "format": "byte"}]}

_EMBED_ERRORS = (400, 401, 404, 408, 413, 415, 429, 431, 500, 503, 504)
_ADMIN_ERRORS = (400, 401, 403, 404, 408, 409, 413, 415, 422, 431, 503)
_TEI_ERRORS = (401, 404, 408, 413, 415, 422, 424, 429, 431, 503)
_COMMON_ERRORS = (400, 401, 408, 431, 503)  # what any path may answer before it is looked at


def _object(properties: Mapping[str, Any], optional: tuple[str, ...] = ()) -> Json:
    """A closed object whose properties are all there but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_NULL = {"type": "null"}
_USAGE = _object({"prompt_tokens": _INTEGER, "total_tokens": _INTEGER})
_NULLABLE = {"type": ["string", "null"]}
_NULLABLE_INTEGER = {"type": ["integer", "null"]}

SCHEMAS: dict[str, Json] = {
    "EmbedRequest": {
        **_object(NATIVE_FIELDS, optional=tuple(NATIVE_FIELDS)),
        "oneOf": [{"required": ["text"]}, {"required": ["texts"]}],
    },
    "EmbedResponse": _object(
        {
            "embedding": _VECTOR,
            "embeddings": _list(_VECTOR),
            "model": _STRING,
            "model_version": _STRING,
            "dimension": _INTEGER,
            "latency_ms": _NUMBER,
            "usage": _USAGE,
        },
        optional=("embedding", "embeddings"),
    ),
    "EmbeddingsRequest": _object(OPENAI_FIELDS, optional=("encoding_format", "dimensions", "user")),
    "EmbeddingsResponse": _object(
        {
            "object": {"const": "list"},
            "data": _list(_object({"object": {"const": "embedding"}, "index": _INTEGER, "embedding": _VECTOR})),
            "model": _STRING,
            "usage": _USAGE,
        }
    ),
    "TeiEmbedRequest": _object(TEI_FIELDS, optional=tuple(name for name in TEI_FIELDS if name != "inputs")),
    "TeiEmbedResponse": _list(_list(_NUMBER)),
    "TeiError": _object({"error": _STRING, "error_type": {"type": "string", "enum": list(ERROR_TYPES)}}),
    "TeiInfo": _object(
        {
            "model_id": _STRING,
            "model_sha": _STRING,
            "model_dtype": _STRING,
            "model_type": _object({"embedding": _object({"pooling": _STRING})}),
            "max_concurrent_requests": _INTEGER,
            "max_input_length": _INTEGER,
            "max_batch_tokens": _INTEGER,
            "max_batch_requests": _INTEGER,
            "max_client_batch_size": _INTEGER,
            "auto_truncate": _BOOLEAN,
            "tokenization_workers": _INTEGER,
            "version": _STRING,
            "sha": _NULL,
            "docker_label": _NULL,
        }
    ),
    "Error": _object({"error": _object({"message": _STRING, "type": _STRING, "param": _NULLABLE, "code": _NULLABLE})}),
    "Models": _object(
        {
            "models": _list(
                _object(
                    {
                        "name": _STRING,
                        "model_id": _STRING,
                        "version": _STRING,
                        "variant": _STRING,
                        "digest": _STRING,
                        "dimension": _INTEGER,
                        "max_seq_length": _INTEGER,
                        "pooling": _STRING,
                        "normalize": _BOOLEAN,
                        "precision": _STRING,
                        "prompts": _list(_STRING),
                        "compatibility": _STRING,
                        "cosine_similarity_vs_fp32": _NUMBER,
                        "engine": _STRING,
                        "engine_setup": _STRING,
                        "engine_memory_bytes": _NULLABLE_INTEGER,
                        "weight": _NUMBER,
                        "state": _STRING,
                        "default": _BOOLEAN,
                        "ready": _BOOLEAN,
                    }
                )
            )
        }
    ),
    "Validation": _object(
        {
            "model": _STRING,
            "model_version": _STRING,
            "cosine_similarity": _object({"mean": _NUMBER, "min": _NUMBER}),
            "count": _INTEGER,
            "threshold": _NUMBER,
            "passed": _BOOLEAN,
        }
    ),
    "OpenAIModel": _object(
        {
            "id": _STRING,
            "object": {"const": "model"},
            "created": _INTEGER,
            "owned_by": _STRING,
            "versions": _list(_object({"version": _STRING, "weight": _NUMBER, "state": _STRING})),
        }
    ),
    "Status": _object({"status": _STRING}),
}
SCHEMAS["OpenAIModels"] = _object(
    {"object": {"const": "list"}, "data": _list({"$ref": "#/components/schemas/OpenAIModel"})}
)


SCHEMAS["AdminModels"] = _object(
    {**SCHEMAS["Models"]["properties"], "bundles": _list(_STRING)},
)
SCHEMAS |= {
    "Change": _object(
        {
            "model": _STRING,
            "model_version": _STRING,
            "digest": _STRING,
            "loaded": _BOOLEAN,
            "retired": _list(_STRING),
        }
    ),
    "Retired": _object({"model": _STRING, "retired": _list(_STRING)}),
    "Weights": _object({"model": _STRING, "weights": {"type": "object", "additionalProperties": _NUMBER}}),
    **{kind.__name__: kind.model_json_schema() for kind in (BundleRequest, UnloadRequest, TrafficRequest)},
}
_HEADERS: list[Json] = [
    {"name": "traceparent", "in": "header", "schema": _STRING, "description": "W3C trace context"},
    {"name": "x-model-version", "in": "header", "schema": _STRING, "description": "the version that answers"},
    {"name": "x-traffic-key", "in": "header", "schema": _STRING, "description": "equal keys get the same version"},
]
_SECURITY: dict[str, Json] = {
    "api": {"type": "http", "scheme": "bearer", "description": "an API key, where the worker asks for one"},
    "admin": {"type": "http", "scheme": "bearer", "description": "an admin token"},
}

_VERSION, _VALUES = "int8-openvino-3f9c2a71d0b4", [0.0364, -0.0121, 0.0857]
_TOKENS = {"prompt_tokens": 11, "total_tokens": 11}


def _examples(model: str) -> dict[str, Json | list[Any]]:
    """An answer for each schema that is one, vectors shortened."""
    entry = {"id": model, "object": "model", "created": 1795132800, "owned_by": "thorforge",
             "versions": [{"version": _VERSION, "weight": 1.0, "state": "serving"}]}  # fmt: skip
    served = {
        "name": model, "model_id": f"sentence-transformers/{model}", "version": _VERSION, "variant": "int8-openvino",
        "digest": "3f9c2a71d0b4", "dimension": 384, "max_seq_length": 256, "pooling": "mean", "normalize": True,
        "precision": "int8", "prompts": [], "compatibility": "drop-in", "weight": 1.0, "state": "serving",
        "cosine_similarity_vs_fp32": 0.9978, "engine_setup": "openvino, 1 run of 2 threads",
        "engine": "openvino 2026.4.1", "engine_memory_bytes": None, "default": True, "ready": True,
    }  # fmt: skip
    return {
        "EmbedResponse": {
            "embedding": _VALUES, "model": model, "model_version": _VERSION, "dimension": 384, "latency_ms": 1.498,
            "usage": _TOKENS,
        },
        "EmbeddingsResponse": {
            "object": "list", "data": [{"object": "embedding", "index": 0, "embedding": _VALUES}], "model": model,
            "usage": _TOKENS,
        },
        "TeiEmbedResponse": [_VALUES],
        "TeiInfo": {
            "model_id": f"sentence-transformers/{model}", "model_sha": "3f9c2a71d0b4", "model_dtype": "int8",
            "model_type": {"embedding": {"pooling": "mean"}}, "max_concurrent_requests": 4096, "max_input_length": 256,
            "max_batch_tokens": 8192, "max_batch_requests": 64, "max_client_batch_size": 2048, "auto_truncate": True,
            "tokenization_workers": 1, "version": "0.1.0", "sha": None, "docker_label": None,
        },
        "Models": {"models": [served]},
        "Validation": {
            "model": model, "model_version": _VERSION, "cosine_similarity": {"mean": 0.9978, "min": 0.9941},
            "count": 64, "threshold": 0.9928, "passed": True,
        },
        "OpenAIModels": {"object": "list", "data": [entry]},
        "OpenAIModel": entry,
        "AdminModels": {"models": [served], "bundles": ["minilm-int8"]},
        "Change": {"model": model, "model_version": _VERSION, "digest": "3f9c2a71d0b4", "loaded": True, "retired": []},
        "Retired": {"model": model, "retired": [_VERSION]},
        "Weights": {"model": model, "weights": {_VERSION: 1.0}},
        "Status": {"status": "ok"},
    }  # fmt: skip


def build_openapi(model: str) -> Json:
    """The document; `model` is the name the examples use."""
    paths = _embedding_paths(model) | _system_paths(model) | _admin_paths(model)
    examples = _examples(model)
    for verbs in paths.values():
        for operation in verbs.values():
            for content in operation["responses"]["200"]["content"].values():
                name = content["schema"].get("$ref", "").rpartition("/")[2]
                content["example"] = examples.get(name, 'akidb_queue_depth{model="a",model_version="b"} 0.0')
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "thorforge worker",
            "version": "1",
            "description": "Sentence embeddings over HTTP. Every error is the OpenAI error object; that of "
            "text-embeddings-inference on its own paths.",
        },
        "paths": {path: _secure(path, operations) for path, operations in paths.items()},
        "components": {"schemas": SCHEMAS, "securitySchemes": _SECURITY},
    }


def _embedding_paths(model: str) -> Json:
    native: dict[str, Json] = {
        "one text": {"text": "The quick brown fox jumps over the lazy dog."},
        "several texts": {"texts": ["red apples", "green pears"], "model": model, "encoding_format": "float"},
        "base64, no truncation": {"text": "hello world", "encoding_format": "base64", "truncate": False},
        "a quarter of the bytes": {"texts": ["red apples", "green pears"], "encoding_format": "int8"},
    }
    openai: dict[str, Json] = {
        "one text": {"input": "The quick brown fox jumps over the lazy dog.", "model": model},
        "several texts": {"input": ["red apples", "green pears"], "model": model, "encoding_format": "base64"},
    }
    tei: dict[str, Json] = {
        "one text": {"inputs": "The quick brown fox jumps over the lazy dog."},
        "several texts": {"inputs": ["red apples", "green pears"], "truncate": True, "truncation_direction": "Left"},
    }
    return {
        "/api/v1/embed": _post("Embed texts", "EmbedRequest", "EmbedResponse", native),
        "/v1/embeddings": _post("Embed texts (OpenAI)", "EmbeddingsRequest", "EmbeddingsResponse", openai),
        "/embed": _post("Embed texts (text-embeddings-inference)", "TeiEmbedRequest", "TeiEmbedResponse", tei, True),
    }


def _system_paths(model: str) -> Json:
    return {
        "/api/v1/models": _get("Models served, in full", "Models"),
        "/api/v1/validate": _get(
            "Compare the live engine with the teacher's reference vectors", "Validation", 404, 429, 500, 504,
            parameter={"name": "model", "in": "query", "schema": _STRING, "example": model},
        ),
        "/v1/models": _get("Models served (OpenAI)", "OpenAIModels"),
        "/v1/models/{model}": _get(
            "One model served (OpenAI)", "OpenAIModel", 404,
            parameter={"name": "model", "in": "path", "required": True, "schema": _STRING, "example": model},
        ),
        "/info": _get("What is served (text-embeddings-inference)", "TeiInfo", error="TeiError"),
        "/healthz": _get("Whether the process and its engine live", "Status"),
        "/readyz": _get(
            "Whether new requests are welcome, for one model or for all", "Status", 404,
            parameter={"name": "model", "in": "query", "schema": _STRING, "example": model},
        ),
        "/metrics": {
            "get": {
                "summary": "Prometheus metrics",
                "responses": {"200": _content("text/plain", _STRING), **_errors(*_COMMON_ERRORS)},
            }
        },
    }  # fmt: skip


def _admin_paths(model: str) -> Json:
    bundle: dict[str, Json] = {
        "a bundle": {"bundle": "minilm-int8"},
        "its engine set": {"bundle": "minilm-int8", "engine": "openvino", "num_threads": 2, "num_instances": 1},
    }
    unload: dict[str, Json] = {
        "one version": {"model": model, "version": _VERSION},
        "the whole model": {"model": model},
    }
    weights: Json = {"model": model, "weights": {_VERSION: 90, "fp32-onnx-0a1b2c3d4e5f": 10}}
    paths: Json = {
        "models": _get("Versions served and draining, bundles by name", "AdminModels", 403),
        "models/load": _admin("post", "Serve one more version or model", "BundleRequest", "Change", bundle),
        "models/swap": _admin("post", "Put a version in place of others", "BundleRequest", "Change", bundle),
        "models/unload": _admin("post", "Serve no longer", "UnloadRequest", "Retired", unload),
        "traffic": _admin(
            "put", "Share requests between versions", "TrafficRequest", "Weights", {"nine in ten": weights}
        ),
    }
    return {ADMIN_PREFIX + path: operations for path, operations in paths.items()}


def _secure(path: str, operations: Json) -> Json:
    """Say of each operation which key it wants: an API key only where the worker has any."""
    security: list[Json] = [{"admin": []}] if path.startswith(ADMIN_PREFIX) else [{}, {"api": []}]
    return {verb: {**operation, "security": security} for verb, operation in operations.items()}


def _admin(verb: str, summary: str, request: str, response: str, examples: Mapping[str, Json]) -> Json:
    answer = _content("application/json", _reference(response))
    responses = {"200": answer, **_errors(*_ADMIN_ERRORS)}
    return {verb: {"summary": summary, "requestBody": _body(request, examples), "responses": responses}}


def _post(summary: str, request: str, response: str, examples: Mapping[str, Json], is_tei: bool = False) -> Json:
    answer = _content("application/json", _reference(response))
    answer["headers"] = {
        "server-timing": {"schema": _STRING, "description": "tokenize, queue, engine and total, ms"},
        "x-model-version": {"schema": _STRING, "description": "the version that answered"},
    }
    errors = _tei_errors() if is_tei else _errors(*_EMBED_ERRORS)
    return {
        "post": {
            "summary": summary,
            "parameters": _HEADERS,
            "requestBody": _body(request, examples),
            "responses": {"200": answer, **errors},
        }
    }


def _body(request: str, examples: Mapping[str, Json]) -> Json:
    body = _content("application/json", _reference(request))
    body["content"]["application/json"]["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"required": True, **body}


def _get(summary: str, response: str, *errors: int, parameter: Json | None = None, error: str | None = None) -> Json:
    answer = _content("application/json", _reference(response))
    responses = {"200": answer, **_errors(*sorted({*errors, *_COMMON_ERRORS}), other=error)}
    if response == "Status":
        either = {"oneOf": [_reference("Status"), _reference("Error")]}
        responses["503"] = _content("application/json", either) | {"description": "not now"}
    operation: Json = {"summary": summary, "responses": responses}
    if parameter is not None:
        operation["parameters"] = [parameter]
    return {"get": operation}


def _content(media_type: str, schema: Json) -> Json:
    return {"description": "OK", "content": {media_type: {"schema": schema}}}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _errors(*statuses: int, other: str | None = None) -> dict[str, Json]:
    """`other`: the error object that the path itself answers with; what the connection answers is ours."""
    schema = _reference("Error") if other is None else {"oneOf": [_reference(other), _reference("Error")]}
    answers: dict[str, Json] = {}
    for status in statuses:
        kinds = [kind.__name__ for kind, answered in STATUS.items() if answered == HTTPStatus(status)]
        answers[str(status)] = _content("application/json", schema) | {"description": ", ".join(kinds)}
    return answers


def _tei_errors() -> dict[str, Json]:
    """What the path itself answers has the shape of text-embeddings-inference; what the connection answers, ours."""
    kinds: dict[int, list[str]] = {status: [] for status in _TEI_ERRORS}
    for kind in STATUS:
        status, _ = tei_error(kind("", 0) if issubclass(kind, Overloaded) else kind(""))
        kinds.setdefault(status, []).append(kind.__name__)
    either = {"oneOf": [_reference("TeiError"), _reference("Error")]}
    return {
        str(status): _content("application/json", either) | {"description": ", ".join(names)}
        for status, names in sorted(kinds.items())
        if names and status in (400, *_TEI_ERRORS)
    }
