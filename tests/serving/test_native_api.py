import base64

import httpx
import numpy as np
import pytest

NAMES = {"model", "model_version", "dimension", "latency_ms", "usage"}


def embed(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/api/v1/embed", json=body, timeout=20)


def test_text_is_answered_with_one_embedding(url: str) -> None:
    answer = embed(url, text="hello world").json()
    assert answer.keys() == NAMES | {"embedding"}
    assert (answer["model"], answer["dimension"]) == ("tiny", 8)
    assert answer["model_version"].startswith("fp32-onnx-")
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert 0 < answer["latency_ms"] < 10_000
    assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-5)


def test_texts_are_answered_in_their_order(url: str) -> None:
    texts = ["hello", "red cat runs", "one two three four five six", "world " * 14, "🙂", "שלום עולם", "a\x00b"]
    answer = embed(url, texts=texts).json()
    assert answer.keys() == NAMES | {"embeddings"}
    singles = [embed(url, text=text).json() for text in texts]
    np.testing.assert_allclose(answer["embeddings"], [single["embedding"] for single in singles], atol=1e-6)
    assert answer["usage"]["total_tokens"] == sum(single["usage"]["total_tokens"] for single in singles)


def test_a_list_of_one_is_answered_with_a_list(url: str) -> None:
    assert len(embed(url, texts=["hello"]).json()["embeddings"]) == 1


@pytest.mark.parametrize("count", [2, 100, 2048])
def test_base64_holds_the_same_vectors_as_float(url: str, count: int) -> None:
    texts = [f"{'red cat dog blue'[: place % 17]} one" for place in range(count)]
    floats = embed(url, texts=texts).json()["embeddings"]
    packed = embed(url, texts=texts, encoding_format="base64").json()["embeddings"]
    decoded = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in packed]
    np.testing.assert_allclose(decoded, floats, atol=1e-6)  # batches of other lengths round otherwise
    assert len(decoded) == count


def test_base64_of_one_text_is_a_string(url: str) -> None:
    packed = embed(url, text="hello", encoding_format="base64").json()["embedding"]
    assert np.frombuffer(base64.b64decode(packed), dtype="<f4").shape == (8,)


@pytest.mark.parametrize("count", [1, 100])
def test_int8_and_ubinary_are_the_same_vectors_packed(url: str, count: int) -> None:
    from sentence_transformers.util import quantize_embeddings  # with torch, which the other tests do without

    texts = ["red cat", "blue dog", "hello world one two"] * count
    floats = np.array(embed(url, texts=texts).json()["embeddings"], dtype=np.float32)
    small = embed(url, texts=texts, encoding_format="int8").json()
    assert small["dimension"] == 8
    rows = np.array([np.frombuffer(base64.b64decode(row), dtype=np.int8) for row in small["embeddings"]])
    largest = np.abs(floats).max(axis=1, keepdims=True)
    assert (np.abs(rows).max(axis=1) == 127).all()
    np.testing.assert_allclose(rows * largest / 127, floats, atol=0.51 / 127)
    bits = embed(url, texts=texts, encoding_format="ubinary").json()["embeddings"]
    packed = np.array([np.frombuffer(base64.b64decode(row), dtype=np.uint8) for row in bits])
    np.testing.assert_array_equal(packed, quantize_embeddings(floats, precision="ubinary"))
    single = embed(url, text=texts[0], encoding_format="ubinary", dimensions=3).json()
    assert base64.b64decode(single["embedding"]) == np.packbits(floats[0, :3] > 0).tobytes()


def test_text_of_maximum_length_fits_and_a_longer_one_is_cut_or_refused(url: str) -> None:
    fits, over = "cat " * 14, "cat " * 15
    assert embed(url, text=fits, truncate=False).json()["usage"]["total_tokens"] == 16
    assert embed(url, text=over).json()["usage"]["total_tokens"] == 16
    refused = embed(url, text=over, truncate=False)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "input_too_long"
    assert refused.json()["error"]["param"] == "text"
    assert "17 tokens, limit 16" in refused.json()["error"]["message"]


def test_dimensions_shorten_every_vector(url: str) -> None:
    answer = embed(url, texts=["red", "cat"], dimensions=3).json()
    assert answer["dimension"] == 3
    np.testing.assert_allclose(np.linalg.norm(answer["embeddings"], axis=1), 1, atol=1e-6)


def test_model_and_prompt_are_taken_by_name(url: str) -> None:
    prompted = embed(url, text="cat", prompt="query", model="tiny").json()
    assert prompted["embedding"] == embed(url, text="red cat").json()["embedding"]


