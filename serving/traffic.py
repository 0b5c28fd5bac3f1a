"""Which version of a model answers a request. Pure: weights, keys and counts come in as arguments."""

import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b

from serving.errors import InvalidRequest

VERSION_HEADER = b"x-model-version"
# Steps of the golden ratio around a circle never bunch: any run of requests is shared out as the weights say.
_GOLDEN_STEP = (math.sqrt(5) - 1) / 2


def read_routing(headers: Iterable[tuple[bytes, bytes]], key_header: bytes) -> tuple[str | None, bytes | None]:
    """(version asked for, key to stick to) of a request's headers, None where it has none."""
    version = key = None
    for name, value in headers:
        if name == VERSION_HEADER:
            version = value.decode("latin-1")
        elif name == key_header:
            key = value
    return version, key


def pick_by_key(weights: Mapping[str, float], key: bytes) -> str:
    """The version of a key: always the same for the same weights, and over many keys as often as its weight says.

    Weighted rendezvous hashing: each version draws a number from the key alone and the weight decides who wins, so a
    weight that changes moves keys to or from its own version only, and no more than its share changes.
    At least one weight must be above 0.
    """
    return min((_distance(version, weight, key), version) for version, weight in weights.items() if weight > 0)[1]


def _distance(version: str, weight: float, key: bytes) -> float:
    """Exponentially distributed with rate `weight`; the least of several is each one's with its share of the rates."""
    drawn = int.from_bytes(blake2b(b"%b\0%b" % (version.encode(), key), digest_size=8).digest(), "big")
    return -math.log((drawn + 1) / 2**64) / weight


def pick_by_count(weights: Mapping[str, float], count: int) -> str:
    """The version of the `count`-th request without a key, spread evenly. At least one weight must be above 0."""
    point = count * _GOLDEN_STEP % 1 * sum(weights.values())
    chosen = ""
    for version, weight in weights.items():
        if weight > 0:
            chosen, point = version, point - weight
            if point < 0:
                break
    return chosen


def check_weights(weights: Mapping[str, float], served: Iterable[str]) -> dict[str, float]:
    """Weights of every version served, 0 for those not named.

    Raises InvalidRequest for a version that is not served, a weight outside 0 to 1e9, and when all are 0.
    """
    checked = dict.fromkeys(served, 0.0)
    for version, weight in weights.items():
        if version not in checked:
            raise InvalidRequest(
                f"weights name a version that is not served, served are {', '.join(checked)}", "weights"
            )
        if not 0 <= weight <= 1e9:
            raise InvalidRequest(f"a weight is {weight}, limits 0 and 1e9", "weights")
        checked[version] = float(weight)
    if not any(checked.values()):
        raise InvalidRequest("all weights are 0: some version has to answer", "weights")
    return checked
