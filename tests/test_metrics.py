import io

import numpy as np
import pytest

from cifar_jax.errors import UserError
from cifar_jax.metrics import EpochMetrics, RunLog, is_stalled, read_batch_loss, read_metrics

ROW = EpochMetrics(1, 1.5, 0.25, 1.25, 0.5, 0.01, 2.0, 100.0)
LOSSES = np.array([2.0, 1.0], np.float32)


def test_round_trip(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_batch_loss(tmp_path).shape == (0,)
    log = RunLog()
    for _ in range(2):
        log.add(ROW, LOSSES)
    log.write(tmp_path)
    assert read_metrics(tmp_path) == [ROW, ROW]
    np.testing.assert_array_equal(read_batch_loss(tmp_path), [2, 1, 2, 1])
    assert read_batch_loss(tmp_path).dtype == np.float32


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("0.25", "nan"),
        lambda text: "epoch,train_loss\n1,x\n",
        lambda text: text[:-20],
        lambda text: text + "1,2\n",
        lambda text: text.replace("epoch", "step"),
        lambda text: text + '"' + "x" * 200_000,
        lambda text: "\0",
    ],
)
def test_damaged_metrics_are_named(change, tmp_path):
    RunLog([ROW], LOSSES).write(tmp_path)
    (tmp_path / "metrics.csv").write_text(change((tmp_path / "metrics.csv").read_text()))
    with pytest.raises(UserError, match=r"metrics\.csv: "):
        read_metrics(tmp_path)


def array(header):
    """Returns a .npy file with this header and 8 bytes."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)


def zip_of_an_array():
    file = io.BytesIO()
    np.savez(file, LOSSES)
    return file.getvalue()


HEADERS = {
    "not closed": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,",
    "no token": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }$ \\",
    "no syntax": "{'descr' '<f4' 'shape' = (2,)}",
    "deep": "(" * 100,
    "huge shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }",
    "larger than any": "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999999999999,), }",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-9,), }",
    "bad type": "{'descr': '<q99', 'fortran_order': False, 'shape': (2,), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "no keys": "{}",
    "two axes": "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }",
    "double": "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }",
}
FILES = {name: array(header) for name, header in HEADERS.items()}
FILES |= {"empty": b"", "magic alone": b"\x93NUMPY", "zip": zip_of_an_array(), "cut zip": zip_of_an_array()[:-30]}


@pytest.mark.parametrize("name", FILES)
def test_damaged_losses_are_named_whatever_numpy_raises(name, tmp_path):
    (tmp_path / "batch_loss.npy").write_bytes(FILES[name])
    with pytest.raises(UserError, match=r"batch_loss\.npy: "):
        read_batch_loss(tmp_path)


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [
        ([2.4] * 100 + [2.302] * 500, True),
        ([2.302] * 499, False),
        ([], False),
        ([2.302] * 500 + [2.0] * 100, False),
        (np.linspace(6, 1, 500), False),
        ([2.2] * 500, False),
        ([2.297] * 500, False),
        ([2.299] * 500, True),
        ([2.4] * 500, True),
        ([2.405] * 500, False),
        ([2.302] * 400 + [np.nan] * 100, False),
    ],
)
def test_is_stalled(losses, stalled):
    assert is_stalled(np.array(losses, np.float32), 10) == stalled


def test_chance_depends_on_the_number_of_classes():
    losses = np.full(500, np.log(100), np.float32)
    assert is_stalled(losses, 100)
    assert not is_stalled(losses, 10)
