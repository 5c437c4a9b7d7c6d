"""A program that writes the labels and PNG files of a dataset's records to stdout, with limited memory and time.

records.py starts it with a JSON request: {'kind': 'parquet', 'files', 'label', 'count', 'bytes'} or {'kind': 'tfds',
'name', 'split', 'folder', 'label', 'count', 'bytes'}. A record is written as label (int64), lengths of key and PNG file
(uint16 each), key, file. The program does not import cifar_jax, which would import JAX.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

Record = tuple[bytes, int, bytes]  # key, label, PNG file
STACK = 2**21  # bytes of each thread's stack, which counts as memory
THREADS = 2**27  # bytes for 64 of them
STEP = 500  # records read at once


def limit(files_size: int, memory: int = 384 * 2**20, seconds: int = 8) -> None:
    """Limits this process to `memory` bytes plus twice the files' size, and `seconds` plus one second per 2 MB."""
    if os.path.exists("/proc/self/statm"):  # on Linux
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[5]) * resource.getpagesize()
        total = used + THREADS + memory + 2 * files_size
        resource.setrlimit(resource.RLIMIT_DATA, (total, total))
    until = int(time.process_time() + seconds + files_size / 2e6)
    resource.setrlimit(resource.RLIMIT_CPU, (until, until + 1))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read_parquet(request: dict[str, Any]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)
    limit(request["bytes"])
    for path in request["files"]:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=STEP, columns=["img", request["label"]], use_threads=False):
            images, labels = batch.column("img"), batch.column(request["label"])
            for i in range(len(batch)):
                value = images[i].as_py()
                yield b"", labels[i].as_py(), value["bytes"] if isinstance(value, dict) else value


def read_tfds(request: dict[str, Any]) -> Iterator[Record]:
    import array_record.python.array_record_module  # noqa: F401
    import tensorflow_datasets as tfds

    limit(request["bytes"])
    source = tfds.data_source(
        request["name"],
        split=request["split"],
        data_dir=request["folder"],
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    if len(source) != request["count"]:
        raise ValueError(f"{len(source)} records instead of {request['count']}")
    for start in range(0, len(source), STEP):
        for example in source.__getitems__(range(start, min(start + STEP, len(source)))):
            yield example["id"], example[request["label"]], example["image"]


def main() -> None:
    # A batch system may signal all processes: the parent ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stack, most = resource.getrlimit(resource.RLIMIT_STACK)
    if stack == resource.RLIM_INFINITY or stack > STACK:  # threads get the limit in force when the program started
        resource.setrlimit(resource.RLIMIT_STACK, (STACK, most))
        os.execv(sys.executable, sys.orig_argv)
    request = json.loads(sys.argv[1])
    for key, label, png in {"parquet": read_parquet, "tfds": read_tfds}[request["kind"]](request):
        if len(key) >= 2**16 or len(png) >= 2**16:
            raise ValueError("a record is not an image of 32×32 pixels")
        sys.stdout.buffer.write(struct.pack("<qHH", label, len(key), len(png)) + key + png)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:  # records.py reports an ImportError separately, because the files may be fine
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], file=sys.stderr, flush=True)
        os._exit(3 if isinstance(error, ImportError) else 1)
