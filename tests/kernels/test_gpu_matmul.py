"""matmul and gated_linear_unit on Mosaic GPU: interpreted, races detected and unwritten memory NaN, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxops.interpreter import gpu as interpreter
from jaxops.ops.matmul import plain_activation
from jaxops.reference.gated_linear_unit import gated_linear_unit as gated_reference
from jaxops.reference.matmul import matmul as matmul_reference
from pallas_kernels import activations, chips
from pallas_kernels.gpu import elementwise, gated_linear_unit, matmul, products
from tests.compare import no_worse

Tiles = products.Tiles
SILU, GELU, RELU = jax.nn.silu, jax.nn.gelu, jax.nn.relu
CASES = {  # kernel, m, k, n, what comes after the product, activation, tiles
    "edges": (matmul, 130, 192, 192, ("bias", "residual"), GELU, Tiles(128, 2)),
    "one": (matmul, 1, 64, 64, ("bias",), RELU, None),
    "plain": (matmul, 70, 128, 320, (), None, None),
    "residual": (matmul, 257, 64, 64, ("residual",), jnp.tanh, None),
    "gated": (gated_linear_unit, 130, 192, 192, (), SILU, Tiles(128, 2)),
    "gated-wide": (gated_linear_unit, 70, 256, 256, (), GELU, None),
}


def build(kernel, m, k, n, more):
    random = np.random.default_rng(0)
    weights = ("w",) if kernel is matmul else ("w_gate", "w_up")
    shapes = {"x": (m, k), **dict.fromkeys(weights, (k, n))} | {
        name: {"bias": (n,), "residual": (m, n)}[name] for name in more
    }
    made = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    return {name: jnp.asarray(x / k**0.5 if name in weights else x, jnp.bfloat16) for name, x in made.items()}


def saved_by(operands, activation):
    """z, or gate and up, as the kernels save them: rounded."""
    x, weights = operands["x"], [w for name, w in operands.items() if name.startswith("w")]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    zs = [jnp.dot(x, w, preferred_element_type=wide) for w in weights]
    if "bias" in operands:
        zs = [z + operands["bias"].astype(wide) for z in zs]
    return [] if activation is None else [z.astype(x.dtype) for z in zs]


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize(
    "name", [n if n in ("edges", "gated", "one") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_interpreted(name):
    kernel, m, k, n, more, activation, tiles = CASES[name]
    operands = build(kernel, m, k, n, more)
    static = dict(activation=activation, precision=None)
    with chips.target(chips.named("h100")), interpreter():
        assert kernel.unsupported(**operands, **static) is None
        outputs, residuals = jax.block_until_ready(kernel.forward(**operands, **static, tiles=tiles))
    reference = functools.partial(matmul_reference if kernel is matmul else gated_reference, **static)
    unfused = [reference(**operands), *saved_by(operands, activation)]
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in operands.items()}
        oracle = [reference(**wide), *saved_by(wide, activation)]
    for i, (got, plain, exact) in enumerate(zip((*outputs, *residuals), unfused, oracle, strict=True)):
        no_worse(str(i), got, plain, exact, jnp.bfloat16)


@pytest.mark.timeout(300)
def test_vmap():
    """Of two problems that share their weight each is as alone."""
    operands = build(matmul, 70, 64, 64, ())
    two = jnp.stack([operands["x"], 2 * operands["x"]])
    with chips.target(chips.named("h100")), interpreter():
        got = jax.vmap(lambda x: matmul.value(x, operands["w"], activation=None, precision=None)[0])(two)
        got = np.asarray(jax.block_until_ready(got), np.float32)
    np.testing.assert_array_equal(got[1], 2 * got[0])
    exact = np.asarray(operands["x"], np.float32) @ np.asarray(operands["w"], np.float32)
    np.testing.assert_allclose(got[0], exact, atol=0.02, rtol=0.01)


@pytest.mark.timeout(300)
def test_a_planted_fault_is_found(monkeypatch):
    """A result that leaves before it is written."""
    operands = build(matmul, 64, 64, 64, ())
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, "commit_smem", lambda *_: None)
        with pytest.raises(Exception, match="RACE DETECTED"):
            jax.block_until_ready(matmul.value(**operands, activation=None, precision=None))
        monkeypatch.undo()


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("chip", "changes", "reason"),
    [
        ("a100", {}, "needs wgmma, which only GPUs of compute capability 9.0 have, not 8.0"),
        ("h100", {"x": shape(8, 128, dtype="float32")}, "x must be bfloat16, got float32"),
        ("h100", {"w": shape(128, 256, dtype="float16")}, "a weight must be bfloat16, got float16"),
        ("h100", {"residual": shape(8, 256, dtype="float32")}, "residual must be bfloat16, got float32"),
        (
            "h100",
            {"w": shape(128, 257)},
            "k and n must be multiples of 64, the width of the tiles that TMA copies, got 128 and 257",
        ),
        ("h100", {"activation": jnp.sin}, "activation or its gradient uses sin, which the kernel cannot compile"),
        ("h100", {"activation": lambda x: x % 2}, "activation or its gradient takes a remainder of floating numbers"),
        ("h100", {"x": shape(1 << 24, 128)}, "the grid is limited"),
    ],
)
def test_refusals(chip, changes, reason):
    call = {"x": shape(8, 128), "w": shape(128, 256), "activation": None, "precision": None}
    with chips.target(chips.named(chip)):
        assert reason in matmul.unsupported(**(call | changes))


def test_what_jax_offers_goes_into_a_kernel():
    step = lambda x: x * (x > 0)
    for function in (SILU, GELU, RELU, jnp.tanh, jax.nn.sigmoid, jax.nn.leaky_relu, step):
        plain = plain_activation("matmul", function)[0]
        assert activations.unsupported(plain, elementwise.refusal, products.computed) is None


def test_tiles_fit():
    for sizes in ((8192, 4096, 11008), (1, 64, 64), (1000, 50304, 320)):
        operands = dict(x=shape(sizes[0], sizes[2]), w=shape(sizes[2], sizes[1]), activation=SILU, precision=None)
        with chips.target(chips.named("h100")):
            chosen = matmul.tiles("forward", **operands)
            assert matmul.memory("forward", chosen, **operands) <= chips.named("h100").smem_bytes
            assert next(matmul.candidates("forward", **operands)) == chosen
