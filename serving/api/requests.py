"""Request bodies: one table of fields per dialect, which the parser and the OpenAPI page share."""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from serving.errors import InvalidRequest
from serving.service import EmbedRequest

Fields = Mapping[str, dict[str, Any]]

_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_ENCODING = {
    "type": "string",
    "enum": ["float", "base64"],
    "default": "float",
    "description": "base64: little-endian float32",
}
_DIMENSIONS = {
    "type": "integer",
    "minimum": 1,
    "description": "keep the first values of each vector and scale it to unit length again; at most the dimension",
}

NATIVE_FIELDS: Fields = {
    "text": {**_TEXT, "description": "one text; exactly one of text and texts"},
    "texts": {**_TEXTS, "description": "several texts, answered in their order"},
    "model": {"type": "string", "description": "name of a served model; the default model when absent"},
    "dimensions": _DIMENSIONS,
    "encoding_format": _ENCODING,
    "truncate": {"type": "boolean", "default": True, "description": "false: a text that is too long is an error"},
    "prompt": {"type": "string", "description": "name of a prompt of the model, put before each text"},
}

OPENAI_FIELDS: Fields = {
    "input": {"oneOf": [_TEXT, _TEXTS], "description": "one text or several; token ids are refused"},
    "model": {"type": "string", "description": "name of a served model"},
    "encoding_format": _ENCODING,
    "dimensions": _DIMENSIONS,
    "user": {"type": "string", "description": "accepted and not used"},
}

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


def parse_native(body: bytes, max_texts: int) -> EmbedRequest:
    """A body of `POST /api/v1/embed`. Raises InvalidRequest, which names the field at fault."""
    document = _load(body, NATIVE_FIELDS)
    text: Any = document.get("text")
    texts: Any = document.get("texts")
    if (text is None) == (texts is None):
        raise InvalidRequest("give exactly one of text and texts", "text")
    if text is not None:
        if type(text) is not str:
            raise InvalidRequest("text must be a string", "text")
        texts, param = [text], "text"
    else:
        param = "texts"
    _check_texts(texts, param, max_texts)
    return EmbedRequest(
        texts,
        is_single=text is not None,
        param=param,
        model=_optional(document, "model", str, "a string"),
        dimensions=_dimensions(document),
        as_base64=_is_base64(document),
        truncate=_optional(document, "truncate", bool, "true or false") is not False,
        prompt=_optional(document, "prompt", str, "a string"),
    )


def parse_openai(body: bytes, max_texts: int) -> EmbedRequest:
    """A body of `POST /v1/embeddings`. Raises InvalidRequest, which names the field at fault."""
    document = _load(body, OPENAI_FIELDS)
    texts = document.get("input")
    if texts is None:
        raise InvalidRequest("input is missing: give a string or a list of strings", "input")
    model = _optional(document, "model", str, "a string")
    if not model:
        raise InvalidRequest("model is missing: GET /v1/models lists what is served", "model")
    _optional(document, "user", str, "a string")
    is_single = type(texts) is str
    if is_single:
        texts = [texts]
    elif type(texts) is list and texts and type(texts[0]) in (int, list):
        raise InvalidRequest(
            "input holds token ids, which belong to another model's vocabulary: send the text itself", "input"
        )
    _check_texts(texts, "input", max_texts)
    return EmbedRequest(
        texts,
        is_single=is_single,
        param="input",
        model=model,
        dimensions=_dimensions(document),
        as_base64=_is_base64(document),
    )


def _load(body: bytes, fields: Fields) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from None
    if type(document) is not dict:
        raise InvalidRequest("the body must be a JSON object")
    if not document.keys() <= fields.keys():
        name = next(key for key in document if key not in fields)
        # A name that is no identifier may be somebody's text, which is not repeated.
        shown = repr(name) if _IDENTIFIER.fullmatch(name) else "that is no identifier"
        raise InvalidRequest(
            f"unknown field {shown}: the fields are {', '.join(fields)}", name if shown == repr(name) else None
        )
    return document


def _check_texts(texts: object, param: str, max_texts: int) -> None:
    if type(texts) is not list:
        raise InvalidRequest(f"{param} must be a {'string or a ' if param == 'input' else ''}list of strings", param)
    if not 1 <= len(texts) <= max_texts:
        raise InvalidRequest(f"{param} has {len(texts)} texts, limits 1 and {max_texts}", param)
    for index, text in enumerate(texts):
        if type(text) is not str:
            raise InvalidRequest(f"text {index} of {param} is not a string", param)
        if not text:
            raise InvalidRequest(f"text {index} of {param} is empty", param)


def _optional(document: dict[str, Any], name: str, kind: type, wanted: str) -> Any:
    """The field's value, None when it is absent or null."""
    value = document.get(name)
    if value is not None and type(value) is not kind:
        raise InvalidRequest(f"{name} must be {wanted}", name)
    return value


def _dimensions(document: dict[str, Any]) -> int | None:
    value: int | None = _optional(document, "dimensions", int, "an integer")
    if value is not None and value < 1:
        raise InvalidRequest(f"dimensions is {value}, the least is 1", "dimensions")
    return value


def _is_base64(document: dict[str, Any]) -> bool:
    value = document.get("encoding_format")
    if value is None or value == "float":
        return False
    if value == "base64":
        return True
    raise InvalidRequest("encoding_format must be 'float' or 'base64'", "encoding_format")
