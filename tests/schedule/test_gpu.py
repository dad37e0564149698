"""The GPU profile against an independent one on real machine code, and its parts on code that is counted by hand."""

import json
import pathlib

import pytest

from jaxops import schedule
from jaxops.schedule import gpu
from pallas_kernels import chips
from tests.schedule import dumps

NEAR = 0.10  # relative
H100 = chips.named("h100")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Name of a recorded program → its one kernel."""

    def read(name):
        folder = dumps.unpacked(name, tmp_path_factory.mktemp(name))
        (source,) = folder.glob("*.ptx")
        report, code = (source.with_suffix(ending).read_text() for ending in (".report", ".sass"))
        (found,) = gpu.profile(source.read_text(), report, code, H100, gpu.launches_of(folder))
        return found

    return read


@pytest.mark.parametrize("name", dumps.GPU)
def test_it_agrees_with_an_independent_profile(kernel, name):
    expected = dumps.FIGURES["gpu"][name]["kernel"]
    found = kernel(name)
    for key in ("name", "registers", "spill_store_bytes", "spill_load_bytes", "smem_bytes", "threads"):
        assert getattr(found, key) == expected[key], key
    assert found.blocks_per_core == expected["blocks_per_core"] and found.occupancy == expected["occupancy"]
    hottest, figures = found.loops[0], expected["hottest"]
    for key in ("total", "tensor_clocks", "special_clocks", "fp32_clocks"):
        assert getattr(hottest, key) == pytest.approx(figures[key], rel=NEAR), key
    for name_, count in figures["instructions"].items():
        assert hottest.instructions.get(name_, 0) == pytest.approx(count, rel=NEAR), name_
    assert len(found.loops) == expected["loops"]


def test_figures_that_follow_from_the_kernel(kernel):
    attention = kernel("attention_h100")
    assert attention.grid == (2, 32, 16) and attention.limiter == "registers"
    hottest = attention.loops[0]
    # A trip multiplies 64 rows of a warpgroup by 128 keys, twice: scores and values, head_dim 128.
    assert hottest.tensor_clocks == 2 * 64 * 128 * 128 / 4 / H100.tensor_fma
    assert hottest.bound == "tensor cores" and hottest.special_clocks >= 8 * 64 * 128 / 128
    assert kernel("rms_norm_h100").loops[0].bound == "instruction issue"


def test_figures_are_json(kernel):
    found = kernel("attention_h100")
    (again,) = json.loads(json.dumps(schedule.figures([found])))
    assert again["grid"] == [2, 32, 16] and again["loops"][0]["span"] == list(found.loops[0].span)
    assert schedule.program_seconds([found]) is None and schedule.program_seconds([]) is None


# ------------------------------------------------------------------------------------------------------- by hand


def listing(*lines: str) -> str:
    """Machine code as nvdisasm prints it; a line that ends in a colon is a label."""
    printed = [".section .text.k", ".text.k:"]
    for number, line in enumerate(lines):
        guard, _, rest = line.rpartition("| ")
        printed.append(line if line.endswith(":") else f"        /*{16 * number:04x}*/  {guard:>8} {rest} ;")
    return "\n".join(printed)


def function(*lines: str) -> gpu.Function:
    return gpu.disassembled(listing(*lines))["k"]


NESTED = function(
    "MOV R1, R2",
    ".L_outer:",  # instruction 1
    "FADD R1, R1, R2",
    ".L_inner:",  # instruction 2
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
    "MUFU.EX2 R3, R3",
    "@P0| BRA `(.L_inner)",
    "FFMA R1, R1, R2, R3",
    "@!P1| BRA `(.L_outer)",
    "EXIT",
    ".L_end:",  # behind the end: what is unreachable is in no loop
    "BRA `(.L_end)",
)


def test_loops_are_found_and_the_inner_comes_first():
    assert sorted(gpu.natural_loops(NESTED)) == [(1, 2, 3, 4, 5, 6), (2, 3, 4)]
    inner, outer = gpu._ranked(NESTED, H100)
    assert (inner.span, outer.span) == ((2, 4), (1, 6))
    assert inner.instructions == {"tensor": 1, "special": 1, "branch": 1} and inner.total == 3
    assert inner.tensor_clocks == 16 * 128 * 16 / 512 and inner.special_clocks == 8 and inner.bound == "tensor cores"
    assert outer.instructions["fp32"] == 2 and outer.fp32_clocks == 2


def test_float32_takes_twice_the_clocks_on_half_the_lanes():
    body = function(".L_a:", "FADD R1, R1, R2", "FADD R1, R1, R2", "@P0| BRA `(.L_a)", "EXIT")
    assert gpu._ranked(body, chips.named("a100"))[0].fp32_clocks == 4
    assert gpu._ranked(body, H100)[0].fp32_clocks == 2


def test_a_loop_with_two_ways_through_holds_both():
    branches = function(
        ".L_top:", "ISETP R1, R2", "@P0| BRA `(.L_else)", "FADD R1, R1, R1", "BRA `(.L_join)",
        ".L_else:", "FMUL R1, R1, R1", ".L_join:", "@P1| BRA `(.L_top)", "EXIT",
    )  # fmt: skip
    assert gpu.natural_loops(branches) == [(0, 1, 2, 3, 4, 5)]


def test_a_spin_on_a_barrier_is_no_loop():
    spin = function(".L_a:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3", "@!P0| BRA `(.L_a)", "EXIT")
    assert gpu.natural_loops(spin) == []


@pytest.mark.parametrize(
    ("registers", "threads", "smem", "expected"),
    [
        (32, 256, 0, (8, "threads")),
        (32, 32, 0, (32, "blocks")),
        (128, 256, 0, (2, "registers")),
        (168, 384, 1024, (1, "registers")),
        (64, 128, 100 * 1024, (2, "shared memory")),
        (255, 128, 0, (2, "registers")),
    ],
)
def test_occupancy(registers, threads, smem, expected):
    assert gpu._blocks_per_core(registers, threads, smem, H100) == expected


def test_spills_are_read_off_the_report():
    report = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n    16 bytes stack frame, 24 bytes spill stores, "
        "40 bytes spill loads\nptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem\n"
    )
    ptx = ".visible .entry k(\n)\n.reqntid 64, 2, 1\n{"
    (found,) = gpu.profile(ptx, report, listing("EXIT"), H100, {"k": gpu.Launch(1000)})
    assert (found.stack_bytes, found.spill_store_bytes, found.spill_load_bytes) == (16, 24, 40)
    assert (found.registers, found.threads, found.smem_bytes, found.loops) == (255, 128, 1512, ())
    with pytest.raises(schedule.ScheduleError, match="k: ptxas or nvdisasm did not finish it"):
        gpu.profile(ptx, report, "", H100)


# -------------------------------------------------------------------------------------------------- dumps that fail


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty.ptx").write_text(".version 8.0\n")
    with pytest.raises(schedule.ScheduleError, match=r"holds no PTX: compile with .*environment"):
        gpu.read(tmp_path, H100)


def test_missing_tools_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    dumps.unpacked("rms_norm_h100", tmp_path)
    with pytest.raises(schedule.ScheduleError, match=r"ptxas is missing: pip install 'jaxops\[gpu-compile\]'"):
        gpu.read(tmp_path, H100)


def test_what_a_tool_says_is_told(tmp_path, monkeypatch):
    """Stands in for ptxas: it refuses its input, as ptxas does with half a file."""
    tools = tmp_path / "nvidia" / "cu13" / "bin"
    tools.mkdir(parents=True)
    for name in ("ptxas", "nvdisasm"):
        path = pathlib.Path(tools / name)
        path.write_text("#!/bin/sh\necho 'fatal: line 7: parse error' >&2\nexit 255\n")
        path.chmod(0o755)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    dumps.unpacked("rms_norm_h100", tmp_path)
    with pytest.raises(schedule.ScheduleError, match=r"^ptxas failed: fatal: line 7: parse error$"):
        gpu.read(tmp_path, H100)


def test_the_environment_keeps_other_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=true")
    found = gpu.environment(tmp_path)
    assert found["MOSAIC_GPU_DUMP_TO"] == str(tmp_path)
    assert found["XLA_FLAGS"].split()[:2] == ["--xla_one=true", f"--xla_dump_to={tmp_path}"]
