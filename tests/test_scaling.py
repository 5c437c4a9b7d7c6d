"""The scaling model's arithmetic, by hand."""

import json

import pytest

from benchmarks.report import scaling
from benchmarks.report.results import Results
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


def test_an_unknown_clock_gives_no_times():
    with pytest.raises(ValueError, match="clock is unknown"):
        predict(CHIPS["v6e"], (1, 1), 4, {4: 1.0}, [], 0, 1)


def test_the_published_figures_agree_with_each_other():
    """A chip's links together have the published 1,600 and 3,200 Gbit/s. v5e's clock is near the known 1.5 GHz."""
    assert [4 * 8 * CHIPS[name].link_bytes_per_second for name in ("v5e", "v6e")] == [1600e9, 3200e9]
    assert CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)


def program(topology, chips, cycles):
    common = {"recipe": "lenet5", "phase": "training", "scaling": "strong", "batch_size": 256, "num_images": 50_000}
    collectives = [{"bytes": 1_600_000, "times": 1}] if chips > 1 else []
    sizes = {"topology": topology, "chips": chips, "images_per_chip": 256 // chips}
    return common | sizes | {"cycles": cycles, "cycles_per_call": 1.5e6, "collectives": collectives}


def test_the_tables_divide_the_batch_or_give_it_to_each_chip(tmp_path):
    programs = [program("v5e:1x1", 1, 2.6e6), program("v5e:2x2", 4, 0.68e6), program("v5e:16x16", 256, 0.05e6)]
    programs += [program("v6e:2x2", 4, 1.0), program("v5e:16x16", 256, 1.0) | {"scaling": "weak"}]
    (tmp_path / "tpu_compile.json").write_text(json.dumps({"programs": programs}))
    strong, weak = (scaling.model(Results(tmp_path), "lenet5", weak) for weak in (False, True))
    clock = CHIPS["v5e"].clock
    assert [step.chips for step, _ in strong] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [step.images_per_chip for step, _ in strong] == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert {number for _, number in strong} == {196}
    expected = [2.6e6, 1.32e6, 0.68e6, 0.36e6, 0.2e6, 0.12e6, 0.08e6, 0.06e6, 0.05e6]
    assert [step.compute * clock for step, _ in strong] == pytest.approx(expected, rel=1e-9)
    assert strong[2][0].communication == pytest.approx(3.2e6 / 100e9 + 4e-6)
    assert strong[0][0].per_call == pytest.approx(1.5e6 / clock / 196)
    assert {step.images_per_chip for step, _ in weak} == {256}
    assert [number for _, number in weak] == [196, 98, 49, 25, 13, 7, 4, 2, 1]
    assert weak[-1][0].per_call == pytest.approx(1.5e6 / clock)
    rates = scaling._rates(Results(tmp_path), "lenet5", weak=True)
    assert rates[-1] == pytest.approx(50_000 / weak[-1][0].seconds)  # the batch has 65,536 places


def test_bfloat16_is_compared_with_the_same_program(tmp_path):
    sizes = {"bytes_accessed": 8e6, "temporary_bytes": 4e6}
    halves = {"cycles": 0.34e6, "bytes_accessed": 2e6, "temporary_bytes": 3e6}
    programs = [program("v5e:1x1", 1, 2.6e6) | sizes, program("v5e:2x2", 4, 0.68e6) | sizes]
    measured = {"command": "COMMAND", "hardware": "-", "versions": {}, "date": "-"}
    for name, found in (("tpu_compile", programs), ("tpu_compile_bfloat16", [programs[1] | halves])):
        (tmp_path / f"{name}.json").write_text(json.dumps(measured | {"programs": found}))
    lines = scaling.bfloat16(Results(tmp_path)).splitlines()
    assert lines[2] == "| `lenet5` | v5e:2x2 | training | 340 | 0.50 | 0.25 | 0.75 |"
    assert "COMMAND" in lines[-1]
