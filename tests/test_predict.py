import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from cifar_jax import load_pretrained, predict
from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.image_files import find_images, load_image
from cifar_jax.pretrained import pretrained_path
from cifar_jax.sources import load_run
from cifar_jax.train import train_and_evaluate
from cifar_jax.weights.files import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("direct_convolutions")


@pytest.fixture
def files(tmp_path, tiny_dataset):
    """Five test digits as PNG files."""
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path, image in zip(paths, tiny_dataset.test_images):
        PIL.Image.fromarray(np.asarray(image)).save(path)
    return paths


def test_a_released_network_tells_what_its_logits_say(files, tiny_dataset, run_command, monkeypatch):
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    model, variables, preprocess = load_pretrained("lenet5")
    expected = jax.nn.softmax(model.apply(variables, preprocess(tiny_dataset.test_images[:5])))
    arguments = ("--pretrained", "lenet5", "--top", 10, "--json", *files)
    status, output, error = run_command(predict.main, *arguments)
    assert (status, error) == (0, "")
    results = json.loads(output)
    assert [result["image"] for result in results] == [str(path) for path in files]
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for result, row in zip(results, expected):
        told = result["probabilities"]
        np.testing.assert_allclose([told[name] for name in names], row, atol=1e-5)
        assert list(told.values()) == sorted(told.values(), reverse=True)
    _, output, _ = run_command(predict.main, "--pretrained", "lenet5", "--top", 1, files[0])
    best = max(results[0]["probabilities"].items(), key=lambda pair: pair[1])
    assert output == f"{files[0]}: {best[0]} {best[1]:.1%}\n"


def test_a_weight_file_goes_with_its_scaling(files, tmp_path, run_command):
    """convert advises this for a format that does not store the scaling."""
    save_weights(tmp_path / "x.pth", load_weights(pretrained_path("lenet5")))
    common = ("--json", files[0])
    _, expected, _ = run_command(predict.main, "--pretrained", "lenet5", *common)
    flags = ("--weights", tmp_path / "x.pth")
    _, output, error = run_command(predict.main, *flags, "--input-scaling", "standardized", *common)
    assert error == ""
    told, wanted = (json.loads(text)[0]["probabilities"] for text in (output, expected))
    assert told == pytest.approx(wanted, rel=1e-4)
    _, output, error = run_command(predict.main, *flags, *common)
    assert json.loads(output)[0]["probabilities"] != pytest.approx(wanted, rel=1e-2)
    assert "symmetric" in error


@pytest.mark.usefixtures("no_figures")
def test_a_run_classifies_with_its_average_scaling_and_classes(files, plain_config, tiny_dataset, run_command, capsys):
    config = dataclasses.replace(plain_config, num_epochs=1, ema_decay=0.9, input_scaling="standardized")
    train_and_evaluate(config, tiny_dataset)
    capsys.readouterr()
    _, output, _ = run_command(predict.main, "--workdir", config.workdir, "--top", 10, "--json", files[0])
    told = json.loads(output)[0]["probabilities"]
    _, state, _ = load_run(Path(config.workdir), "latest")
    images = scale_images(tiny_dataset.test_images[:1], *pixel_statistics("standardized", "digits"))
    logits = state.apply_fn({"params": state.ema_params}, images)
    np.testing.assert_allclose([told[digit] for digit in "0123456789"], jax.nn.softmax(logits)[0], atol=1e-5)


