"""The program that prunes a classifier of digits."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import prune


@pytest.mark.slow
def test_most_weights_are_zero_and_the_digits_are_still_known(capsys):
    pytest.importorskip("sklearn")
    assert prune.main([]) == 0
    printed = capsys.readouterr().out
    assert "blocks of 16 × 16, 80% zero" in printed and "stored without the zeros" in printed
    # without training on, it would not: the program can fail
    assert prune.main(["--epochs", "1", "--sparsity", "0.97"]) == 1


def test_what_is_wrong_is_said(capsys, monkeypatch):
    assert prune.main(["--sparsity", "1.5"]) == 2
    assert "--sparsity must be between 0 and 1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert prune.main([]) == 2
    assert "scikit-learn is missing: pip install 'jaxops[data]'" in capsys.readouterr().err
