"""Ids of plain text, word by word, each remembered: a fifth of the time that the tokenizer takes.

BERT's tokenizers treat every word by itself, and in ASCII one expression says what a word is. Other text, and that of
other tokenizers, is left to the tokenizer.
"""

import re
from itertools import chain

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

# A page of text; what is longer is mostly cut off, and is not worth finding all words of.
_MAX_CHARS = 8192
# Words remembered, at most of so many characters and ids each; then it starts anew. What has more ids is a key or a
# number that hardly comes again: with 73 ids in each, as 100 characters at random have, they would take 175 MiB.
_MAX_WORDS, _MAX_WORD_CHARS, _MAX_WORD_IDS = 65_536, 100, 8
# Characters that the normalizer drops.
_DROPPED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_WORDS = {
    True: re.compile(r"[a-z0-9]+|[^\sa-z0-9]", re.ASCII),
    False: re.compile(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]", re.ASCII),
}


class WordIds(dict[str, list[int]]):
    """What a tokenizer makes of each word. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, before: list[int], after: list[int]) -> None:
        """`before` and `after` frame every text."""
        super().__init__()
        self._model, self._before, self._after = tokenizer.model, before, after
        self._lowercase: bool = tokenizer.normalizer.lowercase
        self._find = _WORDS[self._lowercase].findall
        added = (re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values())
        self._find_added = re.compile("|".join(added)).search

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "WordIds | None":
        """None for a tokenizer that is not BERT's: its text is not made of such words."""
        added = tokenizer.get_added_tokens_decoder().values()
        is_berts = (
            isinstance(tokenizer.normalizer, BertNormalizer)
            and tokenizer.normalizer.clean_text
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
            and bool(added)
            and not any(token.normalized for token in added)  # they are looked for in the text as it came
        )
        if not is_berts:
            return None
        probe = tokenizer.encode("a")
        mask = probe.special_tokens_mask
        if mask.count(0) != 1:
            return None
        place = mask.index(0)
        return cls(tokenizer, probe.ids[:place], probe.ids[place + 1 :])

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word)]
        if len(self) >= _MAX_WORDS:
            self.clear()
        if len(word) <= _MAX_WORD_CHARS and len(ids) <= _MAX_WORD_IDS:
            self[word] = ids
        return ids

    def encode(self, text: str, max_length: int, truncate: bool, keep_end: bool) -> list[int] | None:
        """As `TextTokenizer.encode` for one text; None where that has to look: no plain text, or too long a one."""
        if len(text) > _MAX_CHARS or not text.isascii() or self._find_added(text):
            return None
        if not text.isprintable() and _DROPPED.search(text):
            return None
        words = self._find(text.lower() if self._lowercase else text)
        ids = list(chain.from_iterable(map(self.__getitem__, words)))
        room = max_length - len(self._before) - len(self._after)
        if len(ids) > room:
            if not truncate:
                return None
            ids = ids[len(ids) - room :] if keep_end else ids[:room]
        return [*self._before, *ids, *self._after]