def test_an_image_is_cut_to_its_upright_middle_square(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 50  # the middle square
    pixels[:32, 32:96, 0] = 200  # its upper half is redder
    upright = PIL.Image.fromarray(pixels)
    upright.save(tmp_path / "upright.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 8  # Orientation: shown a quarter turned counter-clockwise
    upright.transpose(PIL.Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    upright.convert("P").save(tmp_path / "palette.gif")
    for name in ("upright.png", "turned.png", "palette.gif"):
        image = load_image(tmp_path / name)
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
        assert np.abs(image[:15].astype(int) - [200, 50, 50]).max() < 30, name
        assert np.abs(image[17:].astype(int) - 50).max() < 30, name


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.full((32, 32, 4), (12, 200, 7, 0), np.uint8)
    pixels[:16, :, 3] = 255
    PIL.Image.fromarray(pixels).save(tmp_path / "half.png")
    image = load_image(tmp_path / "half.png")
    assert (image[:16] == [12, 200, 7]).all()
    assert (image[16:] == 255).all()


def test_bad_input_is_one_line_and_status_2(files, tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no image")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:-30])
    weights = load_weights(pretrained_path("lenet5"))
    weights.params["Dense_0"]["kernel"] *= np.float32(1e38)
    save_weights(tmp_path / "large.safetensors", weights)
    PIL.Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep.png")
    for arguments, text in {
        (): "image file",
        (tmp_path / "none.png",): "none.png: ",
        (tmp_path / "folder",): "folder: no image",
        (tmp_path / "*.tiff",): "*.tiff: no image",
        ("~/none.png",): f"{Path.home()}/none.png: ",
        (tmp_path / "text.png",): "text.png: ",
        ("-",): "-: not an image",
        (files[0], "--json", "--csv"): "--csv",
        (tmp_path / "cut.png",): "cut.png: ",
        (tmp_path / "deep.png",): "save it with 8",
        ("x" * 300 + ".png",): "File name too long",
        (files[0], "--weights", tmp_path / "large.safetensors"): "not finite",
        (files[0], "--top", 11): "--top 11: ",
        (files[0], "--top", 0): "--top 0: ",
        (files[0], "--pretrained", "resnet"): "'resnet'",
        (files[0], "--pretrained", ""): "''",
        (files[0], "--pretrained", "lenet5", "--workdir", tmp_path): "--workdir",
        (files[0], "--input-scaling", "unit"): "--input-scaling",
        (files[0], "--checkpoint", "best"): "--checkpoint",
    }.items():
        status, output, error = run_command(predict.main, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1), arguments
        assert text in error


def test_folders_patterns_and_standard_input(files, run_command, monkeypatch):
    """A folder's files come in alphabetical order, with those of its subfolders. Each image is classified once."""
    folder = files[0].parent / "photos"
    (folder / "more").mkdir(parents=True)
    for name, file in zip(("b.PNG", "a.png", "more/c.png"), files):
        file.rename(folder / name)
    (folder / "notes.txt").write_text("no image")
    read = lambda *arguments: [row["image"] for row in json.loads(predict_json(*arguments))]
    predict_json = lambda *arguments: run_command(predict.main, "--pretrained", "lenet5", "--json", *arguments)[1]
    names = [str(folder / name) for name in ("a.png", "b.PNG", "more/c.png")]
    assert read(folder) == names
    assert read(f"{folder}/**/*.png") == [names[0], names[2]]
    assert read(f"{folder}/*.[pP]*", f"{folder}/m*") == read(f"{folder.parent}/ph**") == names
    assert read(names[2], names[0], names[2]) == [names[2], names[0], names[2]]
    expected = json.loads(predict_json(names[0]))[0]["probabilities"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(names[0]).read_bytes())))
    (row,) = json.loads(predict_json("-"))
    assert (row["image"], row["probabilities"]) == ("-", pytest.approx(expected))


def test_a_folder_has_the_files_whose_pixels_pillow_reads(tmp_path, monkeypatch):
    for name in ("a.png", "only_written.pdf", "only_identified.mpg", "three_dimensional.mpo", "~b.png"):
        PIL.Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / name, format="PNG")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in find_images([Path()])[0]] == ["a.png", "three_dimensional.mpo", "~b.png"]
    for names in ([Path("*.png")], [Path("a.png"), Path("~b.png")]):
        found, failures = find_images(names)
        assert ([path.name for path in found], failures) == (["a.png", "~b.png"], [])
    assert [load_image(path).shape for path in found] == [(32, 32, 3)] * 2


def test_a_folder_that_cant_be_read_is_told(files, run_command, monkeypatch):
    folder, scan = files[0].parent, os.scandir
    (folder / "private").mkdir()

    def scandir(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    told = f"error: {folder / 'private'}: Permission denied\n"
    for name in (folder, f"{folder}/**"):
        status, output, error = run_command(predict.main, "--pretrained", "lenet5", name)
        assert (status, output.count("\n"), error) == (1, len(files), told)
    assert run_command(predict.main, "--pretrained", "lenet5", folder / "private") == (2, "", told)


def test_closed_streams(files, run_command, monkeypatch):
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    monkeypatch.setattr(sys, "stdin", None)
    assert run_command(predict.main, "-") == (2, "", "error: -: standard input is closed\n")
    for stream in ("stdout", "stderr"):
        with monkeypatch.context() as closed:
            closed.setattr(sys, "argv", ["predict", "--pretrained", "lenet5", "--csv", *map(str, files)])
            closed.setattr(sys, stream, None)
            assert predict.main() == 0


def test_results_are_not_written_behind_the_progress_bar(files, monkeypatch):
    """The bar is cleared before the caller gets the first result of a batch to print."""
    seen = []

    class Bar(contextlib.nullcontext):
        clear = lambda self: seen.append("clear")
        update = lambda self, count: seen.append(count)

    monkeypatch.setattr(predict, "tqdm", lambda **_: Bar(Bar()))
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    for path, _ in predict.classify_files(files[:1] * 3, lambda images: np.zeros((len(images), 10)), []):
        seen.append(path)
    assert seen == ["clear", files[0], files[0], 2, "clear", files[0], 1]


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_files_that_cant_be_read_come_at_the_end(form, files, run_command, monkeypatch):
    """The others are classified, in batches of any size."""
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    files[1].write_text("no image")
    files[3].write_bytes(files[3].read_bytes()[:-30])
    flags = () if form == "text" else (f"--{form}",)
    status, output, error = run_command(predict.main, "--pretrained", "lenet5", "--top", 2, *flags, *files, "none.png")
    assert status == 1
    failed = [files[1], files[3], Path("none.png")]
    assert [str(path) in line for path, line in zip(failed, error.splitlines(), strict=True)] == [True] * 3
    if form == "json":
        read = [row["image"] for row in json.loads(output)]
    else:
        read = [line.partition("," if form == "csv" else ": ")[0] for line in output.splitlines()]
    assert read == [str(files[number]) for number in (0, 2, 4)]
    if form == "csv":
        _, best, share, second, rest = output.splitlines()[0].split(",")
        assert best != second
        assert 0 <= float(rest) <= float(share) <= 1
