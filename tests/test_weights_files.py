import dataclasses
import json
import pickle
import zipfile

import h5py
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from frameworks import keras as keras_api
from frameworks import keras_layers, torch
from weight_files import random_weights

from cifar_jax import convert, evaluate, sources
from cifar_jax.errors import UserError
from cifar_jax.train import train_and_evaluate
from cifar_jax.weights import keras, pytorch
from cifar_jax.weights.files import load_weights, save_weights
from cifar_jax.weights.params import layers_from_params

pytestmark = pytest.mark.usefixtures("keras_files_read_here")
KINDS = ("safetensors", "pth", "pt", "h5", "hdf5", "weights.h5", "keras")


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)
    assert dataclasses.replace(left, params={}) == dataclasses.replace(right, params={})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", list(pytorch.TWINS))
def test_round_trip(tmp_path, kind, model):
    weights = random_weights(model)
    path = tmp_path / f"file.{kind}"
    save_weights(path, weights)
    assert_same(load_weights(path), weights)
    with pytest.raises(UserError, match="exists"):
        save_weights(path, weights)


@pytest.mark.parametrize("kind", ["safetensors", "h5", "keras"])
def test_final_relu_survives_where_the_file_can_hold_it(tmp_path, kind):
    path = tmp_path / f"file.{kind}"
    save_weights(path, random_weights("all_cnn", final_relu=True))
    assert load_weights(path).final_relu


def test_safetensors_keep_the_scaling(tmp_path, lenet5):
    path = tmp_path / "file.safetensors"
    save_weights(path, dataclasses.replace(lenet5, input_scaling="standardized"))
    assert load_weights(path).input_scaling == "standardized"
    assert load_weights(path, input_scaling="unit").input_scaling == "unit"


def write_keras2(path, weights, *, full_model, as_bytes, architecture=None):
    """Writes a file like Keras 2: layer_names, a group with weight_names per layer, with or without weights."""
    text = (lambda s: np.bytes_(s)) if as_bytes else (lambda s: s)
    layers, _ = layers_from_params(weights.params)
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if full_model else file
        if architecture:
            file.attrs["model_config"] = text(json.dumps(architecture))
        names = []
        for i, (kernel, bias) in enumerate(layers):
            layer = f"{'conv2d' if kernel.ndim == 4 else 'dense'}_{11 - i}"  # the names' order is misleading
            group = root.create_group(layer)
            parts = [f"{layer}/kernel:0", f"{layer}/bias:0"]
            group.attrs["weight_names"] = [text(part) for part in parts]
            for part, array in zip(parts, (kernel, bias)):
                group[part] = array
            activation = f"activation_{i}"
            root.create_group(activation).attrs["weight_names"] = np.array([], "S1")
            names += [text(layer), text(activation)]
        root.attrs["layer_names"] = names


