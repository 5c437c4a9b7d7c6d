"""Damaged files, and files made to exhaust memory or time: each is refused in one line at little cost."""

import bz2
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from frameworks import torch
from weight_files import random_weights

from cifar_jax.errors import UserError
from cifar_jax.weights import hdf5_worker, keras, keras_files, pytorch, torch_pickle
from cifar_jax.weights.files import load_weights, save_weights


@pytest.fixture(scope="module")
def state_dict(lenet5):
    return {name: torch.tensor(array) for name, array in pytorch.params_to_pytorch(lenet5.params).items()}


def memory(name):
    """Returns a line of this process's status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def refused(path, match):
    """Asserts that the file is refused in one line and this process grows by less than 512 MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = memory("VmRSS")
    assert path.stat().st_size < 10 * 2**20
    with pytest.raises(UserError, match=match) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert memory("VmHWM") - before < 512 * 1024


# --- PyTorch ---


def pth_of(path, data_pkl, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in dict(records).items():
            archive.writestr(f"archive/data/{name}", data)


def test_a_pth_of_many_expanded_tensors(tmp_path, state_dict):
    """400 tensors of 16 MiB are views of one number."""
    torch.save({f"conv{i}.weight": torch.zeros(1).expand(2**22) for i in range(400)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "more than 128 MiB")


def test_a_pth_of_very_many_tensors(tmp_path):
    torch.save({f"c{i}.weight": torch.zeros(0) for i in range(2000)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "2000 tensors")


def test_a_pth_of_many_last_layers(tmp_path, monkeypatch):
    """Each of 450 biases could be the last layer's. The networks are not traced for every one."""
    traced = []
    eval_shape = jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda *arguments: traced.append(1) or eval_shape(*arguments))
    torch.save({f"c{i}.bias": torch.zeros(i) for i in range(450)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "450 tensors")
    assert len(traced) <= 2


def test_a_pth_of_many_copies(tmp_path):
    """Copies are not found by comparing all pairs of tensors, which would take minutes."""
    tensors = {f"a{i}": torch.full((1,), i).float().expand(2**15) for i in range(900)}
    torch.save(tensors, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "900 tensors")


PROTOCOL = b"\x80\x02"
PICKLES = {
    "a huge memo": (PROTOCOL + b"Nr\xff\xff\xff\x7f.", "not a state_dict"),
    "a huge byte array": (b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".", "damaged"),
    "a huge string": (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".", "damaged"),
    "a call of bytearray": (b"c__builtin__\nbytearray\n(I4294967296\ntR.", "whole pickled object"),
    "a call of eval": (b"cbuiltins\neval\n(Vprint(1)\ntR.", "whole pickled object"),
    "keys of shared tuples": (PROTOCOL + b"})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "a key is"),
    "lists of shared lists": (PROTOCOL + b"]" + b"q\x00]h\x00ah\x00a" * 60 + b".", "not a state_dict"),
    "a list of itself": (PROTOCOL + b"]q\x00h\x00a.", "not a state_dict"),
    "very many instructions": (PROTOCOL + b"N0" * 1_000_000 + b"N.", "instructions than any"),
    "very deep": (PROTOCOL + b"(" * 100_000 + b"t" * 100_000 + b".", "not a state_dict"),
    "nothing on the stack": (b"\x80\x02s.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "a persistent identity of numbers": (b"\x80\x02K\x01Q.", "whole pickled object"),
    "an extension": (b"\x80\x02\x82\x01.", "damaged"),
    "a number of 100,000 digits": (b"I" + b"9" * 100_000 + b"\n.", "damaged"),
}


@pytest.mark.parametrize("case", list(PICKLES))
def test_a_pickle_that_is_a_bomb(tmp_path, case, capfd):
    content, message = PICKLES[case]
    pth_of(tmp_path / "x.pth", content)
    refused(tmp_path / "x.pth", message)
    legacy = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "y.pth").write_bytes(legacy + content + pickle.dumps([], 2))
    refused(tmp_path / "y.pth", message)
    assert capfd.readouterr().out == ""


def test_nothing_in_a_pickle_is_imported_or_called(monkeypatch):
    called = []
    monkeypatch.setattr("builtins.__import__", lambda *arguments, **_: called.append(arguments))
    found = torch_pickle.read_pickle(io.BytesIO(b"cmy_module\nevil\n(I1\ntR."))
    monkeypatch.undo()
    assert (found, called) == (torch_pickle.Foreign("my_module.evil"), [])


def test_a_compressed_pth(tmp_path):
    pth_of(tmp_path / "x.pth", bytes(2**29), compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "x.pth", "contains more than a state_dict")
    pth_of(tmp_path / "y.pth", bytes(2**20), compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "y.pth", "compressed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (3, 2**40), (1, 1)), "values, more than in any"),
        ((-1, (3,), (1,)), "outside"),
        ((0, (3,), (-1,)), "outside"),
        ((0, (-3,), (1,)), "outside"),
        ((0, (3,), (2**40,)), "outside"),
        ((2**62, (3,), (1,)), "outside"),
        ((0, (3, 3), (1,)), "can't be read"),
        ((0, "ab", (1,)), "can't be read"),
        ((0, (1.5,), (1,)), "can't be read"),
    ],
)
def test_a_tensor_outside_its_storage(tmp_path, arguments, message):
    class Record:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), *arguments, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 3) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a.weight": Record()})
    pth_of(tmp_path / "x.pth", buffer.getvalue(), {"0": bytes(12)})
    refused(tmp_path / "x.pth", message)


# --- Keras ---


def test_keras_members_that_hold_more_than_they_say(tmp_path):
    """The header declares 1,000 bytes. The reader trusts neither it nor the compressed size."""
    for name, method in (("d", zipfile.ZIP_DEFLATED), ("b", zipfile.ZIP_BZIP2), ("l", zipfile.ZIP_LZMA)):
        path = tmp_path / f"{name}.keras"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("config.json", "{}")
            with archive.open("model.weights.h5", "w") as member:
                for _ in range(10):
                    member.write(bytes(2**22))
        data = path.read_bytes()
        size = (2**22 * 10).to_bytes(4, "little")
        assert size in data
        path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
        refused(path, "model.weights.h5|config.json|damaged")


def test_an_architecture_nested_very_deep(tmp_path):
    for text in ("[" * 100_000, '{"config":' * 100_000, '{"class_name":"Sequential","config":[' * 50_000):
        with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
            archive.writestr("config.json", text)
            buffer = io.BytesIO()
            h5py.File(buffer, "w").close()
            archive.writestr("model.weights.h5", buffer.getvalue())
        refused(tmp_path / "x.keras", "architecture is not valid JSON")
    deep = {"class_name": "Sequential", "config": []}
    for _ in range(300):
        deep = {"class_name": "Sequential", "config": [deep]}
    (tmp_path / "x.json").write_text(json.dumps(deep))
    save_weights(tmp_path / "w.safetensors", random_weights("lenet5"))
    with pytest.raises(UserError, match=r"x\.json: "):
        load_weights(tmp_path / "w.safetensors", architecture=tmp_path / "x.json")


def legacy_h5(path, names, fill):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"a"]
        group = file.create_group("a")
        group.attrs["weight_names"] = [name.encode() for name in names]
        fill(group)


