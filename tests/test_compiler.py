"""The compiler service, its readings and `jaxops compile`. No compiler is needed: stand-ins work, the texts are real.

tests/programs/ holds what the compilers of libtpu and XLA for GPUs printed; of programs, the instructions without their
metadata.
"""

import json
import pathlib
import shlex
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxops.workbench import compile, compiler, compiler_worker, programs, sources
from jaxops.workbench.call import Problem
from jaxops.workbench.collectives import collectives
from jaxops.workbench.command import main
from jaxops.workbench.compiler import Job, compile_jobs
from pallas_kernels import chips

PROGRAMS = pathlib.Path(__file__).parent / "programs"
V5E = chips.named("v5e")
# Stands in for a process with a compiler: does what the job's first option says.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    what, *rest = job["options"]
    print("jaxops compile begins ", flush=True)
    if what == "abort":
        print("LLVM ERROR: Cannot select: intrinsic at 0x7f at /some/where/file.cc", flush=True)
        os.abort()
    if what == "exit":
        sys.exit(3)
    if what == "hang":
        time.sleep(600)
    if what == "slow":
        time.sleep(0.3)
    if what == "garbage":
        print("jaxops compile ends {not json", "jaxops compile ends 7", "\\x00\\ufffd", sep="\\n", flush=True)
    result = {"status": "refused", "reason": f"{job['chip']} {' '.join(job['operands'])} {os.getpid()}"}
    print("jaxops compile ends " + json.dumps(result), flush=True)
"""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    """Compilers that are there, and a cache of this test's own."""
    monkeypatch.setattr(compiler, "missing", lambda platforms: None)
    monkeypatch.setattr(compiler, "worker_command", lambda *_: [sys.executable, "-c", WORKER])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def job(what, operand="", chip="v5e"):
    return Job(chip, "rms_norm", (operand,), (what,))


# --------------------------------------------------------------------------------------------------------- supervision


@pytest.mark.timeout(300)
def test_a_worker_that_aborts_or_hangs_costs_its_job_and_the_order_is_kept():
    jobs = [job(what, str(i)) for i, what in enumerate(["fine", "abort", "fine", "hang", "garbage", "exit", "fine"])]
    started, done = time.monotonic(), []
    results = compile_jobs(jobs, seconds=1, workers=1, advance=done.append, cache=False)
    assert time.monotonic() - started < 60
    words = "LLVM ERROR: Cannot select: intrinsic at <address> at <path>"
    assert results[1] == {"status": "aborted", "reason": f"the compiler aborted (signal SIGABRT): {words}"}
    assert results[3] == {"status": "hung", "reason": "no end after 1 s: nothing was said"}
    assert results[5] == {"status": "aborted", "reason": "the compiler aborted (exit code 3): nothing was said"}
    fine = [result["reason"].split() for i, result in enumerate(results) if i not in (1, 3, 5)]
    assert [number for _, number, _ in fine] == ["0", "2", "4", "6"]
    assert len({process for _, _, process in fine}) == 4  # a new one after each of the three, none without need
    assert len(done) == len(jobs)


@pytest.mark.timeout(300)
def test_workers_run_at_the_same_time_and_share_the_jobs_of_a_chip():
    jobs = [job("slow", str(i), chip) for i in range(6) for chip in ("v5e", "h100")]
    results = compile_jobs(jobs, workers=4, cache=False)
    assert [result["reason"].split()[:2] for result in results] == [[one.chip, one.operands[0]] for one in jobs]
    assert len({result["reason"].split()[2] for result in results}) == 4
    one_chip = compile_jobs(jobs[::2], workers=3, cache=False)
    assert len({result["reason"].split()[2] for result in one_chip}) == 3


@pytest.mark.timeout(300)
def test_a_hung_compiler_is_ended_with_all_it_started(monkeypatch, tmp_path):
    started = tmp_path / "started"
    code = f"""
import subprocess, sys, time
sys.stdin.readline()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(started)!r}, "w").write(str(child.pid))
print("jaxops compile begins ", flush=True)
time.sleep(600)
"""
    monkeypatch.setattr(compiler, "worker_command", lambda *_: [sys.executable, "-c", code])
    (result,) = compile_jobs([job("fine")], seconds=1, cache=False)
    assert result["status"] == "hung"
    stat = pathlib.Path("/proc") / started.read_text() / "stat"
    until = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.timeout(300)
