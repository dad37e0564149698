"""`jaxops profile`: what a compiled program's text says, own times, and a real trace."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.cost import Peak
from jaxops.workbench import hlo, profile
from jaxops.workbench.command import main
from jaxops.workbench.profile import Line

# Instructions as the CPU's, the TPU's and the GPU's compilers print them, cut to what is read.
TEXT = """HloModule jit_f, is_scheduled=true

%fused_computation (param_0: f32[64,32], param_1: f32[32,16]) -> f32[64,16] {
  %param_0 = f32[64,32]{1,0} parameter(0)
  %param_1 = f32[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %arg = (s32[], f32[64,32]{1,0}) parameter(0)
  %element = f32[64,32]{1,0} get-tuple-element(%arg), index=1
  ROOT %tuple = (s32[], f32[64,32]{1,0}) tuple(%element, %element)
}

ENTRY %main.5 (a: f32[64,32], b: f32[32,16]) -> f32[64,16] {
  %a = f32[64,32]{1,0:T(8,128)} parameter(0)
  %b = f32[32,16]{1,0:T(8,128)} parameter(1)
  %my_fusion.2 = f32[64,16]{1,0} fusion(%a, %b), calls=%fused_computation, metadata={op_name="jit(f)/dot"}
  %loop = (s32[], f32[64,32]{1,0}) while(%a), condition=%cond, body=%body
  %convolution.3 = bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%a, %b), window={}, dim_labels=bf_io->bf
  %kernel = (f32[64,16]{1,0}, pred[8]{0}) custom-call(%a, %my_fusion.2), custom_call_target="tpu_custom_call"
  ROOT %copy.1 = f32[64,16]{1,0} copy(%my_fusion.2)
}
"""


def test_what_instructions_move_and_compute():
    found = hlo.instructions(TEXT)
    product, operands, result = 2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16), 4 * 64 * 16
    assert found["my_fusion.2"] == hlo.Instruction("my_fusion.2", "fusion", operands + result, product, "jit(f)/dot")
    assert (found["convolution.3"].bytes, found["convolution.3"].flops) == (operands + 2 * 64 * 16, product)
    assert (found["kernel"].bytes, found["kernel"].flops) == (4 * 64 * 32 + 2 * result + 8, None)
    assert (found["copy.1"].bytes, found["copy.1"].flops, found["copy.1"].source) == (2 * result, 0, "")
    assert found["loop"].opcode in hlo.CONTROL


def test_the_text_of_a_real_program():
    def f(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]

    x = jnp.ones((16, 16))
    found = hlo.instructions(jax.jit(f).lower(x, x).compile().as_text()).values()
    assert max(instruction.flops or 0 for instruction in found if instruction.opcode != "while") == 2 * 16**3
    assert "while" in {instruction.opcode for instruction in found}


def test_an_instruction_has_the_time_that_no_other_inside_of_it_has():
    events = [
        (0.0, -100.0, "while", {}),
        (10.0, -30.0, "a", {"flops": 5}),
        (15.0, -5.0, "b", {}),
        (50.0, -20.0, "a", {}),
    ]
    own = [(event.name, round(event.seconds * 1e9), event.flops) for event in profile._own_time(events)]
    assert own == [("while", 50, None), ("a", 25, 5.0), ("b", 5, None), ("a", 20, None)]


def test_the_distance_to_the_roofline():
    peak = Peak(1e12, 1e9, "")
    line = Line("a", "", 1, seconds=2e-3, bytes=1e6, flops=1e9)
    assert profile.percent(line, peak) == pytest.approx(50)  # 1 ms for either
    assert profile.percent(Line("a", "", 1, 2e-3, 1e6, None), peak) == pytest.approx(50)
    assert profile.percent(Line("a", "", 1, 2e-3, None, 1e9), peak) is None


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_functions.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def net(x, w):\n"
        "    y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)\n"
        "    return jnp.sort(y, axis=-1).sum(), jnp.argmax(y)\n"
        "_step = jax.jit(lambda x: jnp.tanh(x @ x))\n"
        "def main(): return _step(jnp.ones((32, 32)))\n"
        "def nothing(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_functions"
    sys.modules.pop("my_functions", None)


@pytest.fixture(autouse=True)
def a_small_peak(monkeypatch):
    from jaxops.workbench import timing

    monkeypatch.setattr(timing, "_SIDE", 8)
    monkeypatch.setattr(timing, "_LENGTH", 64)


def test_profile_of_a_function_with_operands(capsys, mine, tmp_path):
    kept = tmp_path / "kept"
    assert main(["profile", f"{mine}:net", "x=64x64", "w=64x64", "--steps", "2", "--keep", str(kept), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 and found["step_seconds"] > 0 and found["trace"] == str(kept)
    assert list(kept.rglob("*.xplane.pb"))
    lines = found["top"]
    assert lines == sorted(lines, key=lambda line: -line["seconds"])
    products = [line for line in lines if line["flops"]]
    assert sum(line["flops"] for line in products) == 3 * 2 * 64**3  # three trips of the loop
    assert all(line["calls"] == 3 and line["bytes"] == 3 * 3 * 4 * 64 * 64 for line in products)
    assert any("dot_general" in line["source"] for line in products)
    assert np.isclose(sum(line["share"] for line in lines), 1) and found["instructions"] == len(lines)
    assert all(line["percent"] > 0 for line in products)
    assert not any(line["name"].startswith("while") for line in lines)


def test_profile_of_a_function_that_takes_nothing(capsys, mine, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["profile", f"{mine}:main", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "A step takes" in out and "Peak: " in out and "my_functions:main" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["my_functions:nothing"], ["the trace holds no instruction"]),
        (["my_functions:net", "x=8x8"], ["missing a required argument: 'w'"]),
        (["my_functions:net", "x=8x8", "w=4x4"], ["my_functions:net:", "(8,)"]),
        (["my_functions:nett"], ["did you mean net?"]),
        (["my_functions:main", "--steps", "0"], ["--steps and --top must be at least 1"]),
        (["my_functions:main", "--keep", "/proc/no/such"], ["--keep", "/proc/no/such"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, capsys, mine):
    assert main(["profile", *arguments]) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err
