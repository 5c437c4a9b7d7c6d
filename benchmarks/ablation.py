"""Ablations for benchmarks.accuracy: a recipe, and variants that differ from it in one setting each."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.seeds import Arguments, Stop, configure, origin, spread
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.outcomes import FailedTraining
from cifar_jax.train import train_and_evaluate

HOLDOUT = 5000

SGD = {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9}
# All that all_cnn_fast changes because its network is normalised.
PLAIN = {
    **{"normalization": "none", "normalization_scale": "learnt", "normalize_kernels": False, "initializer": "he"},
    **{"learning_rate": 0.01, "adam_learning_rate": None, "momentum": 0.95, "weight_decay": 0.1},
}
# Variants by recipe: changes that remove, add or replace one setting.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "lenet5": {
        "the recipe": {},
        "no flip": {"alternating_flip": False},
        "random flip": {"alternating_flip": False, "random_flip": True},
        "no crop": {"crop_padding": 0},
        "cutmix": {"cutmix_alpha": 1.0},
        "no weight decay": {"weight_decay": 0.0},
        "no label smoothing": {"label_smoothing": 0.0},
        "no average of weights, no cycles": {"ema_decay": 0.0, "swa_fraction": 0.0},
        "no averaged cycles": {"swa_fraction": 0.0},
        "the original's initial weights": {"initializer": "original"},
        "LSUV": {"initializer": "lsuv"},
        "TrivialAugment": {"trivial_augment": True},
        "SAM": {"sam_rho": 0.05},
        "cosine": {"schedule": "cosine"},
        "mirror symmetry": {"mirror_symmetry": True},
        "smaller crop": {"crop_padding": 2},
        "no cutout": {"cutout_size": 0},
        "mixup": {"mixup_alpha": 0.2},
        "the original's dropout": {"dropout_rates": (0.2, 0.2)},
        "gradient clipping": {"gradient_clip": 2.0},
        "no warm-up": {"warmup_fraction": 0.0},
        "SGD": SGD | {"swa_learning_rate": 0.025, "weight_decay": 1e-3},
        "batch 512, rates doubled": {"batch_size": 512, "learning_rate": 0.024, "swa_learning_rate": 0.012},
    },
    "all_cnn_fast": {
        "the recipe": {},
        "no normalization, the rates of all_cnn": PLAIN,
        "no mirror symmetry": {"mirror_symmetry": False},
        "he_normal initial weights": {"initializer": "he"},
        "learnt scales": {"normalization_scale": "learnt"},
        "random flip": {"alternating_flip": False, "random_flip": True},
        "no label smoothing": {"label_smoothing": 0.0},
        "no average of weights": {"ema_decay": 0.0},
        "SGD": SGD | {"adam_learning_rate": None, "normalize_kernels": False, "weight_decay": 5e-4},
    },
}


def run_ablation(arguments: Arguments, recipe: str, stop: Stop) -> dict[str, Any]:
    """Returns the content of ablation_RECIPE.json. The accuracies of a variant that diverges are None.

    Raises: UserError if the recipe has no entry or the dataset is too small; Interrupted.
    """
    if recipe not in ABLATIONS:
        raise UserError(f"--ablation {recipe}: choose one of {', '.join(ABLATIONS)}")
    config = configure(arguments, recipe, "", arguments.seeds[0])
    dataset = load_dataset(config.dataset, arguments.data_dir)
    if len(dataset.train_labels) <= HOLDOUT:
        raise UserError(f"--dataset {config.dataset}: --ablation needs more than {HOLDOUT:,} training images")
    variants, all_runs = {}, []
    for name, changes in ABLATIONS[recipe].items():
        runs = []
        for seed in arguments.seeds:
            workdir = f"ablation_{recipe}/{name.replace(' ', '_')}/seed{seed}"
            variant = configure(arguments, recipe, workdir, seed, holdout=HOLDOUT, **changes)
            try:
                runs.append(train_and_evaluate(variant, dataset, stop))
            except FailedTraining as failed:
                print(f"{name}: {failed.what}", flush=True)
                break
        all_runs += runs
        diverged = len(runs) < len(arguments.seeds)
        accuracies = {
            part: None if diverged else spread([run[f"{part}_accuracy"] for run in runs]) for part in ("test", "train")
        }
        variants[name] = {
            "changes": changes,
            "holdout_accuracy": accuracies["test"],
            "train_accuracy": accuracies["train"],
        }
        if accuracies["test"] is not None:
            print(f"{name:32} {accuracies['test']['mean']:.2%}", flush=True)
    return {
        "recipe": recipe,
        "dataset": config.dataset,
        **(origin(all_runs) if all_runs else describe_environment(jax.local_devices())),
        "holdout": HOLDOUT,
        "dtype": config.dtype,
        "num_epochs": config.num_epochs,
        "seeds": list(arguments.seeds),
        "variants": variants,
    }