@pytest.mark.parametrize("full_model", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_keras_2_files(tmp_path, all_cnn, full_model, as_bytes):
    path = tmp_path / "file.h5"
    write_keras2(path, all_cnn, full_model=full_model, as_bytes=as_bytes)
    assert_same(load_weights(path), all_cnn)


def keras2_architecture(final_relu, filters=(96, 96, 96, 192, 192, 192, 192, 192, 10), **changes):
    """Returns All-CNN's architecture like Keras 2. `changes` apply to the fifth convolution."""
    layers = []
    for i, count in enumerate(filters):
        options = {"filters": count, "kernel_size": [1, 1] if i > 6 else [3, 3], "activation": "linear"}
        options |= {"padding": "valid" if i == 4 else "same", "strides": [1, 1], "dilation_rate": [1, 1]}
        layers.append({"class_name": "Conv2D", "config": options | (changes if i == 4 else {})})
        if i < 8 or final_relu:
            layers.append({"class_name": "Activation", "config": {"activation": "relu"}})
        if i in (2, 5):
            pool = {"pool_size": [3, 3], "strides": [2, 2], "padding": "valid"}
            layers += [{"class_name": "MaxPooling2D", "config": pool}, {"class_name": "Dropout", "config": {}}]
    layers.append({"class_name": "GlobalAveragePooling2D", "config": {}})
    layers.append({"class_name": "Activation", "config": {"activation": "softmax"}})
    return {"class_name": "Sequential", "config": {"layers": layers}, "keras_version": "2.3.1"}


@pytest.mark.parametrize("final_relu", [False, True])
def test_the_originals_pair_of_json_and_h5(tmp_path, all_cnn, final_relu, capsys):
    write_keras2(tmp_path / "w.h5", all_cnn, full_model=False, as_bytes=True)
    architecture = tmp_path / "model.json"
    for document in (keras2_architecture(final_relu), keras2_architecture(final_relu)["config"]["layers"]):
        if isinstance(document, list):  # Keras before 2.2.3
            document = {"class_name": "Sequential", "config": document}
        architecture.write_text(json.dumps(document))
        assert load_weights(tmp_path / "w.h5", architecture=architecture).final_relu is final_relu
        assert "ReLU" not in capsys.readouterr().err
    full = tmp_path / "full.h5"
    write_keras2(full, all_cnn, full_model=True, as_bytes=False, architecture=keras2_architecture(final_relu))
    assert load_weights(full).final_relu is final_relu
    assert "ReLU" not in capsys.readouterr().err
    assert not load_weights(tmp_path / "w.h5").final_relu
    assert "w.h5: does not tell whether it has a final ReLU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a Keras architecture"),
        ("[]", "not a Keras architecture"),
        ('{"config": {"layers": [{"class_name": "Conv2D", "config": {}}]}}', "not a Keras architecture"),
        ('{"config": [{"class_name": "Dropout", "config": []}]}', "not a Keras architecture"),
        ("[" * 100_000, "not a Keras architecture"),
        (json.dumps(keras2_architecture(True, (64, 10))), "are not those of all_cnn"),
        (
            json.dumps(keras2_architecture(True, padding="same")),
            "found .* same, strides .* expected .* valid, strides",
        ),
        (json.dumps(keras2_architecture(True, strides=[2, 2])), "are not those of all_cnn"),
        (json.dumps(keras2_architecture(True, activation="tanh")), "found tanh, expected relu"),
        (json.dumps(keras2_architecture(False)).replace("relu", "elu"), "found elu, expected relu"),
        (json.dumps(keras2_architecture(False)).replace("Dropout", "Rescaling"), "scaling layers"),
        (json.dumps(keras2_architecture(False)).replace("MaxP", "AverageP"), "its layer AveragePooling2D"),
        (None, "not a Keras architecture .*No such file"),
    ],
)
def test_bad_architectures(tmp_path, all_cnn, text, message):
    save_weights(tmp_path / "w.safetensors", all_cnn)
    path = tmp_path / "model.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        load_weights(tmp_path / "w.safetensors", architecture=path)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_foreign_files(tmp_path, lenet5, kind):
    whole = tmp_path / f"whole.{kind}"
    save_weights(whole, lenet5)
    data = whole.read_bytes()
    path = tmp_path / f"bad.{kind}"
    for content in (b"", b"\x00" * 100, b"hello", data[: len(data) // 2], data[:-100] if kind != "h5" else data[:5000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: "):
            load_weights(path)
    with pytest.raises(UserError, match="no such file"):
        load_weights(tmp_path / f"absent.{kind}")


def test_the_wrong_model_is_refused(tmp_path, lenet5):
    for kind in ("safetensors", "pth", "h5"):
        path = tmp_path / f"file.{kind}"
        save_weights(path, lenet5)
        with pytest.raises(UserError, match=f"^{path}: "):
            load_weights(path, model="all_cnn")


class Evil:
    def __reduce__(self):
        return (print, ("EVIL",))


def test_a_hostile_pickle_is_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"conv1.weight": Evil()}, path)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"torch.save did not write"):
        load_weights(path)
    assert "EVIL" not in capsys.readouterr().out