def test_a_worker_that_cannot_start_says_why(monkeypatch):
    command = [sys.executable, "-m", "jaxops.workbench.compiler_worker", "v9", "."]
    monkeypatch.setattr(compiler, "worker_command", lambda *_: command)
    (result,) = compile_jobs([job("fine")], cache=False)
    assert result["status"] == "aborted" and "ValueError: target must be one of v4, v5e" in result["reason"]


@pytest.mark.timeout(300)
def test_a_worker_ends_with_its_supervisor(tmp_path):
    folder = tmp_path / "of_the_worker"
    folder.mkdir()
    inner = (
        "import os, pathlib, sys; from jaxops.workbench.compiler_worker import end_with;"
        "print(os.getpid(), flush=True);"
        "end_with(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    outer = (
        "import os, subprocess, sys;subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", outer, inner, str(folder)], stdout=subprocess.PIPE, text=True)
    worker = pathlib.Path("/proc") / supervisor.stdout.readline().strip()
    assert worker.exists() and folder.exists()
    supervisor.kill()
    supervisor.wait()
    until = time.monotonic() + 60
    while (worker.exists() or folder.exists()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not worker.exists() and not folder.exists()


def test_unknown_chips_and_absent_compilers_are_problems(monkeypatch):
    with pytest.raises(Problem, match=r"one of v5e, .* got 'v4'"):
        compile_jobs([Job("v4", "rms_norm")])
    monkeypatch.undo()
    monkeypatch.setitem(compiler.COMPILERS, "tpu", ("tpu-compile", ("no-such-compiler",)))
    with pytest.raises(Problem, match=r"\(no-such-compiler\): pip install 'jaxops\[tpu-compile\]'"):
        compile_jobs([Job("v5e", "rms_norm")])


# --------------------------------------------------------------------------------------------------------------- cache


def test_a_result_is_kept_and_found_again(capsys):
    (first,) = compile_jobs([job("fine", "a")])
    done = []
    assert compile_jobs([job("fine", "a")], advance=done.append) == [first] and len(done) == 1
    assert compile_jobs([job("fine", "a")], cache=False) != [first]  # the process number is another
    assert compile_jobs([job("fine", "b")]) != [first]
    assert capsys.readouterr().err == ""


def test_what_a_result_is_made_from_is_in_its_fingerprint(monkeypatch):
    one = job("fine", "a")
    before = compiler.fingerprint(one)
    assert compiler.fingerprint(job("fine", "a")) == before
    assert compiler.fingerprint(job("fine", "a", "v6e")) != before
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something=true")
    assert compiler.fingerprint(one) != before
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    monkeypatch.setattr(compiler, "versions", lambda platforms: {"libtpu": "9"})
    assert compiler.fingerprint(one) != before


def test_the_tiles_that_a_user_tuned_count_only_where_they_are_used():
    with_user, without = compiler.fingerprint(job("fine")), compiler.fingerprint(job("fine"), user_tiles=False)
    folder = compiler.cache_folder() / "tuned"
    folder.mkdir(parents=True)
    (folder / "v5e.json").write_text("{}")
    assert compiler.fingerprint(job("fine")) != with_user
    assert compiler.fingerprint(job("fine"), user_tiles=False) == without


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "another", "result": {}}', "\x00\xff"])
def test_a_corrupt_entry_is_made_anew(content):
    (first,) = compile_jobs([job("fine")])
    (entry,) = (compiler.cache_folder() / "compiled").iterdir()
    entry.write_text(content)
    (second,) = compile_jobs([job("fine")])
    assert second["status"] == "refused" and second != first
    assert compile_jobs([job("fine")]) == [second]


