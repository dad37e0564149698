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


def unfused(operands, cotangents, offset, dtype=None):
    """XLA's own forward and gradients: float32 arithmetic, results in the operands' dtypes."""

    def f(operands):
        x = operands["x"]
        if "residual" in operands:
            x = x + operands["residual"]
        y = compose(x, operands["scale"], operands.get("bias"), offset, jnp, jnp.float32).astype(dtype or x.dtype)
        return (y, x)[: len(cotangents)]

    outputs, pull = jax.vjp(f, operands)
    return dict(zip(("y", "total"), outputs, strict=False)) | pull(cotangents)[0]


def fused(name, operands, cotangents, offset, tiles, dtype=None):
    kernel, static = (KERNELS | ADDING)[name], {"eps": EPS, "scale_offset": offset, "dtype": dtype}
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


def interpreted(name, operands, cotangents, offset, tiles, dtype=None):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        got = jax.jit(fused, static_argnums=(0, 3, 4, 5))(name, operands, cotangents, offset, tiles, dtype)
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


@pytest.mark.slow
def test_y_in_a_dtype_of_its_own():
    x, scale, _, dy = data((40, 129), bf16, f32)
    operands, cotangents = {"x": x, "scale": scale}, (dy.astype(f32) * 1.001,)
    got = interpreted("rms_norm", operands, cotangents, 0.0, None, "float32")
    dtypes = {"x": bf16, "scale": f32, "y": f32}
    check(got, oracle(x, scale, None, *cotangents, 0.0), unfused(operands, cotangents, 0.0, f32), dtypes)


@pytest.mark.parametrize(
    "name, shape, dtype, tiles",
    [
        ("rms_norm", (37, 129), bf16, None),
        pytest.param(
            "add_layer_norm", (70, 300), f32, Tiles(32, 32, 128), marks=pytest.mark.slow
        ),  # three blocks, the last partial
        pytest.param("layer_norm", (300, 200), bf16, Tiles(128, 64, 128), marks=pytest.mark.slow),
        pytest.param("add_rms_norm", (2, 100, 257), bf16, Tiles(192, 96, 256), marks=pytest.mark.slow),
    ],
)
def test_in_int8(name, shape, dtype, tiles):
    x, scale, bias, residual = data(shape, dtype, f32)
    operands = {"x": x.at[..., 1, :].set(0), "scale": scale}
    operands |= {"residual": residual.at[..., 1, :].set(0)} if name in ADDING else {}
    operands |= {"bias": bias} if "layer" in name else {}
    kernel, static = (KERNELS | ADDING)[name], {"eps": EPS, "scale_offset": 0.0, "dtype": "int8"}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        found = jax.jit(lambda operands: kernel.forward(**operands, **static, tiles=tiles)[0])(operands)
        *total, values, scales = jax.tree.map(np.asarray, found)
    rows = [np.asarray(a, np.float64) for a in (*(total or [x.at[..., 1, :].set(0)]), scale, bias)]
    y = compose(*(rows if "layer" in name else [*rows[:2], None]), 0.0, np, np.float64)
    largest = np.abs(y).max(-1, keepdims=True)
    assert values.dtype == jnp.int8 and scales.dtype == f32 and scales.shape == (*shape[:-1], 1)
    assert np.allclose(scales, np.where(largest > 0, largest / 127, 1), rtol=1e-5)
    # Half a step, and what float32 costs of 127 of them.
    assert (np.abs(values * scales.astype(np.float64) - y) <= (0.5 + 1e-3) * scales).all()
    assert name.endswith("layer_norm") or not values[..., 1, :].any()


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
    assert "dtype must be" in rms_norm.unsupported(x, vector, eps=EPS, scale_offset=0.0, dtype="float16")
    assert "residual must be" in add_rms_norm.unsupported(x, half, vector, eps=EPS, scale_offset=0.0)
