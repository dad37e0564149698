"""The TPU model against an independent emulator on real dumps, and its parts on schedules that are counted by hand."""

import itertools
import re

import pytest

from jaxops import schedule
from jaxops.schedule import emulator, tpu
from jaxops.schedule.bundles import parse
from jaxops.schedule.emulator import Channel, Cost, execute
from pallas_kernels import chips
from tests.schedule import dumps

NEAR = 0.10  # relative
COUNTED = (
    "cycles",
    "mxu_cycles",
    "read_bytes",
    "written_bytes",
    "vmem_bytes",
    "spill_stores",
    "spill_loads",
    "seconds",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Name of a recorded program → its kernels by name, as the model reads them."""
    found = {}

    def read(name):
        if name not in found:
            folder = dumps.unpacked(name, tmp_path_factory.mktemp(name))
            chip = chips.named(dumps.FIGURES[name]["chip"])
            found[name] = {kernel.name: kernel for kernel in tpu.read(folder, chip, dumps.scalars(name))}
        return found[name]

    return read


@pytest.mark.parametrize("name", dumps.TPU)
def test_it_agrees_with_an_independent_emulator(kernels, name):
    expected = dumps.FIGURES[name]["kernels"]
    found = kernels(name)
    assert set(found) == set(expected) | {tpu.PROGRAM}
    for kernel, figures in expected.items():
        model = found[kernel]
        assert model.pallas == figures["pallas"] and model.bundles == figures["bundles"]
        assert model.spill_slots == figures["spill_slots"]
        for key in COUNTED:
            assert getattr(model, key) == pytest.approx(figures[key], rel=NEAR), f"{kernel}: {key}"
        for unit, used in figures["utilisation"].items():
            assert model.utilisation[unit] == pytest.approx(used, abs=0.01), f"{kernel}: {unit}"


def test_nothing_of_the_recorded_kernels_is_guessed(kernels):
    for name in dumps.TPU:
        for kernel in kernels(name).values():
            guesses = [warning for warning in kernel.warnings if "not touch HBM" not in warning]
            assert not guesses, f"{name}, {kernel.name}: {guesses}"


@pytest.mark.parametrize(
    ("name", "kernel", "bound"),
    [
        ("rms_norm_v5e", "rms_norm.1", "memory"),
        ("attention_v5e", "attention_forward.1", "matrix unit"),
        ("linear_cross_entropy_v5e", "linear_cross_entropy.1", "matrix unit"),
        ("scan_v5e", "rms_norm.3", "vector/scalar slots"),
    ],
)
def test_what_bounds_a_kernel(kernels, name, kernel, bound):
    assert kernels(name)[kernel].bound == bound


def test_figures_that_follow_from_the_shapes(kernels):
    norm = kernels("rms_norm_v5e")["rms_norm.1"]
    assert norm.read_bytes == norm.written_bytes == 8192 * 4096 * 2
    assert norm.seconds >= 2 * 8192 * 4096 * 2 / chips.named("v5e").bandwidth
    product = kernels("matmul_v6e")["fusion"]
    assert product.mxu_cycles / chips.named("v6e").clock_ghz / 1e9 == pytest.approx(2 * 4096**3 / 918e12, rel=0.01)
    # A causal mask leaves 10 of 4 × 4 blocks; a device of v5p has two cores, and one is counted.
    whole = {"splash_v5e": ("v5e", 4 * 4 * 8 * 4096**2 * 128), "splash_v5p": ("v5p", 4 * 2 * 2 * 1024**2 * 128)}
    for name, (chip, flops) in whole.items():
        (splash,) = (kernel for kernel in kernels(name).values() if kernel.pallas)
        cycles = flops / chips.named(chip).flops * chips.named(chip).clock_ghz * 1e9
        assert splash.mxu_cycles == pytest.approx(10 / 16 * cycles, rel=0.01)


def test_a_program_counts_its_calls(kernels):
    scan = kernels("scan_v5e")
    assert {kernel.calls for name, kernel in scan.items() if name != tpu.PROGRAM} == {7}
    assert kernels("attention_v5e")["copy"].calls == 2  # two equal copies are compiled once
    around = scan[tpu.PROGRAM]
    assert around.calls == 1 and not around.pallas
    assert around.read_bytes == 2 * 1024 * 1024 * 2 and around.written_bytes == 1024 * 1024 * 2
    total = schedule.program_seconds(scan.values())
    assert total == pytest.approx(sum(7 * k.seconds for n, k in scan.items() if n != tpu.PROGRAM) + around.seconds)
    assert around.seconds >= around.stall_cycles / chips.named("v5e").clock_ghz / 1e9 > 0


def test_without_the_scalars_it_says_so(tmp_path, kernels):
    folder = dumps.unpacked("splash_v5e", tmp_path)
    (blind,) = (kernel for kernel in tpu.read(folder, chips.named("v5e")) if kernel.pallas)
    assert any("scalar operands 0, 1 are not known" in warning for warning in blind.warnings)
    (told,) = (kernel for kernel in kernels("splash_v5e").values() if kernel.pallas)
    assert blind.mxu_cycles < told.mxu_cycles == pytest.approx(1310720)


def test_work_of_the_sparse_cores_is_said(tmp_path):
    dumps.unpacked("rms_norm_v5e", tmp_path)
    (listing,) = tmp_path.glob("*TLP*allocations.txt")
    line = "  #allocation99 [shape = 'u32[2]', space=smem, size = 0x8, tag = 'scoped memory for sparse-core-call.1']\n"
    before = tpu.read(tmp_path, chips.named("v5e"))[-1]
    listing.write_text(listing.read_text() + line)
    after = tpu.read(tmp_path, chips.named("v5e"))[-1]
    assert (before.warnings, after.warnings) == ((), ("work of the SparseCores is not counted",))


def test_figures_are_json(kernels):
    import json

    found = list(kernels("rms_norm_v5e").values())
    again = json.loads(json.dumps(schedule.figures(found)))
    assert [one["name"] for one in again] == [kernel.name for kernel in found]
    assert again[1]["seconds"] == found[1].seconds and again[1]["utilisation"] == found[1].utilisation


# ----------------------------------------------------------------------------------------------------- dumps that fail


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(schedule.ScheduleError, match=r"holds no schedule: compile with .*environment"):
        tpu.read(tmp_path, chips.named("v5e"))


@pytest.fixture
def damaged(tmp_path):
    """Changes the text of one file of a dump, and the sentence of the error that reading it raises."""
    folder = dumps.unpacked("rms_norm_v5e", tmp_path)

    def read(ending, change):
        (path,) = (path for path in folder.iterdir() if "rms_norm.1" in path.name and path.name.endswith(ending))
        text = change(path.read_text())
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        with pytest.raises(schedule.ScheduleError) as caught:
            tpu.read(folder, chips.named("v5e"))
        return str(caught.value)

    return read


def test_a_truncated_schedule_is_refused(damaged):
    assert "final_bundles.txt has 100 bundles and its table" in damaged(
        "-final_bundles.txt", lambda text: text[: text.index("  0x64   :")]
    )


def test_a_schedule_cut_within_a_bundle_is_refused(damaged):
    assert "rms_norm.1: its final schedule breaks off in bundle 100" in damaged(
        "-final_bundles.txt", lambda text: text[: text.index("  0x64   :") + 30]
    )


def test_a_schedule_with_a_gap_is_refused(damaged):
    cut = lambda text: text[: text.index("  0x64   :")] + text[text.index("  0x70   :") :]
    assert "rms_norm.1: bundle 100 of its final schedule is missing" in damaged("-final_bundles.txt", cut)


def test_an_empty_schedule_is_refused(damaged):
    assert "rms_norm.1: no bundle" in damaged("-final_bundles.txt", lambda text: "")


def test_a_missing_table_of_units_is_refused(damaged):
    assert "the table of unit utilisation is missing" in damaged("utilization.txt", lambda text: None)


def test_the_dumps_of_two_programs_are_refused(tmp_path):
    dumps.unpacked("rms_norm_v5e", tmp_path)
    (main,) = tmp_path.glob("*TLP*-final_bundles.txt")
    main.with_name(re.sub(r"^\d+", "77", main.name)).write_text(main.read_text())
    with pytest.raises(schedule.ScheduleError, match="several programs: empty it"):
        tpu.read(tmp_path, chips.named("v5e"))


def test_the_environment_keeps_other_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_one=true")
    flags = tpu.environment(tmp_path)["LIBTPU_INIT_ARGS"].split()
    assert flags == ["--xla_tpu_one=true", f"--xla_jf_dump_to={tmp_path}", "--xla_jf_dump_llo_text=true"]


# ------------------------------------------------------------------------------------------------------ small schedules


def written(*bundles: str) -> str:
    """Bundles as the compiler prints them. "LB 7| …" has the mark LB and begins region 7."""
    lines = []
    for index, bundle in enumerate(bundles):
        head, bar, body = bundle.partition("|")
        mark, region = head.split() if bar else ("  ", "")
        note = f" /* Start region {region} :: End region 3 */" if bar else ""
        lines.append(f"{hex(index) if index else '0':>6} {mark}: > {{ {body if bar else bundle} }}{note}")
    return "\n".join(lines) + "\n"


def run(*bundles: str, channel: Channel | None = None, **known):
    return execute(parse(written(*bundles), "test"), channel or Channel(32.0, 100.0), **known)


LOOP = (
    "%s1_s0 = smov 0",
    "LB 7|%s2_s0 = sphi %s1_s0, %s3_s1",
    "%s3_s1 = sadd.s32 1, %s2_s0",
    "%p4_p0 = scmp.ge.s32.totalorder %s3_s1, 5",
)
SLOTS = ("", "", "", "")  # the four bundles after a branch, executed in any case


def test_the_parts_of_a_bundle():
    text = written(
        "%s1_s2 = smov (%p3_p0, %s4_s1), 7  ;;  %v5_v0 = vld [vmem:[%s1_s2 + $0x8] sm:$0xff] /* a ;; note */"
        "  ;;  %6 = sst [smem:[#allocation1]] (!%p3_p0), %s4_s1  ;;  %8 = sbr.rel (!%p3_p0) target = $region9",
        "PF 9|%v9_v1 = vmatmul.bf16.gmra.mxu0 %v5_v0",
    )
    read = parse(text, "test")
    move, store, branch = read.bundles[0].scalar
    assert (move.result, move.opcode, move.operands) == ("s1_s2", "smov", ("7",))
    assert (move.predicate.register, move.predicate.negated, move.predicate.otherwise) == ("p3_p0", False, "%s4_s1")
    assert store.operands == ("[smem:[#allocation1]]", "%s4_s1") and store.predicate.negated
    assert branch.operands == ("9",) and branch.predicate.negated
    assert [bundle.vector for bundle in read.bundles] == [("vld",), ("vmatmul.bf16.gmra.mxu0",)]
    assert read.bundles[1].mark == "PF" and read.regions == {9: 1}


def test_a_loop_runs_as_often_as_its_counter_says():
    found = run(*LOOP, "%5 = sbr.rel (!%p4_p0) target = $region7", *SLOTS, "%v6_v0 = vld [vmem:[#allocation0]]")
    assert found.counts == (1, *[5] * 8, 1) and found.end == 1 + 5 * 8 + 1 and not found.warnings


def test_a_loop_within_a_loop():
    inner = (
        "%s5_s3 = smov 0",
        "LB 8|%s6_s3 = sphi %s5_s3, %s7_s4",
        "%s7_s4 = sadd.s32 1, %s6_s3  ;;  %p8_p1 = scmp.lt.s32.totalorder %s7_s4, %s3_s1",
        "%9 = sbr.rel (%p8_p1) target = $region8",
    )
    found = run(*LOOP, *inner, *SLOTS, "%10 = sbr.rel (!%p4_p0) target = $region7", *SLOTS)
    assert found.counts[len(LOOP) + 2] == 1 + 2 + 3 + 4 + 5 and found.counts[len(LOOP)] == 5


def test_a_region_is_entered_where_its_predicate_says():
    skip = ("%p5_p1 = scmp.ne.s32.totalorder %s2_s0, 3", "%6 = sbr.rel (%p5_p1) target = $region2")
    guarded = ("%v7_v0 = vld [vmem:[#allocation0]]", "PF 2|%s8_s5 = smov 0")
    found = run(*LOOP, *skip, *SLOTS, *guarded, "%9 = sbr.rel (!%p4_p0) target = $region7", *SLOTS)
    assert found.counts[10] == 1 and found.counts[11] == 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("smov (%p2_p0, %s1_s1), 7", 7),
        ("smov (!%p2_p0, %s1_s1), 7", 12),
        ("scalar_select /*predicate=*/%p2_p0, /*on_true=*/3, /*on_false=*/4", 3),
        ("sadd.s32 4294967295, %s1_s1", 11),
        ("ssub.s32 %s1_s1, 20", -8),
        (
            "sshll.u32 %s1_s1, 28",
            12 << 28 & 0xFFFFFFFF if 12 << 28 & 0x80000000 == 0 else (12 << 28 & 0xFFFFFFFF) - 2**32,
        ),
        ("sshra.s32 4294967040, 4", -16),
        ("sshrl.u32 4294967040, 4", 0x0FFFFFF0),
        ("smul.u32 2147483649, %s1_s1", 12),
        ("smin.u32 4294967295, %s1_s1", 12),
        ("smax.u32 4294967295, %s1_s1", -1),
        ("sand.u32 6, %s1_s1", 4),
        ("sxor.u32 6, %s1_s1", 10),
    ],
)
def test_scalar_arithmetic(text, value):
    equal = f"%p9_p1 = scmp.eq.s32.totalorder %s3_s2, {value}"
    found = run(
        "%s1_s1 = smov 12",
        "%p2_p0 = scmp.ge.s32.totalorder %s1_s1, 12",
        f"%s3_s2 = {text}",
        equal,
        "%4 = sbr.rel (%p9_p1) target = $region1",
        *SLOTS,
        "%v5_v0 = vld [vmem:[#allocation0]]",
        "PF 1|%s8_s5 = smov 0",
    )
    assert not found.warnings and found.counts[-2] == 0, f"{text} is not {value}"


def test_a_division_is_exact():
    found = run(
        *LOOP,
        "%20 = sdivrem.u32 %s2_s0, 3 /* kRem */  ;;  %21 = sdivrem.u32 %s2_s0, 3 /* kDiv */",
        "%s22_s4 = spop.drf %20  ;;  %s23_s5 = spop.drf %21",
        "%24 = dma.hbm_to_vmem %s22_s4, %s22_s4, %s22_s4, /*dst_syncflagno=*/[#allocation2]",
        "%25 = dma.vmem_to_hbm %s22_s4, %s23_s5, %s22_s4, /*dst_syncflagno=*/[#allocation3]",
        "%5 = sbr.rel (!%p4_p0) target = $region7",
        *SLOTS,
    )
    assert found.read_bytes == 32 * (0 + 1 + 2 + 0 + 1) and found.written_bytes == 32 * (0 + 0 + 0 + 1 + 1)


def test_a_spilled_scalar_comes_back():
    found = run(
        *LOOP,
        "%5 = sst [smem:[#allocation9_spill]] %s3_s1",
        "%s6_s7 = sld [smem:[#allocation9_spill]]",
        "%p7_p3 = scmp.lt.s32.totalorder %s6_s7, 5",
        "%8 = sbr.rel (%p7_p3) target = $region7",
        *SLOTS,
    )
    assert found.counts[1] == 5 and not found.warnings


def test_a_predicated_dma_counts_where_its_predicate_holds():
    found = run(
        *LOOP,
        "%p5_p1 = scmp.lt.s32.totalorder %s2_s0, 2",
        "%6 = dma.hbm_to_vmem [thread:$0] (%p5_p1), /*hbm=*/%s2_s0, /*size_in_granules=*/64, /*vmem=*/%s2_s0,"
        " /*dst_syncflagno=*/[#allocation2] /* \nbounds: (1, 2) */",
        "%7 = dma.done.wait (%p5_p1), [#allocation2], 64",
        "%8 = sbr.rel (!%p4_p0) target = $region7",
        *SLOTS,
        channel=Channel(32.0, 100.0),
    )
    assert found.read_bytes == 2 * 64 * 32 and found.written_bytes == 0
    assert found.stall == 2 * (64 + 100 - 1)  # the wait stands one bundle behind the start
    assert found.end == 1 + 5 * (len(LOOP) - 1 + 4 + 4) + found.stall


def test_scalar_operands_decide_branches():
    load = "%s6_s7 = sld [smem:[#allocation9 + %s2_s0]]"
    text = (
        "%s30_s9 = inlined_call_operand.hbm [shape: s32[5], index: 3, kind: input]  ;;  %s31_s8 = smov [#allocation9]",
        "%32 = dma.hbm_to_smem /*hbm=*/%s30_s9, /*size_in_granules=*/1, /*smem=*/%s31_s8, [#allocation1]",
        *LOOP,
        load,
        "%p7_p3 = scmp.eq.s32.totalorder %s6_s7, 0",
        "%8 = sbr.rel (%p7_p3) target = $region2",
        *SLOTS,
        "%v9_v0 = vld [vmem:[#allocation0]]",
        "PF 2|%s10_s5 = smov 0",
        "%11 = sbr.rel (!%p4_p0) target = $region7",
        *SLOTS,
    )
    told = run(*text, scalars={3: (0, 1, -1, 0, 7)})
    assert told.counts[13] == 3 and told.unknown_operands == ()
    blind = run(*text)
    assert blind.counts[13] == 0 and blind.unknown_operands == (3,)


def test_what_hangs_on_vectors_is_said():
    vector = "%p5_p1 = vptest %v0_v0"
    found = run(vector, "%6 = sbr.rel (%p5_p1) target = $region2", *SLOTS, "%v1_v0 = vld [vmem:[#allocation0]]",
                "PF 2|%s10_s5 = smov 0")  # fmt: skip
    assert found.counts[6] == 1 and found.warnings == ("a branch depends on data: its region is taken to be entered",)
    found = run(*LOOP, vector, "%6 = sbr.rel (%p5_p1) target = $region7", *SLOTS)
    assert found.counts[1] == 1 and found.warnings == ("a loop depends on data: one trip is counted",)
    found = run("%s1_s1 = vtos %v0_v0", "%2 = dma.hbm_to_vmem %s1_s1, %s1_s1, %s1_s1, [#allocation2]")
    assert found.read_bytes == 0
    assert found.warnings == ("a DMA whose size or predicate depends on data is not counted",)


def test_a_loop_without_end_is_broken_off(monkeypatch):
    monkeypatch.setattr(emulator, "STEP_LIMIT", 100)
    found = run("%s1_s0 = smov 0", "LB 7|%s2_s0 = smov 0", "%3 = sbr.rel target = $region7", *SLOTS)
    assert found.counts[1] == 99 and found.warnings == ("more than 100 blocks: the emulation was broken off",)


def test_a_program_waits_for_its_copies_beside_its_kernels():
    copy = "%1 = dma.hbm_to_vmem %s0_s0, 1000, %s0_s0, [#allocation2]"
    call = "%2 = inlined_call %s0_s0 /* %rms_norm.3 = custom-call(%x) */"
    wait = "%3 = dma.done.wait [#allocation2], 1000"
    quick = run("%s0_s0 = smov 0", copy, call, wait, costs={"rms_norm.3": Cost(500.0, 0)})
    assert quick.calls == {"rms_norm.3": 1} and quick.end == pytest.approx(1 + 1000 + 100 + 1)
    hidden = run("%s0_s0 = smov 0", copy, call, wait, costs={"rms_norm.3": Cost(5000.0, 0)})
    assert hidden.stall == 0 and hidden.end == 4 + 5000
    shared = run("%s0_s0 = smov 0", copy, call, wait, costs={"rms_norm.3": Cost(1500.0, 32 * 1500)})
    assert shared.end == pytest.approx(1 + 1000 + 1500 + 1, abs=3)  # both pass the one channel


# -------------------------------------------------------------------------------------------------------------- channel


def test_transfers_follow_one_another():
    channel = Channel(bytes_per_cycle=64.0, latency=10.0)
    channel.start(0.0, flag=1, granules=20, reads=True, writes=False)  # 10 cycles
    channel.start(4.0, flag=2, granules=40, reads=False, writes=True)  # 20 more
    assert channel.wait(0.0, 1, 20) == 10 + 10 and channel.wait(0.0, 2, 40) == 10 + 20 + 10
    assert (channel.read_bytes, channel.written_bytes) == (640, 1280)
    channel.start(100.0, flag=1, granules=2, reads=True, writes=False)
    assert channel.wait(100.0, 1, 2) == 111 and channel.wait(200.0, 1, 2) == 200


def test_a_copy_within_hbm_passes_twice():
    channel = Channel(32.0, 0.0)
    channel.start(0.0, flag=1, granules=10, reads=True, writes=True)
    assert channel.wait(0.0, 1, 10) == 20 and channel.read_bytes == channel.written_bytes == 320


def test_a_flag_counts_what_has_arrived():
    channel = Channel(32.0, 0.0)
    for _, granules in itertools.product(range(2), (10, 30)):
        channel.start(0.0, flag=5, granules=granules, reads=True, writes=False)
    assert [channel.wait(0.0, 5, size) for size in (5, 5, 40, 30)] == [10, 10, 50, 80]
