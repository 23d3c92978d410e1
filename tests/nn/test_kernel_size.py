"""Eq. (12): the kernel size that goes with a number of channels, in both readings."""

import math

import pytest

from ecanet.nn import ECA, ECANS, adaptive_kernel_size


def nearest_odd(t: float) -> int:
    """The odd number nearest to t, by trying them all; halfway goes up, and 1 is the least."""
    return min(range(1, 99, 2), key=lambda k: (abs(k - t), -k))


def official(channels: int, gamma: float, b: float) -> int:
    """The released code, word for word."""
    t = int(abs((math.log(channels, 2) + b) / gamma))
    return t if t % 2 else t + 1


@pytest.mark.parametrize(
    ("channels", "k"),
    [(1, 1), (4, 1), (8, 3), (64, 3), (127, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2047, 5), (2048, 7)],
    ids=str,
)
def test_values_of_the_paper_and_where_they_change(channels, k) -> None:
    assert adaptive_kernel_size(channels) == k
    assert adaptive_kernel_size(channels) == nearest_odd((math.log2(channels) + 1) / 2)


def test_both_readings_agree_with_their_definitions_and_each_other_for_every_width() -> None:
    for channels in range(1, 4097):
        k = adaptive_kernel_size(channels)
        assert k == nearest_odd((math.log2(channels) + 1) / 2), channels
        assert k == official(channels, 2, 1), channels


@pytest.mark.parametrize(("gamma", "b"), [(1, 0), (1, 1), (1, 2), (2, 0), (3, 1), (1.5, 0.25), (4, 9)], ids=str)
def test_both_readings_agree_wherever_the_value_is_not_negative(gamma, b) -> None:
    for channels in range(1, 1025):
        released = adaptive_kernel_size(channels, gamma, b)
        assert released == nearest_odd((math.log2(channels) + b) / gamma), channels


def test_the_readings_part_where_a_negative_b_makes_the_value_negative() -> None:
    # t = (log2(4) - 6) / 1 = -4: the released code makes it 4 and then 5, the nearest odd number of at least 1 is 1.
    assert adaptive_kernel_size(4, gamma=1, b=-6) == official(4, 1, -6) == 5
    assert nearest_odd(-4) == 1
    # Above zero they agree again: t = (log2(1024) - 6) / 1 = 4.
    assert adaptive_kernel_size(1024, gamma=1, b=-6) == nearest_odd(4) == 5


@pytest.mark.parametrize("cls", [ECA, ECANS])
def test_gates_choose_it_by_default(cls) -> None:
    for channels in (1, 2, 3, 64, 256, 2048):
        assert cls(channels).kernel_size == adaptive_kernel_size(channels)
        assert cls(channels, "adaptive", circular=True).kernel_size == adaptive_kernel_size(channels)
    assert cls(64, 9).kernel_size == 9


@pytest.mark.parametrize(
    ("channels", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("64", TypeError)]
)
def test_channels_must_be_a_positive_integer(channels, error) -> None:
    with pytest.raises(error, match=rf"channels must be .*got {channels!r}"):
        adaptive_kernel_size(channels)


def test_gamma_must_not_be_zero() -> None:
    with pytest.raises(ValueError, match=r"gamma must not be 0.*paper uses 2"):
        adaptive_kernel_size(64, gamma=0)