def test_values_beyond_float32(tmp_path, run_command, lenet5):
    state_dict = pytorch.params_to_pytorch(lenet5.params)
    wide = {name: torch.tensor(array).double() for name, array in state_dict.items()}
    wide["convLayer1.weight"][0, 0, 0, 0] = 1e39
    torch.save(wide, tmp_path / "wide.pth")
    status, _, errors = run_command(convert.main, tmp_path / "wide.pth", tmp_path / "out.safetensors")
    message = "tensor convLayer1.weight has values that are not finite in float32"
    assert (status, errors) == (2, f"error: {tmp_path}/wide.pth: {message}\n")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_the_users_keras_settings_do_not_matter(kind, tmp_path, lenet5):
    config = keras_api.config
    config.set_floatx("float16")
    config.set_image_data_format("channels_first")
    try:
        save_weights(tmp_path / f"a.{kind}", lenet5)
        loaded = load_weights(tmp_path / f"a.{kind}")
    finally:
        config.set_floatx("float32")
        config.set_image_data_format("channels_last")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lenet5.params)


def test_every_cut_of_an_old_pth_is_noticed(tmp_path):
    """PyTorch's legacy format, common when the notebook was written."""
    path = tmp_path / "old.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for content in (b".", *(data[:length] for length in range(len(data)))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: "):
            load_weights(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"a": 3}])
def test_a_checkpoint_that_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match="not a state_dict"):
        load_weights(tmp_path / "file.pth")


def test_hostile_hdf5_reads_no_other_file_and_no_giant(tmp_path, lenet5):
    secret, path = tmp_path / "secret.h5", tmp_path / "file.h5"
    write_keras2(secret, lenet5, full_model=False, as_bytes=False)
    write_keras2(path, lenet5, full_model=False, as_bytes=False)
    name = "conv2d_11/conv2d_11/kernel:0"
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(secret), name)
    with pytest.raises(UserError, match="kernel:0 is missing"):
        load_weights(path)
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000))  # declared, never written
    with pytest.raises(UserError, match=r"kernel:0 has shape .* larger than in any"):
        load_weights(path)


def test_hostile_keras_archive(tmp_path):
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(keras2_architecture(False)))
        archive.writestr("model.weights.h5", bytes(2**27 + 1))
    with pytest.raises(UserError, match="more than 128 MiB"):
        load_weights(path)


def test_damaged_deflate_in_a_keras_archive(tmp_path):
    path = tmp_path / "damaged.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(keras2_architecture(False)) * 20)
        start = archive.getinfo("config.json").header_offset
    content = bytearray(path.read_bytes())
    content[start + 45 : start + 145] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a Keras file"):
        load_weights(path)


def test_hdf5_whose_groups_are_datasets(tmp_path):
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        file["model_weights"] = np.zeros(3)
    with pytest.raises(UserError, match="not a group"):
        load_weights(path)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_are_not_dense(tmp_path, kind):
    tensor = torch.eye(3).to_sparse() if kind == "sparse" else torch.zeros(3, device="meta")
    torch.save({"a": tensor}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="tensor a can't be read"):
        load_weights(tmp_path / "file.pth")


@pytest.mark.parametrize("names", [("a", "a/b"), ("Conv_0", "Conv_0/bias"), ("Conv_0/kernel/0",)])
def test_safetensors_with_other_names(tmp_path, names):
    path = tmp_path / "file.safetensors"
    tensors = {name: np.zeros(1, np.float32) for name in names}
    path.write_bytes(safetensors.numpy.save(tensors, {"format": "cifar_jax"}))
    with pytest.raises(UserError, match=f"tensor {names[0]} belongs to no supported network"):
        load_weights(path)