def huge_chunk(group):
    group.create_dataset("k/kernel:0", (3,), "f4", maxshape=(None,), chunks=(2**29,), compression="gzip")


def pipe_link(group):
    os.mkfifo("pipe.h5")
    group["k/kernel:0"] = h5py.ExternalLink("pipe.h5", "/x")


def external_storage(group):
    group.create_dataset("k/kernel:0", (3,), "f4", external=[("pipe", 0, 12)])


def strings(group):
    group["k/kernel:0"] = np.array([b"a", b"b"])


def variable_strings(group):
    group.create_dataset("k/kernel:0", (3,), h5py.string_dtype())


def compound(group):
    group.create_dataset("k/kernel:0", (3,), np.dtype([("a", "f4"), ("b", "f4")]))


def enumeration(group):
    group.create_dataset("k/kernel:0", (3,), h5py.enum_dtype({"a": 1, "b": 2}))


def references(group):
    group.create_dataset("k/kernel:0", (3,), h5py.ref_dtype)


def ragged(group):
    group.create_dataset("k/kernel:0", (3,), h5py.vlen_dtype("f4"))


def arrays_inside(group):
    group.create_dataset("k/kernel:0", (3,), np.dtype(("f4", (2**20,))))


def empty(group):
    group["k/kernel:0"] = h5py.Empty("f4")


