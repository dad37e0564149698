"""The norms of rows on Mosaic GPU, in the interpreter with races detected, against float64."""

import os

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips
from pallas_kernels.gpu import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pallas_kernels.gpu.row_norm import Load, Tiles

EPS = 1e-5
KERNELS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
ADDING = {"add_rms_norm": add_rms_norm, "add_layer_norm": add_layer_norm}
FEW = Tiles(blocks=2, groups=2, split=1, stages=2, stores=1)  # every slot is used again after two rows
TEAM = Tiles(blocks=2, groups=2, split=2, stages=2, stores=1)  # two warpgroups to a row

# leading shape, features, dtype, dtype of the parameters, scale_offset, tiles
CASES = [
    ((1,), 1, "float32", "float32", 0.0, None),
    ((), 127, "bfloat16", "float32", 0.0, None),
    pytest.param(((2, 5), 128, "bfloat16", "bfloat16", 1.0, FEW), marks=pytest.mark.slow),
    ((17,), 129, "float16", "float16", 0.0, Tiles(blocks=4, groups=2, split=1, stages=3, stores=2)),
    pytest.param(
        ((19,), 64, "float32", "bfloat16", 0.0, Tiles(blocks=2, groups=4, split=2, stages=4, stores=2)),
        marks=pytest.mark.slow,
    ),
    pytest.param(((5,), 1000, "bfloat16", "float32", 0.0, FEW), marks=pytest.mark.slow),
    ((5,), 1000, "float32", "float32", -0.5, TEAM),
    ((3,), 2056, "bfloat16", "bfloat16", 0.0, Tiles(blocks=1, groups=4, split=4, stages=1, stores=1)),
    ((2,), 8191, "float16", "float32", 0.0, None),
]
# the same, with the dtype of the residual after that of x
ADDING_CASES = [
    ((5,), 129, "bfloat16", "bfloat16", "float32", 0.0, FEW),
    pytest.param(
        ((7,), 64, "float16", "float32", "float16", 1.0, Tiles(blocks=2, groups=2, split=1, stages=3, stores=2)),
        marks=pytest.mark.slow,
    ),
    ((5,), 1000, "float32", "float32", "float32", -0.5, TEAM),
    pytest.param(((2,), 2056, "bfloat16", "float16", "float32", 0.0, None), marks=pytest.mark.slow),
]


def _operands(name, lead, features, dtype, parameter_dtype, residual_dtype=None):
    """The operands, and cotangents of all outputs."""
    rng = np.random.default_rng(len(lead) * 10_000 + features)
    x = 3 * rng.standard_normal((*lead, features)) + 2
    names = ("scale", "bias") if "layer_norm" in name else ("scale",)
    values = {"x": jnp.asarray(x, dtype)}
    values |= {n: jnp.asarray(rng.standard_normal(features), parameter_dtype) for n in names}
    dy = rng.standard_normal((*lead, features))
    if residual_dtype is None:
        return values, (jnp.asarray(dy, dtype),)
    residual, dtotal = (rng.standard_normal((*lead, features)) for _ in range(2))
    values["residual"] = jnp.asarray(residual, residual_dtype)
    return values, tuple(jnp.asarray(ct, jnp.promote_types(dtype, residual_dtype)) for ct in (dy, dtotal))


