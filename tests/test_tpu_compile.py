"""The reader of optimised HLO, on a small program; the command; and, where libtpu is installed, LeNet-5's step."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo, tpu_compile, tpu_programs
from benchmarks.report.results import ROOT
from cifar_jax.configs import RECIPES
from cifar_jax.parallel import Parallel

# A loop over steps with a loop of 64 rounds inside, in the form that XLA prints for TPUs.
TEXT = """\
HloModule jit__fun, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }

%rounds (p.1: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p.1 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) parameter(0)
  %slice.1 = f32[10]{0:T(128)} fusion(%p.1), kind=kLoop, calls=%f, @7
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) tuple(%p.1, %slice.1)
}

%more (p.2: (s32[], f32[10])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(64)
  %p.2 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %compare.2 = pred[]{:T(512)} compare(%i.2, %constant.1), direction=LT
}

%step (p.3: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p.3 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %fusion.3 = f32[10]{0:T(128)} fusion(%p.3), kind=kOutput, calls=%f, @1000
  %gather.3 = u8[4,32,32,3]{3,2,1,0} fusion(%p.3), kind=kCustom, calls=%f
  %while.3 = (s32[], f32[10]{0:T(128)S(1)}) while(%p.3), condition=%more, body=%rounds, op_name="body/vmap()/gather"
  %all-reduce.3 = (f32[2,5]{1,0:T(8,128)S(1)}, f32[]) all-reduce(%fusion.3, %p.3), {"emitter":"A","strategy":"B"}
  ROOT %tuple.3 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) tuple(%p.3, %fusion.3)
}

%more_steps (p.4: (s32[], f32[10], s32[])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i.4 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  %n.4 = s32[]{:T(128)} constant(196)
  ROOT %compare.4 = pred[]{:T(512)} compare(%i.4, %n.4), direction=LT
}