def committed_type(group):
    group["k/kernel:0"] = np.dtype("f4")


@pytest.mark.parametrize(
    "fill",
    [huge_chunk, pipe_link, external_storage, strings, variable_strings, compound, enumeration, references, ragged,
     arrays_inside, empty, committed_type],
)  # fmt: skip
def test_odd_datasets(tmp_path, monkeypatch, fill):
    monkeypatch.chdir(tmp_path)
    legacy_h5(tmp_path / "x.h5", ["k/kernel:0"], fill)
    refused(tmp_path / "x.h5", "k/kernel:0|damaged")


def test_one_tensor_named_many_times(tmp_path):
    fill = lambda group: group.create_dataset("k/kernel:0", (2**22,), "f8", chunks=(2**16,), compression="gzip")
    legacy_h5(tmp_path / "x.h5", ["k/kernel:0"] * 250, fill)
    refused(tmp_path / "x.h5", "more than 128 MiB")
    legacy_h5(tmp_path / "y.h5", ["k/kernel:0"] * 3000, fill)
    refused(tmp_path / "y.h5", "lists 3000 names")


@pytest.mark.parametrize("attribute", [3, b"abc", np.zeros((2, 2)), h5py.Empty("S1"), np.array([1.5]), "é"])
@pytest.mark.parametrize("name", ["layer_names", "weight_names", "model_config", "backend", "cifar_jax"])
@pytest.mark.usefixtures("keras_files_read_here")
def test_attributes_of_other_types(tmp_path, lenet5, name, attribute):
    path = tmp_path / "x.h5"
    save_weights(path, lenet5)
    with h5py.File(path, "a") as file:
        places = {"layer_names": "model_weights", "weight_names": "model_weights/conv2d_1"}
        file[places.get(name, "/")].attrs[name] = attribute
    if name == "backend":
        assert load_weights(path).model == "lenet5"  # only Theano's matters
    else:
        refused(path, "damaged|can't be read|not a Keras architecture|metadata|layer .* is missing|kernel|tensor")


def test_links_that_go_round(tmp_path):
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        group = file.create_group("layers/conv2d/vars")
        for name in ("a", "b"):
            group[name] = file["layers"]
    refused(tmp_path / "x.weights.h5", "groups|tensors|tensor")


def test_a_reader_that_crashes_hangs_or_says_nonsense(tmp_path, monkeypatch, lenet5):
    """libhdf5 does so for a few files in ten thousand."""
    save_weights(tmp_path / "x.h5", lenet5)
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(keras_files.hdf5_worker, "__file__", str(worker))
    for code, message in (
        ("import os; os.abort()", "SIGABRT"),
        ("raise SystemExit(3)", "status 3"),
        ("import sys; sys.exit('what went wrong')", "what went wrong"),
        ("", "process that read it failed"),
    ):
        worker.write_text(code)
        refused(tmp_path / "x.h5", message)
    monkeypatch.setattr(keras_files, "TIMEOUT", 0.5)
    worker.write_text("import time; time.sleep(60)")
    refused(tmp_path / "x.h5", "more than 0.5 seconds")


