"""Accuracy over seeds: of a recipe, of its variants, and of a reference recipe in JAX and in PyTorch.

python -m benchmarks.accuracy --recipe NAME --out DIR [--seeds 0 1 2] [--runs RUNS]
python -m benchmarks.accuracy --ablation NAME --out DIR [--num-epochs N] …
python -m benchmarks.accuracy --parity lenet5 --out DIR …

Every training resumes from its folder in RUNS, so the command may be stopped and started again.

--recipe writes DIR/accuracy_NAME.json: the curves, mean and standard deviation of the last test accuracy, time to
given accuracies, images and FLOPs. --ablation trains the recipe and variants that differ in one lever each, with 5,000
training images held out, and writes their accuracies on those to DIR/ablation_NAME.json. --parity trains a reference
recipe in both frameworks, and writes DIR/parity_MODEL.json: the curves, mean and deviation by framework, and Welch's
t-test of the two means; `--frameworks` and `--seeds` may divide that work over processes before a last call with all.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from benchmarks import output_file
from benchmarks.throughput import flops_per_image
from cifar_jax.batches import scale_images
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_cpu
from cifar_jax.io import write_atomically, write_json
from cifar_jax.train import DeadTraining, Interrupted, train_and_evaluate
from cifar_jax.weights import pytorch


def train_in_pytorch(config: Config) -> dict[str, Any]:
    """The same recipe as the notebook trains it (but evaluated without dropout), from PyTorch's own initial weights.

    A checkpoint after each epoch holds all that the next one needs.
    Returns: {'metrics': by epoch {'epoch', 'train_loss', 'test_accuracy', …}}, as `train_and_evaluate` does.
    """
    torch = pytorch.import_torch()
    dataset = load_dataset(config.dataset, config.data_dir)
    scaled = lambda images: np.array(scale_images(jnp.asarray(images), config.input_scaling))
    as_tensor = lambda images: torch.from_numpy(scaled(images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(dataset.train_labels, dtype=torch.int64)
    test_labels = torch.tensor(dataset.test_labels, dtype=torch.int64)
    images, test_images = as_tensor(dataset.train_images), as_tensor(dataset.test_images)
    torch.manual_seed(config.seed)
    network = pytorch.create_model(config.model, config.dropout_rates)
    optimizer = torch.optim.SGD(network.parameters(), config.learning_rate, config.momentum)
    metrics: list[dict[str, float]] = []
    path = Path(config.workdir) / "checkpoint.pth"
    fields = dataclasses.asdict(config)
    recipe = json.dumps(
        {name: value for name, value in fields.items() if name not in (*EXECUTION_FIELDS, "num_epochs")}
    )
    if path.exists():
        try:
            saved = torch.load(path, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a cut pickle can raise anything
            raise UserError(f"{path}: damaged: remove it to train from the start, or name other --runs") from error
        if saved.get("recipe") != recipe:
            raise UserError(f"{path} is of another recipe or version: remove it, or name other --runs")
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        metrics = saved["metrics"]
    path.parent.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(metrics) + 1, config.num_epochs + 1):
        start, total = time.perf_counter(), 0.0
        network.train()
        for batch in torch.randperm(len(labels)).split(config.batch_size):
            loss = torch.nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            logits = torch.cat([network.eval()(part) for part in test_images.split(500)])
        accuracy = (logits.argmax(-1) == test_labels).double().mean().item()
        metrics.append(
            {
                "epoch": epoch,
                "train_loss": total / len(labels),
                "test_loss": torch.nn.functional.cross_entropy(logits, test_labels).item(),
                "test_accuracy": accuracy,
                "seconds": round(seconds, 3),
            }
        )
        print(f"pytorch seed {config.seed} epoch {epoch:2} test accuracy {accuracy:.2%} {seconds:.0f} s", flush=True)
        checkpoint = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "metrics": metrics,
            "recipe": recipe,
        }
        buffer = io.BytesIO()
        torch.save(checkpoint | {"rng": torch.get_rng_state()}, buffer)
        write_atomically(path, buffer.getvalue())
    return {"metrics": metrics[: config.num_epochs]}  # an earlier call may have asked for more


def train_in_jax(config: Config) -> dict[str, Any]:
    """train_and_evaluate, but a diverged training is a UserError: a mean of the seeds that are left would be too good.

    One that is stuck at the loss of guessing goes on, with a warning, and counts in the mean.
    """
    try:
        return train_and_evaluate(config)
    except DeadTraining as dead:
        raise UserError(f"seed {config.seed}: {dead.what}: change the recipe") from dead


TRAINERS = {"jax": train_in_jax, "pytorch": train_in_pytorch}


def compare(accuracies: dict[str, list[float]]) -> dict[str, Any]:
    """Last test accuracies by framework → mean, standard deviation (n - 1) and Welch's t-test of the two means.

    The test's results are None where no seed differs from another.
    """
    results: dict[str, Any] = {name: spread(values) for name, values in accuracies.items()}
    statistics: dict[str, Any] = {"confidence_interval_95": None, "p_value": None}
    if any(len(set(values)) > 1 for values in accuracies.values()):
        test = scipy.stats.ttest_ind(accuracies["jax"], accuracies["pytorch"], equal_var=False)
        interval = [float(bound) for bound in test.confidence_interval(0.95)]
        statistics = {"confidence_interval_95": interval, "p_value": float(test.pvalue)}
    difference = results["jax"]["mean"] - results["pytorch"]["mean"]
    return results | {"difference": difference} | statistics


MILESTONES = (0.70, 0.74, 0.80, 0.86, 0.90, 0.94)  # test accuracies to reach
HOLDOUT = 5000

# Changes that take one lever of a recipe away or add one.
ABLATIONS_OF_BOTH: dict[str, dict[str, Any]] = {
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
}
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "lenet5": {
        **ABLATIONS_OF_BOTH,
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
        **ABLATIONS_OF_BOTH,
        "no mirror symmetry": {"mirror_symmetry": False},
        "cutout": {"cutout_size": 8},
        "light dropout": {"dropout_rates": (0.0, 0.05, 0.1)},
        "32 pixels throughout": {"image_sizes": ()},
        "SGD": SGD | {"swa_learning_rate": 0.02, "weight_decay": 5e-4},
    },
}


def time_to(metrics: list[dict[str, float]], accuracy: float) -> float | None:
    """Seconds of training until the test accuracy was first reached, without compilation and evaluation; else None."""
    for number, row in enumerate(metrics, 1):
        if row["test_accuracy"] >= accuracy:
            return round(sum(earlier["seconds"] for earlier in metrics[:number]), 1)
    return None


def training_cost(config: Config, num_images: int) -> dict[str, float]:
    """Images seen, and FLOPs of forward and backward (see throughput.layer_flops), of a whole training."""
    sizes = collections.Counter(config.image_size(epoch) for epoch in range(config.num_epochs))
    flops = sum(epochs * flops_per_image(config.model, size)["training"] for size, epochs in sizes.items())
    return {"images": config.num_epochs * num_images, "flops": flops * num_images}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1; None for one value) and number of accuracies."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Accuracy over seeds: name a --recipe, an --ablation or a --parity."""

    out: Path
    """Folder for the JSON."""
    name: str | None = None
    """Name of the JSON file, without .json; None: accuracy_, ablation_ or parity_ and what was named, and --dtype."""
    recipe: str | None = None
    """Train this recipe with every seed."""
    ablation: str | None = None
    """Train this recipe and its variants with 5,000 training images held out."""
    parity: Literal["lenet5"] | None = None
    """Train this model's reference recipe in JAX and in PyTorch, and compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every training."""
    frameworks: tuple[Literal["jax", "pytorch"], ...] = ("jax", "pytorch")
    """Of --parity. With one of them nothing is compared and no JSON written: to divide the work."""
    runs: Path = Path("runs")
    """Where the trainings are kept, and resumed from."""
    num_epochs: int | None = None
    """None: the recipe's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation; None: the recipe's. Another one needs other --runs."""
    dataset: Literal["cifar10", "digits"] | None = None
    """The data; None: the recipe's."""
    data_dir: str | None = None
    """Where to look for CIFAR-10 first."""


