"""The frames between engine process and fronts: what goes in comes out, and whatever else comes is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from serving.frames import (
    Answer,
    Counts,
    FrameReader,
    Kind,
    StreamBroken,
    decode_document,
    decode_embed,
    decode_vectors,
    encode_document,
    encode_embed,
    encode_vectors,
    pack,
)

ROW = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20).map(lambda ids: np.array(ids, dtype=np.int64))
MESSAGE = st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=50))


@given(messages=st.lists(MESSAGE, max_size=8), cuts=st.lists(st.integers(1, 60)))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    messages: list[tuple[Kind, int, bytes]], cuts: list[int]
) -> None:
    reader, data, frames = FrameReader(), b"".join(pack(*message) for message in messages), []
    for size in cuts:
        frames += reader.feed(data[:size])
        data = data[size:]
    frames += reader.feed(data)
    assert [(frame.kind, frame.subject, bytes(frame.payload)) for frame in frames] == messages


@given(messages=st.lists(MESSAGE, min_size=1, max_size=4), end=st.integers(1))
def test_frame_that_is_not_complete_is_waited_for(messages: list[tuple[Kind, int, bytes]], end: int) -> None:
    data = b"".join(pack(*message) for message in messages)
    cut = len(data) - 1 - end % len(pack(*messages[-1]))
    assert len(FrameReader().feed(data[: max(cut, 0)])) == len(messages) - 1


def test_what_is_missing_of_a_frame_can_be_read_exactly() -> None:
    reader, data = FrameReader(), pack(Kind.SETTINGS, 0, b"{}") + b"next"
    head = reader.num_missing
    assert reader.feed(data[:head]) == []
    assert len(reader.feed(data[head : head + reader.num_missing])) == 1
    assert reader.num_missing == head


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        pack(Kind.TABLE)[:4] + b"\x63" + bytes(4),  # no such kind
        bytes(9),  # shorter than its own head
        b"\xff\xff\xff\x7f" + pack(Kind.EMBED)[4:],  # too long
    ],
)
def test_what_is_no_frame_breaks_the_stream(data: bytes) -> None:
    with pytest.raises(StreamBroken, match=r"a frame of kind \d+ and \d+ bytes, limit \d+"):
        FrameReader().feed(data)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_frames_or_break_the_stream(data: bytes) -> None:
    for read in (FrameReader(64).feed, decode_embed, decode_vectors, lambda data: decode_document(data, Counts)):
        try:
            read(data)
        except StreamBroken:
            continue


@given(service=st.integers(0, 2**32 - 1), arrival=st.floats(0, 1e12), rows=st.lists(ROW, min_size=1, max_size=8))
def test_ids_survive(service: int, arrival: float, rows: list[NDArray[np.int64]]) -> None:
    decoded = decode_embed(encode_embed(service, arrival, rows))
    assert (decoded.service, decoded.arrival) == (service, arrival)
    assert [row.dtype for row in decoded.rows] == [np.int64] * len(rows)
    assert [row.tolist() for row in decoded.rows] == [row.tolist() for row in rows]


@given(rows=st.lists(ROW, min_size=1, max_size=4), place=st.integers(0), value=st.integers(0, 255))
def test_request_that_was_spoiled_is_whole_or_refused(rows: list[NDArray[np.int64]], place: int, value: int) -> None:
    data = bytearray(encode_embed(1, 2.0, rows))
    data[place % len(data)] = value
    try:
        decoded = decode_embed(bytes(data))
    except StreamBroken:
        return
    assert sum(map(len, decoded.rows)) == sum(map(len, rows))
    assert all(len(row) and row.min() >= 0 for row in decoded.rows)


@given(vectors=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9))), seconds=st.floats(0, 1e6))
def test_vectors_survive_bit_by_bit(vectors: NDArray[np.float32], seconds: float) -> None:
    engine_seconds, decoded = decode_vectors(b"".join(encode_vectors(seconds, vectors)))
    assert (engine_seconds, decoded.dtype, decoded.shape) == (seconds, np.float32, vectors.shape)
    assert decoded.tobytes() == vectors.tobytes()


def test_documents_have_their_shape_or_break_the_stream() -> None:
    answer = Answer(status=404, headers=(("allow", "GET"),))
    assert decode_document(encode_document(answer, b"body"), Answer) == (answer, b"body")
    for payload in (b"", b"\x09\0\0\0{}", encode_document(answer)[:-1], b"\x02\0\0\0{}"):
        with pytest.raises(StreamBroken):
            decode_document(payload, Answer)
    with pytest.raises(StreamBroken, match="that are no Counts"):
        decode_document(encode_document(answer), Counts)