def _oracle(operands, dy, *dtotal, scale_offset):
    """The outputs and the gradients by the formulas, in float64."""
    if dtotal:
        total, dtotal = np.asarray(operands["x"], np.float64), np.asarray(dtotal[0], np.float64)
        total = total + np.asarray(operands["residual"], np.float64)
        results = _oracle({**operands, "x": total}, dy, scale_offset=scale_offset)
        results["x"] = results["x"] + dtotal
        return results | {"total": total, "residual": results["x"]}
    x, w, dy = (np.asarray(a, np.float64) for a in (operands["x"], operands["scale"], dy))
    w, centered = w + scale_offset, "bias" in operands
    deviation = x - x.mean(-1, keepdims=True) if centered else x
    inverse = 1 / np.sqrt((deviation**2).mean(-1, keepdims=True) + EPS)
    normal, g = deviation * inverse, dy * w
    dx = inverse * (g - centered * g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    results = {"y": normal * w, "x": dx, "scale": (dy * normal).sum(rows)}
    if centered:
        results["y"] += np.asarray(operands["bias"], np.float64)
        results["bias"] = dy.sum(rows)
    return results


def _plain(operands, cotangents, scale_offset, dtype=None):
    """The same as XLA composes it from the formula in the operands' dtypes, statistics in float32."""

    def norm(operands):
        total = operands["x"] + operands["residual"] if "residual" in operands else operands["x"]
        x = total.astype(jnp.float32)
        if "bias" in operands:
            x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * (operands["scale"] + scale_offset)
        return ((y + operands.get("bias", 0)).astype(dtype or total.dtype), total)[: len(cotangents)]

    outputs, pull = jax.vjp(norm, operands)
    return dict(zip(("y", "total"), outputs, strict=False)) | pull(cotangents)[0]


def _both(kernel, operands, cotangents, options):
    outputs, residuals = kernel.forward(**operands, **options)
    gradients = kernel.backward(**operands, outputs=outputs, residuals=residuals, cotangents=cotangents, **options)
    return dict(zip(("y", "total"), outputs, strict=False)) | gradients


def _fused(kernel, operands, cotangents, scale_offset, tiles, dtype=None):
    options = {"eps": EPS, "scale_offset": scale_offset, "tiles": tiles, "dtype": dtype}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        run = jax.jit(lambda operands, cotangents: _both(kernel, operands, cotangents, options))
        return jax.block_until_ready(run(operands, cotangents))


def _error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max()


def _compared(name, operands, cotangents, scale_offset, tiles, dtype=None):
    kernel = (KERNELS | ADDING)[name]
    assert kernel.unsupported(**operands, eps=EPS, scale_offset=scale_offset) is None
    got = _fused(kernel, operands, cotangents, scale_offset, tiles, dtype)
    plain = _plain(operands, cotangents, scale_offset, dtype)
    want = _oracle(operands, *cotangents, scale_offset=scale_offset)
    assert got.keys() == want.keys()
    for key, value in want.items():
        # A kernel gives the gradient of either operand of a sum in the dtype of the sum.
        like = operands[key] if key in ("scale", "bias") or (dtype and key == "x") else cotangents[0]
        assert (got[key].shape, got[key].dtype) == (like.shape, like.dtype), key
        # Both may round once to the result's dtype; the floor is a few float32 roundings of the largest entry.
        assert _error(got[key], value) <= 2 * _error(plain[key], value) + 2e-6 * np.abs(value).max(), key
    return got, plain


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'x'.join(map(str, (*c[0], c[1])))}-{c[2]}-{c[3]}")
@pytest.mark.parametrize("name", KERNELS)
def test_interpreted(name, case):
    lead, features, dtype, parameter_dtype, scale_offset, tiles = case
    operands, cotangents = _operands(name, lead, features, dtype, parameter_dtype)
    _compared(name, operands, cotangents, scale_offset, tiles)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", ADDING_CASES, ids=lambda c: f"{'x'.join(map(str, (*c[0], c[1])))}-{c[2]}-{c[3]}")
