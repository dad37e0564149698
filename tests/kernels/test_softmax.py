"""softmax on the TPU and on Mosaic GPU: interpreted, races detected, against a float64 oracle."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxops.reference.softmax import softmax as reference
from pallas_kernels import chips, gpu, rows, tpu

f32, bf16 = "float32", "bfloat16"
slow = pytest.mark.slow
# shape of x, axis, dtype, shape of `where`, temperature, tiles
TPU = [
    ((5, 3, 3, 43), (2, 3), f32, (129,), 2.0, None),  # two axes are a row
    pytest.param(
        ((70, 300), (1,), bf16, None, 1.0, tpu.softmax.Tiles(32, 16, 128)), marks=slow
    ),  # the last block is partial
    pytest.param(
        ((2, 64, 200), (2,), bf16, (64, 200), 1.0, tpu.softmax.Tiles(32, 32, 128)), marks=slow
    ),  # the rows of the mask begin again
    pytest.param(((1,), (0,), f32, None, 1.0, None), marks=slow),
    pytest.param(((127, 129), (1,), bf16, None, 0.7, None), marks=slow),
    pytest.param(((129, 1000), (1,), f32, None, 1.0, tpu.softmax.Tiles(64, 32, 128)), marks=slow),
    pytest.param(((3, 37, 300), (2,), bf16, (37, 1), 1.0, tpu.softmax.Tiles(32, 32, 128)), marks=slow),
    pytest.param(((257, 128), (1,), f32, (257, 128), 0.5, None), marks=slow),
    pytest.param(((5, 130), (1,), bf16, (5, 130), 1.0, None), marks=slow),
]
FEW = gpu.softmax.Tiles(blocks=2, groups=2, split=1, stages=2, stores=1)  # every slot is used again after two rows
TEAM = gpu.softmax.Tiles(blocks=2, groups=2, split=2, stages=2, stores=1)  # two warpgroups to a row
GPU = [
    ((2, 3, 3, 43), (2, 3), f32, (129,), 2.0, TEAM),
    pytest.param(((7, 129), (1,), "float16", None, 0.7, FEW), marks=slow),
    pytest.param(((2, 3, 200), (2,), bf16, (3, 200), 1.0, FEW), marks=slow),
    pytest.param(((1,), (0,), f32, None, 1.0, None), marks=slow),
    pytest.param(((5, 1000), (1,), f32, None, 1.0, TEAM), marks=slow),
    pytest.param(((3, 2, 300), (2,), bf16, (2, 1), 1.0, None), marks=slow),
    pytest.param(((9, 128), (1,), f32, (9, 128), 0.5, FEW), marks=slow),
]


def tpu_interpreter():
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))


def gpu_interpreter():
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))


def data(shape, axis, dtype, where):
    """x, which also holds -inf, its mask, with rows of nothing, and the cotangent of y."""
    random = np.random.default_rng(0)
    x, dy = random.standard_normal(shape), random.standard_normal(shape)
    x[random.random(shape) < 0.01] = -np.inf
    x.reshape(*shape[: -len(axis)], -1)[..., 0] = 1.0  # no row is of -inf alone
    if where is not None:
        mask = random.random(where) < 0.6
        if len(where) > 1:
            mask[-1] = False
        where = jnp.asarray(mask.reshape(shape[-len(axis) :]) if len(where) < len(axis) else mask)
    return jnp.asarray(x, dtype), where, jnp.asarray(dy, dtype)


def compared(kernel, interpreter, shape, axis, dtype, where, temperature, tiles):
    x, where, dy = data(shape, axis, dtype, where)
    static = {"axis": axis, "temperature": temperature}
    assert kernel.unsupported(x, where, **static) is None

    def both(x, dy):
        outputs, residuals = kernel.forward(x, where, **static, tiles=tiles)
        saved = {"outputs": outputs, "residuals": residuals, "cotangents": (dy,)}
        return outputs[0], kernel.backward(x, where, **saved, **static, tiles=tiles)["x"]

    def plain(x, dy):
        y, pull = jax.vjp(lambda x: reference(x, where, **static)[0], x)
        return y, pull(dy)[0]

    with interpreter():
        got = jax.tree.map(np.asarray, jax.block_until_ready(jax.jit(both)(x, dy)))
    with jax.enable_x64():
        want = plain(jnp.asarray(x, jnp.float64), jnp.asarray(dy, jnp.float64))
    for name, ours, exact, theirs in zip(("y", "dx"), got, want, plain(x, dy), strict=True):
        assert ours.dtype == dtype and ours.shape == shape, name
        exact = np.asarray(exact)
        error, peer = (np.linalg.norm(np.asarray(a, np.float64) - exact) for a in (ours, theirs))
        assert error <= 2 * peer + 4 * float(jnp.finfo(f32).eps) * np.linalg.norm(exact), name
    if where is not None:
        assert not got[0][~np.broadcast_to(where, shape)].any()


@pytest.mark.parametrize("case", TPU, ids=str)
def test_tpu(case):
    compared(tpu.softmax, tpu_interpreter, *case)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", GPU, ids=str)
def test_gpu(case):
    compared(gpu.softmax, gpu_interpreter, *case)


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (4, 6), (4, 1), (3, 1, 1), (3, 4, 6), (1, 1, 1)])
def test_a_mask_of_rows_is_what_it_broadcasts_to(shape):
    where = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
    mask = rows.mask(where, (3, 4, 6), 6)
    assert len(mask) == (12 if shape[:1] == (3,) else 4 if shape[:1] == (4,) else 1)
    assert np.array_equal(np.tile(mask, (12 // len(mask), 1)), np.broadcast_to(where, (3, 4, 6)).reshape(12, 6))


REFUSED = [
    ("v5e", (8, 128), (0,), f32, r"axis must be the last of the 2 axes, or several of the last, got \(0,\)"),
    ("h100", (8, 128), (0,), f32, "axis must be the last"),
    ("v5e", (8, 128), (1,), "float16", "float32 or bfloat16"),
    ("v5e", (8, 1 << 20), (1,), f32, "16 rows must fit"),
    ("a100", (8, 128), (1,), f32, "compute capability 9.0, got 8.0"),
    ("h100", (8, 32768), (1,), f32, "got 32768 features of float32"),
]


@pytest.mark.parametrize(("chip", "shape", "axis", "dtype", "reason"), REFUSED)
def test_refused(chip, shape, axis, dtype, reason):
    chip = chips.named(chip)
    kernel = {"tpu": tpu, "gpu": gpu}[chip.platform].softmax
    with chips.target(chip):
        told = kernel.unsupported(jax.ShapeDtypeStruct(shape, dtype), axis=axis, temperature=1.0)
    assert re.search(reason, told)
