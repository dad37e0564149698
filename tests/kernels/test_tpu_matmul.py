"""matmul and gated_linear_unit on the TPU: interpreted, races detected and unwritten memory NaN, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.interpreter import tpu as interpreter
from jaxops.ops.matmul import plain_activation
from jaxops.reference.gated_linear_unit import gated_linear_unit as gated_reference
from jaxops.reference.matmul import matmul as matmul_reference
from pallas_kernels import activations, chips, modifiers
from pallas_kernels.tpu import elementwise, gated_linear_unit, matmul, products
from tests.compare import no_worse

Tiles = products.Tiles
SMALL = Tiles(128, 128, 128)
SILU, GELU, RELU = jax.nn.silu, jax.nn.gelu, jax.nn.relu
FULL = "highest"  # float32 products in full


def bounded(z):
    return jnp.clip(z * jax.nn.sigmoid(1.7 * z), -7, 7)


# m, k, n, what comes after the product, dtype, activation, tiles
MATMULS = [
    (1, 1, 1, ("bias", "residual"), "float32", SILU, None),
    (70, 65, 129, ("bias", "residual"), "bfloat16", GELU, None),
    (300, 200, 260, ("bias",), "float32", RELU, SMALL),  # three blocks and an edge along every axis
    (160, 130, 257, ("bias", "residual"), "bfloat16", None, SMALL),
    (128, 256, 256, (), "float32", None, None),
    pytest.param(256, 300, 512, ("bias",), "bfloat16", bounded, Tiles(256, 512, 128), marks=pytest.mark.slow),
    pytest.param(1000, 129, 300, ("residual",), "float32", jnp.tanh, Tiles(512, 256, 128), marks=pytest.mark.slow),
]
# m, k, n, dtype, activation, tiles
GATED = [
    (1, 1, 1, "float32", SILU, None),
    (130, 70, 300, "bfloat16", SILU, SMALL),
    (129, 200, 257, "float32", bounded, Tiles(128, 256, 256)),
    pytest.param(300, 130, 512, "bfloat16", GELU, Tiles(256, 512, 128), marks=pytest.mark.slow),
]


def run(kernel, operands, dy, tiles=None, **static):
    """y and the gradients by name of a kernel, interpreted."""

    @jax.jit
    def both(operands, dy):
        outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
        (value,) = kernel.value(**operands, **static, tiles=tiles)
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(dy,))
        gradients = kernel.backward(**operands, **saved, **static, tiles=tiles)
        return {"y": outputs[0], "value": value} | gradients

    assert kernel.unsupported(**operands, **static) is None
    with chips.target(chips.named("v5e")), interpreter():
        return jax.tree.map(np.asarray, both(operands, dy))


def plain(reference, operands, dy, **static):
    y, pull = jax.vjp(lambda operands: reference(**operands, **static), operands)
    return {"y": y, "value": y} | pull(dy)[0]


def compare(kernel, reference, operands, dtype, tiles, **static):
    random = np.random.default_rng(0)
    exact = {name: random.standard_normal(shape) for name, shape in operands.items()}
    exact = {name: x / x.shape[0] ** 0.5 if name.startswith("w") else x for name, x in exact.items()}
    low = {name: jnp.asarray(x, dtype) for name, x in exact.items()}
    m, n = operands["x"][0], operands["w" if "w" in operands else "w_up"][1]
    dy = jnp.asarray(random.standard_normal((m, n)), dtype)
    got = run(kernel, low, dy, tiles, **static)
    unfused = jax.jit(functools.partial(plain, reference, **static))(low, dy)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in low.items()}
        oracle = plain(reference, wide, jnp.asarray(np.asarray(dy, np.float64)), **static)
    assert got.keys() == oracle.keys()
    for name, want in oracle.items():
        no_worse(name, got[name], unfused[name], want, dtype)


@pytest.mark.parametrize(("m", "k", "n", "more", "dtype", "activation", "tiles"), MATMULS)
def test_matmul(m, k, n, more, dtype, activation, tiles, monkeypatch):
    monkeypatch.setattr(products, "STRIP", 128)  # several strips also in small tiles
    shapes = {"x": (m, k), "w": (k, n), "bias": (n,), "residual": (m, n)}
    operands = {name: shapes[name] for name in ("x", "w", *more)}
    compare(matmul, matmul_reference, operands, dtype, tiles, activation=activation, precision=FULL)


@pytest.mark.parametrize(("m", "k", "n", "dtype", "activation", "tiles"), GATED)
def test_gated_linear_unit(m, k, n, dtype, activation, tiles, monkeypatch):
    monkeypatch.setattr(products, "STRIP", 128)
    operands = {"x": (m, k), "w_gate": (k, n), "w_up": (k, n)}
    compare(gated_linear_unit, gated_reference, operands, dtype, tiles, activation=activation, precision=FULL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", [None, FULL])
def test_the_products_of_the_gated_linear_unit_have_the_precision(precision, dtype):
    """Those of float32: of bfloat16 they are exact anyway."""
    x, w, y = shape(128, 256, dtype=dtype), shape(256, 128, dtype=dtype), shape(128, 128, dtype=dtype)
    static = dict(activation=SILU, precision=precision)

    def both(x, w_gate, w_up, dy):
        outputs, residuals = gated_linear_unit.forward(x, w_gate, w_up, **static)
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(dy,))
        return gated_linear_unit.backward(x, w_gate, w_up, **saved, **static)

    with chips.target(chips.named("v5e")):
        program = jax.make_jaxpr(both)(x, w, w, y)
    products = [e for e in modifiers.equations(program) if e.primitive.name == "dot_general"]
    wanted = jax.lax.Precision.HIGHEST if (precision, dtype) == (FULL, "float32") else jax.lax.Precision.DEFAULT
    assert len(products) >= 6 and all(e.params["precision"] == (wanted, wanted) for e in products)


def test_leading_axes_and_vmap():
    """Two problems that share their weight, each with two leading axes."""
    random = np.random.default_rng(0)
    x, w = jnp.asarray(random.standard_normal((2, 3, 5, 70)), jnp.float32), jnp.ones((70, 130))
    one = lambda x: matmul.value(x, w, activation=None, precision=FULL)[0]
    with chips.target(chips.named("v5e")), interpreter():
        got = jax.jit(jax.vmap(one))(x)
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-4)


def rows_ahead(mode):
    """Three rows of three tiles, the blocks of x fetched by the kernel itself: the product and what it should be."""
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.standard_normal(size), jnp.float32) for size in ((384, 130), (130, 300)))
    run = lambda x, w: matmul.value(x, w, activation=None, precision=FULL, tiles=Tiles(128, 128, 256))[0]
    with chips.target(chips.named("v5e")), interpreter(dma_execution_mode=mode):
        return np.asarray(jax.jit(run)(x, w)), np.asarray(x, np.float64) @ np.asarray(w, np.float64)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_rows_fetched_ahead(mode):
    got, exact = rows_ahead(mode)
    np.testing.assert_allclose(got, exact, atol=1e-4)


def test_a_missing_wait_is_found(monkeypatch):
    fetch = products._fetch_rows
    monkeypatch.setattr(products, "_fetch_rows", lambda *args: (fetch(*args)[0], lambda piece: None))
    got, _ = rows_ahead("on_wait")
    assert np.isnan(got).any()


def test_an_edge_that_is_not_cleared_is_found(monkeypatch):
    """Past the end of a contracted axis lies NaN."""
    monkeypatch.setattr(products, "_clear", lambda *_: None)
    got = run(matmul, {"x": jnp.ones((16, 200)), "w": jnp.ones((200, 128))}, jnp.ones((16, 128)), SMALL,
              activation=None, precision=FULL)  # fmt: skip
    assert np.isnan(got["y"]).any()


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


SLOPE = jnp.asarray(2.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": shape(8, 128, dtype="float16")}, "x must be float32 or bfloat16 on a TPU, got float16"),
        ({"w": shape(128, 256, dtype="float32")}, "weights must have the dtype of x, bfloat16, got float32"),
        ({"activation": jax.nn.softmax}, "activation or its gradient uses reduce_max, which"),
        ({"activation": lambda z: z[::-1]}, "uses rev,"),
        ({"activation": lambda z: z.astype(jnp.bfloat16)}, "computes in bfloat16"),
        ({"activation": lambda z: SLOPE * z}, "captures an array"),
        ({"activation": lambda z: z * jnp.where(z > 1, z > 2, z < 0)}, "chooses between booleans"),
        (
            {"precision": "high", "x": shape(8, 128, dtype="float32"), "w": shape(128, 256, dtype="float32")},
            "float32 is multiplied in precision default or highest on a TPU, not high",
        ),
    ],
)
def test_refusals(changes, reason):
    call = {"x": shape(8, 128), "w": shape(128, 256), "activation": None, "precision": None}
    assert matmul.unsupported(**call) is None
    assert reason in matmul.unsupported(**(call | changes))


def test_the_gated_linear_unit_refuses_what_its_products_have_not():
    wide = {"x": shape(8, 128, dtype="float32"), **dict.fromkeys(("w_gate", "w_up"), shape(128, 256, dtype="float32"))}
    for precision in (None, "default", FULL, jax.lax.Precision.HIGHEST):
        assert gated_linear_unit.unsupported(**wide, activation=SILU, precision=precision) is None
    reason = gated_linear_unit.unsupported(**wide, activation=SILU, precision="high")
    assert "float32 is multiplied in precision default or highest on a TPU, not high" in reason


def test_what_jax_offers_goes_into_a_kernel():
    for function in (SILU, GELU, RELU, jnp.tanh, jax.nn.sigmoid, jax.nn.softplus, jax.nn.relu6, jax.nn.leaky_relu):
        assert activations.unsupported(plain_activation("matmul", function)[0], elementwise.refusal) is None


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_tiles_fit(chip, phase):
    for sizes in ((8192, 4096, 11008), (1, 1, 1), (1000, 50257, 300), (64, 128, 1 << 20)):
        operands = dict(x=shape(sizes[0], sizes[2]), w=shape(sizes[2], sizes[1]), activation=SILU, precision=None)
        with chips.target(chips.named(chip)):
            chosen = matmul.tiles(phase, **operands)
            assert matmul.memory(phase, chosen, **operands) <= chips.named(chip).vmem_bytes
            assert next(matmul.candidates(phase, **operands)) == chosen
