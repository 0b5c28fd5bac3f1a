import asyncio
import base64

import numpy as np
import orjson
import pytest
from starlette.exceptions import HTTPException

from serving.api.responses import pack_vector, render_vector, render_vectors, send_json, to_serving_error
from serving.errors import InvalidRequest


def test_large_answer_is_rendered_in_slices_with_the_loop_free_between_them() -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 384)).astype(np.float32)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> list[bytes]:
        beside = asyncio.create_task(other())
        pieces = await render_vectors(vectors, "float", lambda _, row: row)
        beside.cancel()
        return pieces

    pieces = asyncio.run(main())
    assert turns >= 3
    assert max(map(len, pieces)) < 1_000_000
    rendered = np.array(orjson.loads(b"[" + b"".join(pieces) + b"]"), dtype=np.float32)
    np.testing.assert_array_equal(rendered, vectors)


def test_base64_is_little_endian_float32() -> None:
    vector = np.array([1.0, -2.5], dtype=np.float32)
    assert base64.b64decode(orjson.loads(render_vector(vector, "base64"))) == b"\x00\x00\x80?\x00\x00 \xc0"


def test_int8_keeps_cosines_and_is_sentence_transformers_own_to_a_step() -> None:
    from sentence_transformers.util import quantize_embeddings  # with torch, which the other tests do without

    vectors = np.random.default_rng(0).standard_normal((50, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    packed = np.array([pack_vector(row, "int8") for row in vectors])
    lengths = np.linalg.norm(packed.astype(np.float32), axis=1)
    assert ((packed * vectors).sum(axis=1) / lengths).min() > 0.9999
    for row, ours in zip(vectors, packed, strict=True):
        ranges = np.abs(row).max() * np.array([[-1.0], [1.0]], dtype=np.float32) * np.ones(384, dtype=np.float32)
        theirs = quantize_embeddings(row[None], precision="int8", ranges=ranges)[0]  # rounds down, from -128 on
        assert np.abs(ours.astype(int) - theirs - 0.5).max() <= 1.5
    assert not pack_vector(np.zeros(8, dtype=np.float32), "int8").any()


def test_pieces_are_sent_as_one_body_with_its_length() -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(send_json(send, 200, [b"[1", b",2]"]))  # type: ignore[arg-type]
    assert (b"content-length", b"5") in sent[0]["headers"]  # type: ignore[operator]
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]


@pytest.mark.parametrize("status", [400, 415])
def test_other_http_exceptions_are_the_request_s_fault(status: int) -> None:
    assert isinstance(to_serving_error(HTTPException(status)), InvalidRequest)
