"""The training program: killed and resumed, on 1 to 8 devices, with damaged or foreign checkpoints, bad arguments."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "train_gpt.py"
sys.path.insert(0, str(PROGRAM.parent))

import train_gpt  # noqa: E402
from gpt import checkpoints, text  # noqa: E402

TINY = [
    "--layers",
    "1",
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
    yield {name.upper(): str(value) for name, value in settings.items()}
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


@pytest.mark.parametrize(
    "mesh",
    ["--devices 1", "--devices 4 --tensor 2"]
    + [pytest.param(f"--devices {n}", marks=pytest.mark.slow) for n in (4, 8)],
)
def test_any_number_of_devices_gives_the_same_losses(book, unbroken, tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(train_gpt, "finish", lambda *_: None)
    assert train(book, tmp_path / "run", *mesh.split()) == 0
    for name in ("loss", "held_out"):
        losses, expected = (
            [line[name] for line in log(out) if name in line] for out in (tmp_path / "run", unbroken[0])
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_mixture_of_experts_is_that_of_plain_jax(book, tmp_path, capsys):
    """Each device routes its own bytes, and holds half of every expert; plain JAX is partitioned by XLA."""
    mesh = ("--devices", "4", "--tensor", "2")
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
    "--tensor must divide --kv-heads 2": "--tensor 4",
    "--kv-heads must divide --heads 4": "--kv-heads 3",
    "--heads must cut --width 16": "--heads 5",
    "1000 are asked for": "--devices 1000",
    "--data 3 times --tensor 2 is not the number of devices": "--data 3 --tensor 2 --devices 4",
    "--batch must be a multiple of the 3 devices": "--data 3 --devices 3",
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
