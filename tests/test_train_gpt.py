"""The training program as a user runs it: killed and resumed, on 1 to 8 devices, with damaged or foreign checkpoints, with wrong arguments."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "examples" / "train_gpt.py"
sys.path.insert(0, str(PROGRAM.parent))

import train_gpt  # noqa: E402
from gpt import checkpoints, text  # noqa: E402

TINY = (
    "--layers 1 --width 16 --heads 4 --kv-heads 2 --hidden 16 --length 16 --batch 8 --sample 0 "
    "--steps 12 --warmup 2 --checkpoint-every 4 --evaluate-every 6 --dtype float32"
).split()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_bytes(b"".join(b"%d times %d is %d. " % (a, b, a * b) for a in range(30) for b in range(30)))
    return file


def command(book, out, *more):
    return [sys.executable, str(PROGRAM), *TINY, "--text", str(book), "--out", str(out), *more]


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "JAX_PLATFORMS": "cpu"}


def run(*args):
    return subprocess.run(command(*args), env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def unbroken(book, tmp_path_factory):
    """A run from beginning to end in one go: its directory, and what it printed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    done = run(book, out, "--devices", "2", "--compare")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_an_unbroken_run_leaves_everything(unbroken):
    out, printed = unbroken
    assert [line["step"] for line in log(out)] == list(range(1, 13))
    assert [line["step"] for line in log(out) if "held_out" in line] == [6, 12]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{step:06d}" for step in (4, 8, 12)]
    assert (out / "loss.png").stat().st_size > 1000
    for expected in ("losses equal", "rms_norm", "dot_product_attention", "linear_cross_entropy", "on one v5e", "bigram model"):
        assert expected in printed
    assert printed.rstrip().endswith("nats per byte.")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_resumed_is_unbroken(book, unbroken, tmp_path, number):
    out = tmp_path / "run"
    running = subprocess.Popen(command(book, out, "--devices", "2"), env=environment(), stdout=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 6:
        assert running.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.002)
    running.send_signal(number)
    running.communicate(timeout=120)
    assert running.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    resumed = run(book, out, "--devices", "2", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert (out / "log.jsonl").read_bytes() == (unbroken[0] / "log.jsonl").read_bytes()


@pytest.mark.parametrize("mesh", ["--devices 1", "--devices 4", "--devices 8", "--devices 4 --tensor 2"])
def test_any_number_of_devices_gives_the_same_losses(book, unbroken, tmp_path, mesh):
    done = run(book, tmp_path / "run", *mesh.split())
    assert done.returncode == 0, done.stderr
    losses, expected = ([line["loss"] for line in log(out)] for out in (tmp_path / "run", unbroken[0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def begun(unbroken, tmp_path):
    """A copy of the unbroken run without its last checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    shutil.rmtree(out / "checkpoint-000012")
    return out


def largest(checkpoint):
    return max((path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


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


def test_a_damaged_checkpoint_falls_back_and_is_kept(book, unbroken, tmp_path):
    out = begun(unbroken, tmp_path)
    flip_a_bit(out / "checkpoint-000008")
    harmed = largest(out / "checkpoint-000008").read_bytes()
    done = run(book, out, "--devices", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert "checkpoint-000008 is damaged" in done.stdout and "checkpoint-000004, step 4" in done.stdout
    assert largest(out / "checkpoint-000008.damaged").read_bytes() == harmed
    assert checkpoints.damage(out / "checkpoint-000008") is None
    assert (out / "log.jsonl").read_bytes() == (unbroken[0] / "log.jsonl").read_bytes()


def refused(capsys, *args):
    """What the program says, in this process, when it exits with 2."""
    assert train_gpt.main([*TINY, *map(str, args)]) == 2
    return capsys.readouterr().err


def test_another_model_is_refused(book, unbroken, capsys):
    before = sorted(unbroken[0].rglob("*"))
    message = refused(capsys, "--text", book, "--out", unbroken[0], "--devices", 2, "--resume", "--hidden", 32, "--untied")
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
    smoothed = [-(np.log((3 + k * single["b"]) / (4 + k)) + np.log((3 + k * single["a"]) / (3 + k))) / 2 for k in (1, 3, 10, 30, 100)]
    assert text.bigram_loss(train, windows) == pytest.approx(min(smoothed))
