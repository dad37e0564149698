"""The image-training program: digits and a folder of images, what it learns, and what it is told wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import train_cnn

TINY = ["--epochs", "1", "--batch", "8", "--widths", "4,8"]


@pytest.fixture
def folder(tmp_path):
    """Dark and bright noise, as pictures of two sizes."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'jaxops[data]'")
    random = np.random.default_rng(0)
    for name, level in (("bright", 160), ("dark", 20)):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = (level + random.integers(0, 60, (10 + i % 2, 9, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_a_folder_of_images(folder, capsys):
    images = train_cnn.load_folder(folder, 8)
    assert images.x.shape == (32, 8, 8, 3) and images.held_out_x.shape == (8, 8, 8, 3)
    assert images.classes == ("bright", "dark") and sorted(images.held_out_labels) == [0] * 4 + [1] * 4
    assert images.x.min() >= 0 and images.x.max() <= 1
    assert train_cnn.main([*TINY, "--data", str(folder), "--size", "8"]) == 0
    told = capsys.readouterr().out
    assert "32 images of 2 classes, 8 held out" in told and "held-out accuracy" in told


@pytest.mark.slow
def test_a_model_learns_and_evaluates_by_running_averages(folder):
    images = train_cnn.load_folder(folder, 8)
    model = train_cnn.ResNet(3, 2, (4, 8), rngs=nnx.Rngs(0))
    losses = []
    report = lambda epoch, loss, seen: losses.append(loss)
    train_cnn.train(model, images, epochs=12, batch=8, learning_rate=1e-2, report=report)
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    assert np.abs(model.norm.mean[...]).max() > 0
    assert train_cnn.accuracy(model, images.held_out_x, images.held_out_labels) == 1


@pytest.mark.slow
def test_digits(capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'jaxops[data]'")
    images = train_cnn.load_digits()
    assert images.x.shape == (1438, 8, 8, 1) and len(images.held_out_x) == 359 and len(images.classes) == 10
    assert train_cnn.main(["--epochs", "1", "--widths", "4,8"]) == 0
    assert "1438 images of 10 classes" in capsys.readouterr().out


WRONG = {
    "is no folder": ["--data", "/there/is/none"],
    "must hold a folder for each of at least 2 classes": ["--data", "."],
    "--size must be at least 4, got 2": ["--size", "2"],
    "--widths must be numbers of channels": ["--widths", "8,x"],
    "--learning-rate must be positive": ["--learning-rate", "0"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_cnn.main(WRONG[message]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_that_is_none(folder, capsys):
    (folder / "dark" / "broken.png").write_bytes(b"no picture")
    assert train_cnn.main(["--data", str(folder)]) == 2
    assert "broken.png cannot be read" in capsys.readouterr().err
