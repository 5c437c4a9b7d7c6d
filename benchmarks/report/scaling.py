"""Tables of TPU programs and of the scaling model: compiled and modelled, not measured."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.report.results import Results, measured_by, table, three_digits
from benchmarks.scaling import CHIPS, TOPOLOGIES, Step, predict
from cifar_jax.parallel import accelerator_steps_per_call

Program = dict[str, Any]
CHIP = "v5e"  # of the model
RECIPES = ("lenet5", "all_cnn")  # those compiled for several topologies
PARTS = {"compute": "compute", "communication": "all-reduce", "per_call": "once a call"}


def _megabytes(size: float) -> str:
    return three_digits(size / 1e6)


def _thousands(cycles: float) -> str:
    return f"{cycles / 1000:,.0f}"


def _milliseconds(cycles: float, topology: str) -> str:
    clock = CHIPS[topology.partition(":")[0]].clock
    return "–" if clock is None else three_digits(1000 * cycles / clock)


def programs(results: Results) -> str:
    """One row per compiled program."""
    result = results.load("tpu_compile")
    header = ["recipe", "topology", "step of", "images a chip", "compile, s of CPU", "arguments, MB", "temporaries, MB"]
    header += ["outputs, MB", "of the HBM", "GFLOP", "MB moved", "thousand cycles", "ms"]
    rows = []
    for program in result["programs"]:
        chip = CHIPS[program["topology"].partition(":")[0]]
        sizes = [program[f"{kind}_bytes"] for kind in ("argument", "temporary", "output")]
        used = sum(sizes) - program["donated_bytes"] + program["program_bytes"]
        images = f"{program['images_per_chip']}{'' if program['scaling'] == 'strong' else ' (weak)'}"
        cycles = _thousands(program["cycles"])
        rows.append(
            [
                *(f"`{program['recipe']}`", program["topology"], program["phase"], images),
                *(f"{program['compile_cpu_seconds']:.0f}", *map(_megabytes, sizes)),
                *(f"{100 * used / chip.hbm_bytes:.1f} %", three_digits(program["flops"] / 1e9)),
                *(_megabytes(program["bytes_accessed"]), cycles, _milliseconds(program["cycles"], program["topology"])),
            ]
        )
    minutes = sum(program["compile_cpu_seconds"] for program in result["programs"]) / 60
    notes = [
        f"{result['dtype']}. Compiling all took {minutes:.0f} minutes of CPU time.",
        *(_copy(program) for program in _training(results, "lenet5") if program["chips"] == 4),
        measured_by(result),
    ]
    return "\n\n".join([table(header, rows), *notes])


def _copy(program: Program) -> str:
    """What a call does once, before its steps."""
    topology = program["topology"]
    milliseconds = _milliseconds(program["cycles_per_call"], topology)
    estimate = "" if milliseconds == "–" else f", or {milliseconds} ms"
    return (
        f"`{program['recipe']}` on {topology}: copies at the start of a training call read and write "
        f"{_megabytes(program['bytes_copied_per_call'])} MB. The part of a call outside of its steps takes "
        f"{_thousands(program['cycles_per_call'])} thousand cycles{estimate}."
    )


def bfloat16(results: Results) -> str:
    """The programs that were compiled in bfloat16 too, as a share of the same programs in float32."""
    result, rows = results.load("tpu_compile_bfloat16"), []
    key = lambda program: tuple(program[name] for name in ("recipe", "topology", "phase", "scaling"))
    whole = {key(program): program for program in results.load("tpu_compile")["programs"]}
    kinds = "cycles", "bytes_accessed", "temporary_bytes"
    for program in result["programs"]:
        shares = [f"{program[kind] / whole[key(program)][kind]:.2f}" for kind in kinds]
        cycles = _thousands(program["cycles"])
        rows.append([f"`{program['recipe']}`", program["topology"], program["phase"], cycles, *shares])
    header = ["recipe", "topology", "step of", "thousand cycles"]
    header += [f"{kind} ÷ float32's" for kind in ("cycles", "bytes moved", "temporaries")]
    return "\n\n".join([table(header, rows), measured_by(result)])


def collectives(results: Results) -> str:
    """The collectives of each program in its optimised HLO."""
    result, rows = results.load("tpu_compile"), []
    for program in result["programs"]:
        found = [
            f"{one['operation']} of {one['bytes']:,} bytes in {one['arrays']} array{'s' * (one['arrays'] > 1)} "
            f"({one['strategy']})"
            for one in program["collectives"]
        ]
        gradients = f"{program['gradient_bytes']:,}" if program["phase"] == "training" else "–"
        cells = [f"`{program['recipe']}`", program["topology"], program["phase"], gradients]
        rows.append([*cells, "; ".join(found) or "none", "; ".join(program["surprises"]) or "none"])
    return table(["recipe", "topology", "step of", "bytes of gradients", "collectives a step", "surprises"], rows)


def loops(results: Results) -> str:
    """The share of a training step's cycles that its sequential loops take."""
    rows = []
    for program in _training(results, None):
        longest = max(program["loops"], key=lambda loop: loop["cycles"], default=None)
        if longest is not None:
            share = f"{100 * longest['cycles'] / program['cycles']:.0f} %"
            cells = [f"`{program['recipe']}`", program["topology"], f"{program['images_per_chip']}"]
            rows.append([*cells, f"`{longest['operation']}`", f"{longest['times']}", share])
    return table(["recipe", "topology", "images a chip", "longest loop", "rounds", "share of the cycles"], rows)


