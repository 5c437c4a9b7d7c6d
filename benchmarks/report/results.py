"""Loads result files, holds the originals' results, and formats numbers and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the repository

# The notebook's log: test accuracy in percent by epoch.
NOTEBOOK_LOG = (39.51, 48.87, 52.37, 56.81, 60.08, 60.89, 62.53, 66.1, 67.48, 67.8, 68.2, 69.47, 70.12, 70.54, 70.2)
NOTEBOOK_LABEL = "the notebook's log (dropout on)"
KERAS_CURVE = {1: 31, 2: 46, 15: 80, 55: 88, 200: 89.9}  # read off the original's plotted curve, in percent
KERAS_LABEL = "the original's curve"
ORIGINALS = {"lenet5": "70.20 with dropout on (74 claimed)", "all_cnn": "89.9"}  # the last epoch's
NETWORKS = {"all_cnn": "All-CNN", "lenet5": "LeNet-5"}
FRAMEWORKS = {"jax": "cifar_jax", "pytorch": "PyTorch"}


@dataclasses.dataclass(frozen=True)
class Results:
    """A folder of result files NAME.json."""

    folder: Path

    def load(self, name: str) -> dict[str, Any]:
        """Loads a result. Raises: UserError if it can't be read or was not measured on CIFAR-10."""
        path = self.folder / f"{name}.json"
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}: measure again, or restore it from the repository") from error
        if name not in ("quickstart", "processes") and setting(result, "dataset") not in (None, "cifar10"):
            raise UserError(f"{path}: measured on {setting(result, 'dataset')}: measure again on CIFAR-10")
        return result

    def names(self, prefix: str) -> list[str]:
        """Returns the sorted names that begin with a prefix."""
        return sorted(path.stem for path in self.folder.glob(f"{prefix}*.json"))

    def all(self, prefix: str) -> list[dict[str, Any]]:
        """Loads the results whose names begin with a prefix."""
        return [self.load(name) for name in self.names(prefix)]


MEASURED = Results(ROOT / "benchmarks" / "results")


@contextlib.contextmanager
def whole_results(name: str) -> Iterator[None]:
    """Context that turns errors from incomplete results into a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        raise UserError(f"the results for {name} are incomplete ({error!r}): measure again") from error


def setting(result: dict[str, Any], field: str) -> Any:
    """Returns a field of a result or, failing that, of its config; None if neither has it."""
    return result.get(field) or result.get("config", {}).get(field)


def recipe_and_type(result: dict[str, Any]) -> str:
    return f"`{result['recipe']}`" + (", bfloat16" if setting(result, "dtype") == "bfloat16" else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hardware(result: dict[str, Any]) -> str:
    """Formats the hardware of a measurement. JAX divides a CPU into as many devices as it is told to."""
    devices = lambda match: f"{match[1]} JAX device{'s' if match[1] != '1' else ''}"
    return re.sub(r"(\d+) × cpu", devices, result["hardware"])


def environment(result: dict[str, Any]) -> str:
    """Formats hardware, versions, date and note of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "cifar_jax")
    note = f" {result['note']}" if "note" in result else ""
    return f"{hardware(result)}; {versions}; {result['date']}.{note}"


def measured_by(result: dict[str, Any]) -> str:
    """Formats the command and the environment of a measurement."""
    return f"`{result['command']}`: {environment(result)}"


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def three_digits(value: float) -> str:
    """Formats a number with three significant digits, or all digits before the point if there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mean_and_deviation(spread: dict[str, Any]) -> str:
    """Formats an accuracy over seeds in percent, with its standard deviation if there are several seeds."""
    return percent(spread["mean"]) + (f" ± {percent(spread['std'])}" if spread["std"] is not None else "")
