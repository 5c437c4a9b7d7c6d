import gzip
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from cifar_files import OFFICIAL, official, png, write_imagefolder, write_npz, write_parquet, write_python, write_tfds

from benchmarks.faults.data_files import with_checksum
from cifar_jax.datasets import load_dataset, records
from cifar_jax.datasets.pickles import ArrayUnpickler
from cifar_jax.datasets.png import decode_png
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
            continue  # a few bits in deflate have no meaning, such as lengths of unused codes
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
    with pytest.raises(pickle.UnpicklingError, match="a state"):
        unpickle(b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__name__X\x05\x00\x00\x00pwneds\x86b.")
    # The number 3 instead of an array's 3 bytes.
    state = b"(K\x01K\x03\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89%stb."
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R" + state
    assert unpickle(array % b"U\x03abc").buffer == b"abc"
    with pytest.raises(pickle.UnpicklingError, match="not of C-ordered uint8"):
        unpickle(array % b"K\x03")


def test_the_restricted_unpickler_still_reads_what_numpy_writes():
    data = pickle.dumps({"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}, protocol=2)
    batch = unpickle(data)
    assert (batch["data"].shape, batch["data"].buffer, batch["labels"]) == ((2, 3), bytes(range(6)), [1, 2])


def peak_memory(function):
    """Returns the peak of Python's allocated bytes while `function` raises a UserError, minus the bytes before."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            function()
        return tracemalloc.get_traced_memory()[1], str(error.value)
    finally:
        tracemalloc.stop()


SHARED = b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))  # lists of 2, 4, 8, …, 2⁶⁰ lists
SHARED_TUPLES = b")q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
EXPENSIVE_PICKLES = {
    "a bytearray of 4 GiB": b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".",
    "bytes of 4 GiB": b"\x80\x05\x8e" + (2**32).to_bytes(8, "little") + b".",
    "a memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a number of gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "shared lists": b"\x80\x02}(U\x06labels" + SHARED + b"U\x04dataNu.",
    "shared tuples as a key": b"\x80\x02}" + SHARED_TUPLES + b"Ns.",
    "shared tuples as keys": b"\x80\x02}(" + SHARED_TUPLES + b"Nu.",
    "shared tuples as an encoding": b"\x80\x02c_codecs\nencode\nU\x01a" + SHARED_TUPLES + b"\x86R.",
    "a million lists": b"\x80\x02(" + b"]" * 10**6 + b"t.",
    "a text that is encoded a thousand times": b"\x80\x02c_codecs\nencode\nq\0X\x40\x42\x0f\0" + b"a" * 10**6
    + b"X\x06\0\0\0latin1\x86q\x01" + b"h\0h\x01R" * 1000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("what", EXPENSIVE_PICKLES)
def test_a_small_pickle_that_takes_the_machine(what, small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    (folder / "data_batch_1").write_bytes(EXPENSIVE_PICKLES[what])
    memory, message = peak_memory(lambda: load_dataset("cifar10", tmp_path))
    assert "data_batch_1: not a batch of CIFAR-10" in message
    assert memory < 2**25


def member(name, size=0, kind=tarfile.REGTYPE, content=b"", **fields):
    """Returns a tar member: its header, made by hand if tarfile refuses, and content."""
    info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def with_size(header, field):
    """Returns a header with another text as size."""
    return with_checksum(header[:124] + field.ljust(12, b"\0") + header[136:])


ODD_ARCHIVES = {
    "links": b"".join(
        member(name, kind=kind, linkname=f"cifar-10-batches-py/{name}")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    ),
    "links in a circle": member("data_batch_1", kind=tarfile.LNKTYPE, linkname="cifar-10-batches-py/test_batch")
    + member("test_batch", kind=tarfile.LNKTYPE, linkname="cifar-10-batches-py/data_batch_1"),
    "a link to nothing": member("data_batch_1", kind=tarfile.SYMTYPE, linkname="nothing"),
    "a device": member("data_batch_1", kind=tarfile.CHRTYPE),
    "a sparse member of 6 GiB": with_checksum(
        member("data_batch_1", kind=tarfile.GNUTYPE_SPARSE)[:386]
        + b"00000000000\0" * 8 + b"\0" + b"60000000000\0" + bytes(17)
    ),
    "a size beyond the file": member("data_batch_1", 2**32),
    "a size of 8 GiB and more": member("data_batch_1", 2**60),
    "a size below 0": with_size(member("data_batch_1"), b"-1"),
    "a size that is no number": with_size(member("data_batch_1"), b"nine"),
    "a million headers": member("nothing") * 2000,
    "an extended header without end": member("pax", 2**20, kind=tarfile.XHDTYPE, content=b"6 a=b\n" * 170_000),
    "a header of another checksum": member("data_batch_1")[:-1] + b"x",
    "noise": bytes(range(256)) * 100,
}  # fmt: skip


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("what", ODD_ARCHIVES)
@pytest.mark.parametrize("compressed", [True, False])
def test_an_odd_archive(what, compressed, tmp_path):
    content = ODD_ARCHIVES[what]
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(content) if compressed else content)
    memory, message = peak_memory(lambda: load_dataset("cifar10", tmp_path))
    assert re.search(r"cifar-10-python.tar.gz: (incomplete or corrupt|no file of CIFAR-10)", message)
    assert memory < 2**25


def test_a_pipe_in_the_place_of_a_file(small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    (folder / "data_batch_2").unlink()
    os.mkfifo(folder / "data_batch_2")
    with pytest.raises(UserError, match="data_batch_2"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(UserError, match="is a file"):
        load_dataset("cifar10", folder / "data_batch_2")
    write_imagefolder(tmp_path / "images", small_batches)
    image = next((tmp_path / "images" / "train" / "cat").iterdir())
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(UserError, match=f"{image.name}: not a regular file"):
        load_dataset("cifar10", tmp_path / "images")
    parquet = write_parquet(tmp_path / "parquet", small_batches)
    (file,) = parquet.glob("test-*")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="can't read the test split"):
        load_dataset("cifar10", tmp_path / "parquet")


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def bomb(width, height):
    """Returns a PNG file that declares this many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def padded(image, kind, body, times=1):
    """Returns a PNG file with additional chunks after its header."""
    data = png(image)
    return data[:33] + chunk(kind, body) * times + data[33:]


EXPENSIVE_IMAGES = {
    "13,000² pixels": lambda image: bomb(13_000, 13_000),
    "pixels without end": lambda image: bomb(2**31 - 1, 2**31 - 1),
    "no pixels": lambda image: bomb(0, 0),
    "many bytes": lambda image: png(image) + bytes(10**5),
    "a comment of megabytes": lambda image: padded(image, b"tEXt", b"Comment\0" + b"a" * 10**6),
    "a thousand comments": lambda image: padded(image, b"tEXt", b"", 1000),
    "no end": lambda image: png(image)[:-12],
    "nothing": lambda image: b"",
}


@pytest.mark.parametrize("what", EXPENSIVE_IMAGES)
def test_an_image_that_takes_the_machine(what, small_batches, tmp_path):
    write_imagefolder(tmp_path, small_batches)
    path = next((tmp_path / "train" / "cat").iterdir())
    path.write_bytes(EXPENSIVE_IMAGES[what](small_batches[0][0]))
    memory, message = peak_memory(lambda: load_dataset("cifar10", tmp_path))
    assert path.name in message
    assert memory < 2**25


def test_compressed_comments_are_not_unpacked(small_batches):
    image = small_batches[0][0]
    comment = b"Comment\0\0" + zlib.compress(bytes(10**6))
    np.testing.assert_array_equal(decode_png(padded(image, b"zTXt", comment, 5)), image)


@pytest.mark.parametrize("write", [write_parquet, write_tfds])
@pytest.mark.parametrize("what", ["13,000² pixels", "many bytes"])
def test_a_record_whose_image_takes_the_machine(what, write, small_batches, tmp_path):
    write(tmp_path, small_batches, encode=EXPENSIVE_IMAGES[what])
    memory, message = peak_memory(lambda: load_dataset("cifar10", tmp_path))
    assert "can't read the train split" in message
    assert memory < 2**25


def test_a_parquet_file_that_takes_the_machine(small_batches, tmp_path):
    """Writes a row group of 300 equal values of 4 MiB, which are stored once."""
    folder = write_parquet(tmp_path, small_batches)
    images = pyarrow.DictionaryArray.from_arrays(np.zeros(300, np.int32), pyarrow.array([bytes(2**22)]))
    labels = pyarrow.array(range(300))
    table = pyarrow.table({"img": pyarrow.StructArray.from_arrays([images], names=["bytes"]), "label": labels})
    (path,) = folder.glob("train-*")
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match="can't read the train split"):
        load_dataset("cifar10", tmp_path)


def test_the_readers_limits_hold():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import record_reader\n"
        "record_reader.limit(10**6, seconds=1)\n"
        "try:\n    bytearray(2**30)\n"
        "except MemoryError:\n    print('no memory')\n"
        "while True: pass\n"
    )
    folder = Path(records.__file__).parent
    result = subprocess.run([sys.executable, "-P", "-c", program, folder], capture_output=True, text=True, check=False)
    assert result.stdout == "no memory\n"
    assert result.returncode == -signal.SIGXCPU


def npz_with(path, data, **members):
    """Writes Keras' arrays, with some members replaced by other bytes."""
    write_npz(path, data)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    compression = members.pop("compression", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in {**content, **{f"{name}.npy": value for name, value in members.items()}}.items():
            archive.writestr(name, value)
    return path


def npy(header, content=b""):
    line = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + content


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"
ODD_NPZ = {
    "no array": dict(x_train=b""),
    "a text": dict(x_train=b"pixels"),
    "a header that ends early": dict(x_train=npy("{'descr': '|u1', 'shape': (100")),
    "a header that is no Python": dict(y_train=npy("{'descr' $ }")),
    "a header that is nested deep": dict(y_train=npy("(" * 9000)),
    "a huge shape": dict(y_train=npy(HEADER.format("<i8", (10**18, 1)))),
    "a shape beyond all integers": dict(y_train=npy(HEADER.format("<i8", (10**40,)))),
    "objects": dict(y_train=npy(HEADER.format("|O", (100,)), pickle.dumps(Evil(os.system, "touch pwned")))),
    "records": dict(y_train=npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (100,), }", bytes(400))),
    "floats": dict(x_train=npy(HEADER.format("<f4", (100, 32, 32, 3)), bytes(100 * 3072 * 4))),
    "too few bytes": dict(x_train=npy(HEADER.format("|u1", (100, 32, 32, 3)), bytes(3000))),
    "a gigabyte behind the array": dict(y_train=npy(HEADER.format("|u1", (100,)), bytes(2**27))),
    "another compression": dict(compression=zipfile.ZIP_LZMA),
    "yet another": dict(compression=zipfile.ZIP_BZIP2),
}


@pytest.mark.parametrize("what", ODD_NPZ)
def test_an_odd_npz_file(what, small_batches, tmp_path):
    npz_with(tmp_path / "cifar10.npz", small_batches, **ODD_NPZ[what])
    memory, message = peak_memory(lambda: load_dataset("cifar10", tmp_path))
    assert "cifar10.npz: not CIFAR-10 as a .npz file" in message
    assert memory < 2**25
    assert not os.path.exists("pwned")


def test_a_cut_npz_file_and_one_without_an_array(small_batches, tmp_path):
    path = write_npz(tmp_path / "cifar10.npz", small_batches)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cifar10\.npz: not CIFAR-10"):
        load_dataset("cifar10", tmp_path)
    np.savez(path, x_train=small_batches[0])
    with pytest.raises(UserError, match="y_train"):
        load_dataset("cifar10", tmp_path)
