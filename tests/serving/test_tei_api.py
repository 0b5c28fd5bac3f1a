import httpx
import numpy as np
import pytest

from serving.api.tei import ERROR_TYPES, tei_error
from serving.errors import STATUS, EngineFailed, InvalidRequest, NotReady, Overloaded
from serving.settings import LimitsSettings


def embed(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/embed", json=body, timeout=20)


def native(url: str, *texts: str, **body: object) -> list[list[float]]:
    vectors: list[list[float]] = httpx.post(f"{url}/api/v1/embed", json={"texts": texts, **body}).json()["embeddings"]
    return vectors


def test_one_text_and_several_are_answered_with_a_list_of_vectors(url: str) -> None:
    assert embed(url, inputs="red cat").json() == native(url, "red cat")
    assert embed(url, inputs=["red cat", "dog"]).json() == native(url, "red cat", "dog")


def test_dimensions_and_prompt_name_are_taken(url: str) -> None:
    assert embed(url, inputs="cat", dimensions=3).json() == native(url, "cat", dimensions=3)
    assert embed(url, inputs="cat", prompt_name="query").json() == native(url, "red cat")


@pytest.mark.parametrize("direction", ["Left", "left"])
def test_truncation_drops_the_end_asked_for(url: str, direction: str) -> None:
    text = "red " * 14 + "cat dog blue"
    assert embed(url, inputs=text).json() == embed(url, inputs="red " * 14).json()
    assert embed(url, inputs=text, truncation_direction=direction).json() == native(url, "red " * 11 + "cat dog blue")
    assert embed(url, inputs="red", truncation_direction=direction).json() == native(url, "red")
    assert embed(url, inputs=text, truncation_direction="Right", truncate=None, normalize=None).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "inputs is missing"),
        ({"inputs": ""}, "text 0 of inputs is empty"),
        ({"inputs": []}, "inputs has 0 texts"),
        ({"inputs": [1, 2]}, "check_embedding_ctx_length=False"),
        ({"inputs": [[1, 2]]}, "another model's vocabulary"),
        ({"inputs": ["a", [1, 2]]}, "another model's vocabulary"),
        ({"inputs": [["a", "b"]]}, "text 0 of inputs is not a string"),  # a pair, which only rerankers take
        ({"inputs": "cat " * 40, "truncate": False}, "42 tokens, limit 16"),
        ({"inputs": "a", "normalize": False}, "this model's engine normalises"),
        ({"inputs": "a", "truncation_direction": "up"}, "'Right' or 'Left'"),
        ({"inputs": "a", "prompt_name": "none"}, "it has ['query']"),
        ({"inputs": "a", "dimensions": 99}, "limits 1 and 8"),
        ({"inputs": "a", "input": "b"}, "unknown field 'input'"),
    ],
)
def test_bad_request_is_answered_as_tei_does(url: str, body: dict[str, object], message: str) -> None:
    answer = embed(url, **body)
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "error_type"}
    assert answer.json()["error_type"] == "Validation"
    assert message in answer.json()["error"]


def test_other_failures_have_its_shape_too(url: str) -> None:
    answers = [
        httpx.post(f"{url}/embed", content=b"{"),
        httpx.get(f"{url}/embed"),
        httpx.post(f"{url}/info"),
        httpx.post(f"{url}/embed", content=b"x" * (LimitsSettings().max_body_bytes + 1)),
        httpx.post(f"{url}/embed", content=b"x", headers={"content-encoding": "gzip"}),
    ]
    assert [answer.status_code for answer in answers] == [422, 405, 405, 413, 415]
    assert all(answer.json().keys() == {"error", "error_type"} for answer in answers)


def test_every_error_has_a_type_and_a_status_of_tei() -> None:
    examples = (Overloaded("", 1), EngineFailed(""), NotReady(""), InvalidRequest(""))
    answers = [(status, document["error_type"]) for status, document in map(tei_error, examples)]
    assert answers == [(429, "Overloaded"), (424, "Backend"), (503, "Unhealthy"), (422, "Validation")]
    for kind in STATUS:
        error = kind("", 1) if kind is Overloaded else kind("")  # type: ignore[call-arg, arg-type]
        assert tei_error(error)[1]["error_type"] in ERROR_TYPES


def test_info_has_the_fields_of_tei(url: str) -> None:
    info = httpx.get(f"{url}/info").json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("tests/tiny", 16, 2048)
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert len(info["model_sha"]) == 64
    assert info["version"]


def test_every_dialect_says_where_the_time_went_and_which_version_answered(url: str) -> None:
    version = httpx.get(f"{url}/api/v1/models").json()["models"][0]["version"]
    for path, body in (
        ("/embed", {"inputs": "a"}),
        ("/api/v1/embed", {"text": "a"}),
        ("/v1/embeddings", {"input": "a", "model": "tiny"}),
    ):
        headers = httpx.post(url + path, json=body).headers
        assert headers["x-model-version"] == version
        header = headers["server-timing"]
        parts = dict(part.split(";dur=") for part in header.split(", "))
        assert list(parts) == ["tokenize", "queue", "engine", "total"]
        times = np.array([float(value) for value in parts.values()])
        assert (times > 0).all()
        assert times[:3].sum() <= times[3]
        assert all(len(value.partition(".")[2]) == 3 for value in parts.values())