@pytest.mark.parametrize("name", ADDING)
def test_addition_interpreted(name, case):
    lead, features, dtype, residual_dtype, parameter_dtype, scale_offset, tiles = case
    operands, cotangents = _operands(name, lead, features, dtype, parameter_dtype, residual_dtype)
    got, plain = _compared(name, operands, cotangents, scale_offset, tiles)
    assert np.array_equal(got["total"], plain["total"])


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_y_in_a_dtype_of_its_own():
    operands, (dy,) = _operands("rms_norm", (5,), 129, "bfloat16", "float32")
    _compared("rms_norm", operands, (dy.astype(jnp.float32) * 1.001,), 0.0, FEW, "float32")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name, features, dtype, tiles",
    [
        ("rms_norm", 129, "bfloat16", FEW),
        pytest.param("add_layer_norm", 1000, "float32", TEAM, marks=pytest.mark.slow),
        pytest.param("layer_norm", 40, "float16", None, marks=pytest.mark.slow),
    ],
)
def test_in_int8(name, features, dtype, tiles):
    operands, _ = _operands(name, (5,), features, dtype, "float32", dtype if name in ADDING else None)
    kernel, static = (KERNELS | ADDING)[name], {"eps": EPS, "scale_offset": 0.0, "dtype": "int8"}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        run = jax.jit(lambda operands: kernel.forward(**operands, **static, tiles=tiles)[0])
        *total, values, scales = jax.block_until_ready(run(operands))
    own = {"x": total[0] if total else operands["x"], **{n: operands[n] for n in ("scale", "bias") if n in operands}}
    y = _oracle(own, np.zeros((5, features)), scale_offset=0.0)["y"]
    values, scales = np.asarray(values), np.asarray(scales, np.float64)
    assert values.dtype == jnp.int8 and scales.shape == (5, 1)
    assert np.allclose(scales, np.abs(y).max(-1, keepdims=True) / 127, rtol=1e-5)
    # Half a step, and what float32 costs of 127 of them.
    assert (np.abs(values * scales - y) <= (0.5 + 1e-3) * scales).all()


@pytest.mark.timeout(60)
def test_a_sum_without_a_cotangent():
    operands, (dy, _) = _operands("add_rms_norm", (5,), 129, "float32", "float32", "float32")
    got, zeros = (_fused(add_rms_norm, operands, (dy, dt), 0.0, FEW) for dt in (None, jnp.zeros_like(dy)))
    assert all(np.array_equal(got[name], zeros[name]) for name in zeros)


@pytest.mark.timeout(60)
def test_vmap_gives_each_member_its_own_gradients():
    operands, (dy,) = _operands("layer_norm", (3, 4), 40, "float32", "float32")
    operands["scale"] = operands["scale"] * jnp.arange(1.0, 4.0)[:, None]
    axes, options = {"x": 0, "scale": 0, "bias": None}, {"eps": EPS, "scale_offset": 0.0, "tiles": FEW}
    run = jax.vmap(lambda o, g: _both(layer_norm, o, (g,), options), in_axes=(axes, 0))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.block_until_ready(jax.jit(run)(operands, dy))
    for i in range(3):
        member = {n: a if axes[n] is None else a[i] for n, a in operands.items()}
        for key, value in _oracle(member, dy[i], scale_offset=0.0).items():
            assert _error(got[key][i], value) <= 5e-6 * np.abs(value).max(), key


REFUSED = [
    ("a100", (8, 128), "float32", "compute capability 9.0, got 8.0"),
    ("h100", (8, 32768), "bfloat16", "shared memory and the registers, got 32768 features of bfloat16"),
    ("h100", (8, 128), "int32", "x must be float32, bfloat16 or float16, got int32"),
]


@pytest.mark.parametrize("chip, shape, dtype, reason", REFUSED)
def test_refused(chip, shape, dtype, reason):
    x, p = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], "float32")
    with chips.target(chips.named(chip)):
        assert reason in rms_norm.unsupported(x, p, eps=EPS, scale_offset=0.0)
        assert reason in layer_norm.unsupported(x, p, p, eps=EPS, scale_offset=0.0)


@pytest.mark.parametrize("itemsize, most", [(2, 16384), (4, 12288)])
@pytest.mark.parametrize("backward", [False, True])
def test_default_tiles_exist_and_fit_the_shared_memory(itemsize, most, backward):
    for name in ("h100", "b200"):
        chip = chips.named(name)
        with chips.target(chip):
            for features in (*range(1, most, 97), most):
                for vectors in (1, 2):
                    parameters = itemsize * (1 if backward else vectors)
                    arriving, sums = (2 * itemsize, vectors) if backward else (itemsize, 0)
                    load = Load(features, arriving, itemsize, parameters, sums)
                    assert Tiles.default(load).smem_bytes(load) <= chip.smem_bytes
