"""Text for tests: sentences and query/body pairs that differ from one another and always come out the same."""

import random

_PLACES = ("harbour", "library", "station", "valley", "market", "garden", "bridge", "tower", "island", "village")
_PEOPLE = ("baker", "pilot", "teacher", "sailor", "doctor", "painter", "farmer", "singer", "tailor", "miller")
_DEEDS = ("repairs", "describes", "measures", "carries", "forgets", "collects", "borrows", "paints", "counts", "sells")
_THINGS = ("lanterns", "letters", "engines", "baskets", "mirrors", "clocks", "ropes", "carpets", "wheels", "bells")
_TIMES = ("at dawn", "in winter", "every Tuesday", "after the storm", "before noon", "at night", "during harvest")


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different sentences of 7 to 40 words."""
    rng = random.Random(seed)  # noqa: S311  the same texts every time is the point
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        clauses = [_clause(rng) for _ in range(rng.randint(1, 4))]
        sentences[" and ".join(clauses).capitalize() + "."] = None
    return list(sentences)


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows of a jsonl corpus: `query`, and `text` that answers it.

    They have most words in common: a teacher of random weights then finds the answer first, and by more than rounding.
    """
    rng = random.Random(seed)  # noqa: S311  the same texts every time is the point
    rows = []
    for index in range(count):
        person, place, thing = rng.choice(_PEOPLE), rng.choice(_PLACES), rng.choice(_THINGS)
        text = f"{person} {index} of the {place} keeps {thing}: {_clause(rng)} and {_clause(rng)}."
        rows.append({"query": f"{text[:-1]}?", "text": text})
    return rows


def _clause(rng: random.Random) -> str:
    parts = (rng.choice(_PEOPLE), rng.choice(_DEEDS), rng.choice(_THINGS), rng.choice(_PLACES), rng.choice(_TIMES))
    return "the {} {} {} near the {} {}".format(*parts)
