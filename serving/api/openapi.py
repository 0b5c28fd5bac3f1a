"""The OpenAPI document, built from the tables the parsers use, so that page and behaviour cannot part."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from serving.api.requests import NATIVE_FIELDS, OPENAI_FIELDS
from serving.errors import STATUS

Json = dict[str, Any]

_NUMBER, _INTEGER, _STRING, _BOOLEAN = ({"type": name} for name in ("number", "integer", "string", "boolean"))
_VECTOR: Json = {"oneOf": [{"type": "array", "items": _NUMBER}, {**_STRING, "format": "byte"}]}

_EMBED_ERRORS = (400, 404, 413, 429, 500, 503, 504)


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


_USAGE = _object({"prompt_tokens": _INTEGER, "total_tokens": _INTEGER})
_NULLABLE = {"type": ["string", "null"]}

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
    "OpenAIModel": _object({"id": _STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _STRING}),
    "Status": _object({"status": _STRING}),
}
SCHEMAS["OpenAIModels"] = _object(
    {"object": {"const": "list"}, "data": _list({"$ref": "#/components/schemas/OpenAIModel"})}
)


def build_openapi(model: str) -> Json:
    """The document; `model` is the name the examples use."""
    native: dict[str, Json] = {
        "one text": {"text": "The quick brown fox jumps over the lazy dog."},
        "several texts": {"texts": ["red apples", "green pears"], "model": model, "encoding_format": "float"},
        "base64, no truncation": {"text": "hello world", "encoding_format": "base64", "truncate": False},
    }
    openai: dict[str, Json] = {
        "one text": {"input": "The quick brown fox jumps over the lazy dog.", "model": model},
        "several texts": {"input": ["red apples", "green pears"], "model": model, "encoding_format": "base64"},
    }
    paths = {
        "/api/v1/embed": _post("Embed texts", "EmbedRequest", "EmbedResponse", native),
        "/v1/embeddings": _post("Embed texts (OpenAI)", "EmbeddingsRequest", "EmbeddingsResponse", openai),
        "/api/v1/models": _get("Models served, in full", "Models"),
        "/api/v1/validate": _get(
            "Compare the live engine with the teacher's reference vectors", "Validation", 404, 429, 500, 503, 504,
            parameter={"name": "model", "in": "query", "schema": _STRING},
        ),
        "/v1/models": _get("Models served (OpenAI)", "OpenAIModels"),
        "/v1/models/{model}": _get(
            "One model served (OpenAI)", "OpenAIModel", 404, 503,
            parameter={"name": "model", "in": "path", "required": True, "schema": _STRING, "example": model},
        ),
        "/healthz": _get("Whether the process and its engine live", "Status", unwell=True),
        "/readyz": _get("Whether new requests are welcome", "Status", unwell=True),
        "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": _content("text/plain", _STRING)}}},
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "thorforge worker",
            "version": "1",
            "description": "Sentence embeddings over HTTP. Every error is the OpenAI error object.",
        },
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def _post(summary: str, request: str, response: str, examples: Mapping[str, Json]) -> Json:
    body = _content("application/json", _reference(request))
    body["content"]["application/json"]["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"post": {"summary": summary, "requestBody": {"required": True, **body}, "responses": {
        "200": _content("application/json", _reference(response)), **_errors(*_EMBED_ERRORS)
    }}}  # fmt: skip


def _get(summary: str, response: str, *errors: int, parameter: Json | None = None, unwell: bool = False) -> Json:
    answer = _content("application/json", _reference(response))
    responses = {"200": answer, **_errors(*errors)}
    if unwell:
        responses["503"] = answer | {"description": "not now"}
    operation: Json = {"summary": summary, "responses": responses}
    if parameter is not None:
        operation["parameters"] = [parameter]
    return {"get": operation}


def _content(media_type: str, schema: Json) -> Json:
    return {"description": "OK", "content": {media_type: {"schema": schema}}}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _errors(*statuses: int) -> dict[str, Json]:
    answers: dict[str, Json] = {}
    for status in statuses:
        kinds = [kind.__name__ for kind, answered in STATUS.items() if answered == HTTPStatus(status)]
        answers[str(status)] = _content("application/json", _reference("Error")) | {"description": ", ".join(kinds)}
    return answers
