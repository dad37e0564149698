"""ragged_dot on Mosaic GPU: interpreted, races detected and unwritten memory NaN, against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from pallas_kernels import chips
from pallas_kernels.gpu import ragged_dot as kernel
from tests.kernels import groups
from tests.kernels.groups import data

Tiles = kernel.Tiles
f32, bf16 = jnp.float32, jnp.bfloat16


def interpret(operands, g, out_size, tiles=None, backward_tiles=None):
    static = dict(out_size=out_size, dtype=operands["lhs"].dtype, precision=None)
    with chips.target(chips.named("h100")), interpreter():
        assert kernel.unsupported(**operands, **static) is None
        outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(g,))
        gradients = kernel.backward(**operands, **saved, **static, tiles=backward_tiles)
        return jax.tree.map(np.asarray, jax.block_until_ready({"out": outputs[0]} | gradients))


SMALL = Tiles(64, 2)
CASES = {  # rows, k, n, sizes of groups, tiles
    "unbalanced": (200, 128, 64, (3, 0, 133, 40), SMALL),  # rows beyond the groups; a group without rows
    "one": (1, 64, 64, (1,), None),
    "whole": (256, 64, 192, (128, 128), Tiles(128, 2)),
    "long": (150, 192, 128, (0, 150, 0), Tiles(128, 3)),
    "none": (40, 64, 64, (0, 0), None),
    "tiny": (30, 64, 128, tuple([1, 2, 3] * 5), Tiles(128, 2)),
}


@pytest.mark.timeout(300)
def test_rows_of_two_groups_in_a_tile():
    """A product and its sums: rows before, between and after the groups."""
    operands, g = data(48, 64, 64, (9, 0, 22), bf16)
    lhs, rhs, bounds = operands["lhs"], operands["rhs"], operands["bounds"] + 5
    with chips.target(chips.named("h100")), interpreter():
        out = jax.block_until_ready(kernel.product(lhs, rhs, bounds, bf16, SMALL))
        total = jax.block_until_ready(kernel.sums(lhs, g, bounds, bf16, SMALL))
    groups.check({"out": np.asarray(out), "rhs": np.asarray(total)}, operands | {"bounds": bounds}, g)


@pytest.mark.slow
@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    m, k, n, sizes, tiles = CASES[name]
    operands, g = data(m, k, n, sizes, bf16)
    groups.check(interpret(operands, g, m, tiles, tiles), operands, g)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_groups_that_begin_after_the_first_row():
    """As with a group offset: rows before the first group are 0, too."""
    operands, g = data(200, 64, 64, (70, 60), bf16)
    operands = operands | {"bounds": operands["bounds"] + 43}
    groups.check(interpret(operands, g, 200, SMALL, SMALL), operands, g)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gathered_and_scattered():
    operands, _ = data(60, 64, 64, (70, 0, 60), bf16)
    random = np.random.default_rng(1)
    for name in ("lhs_rows", "out_rows"):
        operands[name] = jnp.asarray(random.integers(0, 61, 140), jnp.int32)  # 60 is a row that is not there
    operands["out_weights"] = jnp.asarray(random.standard_normal(140), f32)
    operands["bounds"] = jnp.array([0, 70, 70, 130])
    g = jnp.asarray(random.standard_normal((60, 64)), bf16)
    groups.check(interpret(operands, g, 60), operands, g, 60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_no_group_has_is_not_touched():
    """NaN in rows without a group and, for every group, in those of others stays out."""
    operands, g = data(150, 64, 64, (20, 51, 43), bf16)
    nan = lambda x: x.at[114:].set(jnp.nan).at[20:71].set(jnp.nan)
    got = interpret(operands | {"lhs": nan(operands["lhs"])}, nan(g), 150, SMALL, SMALL)
    fine = np.r_[0:20, 71:150]
    assert np.isfinite(got["out"][fine]).all() and np.isfinite(got["lhs"][fine]).all()
    assert np.isfinite(got["rhs"][[0, 2]]).all() and np.isnan(got["rhs"][1]).all()
    assert not got["out"][114:].any() and not got["lhs"][114:].any()


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("what", ["sums", "product"])
def test_a_planted_fault_is_found(monkeypatch, what):
    """A result that leaves before it is written."""
    operands, g = data(64, 64, 64, (64,), bf16)
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, "commit_smem", lambda *_: None)
        with pytest.raises(Exception, match="RACE DETECTED"):
            if what == "product":
                jax.block_until_ready(kernel.product(operands["lhs"], operands["rhs"], operands["bounds"], bf16, None))
            else:
                jax.block_until_ready(kernel.sums(operands["lhs"], g, operands["bounds"], bf16, None))
        monkeypatch.undo()


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("chip", "changes", "reason"),
    [
        ("a100", {}, "needs wgmma, which only GPUs of compute capability 9.0 have, not 8.0"),
        ("h100", {"lhs": shape(8, 128, dtype="float32")}, "lhs must be bfloat16, got float32"),
        ("h100", {"rhs": shape(3, 128, 256, dtype="float16")}, "rhs must be bfloat16, got float16"),
        ("h100", {"dtype": jnp.dtype("float16")}, "the result must be bfloat16 or float32, got float16"),
        ("h100", {"rhs": shape(3, 128, 257)}, "k and n must be multiples of 64"),
        ("h100", {"rhs": shape(1 << 16, 128, 256)}, "the grid is limited"),
    ],
)
def test_refusals(chip, changes, reason):
    call = dict(lhs=shape(8, 128), rhs=shape(3, 128, 256), bounds=shape(4, dtype="int32"))
    call |= dict(out_size=8, dtype=jnp.dtype(bf16), precision=None)
    with chips.target(chips.named(chip)):
        assert reason in kernel.unsupported(**(call | changes))


def test_tiles_fit():
    for rows, g, k, n in ((8192, 8, 4096, 4096), (1, 1, 64, 64), (1000, 64, 320, 7168)):
        call = dict(lhs=shape(rows, k), rhs=shape(g, k, n), bounds=shape(g + 1, dtype="int32"), dtype=bf16)
        with chips.target(chips.named("h100")):
            for phase in ("forward", "backward"):
                for weights in (None, shape(rows, dtype="float32")):
                    chosen = kernel.tiles(phase, **call, out_weights=weights)
                    assert kernel.memory(phase, chosen, **call, out_weights=weights) <= chips.named("h100").smem_bytes
                    assert next(kernel.candidates(phase, **call, out_weights=weights)) == chosen