ENTRY %main.5_spmd (p.5: f32[10], data.5: u8[5,3,32]) -> (f32[10], s32[]) {
  %data.5 = u8[5,3,32]{0,2,1:T(32,128)(4,1)} parameter(1), sharding={replicated}
  %copy.5 = u8[5,3,32]{2,1,0:T(8,128)(4,1)} copy(%data.5), @500
  ROOT %while.5 = (s32[]{:T(128)}, f32[10]{0:T(128)S(1)}) while(%copy.5), condition=%more_steps, body=%step
}
"""
HLO = re.sub(r"@(\d+)", r'backend_config={"window_config":{"estimated_cycles":"\1"}}', TEXT)


def changed(*pairs):
    text = HLO
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return hlo.parse(text, 196)


def test_a_step_is_the_body_of_the_loop_with_as_many_rounds():
    program = hlo.parse(HLO, 196)
    assert (program.entry, program.step) == ("main.5_spmd", "step")
    assert hlo.cycles(program, program.step) == (1000 + 64 * 7, 1)
    assert hlo.cycles(program, program.entry) == (500, 0)
    assert hlo.loops(program) == [{"operation": "vmap()/gather", "times": 64, "cycles": 448}]
    assert hlo.loops(changed(("body/vmap()", "body/closed_call/vmap()"))) == hlo.loops(program)
    one = hlo.parse(HLO.replace("constant(196)", "constant(3)"), 1)
    assert one.step == one.entry  # the call is one step, and the loop is part of it
    assert hlo.cycles(one, one.step) == (500 + 3 * 1448, 3)


def test_a_loop_over_steps_must_be_known_from_others():
    line = "  %while.6 = f32[10] while(%copy.5), condition=%more_steps, body=%rounds\n  ROOT %while.5"
    with pytest.raises(ValueError, match="2 loops of 196 rounds"):
        changed(("  ROOT %while.5", line))
    with pytest.raises(ValueError, match="0 loops of 196 rounds"):  # the length is an argument
        changed(("%n.4 = s32[]{:T(128)} constant(196)", "%n.4 = s32[]{:T(128)} get-tuple-element(%p.4), index=2"))


def test_sizes_of_arrays():
    assert hlo.array_bytes("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0}, pred[], u8[7])") == 24 + 8 + 1 + 7
    assert hlo.padded_bytes("f32[2,3]{1,0:T(8,128)S(1)}") == 4 * 8 * 128
    assert hlo.padded_bytes("u8[5,3,32]{0,2,1:T(32,128)(4,1)}") == 128 * 32 * 3
    assert hlo.padded_bytes("s32[]") == 4
    assert hlo.copied_per_call(hlo.parse(HLO, 196)) == 128 * 32 * 3 + 128 * 8 * 5


def test_collectives_donations_and_transfers():
    program = hlo.parse(HLO, 196)
    common = {"per": "step", "times": 1, "arrays": 2, "bytes": 44, "strategy": "B"}
    assert hlo.collectives(program) == [{"operation": "all-reduce", **common}]
    assert hlo.donated(program) == 2
    assert hlo.transfers(program) == []
    started = changed((") all-reduce(", ") all-gather-start("))
    assert hlo.collectives(started) == [{"operation": "all-gather", **common}]
    assert hlo.transfers(changed(("fusion(%p.3), kind=kCustom", "send(%p.3), kind=kCustom"))) == ["gather.3"]
    assert hlo.transfers(
        changed(("%copy.5 = u8[5,3,32]{2,1,0:T(8,128)(4,1)}", "%copy.5 = u8[5,3,32]{2,1,0:S(5)}"))
    ) == ["copy.5"]


@pytest.mark.parametrize(
    ("pairs", "surprise"),
    [
        ([], None),
        ([(") all-reduce(", ") all-gather(")], "other than all-reduce"),
        ([(") all-reduce(", ") add(")], "0 bytes of all-reduce for 40"),
        ([("f32[2,5]{1,0:T(8,128)S(1)}, f32[]", "f32[2,5]{1,0:T(8,128)S(1)}, f32[1000]")], "4040 bytes"),
        ([("  %copy.5", "  %r.5 = f32[] all-reduce(%data.5)\n  %copy.5")], "outside of the steps"),
        ([("%fusion.3 = f32[10]", "%fusion.3 = f64[10]")], "float64"),
        ([("u8[5,3,32]{2,1,0:T(8,128)(4,1)} copy", "u8[5,3,32]{2,1,0:S(5)} copy")], "chip and host"),
        ([(", {1}: (2, {}, may-alias)", "")], "donated"),
    ],
)
def test_surprises(pairs, surprise):
    found = tpu_programs.surprises(changed(*pairs), "training", gradient_bytes=40, num_donated=2, num_chips=4)
    assert [surprise in line for line in found] == ([True] if surprise else [])


def test_fixed_scales_have_no_gradients():
    params = {"Conv_0": {"kernel": np.zeros((3, 3), np.float32), "scale": np.zeros(3, np.float32)}}
    learnt, fixed = (
        dataclasses.replace(RECIPES["lenet5"], normalization="batch", normalization_scale=scale)
        for scale in ("learnt", "fixed")
    )
    assert tpu_programs.count_gradient_bytes(learnt, params) == 48
    assert tpu_programs.count_gradient_bytes(fixed, params) == 36


def test_a_program_lowers_for_shapes_as_for_arrays():
    function = lambda x, y, device: (x + jax.lax.psum(x * device.astype(x.dtype), "devices"), y)
    program = Parallel(function, jax.local_devices()[:2], (0,), {})
    arrays = jnp.ones((3, 2)), jnp.ones(2)
    x, y = tpu_programs.shapes(arrays)
    assert program.lower(x, y).as_text() == program.lower(*map(jnp.copy, arrays)).as_text()
    assert program.compile(x, y)(*arrays)[0].tolist() == [[2, 2]] * 3


def test_a_batch_that_does_not_divide_is_given_to_each_chip():
    config = RECIPES["lenet5_reference"]
    assert tpu_programs.fit_batch(config, 2) == (config, "strong")
    assert tpu_programs.fit_batch(config, 16) == (dataclasses.replace(config, batch_size=64), "weak")


def test_the_default_plan_and_chosen_ones():
    plan = lambda **chosen: tpu_compile.plan(tpu_compile.Arguments(out=ROOT, **chosen))
    pairs = plan()
    assert {recipe for recipe, topology in pairs if topology == "v5e:2x2"} == set(RECIPES)
    assert ("lenet5", "v5e:16x16") in pairs
    assert plan(recipe=("lenet5",)) == [("lenet5", "v5e:2x2")]
    assert plan(topology=("v6e:1x1",)) == [(recipe, "v6e:1x1") for recipe in RECIPES]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology", "v9:2x2"), "--topology v9:2x2"),
        (("--topology", "v5e:4"), "--topology v5e:4"),
        (("--recipe", "resnet"), "--recipe resnet"),
        (("--recipe",), "one or more"),
        ((), "pip install -e '.[tpu]'"),
    ],
)
def test_errors_are_one_line_and_status_2(flags, message, run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_compile, "find_spec", lambda name: None)
    status, _, errors = run_command(tpu_compile.main, "--out", tmp_path / "new", *flags)
    assert (status, errors.count("\n"), message in errors) == (2, 1, True), errors
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_the_steps_of_lenet5_compile_for_four_chips(tmp_path):
    flags = ("--recipe", "lenet5", "--topology", "v5e:2x2", "--out", str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    command = [sys.executable, "-m", "benchmarks.tpu_compile", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    training, evaluation = json.loads((tmp_path / "tpu_compile.json").read_text())["programs"]
    assert training["surprises"] == evaluation["surprises"] == []
    assert (training["chips"], training["images_per_chip"]) == (4, 64)
    assert training["gradient_bytes"] == 4 * 395_006
    assert sum(one["bytes"] for one in training["collectives"]) >= 4 * 395_006
    assert sum(one["bytes"] for one in evaluation["collectives"]) <= 64
    assert training["flops"] > 2e9  # 64 images, 12.7 MFLOP forward and twice as many backward
    assert training["argument_bytes"] > 50_000 * 32 * 32 * 3  # the dataset lies on every chip
    assert training["argument_bytes"] + training["temporary_bytes"] < 2e9
