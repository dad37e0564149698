"""ragged_dot on the TPU: interpreted, races detected and unwritten memory NaN, against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.tpu import ragged_dot as kernel
from tests.kernels import groups
from tests.kernels.groups import data

Tiles = kernel.Tiles
f32, bf16 = jnp.float32, jnp.bfloat16


def interpret(operands, g, out_size, tiles, backward_tiles, chip="v5p"):
    """Both kernels, interpreted; for v5p, each of its two cores takes a share of the columns."""
    static = dict(out_size=out_size, dtype=operands["lhs"].dtype, precision=None)

    def run(operands, g):
        assert kernel.unsupported(**operands, **static) is None
        outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(g,))
        return {"out": outputs[0]} | kernel.backward(**operands, **saved, **static, tiles=backward_tiles)

    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", num_cores_or_threads=2)
    with chips.target(chips.named(chip)), pltpu.force_tpu_interpret_mode(params):
        return jax.tree.map(np.asarray, jax.jit(run)(operands, g))


def check(operands, g, out_size=None, tiles=None, backward_tiles=None, chip="v5p"):
    groups.check(interpret(operands, g, out_size or len(g), tiles, backward_tiles, chip), operands, g, out_size)


SMALL, SMALL_BACKWARD = Tiles(128, 128), Tiles(128, 128, 128)
CASES = [  # rows, k, n, sizes of groups, dtype, tiles
    (1, 1, 1, (1,), f32, None, None),
    (129, 127, 129, (5, 0, 120), bf16, SMALL, SMALL_BACKWARD),  # rows beyond the groups; a group without rows
    (256, 128, 128, (128, 128), f32, SMALL, SMALL_BACKWARD),  # every piece fills its tile
    pytest.param(300, 128, 100, (0, 300, 0), bf16, Tiles(256, 128), Tiles(256, 128, 128), marks=pytest.mark.slow),
    pytest.param(300, 130, 128, (1, 1, 290), f32, Tiles(384, 128), Tiles(256, 128, 256), marks=pytest.mark.slow),
    pytest.param(60, 16, 16, (0, 0), f32, None, None, marks=pytest.mark.slow),  # no group has rows
]


@pytest.mark.parametrize("m, k, n, sizes, dtype, tiles, backward_tiles", CASES)
def test_against_float64(m, k, n, sizes, dtype, tiles, backward_tiles):
    operands, g = data(m, k, n, sizes, dtype)
    check(operands, g, tiles=tiles, backward_tiles=backward_tiles)


def test_groups_that_begin_after_the_first_row():
    """As with a group offset: rows before the first group are 0, too."""
    operands, g = data(200, 32, 32, (70, 60), f32)
    check(operands | {"bounds": operands["bounds"] + 40}, g, tiles=SMALL, chip="v5e")


@pytest.mark.parametrize("rows", [60, 61])  # 60 is a row that is not there
def test_gathered_and_scattered(rows):
    operands, _ = data(60, 32, 40, (70, 0, 60), bf16)
    random = np.random.default_rng(1)
    for name in ("lhs_rows", "out_rows"):
        operands[name] = jnp.asarray(random.integers(0, rows, 140), jnp.int32)
    operands["out_weights"] = jnp.asarray(random.standard_normal(140), f32)
    operands["bounds"] = jnp.array([0, 70, 70, 130])
    check(operands, jnp.asarray(random.standard_normal((60, 40)), bf16), out_size=60)


def test_what_no_group_has_is_not_touched():
    """NaN in rows without a group, in the tiles of others and past the end of the arrays, stays out."""
    operands, g = data(150, 16, 16, (20, 110), f32)
    nan = lambda x: x.at[130:].set(jnp.nan)
    got = interpret(operands | {"lhs": nan(operands["lhs"])}, nan(g), 150, SMALL, SMALL_BACKWARD)
    assert all(np.isfinite(x).all() for x in got.values())
    assert not got["out"][130:].any() and not got["lhs"][130:].any()


@pytest.mark.parametrize("sizes", [(128, 128, 128), (5, 0, 0, 300, 1), (0, 0), (384,), (1, 1, 1)])
@pytest.mark.parametrize("sums", [False, True])
def test_pieces_are_all_rows_in_order(sizes, sums):
    rows, tile = 384, 128
    bounds = jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)
    cut = np.asarray(kernel.pieces(bounds, rows, tile, sums=sums))
    covered = np.full(rows, -1)
    for t, group, result, low, high, action in cut.T:
        assert 0 <= t < rows // tile
        if action != kernel.NOTHING:
            assert low >= 0 and high <= tile and result == (group if sums else t)
            here = slice(t * tile + low, t * tile + high)
            assert (covered[here] == -1).all()
            covered[here] = group if action == kernel.PRODUCT else len(sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    beyond = -1 if sums else len(sizes)  # where the sums are made, rows without a group do not matter
    np.testing.assert_array_equal(covered, np.append(owner, np.full(rows - len(owner), beyond)))
    assert (np.diff(cut[kernel.RESULT]) >= 0).all()  # a block of the result is left once
    if sums:
        assert set(cut[kernel.RESULT]) == set(range(len(sizes)))


WIDE = {"lhs": jax.ShapeDtypeStruct((8, 128), f32), "rhs": jax.ShapeDtypeStruct((3, 128, 256), f32)}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"lhs": jax.ShapeDtypeStruct((8, 128), jnp.float16)}, "lhs must be float32 or bfloat16"),
        ({"rhs": jax.ShapeDtypeStruct((3, 128, 256), f32)}, "rhs must have the dtype of lhs"),
        ({"dtype": jnp.dtype(jnp.float16)}, "the result must be float32 or bfloat16"),
        (
            {**WIDE, "precision": "tensorfloat32"},
            "multiplied in precision default or highest on a TPU, not tensorfloat32",
        ),
        ({"rhs": jax.ShapeDtypeStruct((3, 1 << 17, 256), bf16)}, "k ≤"),
        ({"rhs": jax.ShapeDtypeStruct((3, 128, 1 << 17), bf16)}, "n ≤"),
    ],
)
def test_refusals(change, reason):
    operands = {
        "lhs": jax.ShapeDtypeStruct((8, 128), bf16),
        "rhs": jax.ShapeDtypeStruct((3, 128, 256), bf16),
        "bounds": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    static = dict(out_size=8, dtype=jnp.dtype(bf16), precision=None)
    assert kernel.unsupported(**operands, **static | {"precision": "tensorfloat32"}) is None  # bfloat16: exact anyway
    assert kernel.unsupported(**operands | WIDE, **static | {"precision": "highest"}) is None
    assert reason in kernel.unsupported(**(operands | static | change))
