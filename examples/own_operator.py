"""An operator of your own, from the formula to compiled kernels, on a machine without an accelerator.

    python examples/own_operator.py              checks it against float64 and says what would run on which chip
    python examples/own_operator.py --compile    also compiles its kernels for TPUs (pip install '.[tpu-compile]')

The operator is the squared ReLU (So et al., arXiv:2109.08668) with a gain per feature, y = scale · max(x, 0)².
docs/tutorial.md explains this file piece by piece.
"""

import dataclasses
import functools
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import jaxops
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from pallas_kernels.padding import pad_to, round_up

# ---- what it means ---------------------------------------------------------------------------------------------------


def reference(x, scale):
    """y = scale · max(x, 0)²: x[..., features], scale[features]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    positive = jnp.maximum(x.astype(wide), 0)
    return ((scale.astype(wide) * positive * positive).astype(x.dtype),)


# ---- the rules in XLA ------------------------------------------------------------------------------------------------


def xla_forward(x, scale):
    return reference(x, scale), ()


def xla_backward(x, scale, *, outputs, residuals, cotangents):
    """dx = 2 · dy · scale · max(x, 0);  dscale = Σ dy · max(x, 0)². Nothing is kept from the forward pass but x."""
    del outputs, residuals
    wide = jnp.promote_types(x.dtype, jnp.float32)
    positive, dy = jnp.maximum(x.astype(wide), 0), cotangents[0].astype(wide)
    dscale = jnp.sum(dy * positive * positive, axis=tuple(range(x.ndim - 1)))
    return {"x": (2 * dy * scale.astype(wide) * positive).astype(x.dtype), "scale": dscale.astype(scale.dtype)}


# ---- the kernels for TPUs --------------------------------------------------------------------------------------------

MOST_FEATURES = 16384


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many rows one grid step takes."""

    rows: int

    @staticmethod
    def default(features: int) -> "Tiles":
        """64 Ki values a step: what the registers hold. A multiple of 16 rows, the height of a bfloat16 register."""
        return Tiles(max(16, min(256, (1 << 16) // features // 16 * 16)))


def unsupported(x, scale):
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    if x.shape[-1] > MOST_FEATURES:
        return f"x must have at most {MOST_FEATURES} features, got {x.shape[-1]}"
    return None


def forward_kernel(x_ref, scale_ref, y_ref):
    positive = jnp.maximum(x_ref[...].astype(jnp.float32), 0)
    y_ref[...] = (scale_ref[...] * positive * positive).astype(y_ref.dtype)


def backward_kernel(x_ref, scale_ref, dy_ref, dx_ref, dscale_ref):
    @pl.when(pl.program_id(0) == 0)
    def _():
        dscale_ref[...] = jnp.zeros(dscale_ref.shape, jnp.float32)

    positive, dy = jnp.maximum(x_ref[...].astype(jnp.float32), 0), dy_ref[...].astype(jnp.float32)
    dx_ref[...] = (2 * dy * scale_ref[...] * positive).astype(dx_ref.dtype)
    dscale_ref[...] += jnp.sum(dy * positive * positive, axis=0, keepdims=True)


def rows_of(x, tiles):
    """x as [rows, features], the rows filled with zeros to whole tiles: zero rows add nothing to dscale."""
    flat = x.reshape(-1, x.shape[-1])
    return pad_to(flat, 0, round_up(flat.shape[0], tiles.rows))


def tpu_forward(x, scale, *, tiles=None):
    tiles = tiles or Tiles.default(x.shape[-1])
    flat = rows_of(x, tiles)
    block = pl.BlockSpec((tiles.rows, x.shape[-1]), lambda i: (i, 0))
    vector = pl.BlockSpec((1, x.shape[-1]), lambda i: (0, 0))
    y = pl.pallas_call(
        forward_kernel,
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        grid=(flat.shape[0] // tiles.rows,),
        in_specs=[block, vector],
        out_specs=block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="scaled_squared_relu",
    )(flat, scale.astype(jnp.float32)[None])
    return (y[: x.size // x.shape[-1]].reshape(x.shape),), ()


def tpu_backward(x, scale, *, outputs, residuals, cotangents, tiles=None):
    del outputs, residuals
    tiles = tiles or Tiles.default(x.shape[-1])
    flat, dy = rows_of(x, tiles), rows_of(cotangents[0], tiles)
    block = pl.BlockSpec((tiles.rows, x.shape[-1]), lambda i: (i, 0))
    vector = pl.BlockSpec((1, x.shape[-1]), lambda i: (0, 0))
    dx, dscale = pl.pallas_call(
        backward_kernel,
        out_shape=(jax.ShapeDtypeStruct(flat.shape, x.dtype), jax.ShapeDtypeStruct((1, x.shape[-1]), jnp.float32)),
        grid=(flat.shape[0] // tiles.rows,),
        in_specs=[block, vector, block],
        out_specs=(block, vector),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),  # dscale is summed from step to step
        name="scaled_squared_relu_backward",
    )(flat, scale.astype(jnp.float32)[None], dy)
    return {"x": dx[: x.size // x.shape[-1]].reshape(x.shape), "scale": dscale[0].astype(scale.dtype)}


# ---- the operator ----------------------------------------------------------------------------------------------------

OPERATOR = Operator(
    name="scaled_squared_relu",
    differentiable=("x", "scale"),
    reference=reference,
    xla=Rules(xla_forward, xla_backward),
    tpu=types.SimpleNamespace(unsupported=unsupported, forward=tpu_forward, backward=tpu_backward),
    gpu="scaled_squared_relu has no Mosaic GPU kernel yet",
)


def scaled_squared_relu(x, scale, *, implementation=None):
    """y = scale · max(x, 0)²: x[..., features], scale[features]; y in the shape and dtype of x."""
    x = checks.floating("scaled_squared_relu", "x", x)
    scale = checks.floating("scaled_squared_relu", "scale", scale, shape=x.shape[-1:], of="the last axis of x")
    (y,) = OPERATOR({"x": x, "scale": scale}, implementation=implementation)
    return y


# ---- its proof -------------------------------------------------------------------------------------------------------


def results(x, scale, dy, function):
    """y and both gradients, by name."""
    y, pull = jax.vjp(function, x, scale)
    return dict(zip(("y", "x", "scale"), (y, *pull(dy)), strict=True))


def error(got, oracle):
    return np.abs(np.asarray(got, np.float64) - oracle).max() / np.abs(oracle).max()


def verify(shape, dtype):
    """The kernels, interpreted as on a v5e, against float64: at most twice the error of plain JAX in the same dtype."""
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(2))
    scale = jnp.asarray(random.standard_normal(shape[-1]), dtype)

    x64, scale64, dy64 = (np.asarray(a, np.float64) for a in (x, scale, dy))
    positive = np.maximum(x64, 0)
    dscale = (dy64 * positive**2).reshape(-1, shape[-1]).sum(0)
    oracle = {"y": scale64 * positive**2, "x": 2 * dy64 * scale64 * positive, "scale": dscale}

    plain = results(x, scale, dy, lambda x, scale: reference(x, scale)[0])
    with jaxops.target("v5e", interpret=True):
        fused = results(x, scale, dy, functools.partial(scaled_squared_relu, implementation="pallas"))
    for name, exact in oracle.items():
        ours, theirs = error(fused[name], exact), error(plain[name], exact)
        assert ours <= 2 * theirs + 4 * float(jnp.finfo(dtype).eps), f"{name}: error {ours:.1e}, unfused {theirs:.1e}"
        print(f"{dtype.__name__}{list(shape)} {name}: error {ours:.1e}, unfused {theirs:.1e}")


def explained(chip):
    """Which implementation a loss and its gradient would run on `chip`."""
    x = jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((1024,), jnp.float32)
    loss = lambda x, scale: scaled_squared_relu(x, scale).astype(jnp.float32).sum()
    return jaxops.explain(jax.grad(loss, argnums=(0, 1)), x, scale, target=chip)


def compiled_for(chip):
    """A training step's kernels, compiled by the TPU's own compiler. Needs libtpu, and no TPU."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    with jaxops.target(chip) as facts:
        device = topologies.get_topology_desc(platform="tpu", topology_name=facts.topology).devices[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        x = jax.ShapeDtypeStruct((8192, 1024), jnp.bfloat16, sharding=sharding)
        scale = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=sharding)
        step = jax.jit(
            functools.partial(results, function=functools.partial(scaled_squared_relu, implementation="pallas"))
        )
        return step.lower(x, scale, x).compile()


def main(argv):
    for shape, dtype in (((300, 129), jnp.float32), ((2, 5, 128), jnp.bfloat16)):
        verify(shape, dtype)
    for chip in (None, "v5e", "h100"):
        print(explained(chip))
    if "--compile" in argv:
        for chip in ("v5e", "v5p", "v6e", "tpu7x"):
            kernels = compiled_for(chip).as_text().count('custom_call_target="tpu_custom_call"')
            print(f"{chip}: compiled, {kernels} kernels")


if __name__ == "__main__":
    main(sys.argv[1:])
