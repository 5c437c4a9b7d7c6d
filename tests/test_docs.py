"""Executes every command line and every snippet of the pages, with the smallest data that suffices.

COMMANDS has an entry for each line of a `sh` block. A line without an entry fails, and so does an entry without a line.
A page's commands run one after the other in one folder, as a reader would type them.
"""

import dataclasses
import doctest
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from frameworks import ABSENT
from small_runs import first_images

from benchmarks.report.results import ROOT
from cifar_jax import evaluate, plots, train
from cifar_jax.configs import DESCRIPTIONS, RECIPES
from cifar_jax.datasets import DATASETS, DatasetInfo
from cifar_jax.errors import UserError
from cifar_jax.pretrained import pretrained_names, pretrained_path

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@dataclasses.dataclass(frozen=True)
class Run:
    """Executed here, with `flags` that make it take seconds."""

    flags: str = ""


@dataclasses.dataclass(frozen=True)
class Stops:
    """Too long to be run whole. With `flags` set it reads all its flags, and then stops with one line that names the
    value of the last one. Its work is tested, in miniature, by `tests`."""

    flags: str
    tests: str


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Executed by another file, which contains `text`."""

    file: str
    text: str


TINY = "--batch-size 30 --eval-batch-size 10 --num-epochs 1 --num-devices 1 --steps-per-call 1"
INSTALLED = Elsewhere(".ci/run", "-e '.[test]'")
TESTED = Elsewhere(".ci/run", "\npytest\n")
ACCURACY = Stops("--out photo.jpg", "tests/test_accuracy.py")
EXPORT = Stops("--pretrained nothing", "tests/test_export.py")
PARITY = Stops("--data-dir nowhere", "tests/test_parity.py")
REPORT = Stops("--out photo.jpg", "tests/test_network_report.py")

COMMANDS = {
    "pip install -e .": INSTALLED,
    "pip install -e '.[test]'": INSTALLED,
    "pip install -e '.[parity]'": INSTALLED,  # included in test
    "pip install -e '.[parquet]'": INSTALLED,  # included in test
    "pip install -e '.[export,parity]'": INSTALLED,  # included in test
    "pytest": TESTED,
    "pytest -m 'not slow and not long'": TESTED,
    "pytest tests/test_extending.py": TESTED,
    "pytest tests/test_datasets.py": TESTED,
    "ruff check .": Elsewhere(".ci/run", "\nruff check .\n"),
    "ruff format .": Elsewhere(".ci/run", "\nruff format --check .\n"),
    "mypy": Elsewhere(".ci/run", "\nmypy\n"),
    "mkdocs build --strict": Elsewhere(".ci/run", "\nmkdocs build --strict"),
    "python -m benchmarks.report --check": Elsewhere(".ci/run", "python -m benchmarks.report --check"),
    "cifar-jax --help": Run(),
    "python -m cifar_jax.train quickstart": Run(TINY),
    "python -m cifar_jax.train quickstart --workdir runs/first --num-epochs 3": Run(TINY),
    "python -m cifar_jax.train quickstart --workdir runs/second --num-epochs 3 --seed 1": Run(TINY),
    "python -m cifar_jax.compare runs/first runs/second --out compare.png": Run(),
    "python -m cifar_jax.train quickstart --workdir runs/watched --logger tensorboard": Run(TINY),
    "python -m cifar_jax.train quickstart --workdir runs/watched_online --logger wandb": Stops(
        "--profile photo.jpg", "tests/test_loggers.py"
    ),
    "python -m cifar_jax.train quickstart --workdir runs/profiled --profile 20": Run(f"{TINY} --profile 1"),
    "python -m cifar_jax.train lenet5 --help": Run(),
    "python -m cifar_jax.train lenet5 --workdir runs/lenet5_seed1 --seed 1": Run(TINY),
    "python -m cifar_jax.train lenet5 --holdout 5000 --num-epochs 10 --workdir runs/held_out": Run(
        f"{TINY} --holdout 30"
    ),
    "python -m cifar_jax.train lenet5_reference": Run(TINY),
    "python -m cifar_jax.train lenet5 --dataset cifar100 --workdir runs/cifar100": Stops(
        "--data-dir nowhere", "tests/test_extending.py"
    ),
    "python -m cifar_jax.train all_cnn_fast --dtype bfloat16 --workdir runs/gpu": Stops(
        "--num-epochs 0", "tests/test_trainer.py"
    ),
    "python -m cifar_jax.train all_cnn_reference --auto-restart": Run(f"{TINY} --image-sizes 14 1"),
    "python -m cifar_jax.train all_cnn_reference --seed 0": Run(f"{TINY} --image-sizes 14 1"),
    "python -m cifar_jax.train lenet5 --data-dir path/to/folder": Run(f"{TINY} --data-dir ."),
    "python -m cifar_jax.train mine": Run(TINY),
    "python -m cifar_jax.plots runs/first": Run(),
    "python -m cifar_jax.evaluate --workdir runs/lenet5_seed1": Run(),
    "python -m cifar_jax.evaluate --workdir runs/first": Run(),
    "python -m cifar_jax.evaluate --workdir runs/first --checkpoint best --json": Run(),
    "python -m cifar_jax.evaluate --workdir runs/first --eval-dropout": Run(),
    "python -m cifar_jax.evaluate --pretrained lenet5_reference --eval-dropout --json": Run(),
    "python -m cifar_jax.evaluate --weights model.pth --input-scaling symmetric": Run(),
    "python -m cifar_jax.evaluate --weights released.pth --input-scaling standardized": Run(),
    "python -m cifar_jax.evaluate --pretrained lenet5": Run(),
    "python -m cifar_jax.evaluate --pretrained all_cnn --json": Run(),
    "python -m cifar_jax.evaluate --pretrained all_cnn --dtype bfloat16": Run(),
    "python -m cifar_jax.evaluate --pretrained all_cnn --dtype bfloat16 --json": Run(),
    "python -m cifar_jax.evaluate --pretrained all_cnn --flip-tta": Run(),
    "python -m cifar_jax.evaluate --pretrained all_cnn --flip-tta --json": Run(),
    "python -m cifar_jax.predict photo.jpg": Run(),
    "python -m cifar_jax.predict photo.jpg --pretrained all_cnn": Run(),
    "python -m cifar_jax.predict photo.jpg --pretrained lenet5 --top 5 --json": Run(),
    "python -m cifar_jax.predict photo.jpg --workdir runs/first": Run(),
    "python -m cifar_jax.predict photos 'more/*.png' --csv": Run(),
    "python -m cifar_jax.train lenet5 --holdout 5000 --workdir runs/calibrated": Run(f"{TINY} --holdout 30"),
    "python -m cifar_jax.convert runs/calibrated calibrated.safetensors": Run(),
    "python -m cifar_jax.train lenet5 --teacher all_cnn --crop-padding 2 --workdir runs/taught": Run(
        f"{TINY} --teacher lenet5 --crop-padding 0"
    ),
    "python -m cifar_jax.predict photo.jpg --weights calibrated.safetensors": Run(),
    "python -m cifar_jax.report --out report --pretrained lenet5": REPORT,
    "python -m cifar_jax.report --out report --pretrained all_cnn --disturbed-images 0": REPORT,
    "python -m cifar_jax.convert runs/lenet5_seed1 lenet5.pth": Run(),
    "python -m cifar_jax.convert model.pth model.keras": Run(),
    "python -m cifar_jax.convert runs/first first.safetensors --checkpoint best": Run(),
    "python -m cifar_jax.export all_cnn.onnx --pretrained all_cnn": EXPORT,
    "python -m cifar_jax.export all_cnn_uint8.onnx --pretrained all_cnn --uint8": EXPORT,
    "python -m cifar_jax.export all_cnn.keras --pretrained all_cnn": EXPORT,
    "python -m cifar_jax.export lenet5.stablehlo --pretrained lenet5": EXPORT,
    "python -m cifar_jax.export pytorch_model.bin --format pytorch --pretrained lenet5": EXPORT,
    "python -m benchmarks.accuracy --recipe all_cnn --seeds 0 1 2 --out benchmarks/results --runs runs": ACCURACY,
    "python -m benchmarks.accuracy --recipe all_cnn_fast --seeds 0 1 2 --out benchmarks/results --runs runs": ACCURACY,
    "python -m benchmarks.accuracy --recipe lenet5 --seeds 0 1 2 --out benchmarks/results --runs runs": ACCURACY,
    "python -m benchmarks.accuracy --ablation lenet5 --num-epochs 10 --seeds 0 --out benchmarks/results --runs runs": (
        ACCURACY
    ),
    "python -m benchmarks.accuracy --parity lenet5 --out benchmarks/results": ACCURACY,
    "python -m benchmarks.early_training --out benchmarks/results": Stops(
        "--data-dir nowhere", "tests/test_early_training.py"
    ),
    "python -m benchmarks.throughput --rounds 5 --out my_results": Stops("--out photo.jpg", "tests/test_throughput.py"),
    "python -m benchmarks.kernels --out benchmarks/results": Stops(
        "--out photo.jpg", "tests/test_kernels_benchmark.py"
    ),
    # Its 200 MB are not installed by .ci/run.
    "pip install -e '.[tpu]'": Elsewhere("pyproject.toml", 'tpu = ["jax[tpu]'),
    "python -m benchmarks.tpu_compile --out benchmarks/results": Stops(
        "--topology v5e:nothing", "tests/test_tpu_compile.py"
    ),
    "python -m benchmarks.faults --out benchmarks/results": Stops("--only nothing", "tests/test_faults.py"),
    "python -m benchmarks.faults --out results --quick": Stops("--only nothing", "tests/test_faults.py"),
    "python -m benchmarks.faults --out results --rounds 10 --seed 1 --only SIGKILL": Stops(
        "--only nothing", "tests/test_faults.py"
    ),
    "pytest -m long tests/test_faults.py": TESTED,
    **{
        f"python -m cifar_jax.train quickstart --workdir runs/together --coordinator 127.0.0.1:1234 --num-processes 2 "
        f"--process-id {number}": Elsewhere("tests/test_processes.py", "def test_several_processes_train_like_one")
        for number in (0, 1)
    },
    "python -m benchmarks.processes --out benchmarks/results": Stops("--num-epochs 1", "tests/test_processes.py"),
    "benchmarks/gpu_campaign.sh results_of_the_gpu": Elsewhere("tests/test_throughput.py", "gpu_campaign_on_a_cpu"),
    "python scripts/parity_pytorch.py --layers --json": PARITY,
    "python scripts/parity_keras.py --layers --json": PARITY,
    "python scripts/parity_pytorch.py --out benchmarks/results/parity_pytorch.json": PARITY,
    "python scripts/parity_keras.py --out benchmarks/results/parity_keras.json": PARITY,
}


def blocks(page, language):
    """Returns the fenced blocks of a language, without indentation."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(page):
    """Returns every command of a page's sh blocks in order, split at &&, in shlex' form."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [word for line in lines for word in (*shlex.split(line, comments=True), "&&")]
    return [command.strip() for command in shlex.join(words).split("'&&'") if command.strip()]


def with_flags(words, flags):
    """Returns a command's words with these flags added or replaced."""
    for group in re.findall(r"--\S+(?: (?!--)\S+)*", flags):
        flag, *values = group.split()
        if flag in words:
            start = words.index(flag)
            end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
            words = [*words[:start], *words[end:]]
        words = [*words, flag, *values]
    return words


