"""batch_norm on the TPU and on Mosaic GPU: interpreted, races detected, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxops import interpreter
from jaxops.reference.batch_norm import batch_norm as reference
from pallas_kernels import chips, gpu
from pallas_kernels.gpu.group_norm import Tiles as GpuTiles
from pallas_kernels.tpu import batch_norm as kernel

f32, bf16 = "float32", "bfloat16"
slow = pytest.mark.slow
Tiles = kernel.Tiles
CASES = [  # shape of x, dtype of x, of the parameters, tiles, whether the statistics have cotangents
    ((5, 7, 30), f32, f32, None, True),
    pytest.param(((2, 50, 257), bf16, f32, Tiles(48, 16, 128, 128), False), marks=slow),  # the last blocks are partial
    pytest.param(((4, 16, 200), f32, bf16, Tiles(32, 16, 128), True), marks=slow),  # two blocks, all whole
    pytest.param(((70, 384), bf16, bf16, Tiles(70, 32, 128, 256), True), marks=slow),  # x in one block of positions
    pytest.param(((3, 1, 300), f32, f32, None, True), marks=slow),
]


def few(width, stages=2):  # slots are used again, blocks are joined; no stages: all is read once
    return GpuTiles(blocks=4, groups=2, width=width, steps=1, stages=stages, stores=1)


GPU = [
    ((3, 50, 16), f32, f32, few(16), True),
    ((3, 50, 16), bf16, f32, few(8, 0), True),
    pytest.param(((5, 7, 30), bf16, f32, None, True), marks=slow),  # channels are filled up
    pytest.param(((2, 500, 8), "float16", bf16, few(8), False), marks=slow),  # the last tile is partial
    pytest.param(((64, 128), f32, f32, few(32), True), marks=slow),  # all tiles are whole
    pytest.param(((1, 40), bf16, bf16, None, True), marks=slow),
]


def results(run, operands, dys):
    """y, mean, var and the gradients of what `run` makes of operands and cotangents, in NumPy."""
    return {name: np.asarray(a) for name, a in jax.block_until_ready(jax.jit(run)(operands, dys)).items()}


def plain(operands, dys):
    outputs, pull = jax.vjp(lambda operands: reference(**operands, eps=1e-5), operands)
    dys = tuple(jnp.zeros_like(o) if dy is None else dy for o, dy in zip(outputs, dys, strict=True))
    return dict(zip(("y", "mean", "var"), outputs, strict=True)) | pull(dys)[0]


def tpu_interpreter():
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tpu(case):
    compared(kernel, tpu_interpreter, *case)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", GPU, ids=str)
def test_gpu(case):
    compared(gpu.batch_norm, interpreter.gpu, *case)


def compared(kernel, interpreter, shape, dtype, parameter_dtype, tiles, moving):
    random = np.random.default_rng(0)
    draw = lambda shape, dtype, shift=0: jnp.asarray(random.standard_normal(shape) + shift, dtype)
    channels = shape[-1:]
    operands = {"x": draw(shape, dtype, 3)} | {name: draw(channels, parameter_dtype) for name in ("scale", "bias")}
    dys = (draw(shape, dtype), *(draw(channels, f32) * 9 if moving else None for _ in range(2)))
    assert kernel.unsupported(**operands, eps=1e-5) is None

    def both(operands, dys):
        outputs, residuals = kernel.forward(**operands, eps=1e-5, tiles=tiles)
        saved = dict(outputs=outputs, residuals=residuals, cotangents=dys)
        found = kernel.backward(**operands, **saved, eps=1e-5, tiles=tiles)
        return dict(zip(("y", "mean", "var"), outputs, strict=True)) | found

    with interpreter():
        got = results(both, operands, dys)
    theirs = results(plain, operands, dys)
    with jax.enable_x64():
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)
        exact = results(plain, wide(operands), wide(dys))
    for name, want in exact.items():
        assert (got[name].shape, got[name].dtype) == (theirs[name].shape, theirs[name].dtype), name
        error, peer = (np.abs(a[name].astype(np.float64) - want).max() for a in (got, theirs))
        # The floor is a few float32 roundings of the largest term: x - mean has the roundings of x, which is near 3.
        assert error <= 2 * peer + 8 * float(jnp.finfo(f32).eps) * max(np.abs(want).max(), 3), (name, error, peer)


def test_refused():
    vector = jax.ShapeDtypeStruct((64,), f32)
    told = kernel.unsupported(jax.ShapeDtypeStruct((8, 64), "float16"), vector, vector, eps=1e-5)
    assert told is not None and "float32 or bfloat16" in told


@pytest.mark.parametrize("chip", ["v5e", "v5p", "tpu7x"])
def test_default_tiles_fit(chip):
    with chips.target(chips.named(chip)):
        for shape in ((1, 8), (17, 320), (65536, 512), (1 << 20, 128), (802816, 64), (9, 1 << 15), (131072, 384)):
            x, vector = jax.ShapeDtypeStruct(shape, f32), jax.ShapeDtypeStruct(shape[-1:], f32)
            assert kernel.unsupported(x, vector, vector, eps=1e-5) is None
            for phase in ("forward", "backward"):
                load = kernel.Load.of(phase, kernel._joined(x), shape[-1])
                assert kernel.tiles(phase, x, vector, vector, eps=1e-5).allowed(load)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stages", [pytest.param(2, marks=slow), 0])
def test_gpu_far_from_zero(stages):
    """The mean moves by fifty deviations, a thousand from 0: neither that nor joining the parts costs the variance."""
    moved = 1000 + np.linspace(0, 50, 700)[:, None] * np.arange(16) / 16
    x = jnp.asarray(np.random.default_rng(0).standard_normal((700, 16)) + moved, f32)
    one, zero = jnp.ones(16), jnp.zeros(16)
    with interpreter.gpu():
        run = jax.jit(lambda x: gpu.batch_norm.forward(x, one, zero, eps=1e-5, tiles=few(16, stages))[0])
        _, mean, var = jax.block_until_ready(run(x))
    exact = np.asarray(x, np.float64)
    peer = np.asarray(reference(x, one, zero, eps=1e-5)[2])
    relative = lambda a: (np.abs(np.asarray(a) - exact.var(0)) / exact.var(0)).max()
    assert relative(var) <= 2 * relative(peer) + 8 * float(jnp.finfo(f32).eps)
    assert np.abs(np.asarray(mean) - exact.mean(0)).max() <= 2 * 1000 * float(jnp.finfo(f32).eps)
