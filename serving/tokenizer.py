"""Text to token ids and ids to padded arrays, exactly as the teacher's own tokenizer does it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from serving.errors import BundleRejected, InputTooLong
from serving.words import WordIds

TOKENIZER_NAME = "tokenizer.json"
# Text past this many characters per token the model takes is dropped before tokenising, so that megabytes cost
# nothing. English has about 5; only text that is nearly all spaces or one unbroken word could notice.
_MAX_CHARS_PER_TOKEN = 250

Ids = NDArray[np.int64]


class TextTokenizer:
    """A tokenizer bound to the model's maximum length. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        """`max_length` counts tokens, special tokens included."""
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        self._tokenizer = tokenizer
        self._words = WordIds.of(tokenizer)
        self._max_chars = max_length * _MAX_CHARS_PER_TOKEN
        self.max_length = max_length

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> "TextTokenizer":
        """Load `tokenizer.json`. Raises BundleRejected when it is missing or unreadable."""
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            raise BundleRejected(f"{folder} holds no {TOKENIZER_NAME}")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), max_length)
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleRejected(f"{path} cannot be read as a tokenizer: {error}") from None

    @classmethod
    def from_json(cls, text: str, max_length: int) -> "TextTokenizer":
        """Load what `tokenizer.json` holds. Raises Exception, as tokenizers does, when it cannot be read."""
        return cls(Tokenizer.from_str(text), max_length)

    def to_json(self) -> str:
        """What `from_json` makes the same tokenizer of."""
        text: str = self._tokenizer.to_str()
        return text

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(
        self, texts: Sequence[str], truncate: bool = True, param: str = "input", keep_end: bool = False
    ) -> list[Ids]:
        """Ids of each text, special tokens included, at most `max_length` long.

        With `truncate=False` a text that does not fit raises InputTooLong, which names its place and length and
        reports `param` as the request field at fault. With `keep_end` a text loses its beginning, not its end.
        """
        rows = [self._by_word(text, truncate, keep_end) for text in texts]
        left = [index for index, ids in enumerate(rows) if ids is None]
        cut = [texts[index][-self._max_chars :] if keep_end else texts[index][: self._max_chars] for index in left]
        for index, encoding in zip(left, self._tokenizer.encode_batch_fast(cut) if cut else (), strict=True):
            length = len(texts[index])
            dropped = length > self._max_chars
            if not truncate and (encoding.overflowing or dropped):
                raise InputTooLong(self._describe_too_long(index, length, dropped, encoding), param)
            rows[index] = _ids_of_end(encoding) if keep_end else encoding.ids
        return [np.asarray(ids, dtype=np.int64) for ids in rows]

    def _by_word(self, text: str, truncate: bool, keep_end: bool) -> list[int] | None:
        words = self._words
        if words is None or len(text) > self._max_chars:
            return None
        return words.encode(text, self.max_length, truncate, keep_end)

    def decode(self, rows: Sequence[Ids]) -> list[str]:
        """A text for each row of ids, without the frame of special tokens. Encoding it anew may give other ids."""
        frame = set(self._tokenizer.encode("").ids)
        content = [[id_ for id_ in row.tolist() if id_ not in frame] for row in rows]
        texts: list[str] = self._tokenizer.decode_batch(content, skip_special_tokens=False)
        return texts

    def _describe_too_long(self, index: int, chars: int, dropped: bool, encoding: Encoding) -> str:
        if dropped:
            return f"text {index} has {chars} characters, limit {self._max_chars} ({self.max_length} tokens)"
        special = sum(encoding.special_tokens_mask)
        tokens = self.max_length + sum(len(part) - special for part in encoding.overflowing)
        return f"text {index} has {tokens} tokens, limit {self.max_length}"


def _ids_of_end(encoding: Encoding) -> list[int]:
    """As many ids as `encoding` has, but of the end of the text, in the same frame of special tokens."""
    mask = encoding.special_tokens_mask
    content = [id_ for part in (encoding, *encoding.overflowing) for id_ in _content_ids(part)]
    keep = len(mask) - sum(mask)
    if keep == 0:
        return list(encoding.ids)
    first = mask.index(0)
    return [*encoding.ids[:first], *content[len(content) - keep :], *encoding.ids[first + keep :]]


def _content_ids(encoding: Encoding) -> list[int]:
    return [id_ for id_, is_special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not is_special]


def pad_batch(batch: Sequence[Ids], length: int = 0) -> tuple[Ids, Ids]:
    """Right-pad id rows to the longest, or to `length`: (input_ids, attention_mask), both int64 [B, T].

    Padding is id 0; the attention mask hides it, so any id would do.
    """
    lengths = np.array([len(ids) for ids in batch])
    is_real = np.arange(max(length, lengths.max())) < lengths[:, None]
    input_ids = np.zeros(is_real.shape, dtype=np.int64)
    input_ids[is_real] = np.concatenate(batch)
    return input_ids, is_real.astype(np.int64)