@pytest.fixture
def execute(run_command):
    """Runs `python -m MODULE …`, `python FILE …` or `cifar-jax …` in this process. Returns: (exit status, output)."""

    def run(words):
        if words[0] == "cifar-jax":
            words = ["python", "-m", "cifar_jax", *words[1:]]
        if words[:2] == ["python", "-m"]:
            module, arguments = words[2], words[3:]
            try:
                main = importlib.import_module(f"{module}.__main__").main
            except ModuleNotFoundError:
                main = importlib.import_module(module).main
        else:
            assert words[0] == "python", words
            arguments = words[2:]
            main = lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        status, output, errors = run_command(main, *arguments)
        return status or 0, output + errors

    return run


class TinyInfo(DatasetInfo):
    """An entry of the registry whose data are in memory."""

    def load(self, data_dir=None):
        if data_dir is not None and not Path(data_dir).exists():
            raise UserError(f"--data-dir {data_dir}: there is no such folder")
        return dataclasses.replace(self.data, info=self)


@pytest.fixture(scope="module")
def done():
    """The summary and the folder of each trained recipe, and the result of each evaluation, for all pages."""
    return {}


@pytest.fixture
def once(done, monkeypatch, tmp_path_factory):
    """Trains each recipe once for all pages, without figures, and then copies its folder. Evaluates each released
    network once. The folder, the seed and automatic restarts make no difference."""
    train_and_evaluate, evaluate_source = train.train_and_evaluate, evaluate.evaluate

    def train_once(config, *arguments, **options):
        key, workdir = dataclasses.replace(config, workdir="run", seed=0, auto_restart=False), Path(config.workdir)
        if workdir.exists():
            return train_and_evaluate(config, *arguments, **options)
        if key not in done:
            with monkeypatch.context() as patch:
                patch.setattr(plots, "plot_run", lambda workdir: None)
                summary = train_and_evaluate(config, *arguments, **options)
            done[key] = summary, shutil.copytree(workdir, tmp_path_factory.mktemp("done") / "run")
        summary, run = done[key]
        shutil.copytree(run, workdir, dirs_exist_ok=True)
        return summary

    def evaluate_once(source, *arguments):
        if source.name not in pretrained_names():
            return evaluate_source(source, *arguments)
        key = (source.name, source.config.dtype, *arguments)
        if key not in done:
            done[key] = evaluate_source(source, *arguments)
        return done[key]

    monkeypatch.setattr(train, "train_and_evaluate", train_once)
    monkeypatch.setattr(evaluate, "evaluate", evaluate_once)


