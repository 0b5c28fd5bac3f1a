"""Few bits on a trellis: what a weight's bits stand for depends on the bits just before them as well.

Numbers go one after another, `bits` each. The last eight bits at a number are its state, a place in a codebook of 256
values: with 4 bits a number has 16 to choose from, which 16 its predecessor decides. Choosing a whole run at once (the
Viterbi algorithm) leaves about 0.6 of the squared error that as many bits of a number on its own leave (docs/log.md).
"""

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 8  # bits of a state
LIMIT = 4.0  # a number beyond it, in units of its scale, is outside every codebook
_STATES = 1 << WINDOW
_FAR = np.float32(1e30)
_TRAINING = (128, 512, 12)  # runs, numbers in each, rounds

Floats = NDArray[np.float32]
States = NDArray[np.uint8]


@cache
def codebook(bits: int) -> Floats:
    """The values of the 256 states, trained on normally distributed numbers; always the same."""
    rng = np.random.default_rng(bits)
    normal = NormalDist()
    values = rng.permutation([normal.inv_cdf((place + 0.5) / _STATES) for place in range(_STATES)]).astype(np.float32)
    runs, length, rounds = _TRAINING
    for _ in range(rounds):
        numbers = rng.standard_normal((runs, length)).astype(np.float32)
        states = choose_states(numbers, bits, values).ravel()
        counts = np.bincount(states, minlength=_STATES)
        sums = np.bincount(states, numbers.ravel(), _STATES)
        values = np.where(counts > 0, sums / np.maximum(counts, 1), values).astype(np.float32)
    return values


def choose_states(
    numbers: Floats, bits: int, values: Floats, start: States | None = None, worth: Floats | None = None
) -> States:
    """The states whose values are nearest to `numbers` [R, T], each row a run of its own, in the order of the rows.

    A run begins in its state of `start` [R], by default 0; errors count `worth` [R, T] times.
    """
    runs, length = numbers.shape
    rest = _STATES >> bits
    costs = np.full((runs, _STATES), _FAR)
    costs[np.arange(runs), 0 if start is None else start] = 0
    came_from = np.empty((length, runs, rest), dtype=np.uint8)
    for step in range(length):
        # A state's upper bits are the lower ones of the state before, whose own upper bits drop out: the best of them.
        before = costs.reshape(runs, 1 << bits, rest)
        came_from[step] = before.argmin(axis=1)
        errors = np.square(numbers[:, step, None] - values)
        if worth is not None:
            errors *= worth[:, step, None]
        costs = (errors.reshape(runs, rest, 1 << bits) + before.min(axis=1)[:, :, None]).reshape(runs, _STATES)
    states = np.empty((runs, length), dtype=np.uint8)
    state: NDArray[Any] = costs.argmin(axis=1)
    for step in range(length - 1, -1, -1):
        states[:, step] = state
        upper = state >> bits
        state = came_from[step, np.arange(runs), upper].astype(np.intp) * rest + upper
    return states


def pack_states(states: States, bits: int) -> NDArray[np.uint8]:
    """The newest bits of states [..., T], bit by bit, eight to a byte, the first highest [..., bits, T / 8]."""
    planes = (states[..., None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return np.packbits(planes.astype(np.uint8), axis=-1)


def window_kernel(bits: int) -> Floats:
    """What a convolution multiplies planes of bits [bits, T] with to give the states [1, bits, W]."""
    width = -(-WINDOW // bits)
    places = np.arange(bits)[:, None] + bits * (width - 1 - np.arange(width))
    return np.where(places < WINDOW, 2.0**places, 0.0).astype(np.float32)[None]