def test_null_is_as_good_as_absent(url: str) -> None:
    answer = embed(url, text="cat", texts=None, model=None, dimensions=None, encoding_format=None, truncate=None)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "text", "exactly one of text and texts"),
        ({"text": "a", "texts": ["b"]}, "text", "exactly one"),
        ({"text": 3}, "text", "text must be a string"),
        ({"text": ["a"]}, "text", "text must be a string"),
        ({"text": [1, 2]}, "text", "text holds token ids, which belong to another model's vocabulary"),
        ({"texts": [1, 2]}, "texts", "texts holds token ids"),
        ({"texts": [[1, 2, 3]]}, "texts", "texts holds token ids"),
        ({"texts": ["a", "b", [1, 2]]}, "texts", "texts holds token ids"),
        ({"texts": [[1]] * 2049}, "texts", "texts holds token ids"),
        ({"texts": ["a", []]}, "texts", "text 1 of texts is not a string"),
        ({"texts": [True, 1]}, "texts", "text 0 of texts is not a string"),
        ({"text": ""}, "text", "text 0 of text is empty"),
        ({"texts": "a"}, "texts", "texts must be a list of strings"),
        ({"texts": []}, "texts", "texts has 0 texts, limits 1 and 2048"),
        ({"texts": ["a"] * 2049}, "texts", "texts has 2049 texts, limits 1 and 2048"),
        ({"texts": ["a", 3]}, "texts", "text 1 of texts is not a string"),
        ({"texts": ["a", "b", ""]}, "texts", "text 2 of texts is empty"),
        ({"text": "a", "dimensions": 0}, "dimensions", "dimensions is 0"),
        ({"text": "a", "dimensions": 9}, "dimensions", "dimensions is 9, limits 1 and 8"),
        ({"text": "a", "dimensions": "3"}, "dimensions", "dimensions must be an integer"),
        ({"text": "a", "dimensions": True}, "dimensions", "dimensions must be an integer"),
        ({"text": "a", "encoding_format": "int4"}, "encoding_format", "'float', 'base64', 'int8' or 'ubinary'"),
        ({"text": "a", "encoding_format": 3}, "encoding_format", "'float', 'base64', 'int8' or 'ubinary'"),
        ({"text": "a", "encoding_format": ["int8"]}, "encoding_format", "'float', 'base64', 'int8' or 'ubinary'"),
        ({"text": "a", "truncate": 1}, "truncate", "truncate must be true or false"),
        ({"text": "a", "prompt": 1}, "prompt", "prompt must be a string"),
        ({"text": "a", "prompt": "passage"}, "prompt", "it has ['query']"),
        ({"text": "a", "model": 1}, "model", "model must be a string"),
        ({"text": "a", "use_custom_kernels": 1}, "use_custom_kernels", "must be true or false"),
        ({"text": "a", "not a name": 1}, None, "unknown field that is no identifier"),
    ],
)
def test_bad_request_names_its_fault(url: str, body: dict[str, object], param: str | None, message: str) -> None:
    answer = embed(url, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_unknown_model_is_not_found_and_names_what_is_served(url: str) -> None:
    answer = embed(url, text="a", model="other")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "serves tiny" in answer.json()["error"]["message"]


def test_models_are_described(url: str) -> None:
    (model,) = httpx.get(f"{url}/api/v1/models").json()["models"]
    assert (model["name"], model["dimension"], model["max_seq_length"], model["pooling"]) == ("tiny", 8, 16, "mean")
    assert (model["ready"], model["default"], model["compatibility"]) == (True, True, "drop-in")
    assert model["engine"].startswith("onnxruntime ")
    assert model["engine_memory_bytes"] is None
    assert len(model["digest"]) == 64


def test_validation_passes_on_the_engine_that_was_forged(url: str) -> None:
    answer = httpx.get(f"{url}/api/v1/validate").json()
    assert answer["passed"] is True
    assert answer["count"] == 64
    assert 0.9999 < answer["cosine_similarity"]["min"] <= answer["cosine_similarity"]["mean"] <= 1.0001


def test_validation_of_an_unknown_model_is_not_found(url: str) -> None:
    assert httpx.get(f"{url}/api/v1/validate", params={"model": "other"}).status_code == 404


def test_use_custom_kernels_is_honoured_or_refused(url: str) -> None:
    assert embed(url, text="hello", use_custom_kernels=False).status_code == 200
    refused = embed(url, text="hello", use_custom_kernels=True)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "use_custom_kernels"
    assert "tiny is served by onnxruntime" in error["message"]
