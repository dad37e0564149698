"""The program that quantises trained models."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import quantize
import sentence_encoder
import train_gpt
from flax import nnx

from jaxops.nn import QuantizedConv, QuantizedLinear


@pytest.mark.slow
def test_a_trained_gpt_keeps_what_it_knows(tmp_path, capsys, monkeypatch):
    book, out, drawn = tmp_path / "book.txt", tmp_path / "run", tmp_path / "costs.svg"
    book.write_bytes(b"".join(b"%d times %d is %d. " % (a, b, a * b) for a in range(30) for b in range(30)))
    sizes = "--layers 1 --width 32 --heads 4 --kv-heads 2 --hidden 64 --length 48 --batch 8 --steps 30 --warmup 4"
    rest = "--sample 0 --evaluate-every 30 --checkpoint-every 30 --learning-rate 0.02 --devices 1"
    assert train_gpt.main([*sizes.split(), *rest.split(), "--text", str(book), "--out", str(out)]) == 0
    capsys.readouterr()
    assert quantize.main([str(out), "--text", str(book), "--report", str(drawn)]) == 0
    printed = capsys.readouterr().out
    assert "8 bits" in printed and "4 bits" in printed and "costs most: " in printed and drawn.exists()
    # weights that are thrown away are noticed: the program can fail
    quantize_model = quantize.quantize_model
    monkeypatch.setattr(quantize, "quantize_model", lambda *given: ruined(*quantize_model(*given)))
    assert quantize.main([str(out), "--text", str(book)]) == 1


@pytest.mark.slow
def test_a_trained_cnn_keeps_what_it_knows(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'jaxops[data]'")
    drawn = tmp_path / "costs.svg"
    assert quantize.main(["--cnn", "--epochs", "4", "--report", str(drawn)]) == 0
    printed = capsys.readouterr().out
    assert "8 bits" in printed and "4 bits" in printed and "costs most: " in printed and drawn.exists()
    assert all(name in printed for name in ("stem", "blocks/2/conv2", "blocks/1/shortcut", "head"))
    quantize_model = quantize.quantize_model
    monkeypatch.setattr(quantize, "quantize_model", lambda *given: ruined(*quantize_model(*given)))
    assert quantize.main(["--cnn", "--epochs", "1"]) == 1


def ruined(model, report):
    for _, module in nnx.iter_modules(model):
        if isinstance(module, QuantizedLinear | QuantizedConv):
            module.values.set_value(module.values[...] * 0)
    return model, report


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    assert quantize.main([str(tmp_path / "nothing")]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert quantize.main(["--encoder", str(tmp_path)]) == 2
    assert "--encoder takes no directory" in capsys.readouterr().err
    for more in (["--epochs", "0"], ["--encoder"], [str(tmp_path)]):
        assert quantize.main(["--cnn", *more]) == 2
        assert "--cnn takes no directory and no --encoder" in capsys.readouterr().err
    monkeypatch.setattr(sentence_encoder, "PACKAGE", "no_such_package")
    assert quantize.main(["--encoder"]) == 2
    assert "no_such_package" in capsys.readouterr().err


def test_the_ranking_is_of_the_nearest_other():
    embeddings = np.array([[1, 0], [0.9, 0.1], [0, 1.0]])
    assert quantize.best(embeddings).tolist() == [1, 0, 1]