def test_state_dicts_as_safetensors(tmp_path, lenet5, capsys):
    """Also in bfloat16, with the notebook's second key and PyTorch's bookkeeping, as in .pth files."""
    state_dict = pytorch.file_state_dict(lenet5.params, "lenet5")
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state_dict.items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()} | {"n_averaged": torch.tensor(3)}
    torch.save(tensors, tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save(tensors))
    assert_same(load_weights(tmp_path / "a.safetensors"), load_weights(tmp_path / "a.pth"))
    assert capsys.readouterr().err.count("dropped tensor n_averaged") == 2


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="neither written by cifar_jax"):
        load_weights(path)


def test_a_final_relu_that_the_network_can_not_have(tmp_path, lenet5):
    path = tmp_path / "file.safetensors"
    save_weights(path, dataclasses.replace(lenet5, final_relu=True))
    with pytest.raises(UserError, match=r"file.safetensors: has a final ReLU, which lenet5 can't have"):
        load_weights(path)


def test_a_trained_keras_file_brings_no_optimizer_state_along(tmp_path, lenet5):
    network = keras.create_model("lenet5")
    network.set_weights(keras.params_to_keras(lenet5.params))
    network.compile("adam", "mse")
    network.optimizer.build(network.trainable_variables)
    for kind in ("keras", "h5", "weights.h5"):
        path = tmp_path / f"file.{kind}"
        network.save_weights(path) if kind == "weights.h5" else network.save(path)
        assert_same(load_weights(path), lenet5)


# --- Commands ---


@pytest.mark.parametrize("change", ["AveragePooling2D", "tanh", "relu"])
def test_a_keras_file_of_another_network_with_the_same_tensors(tmp_path, change):
    """The weights would fit but the logits would differ. A max pool before the ReLU is the same network."""
    is_same = change == "relu"
    pool = keras_layers.AveragePooling2D if change == "AveragePooling2D" else keras_layers.MaxPooling2D
    activation = "tanh" if change == "tanh" else "relu"
    last = [keras_layers.Activation(activation)] if is_same else []
    network = keras_api.Sequential(
        [
            keras_layers.Input((32, 32, 3)),
            *(keras_layers.Conv2D(32, 5, activation=None if is_same else activation), pool(2), *last),
            *(keras_layers.Conv2D(64, 5, activation=activation), pool(2), keras_layers.Flatten()),
            *(keras_layers.Dense(200, activation), keras_layers.Dense(100, activation), keras_layers.Dense(10)),
        ]
    )
    for name in ("network.keras", "network.h5"):
        network.save(tmp_path / name)
        if is_same:
            assert load_weights(tmp_path / name).model == "lenet5"
        else:
            with pytest.raises(UserError, match=r"its layer AveragePooling2D|found tanh, expected relu"):
                load_weights(tmp_path / name)


def test_weights_named_by_attributes(tmp_path, all_cnn):
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        for name, layer in all_cnn.params.items():
            for number, tensor in enumerate((layer["kernel"], layer["bias"])):
                file[f"{name.lower()}/vars/{number}"] = tensor
    assert_same(load_weights(tmp_path / "x.weights.h5"), all_cnn)  # conv_0 … conv_8 tell the order
    with h5py.File(tmp_path / "x.weights.h5", "a") as file:
        file["body"] = file.pop("conv_1")
    with pytest.raises(UserError, match=r"body and conv_2 have the same shape|conv_2 and body have the same shape"):
        load_weights(tmp_path / "x.weights.h5")