def test_what_may_end_otherwise_next_time_is_not_kept():
    compile_jobs([job("abort"), job("exit")], seconds=1)
    assert list((compiler.cache_folder() / "compiled").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    results = compile_jobs([job("fine", str(i)) for i in range(3)])
    assert [result["status"] for result in results] == ["refused"] * 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing is cached" in err


@pytest.mark.timeout(300)
def test_two_processes_write_the_same_entry_and_a_reader_finds_a_whole_one(tmp_path):
    code = f"""
import pathlib
from jaxops.workbench.compiler import _Cache
cache = _Cache(pathlib.Path({str(tmp_path)!r}))
for i in range(100):
    cache.put("key", {{"status": "compiled", "numbers": [i] * 2000}})
"""
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    cache, found = compiler._Cache(tmp_path), 0
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "key.json").exists():
            result = cache.get("key")
            assert result is not None and len(set(result["numbers"])) == 1 and len(result["numbers"]) == 2000
            found += 1
        time.sleep(0.002)
    assert found and [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a user: a table of contents, two operators, one of which imports a helper and this library."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("from theirs.first import first as first\nfrom .second import second\n")
    (folder / "first.py").write_text("import jaxops\nfrom theirs import helper\nfirst = jaxops.rms_norm, helper.x\n")
    (folder / "second.py").write_text("import numpy\n\n\ndef second(x):\n    return numpy.sin(x)\n")
    (folder / "helper.py").write_text("x = 1\n")
    (tmp_path / "calls.py").write_text("import theirs\n\n\ndef f(x):\n    return theirs.first(x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget_sources()
    yield folder
    forget_sources()


def forget_sources():
    """As in a new process: what a file imports is read once in each."""
    for function in (sources._file, sources._follow, sources._imported):
        function.cache_clear()


def test_a_function_is_made_of_what_it_imports_through_tables_of_contents(package):
    names = {str(path.relative_to(path.parents[1])) for path in sources.files("calls:f", V5E)}
    assert {"theirs/first.py", "theirs/helper.py", "ops/rms_norm.py", "tpu/rms_norm.py"} <= names
    assert not {"theirs/second.py", "theirs/__init__.py", "ops/softmax.py", "gpu/rms_norm.py"} & names
    assert not any("numpy" in str(path) for path in sources.files("theirs:second", V5E))


def test_the_fingerprint_of_a_function_changes_with_its_sources_alone(package):
    def fingerprint():
        forget_sources()
        return sources.fingerprint("calls:f", V5E)

    before = fingerprint()
    (package / "second.py").write_text("def second(x):\n    return x\n")
    (package / "helper.py").write_text("# a comment\n\nx = 1\n")
    assert fingerprint() == before
    (package / "helper.py").write_text("x = 2\n")
    assert fingerprint() != before


def test_a_kernel_is_part_of_the_programs_of_its_platform():
    tpu, gpu = ({path.parent.name for path in sources.files("rms_norm", chips.named(c))} for c in ("v5e", "h100"))
    assert "tpu" in tpu - gpu and "gpu" in gpu - tpu
    assert not any("workbench" in path.parts for path in sources.files("dot_product_attention", V5E))


# ------------------------------------------------------------------------------------- what the compilers say and make


def test_a_kernel_that_exceeds_vmem_is_told_with_the_buffers_the_compiler_names():
    found = programs.out_of_memory((PROGRAMS / "vmem_capacity.txt").read_text())
    assert found == {
        "memory": "VMEM",
        "needed_bytes": 192 << 20,
        "limit_bytes": 128 << 20,
        "kernel": "too_big.1",
        "buffers": [
            {"name": f"{name} f32[2048,4096] ×2", "bytes": 64 << 20} for name in ("input 0", "input 1", "output 0")
        ],
    }


def _too_big(x, weight):
    def kernel(x_ref, weight_ref, out_ref, sum_ref, semaphore):
        sum_ref[...] = x_ref[...] + weight_ref[...]
        out_ref[...] = sum_ref[...]

    block = pl.BlockSpec((256, 4096), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    scratch = [pltpu.VMEM((256, 4096), jnp.float32), pltpu.SemaphoreType.DMA]
    return pl.pallas_call(
        kernel,
        grid=(16,),
        in_specs=[block] * 2,
        out_specs=block,
        out_shape=shape,
        scratch_shapes=scratch,
        name="too_big",
    )(x, weight)


def test_where_the_compiler_names_no_buffers_the_kernel_does():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    traced = jax.jit(lambda x: _too_big(x, x)).trace(x)
    message = (PROGRAMS / "vmem_scoped.txt").read_text()
    result = compiler_worker.failure(jax.errors.JaxRuntimeError(message), traced, V5E)
    assert (result["status"], result["needed_bytes"], result["limit_bytes"]) == ("failed", 24 << 20, 16 << 20)
    names = ("x_ref f32[256,4096] ×2", "weight_ref f32[256,4096] ×2", "out_ref f32[256,4096] ×2")
    assert result["buffers"] == [
        *({"name": name, "bytes": 8 << 20} for name in names),
        {"name": "sum_ref f32[256,4096]", "bytes": 4 << 20},
    ]
    assert result["reason"].startswith("the kernel too_big.1 exceeds VMEM: it needs 24.0 MiB, the limit is 16.0 MiB;")
    assert "weight_ref f32[256,4096] ×2 8.0 MiB" in result["reason"]


def test_the_buffers_of_the_librarys_own_kernels_are_known():
    import jaxops

    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    traced = jax.jit(jaxops.rms_norm).trace(x, jax.ShapeDtypeStruct((1024,), jnp.bfloat16))
    names = [buffer["name"].split()[0] for buffer in compiler_worker.buffers_of(traced, V5E, None)]
    assert len(names) >= 3 and "x_ref" in names


def test_a_kernel_that_exceeds_shared_memory_is_told():
    message = "Mosaic GPU kernel exceeds available shared memory: smem_bytes=524288 > max_smem_bytes=232448"
    result = compiler_worker.failure(ValueError(message), None, chips.named("h100"))
    assert result["reason"] == "a kernel exceeds shared memory: it needs 512.0 KiB, the limit is 227.0 KiB"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("rms_norm: none of ('pallas',) can run here (pallas: needs (a, b))", "needs (a, b)"),
        ("softmax: implementation 'pallas' was asked for, but gpu: softmax has no kernel", "softmax has no kernel"),
        ("f: implementation 'pallas' was asked for, but tpu: no; gpu: neither", "no; gpu: neither"),
        ("matmul: implementation 'pallas' was asked for, but matmul has no kernel", "matmul has no kernel"),
        ("x must be floating", None),
    ],
)
def test_a_refusal_is_told_from_other_errors(message, reason):
    assert programs.refusal(message) == reason
    status = compiler_worker.failure(ValueError(message), None, V5E)["status"]
    assert status == ("failed" if reason is None else "refused")


def test_collectives_of_a_tpu_program():
    found = collectives((PROGRAMS / "ring_v5e.txt").read_text(), {"data": 4, "tensor": 4})
    told = [(one["kind"], one["bytes"], one["count"], one["axis"], one["overlapped"]) for one in found]
    assert told == [
        ("collective-permute", 2048 * 4096 * 2, None, "tensor", True),  # beside a product, in a loop
        ("all-gather", 8192 * 4096 * 2, 1, "data", False),
        ("reduce-scatter", 8192 * 4096 * 2, 1, "data", False),  # a fusion around an all-reduce
        ("collective-permute", 240 * 4096 * 2, 1, "data", True),
        ("all-reduce", 4, 1, "data+tensor", False),
        ("all-to-all", 2048 * 4096 * 2, 1, "tensor", False),
    ]


def test_a_collective_that_fusions_drive_counts_once():
    """On v5e one is started, driven by a product that runs meanwhile, and ended, by fusions that all hold it."""
    found = collectives((PROGRAMS / "prefetch_v5e.txt").read_text(), {"fsdp": 8})
    told = [(one["kind"], one["bytes"], one["count"], one["axis"], one["overlapped"]) for one in found]
    gathered = 4096 * 4096 * 2
    assert told == [("all-gather", gathered, 1, "fsdp", False), ("all-gather", gathered, 1, "fsdp", True)]


def test_collectives_of_a_gpu_program():
    found = collectives((PROGRAMS / "ring_h100.txt").read_text(), {"data": 2, "tensor": 4})
    told = [(one["kind"], one["bytes"], one["count"], one["axis"], one["overlapped"]) for one in found]
    assert told == [
        ("collective-permute", 2048 * 4096 * 2, 4, "tensor", True),  # the loop runs four times
        ("all-gather", 4096 * 4096 * 2, 1, "data", False),
        ("reduce-scatter", 4096 * 4096 * 2, 1, "data", False),
        ("all-to-all", 2048 * 4096 * 2, 1, "tensor", True),
        ("all-reduce", 4, 1, "data+tensor", True),
    ]


def test_collectives_along_the_axes_of_a_whole_slice():
    found = collectives((PROGRAMS / "two_layers_v5p.txt").read_text(), {"data": 256, "tensor": 8})
    assert [(one["kind"], one["axis"]) for one in found] == [
        ("all-gather", "data"),
        ("all-gather", "data"),
        ("all-reduce", "tensor"),
        ("all-reduce", "data"),
    ]
    other = collectives((PROGRAMS / "two_layers_v5p.txt").read_text(), {"data": 8, "tensor": 256})
    assert other[0]["axis"] is None


# ------------------------------------------------------------------------------------------------------ a job, on CPUs


@pytest.fixture
def on_cpus(monkeypatch):
    monkeypatch.setattr(compiler_worker, "devices_of", lambda chip, slice_shape=None: tuple(jax.devices()))


def compile_one(*args, **fields):
    return compiler_worker.compile_one(Job("v5e", *args, **fields), V5E, None)


def test_the_program_of_a_job(on_cpus):
    forward = compile_one("rms_norm", ("x=64x256", "scale=256"), dtype="float32")
    assert (forward["status"], forward["kernels"], forward["collectives"]) == ("compiled", 0, [])
    assert [(run["operator"], run["phase"], run["implementation"]) for run in forward["runs"]] == [
        ("rms_norm", "forward", "pallas")
    ]
    assert (forward["argument_bytes"], forward["output_bytes"]) == (4 * (64 * 256 + 256), 4 * 64 * 256)
    operands = ("x=64x256", "weight=256x512", "labels=64:int32")
    backward = compile_one("linear_cross_entropy", operands, dtype="float32", gradients=True)
    assert {run["phase"] for run in backward["runs"]} == {"forward", "backward"}
    gradients = 4 * (64 * 256 + 256 * 512)
    assert backward["argument_bytes"] == gradients + 4 * 64 + 4  # labels, and the cotangent of the loss
    assert gradients <= backward["output_bytes"] <= gradients + 16  # and the table of a tuple


def test_the_program_of_a_mesh(on_cpus):
    operands = ("x=64x256@data,None", "w=256x128@None,tensor")
    result = compile_one("matmul", operands, gradients=True, mesh="v5e:2x4", axes="data=2,tensor=4")
    assert result["status"] == "compiled"
    assert {one["axis"] for one in result["collectives"]} >= {"data", "tensor"}
    norm = compile_one("rms_norm", ("x=64x256@data,None", "scale=256"), mesh="v5e:2x4")
    assert norm["runs"][0]["implementation"] == "xla" and "8 devices" in norm["runs"][0]["reason"]


@pytest.mark.parametrize(
    ("operand", "fields", "words"),
    [
        ("x=64x256@dat,None", {"mesh": "v5e:2x4"}, "over the axes data or None, got 'dat'"),
        ("x=63x256@data,None", {"mesh": "v5e:2x4"}, "x=63x256@data,None"),
        ("x=64x256@data,None,None", {"mesh": "v5e:2x4"}, "x=64x256@data,None,None"),
        ("x=64x256", {"mesh": "v5e:2x4", "axes": "data=3"}, "multiply to the 8 devices of v5e:2x4, got data=3"),
        ("x=64x256", {"mesh": "v5e:2x4", "axes": "data"}, "name=size"),
        ("x=64x256@data,None", {}, "only with --mesh"),
        ("x=64x256:int32", {"gradients": True}, "no floating operand"),
        ("y=64x256", {}, "its arguments are"),
    ],
)
def test_words_that_make_no_sense_are_told_as_such(on_cpus, operand, fields, words):
    result = compile_one("softmax", (operand,), **fields)
    assert result["bad_question"] and words in result["reason"]


def test_what_a_function_raises_is_its_result(on_cpus, tmp_path, monkeypatch):
    (tmp_path / "raises.py").write_text("def f(x):\n    raise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert compile_one("raises:f", ("x=4",)) == {"status": "failed", "reason": "RuntimeError: not today"}


# --------------------------------------------------------------------------------------------------------- the command

COMPILED = {
    "status": "compiled",
    "runs": [{"operator": "rms_norm", "phase": "forward", "implementation": "pallas", "reason": ""}],
    "kernels": 1,
    "temp_bytes": 16384,
    "argument_bytes": 1 << 26,
    "output_bytes": 1 << 26,
    "vmem_bytes": 12845056,
    "flops": 1e9,
    "bytes_accessed": 1e8,
    "compile_seconds": 2.5,
    "collectives": [],
}
BY_XLA = COMPILED | {
    "kernels": 0,
    "runs": [{"operator": "rms_norm", "phase": "forward", "implementation": "xla", "reason": "needs TMA"}],
}
NORM = ["compile", "rms_norm"]


@pytest.fixture
def service(monkeypatch):
    """Stands in for the service: the results to give, by chip; keeps the jobs it was asked for."""

    def compile_jobs(jobs, **_):
        service.jobs = jobs
        return [service.results.get(job.chip, COMPILED) for job in jobs]

    monkeypatch.setattr(compile, "compile_jobs", compile_jobs)
    monkeypatch.setenv("COLUMNS", "150")
    service.results = {}
    return service


def test_compile_says_what_runs_and_why(service, capsys):
    service.results = {"a100": BY_XLA, "h100": COMPILED | {"smem_bytes": 208040, "registers": 63, "spill_bytes": 0}}
    assert main(NORM) == 0
    out = capsys.readouterr().out
    assert [job.chip for job in service.jobs] == list(compiler.CHIPS)
    assert service.jobs[0].operands == ("x=8192x4096", "scale=4096")
    assert "12.2 MiB" in out and "a100: XLA serves rms_norm (forward): needs TMA" in out
    assert main([*NORM, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["chip"] for one in told] == list(compiler.CHIPS) and told[0]["vmem_bytes"] == 12845056


def test_compile_draws_calls_by_chance_and_prints_what_fails_as_a_command(service, capsys):
    attention = ["compile", "dot_product_attention", "--fuzz", "40", "--gradients", "--target", "v5e,v6e"]
    service.results = {"v6e": {"status": "failed", "reason": "because"}}
    assert main(attention) == 1
    drawn, out = service.jobs, capsys.readouterr().out
    assert [job.chip for job in drawn] == ["v5e"] * (len(drawn) // 2) + ["v6e"] * (len(drawn) // 2)
    assert 60 <= len(drawn) == 2 * len({(job.operands, job.options) for job in drawn})
    commands = [line.removeprefix("failed: ") for line in out.splitlines() if line.startswith("failed: jaxops")]
    assert len(commands) == len(drawn) // 2 and "v6e: failed: because" in out
    # The command that is printed asks for that very call, functions included.
    modified = next(i for i, one in enumerate(commands) if "score_mod=lambda" in one and "mask_mod=lambda" in one)
    main(shlex.split(commands[modified])[1:])
    again, drawn_one = service.jobs[0], drawn[len(drawn) // 2 + modified]
    assert (again.operands, again.options, again.gradients) == (drawn_one.operands, drawn_one.options, True)
    capsys.readouterr()
    assert main([*attention[:4], "--target", "v5e", "--json", "--seed", "1"]) == 0
    assert all(one["operands"] for one in json.loads(capsys.readouterr().out))
    assert {job.operands for job in service.jobs} != {job.operands for job in drawn}


@pytest.mark.parametrize("status", ["failed", "hung", "aborted", "refused"])
def test_compile_ends_with_1_and_the_reason_where_there_is_no_program(status, service, capsys):
    service.results = {chip: {"status": status, "reason": "because"} for chip in ("v5e", "v6e")}
    assert main([*NORM, "--target", "v5e,v6e,h100"]) == 1
    assert f"v5e, v6e: {status}: because" in capsys.readouterr().out


def test_compile_tells_collectives_and_schedules(service, capsys):
    kernel = {
        "name": "rms_norm.1",
        "calls": 1,
        "seconds": 2.5e-4,
        "mxu_cycles": 0.0,
        "cycles": 86181,
        "spill_slots": 0,
        "stall_cycles": 160922.0,
        "read_bytes": 1,
        "written_bytes": 1,
        "vmem_bytes": 1,
        "bound": "memory",
    }
    gather = {"name": "g", "kind": "all-gather", "bytes": 1 << 20, "count": 1, "axis": "data", "overlapped": False}
    schedule = {"kernels": [kernel], "seconds": 2.5e-4}
    service.results = {"v5p": COMPILED | {"collectives": [gather, gather], "schedule": schedule}}
    arguments = [*NORM, "x=8192x4096@data,None", "scale=4096", "--mesh", "v5p:8x16x16", "--schedule"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "all-gather" in out and "exposed" in out and "0.2500 ms, modelled" in out and "not measured" in out
    assert [(job.chip, job.mesh, job.schedule) for job in service.jobs] == [("v5p", "v5p:8x16x16", True)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compile", "rms_nrom"], ["rms_nrom", "did you mean rms_norm?"]),
        (["compile", "rms_nrom", "x=4"], ["rms_nrom", "did you mean rms_norm?"]),
        ([*NORM, "--target", "v6"], ["--target", "'v6'", "did you mean v6e?"]),
        ([*NORM, "--target", "v4"], ["--target", "'v4'"]),
        ([*NORM, "x=64by256"], ["x=64by256", "name=sizes"]),
        (["compile", "matmul", "x=64x256"], ["'w'", "arguments are"]),
        ([*NORM, "x=64x256", "scale=5"], ["scale", "(5,)"]),
        ([*NORM, "x=64x256@data,None", "scale=256"], ["x=64x256@data,None", "--mesh"]),
        ([*NORM, "--mesh", "v5p"], ["--mesh", "chip:slice", "'v5p'"]),
        ([*NORM, "--mesh", "v5:2x2"], ["'v5'", "did you mean"]),
        ([*NORM, "--mesh", "v5p:2x2x1", "--target", "v6e"], ["v5p", "--target v6e"]),
        ([*NORM, "--axes", "data=8"], ["--axes", "--mesh"]),
        ([*NORM, "--seconds", "0"], ["--seconds", "above 0"]),
        ([*NORM, "--workers", "0"], ["--workers", "at least 1"]),
        ([*NORM, "--fuzz", "-1"], ["--fuzz", "at least 0"]),
        ([*NORM, "--fuzz", "3", "--schedule"], ["--fuzz", "--schedule"]),
        ([*NORM, "x=4x8", "scale=8", "--fuzz", "3"], ["--fuzz", "rms_norm", "x=4x8 scale=8"]),
        ([*NORM, "--set", "eps=0.1", "--fuzz", "3"], ["--fuzz", "rms_norm", "--set eps=0.1"]),
        (["compile", "rms_nrom", "--fuzz", "3"], ["rms_nrom", "did you mean rms_norm?"]),
        (["compile", "matmul", "x=8x8", "w=8x8", "--set", "activation=jaxops.sliu"], ["activation", "sliu"]),
        (["compile", "os.path:join"], ["os.path:join", "needs operands"]),
        (["compile", "no_such_module:f", "x=4"], ["no_such_module", "cannot be imported"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, service, capsys):
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert not streams.out and streams.err.startswith("jaxops: ") and streams.err.count("\n") == 1
    for word in words:
        assert word in streams.err


def test_what_only_the_worker_can_tell_makes_no_sense_either(service, capsys):
    service.results = {"v5p": {"status": "failed", "reason": "--axes must multiply", "bad_question": True}}
    assert main([*NORM, "--mesh", "v5p:2x2x1", "--axes", "data=3"]) == 2
    assert capsys.readouterr().err == "jaxops: --axes must multiply\n"


def test_without_the_compilers_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(compiler.COMPILERS, "gpu", ("gpu-compile", ("no-such-compiler",)))
    assert main([*NORM, "--target", "h100"]) == 2
    assert "pip install 'jaxops[gpu-compile]'" in capsys.readouterr().err
