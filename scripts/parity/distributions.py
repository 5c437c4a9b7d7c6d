"""Checks of random draws: whether two samples have the same distribution, and initial tensors."""

from __future__ import annotations

import numpy as np

from cifar_jax.weights.params import layers_from_params
from parity.check import Check
from parity.ours import initial_params
from parity.reference import Reference, not_installed, torch

try:
    import scipy.stats
except ImportError as error:
    not_installed(error)


def distribution_checks(name: str, ours: np.ndarray, theirs: np.ndarray) -> list[Check]:
    """Compares two samples of n values each: Kolmogorov–Smirnov distance, ratio of deviations, tails."""
    if not ours.any() and not theirs.any():
        return [Check(f"{name}, zero in both", 0.0, 0.0, "exact")]
    n = len(ours)
    distance = float(scipy.stats.ks_2samp(ours, theirs).statistic)
    critical = float(np.sqrt(-np.log(1e-5 / 2) / n))
    ratio = abs(ours.std() / theirs.std() - 1)
    checks = [
        Check(f"{name}, Kolmogorov–Smirnov of {n:,}", distance, critical, "chance exceeds it once in 1e5"),
        Check(f"{name}, ratio of deviations - 1", ratio, 5 / np.sqrt(n), "five deviations of a normal sample's"),
    ]
    if scipy.stats.kurtosis(theirs) < -0.6:  # uniform: the largest value gives the bound to about 1/n
        error = abs(np.abs(ours).max() / np.abs(theirs).max() - 1)
        checks.append(Check(f"{name}, ratio of bounds - 1", error, 15 / n, "the largest of n uniform draws"))
    else:  # normal: if it were truncated at two deviations, nothing would lie beyond
        share = abs((np.abs(ours) > 2 * ours.std()).mean() - (np.abs(theirs) > 2 * theirs.std()).mean())
        checks.append(Check(f"{name}, share beyond 2σ, difference", share, 1.5 / np.sqrt(n), "five deviations"))
    return checks


def check_initial(reference: type[Reference], model: str, seeds: int) -> list[Check]:
    """Compares the distribution of every initial tensor, with the values of all seeds pooled."""
    ours, theirs = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        ours.append(layers_from_params(initial_params(model, seed))[0])
        theirs.append(layers_from_params(reference(model).params())[0])
    pool = lambda networks, layer, part: np.concatenate([network[layer][part].ravel() for network in networks])
    checks = []
    for layer in range(len(ours[0])):
        for part, kind in enumerate(("kernel", "bias")):
            name = f"{model}: initial {kind} {layer + 1}"
            checks += distribution_checks(name, pool(ours, layer, part), pool(theirs, layer, part))
    return checks