@pytest.fixture
def reader(tmp_path, monkeypatch, tiny_dataset, direct_convolutions, once):
    """Changes to a folder with a photo and uses tiny data, like a reader of the pages."""
    test = {"test_images": tiny_dataset.test_images[:10], "test_labels": tiny_dataset.test_labels[:10]}
    data = dataclasses.replace(first_images(tiny_dataset, 60), **test)
    monkeypatch.setattr(TinyInfo, "data", data, raising=False)
    for name in ("cifar10", "digits"):
        fields = {field.name: getattr(DATASETS[name], field.name) for field in dataclasses.fields(DatasetInfo)}
        monkeypatch.setitem(DATASETS, name, TinyInfo(**fields))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name in ("photo.jpg", "photos/a.jpg", "more/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(image).save(name)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # JAX's defaults
        yield


# Files that pages assume and none of their commands creates: how to create them.
GIVEN = {
    "released.pth": f"python -m cifar_jax.convert {pretrained_path('lenet5')} released.pth",
    "model.pth": f"python -m cifar_jax.convert {pretrained_path('lenet5_reference')} model.pth",
    "runs/first": f"python -m cifar_jax.train quickstart --workdir runs/first {TINY}",
}


def snippet_recipe():
    namespace = {}
    exec(next(code for code in blocks("docs/extending.md", "python") if "CONFIG" in code), namespace)
    return namespace["CONFIG"]


def test_every_command_has_an_entry_and_every_entry_a_command():
    found = {command for page in PAGES for command in commands(page)}
    assert found == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_run(page, reader, execute, monkeypatch, request):
    """Only the README's trainings take steps."""
    if page != "README.md":
        request.getfixturevalue("no_steps")
    monkeypatch.setitem(RECIPES, "mine", snippet_recipe())
    monkeypatch.setitem(DESCRIPTIONS, "mine", "A recipe of the reader's own.")
    for name, command in GIVEN.items():
        mentions = [line for line in commands(page) if name in line.split()]
        if mentions and "train" not in mentions[0]:
            assert execute(shlex.split(command))[0] == 0, command
    for command in commands(page):
        how, words = COMMANDS[command], shlex.split(command)
        if isinstance(how, Elsewhere):
            assert how.text in (ROOT / how.file).read_text(), command
            continue
        status, output = execute(with_flags(words, how.flags))
        if how is PARITY and ABSENT:
            assert (status, "pip install -e '.[parity]'" in output) == (2, True), (command, output)
        elif isinstance(how, Run):
            assert status == 0, (command, output)
        else:
            assert (status, output.count("error: ")) == (2, 1), (command, output)
            assert how.flags.split()[-1] in output, (command, output)
            assert (ROOT / how.tests).exists(), command


SNIPPETS = [
    pytest.param(page, marks=pytest.mark.slow if page == "docs/api.md" else ())
    for page in PAGES
    if blocks(page, "python") and page != "docs/tutorial.md"  # test_tutorial.py executes the notebook
]


@pytest.mark.usefixtures("no_steps", "no_figures")
@pytest.mark.parametrize("page", SNIPPETS)
def test_the_snippets_of_a_page_run(page, reader):
    for number, code in enumerate(blocks(page, "python")):
        if "onnxruntime" in code:
            pytest.importorskip("onnxruntime")
        if ">>>" in code:
            example = doctest.DocTestParser().get_doctest(code, {}, f"{page} {number}", page, 0)
            assert doctest.DocTestRunner().run(example).failed == 0, f"{page}: see the output above"
        else:
            exec(compile(code, f"{page} {number}", "exec"), {})


def test_files_and_extras_that_pages_name_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        text = (ROOT / page).read_text()
        for names in re.findall(r"'\.\[([\w,]+)\]'", text):
            assert set(names.split(",")) <= set(extras), page
        for path in re.findall(r"`((?:tests|scripts|benchmarks|cifar_jax|docs)/[\w./]+)`", text):
            assert (ROOT / path).exists() or path.endswith("/mine.py"), (page, path)


def test_the_layout_has_every_module():
    layout = re.search(r"## Layout\n.*?```\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)[1]
    listed = re.findall(r"^  (\S+)", layout.partition("benchmarks/")[0], re.MULTILINE)
    package = [path for path in (ROOT / "cifar_jax").iterdir() if not path.name.startswith("__")]
    modules = {path.name for path in package if path.suffix == ".py"}
    assert set(listed) == modules | {f"{path.name}/" for path in package if path.is_dir()}


def test_the_tables_of_recipes_have_all_recipes():
    for page in ("README.md", "docs/training.md"):
        assert set(RECIPES) <= set(re.findall(r"^\| `(\w+)`", (ROOT / page).read_text(), re.MULTILINE)), page


def test_the_readme_fits_its_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any("| All-CNN | 1,369,738 |" in line for line in lines[:20])  # results on the first screen


@pytest.mark.slow
@pytest.mark.long  # .ci/run builds the pages as well
def test_the_links_of_the_pages_hold(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_links_of_pages_outside_of_docs_hold(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]+)(#[\w-]+)?\)", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings]
        assert not anchor or anchor[1:] in slugs, (path, anchor)
