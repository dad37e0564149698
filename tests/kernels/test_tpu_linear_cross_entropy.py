"""linear_cross_entropy on the TPU: interpreted, races detected and unwritten memory NaN, against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, modifiers
from pallas_kernels.tpu import linear_cross_entropy as kernel
from tests.kernels.cross_entropy import ALL, CAP, PLAIN, SMOOTH, STATIC, Z_LOSS, check, data, oracle, unfused

Tiles = kernel.Tiles
f32, bf16 = jnp.float32, jnp.bfloat16


def fused(x, weight, labels, g, bias, static, tiles, dlse=None):
    operands = {"x": x, "weight": weight, "labels": labels} | ({} if bias is None else {"bias": bias})
    static = dict(zip(STATIC, static, strict=True))
    assert kernel.unsupported(**operands, **static) is None
    outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
    grads = kernel.backward(
        **operands, outputs=outputs, residuals=residuals, cotangents=(g, dlse), **static, tiles=tiles
    )
    return {"loss": outputs[0], "lse": outputs[1]} | grads


def interpret(*args, mode="on_wait", chip="v5p"):
    """`fused`, interpreted; for v5p, each of its two cores takes a share of the vocabulary."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, num_cores_or_threads=2)
    with chips.target(chips.named(chip)), pltpu.force_tpu_interpret_mode(params):
        return jax.tree.map(np.asarray, jax.jit(fused, static_argnums=(5, 6))(*args))


SMALL = Tiles(128, 128)
CASES = [  # tokens, hidden, vocab, dtype, dtype of the bias, (smoothing, z-loss, cap), tiles
    (1, 1, 1, f32, f32, ALL, None),
    (1, 128, 1000, bf16, None, PLAIN, SMALL),
    pytest.param(127, 127, 127, f32, None, PLAIN, None, marks=pytest.mark.slow),
    pytest.param(128, 129, 128, bf16, bf16, PLAIN, None, marks=pytest.mark.slow),
    (129, 128, 129, f32, f32, PLAIN, SMALL),  # a block of one column past the first
    (129, 16, 300, bf16, f32, ALL, SMALL),  # three blocks of the vocabulary for two cores
    pytest.param(300, 128, 384, f32, None, SMOOTH, SMALL, marks=pytest.mark.slow),
    pytest.param(300, 128, 384, bf16, None, Z_LOSS, SMALL, marks=pytest.mark.slow),
    pytest.param(256, 256, 260, f32, None, CAP, SMALL, marks=pytest.mark.slow),
    (1000, 16, 1000, bf16, None, SMOOTH, Tiles(512, 512)),
    (1000, 32, 1000, f32, f32, ALL, Tiles(512, 1024)),
]


@pytest.mark.parametrize("tokens, hidden, vocab, dtype, bias_dtype, static, tiles", CASES)
def test_against_float64(tokens, hidden, vocab, dtype, bias_dtype, static, tiles):
    args = data(tokens, hidden, vocab, dtype, bias_dtype)
    dtypes = {"loss": f32, "lse": f32, "x": dtype, "weight": dtype, "bias": bias_dtype}
    check(interpret(*args, static, tiles), oracle(*args, *static), unfused(*args, *static), dtypes)


def test_vmap():
    """Two problems that share their weight."""
    first, second = data(129, 16, 140, f32, None), data(129, 16, 140, f32, None, seed=1)
    second = (second[0], first[1], *second[2:])
    both = [None if a is None else jnp.stack((a, b)) for a, b in zip(first, second, strict=True)]
    both[1] = first[1]

    def run(x, weight, labels, g):
        return fused(x, weight, labels, g, None, PLAIN, SMALL)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = jax.jit(jax.vmap(run, in_axes=(0, None, 0, 0)))(*both[:4])
        got = jax.tree.map(np.asarray, got)
    dtypes = dict.fromkeys(("loss", "lse", "x", "weight"), f32)
    for i, args in enumerate((first, second)):
        check({k: v[i] for k, v in got.items()}, oracle(*args, *PLAIN), unfused(*args, *PLAIN), dtypes)


def test_a_cotangent_of_lse_and_labels_that_are_none():
    x, weight, labels, g, bias = data(129, 16, 300, f32, f32)
    args, dlse = (x, weight, labels.at[::3].set(-1), g, bias), jnp.cos(3 * g)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with chips.target(chips.named("v5p")), pltpu.force_tpu_interpret_mode(params):
        got = jax.tree.map(np.asarray, jax.jit(fused, static_argnums=(5, 6))(*args, ALL, SMALL, dlse))
    want, plain = oracle(*args, *ALL, dlse), unfused(*args, *ALL, dlse)
    check(got, want, plain, dict.fromkeys(("loss", "lse", "x", "weight", "bias"), f32))


@pytest.mark.parametrize("tokens", [1, 300])
def test_copies_that_happen_at_once(tokens):
    """dx travels through two buffers. The other tests copy when a copy is awaited, missing one that starts early."""
    args = data(tokens, 16, 300, f32, None)
    dtypes = dict.fromkeys(("loss", "lse", "x", "weight"), f32)
    got = interpret(*args, PLAIN, SMALL, mode="eager", chip="v5e")
    check(got, oracle(*args, *PLAIN), unfused(*args, *PLAIN), dtypes)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x": jax.ShapeDtypeStruct((8, 128), jnp.float16)}, "x must be float32 or bfloat16"),
        ({"weight": jax.ShapeDtypeStruct((128, 256), f32)}, "weight must have the dtype of x"),
        ({"x": jax.ShapeDtypeStruct((8, 1 << 17), bf16)}, "hidden ≤"),
    ],
)
def test_refusals(change, reason):
    operands = {
        "x": jax.ShapeDtypeStruct((8, 128), bf16),
        "weight": jax.ShapeDtypeStruct((128, 256), bf16),
        "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    assert kernel.unsupported(**operands, **dict(zip(STATIC, ALL, strict=True))) is None
    assert reason in kernel.unsupported(**(operands | change), **dict(zip(STATIC, ALL, strict=True)))


@pytest.mark.parametrize("precision", [None, "default", "highest", "float32", "high", "BF16_BF16_F32_X3"])
def test_the_default_precision_of_jax_is_kept_or_refused(precision):
    x, weight, labels = (jax.ShapeDtypeStruct(*s) for s in (((8, 128), f32), ((128, 256), f32), ((8,), jnp.int32)))
    static = dict(zip(STATIC, PLAIN, strict=True))
    with jax.default_matmul_precision(precision), chips.target(chips.named("v5e")):
        reason = kernel.unsupported(x, weight, labels, **static)
        if precision in ("high", "BF16_BF16_F32_X3"):
            assert f"in precision default or highest on a TPU, not {precision}" in reason
            return
        assert reason is None
        program = jax.make_jaxpr(lambda *args: kernel.forward(*args, **static))(x, weight, labels)
    products = [e for e in modifiers.equations(program) if e.primitive.name == "dot_general"]
    wanted = jax.lax.Precision.HIGHEST if precision in ("highest", "float32") else jax.lax.Precision.DEFAULT
    assert products and all(e.params["precision"] == (wanted, wanted) for e in products)
