"""Tables of runs in several processes, and of killed processes."""

from __future__ import annotations

from benchmarks.report.results import Results, measured_by, percent, table


def processes(results: Results) -> str:
    """One row per layout of processes and devices."""
    result = results.load("processes")
    header = ["processes", "devices of each", "last train loss", "test accuracy, %", "largest difference"]
    rows = [
        [
            str(run["processes"]),
            str(run["devices_each"]),
            f"{run['train_loss'][-1]:.6f}",
            percent(run["test_accuracy"][-1]),
            f"{run['largest_difference']:.1e}",
        ]
        for run in result["runs"]
    ]
    epochs = len(result["runs"][0]["train_loss"])
    return (
        f"{table(header, rows)}\n\nAfter {epochs} epochs, seed {result['seed']}. Largest difference: of all parameters "
        f"and the optimizer's state from the run in one process, relative to each array's largest value. "
        f"{measured_by(result)}"
    )


def kills(results: Results) -> str:
    """One row per process that is killed, and how the other one ended."""
    kills = results.load("processes")["kills"]
    rows = []
    for number in (0, 1):
        of_it = [kill for kill in kills if kill["killed"] == number]
        seconds = [kill["seconds_to_the_others_end"] for kill in of_it]
        one_line = sum(len(kill["lines"]) == 1 for kill in of_it)
        resumed = sum(bool(kill["resumed"]) for kill in of_it)
        rows.append([f"process {number}", *map(str, (len(of_it), one_line)), f"{max(seconds):.1f}", str(resumed)])
    accuracies = sorted({percent(kill["test_accuracy"]) for kill in kills})
    header = ["killed", "times", "the other printed one line", "and ended after at most, s", "resumed"]
    return f"{table(header, rows)}\n\nTest accuracy after each resumed run's last epoch: {', '.join(accuracies)} %."
