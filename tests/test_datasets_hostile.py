import gzip
import os
import pickle
import zlib

import numpy as np
import pytest
from cifar_files import OFFICIAL, official, write_python

from cifar_jax.datasets import load_dataset
from cifar_jax.datasets.pickles import ArrayUnpickler
from cifar_jax.errors import UserError


def unpacks_to(path, content):
    try:
        return gzip.decompress(path.read_bytes()) == content
    except (OSError, EOFError, zlib.error):
        return False


@pytest.mark.parametrize("layout", OFFICIAL)
def test_truncated_files_are_named(layout, small_batches, tmp_path):
    path = official(tmp_path, small_batches, layout)
    if path.is_dir():
        path = sorted(path.iterdir())[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=path.name):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("layout", ["python archive", "binary archive"])
def test_every_changed_bit_of_an_archive_is_noticed(layout, small_batches, tmp_path):
    path = official(tmp_path, small_batches, layout)
    data = path.read_bytes()
    noticed = 0
    for position in np.random.default_rng(0).integers(100, len(data) - 8, 40):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        if unpacks_to(path, gzip.decompress(data)):
            continue  # deflate has a few bits without a meaning, as the lengths of codes that nothing uses
        noticed += 1
        with pytest.raises(UserError, match=f"{path.name}: incomplete or corrupt"):
            load_dataset("cifar10", tmp_path)
    assert noticed > 30


def test_a_page_saved_under_the_archives_name_is_named(tmp_path):
    for content in (b"<html>not found</html>", gzip.compress(b"not a tar" * 1000), b"", gzip.compress(b"")):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: incomplete or corrupt"):
            load_dataset("cifar10", tmp_path)


@pytest.mark.usefixtures("small_batches")
def test_a_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(bytes(2 * 10**6)))
    with pytest.raises(UserError, match="unpacks to more than 1509376 bytes"):
        load_dataset("cifar10", tmp_path)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = {
    "os.system": Evil(os.system, "touch pwned"),
    "eval": Evil(eval, "open('pwned', 'w')"),
    "a codec": Evil(__import__("codecs").encode, b"pwned", "rot13"),
    "a numpy loader": Evil(np.load, "pwned"),
    "an object array": {b"data": np.array([[None]], dtype=object), b"labels": [0]},
    "a fake array": {b"data": Evil(bytearray, 10**12), b"labels": [0]},
}


@pytest.mark.parametrize("what", EVIL)
def test_a_hostile_pickle_runs_nothing(what, small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    (folder / "data_batch_3").write_bytes(pickle.dumps(EVIL[what], protocol=2))
    with pytest.raises(UserError, match="data_batch_3: not a batch of CIFAR-10"):
        load_dataset("cifar10", tmp_path)
    assert not os.path.exists("pwned")


def test_a_pickle_of_a_single_pixel(small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    batch = {b"data": np.array(7, np.uint8), b"labels": list(range(20))}
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_3: .*0 images and 20 labels"):
        load_dataset("cifar10", tmp_path)


def unpickle(data):
    return ArrayUnpickler(data, max_opcodes=1000).load()


def test_a_pickle_can_neither_change_the_reader_nor_fake_pixels():
    # BUILD with a slot state: setattr(_codecs.encode, "__name__", "pwned").
    with pytest.raises(pickle.UnpicklingError, match="the state of something that has none"):
        unpickle(b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__name__X\x05\x00\x00\x00pwneds\x86b.")
    # The number 3 in the place of an array's 3 bytes.
    state = b"(K\x01K\x03\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89%stb."
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R" + state
    assert unpickle(array % b"U\x03abc").buffer == b"abc"
    with pytest.raises(pickle.UnpicklingError, match="not of C-ordered uint8"):
        unpickle(array % b"K\x03")


def test_the_restricted_unpickler_still_reads_what_numpy_writes():
    data = pickle.dumps({"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}, protocol=2)
    batch = unpickle(data)
    assert (batch["data"].shape, batch["data"].buffer, batch["labels"]) == ((2, 3), bytes(range(6)), [1, 2])
