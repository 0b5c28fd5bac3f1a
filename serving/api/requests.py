"""Request bodies: one table of fields per dialect, which the parser and the OpenAPI page share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from serving.errors import InputTooLong, InvalidRequest
from serving.texts import EmbedRequest, Encoding

Fields = Mapping[str, dict[str, Any]]

_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_ENCODING = {
    "type": "string",
    "enum": ["float", "base64"],
    "default": "float",
    "description": "base64: little-endian float32",
}
_NATIVE_ENCODING = {
    **_ENCODING,
    "enum": ["float", "base64", "int8", "ubinary"],
    "description": "base64 of: little-endian float32 (base64); int8, where 127 is the vector's largest value, so that "
    "cosines are kept and lengths are not (int8); one bit a value, set where it is above 0, the first value in the "
    "highest bit of the first byte (ubinary)",
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
    "encoding_format": _NATIVE_ENCODING,
    "truncate": {"type": "boolean", "default": True, "description": "false: a text that is too long is an error"},
    "prompt": {"type": "string", "description": "name of a prompt of the model, put before each text"},
    "use_custom_kernels": {
        "type": "boolean",
        "description": "true: an error unless the model runs on the cuda engine; false: unless it does not",
    },
}

OPENAI_FIELDS: Fields = {
    "input": {"oneOf": [_TEXT, _TEXTS], "description": "one text or several; token ids are refused"},
    "model": {"type": "string", "description": "name of a served model"},
    "encoding_format": _ENCODING,
    "dimensions": _DIMENSIONS,
    "user": {"type": "string", "description": "accepted and not used"},
}

TEI_FIELDS: Fields = {
    "inputs": {"oneOf": [_TEXT, _TEXTS], "description": "one text or several; token ids are refused"},
    "normalize": {"type": "boolean", "default": True, "description": "false only where the model does not normalise"},
    "truncate": {"type": "boolean", "default": True, "description": "false: a text that is too long is an error"},
    "truncation_direction": {
        "type": "string",
        "enum": ["Right", "Left", "right", "left"],
        "default": "Right",
        "description": "which end of a text that is too long is dropped",
    },
    "prompt_name": {"type": "string", "description": "name of a prompt of the model, put before each text"},
    "dimensions": _DIMENSIONS,
}

# What to do about ids instead of text: LangChain's OpenAIEmbeddings sends those of OpenAI's own vocabulary.
_IDS_REFUSED = (
    "{} holds token ids, which belong to another model's vocabulary: send the text itself "
    "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class TextLimits:
    """How many texts a request may hold, and how many characters each."""

    max_texts: int
    max_chars: int


def parse_native(body: bytes, limits: TextLimits) -> EmbedRequest:
    """A body of `POST /api/v1/embed`. Raises InvalidRequest, which names the field at fault."""
    document = _load(body, NATIVE_FIELDS)
    text: Any = document.get("text")
    texts: Any = document.get("texts")
    if (text is None) == (texts is None):
        raise InvalidRequest("give exactly one of text and texts", "text")
    if text is not None:
        if type(text) is not str:
            raise InvalidRequest(_IDS_REFUSED.format("text") if _are_ids(text) else "text must be a string", "text")
        texts, param = [text], "text"
    else:
        param = "texts"
    _check_texts(texts, param, limits)
    return EmbedRequest(
        texts,
        is_single=text is not None,
        param=param,
        model=_optional(document, "model", str, "a string"),
        dimensions=_dimensions(document),
        encoding=_encoding(document, NATIVE_FIELDS),
        truncate=_optional(document, "truncate", bool, "true or false") is not False,
        prompt=_optional(document, "prompt", str, "a string"),
        use_custom_kernels=_optional(document, "use_custom_kernels", bool, "true or false"),
    )


def parse_openai(body: bytes, limits: TextLimits) -> EmbedRequest:
    """A body of `POST /v1/embeddings`. Raises InvalidRequest, which names the field at fault."""
    document = _load(body, OPENAI_FIELDS)
    texts = document.get("input")
    if texts is None:
        raise InvalidRequest("input is missing: give a string or a list of strings", "input")
    model = _optional(document, "model", str, "a string")
    if not model:
        raise InvalidRequest("model is missing: GET /v1/models lists what is served", "model")
    _optional(document, "user", str, "a string")
    texts, is_single = _one_or_several(texts, "input", limits)
    return EmbedRequest(
        texts,
        is_single=is_single,
        param="input",
        model=model,
        dimensions=_dimensions(document),
        encoding=_encoding(document, OPENAI_FIELDS),
    )


def parse_tei(body: bytes, limits: TextLimits) -> EmbedRequest:
    """A body of `POST /embed`. Raises InvalidRequest, which names the field at fault."""
    document = _load(body, TEI_FIELDS)
    inputs = document.get("inputs")
    if inputs is None:
        raise InvalidRequest("inputs is missing: give a string or a list of strings", "inputs")
    texts, is_single = _one_or_several(inputs, "inputs", limits)
    direction = _optional(document, "truncation_direction", str, "a string")
    if direction not in (None, "Right", "Left", "right", "left"):
        raise InvalidRequest("truncation_direction must be 'Right' or 'Left'", "truncation_direction")
    return EmbedRequest(
        texts,
        is_single=is_single,
        param="inputs",
        dimensions=_dimensions(document),
        truncate=_optional(document, "truncate", bool, "true or false") is not False,
        truncate_left=direction in ("Left", "left"),
        normalize=_optional(document, "normalize", bool, "true or false") is not False,
        prompt=_optional(document, "prompt_name", str, "a string"),
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


def _one_or_several(texts: object, param: str, limits: TextLimits) -> tuple[list[str], bool]:
    """The texts, and whether they came as a single string."""
    is_single = type(texts) is str
    several: Any = [texts] if is_single else texts
    _check_texts(several, param, limits)
    return several, is_single


def _check_texts(texts: object, param: str, limits: TextLimits) -> None:
    if type(texts) is not list:
        raise InvalidRequest(f"{param} must be a {'' if param == 'texts' else 'string or a '}list of strings", param)
    if not 1 <= len(texts) <= limits.max_texts:
        if _are_ids(texts):  # of one text, which has more of them than a request may have texts
            raise InvalidRequest(_IDS_REFUSED.format(param), param)
        raise InvalidRequest(f"{param} has {len(texts)} texts, limits 1 and {limits.max_texts}", param)
    for index, text in enumerate(texts):
        if type(text) is not str:
            if _are_ids(text) or _are_ids(texts):
                raise InvalidRequest(_IDS_REFUSED.format(param), param)
            raise InvalidRequest(f"text {index} of {param} is not a string", param)
        if not text:
            raise InvalidRequest(f"text {index} of {param} is empty", param)
        if len(text) > limits.max_chars:
            raise InputTooLong(f"text {index} has {len(text)} characters, limit {limits.max_chars}", param)


def _are_ids(value: object) -> bool:
    """Whether `value` is what a client sends that tokenises itself: the ids of one text, or a list that begins so."""
    while type(value) is list and value and type(value[0]) is list:
        value = value[0]
    return type(value) is list and bool(value) and type(value[0]) is int


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


def _encoding(document: dict[str, Any], fields: Fields) -> Encoding:
    value: Any = document.get("encoding_format")
    if value is None:
        return "float"
    *others, last = fields["encoding_format"]["enum"]
    if value not in others and value != last:
        wanted = f"{', '.join(map(repr, others))} or {last!r}"
        raise InvalidRequest(f"encoding_format must be {wanted}", "encoding_format")
    encoding: Encoding = value
    return encoding
