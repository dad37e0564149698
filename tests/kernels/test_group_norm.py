"""group_norm on the TPU and on Mosaic GPU: interpreted, races detected, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxops import interpreter
from jaxops.reference.group_norm import group_norm as reference
from pallas_kernels import chips, gpu, tpu

f32, bf16 = "float32", "bfloat16"
slow = pytest.mark.slow
Tiles = tpu.group_norm.Tiles
# shape of x, groups, dtype of x, dtype of the parameters, tiles
TPU = [
    ((2, 5, 7, 30), 6, f32, f32, None),  # groups of five channels, 35 positions
    pytest.param(
        ((2, 100, 257), 257, bf16, f32, Tiles(48, 16, 128)), marks=slow
    ),  # each channel by itself; three blocks, the last partial
    pytest.param(((1, 1, 2), 1, f32, f32, None), marks=slow),
    pytest.param(((3, 7), 7, f32, bf16, None), marks=slow),  # no positions but one
    pytest.param(((2, 70, 320), 32, bf16, bf16, Tiles(32, 16, 256)), marks=slow),
    pytest.param(((2, 8, 8, 512), 4, bf16, f32, Tiles(64, 32, 128)), marks=slow),
]


def few(width, stages=2):  # slots are used again; no stages: all is read once
    return gpu.group_norm.Tiles(blocks=8, groups=2, width=width, steps=1, stages=stages, stores=1)


GPU = [
    ((2, 50, 24), 6, f32, f32, few(24)),
    ((2, 50, 24), 6, f32, f32, few(12, 0)),  # a group is half of what is read at once
    pytest.param(((2, 5, 7, 30), 6, bf16, f32, None), marks=slow),  # channels are filled up
    pytest.param(((2, 90, 16), 16, bf16, f32, few(16)), marks=slow),  # each channel by itself
    pytest.param(((3, 8), 1, f32, bf16, None), marks=slow),  # no positions but one
    pytest.param(((2, 70, 96), 2, "float16", bf16, few(48)), marks=slow),  # 48 channels of a group
    pytest.param(((1, 64, 64), 4, f32, f32, few(32)), marks=slow),  # all tiles are whole
    pytest.param(((2, 300, 64), 4, bf16, f32, few(32, 0)), marks=slow),
    pytest.param(((2, 300, 64), 64, bf16, f32, few(64, 0)), marks=slow),
]


def both(kernel, operands, dy, num_groups, tiles):
    static = dict(num_groups=num_groups, eps=1e-5)
    (y,), residuals = kernel.forward(**operands, **static, tiles=tiles)
    saved = dict(outputs=(y,), residuals=residuals, cotangents=(dy,))
    return {"y": y, "residuals": residuals} | kernel.backward(**operands, **saved, **static, tiles=tiles)


def plain(operands, dy, num_groups):
    y, pull = jax.vjp(lambda operands: reference(**operands, num_groups=num_groups, eps=1e-5)[0], operands)
    return {"y": y} | pull(dy)[0]


def compared(kernel, interpreter, shape, num_groups, dtype, parameter_dtype, tiles):
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal(shape) + shift, dtype) for shift in (3, 0))
    scale, bias = (jnp.asarray(random.standard_normal(shape[-1]), parameter_dtype) for _ in range(2))
    operands = {"x": x, "scale": scale, "bias": bias}
    assert kernel.unsupported(**operands, num_groups=num_groups, eps=1e-5) is None
    with interpreter():
        run = jax.jit(lambda operands, dy: both(kernel, operands, dy, num_groups, tiles))
        got = jax.tree.map(np.asarray, jax.block_until_ready(run(operands, dy)))
    with jax.enable_x64():
        exact = plain(
            {n: jnp.asarray(a, jnp.float64) for n, a in operands.items()}, jnp.asarray(dy, jnp.float64), num_groups
        )
    theirs = plain(operands, dy, num_groups)
    for name, want in exact.items():
        like = operands.get(name, x)
        assert (got[name].shape, got[name].dtype) == (like.shape, like.dtype), name
        want = np.asarray(want)
        error, peer = (np.abs(np.asarray(a[name], np.float64) - want).max() for a in (got, theirs))
        # The floor is a few float32 roundings of the largest term: x - mean has the roundings of x, which is near 3.
        assert error <= 2 * peer + 8 * float(jnp.finfo(f32).eps) * max(np.abs(want).max(), 3), name
    grouped = np.asarray(x, np.float64).reshape(shape[0], -1, num_groups, shape[-1] // num_groups)
    mean, inverse = got["residuals"]
    assert np.allclose(mean, grouped.mean((1, 3)), rtol=1e-5, atol=1e-6)
    assert np.allclose(inverse, 1 / np.sqrt(grouped.var((1, 3)) + 1e-5), rtol=1e-4)


def tpu_interpreter():
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))


@pytest.mark.parametrize("case", TPU, ids=str)
def test_tpu(case):
    compared(tpu.group_norm, tpu_interpreter, *case)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", GPU, ids=str)
def test_gpu(case):
    compared(gpu.group_norm, interpreter.gpu, *case)


REFUSED = [
    ("v5e", (8, 64, 64), "float16", 4, "float32 or bfloat16"),
    ("v5p", (2, 64, 1 << 17), f32, 2, "got 131072 channels in 2 groups"),
    ("a100", (8, 64, 64), bf16, 4, "compute capability 9.0, got 8.0"),
    ("h100", (8, 64, 64), "float64", 4, "x must be float32, bfloat16 or float16, got float64"),
    ("h100", (8, 64, 1024), bf16, 2, "got groups of 512 channels"),
]


@pytest.mark.parametrize(("chip", "shape", "dtype", "num_groups", "reason"), REFUSED)
def test_refused(chip, shape, dtype, num_groups, reason):
    chip = chips.named(chip)
    x, vector = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], f32)
    with chips.target(chip):
        told = {"tpu": tpu, "gpu": gpu}[chip.platform].group_norm.unsupported(
            x, vector, vector, num_groups=num_groups, eps=1e-5
        )
    assert told is not None and reason in told


@pytest.mark.parametrize("chip", ["v5e", "v5p", "tpu7x", "h100", "b200"])
def test_default_tiles_fit_or_are_refused(chip):
    vector, kernel = jax.ShapeDtypeStruct((1,), f32), {"tpu": tpu, "gpu": gpu}[chips.named(chip).platform].group_norm
    with chips.target(chips.named(chip)):
        for positions, channels, num_groups in (
            (1, 8, 8),
            (17, 320, 32),
            (4096, 512, 32),
            (1 << 20, 128, 1),
            (9, 1 << 15, 2),
        ):
            x = jax.ShapeDtypeStruct((2, positions, channels), f32)
            options = dict(num_groups=num_groups, eps=1e-5)
            if kernel.unsupported(x, vector, vector, **options) is None:
                for phase in ("forward", "backward"):
                    load = kernel.Load.of(phase, x, num_groups)
                    assert kernel.tiles(phase, x, vector, vector, **options).allowed(load)
