"""matmul and gated_linear_unit on Mosaic GPU: interpreted, races detected and unwritten memory NaN, against float64."""

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
from pallas_kernels.gpu import elementwise, gated_linear_unit, matmul, product_gradients, products
from tests.compare import no_worse

Tiles = products.Tiles
SILU, GELU, RELU = jax.nn.silu, jax.nn.gelu, jax.nn.relu
CASES = {  # kernel, m, k, n, what comes after the product, activation, tiles
    "edges": (matmul, 70, 64, 192, ("bias", "residual"), GELU, Tiles(128, 2)),
    "blocks": (matmul, 130, 192, 192, ("bias", "residual"), GELU, Tiles(128, 2)),
    "one": (matmul, 1, 64, 64, ("bias",), RELU, None),
    "plain": (matmul, 70, 128, 320, (), None, None),
    "residual": (matmul, 257, 64, 64, ("residual",), jnp.tanh, None),
    "gated": (gated_linear_unit, 70, 64, 128, (), SILU, Tiles(64, 2)),
    "gated-blocks": (gated_linear_unit, 130, 192, 192, (), SILU, Tiles(128, 2)),
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


def everything(reference, operands, dy, activation):
    """y, what the kernels save, rounded as they do, and the gradients by name, in plain JAX."""
    wide = jnp.promote_types(operands["x"].dtype, jnp.float32)
    saved = {}
    for name in (name for name in operands if name.startswith("w") and activation is not None):
        z = jnp.dot(operands["x"], operands[name], preferred_element_type=wide)
        z = z + operands["bias"].astype(wide) if "bias" in operands else z
        saved[f"x · {name}"] = z.astype(operands["x"].dtype)
    y, transposed = jax.vjp(lambda operands: reference(**operands, activation=activation, precision=None), operands)
    return {"y": y} | saved | {f"d{name}": g for name, g in transposed(dy.astype(y.dtype))[0].items()}


@pytest.mark.timeout(300)  # a lost arrival is a deadlock
@pytest.mark.parametrize(
    "name", [n if n in ("edges", "gated", "one") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_interpreted(name):
    kernel, m, k, n, more, activation, tiles = CASES[name]
    operands = build(kernel, m, k, n, more)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((m, n)), jnp.bfloat16)
    static = dict(activation=activation, precision=None)
    with chips.target(chips.named("h100")), interpreter():
        assert kernel.unsupported(**operands, **static) is None
        outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
        saved = dict(outputs=outputs, residuals=residuals, cotangents=(dy,))
        gradients = kernel.backward(**operands, **saved, **static, tiles=tiles)
        got = jax.block_until_ready([*outputs, *residuals, *(gradients[name] for name in sorted(operands))])
    reference = matmul_reference if kernel is matmul else gated_reference
    unfused = everything(reference, operands, dy, activation)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in operands.items()}
        oracle = everything(reference, wide, jnp.asarray(np.asarray(dy, np.float64)), activation)
    for x, (which, plain) in zip(got, unfused.items(), strict=True):
        no_worse(which, x, plain, oracle[which], jnp.bfloat16)


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


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "forgotten",
    [*(pytest.param(f, marks=pytest.mark.slow) for f in ("commit_smem", "barrier_wait")), "wait_smem_to_gmem"],
)
def test_a_fault_of_the_gradients_is_found(forgotten, monkeypatch):
    """What is differentiated leaves before it is written, is read before it has come, or overwritten as it leaves."""
    x, wide = jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 256), jnp.bfloat16)
    start = lambda dy, gate, up: (dy * up, 2 * dy * gate)

    def gradients():
        saved, tiles = [wide, wide], Tiles(64, 2)
        return jax.block_until_ready(product_gradients.backward("f", x, [wide, wide], wide, saved, start, tiles=tiles))

    with chips.target(chips.named("h100")), interpreter():
        dx, dws, _ = gradients()
        for found, expected in ((dx, 3 * 256), (dws[0], 64), (dws[1], 128)):
            assert (np.asarray(found, np.float32) == expected).all()
    with chips.target(chips.named("h100")), interpreter():
        real = getattr(plgpu, forgotten)
        forget_all = forgotten != "wait_smem_to_gmem"  # else only those for tiles that are to be written again
        forget = lambda *given, **how: None if forget_all or how else real(*given)
        monkeypatch.setattr(plgpu, forgotten, forget)
        with pytest.raises(Exception, match="RACE DETECTED"):
            gradients()
        monkeypatch.undo()


@pytest.mark.timeout(300)
def test_a_fault_of_the_first_gradient_is_found(monkeypatch):
    """The rows of dz are summed, and dz leaves, before they are written."""
    z = jnp.ones((64, 128), jnp.bfloat16)

    def made():
        return product_gradients.started("f", lambda dy, z: (2 * dy * z,), z, [z], 64, with_sums=True)

    with chips.target(chips.named("h100")), interpreter():
        (dz,), (total,) = jax.block_until_ready(made())
        assert (np.asarray(dz, np.float32) == 2).all() and (np.asarray(total) == 128).all()
    with chips.target(chips.named("h100")), interpreter():
        monkeypatch.setattr(plgpu, "commit_smem", lambda *_: None)
        with pytest.raises(Exception, match="RACE DETECTED"):
            jax.block_until_ready(made())
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
        assert activations.unsupported(plain, elementwise.refusal, elementwise.derived) is None


def test_tiles_fit():
    for sizes in ((8192, 4096, 11008), (1, 64, 64), (1000, 50304, 320)):
        operands = dict(x=shape(sizes[0], sizes[2]), w=shape(sizes[2], sizes[1]), activation=SILU, precision=None)
        with chips.target(chips.named("h100")):
            chosen = matmul.tiles("forward", **operands)
            assert matmul.memory("forward", chosen, **operands) <= chips.named("h100").smem_bytes
            assert next(matmul.candidates("forward", **operands)) == chosen == matmul.tiles("backward", **operands)
