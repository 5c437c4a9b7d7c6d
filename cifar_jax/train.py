"""Trains a recipe: python -m cifar_jax.train [RECIPE] [--workdir …] [--num-epochs …] …"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from cifar_jax.batches import epoch_order
from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import DESCRIPTIONS, RECIPES
from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.datasets import Dataset, hold_out, load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.evaluate import Evaluator, read_config
from cifar_jax.host import prepare_cpu
from cifar_jax.io import write_json
from cifar_jax.metrics import EpochMetrics, MetricsWriter
from cifar_jax.optimizer import create_schedule, swa_steps
from cifar_jax.parallel import default_steps_per_call, replicate, select_devices
from cifar_jax.train_step import create_history, create_train_state, create_train_steps

DEFAULT_RECIPE = "lenet5"
MAX_RESTARTS = 3
DEAD_STEPS = 500


class Interrupted(Exception):
    """The run was stopped by a signal, after its state was saved."""

    def __init__(self, signum: int, progress: Progress, steps_per_epoch: int) -> None:
        where = f"saved after {progress.epoch} epochs and {progress.step}/{steps_per_epoch} steps"
        super().__init__(where if progress != Progress() else "stopped before the first step, so nothing was saved")
        self.exit_status = 128 + signum


class DeadTraining(UserError):
    """The run diverged, or learns nothing."""

    def __init__(self, what: str, config: Config) -> None:
        self.what = what
        restart = "" if config.auto_restart else ", or use --auto-restart"
        super().__init__(f"{what}: name another --workdir, and a lower --learning-rate or another --seed{restart}")


class StopSignals:
    """While entered, Ctrl-C and SIGTERM only set `received`; a second one interrupts at once."""

    received: int | None = None

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.received is not None:
            if number == signal.SIGTERM:
                sys.exit(128 + number)
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step, to save; once more to stop at once", file=sys.stderr)

    def __call__(self) -> bool:
        return self.received is not None


def train_and_evaluate(config: Config) -> dict[str, Any]:
    """Trains a recipe to its last epoch, resuming what lies in its workdir, and returns the summary it wrote there.

    With config.auto_restart a dead training is left as it is and started again in WORKDIR/restart1, 2 and 3.

    Raises: UserError for what the user can mend, Interrupted after Ctrl-C or SIGTERM.
    """
    devices = select_devices(config)
    config = dataclasses.replace(config, num_devices=len(devices))
    if (Path(config.workdir) / "restart1").exists() and not config.auto_restart:
        raise UserError(f"{config.workdir}: its training was dead and was started again: go on with --auto-restart")
    attempts = [config, *(_restarted(config, number) for number in range(1, MAX_RESTARTS + 1))]
    for attempt, following in zip(attempts, [*attempts[1:], None]):
        if config.auto_restart and following is not None and Path(following.workdir).exists():
            continue  # it was found dead before
        try:
            with _claim_workdir(Path(attempt.workdir), attempt):
                return _train_and_evaluate(attempt, devices)
        except DeadTraining as error:
            if not config.auto_restart or following is None:
                raise
            rate, folder = following.learning_rate, following.workdir
            print(f"{error.what}\nstarting again in {folder}: rate {rate:g}, seed {following.seed}", file=sys.stderr)
    raise AssertionError("the last attempt returns or raises")


def _restarted(config: Config, number: int) -> Config:
    return dataclasses.replace(
        config,
        workdir=str(Path(config.workdir) / f"restart{number}"),
        learning_rate=config.learning_rate / 2**number,
        swa_learning_rate=config.swa_learning_rate / 2**number,
        seed=(config.seed + number) % 2**32,
    )


def is_dead(batch_loss: np.ndarray, num_classes: int) -> bool:
    """Whether the loss was flat at that of guessing, ln(num_classes), for the last DEAD_STEPS steps.

    Args: batch_loss float32 [steps] in nats, of a whole run.
    """
    if len(batch_loss) < DEAD_STEPS:
        return False
    excess = batch_loss[-DEAD_STEPS:].reshape(5, -1).mean(axis=1) - math.log(num_classes)
    return bool(np.all((excess > -0.005) & (excess < 0.1)))  # in each part: a loss that falls through it is not flat


def _train_and_evaluate(config: Config, devices: list[jax.Device]) -> dict[str, Any]:
    workdir = Path(config.workdir)
    dataset = hold_out(load_dataset(config.dataset, config.data_dir), config.holdout)
    num_images = len(dataset.train_labels)
    if config.image_size(config.num_epochs - 1) != 32:
        print("warning: --image-sizes leaves no epoch to images of 32 pixels, which are tested on", file=sys.stderr)
    if config.batch_size > num_images:
        raise UserError(f"--batch-size {config.batch_size}: there are only {num_images} training images")
    steps_per_epoch = -(-num_images // config.batch_size)
    if config.num_epochs * steps_per_epoch >= 2**31:
        raise UserError(f"--num-epochs {config.num_epochs}: steps are counted up to {2**31 - 1:,}")
    if config.swa_fraction and swa_steps(config, steps_per_epoch)[1] == 0:
        print(f"warning: --swa-fraction leaves no step to each of {config.swa_cycles} cycles: none", file=sys.stderr)
    if config.mixes and config.batch_size // len(devices) < 2:
        raise UserError("images are mixed with others on their device: use a larger --batch-size, or --num-devices 1")
    steps_per_call = min(config.steps_per_call or default_steps_per_call(config.model, devices), steps_per_epoch)

    state = replicate(create_train_state(config, steps_per_epoch, dataset.train_images[:256]), devices)
    tested = "held-out" if config.holdout else "test"
    new_history = lambda: replicate(create_history(steps_per_epoch), devices)
    history, progress = new_history(), Progress()
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_run(state, history)
    if restored is not None:
        state, history, progress = restored
    writer = MetricsWriter(workdir, progress.epoch, config.num_epochs, steps_per_epoch)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
        f"{config.model}, {num_parameters:,} parameters, {config.dtype}, on {len(devices)} × {devices[0].device_kind}; "
        f"{num_images:,} images from {dataset.source}; run in {workdir}"
        + (f"; tests on {config.holdout:,} held-out training images" if config.holdout else "")
    )
    dead = lambda epoch: DeadTraining(f"training is dead in epoch {epoch} (loss flat at that of guessing)", config)
    if config.auto_restart and is_dead(writer.batch_loss, len(dataset.class_names)):
        raise dead(progress.epoch)  # it went on, as it was begun without --auto-restart
    if progress.epoch >= config.num_epochs or restored is None:  # its checkpoints deleted, to save space
        # Missing, damaged, or of an interruption with the last epochs' end cut off: written anew below.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            summary = json.loads((workdir / "summary.json").read_text())
            fields = json.loads(json.dumps(dataclasses.asdict(config)))
            same = all(fields[name] == value for name, value in summary["config"].items())
            if same and summary["epochs"] == config.num_epochs:
                print(f"already complete after {config.num_epochs} epochs; for another run name another --workdir")
                if restored is None:
                    print(f"its checkpoints are gone: to train it again, remove {workdir / 'summary.json'}")
                return summary
        if (workdir / "metrics.csv").exists() and restored is None:
            print(f"no checkpoint in {checkpoints.directory}: training from the start", file=sys.stderr)
    _check_same_data(workdir, dataset, resumes=restored is not None)
    if restored is not None:
        print(f"resuming after {progress.epoch} epochs and {progress.step}/{steps_per_epoch} steps")
        began = read_config(workdir).num_devices
        if began != config.num_devices and (config.mixes or any(config.dropout_rates)):
            print(
                f"going on with {config.num_devices} devices where {began} began: from here on dropout and mixing, "
                "drawn by device, are not those of an uninterrupted run",
                file=sys.stderr,
            )
    write_json(workdir / "config.json", dataclasses.asdict(config))

    with StopSignals() as stop:
        data = replicate((dataset.train_images, dataset.train_labels), devices)
        schedule = create_schedule(config, steps_per_epoch)
        order = replicate(epoch_order(config.seed, progress.epoch, num_images), devices)
        train_steps = {
            size: create_train_steps(config, devices, steps_per_call, size)(
                state, history, *data, order, np.int32(0), np.int32(0)
            )
            for size in {config.image_size(epoch) for epoch in range(progress.epoch, config.num_epochs)}
        }
        evaluator = Evaluator(config, state, dataset.test_images, dataset.test_labels, devices)

        while progress.epoch < config.num_epochs and not stop():
            epoch, step, earlier_seconds = progress
            run = train_steps[config.image_size(epoch)]
            order = replicate(epoch_order(config.seed, epoch, num_images), devices)
            pending: collections.deque[jax.Array] = collections.deque()
            started = time.perf_counter()
            with writer.progress_bar(epoch, step) as bar:
                while step < steps_per_epoch and not stop():
                    count = min(steps_per_call, steps_per_epoch - step)
                    state, history, loss = run(state, history, *data, order, np.int32(step), np.int32(count))
                    step += count
                    pending.append(loss)
                    if len(pending) > 2:  # run ahead of the device by two calls, not by 32: a signal must be heard
                        done = pending.popleft().block_until_ready()
                        if not bar.disable:
                            bar.set_postfix(loss=f"{float(done):.4f}", refresh=False)
                    bar.update(count)
            jax.block_until_ready(state)
            progress = Progress(epoch, step, earlier_seconds + time.perf_counter() - started)
            test = evaluator(state, stop) if step == steps_per_epoch else None
            if test is None:  # stopped within the epoch
                checkpoints.save(state, history, progress, None)
                break

            losses, correct, counts = (np.asarray(history[name]) for name in ("loss", "correct", "count"))
            row = EpochMetrics(
                epoch=epoch + 1,
                train_loss=float((losses.astype(np.float64) * counts).sum() / num_images),
                train_accuracy=float(correct.sum() / num_images),
                test_loss=test["loss"],
                test_accuracy=test["accuracy"],
                learning_rate=float(schedule((epoch + 1) * steps_per_epoch - 1)),
                seconds=round(progress.seconds, 3),
                images_per_second=round(num_images / progress.seconds, 1),
            )
            if not math.isfinite(row.train_loss + row.test_loss):
                losses_are = f"loss {row.train_loss}, of the test {row.test_loss}"
                raise DeadTraining(f"training diverged in epoch {row.epoch} ({losses_are})", config)
            if is_dead(np.concatenate([writer.batch_loss, losses]), len(dataset.class_names)):
                if config.auto_restart:
                    raise dead(row.epoch)
                tqdm.write(f"warning: {dead(row.epoch)}", file=sys.stderr)
            writer.write(row, losses)
            history, progress = new_history(), Progress(epoch + 1)
            checkpoints.save(state, history, progress, row.test_accuracy)
            writer.print(row, tested)

        summary = _summarize(config, writer.rows, num_parameters, devices)
        if writer.rows:
            from cifar_jax.plots import plot_run  # here: importing matplotlib takes a second

            plot_run(workdir)
            write_json(workdir / "summary.json", summary)  # last: it says that all is there
        if stop.received is not None and progress.epoch < config.num_epochs:
            raise Interrupted(stop.received, progress, steps_per_epoch)
    print(
        f"{tested} accuracy {summary['test_accuracy']:.2%} after {progress.epoch} epochs, "
        f"{summary['training_seconds']:.0f} s of training; figures and summary.json in {workdir}"
    )
    return summary


@contextlib.contextmanager
def _claim_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Holds the folder for this process, made if need be; one that stays empty is removed again.

    Raises UserError if it holds a run with another config, or another process holds it, or it can't be made.
    """
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error.strerror}: name a folder that can be written") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--workdir {workdir}: another training is at work there: name another") from error
        _check_same_config(workdir, config)
        yield
    finally:
        if made and [path.name for path in workdir.iterdir()] == [".lock"]:
            (workdir / ".lock").unlink()
            workdir.rmdir()
        lock.close()


