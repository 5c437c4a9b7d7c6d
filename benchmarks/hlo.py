"""Reads the text of a program that XLA has optimised: its loops, its collectives and XLA's estimate of cycles.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here a loop counts as often as it runs, a
number in its condition. The loop that runs as often as a call has steps is the loop over steps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter", "collective-permute"),
    "collective-broadcast",
)
TRANSFERS = ("infeed", "outfeed", "send", "recv")  # between a chip and its host
HOST_MEMORY = "S(5)"  # the mark of an array in the host's memory
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `%name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the names of the first one and of the loop body that is one step (see `parse`)."""

    text: str
    computations: dict[str, list[Instruction]]
    entry: str
    step: str


def parse(text: str, steps_per_call: int) -> Program:
    """Parses an optimised module. If a call is one step, the step is the entry itself.

    Raises: ValueError if the loop over several steps can't be told from others or its length is unknown.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups()))
    if steps_per_call == 1:
        return Program(text, computations, entry, entry)
    loops = [x for x in computations[entry] if x.opcode == "while" and trip_count(computations, x) == steps_per_call]
    if len(loops) != 1:
        raise ValueError(f"{len(loops)} loops of {steps_per_call} rounds in the program: expected 1, over steps")
    return Program(text, computations, entry, _attribute(loops[0], "body"))


def _attribute(instruction: Instruction, name: str) -> str:
    """Returns the computation that an attribute names."""
    return re.findall(rf"\b{name}=%([\w.\-]+)", instruction.rest)[0]


def trip_count(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """Returns how often a loop runs, if its condition is `counter < constant`; else None. Counters start at 0."""
    condition = computations[_attribute(loop, "condition")]
    constants = {x.name: x.rest.partition(")")[0] for x in condition if x.opcode == "constant"}
    for x in condition:
        operands = re.findall(r"%([\w.\-]+)", x.rest.partition(")")[0])
        if x.opcode == "compare" and "direction=LT" in x.rest and operands[-1] in constants:
            return int(constants[operands[-1]])
    return None


def walk(program: Program, computation: str, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Yields (instruction, how often it runs) of a computation and of the loops in it, except the loop over steps."""
    for instruction in program.computations[computation]:
        yield instruction, times
        if instruction.opcode == "while" and (body := _attribute(instruction, "body")) != program.step:
            yield from walk(program, body, times * (trip_count(program.computations, instruction) or 1))
        elif instruction.opcode == "call":
            yield from walk(program, _attribute(instruction, "to_apply"), times)


def _arrays(shape: str) -> Iterator[tuple[int, list[int], str]]:
    """Yields (bytes of an element, sizes, layout) of each array in a shape such as '(f32[2,3]{1,0:T(8,128)}, u8[])'."""
    for kind, bits, sizes, layout in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?", shape):
        yield 1 if kind == "pred" else int(bits) // 8, [int(size) for size in sizes.split(",") if size], layout


def array_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape, without padding: 'f32[2,3]{1,0}' → 24."""
    return sum(size * math.prod(sizes) for size, sizes, _ in _arrays(shape))


def padded_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape, padded to the tiles of their layouts: '…{1,0:T(8,128)}' → 4,096.

    A layout lists the axes from the one that varies fastest, then the tile of those that vary fastest, in C's order.
    """
    total = 0
    for size, sizes, layout in _arrays(shape):
        order, _, tiles = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        factors = [int(factor) for factor in tile[1].split(",")][::-1] if tile else []
        axes = [sizes[int(axis)] for axis in order.split(",") if axis]
        padded = [-(-length // factor) * factor for length, factor in zip(axes, factors, strict=False)]
        total += size * math.prod(padded + axes[len(padded) :])
    return total


def copied_per_call(program: Program) -> int:
    """Returns the bytes, with padding, that copies outside of the loop over steps read and write: once a call."""
    shapes = {x.name: x.shape for x in program.computations[program.entry]}
    copies = [x for x in program.computations[program.entry] if x.opcode == "copy"]
    operand = lambda copy: shapes[re.findall(r"%([\w.\-]+)", copy.rest)[0]]
    return sum(padded_bytes(x.shape) + padded_bytes(operand(x)) for x in copies)


def cycles(program: Program, computation: str) -> tuple[int, int]:
    """Returns (XLA's estimate of a computation's cycles, number of its fusions and custom calls without estimate)."""
    total = missing = 0
    for instruction, times in walk(program, computation):
        if found := _CYCLES.search(instruction.rest):
            total += times * int(found[1])
        elif instruction.opcode in ("fusion", "custom-call"):
            missing += times
    return total, missing


def loops(program: Program) -> list[dict[str, Any]]:
    """Returns the loops inside a step: {'operation': what JAX calls it, 'times', 'cycles': of all its rounds}."""
    found = []
    for instruction, times in walk(program, program.step):
        if instruction.opcode == "while":
            times *= trip_count(program.computations, instruction) or 1
            name = re.findall(r'op_name="([^"]*)"', instruction.rest)
            path = name[0].removesuffix("/while").rpartition("body/")[2] if name else instruction.name
            operation = path.removeprefix("closed_call/")  # the body of a loop with constant bounds
            one = cycles(program, _attribute(instruction, "body"))[0]
            found.append({"operation": operation, "times": times, "cycles": times * one})
    return found


def collectives(program: Program) -> list[dict[str, Any]]:
    """Returns the collectives: {'operation', 'per': 'step' or 'call', 'times', 'arrays', 'bytes', 'strategy'}."""
    found = []
    for computation, per in {program.entry: "call", program.step: "step"}.items():
        for instruction, times in walk(program, computation):
            operation = instruction.opcode.removesuffix("-start")
            if operation in COLLECTIVES:
                strategy = re.findall(r'"(?:strategy|emitter)":"([^"]*)"', instruction.rest)
                arrays = instruction.shape.count("[")
                found.append(
                    {
                        "operation": operation,
                        "per": per,
                        "times": times,
                        "arrays": arrays,
                        "bytes": array_bytes(instruction.shape),
                        "strategy": strategy[-1] if strategy else "",
                    }
                )
    return found


def donated(program: Program) -> int:
    """Returns the number of outputs that reuse the buffer of an argument."""
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{\}, (?:may|must)-alias\)", program.text.partition("\n")[0]))


def transfers(program: Program) -> list[str]:
    """Returns the names of the instructions that move data between a chip and its host."""
    everything = [x for lines in program.computations.values() for x in lines]
    return [x.name for x in everything if x.opcode.partition("-")[0] in TRANSFERS or HOST_MEMORY in x.shape]
