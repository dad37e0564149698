"""The program that prunes a classifier of digits or a GPT."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import prune
import train_gpt


@pytest.mark.slow
def test_most_weights_are_zero_and_the_digits_are_still_known(capsys):
    pytest.importorskip("sklearn")
    assert prune.main([]) == 0
    printed = capsys.readouterr().out
    assert "blocks of 16 × 16, 80% zero" in printed and "stored without the zeros" in printed
    # without training on, it would not: the program can fail
    assert prune.main(["--epochs", "1", "--sparsity", "0.97"]) == 1


@pytest.mark.slow
def test_a_trained_gpt_of_which_most_weights_are_zero(tmp_path, capsys):
    book, out = tmp_path / "book.txt", tmp_path / "run"
    book.write_bytes(b"".join(b"%d times %d is %d. " % (a, b, a * b) for a in range(30) for b in range(30)))
    sizes = "--layers 1 --width 32 --heads 4 --kv-heads 2 --hidden 64 --length 48 --batch 8 --steps 30 --warmup 4"
    rest = "--sample 0 --evaluate-every 30 --checkpoint-every 30 --learning-rate 0.02 --devices 1 --untied"
    assert train_gpt.main([*sizes.split(), *rest.split(), "--text", str(book), "--out", str(out)]) == 0
    capsys.readouterr()
    assert prune.main(["--gpt", str(out), "--text", str(book), "--steps", "100", "--sparsity", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "stored without the zeros" in printed and "head" not in printed
    assert "blocks/0/attention/query" in printed and "blocks/0/mlp/down" in printed
    # without training on, it would not: the program can fail
    assert prune.main(["--gpt", str(out), "--text", str(book), "--steps", "2"]) == 1


def test_what_is_wrong_is_said(tmp_path, capsys, monkeypatch):
    assert prune.main(["--sparsity", "1.5"]) == 2
    assert "--sparsity must be between 0 and 1" in capsys.readouterr().err
    assert prune.main(["--steps", "1"]) == 2
    assert "--steps at least 2, got 0.8, 40, 1" in capsys.readouterr().err
    assert prune.main(["--gpt", str(tmp_path / "nothing")]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert prune.main([]) == 2
    assert "scikit-learn is missing: pip install 'jaxops[data]'" in capsys.readouterr().err