def _training(results: Results, recipe: str | None) -> list[Program]:
    found = [x for x in results.load("tpu_compile")["programs"] if x["phase"] == "training"]
    return [x for x in found if recipe in (None, x["recipe"])]


def model(results: Results, recipe: str, weak: bool) -> list[tuple[Step, int]]:
    """Returns the modelled steps and the steps of an epoch, on 1 to 256 chips.

    Strong scaling divides the recipe's batch over the chips. Weak scaling gives every chip the whole batch.
    """
    compiled = [x for x in _training(results, recipe) if x["topology"].startswith(CHIP) and x["scaling"] == "strong"]
    cycles = {x["images_per_chip"]: x["cycles"] for x in compiled}
    several = next(x for x in compiled if x["chips"] > 1)
    sizes = [one["bytes"] for one in several["collectives"] for _ in range(one["times"])]
    steps = []
    for shape in TOPOLOGIES:
        batch_size = several["batch_size"] * (math.prod(shape) if weak else 1)
        steps_per_epoch = -(-several["num_images"] // batch_size)
        per_call = several["cycles_per_call"], accelerator_steps_per_call(steps_per_epoch)
        step = predict(CHIPS[CHIP], shape, batch_size / math.prod(shape), cycles, sizes, *per_call)
        steps.append((step, steps_per_epoch))
    return steps


def _rates(results: Results, recipe: str, weak: bool) -> list[float]:
    """Returns the images of the training set a second. The padding of an epoch's last batch does not count."""
    num_images = _training(results, recipe)[0]["num_images"]
    return [num_images / (step.seconds * number) for step, number in model(results, recipe, weak)]


def _scaling(results: Results, weak: bool) -> str:
    header = ["recipe", "chips", "batch", "images a chip", "compute, ms", "all-reduce, ms", "once a call, ms"]
    header += ["step, ms", "images a second", "efficiency", "epoch, s", "calls a second", "largest part"]
    rows = []
    for recipe in RECIPES:
        rates = _rates(results, recipe, weak)
        for (step, steps_per_epoch), rate in zip(model(results, recipe, weak), rates):
            parts = {name: getattr(step, name) for name in PARTS}
            efficiency = rate / (step.chips * rates[0])
            epoch = step.seconds * steps_per_epoch
            calls = 1 / (step.seconds * accelerator_steps_per_call(steps_per_epoch))
            batch = f"{step.chips * step.images_per_chip:,.0f}"
            cells = [f"`{recipe}`", f"{step.chips}", batch, f"{step.images_per_chip:,.0f}"]
            cells += [three_digits(1000 * seconds) for seconds in (*parts.values(), step.seconds)]
            cells += [f"{rate:,.0f}", f"{100 * efficiency:.0f} %", three_digits(epoch)]
            rows.append([*cells, three_digits(calls), PARTS[max(parts, key=parts.__getitem__)]])
    return table(header, rows)


def strong(results: Results) -> str:
    """Strong scaling, with the numbers of chips from which on the limits hold."""
    sentences = []
    for recipe in RECIPES:
        steps, rates = [step for step, _ in model(results, recipe, weak=False)], _rates(results, recipe, weak=False)
        fastest = max(rates)
        half = [step.chips for step, rate in zip(steps, rates) if rate < step.chips * rates[0] / 2]
        over = [step.chips for step in steps if step.communication > step.compute]
        sentences.append(
            f"`{recipe}`: fastest with {steps[rates.index(fastest)].chips} chips, {fastest / rates[0]:.1f} times as "
            f"fast as with one. The efficiency is below 50 % {f'from {half[0]} chips on' if half else 'nowhere'}. "
            f"With {steps[-1].images_per_chip:.0f} image a chip, computing a step still takes "
            f"{three_digits(1000 * steps[-1].compute)} ms. The all-reduce takes longer than computing "
            + (f"from {over[0]} chips on." if over else "on no number of chips.")
        )
    return "\n\n".join([_scaling(results, weak=False), "\n".join(f"- {line}" for line in sentences)])


def weak(results: Results) -> str:
    """Weak scaling."""
    return _scaling(results, weak=True)


def dispatch(results: Results) -> str:
    """The host's measured time for a call, beside the calls that the fastest modelled training needs."""
    result, rows = results.load("tpu_compile"), []
    for recipe in RECIPES:
        seconds = result["dispatch_seconds"][recipe]
        steps = model(results, recipe, weak=False)
        needed = max(1 / (step.seconds * accelerator_steps_per_call(number)) for step, number in steps)
        one = max(1 / step.seconds for step, _ in steps)
        cells = [f"`{recipe}`", three_digits(1000 * seconds), f"{1 / seconds:,.0f}"]
        rows.append([*cells, three_digits(needed), f"{one:,.0f}"])
    header = ["recipe", "host's time for a call, ms", "calls a second possible"]
    return table([*header, "calls a second needed", "needed with one step a call"], rows)
