"""The scaling model's arithmetic, by hand."""

import pytest

from benchmarks.scaling import CHIPS, Chip, all_reduce_seconds, interpolate, predict

# 1 GHz; links of 1 GB/s; the other figures do not enter
CHIP = Chip(1.0, 1.0, 1.0, 1e9, 1e9)


def test_interpolation_is_linear_between_points_and_refused_outside():
    points = {1: 10.0, 4: 40.0, 16: 100.0}
    assert [interpolate(points, x) for x in (1, 2, 4, 10, 16)] == pytest.approx([10, 20, 40, 70, 100])
    for x in (0.5, 17):
        with pytest.raises(ValueError, match="outside of the compiled 1 to 16"):
            interpolate(points, x)


@pytest.mark.parametrize(
    ("shape", "links", "hops"),
    [((1, 2), 1, 1), ((2, 2), 2, 2), ((2, 4), 2, 4), ((4, 8), 2, 10), ((8, 16), 3, 15), ((16, 16), 4, 16)],
)
def test_an_all_reduce_sends_twice_its_bytes_and_waits_for_twice_the_hops(shape, links, hops):
    seconds = 2 * 4e6 / (links * 1e9) + 2 * hops * 1e-6
    assert all_reduce_seconds(CHIP, shape, [4e6]) == pytest.approx(seconds, rel=1e-12)
    assert all_reduce_seconds(CHIP, shape, [4e6, 0]) == pytest.approx(seconds + 2 * hops * 1e-6, rel=1e-12)


def test_one_chip_has_nothing_to_reduce():
    assert all_reduce_seconds(CHIP, (1, 1), [4e6]) == 0


def test_a_step_is_the_sum_of_its_parts():
    step = predict(CHIP, (2, 2), 8, {4: 1e6, 12: 3e6}, [1e6, 4], cycles_per_call=5e6, steps_per_call=10)
    assert (step.chips, step.images_per_chip) == (4, 8)
    assert step.compute == pytest.approx(2e-3)
    assert step.communication == pytest.approx(1e-3 + 4e-9 + 8e-6)
    assert step.per_call == pytest.approx(5e-4)
    assert step.seconds == pytest.approx(2e-3 + 1e-3 + 4e-9 + 8e-6 + 5e-4)
    assert step.images_per_second == pytest.approx(32 / step.seconds)


def test_an_unknown_clock_gives_no_times():
    with pytest.raises(ValueError, match="clock is unknown"):
        predict(CHIPS["v6e"], (1, 1), 4, {4: 1.0}, [], 0, 1)


def test_the_published_figures_agree_with_each_other():
    """A chip's links together have the published 1,600 and 3,200 Gbit/s. v5e's clock is near the known 1.5 GHz."""
    assert [4 * 8 * CHIPS[name].link_bytes_per_second for name in ("v5e", "v6e")] == [1600e9, 3200e9]
    assert CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)
