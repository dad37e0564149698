"""The norms of rows on the TPU: interpreted, races detected, unwritten memory NaN, against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.tpu import add_layer_norm, add_rms_norm, layer_norm, rms_norm

EPS = 1e-6
Tiles = rms_norm.Tiles
KERNELS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
ADDING = {"add_rms_norm": add_rms_norm, "add_layer_norm": add_layer_norm}


def compose(x, scale, bias, offset, xp, wide):
    """The operator in plain array arithmetic, in `wide` precision: layer_norm if there is a bias, else rms_norm."""
    z, w = x.astype(wide), scale.astype(wide) + offset
    if bias is None:
        return z / xp.sqrt((z * z).mean(-1, keepdims=True) + EPS) * w
    z = z - z.mean(-1, keepdims=True)
    return z / xp.sqrt((z * z).mean(-1, keepdims=True) + EPS) * w + bias.astype(wide)


def oracle(x, scale, bias, dy, offset):
    """float64: y and the gradients by name, each with the size of the terms it is the difference of."""
    x, scale, dy = (np.asarray(a, np.float64) for a in (x, scale, dy))
    center = bias is not None
    z = x - x.mean(-1, keepdims=True) if center else x
    r = 1 / np.sqrt((z * z).mean(-1, keepdims=True) + EPS)
    normal, h = z * r, dy * (scale + offset)
    dx = r * (h - (h.mean(-1, keepdims=True) if center else 0) - normal * (h * normal).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    y = compose(x, scale, None if bias is None else np.asarray(bias, np.float64), offset, np, np.float64)
    out = {"y": (y, 1 + np.abs(y)), "x": (dx, r * (np.abs(h) + 1)), "scale": ((dy * normal).sum(rows), 1 + np.abs(dy))}
    return out | ({"bias": (dy.sum(rows), 1 + np.abs(dy))} if center else {})


def adding_oracle(x, residual, scale, bias, dy, dtotal, offset):
    """The same with an addition before the norm; its gradient gains the cotangent of the sum."""
    total, dtotal = np.asarray(x, np.float64) + np.asarray(residual, np.float64), np.asarray(dtotal, np.float64)
    out = oracle(total, scale, bias, dy, offset)
    dx, terms = out.pop("x")
    dx = (dx + dtotal, terms + np.abs(dtotal))
    return out | {"total": (total, 1 + np.abs(total)), "x": dx, "residual": dx}


def unfused(operands, cotangents, offset):
    """XLA's own forward and gradients: float32 arithmetic, results in the operands' dtypes."""

    def f(operands):
        x = operands["x"]
        if "residual" in operands:
            x = x + operands["residual"]
        y = compose(x, operands["scale"], operands.get("bias"), offset, jnp, jnp.float32).astype(x.dtype)
        return (y, x)[: len(cotangents)]

    outputs, pull = jax.vjp(f, operands)
    return dict(zip(("y", "total"), outputs, strict=False)) | pull(cotangents)[0]


def fused(name, operands, cotangents, offset, tiles):
    kernel, static = (KERNELS | ADDING)[name], {"eps": EPS, "scale_offset": offset}
    assert kernel.unsupported(**operands, **static) is None
    outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
    grads = kernel.backward(
        **operands, outputs=outputs, residuals=residuals, cotangents=cotangents, **static, tiles=tiles
    )
    return dict(zip(("y", "total"), outputs, strict=False)) | grads


f32, bf16 = jnp.float32, jnp.bfloat16
SMALL = Tiles(rows=64, group=32, columns=128)
CASES = [  # shape of x, dtype of x, dtype of the parameters, scale offset, tiles
    ((1, 1), f32, f32, 0.0, None),
    ((1, 129), bf16, bf16, 0.0, None),
    ((127, 1), f32, bf16, 1.0, None),
    ((127, 127), bf16, f32, 0.0, None),
    ((128, 128), f32, f32, 0.0, Tiles(64, 64, 128)),
    ((129, 1000), bf16, bf16, 0.0, SMALL),
    ((129, 1000), f32, f32, 1.0, SMALL),
    ((1000, 127), bf16, f32, 1.0, None),
    ((1000, 129), f32, f32, 0.0, Tiles(256, 128, 128)),
    ((2, 5, 13, 256), bf16, bf16, 0.0, Tiles(48, 16, 128)),  # three blocks for two cores
    ((300,), f32, f32, 0.0, None),
]

ADDING_CASES = [  # shape of x, dtype of x, of the residual and of the parameters, scale offset, tiles
    ((1, 129), f32, f32, bf16, 0.0, None),
    ((127, 127), bf16, f32, f32, 1.0, None),  # blocks of two dtypes
    ((129, 1000), bf16, bf16, bf16, 0.0, SMALL),
    ((2, 5, 13, 256), f32, f32, f32, 0.0, Tiles(48, 16, 128)),  # three blocks for two cores
    pytest.param((1000, 129), f32, bf16, f32, 0.0, Tiles(256, 128, 128), marks=pytest.mark.slow),
    pytest.param((300,), bf16, bf16, f32, 0.0, None, marks=pytest.mark.slow),
]


def data(shape, dtype, parameter_dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = (jnp.asarray(rng.standard_normal(shape) + shift, dtype) for shift in (0.5, 0.0))
    scale, bias = (jnp.asarray(rng.standard_normal(shape[-1]), parameter_dtype) for _ in range(2))
    return x, scale, bias, dy


def check(got, want, plain, dtypes):
    """The error of each result is at most twice the unfused one, plus four float32 roundings of its largest term."""
    for name, (exact, terms) in want.items():
        assert got[name].dtype == dtypes[name] and got[name].shape == exact.shape, name
        error, peer = (np.abs(np.asarray(a[name], np.float64) - exact).max() for a in (got, plain))
        atol = 4 * float(jnp.finfo(jnp.float32).eps) * terms.max()
        assert error <= 2 * peer + atol, f"{name}: error {error:.3g}, unfused {peer:.3g}"


def interpreted(name, operands, cotangents, offset, tiles):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        got = jax.jit(fused, static_argnums=(0, 3, 4))(name, operands, cotangents, offset, tiles)
        return jax.tree.map(np.asarray, got)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape, dtype, parameter_dtype, offset, tiles", CASES)
def test_against_float64(shape, dtype, parameter_dtype, offset, tiles, name):
    x, scale, bias, dy = data(shape, dtype, parameter_dtype)
    bias = bias if name == "layer_norm" else None
    operands = {"x": x, "scale": scale} | ({} if bias is None else {"bias": bias})
    got = interpreted(name, operands, (dy,), offset, tiles)
    dtypes = {n: a.dtype for n, a in operands.items()} | {"y": dtype}
    check(got, oracle(x, scale, bias, dy, offset), unfused(operands, (dy,), offset), dtypes)


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("shape, dtype, residual_dtype, parameter_dtype, offset, tiles", ADDING_CASES)
def test_addition_against_float64(shape, dtype, residual_dtype, parameter_dtype, offset, tiles, name):
    x, scale, bias, dy = data(shape, dtype, parameter_dtype)
    residual, _, _, dtotal = data(shape, residual_dtype, parameter_dtype, seed=1)
    common, bias = jnp.promote_types(dtype, residual_dtype), bias if name == "add_layer_norm" else None
    dy, dtotal = dy.astype(common), dtotal.astype(common)
    operands = {"x": x, "residual": residual, "scale": scale} | ({} if bias is None else {"bias": bias})
    got = interpreted(name, operands, (dy, dtotal), offset, tiles)
    # The kernel gives the gradients of the sum, in its dtype, which is the gradient of either operand.
    dtypes = {"y": common, "total": common, "x": common, "residual": common, "scale": parameter_dtype}
    plain = unfused(operands, (dy, dtotal), offset)
    want = adding_oracle(x, residual, scale, bias, dy, dtotal, offset)
    check(got, want, plain, dtypes | {"bias": parameter_dtype})
    assert np.array_equal(got["total"], plain["total"])


def test_a_sum_without_a_cotangent():
    x, scale, _, dy = data((40, 129), f32, f32)
    operands = {"x": x, "residual": data((40, 129), f32, f32, seed=1)[0], "scale": scale}
    got, zeros = (interpreted("add_rms_norm", operands, (dy, dt), 0.0, None) for dt in (None, jnp.zeros_like(dy)))
    assert all(np.array_equal(got[name], zeros[name]) for name in zeros)


@pytest.mark.parametrize("chip, most", [("v5e", 203136), ("v5p", 98304)])
def test_refusals(chip, most):
    vector = jax.ShapeDtypeStruct((8,), f32)
    with chips.target(chips.named(chip)):
        for features, reason in ((most, None), (most + 1, f"at most {most} features")):
            got = layer_norm.unsupported(
                jax.ShapeDtypeStruct((8, features), f32), vector, vector, eps=EPS, scale_offset=0.0
            )
            assert got is None if reason is None else reason in got
    half = jax.ShapeDtypeStruct((8, 8), jnp.float16)
    assert "float32 or bfloat16" in rms_norm.unsupported(half, vector, eps=EPS, scale_offset=0.0)
    x = jax.ShapeDtypeStruct((8, 8), f32)
    assert "residual must be" in add_rms_norm.unsupported(x, half, vector, eps=EPS, scale_offset=0.0)
