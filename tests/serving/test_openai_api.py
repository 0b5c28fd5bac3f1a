import asyncio
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

TEXTS = ["hello world", "red cat runs", "🙂 one"]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, body: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json=body, timeout=20)


def test_client_gets_the_same_vectors_by_float_and_by_its_default_base64(client: openai.OpenAI) -> None:
    default = client.embeddings.create(input=TEXTS, model="tiny")
    floats = client.embeddings.create(input=TEXTS, model="tiny", encoding_format="float")
    assert [item.index for item in default.data] == [0, 1, 2]
    assert default.model == "tiny"
    assert default.usage.prompt_tokens == default.usage.total_tokens == 4 + 5 + 4
    np.testing.assert_allclose(
        [item.embedding for item in default.data], [item.embedding for item in floats.data], atol=1e-7
    )
    np.testing.assert_allclose([np.linalg.norm(item.embedding) for item in floats.data], 1, atol=1e-6)


def test_client_gets_2048_vectors_in_order(client: openai.OpenAI) -> None:
    texts = [TEXTS[place % 3] for place in range(2048)]
    answer = client.embeddings.create(input=texts, model="tiny")
    assert [item.index for item in answer.data] == list(range(2048))
    first = [item.embedding for item in answer.data[:3]]
    np.testing.assert_allclose([item.embedding for item in answer.data[2043:2046]], first, atol=1e-6)


def test_async_client_gets_a_single_vector_of_chosen_dimension(url: str) -> None:
    async def ask() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.embeddings.create(input=TEXTS[0], model="tiny", dimensions=3, user="someone")
            (item,) = answer.data
            return item.embedding

    vector = asyncio.run(ask())
    assert len(vector) == 3
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_client_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "thorforge")
    assert client.models.retrieve("tiny").created == model.created > 1_700_000_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(input="hello", model="other")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(input="", model="tiny")
    assert (empty.value.type, empty.value.param) == ("invalid_request_error", "input")


def test_body_has_exactly_the_documented_keys(url: str) -> None:
    answer = post(url, {"input": TEXTS, "model": "tiny"}).json()
    assert answer.keys() == {"object", "data", "model", "usage"}
    assert answer["object"] == "list"
    assert all(item.keys() == {"object", "index", "embedding"} for item in answer["data"])
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    assert answer["usage"].keys() == {"prompt_tokens", "total_tokens"}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"model": "tiny"}, "input", "input is missing"),
        ({"input": "a"}, "model", "model is missing"),
        ({"input": "a", "model": ""}, "model", "model is missing"),
        ({"input": "", "model": "tiny"}, "input", "text 0 of input is empty"),
        ({"input": ["a", ""], "model": "tiny"}, "input", "text 1 of input is empty"),
        ({"input": [], "model": "tiny"}, "input", "input has 0 texts, limits 1 and 2048"),
        ({"input": [1, 2, 3], "model": "tiny"}, "input", "token ids, which belong to another model's vocabulary"),
        ({"input": [[1, 2], [3]], "model": "tiny"}, "input", "token ids"),
        ({"input": ["a", [1, 2]], "model": "tiny"}, "input", "token ids"),
        ({"input": [[], [1, 2]], "model": "tiny"}, "input", "text 0 of input is not a string"),
        ({"input": list(range(2049)), "model": "tiny"}, "input", "token ids"),
        ({"input": {"a": 1}, "model": "tiny"}, "input", "input must be a string or a list of strings"),
        ({"input": ["a", None], "model": "tiny"}, "input", "text 1 of input is not a string"),
        ({"input": "a", "model": 3}, "model", "model must be a string"),
        ({"input": "a", "model": "tiny", "user": 3}, "user", "user must be a string"),
        ({"input": "a", "model": "tiny", "dimensions": 99}, "dimensions", "limits 1 and 8"),
        ({"input": "a", "model": "tiny", "truncate": False}, "truncate", "unknown field 'truncate'"),
    ],
)
def test_bad_request_names_its_fault(url: str, body: dict[str, object], param: str, message: str) -> None:
    answer = post(url, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