def test_another_file_by_a_virtual_dataset_is_not_read(tmp_path, all_cnn):
    save_weights(tmp_path / "x.weights.h5", all_cnn)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["k"] = np.ones(96, np.float32)
    layout = h5py.VirtualLayout((96,), np.float32)
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "k", (96,))
    with h5py.File(tmp_path / "x.weights.h5", "a") as file:
        del file["layers/conv2d/vars/1"]
        file.create_virtual_dataset("layers/conv2d/vars/1", layout)
    with pytest.raises(UserError, match=r"tensor layers/conv2d/vars/1 is stored in another file"):
        load_weights(tmp_path / "x.weights.h5")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.zeros(1).expand(2**40), "has 1099511627776 values"),
        (lambda: torch.zeros(32, dtype=torch.complex64), "must be a floating-point type"),
        (lambda: torch.empty(32, dtype=torch.bits8), "tensor convLayer1.bias can.t be read"),
    ],
)
def test_odd_tensors_are_one_line(tmp_path, lenet5, tensor, message):
    state_dict = {name: torch.tensor(array) for name, array in pytorch.params_to_pytorch(lenet5.params).items()}
    torch.save(state_dict | {"convLayer1.bias": tensor()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "x.pth")


def test_the_notebooks_second_key_behind_a_prefix(tmp_path, lenet5):
    state_dict = {name: torch.tensor(array) for name, array in pytorch.params_to_pytorch(lenet5.params).items()}
    state_dict["xav"] = state_dict["fullyc1.weight"]
    torch.save({f"module.{name}": tensor for name, tensor in state_dict.items()}, tmp_path / "x.pth")
    assert_same(load_weights(tmp_path / "x.pth"), lenet5)


def test_places_that_are_no_file(tmp_path, lenet5, run_command):
    with pytest.raises(UserError, match=r"is a folder: .* --workdir"):
        load_weights(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    status, _, error = run_command(convert.main, tmp_path / "saved", tmp_path / "out.pth")
    assert (status, "SavedModel: load it with Keras 2" in error) == (2, True)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists"):
        save_weights(tmp_path / "link.safetensors", lenet5)
    assert (tmp_path / "link.safetensors").is_symlink()


def test_a_scaling_that_a_file_does_not_say_is_said(tmp_path, lenet5, capsys):
    save_weights(tmp_path / "x.pth", lenet5)
    load_weights(tmp_path / "x.pth")
    assert "assuming symmetric" in capsys.readouterr().err
    assert load_weights(tmp_path / "x.pth", input_scaling="unit").input_scaling == "unit"
    assert capsys.readouterr().err == ""


def test_convert_there_and_back(tmp_path, run_command, all_cnn):
    save_weights(tmp_path / "a.safetensors", all_cnn)
    for source, target in (("a.safetensors", "b.pth"), ("b.pth", "c.keras"), ("c.keras", "d.safetensors")):
        status, output, _ = run_command(convert.main, tmp_path / source, tmp_path / target)
        assert status == 0
        assert "all_cnn, 1,369,738 parameters" in output
    assert_same(load_weights(tmp_path / "d.safetensors"), all_cnn)


def test_convert_says_what_a_file_cannot_hold(tmp_path, run_command, lenet5):
    save_weights(tmp_path / "a.safetensors", dataclasses.replace(lenet5, input_scaling="standardized"))
    status, output, errors = run_command(convert.main, tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert status == 0
    assert "use it with --input-scaling standardized" in output
    assert errors == ""  # no note on the original's scaling
    status, output, _ = run_command(convert.main, tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert "use it with" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.pth", "out.keras"), "no such file"),
        (("a.safetensors", "out.onnx"), "unknown format"),
        (("a.safetensors", "no/out.pth"), "no does not exist"),
        (("a.safetensors", "a.safetensors"), "exists"),
        (("absent.pth", "a.safetensors"), "exists"),  # said before anything is read
        (("a.safetensors", "out.pth", "--model", "all_cnn"), "--model lenet5"),
        (("a.safetensors",), "OUT"),
    ],
)
def test_convert_refuses_in_one_line(tmp_path, monkeypatch, run_command, lenet5, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / "a.safetensors", lenet5)
    before = (tmp_path / "a.safetensors").read_bytes()
    status, _, errors = run_command(convert.main, *arguments)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.usefixtures("direct_convolutions")
def test_evaluate_weights(tmp_path, run_command, use_tiny_dataset, tiny_dataset, lenet5):
    """The file's accuracy equals PyTorch's, computed on the same images."""
    path = tmp_path / "file.pth"
    save_weights(path, lenet5)
    status, output, _ = run_command(evaluate.main, "--weights", path, "--json")
    assert status == 0
    result = json.loads(output)
    network = pytorch.create_model("lenet5").eval()
    state_dict = torch.load(path, weights_only=True)
    del state_dict["xav"]
    network.load_state_dict(state_dict)
    images = (torch.tensor(tiny_dataset.test_images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    labels = torch.tensor(tiny_dataset.test_labels, dtype=torch.int64)
    with torch.no_grad():
        logits = network(images)
    assert result["test_accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert result["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (result["model"], result["num_examples"]) == ("lenet5", 30)
    with torch.no_grad():
        mean = (logits + network(images.flip(-1))) / 2
    _, mirrored, _ = run_command(evaluate.main, "--weights", path, "--json", "--flip-tta")
    expected = torch.nn.functional.cross_entropy(mean, labels).item()
    assert json.loads(mirrored)["test_loss"] == pytest.approx(expected, rel=1e-5)
    _, unit, _ = run_command(evaluate.main, "--weights", path, "--json", "--input-scaling", "unit")
    assert json.loads(unit)["test_loss"] != result["test_loss"]


def test_evaluate_wants_one_source(tmp_path, run_command):
    for arguments in ((), ("--workdir", tmp_path, "--weights", tmp_path / "file.pth")):
        status, _, errors = run_command(evaluate.main, *arguments)
        assert status == 2
        assert "--workdir" in errors
        assert errors.count("\n") == 1


def test_flags_that_do_not_apply_are_refused(tmp_path, run_command):
    status, _, errors = run_command(evaluate.main, "--pretrained", "lenet5", "--checkpoint", "best")
    assert (status, errors.count("\n")) == (2, 1)
    assert "--checkpoint needs --workdir" in errors
    status, _, errors = run_command(convert.main, tmp_path / "x.pth", tmp_path / "out.pth", "--checkpoint", "best")
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: --checkpoint ")
    assert str(tmp_path / "x.pth") in errors
    flags_of_weights = ("--model", "lenet5"), ("--input-scaling", "unit"), ("--architecture", "x.json")
    for flags in (*flags_of_weights, ("--dataset", "digits")):
        status, _, errors = run_command(evaluate.main, "--workdir", tmp_path, *flags)
        assert (status, errors) == (2, f"error: {flags[0]} needs --weights\n")
    for flags in flags_of_weights:
        status, _, errors = run_command(convert.main, tmp_path, tmp_path / "out.pth", *flags)
        assert (status, errors) == (2, f"error: {flags[0]} needs a weight file as IN\n")


@pytest.mark.usefixtures("direct_convolutions", "use_tiny_dataset", "no_figures")
def test_a_run_converts_with_its_average_and_scaling(tmp_path, run_command, plain_config, monkeypatch):
    config = dataclasses.replace(plain_config, num_epochs=1, ema_decay=0.9, input_scaling="standardized")
    summary = train_and_evaluate(config)
    asked = []
    load_run = sources.load_run
    monkeypatch.setattr(sources, "load_run", lambda *arguments: asked.append(arguments[1]) or load_run(*arguments))
    for flags in ((), ("--checkpoint", "best")):
        file = tmp_path / f"{len(flags)}.safetensors"
        assert run_command(convert.main, config.workdir, file, *flags)[0] == 0
        _, output, _ = run_command(evaluate.main, "--weights", file, "--dataset", "digits", "--json")
        result = json.loads(output)
        assert result["input_scaling"] == "standardized"
        assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert asked == ["latest", "best"]
    status, output, _ = run_command(convert.main, config.workdir, tmp_path / "run.pth")  # whose file can't tell these
    assert (status, "--input-scaling standardized" in output, "--dataset digits" in output) == (0, True, True)
    flags = ("--input-scaling", "standardized", "--dataset", "digits", "--json")
    _, output, _ = run_command(evaluate.main, "--weights", tmp_path / "run.pth", *flags)
    assert json.loads(output)["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