def _check_same_config(workdir: Path, config: Config) -> None:
    has_checkpoints = any((workdir / "checkpoints").glob("[0-9]*"))
    names = ("metrics.csv", "batch_loss.npy", "summary.json", "accuracy.png", "loss.png", "batch_loss.png")
    results = [workdir / name for name in names if (workdir / name).exists()]
    if not (workdir / "config.json").exists():
        if has_checkpoints:
            raise UserError(f"{workdir}: has checkpoints but no config.json: put it back, or name another --workdir")
        for path in (*results, workdir / "dataset.json"):
            if path.exists():
                reason = "there is no config.json beside it, so not a run's"
                raise UserError(f"{path}: {reason}: move it away, or name another --workdir")
        return
    saved = read_config(workdir)
    in_restarts = workdir.name.startswith("restart") or (workdir / "restart1").exists()
    if not has_checkpoints and not results and not in_restarts:
        return  # nothing is kept of it: it was out of memory in its first epoch, say, so that its batch must change
    old, new = dataclasses.asdict(saved), dataclasses.asdict(config)
    fields = [name for name in old if name not in EXECUTION_FIELDS and old[name] != new[name]]
    if fields:
        changes = ", ".join(f"{name} {old[name]} → {new[name]}" for name in fields)
        raise UserError(f"{workdir} holds a run with another config ({changes}): name another --workdir")


