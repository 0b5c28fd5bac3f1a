from pathlib import Path

import numpy as np
import pytest

from serving.errors import InputTooLong
from serving.tokenizer import TextTokenizer, pad_batch


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(bundle, 16)


def test_tokenizer_frames_and_truncates(tokenizer: TextTokenizer) -> None:
    short, long = tokenizer.encode(["red cat", "cat " * 50])
    assert short.tolist() == [2, 6, 12, 3]
    assert (len(long), long[0], long[-1]) == (16, 2, 3)
    assert long.dtype == np.int64
    assert tokenizer.vocabulary_size == 16


def test_tokenizer_cuts_megabytes_before_tokenising(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode(["cat " * 1_000_000])[0]) == 16
    with pytest.raises(InputTooLong, match="text 1 has 4000000 characters, limit 4000"):
        tokenizer.encode(["cat", "cat " * 1_000_000], truncate=False)


def test_tokenizer_says_how_long_a_refused_text_is(tokenizer: TextTokenizer) -> None:
    tokenizer.encode(["cat " * 14], truncate=False)
    for count in (15, 30, 31, 100):
        with pytest.raises(InputTooLong, match=f"text 0 has {count + 2} tokens, limit 16"):
            tokenizer.encode(["cat " * count], truncate=False)


def test_pad_batch_masks_what_it_adds() -> None:
    input_ids, mask = pad_batch([np.array([1, 2, 3]), np.array([4])])
    assert input_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