def configure(arguments: Arguments, recipe: str, workdir: str, seed: int, **changes: Any) -> Config:
    """A recipe for one training of this command. Raises UserError for an unknown one."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    num_epochs = RECIPES[recipe].num_epochs if arguments.num_epochs is None else arguments.num_epochs
    share = num_epochs / RECIPES[recipe].num_epochs  # a shorter training has fewer epochs of each image size, too
    rounded = [(size, round(share * epochs)) for size, epochs in RECIPES[recipe].image_sizes]
    sizes = tuple((size, epochs) for size, epochs in rounded if epochs)
    return dataclasses.replace(
        RECIPES[recipe],
        workdir=str(arguments.runs / workdir),
        seed=seed,
        num_epochs=num_epochs,
        dtype=arguments.dtype or RECIPES[recipe].dtype,
        dataset=arguments.dataset or RECIPES[recipe].dataset,
        data_dir=arguments.data_dir,
        **{"image_sizes": sizes} | changes,
    )


def origin(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the trainings, which other processes may have made: their 'hardware', 'versions' and 'date'."""
    versions = {
        name: {summary["versions"].get(name, "none") for summary in summaries} for name in summaries[0]["versions"]
    }
    return {
        "hardware": "; ".join(sorted({summary["hardware"] for summary in summaries})),
        "versions": {name: " and ".join(sorted(values)) for name, values in versions.items()},
        "date": " and ".join(sorted({summary["date"] for summary in summaries})),
    }