def _check_same_data(workdir: Path, dataset: Dataset, resumes: bool) -> None:
    """Raises UserError if a run began with training images of other labels, or of the same in another order.

    Epochs, flips and held-out images go by place, and copies of CIFAR-10 differ in their order.
    """
    path = workdir / "dataset.json"
    checksum = hashlib.sha256(dataset.train_labels.tobytes()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of an earlier version, or damaged
        saved = json.loads(path.read_text())
        if resumes and saved["train_labels_sha256"] != checksum:
            raise UserError(
                f"{workdir}: began with {saved['source']}, and {dataset.source} has other labels or another order: "
                "name the former with --data-dir, or another --workdir"
            )
    write_json(path, {"source": dataset.source, "train_labels_sha256": checksum})


def _summarize(
    config: Config, rows: list[EpochMetrics], num_parameters: int, devices: list[jax.Device]
) -> dict[str, Any]:
    """What summary.json holds: the last epoch's results, the config, every epoch, hardware, versions, date."""
    fields = dataclasses.asdict(config)
    last = dataclasses.asdict(rows[-1]) if rows else {}
    results = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
    return {
        "num_parameters": num_parameters,
        "epochs": len(rows),
        **{name: last.get(name) for name in results},
        "best_test_accuracy": max((row.test_accuracy for row in rows), default=None),
        "training_seconds": round(sum(row.seconds for row in rows), 3),
        "images_per_second": float(np.median([row.images_per_second for row in rows])) if rows else None,
        "config": {name: value for name, value in fields.items() if name not in EXECUTION_FIELDS},
        "metrics": [dataclasses.asdict(row) for row in rows],
        **describe_environment(devices),
    }


def parse_config(arguments: list[str]) -> Config:
    """A recipe's name and flags to a Config. Raises UserError for an unknown recipe or a bad flag."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [DEFAULT_RECIPE, *arguments]
    if not arguments[0].startswith("-") and arguments[0] not in RECIPES:
        close = difflib.get_close_matches(arguments[0], RECIPES, 1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown recipe {arguments[0]!r}: {guess}choose one of {', '.join(RECIPES)}")
    return parse_arguments(
        tyro.extras.subcommand_type_from_defaults(RECIPES, DESCRIPTIONS, prefix_names=False),
        prog="python -m cifar_jax.train",
        description=f"Trains a recipe. Without a name: {DEFAULT_RECIPE}. RECIPE --help lists its flags.",
        default=RECIPES[DEFAULT_RECIPE],
        args=arguments,
    )


@command
def main() -> int:
    arguments = sys.argv[1:]
    config = parse_config(arguments)
    prepare_cpu()
    try:
        train_and_evaluate(config)
    except Interrupted as interrupted:
        again = shlex.join(["python", "-m", "cifar_jax.train", *arguments])
        print(f"{interrupted}. To go on: {again}", file=sys.stderr)
        return interrupted.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
