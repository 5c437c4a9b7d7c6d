import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from cifar_files import assert_loads, write_python, write_tfds

from cifar_jax.datasets import load_dataset, records
from cifar_jax.errors import UserError


def test_by_a_relative_path_or_a_link(small_batches, tmp_path, monkeypatch):
    folder = write_tfds(tmp_path / "original", small_batches)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "cifar10" / "3.0.2").symlink_to(tmp_path / "linked")
    for place, data_dir in [(".", "."), ("cifar10", "."), ("cifar10", "3.0.2")]:
        monkeypatch.chdir(tmp_path / place)
        assert_loads(small_batches, data_dir)


def test_a_damaged_shard(small_batches, tmp_path):
    folder = write_tfds(tmp_path, small_batches)
    shard = next(folder.glob("cifar10-train.array_record-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"3\.0\.2: can't read the train split"):
        load_dataset("cifar10", tmp_path)


def test_a_description_that_is_nested_too_deep(small_batches, tmp_path):
    folder = write_tfds(tmp_path, small_batches)
    (folder / "dataset_info.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"3\.0\.2: can't read the train split"):
        load_dataset("cifar10", tmp_path)


def test_a_tfrecord_copy_is_passed_over_if_there_is_another(small_batches, tmp_path, monkeypatch, capsys):
    folder = write_tfds(tmp_path, small_batches)
    for file in folder.glob("*.array_record*"):
        shutil.move(file, str(file).replace("array_record", "tfrecord"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write_python(Path("data/cifar-10-batches-py"), small_batches)
    assert_loads(small_batches)
    assert "file_format='array_record'" in capsys.readouterr().err
    with pytest.raises(UserError, match="file_format='array_record'"):
        load_dataset("cifar10", tmp_path)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    assert "file_format='array_record'" in capsys.readouterr().err


def test_a_signal_to_all_processes_of_a_job_does_not_end_the_program_that_reads(small_batches, tmp_path, monkeypatch):
    """The parent stops it. Otherwise its end would look like damaged files."""
    write_tfds(tmp_path, small_batches)
    receive = records._receive

    class Signalled(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def late(stream, count):
        head = stream.peek(1)  # the program runs
        assert head
        for number in (signal.SIGTERM, signal.SIGHUP):
            started[-1].send_signal(number)
        return receive(stream, count)

    started = []
    monkeypatch.setattr(subprocess, "Popen", Signalled)
    monkeypatch.setattr(records, "_receive", late)
    assert_loads(small_batches, tmp_path)
    assert started


def test_ctrl_c_does_not_reach_the_program_that_reads(small_batches, tmp_path, process_groups):
    write_tfds(tmp_path, small_batches)
    assert_loads(small_batches, tmp_path)
    assert process_groups
    assert os.getpgrp() not in process_groups