def run_recipe(arguments: Arguments, recipe: str) -> dict[str, Any]:
    """The content of accuracy_RECIPE.json."""
    configs = [configure(arguments, recipe, f"accuracy_{recipe}/seed{seed}", seed) for seed in arguments.seeds]
    summaries = [train_in_jax(config) for config in configs]
    runs = [summary["metrics"] for summary in summaries]
    times = {accuracy: [time_to(run, accuracy) for run in runs] for accuracy in MILESTONES}
    return {
        "recipe": recipe,
        "dataset": configs[0].dataset,
        "config": summaries[0]["config"] | {"seed": None},
        "seeds": list(arguments.seeds),
        **origin(summaries),
        "test_accuracy": spread([run[-1]["test_accuracy"] for run in runs]),
        "train_accuracy": spread([run[-1]["train_accuracy"] for run in runs]),
        "training_seconds": [summary["training_seconds"] for summary in summaries],
        "seconds_to": {f"{accuracy:.2f}": seconds for accuracy, seconds in times.items()},
        "cost": training_cost(configs[0], len(load_dataset(configs[0].dataset, arguments.data_dir).train_labels)),
        "test_accuracy_by_epoch": [[row["test_accuracy"] for row in run] for run in runs],
        "test_loss_by_epoch": [[row["test_loss"] for row in run] for run in runs],
    }


def run_ablation(arguments: Arguments, recipe: str) -> dict[str, Any]:
    """The content of ablation_RECIPE.json. A variant that diverges has null for its accuracies."""
    if recipe not in ABLATIONS:
        raise UserError(f"--ablation {recipe}: choose one of {', '.join(ABLATIONS)}")
    if arguments.dataset == "digits":
        raise UserError(f"--dataset digits: has too few images to hold {HOLDOUT:,} out, as --ablation does")
    variants, all_runs = {}, []
    for name, changes in ABLATIONS[recipe].items():
        runs = []
        for seed in arguments.seeds:
            workdir = f"ablation_{recipe}/{name.replace(' ', '_')}/seed{seed}"
            config = configure(arguments, recipe, workdir, seed, holdout=HOLDOUT, **changes)
            try:
                runs.append(train_and_evaluate(config))
            except DeadTraining as dead:
                print(f"{name}: {dead.what}", flush=True)
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


def run_parity(arguments: Arguments, model: str) -> dict[str, Any] | None:
    """The content of parity_MODEL.json; None if one framework alone was asked for."""
    if arguments.dtype == "bfloat16":
        raise UserError("--dtype bfloat16: --parity compares in the notebook's float32")
    if len(set(arguments.frameworks)) < max(1, len(arguments.frameworks)):
        raise UserError(f"--frameworks {' '.join(arguments.frameworks)}: name one or more, each once")
    compared = set(arguments.frameworks) == set(TRAINERS)
    if compared and len(set(arguments.seeds)) < 2:
        raise UserError("--seeds: a comparison needs two or more")
    if "pytorch" in arguments.frameworks:
        pytorch.import_torch()  # now, not after JAX's first training
    recipe = f"{model}_reference"
    all_runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.frameworks}
    for seed in arguments.seeds:
        for name in arguments.frameworks:
            config = configure(arguments, recipe, f"parity_{model}/{name}_seed{seed}", seed)
            all_runs[name].append(TRAINERS[name](config))
    if not compared:
        return None
    curves = {
        name: [[row["test_accuracy"] for row in run["metrics"]] for run in runs] for name, runs in all_runs.items()
    }
    trained = origin(all_runs["jax"])  # PyTorch's runs do not say theirs
    trained["versions"]["torch"] = importlib.metadata.version("torch")
    result = compare({name: [run[-1] for run in runs] for name, runs in curves.items()})
    p = "none, as no seed differs" if result["p_value"] is None else f"{result['p_value']:.2f}"
    print(f"difference {result['difference']:+.2%}, p = {p}")
    return {
        "recipe": recipe,
        "dataset": config.dataset,
        "num_epochs": config.num_epochs,
        **trained,
        "seeds": list(arguments.seeds),
        "test_accuracy_by_epoch": curves,
        "last_epoch": result,
    }


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.accuracy")
    prepare_cpu()
    modes = {"recipe": run_recipe, "ablation": run_ablation, "parity": run_parity}
    asked = [mode for mode in modes if getattr(arguments, mode) is not None]
    if len(asked) != 1:
        raise UserError("name one of --recipe, --ablation and --parity")
    if len(set(arguments.seeds)) < max(1, len(arguments.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, arguments.seeds))}: name one or more, each once")
    mode, name = asked[0], getattr(arguments, asked[0])
    if mode != "parity" and arguments.frameworks != tuple(TRAINERS):
        raise UserError(f"--frameworks goes with --parity: --{mode} trains in JAX alone")
    kind = {"recipe": "accuracy"}.get(mode, mode)
    try:
        for seed in arguments.seeds:  # now, not after hours of training
            configure(arguments, f"{name}_reference" if mode == "parity" else name, "", seed)
        dtype = f"_{arguments.dtype}" if arguments.dtype else ""
        file = output_file(arguments.out, arguments.name or f"{kind}_{name}{dtype}")
        content = modes[mode](arguments, name)
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on from there", file=sys.stderr)
        return interrupted.exit_status
    except UserError as error:
        own_flags = str(error).replace("--workdir", "--runs").replace("--seed ", "--seeds ")
        raise UserError(own_flags) from error
    if content is None:
        return 0
    write_json(file, {"command": describe_command("-m benchmarks.accuracy", sys.argv[1:])} | content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