def test_the_readers_limits(tmp_path):
    """The reader's process has limits of memory and CPU time. The latter ends it by a signal."""
    code = f"""if True:
        import sys; sys.path.insert(0, {os.path.dirname(hdf5_worker.__file__)!r})
        import hdf5_worker
        hdf5_worker.CPU_SECONDS = 1
        hdf5_worker.limit()
        try:
            bytearray(2**29)
        except MemoryError:
            print("no memory", flush=True)
        while True:
            pass"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "no memory\n"
    assert result.returncode < 0


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path, monkeypatch, lenet5):
    """The reader's process has its own path, works for a script without a main guard, and ignores PYTHONPATH."""
    for name in ("h5py", "numpy", "zipfile", "json", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    save_weights(tmp_path / "x.keras", lenet5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert load_weights(tmp_path / "x.keras").model == "lenet5"


# --- Paths and formats ---


@pytest.mark.parametrize("kind", ["pth", "keras"])
def test_a_damaged_table_of_contents(tmp_path, kind, lenet5):
    save_weights(tmp_path / f"x.{kind}", lenet5)
    data = bytearray((tmp_path / f"x.{kind}").read_bytes())
    start = data.rindex(b"PK\x01\x02")
    for offset, value in ((0, b"\x00"), (46, b"\xff"), (6, b"\xff\xff")):
        damaged = bytearray(data)
        damaged[start + offset : start + offset + len(value)] = value
        if offset == 46:  # a name that is not UTF-8
            damaged[start + 9] |= 8
        (tmp_path / f"y.{kind}").write_bytes(damaged)
        refused(tmp_path / f"y.{kind}", "damaged")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("pth", name) for name in ("x", "x.ckpt", "x.bin", "x.tar", "x.pth.tar", "x.h5", "x.safetensors")),
        *(("h5", name) for name in ("x.hdf5", "x.keras", "x.pth")),
        *(("weights.h5", name) for name in ("x.h5", "x.tar")),
        *(("keras", name) for name in ("x.h5", "x.zip")),
        *(("safetensors", name) for name in ("x.pth", "x.bin")),
    ],
)
def test_the_content_says_what_a_file_is(tmp_path, lenet5, kind, name):
    save_weights(tmp_path / f"source.{kind}", lenet5)
    os.rename(tmp_path / f"source.{kind}", tmp_path / name)
    loaded = load_weights(tmp_path / name)
    np.testing.assert_array_equal(loaded.params["Dense_0"]["kernel"], lenet5.params["Dense_0"]["kernel"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (bz2.compress(b"a"), "unpack it"),
        (b"\x1f\x8b" + bytes(100), "unpack it"),
        (bytes(257) + b"ustar" + bytes(300), "unpack it"),
        (pickle.dumps({"a": 1}), "torch.save did not write"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "damaged"),
        (b"\xff" * 8 + b"{", "damaged"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", message)


def test_places_of_other_kinds(tmp_path, lenet5):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match="is a SavedModel"):
        load_weights(tmp_path / "saved")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="no such file"):
        load_weights(tmp_path / "pipe.pth")
    save_weights(tmp_path / "x.safetensors", lenet5)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="not a Keras architecture"):
        load_weights(tmp_path / "x.safetensors", architecture=tmp_path / "pipe.json")


def test_keras_is_not_needed(tmp_path, monkeypatch, lenet5):
    monkeypatch.setitem(sys.modules, "keras", None)
    for kind in ("h5", "weights.h5", "keras"):
        save_weights(tmp_path / f"x.{kind}", lenet5)
        assert load_weights(tmp_path / f"x.{kind}").model == "lenet5"
    with pytest.raises(UserError, match="Keras or its backend"):
        keras.create_model("lenet5")


def test_ctrl_c_does_not_reach_the_program_that_reads(tmp_path, process_groups):
    with pytest.raises(UserError):
        keras_files.read_keras(tmp_path / "none.h5")
    assert process_groups
    assert os.getpgrp() not in process_groups
