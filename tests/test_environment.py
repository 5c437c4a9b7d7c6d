import platform
import types
from functools import partial

import jax
import pytest

from cifar_jax import environment


def test_the_processor_is_told_where_the_system_tells_it(monkeypatch):
    text = "processor: 0\nmodel name\t: An Abacus: 9\nflags\t: FLAGS\nmodel name\t: other\n"
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(platform, "machine", lambda: "z80")
    hardware = lambda: environment.describe_environment(jax.local_devices())["hardware"]
    for flags, vectors in (("avx avx2 sse", ", AVX2"), ("avx2 avx512f", ", AVX-512"), ("sse", ""), ("", "")):
        file = types.SimpleNamespace(read_text=partial(text.replace, "FLAGS", flags))
        monkeypatch.setattr(environment, "Path", {"/proc/cpuinfo": file}.get)
        assert hardware() == f"4 × cpu, 8 CPU cores (z80, An Abacus: 9{vectors})"

    def absent(name):
        raise FileNotFoundError

    monkeypatch.setattr(environment, "Path", absent)
    assert hardware() == "4 × cpu, 8 CPU cores (z80)"


@pytest.mark.parametrize(("platform", "default"), [("gpu", "TensorFloat-32 where it can"), ("tpu", "bfloat16")])
def test_an_accelerators_precision_is_told(platform, default):
    device = types.SimpleNamespace(platform=platform, device_kind="Abacus 100")
    hardware = lambda: environment.describe_environment([device])["hardware"]
    assert hardware().startswith(f"1 × Abacus 100 (float32 products: {default}), ")
    with jax.default_matmul_precision("highest"):
        assert hardware().startswith("1 × Abacus 100 (float32 products: highest), ")
