"""The training program: killed and resumed, on 1 to 8 devices, with damaged or foreign checkpoints, bad arguments."""

import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "train_gpt.py"
sys.path.insert(0, str(PROGRAM.parent))

import train_gpt  # noqa: E402
from gpt import checkpoints, text  # noqa: E402
from gpt.model import GPT, Config  # noqa: E402
from gpt.parallel import BATCH, Parallel  # noqa: E402

import jaxops.optim  # noqa: E402
import sharding  # noqa: E402
from jaxops import interpreter  # noqa: E402

TINY = [
    "--layers",
    "2",
    "--width",
    "16",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--hidden",
    "16",
    "--length",
    "16",
    "--batch",
    "8",
    "--sample",
    "0",
    "--steps",
    "12",
    "--warmup",
    "2",
    "--checkpoint-every",
    "4",
    "--evaluate-every",
    "6",
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Compiled programs are kept for the other runs of this file, in this process and in others."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with interpreter.unoptimized():  # sooner compiled, for what runs a few steps
        yield {
            name.upper(): str(value) for name, value in (settings | {"jax_disable_most_optimizations": True}).items()
        }
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_bytes(b"".join(b"%d times %d is %d. " % (a, b, a * b) for a in range(30) for b in range(30)))
    return file


def train(book, out, *more):
    """The program in this process."""
    return train_gpt.main([*TINY, "--text", str(book), "--out", str(out), *more])


@pytest.fixture(scope="module")
def unbroken(book, tmp_path_factory):
    """A run from beginning to end in one go, as a user starts it: its directory, and what it printed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train(book, out, "--devices", "2", "--compare") == 0
    return out, printed.getvalue()


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_an_unbroken_run_leaves_everything(unbroken):
    out, printed = unbroken
    assert [line["step"] for line in log(out)] == list(range(1, 13))
    assert [line["step"] for line in log(out) if "held_out" in line] == [6, 12]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{step:06d}" for step in (4, 8, 12)]
    assert (out / "loss.png").stat().st_size > 1000
    for expected in (
        "losses equal",
        "rms_norm",
        "dot_product_attention",
        "linear_cross_entropy",
        "on one v5e",
        "bigram model",
    ):
        assert expected in printed
    assert printed.rstrip().endswith("nats per byte.")


@pytest.mark.slow
def test_killed_and_resumed_is_unbroken(book, unbroken, compiled_once, tmp_path, capsys):
    out = tmp_path / "run"
    environment = os.environ | compiled_once
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = [sys.executable, str(PROGRAM), *TINY, "--text", str(book), "--out", str(out), "--devices", "2"]
    with subprocess.Popen(started, env=environment, stdout=subprocess.DEVNULL) as running:
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 6:
            assert running.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert train(book, out, "--devices", "2", "--resume") == 0
    assert "resuming from" in capsys.readouterr().out
    assert (out / "log.jsonl").read_bytes() == (unbroken[0] / "log.jsonl").read_bytes()


def environment_of(settings):
    """Of a process of its own, with the devices that it makes for itself."""
    environment = os.environ | settings
    environment.pop("XLA_FLAGS", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return environment


def together(book, out, count, mesh, environment, *more):
    """As many processes with the program, of one job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    job = ["--coordinator", coordinator, "--processes", str(count), "--heartbeat", "20", "--mesh", mesh, *more]
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), *TINY, "--text", str(book), "--out", str(out), *job, "--process", str(i)],
            env=environment_of(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def ended(job):
    """[(exit code, output, errors)] of a job's processes, which have a bounded time."""
    try:
        told = [process.communicate(timeout=300) for process in job]
    finally:
        for process in job:
            process.kill()
    return [(process.returncode, *one) for process, one in zip(job, told, strict=True)]


# What the transport itself prints, whose threads put the pieces of their lines between one another's.
GLOO = re.compile(r"\[Gloo\] Rank | is connected to | peer ranks\. Expected number of connected peer ranks is : |\d|\s")


@pytest.mark.slow
@pytest.mark.parametrize("count, mesh", [(2, "data=2"), (4, "data=2,tensor=2,pipeline=2")])
def test_several_processes_are_one(book, unbroken, compiled_once, tmp_path, count, mesh):
    results = ended(together(book, tmp_path / "run", count, mesh, compiled_once))
    assert [code for code, *_ in results] == [0] * count, results
    printed = " ".join(results[0][1].split())  # lines are broken where the terminal ends
    assert f"in {count} processes as {mesh}" in printed and "bigram model" in printed
    for _, printed, _ in results[1:]:
        assert not GLOO.sub("", printed)
    same_losses(tmp_path / "run", unbroken[0])
    assert checkpoints.damage(tmp_path / "run" / "checkpoint-000012") is None


def wait_for_step(job, out, step):
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < step:
        assert all(process.poll() is None for process in job), ended(job)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_job_and_all_go_on_again(book, unbroken, compiled_once, tmp_path, lost):
    out = tmp_path / "run"
    job = together(book, out, 2, "data=2", compiled_once)
    wait_for_step(job, out, 6)
    job[lost].kill()
    began = time.monotonic()
    results = ended(job)
    assert time.monotonic() - began < 60
    code, _, errors = results[1 - lost]
    assert code in (train_gpt.LOST, -signal.SIGABRT), results  # of ours, or of JAX, whichever sees it first
    assert "Start all again, with --resume" in errors or "another task died" in errors
    results = ended(together(book, out, 2, "data=2", compiled_once, "--resume"))
    assert [code for code, *_ in results] == [0, 0], results
    assert "resuming from" in results[0][1]
    same_losses(out, unbroken[0])


@pytest.mark.slow
def test_a_terminated_job_saves_and_goes_on(book, unbroken, compiled_once, tmp_path):
    out = tmp_path / "run"
    job = together(book, out, 2, "data=2", compiled_once, "--steps", "500")
    wait_for_step(job, out, 2)
    job[1].terminate()  # one of them is told, and all stop after the same step
    results = ended(job)
    assert [code for code, *_ in results] == [128 + signal.SIGTERM] * 2, results
    step = len(log(out))
    assert f"interrupted after step {step}: saved" in results[0][1]
    assert checkpoints.damage(out / f"checkpoint-{step:06d}") is None


@pytest.mark.slow
def test_processes_of_different_runs_are_told(book, compiled_once, tmp_path):
    job = together(book, tmp_path / "run", 2, "data=2", compiled_once)
    job[1].kill()
    job[1].communicate()
    arguments = [*job[1].args, "--seed", "7"]
    job[1] = subprocess.Popen(
        arguments, env=environment_of(compiled_once), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    results = ended(job)
    assert [code for code, *_ in results] == [2, 2], results
    assert "process 1: other arguments, or another text, than process 0" in results[1][2]
    assert "process 0: process 1 cannot go on, and says why" in results[0][2]


RAY = ROOT / "examples" / "train_on_ray.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_starts_the_processes_and_starts_them_again(book, unbroken, compiled_once, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxops[ray]'")
    out, told = tmp_path / "run", tmp_path / "told.txt"
    arguments = [*TINY, "--text", str(book), "--out", str(out), "--mesh", "data=2"]
    with told.open("w") as file:
        job = subprocess.Popen(
            [sys.executable, str(RAY), "--processes", "2", "--restarts", "1", "--", *arguments],
            env=environment_of(compiled_once),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_step([job], out, 6)
            printing = re.search(r"Process pid=(\d+)\D.* step 1/12", told.read_text())
            os.kill(int(printing[1]), signal.SIGKILL)
            assert job.wait(timeout=500) == 0, told.read_text()
        finally:
            job.terminate()
    assert "a process was lost, 1 restarts are left" in told.read_text()
    assert "resuming from" in told.read_text()
    same_losses(out, unbroken[0])


def test_wrong_arguments_on_ray(capsys):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'jaxops[ray]'")
    import train_on_ray

    for message, arguments in {
        "--processes must be at least 1": "--processes 0 -- --out there",
        "must have --out": "--processes 2 -- --mesh data=2",
        "expected NAME=N": "--processes 2 --each GPU=all -- --out there",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            train_on_ray.main(arguments.split())
        assert message in capsys.readouterr().err
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_interrupted_and_resumed_is_unbroken(book, unbroken, tmp_path, monkeypatch, capsys, step):
    def write(lines, line, show):
        if line["step"] == step:
            signal.raise_signal(signal.SIGINT)  # what Ctrl-C does
        wrote(lines, line, show)

    wrote = train_gpt.write
    monkeypatch.setattr(train_gpt, "write", write)
    assert train(book, tmp_path / "run", "--devices", "2") == 130
    assert f"interrupted after step {step}" in capsys.readouterr().out
    monkeypatch.setattr(train_gpt, "write", wrote)
    assert train(book, tmp_path / "run", "--devices", "2", "--resume") == 0
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (unbroken[0] / "log.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    ["--mesh data=2,tensor=2 --zero 2 --micro-batches 2", "--devices 1", "--devices 4 --zero 0", "--devices 8"],
)
def test_any_number_of_devices_gives_the_same_losses(book, unbroken, tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(train_gpt, "finish", lambda *_: None)
    assert train(book, tmp_path / "run", *mesh.split()) == 0
    same_losses(tmp_path / "run", unbroken[0])


def same_losses(out, expected_out):
    for name in ("loss", "held_out"):
        losses, expected = ([line[name] for line in log(one) if name in line] for one in (out, expected_out))
        assert losses
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_pipeline_gives_the_same_losses_and_goes_on_on_another_mesh(book, unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "finish", lambda *_: None)
    out = tmp_path / "run"
    mesh = ("--mesh", "data=2,tensor=2,pipeline=2", "--schedule", "zero_bubble", "--micro-batches", "2")
    assert train(book, out, *mesh) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "8 cpu devices as data=2,tensor=2,pipeline=2",
        "zero_bubble, 2 micro-batches on 2 stages, 14% of the cells idle; a CPU sends nothing beside work",
        "│ data │ 11 reduce-scatter, 1 all-reduce, 11 all-gather │",  # of each kind of parameter; the loss
        "│ pipeline │ 14 collective-permute,",
        "│ tensor │ 12 reduce-scatter, 12 all-gather,",  # 6 for each of 2 micro-batches
    ):
        assert expected in printed
    same_losses(out, unbroken[0])
    for step in (8, 12):
        shutil.rmtree(out / f"checkpoint-{step:06d}")
    assert train(book, out, "--devices", "2", "--resume") == 0
    assert "mesh is data=2,tensor=2,pipeline=2 there and data=2 here" in capsys.readouterr().out
    same_losses(out, unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "pipeline": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_twenty_steps_are_those_of_one_device_whatever_the_axes_are_to_jax(book, sizes):
    """Losses, and every parameter at the end; the step itself has all axes by hand."""
    config = Config(layers=2, width=16, heads=4, kv_heads=2, hidden=16, length=16, tied=True)
    reduction = sharding.gradient_reduction(
        jaxops.optim.adamw(1e-2, max_norm=1.0, small=0), axis=BATCH, reduce="sum", small=0
    )
    begin = nnx.state(GPT(config, jnp.float32, rngs=nnx.Rngs(0)))
    corpus = text.load(book)

    def trained(mesh, table):
        model = Parallel(config, jnp.float32, mesh, table)
        put = lambda tree, specs: jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        parameters = model.stacked(begin)
        parameters = put(parameters, model.specs(parameters))
        state = jax.jit(functools.partial(model.init, reduction))(parameters)
        step = jax.jit(functools.partial(model.step, reduction))
        losses = []
        for n in range(20):
            windows = put(corpus.batch(0, n, 8, config.length, slice(None)), P(BATCH))
            loss, parameters, state = step(parameters, state, windows)
            losses.append(float(loss))
        return losses, model.layered(jax.device_get(parameters))

    expected = trained(sharding.make_mesh(data=1, devices=jax.devices()[:1]), None)
    devices = jax.devices()[: math.prod(sizes.values())]
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = sharding.make_mesh(**sizes, devices=devices, axis_types=kind)
        losses, parameters = trained(mesh, sharding.schedule("1f1b", 2, 4) if "pipeline" in sizes else None)
        np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), parameters, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--mesh pipeline=2 --schedule gpipe",
        "--mesh pipeline=4 --schedule 1f1b --micro-batches 8",
        "--mesh data=2,tensor=2,pipeline=2 --schedule interleaved_1f1b --micro-batches 4",
        "--mesh fsdp=2,tensor=2,pipeline=2 --schedule zero_bubble",
        "--mesh data=2,fsdp=4 --zero 2 --micro-batches 3",
        "--mesh data=2,fsdp=2,tensor=2 --compress bfloat16",
        "--mesh data=3,tensor=2 --zero 0",
        "--devices 3",  # divides no dimension: moments are padded
        "--devices 8 --zero 3",
        "--mesh data=4,tensor=2 --zero 2 --micro-batches 2 --compress int8",
        "--mesh data=2,tensor=2,pipeline=2 --compress int8",
    ],
)
def test_any_mesh_gives_the_same_losses_and_takes_up_any_other(book, tmp_path, monkeypatch, options):
    """20 steps; from the middle on one device, and from one device's middle on the mesh."""
    monkeypatch.setattr(train_gpt, "finish", lambda *_: None)
    common = ("--layers", "4", "--batch", "24", "--steps", "20", "--checkpoint-every", "10", "--evaluate-every", "10")
    meshes = {"one": ("--devices", "1"), "many": tuple(options.split())}
    for name, mesh in meshes.items():
        assert train(book, tmp_path / name, *common, *mesh) == 0
    same_losses(tmp_path / "many", tmp_path / "one")
    for name, mesh in zip(meshes, reversed(meshes.values()), strict=True):
        shutil.copytree(tmp_path / name, tmp_path / f"{name} first")
        shutil.rmtree(tmp_path / f"{name} first" / "checkpoint-000020")
        assert train(book, tmp_path / f"{name} first", *common, *mesh, "--resume") == 0
        same_losses(tmp_path / f"{name} first", tmp_path / "one")


@pytest.mark.slow
def test_a_mixture_of_experts_is_that_of_plain_jax(book, tmp_path, capsys):
    """Each device routes its own bytes, and holds half of every expert; plain JAX is partitioned by XLA."""
    mesh = ("--mesh", "data=2,tensor=2")
    assert train(book, tmp_path / "run", *mesh, "--experts", "4", "--steps", "4", "--compare") == 0
    printed = capsys.readouterr().out
    for expected in ("losses equal", "ragged_dot", "temporary memory of a step", "experts 4"):
        assert expected in printed


def begun(unbroken, tmp_path):
    """A copy of the unbroken run without its last checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    shutil.rmtree(out / "checkpoint-000012")
    return out


def largest(checkpoint):
    return max(
        (path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def cut_short(checkpoint):
    os.truncate(largest(checkpoint), largest(checkpoint).stat().st_size // 2)


def flip_a_bit(checkpoint):
    data = bytearray(largest(checkpoint).read_bytes())
    data[len(data) // 2] ^= 1
    largest(checkpoint).write_bytes(data)


def lose_a_file(checkpoint):
    largest(checkpoint).unlink()


def lose_the_contents(checkpoint):
    (checkpoint / "contents.json").write_text("{")


@pytest.mark.parametrize("harm", [cut_short, flip_a_bit, lose_a_file, lose_the_contents])
def test_damage_is_found(unbroken, tmp_path, harm):
    out = begun(unbroken, tmp_path)
    assert checkpoints.damage(out / "checkpoint-000008") is None
    harm(out / "checkpoint-000008")
    told = []
    assert checkpoints.newest_whole(out, told.append) == out / "checkpoint-000004"
    assert len(told) == 1 and "checkpoint-000008 is damaged" in told[0]


def test_a_damaged_checkpoint_falls_back_and_is_kept(book, unbroken, tmp_path, capsys):
    out = begun(unbroken, tmp_path)
    flip_a_bit(out / "checkpoint-000008")
    harmed = largest(out / "checkpoint-000008").read_bytes()
    assert train(book, out, "--devices", "2", "--resume") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-000008 is damaged" in printed and "checkpoint-000004, step 4" in printed
    assert largest(out / "checkpoint-000008.damaged").read_bytes() == harmed
    assert checkpoints.damage(out / "checkpoint-000008") is None
    assert (out / "log.jsonl").read_bytes() == (unbroken[0] / "log.jsonl").read_bytes()


def refused(capsys, *args):
    """What the program says when it exits with 2."""
    assert train_gpt.main([*TINY, *map(str, args)]) == 2
    return capsys.readouterr().err


def test_another_model_is_refused(book, unbroken, capsys):
    before = sorted(unbroken[0].rglob("*"))
    message = refused(
        capsys, "--text", book, "--out", unbroken[0], "--devices", 2, "--resume", "--hidden", 32, "--untied"
    )
    assert "holds another model: hidden is 16 there and 32 here, tied is True there and False here" in message
    assert sorted(unbroken[0].rglob("*")) == before


def test_a_directory_in_use_is_refused(book, unbroken, capsys):
    assert "is not empty" in refused(capsys, "--text", book, "--out", unbroken[0], "--devices", 2)


BAD = {
    "No such file": "--text nowhere.txt",
    "its last tenth must hold": "--batch 80000 --devices 1",
    "--kv-heads must be a multiple of the 4 devices along tensor, got 2": "--mesh tensor=4",
    "--hidden must be a multiple of the 2 devices along tensor, got 15": "--mesh tensor=2 --hidden 15",
    "--length must be a multiple of the 2 devices along tensor, got 15": "--mesh tensor=2 --length 15",
    "the vocabulary must be a multiple of the 3 devices along tensor, got 256": (
        "--mesh tensor=3 --width 24 --heads 6 --kv-heads 3 --hidden 24 --length 18"
    ),
    "--layers must be a multiple of the 2 stages along pipeline, got 3": "--mesh pipeline=2 --layers 3",
    "--layers must be a multiple of the 2 stages along pipeline, 2 chunks each, got 2": (
        "--mesh pipeline=2 --schedule interleaved_1f1b --layers 2"
    ),
    "--micro-batches: schedule: micro_batches must be at least the 4 stages for 'zero_bubble', got 2": (
        "--mesh pipeline=4 --schedule zero_bubble --micro-batches 2"
    ),
    "--micro-batches must divide the 4 windows": "--mesh data=2,pipeline=2 --layers 2 --micro-batches 3",
    "--experts go with pipeline=1 and one micro-batch, got 2 and 4": "--mesh pipeline=2 --layers 2 --experts 4",
    "--experts go with pipeline=1 and one micro-batch, got 1 and 2": "--micro-batches 2 --devices 2 --experts 4",
    "--micro-batches must divide the 4 windows of --batch": "--devices 2 --micro-batches 3",
    "--schedule goes with a pipeline": "--mesh data=2 --schedule gpipe",
    "--zero: invalid choice": "--zero 4",
    "--compress: invalid choice": "--compress float16",
    "--compress goes with --zero 1 or 2 and 2 devices or more along data, got --zero 0 and 2": (
        "--devices 2 --zero 0 --compress int8"
    ),
    "--compress goes with --zero 1 or 2 and 2 devices or more along data, got --zero 3 and 1": (
        "--devices 2 --zero 3 --compress int8"
    ),
    "2 devices or more along data, got --zero 1 and 1": "--mesh fsdp=2 --compress bfloat16",
    "axes are data, fsdp, tensor, pipeline, got 'context'": "--mesh data=2,context=2",
    "data is there twice": "--mesh data=2,data=2",
    "tensor must be a number of devices, at least 1, got 'tensor=0'": "--mesh tensor=0",
    "not allowed with argument --mesh": "--mesh data=2 --devices 2",
    "--coordinator, --processes and --process go together": "--coordinator here:1234 --processes 2",
    "--process must be in [0, --processes = 2), got 2": "--coordinator here:1234 --processes 2 --process 2",
    "--kv-heads must divide --heads 4": "--kv-heads 3",
    "--heads must cut --width 16": "--heads 5",
    "1000 devices are asked for": "--devices 1000",
    "--batch must be a multiple of the 3 devices along data and fsdp, got 8": "--mesh data=3",
    "--steps must be at least 1": "--steps 0",
    "--experts must be 0 or at least 2": "--experts 1",
    "--warmup must be in": "--warmup 12",
    "--sample must be in": "--sample 16",
    "invalid choice": "--dtype float16",
    "unrecognized arguments": "--gpu",
    "there is no directory": "--resume --out nowhere",
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_are_named(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *BAD[message].split())
    assert not list(tmp_path.iterdir())


def test_data_is_a_function_of_seed_and_step():
    corpus = text.load(None)
    first, again, next_step, other_seed = (corpus.batch(*key, 4, 32) for key in ((1, 2), (1, 2), (1, 3), (2, 2)))
    np.testing.assert_array_equal(first, again)
    assert (first != next_step).any() and (first != other_seed).any()
    windows = corpus.held_out_batches(4, 32).reshape(-1, 33)
    np.testing.assert_array_equal(windows[:, :-1].ravel(), corpus.held_out[: windows.shape[0] * 32])


def test_bigram_loss_is_its_definition():
    train = np.frombuffer(b"abababac", np.uint8)
    windows = np.frombuffer(b"aba", np.uint8)[None]
    single = {"a": 5 / 264, "b": 4 / 264}
    smoothed = [
        -(np.log((3 + k * single["b"]) / (4 + k)) + np.log((3 + k * single["a"]) / (3 + k))) / 2
        for k in (1, 3, 10, 30, 100)
    ]
    assert text.bigram_loss(train, windows) == pytest.approx(min(smoothed))
