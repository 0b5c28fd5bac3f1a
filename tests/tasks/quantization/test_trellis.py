"""Numbers on a trellis: what a state is, how much better than numbers on their own, and what is packed."""

import numpy as np
import pytest

from tasks.quantization.trellis import choose_states, codebook, pack_states, window_kernel


def numbers(runs: int, length: int) -> np.ndarray:
    """Normally distributed."""
    return np.random.default_rng(7).standard_normal((runs, length)).astype(np.float32)


@pytest.mark.parametrize(("bits", "alone"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_a_trellis_leaves_less_error_than_the_best_numbers_on_their_own(bits: int, alone: float) -> None:
    """`alone` is what Max's quantiser of so many bits leaves of a normal distribution."""
    sample = numbers(32, 256)
    states = choose_states(sample, bits, codebook(bits))
    assert np.square(codebook(bits)[states] - sample).mean() < 0.75 * alone


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_every_state_follows_from_the_bits_before_it(bits: int) -> None:
    start = np.array([0, 17, 255, 4], dtype=np.uint8)
    states = choose_states(numbers(4, 40), bits, codebook(bits), start)
    before = np.concatenate((start[:, None], states[:, :-1]), axis=1).astype(int)
    assert (states >> bits == before % (256 >> bits)).all()


def test_what_is_worth_nothing_leaves_the_choice_to_the_others() -> None:
    sample, worth = numbers(4, 40), np.ones((4, 40), dtype=np.float32)
    spoiled = sample.copy()
    spoiled[:, 20], worth[:, 20] = 50, 0
    own, free = (choose_states(spoiled, 3, codebook(3), worth=how) for how in (None, worth))
    errors = [np.delete(np.square(codebook(3)[states] - sample), 20, axis=1).mean() for states in (own, free)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_planes_of_bits_give_the_states_again(bits: int) -> None:
    states = choose_states(numbers(3, 48), bits, codebook(bits))
    packed = pack_states(states, bits)
    assert packed.shape == (3, bits, 6)
    planes = np.unpackbits(packed, axis=-1).astype(float)
    kernel = window_kernel(bits)[0]
    padded = np.pad(planes, ((0, 0), (0, 0), (kernel.shape[1] - 1, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[1], axis=2)
    assert np.array_equal(np.einsum("rbtw,bw->rt", windows, kernel), states)
