"""new_operator: y = scale · activation(x), with one gain per feature.

`activation` is the formula: the reference, the rules in XLA and the kernels all call it, and JAX derives it inside the
kernels. For an operator of another form change the reference first, then the rules, then the kernels, and ask after
each step, for the kernels with `--interpret tpu`:

    jaxops verify new_package.new_operator:new_operator x=300x129 scale=129
"""

import dataclasses
import functools
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxops.autodiff import Operator, Rules
from jaxops.dispatch import Implementation
from jaxops.ops import checks
from pallas_kernels import chips, tuned
from pallas_kernels.padding import round_up

NAME = "new_operator"

# ---- what it means -------------------------------------------------------------------------------------------------


def activation(x: jax.Array) -> jax.Array:
    """x · sigmoid(x), elementwise. Change the formula here; it gets float32, or float64 in the oracle of a test."""
    return x * jax.nn.sigmoid(x)


def reference(x: jax.Array, scale: jax.Array) -> tuple[jax.Array]:
    """y = scale · activation(x): x[..., features], scale[features]. Plain JAX, the oracle of every test."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return ((scale.astype(wide) * activation(x.astype(wide))).astype(x.dtype),)


# ---- the rules in XLA ----------------------------------------------------------------------------------------------


def xla_forward(x, scale):
    """(outputs, residuals). Nothing is kept for backward: it has x and scale, which is all that it needs."""
    return reference(x, scale), ()


def xla_backward(x, scale, *, outputs, residuals, cotangents):
    """dx = dy · scale · activation'(x);  dscale = Σ dy · activation(x), over all axes but the last."""
    del outputs, residuals
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = cotangents[0].astype(wide)
    value, dx = jax.jvp(activation, (x.astype(wide),), (dy * scale.astype(wide),))
    dscale = jnp.sum(dy * value, axis=tuple(range(x.ndim - 1)))
    return {"x": dx.astype(x.dtype), "scale": dscale.astype(scale.dtype)}


# ---- the kernels for TPUs ------------------------------------------------------------------------------------------

MOST_FEATURES = 16384
LANES = 128  # of a register, along features
ROWS = 16  # of a bfloat16 register, or of two float32 ones
VMEM_BYTES = 12 << 20  # of the 16 MiB that a kernel may use where it asks for no more


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many rows one grid step takes: a multiple of 16."""

    rows: int

    @staticmethod
    def default(features: int) -> "Tiles":
        """64 Ki values a step, what the registers hold. A guess: `jaxops tune` finds what is best for a chip."""
        return Tiles(max(ROWS, min(256, (1 << 16) // features // ROWS * ROWS)))


def unsupported(x, scale) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    if x.shape[-1] > MOST_FEATURES:
        return f"x must have at most {MOST_FEATURES} features, got {x.shape[-1]}"
    return None


def memory(phase: str, tiles: Tiles, x, scale) -> int:
    """VMEM bytes of a grid step: each block twice, since the next one arrives meanwhile, and four float32 values."""
    blocks = 3 if phase == "backward" else 2
    return tiles.rows * round_up(x.shape[-1], LANES) * (2 * blocks * x.dtype.itemsize + 4 * 4)


def candidates(phase: str, x, scale) -> Iterator[Tiles]:
    """The tiles that `jaxops tune` tries, the default first."""
    default = Tiles.default(x.shape[-1])
    yield default
    for rows in (16, 32, 64, 128, 256, 512, 1024):
        fits = memory(phase, Tiles(rows), x, scale) <= VMEM_BYTES
        if fits and rows != default.rows and rows <= x.size // x.shape[-1]:
            yield Tiles(rows)


def chosen(phase: str, x, scale) -> Tiles:
    """The tiles of a call that says none: those tuned for the chip and the nearest shape, else the default."""
    return tuned.choose(
        f"tpu.{NAME}.{phase}",
        chips.current("tpu"),
        {"rows": x.size // x.shape[-1], "features": x.shape[-1]},
        jnp.dtype(x.dtype).name,
        Tiles,
        lambda tiles: tiles.rows % ROWS == 0 and 0 < memory(phase, tiles, x, scale) <= VMEM_BYTES,
        Tiles.default(x.shape[-1]),
    )


def forward_kernel(x_ref, scale_ref, y_ref):
    y_ref[...] = (scale_ref[...] * activation(x_ref[...].astype(jnp.float32))).astype(y_ref.dtype)


def backward_kernel(x_ref, scale_ref, dy_ref, dx_ref, dscale_ref, *, rows):
    @pl.when(pl.program_id(0) == 0)
    def _():
        dscale_ref[...] = jnp.zeros(dscale_ref.shape, jnp.float32)

    dy = dy_ref[...].astype(jnp.float32)
    value, dx = jax.jvp(activation, (x_ref[...].astype(jnp.float32),), (dy * scale_ref[...],))
    dx_ref[...] = dx.astype(dx_ref.dtype)
    # Rows past the end hold anything, also NaN: they are left out by selection, since 0 · NaN is NaN.
    row = pl.program_id(0) * dy.shape[0] + lax.broadcasted_iota(jnp.int32, dy.shape, 0)
    dscale_ref[...] += jnp.sum(jnp.where(row < rows, dy * value, 0.0), axis=0, keepdims=True)


def cut(x, tiles):
    """(x[rows, features], its blocks of whole rows, the block of a vector of features, the number of grid steps)."""
    flat = x.reshape(-1, x.shape[-1])
    height = min(tiles.rows, flat.shape[0])  # the last block may be partial, but not the only one
    block = pl.BlockSpec((height, flat.shape[1]), lambda i: (i, 0))
    vector = pl.BlockSpec((1, flat.shape[1]), lambda i: (0, 0))
    return flat, block, vector, pl.cdiv(flat.shape[0], height)


def tpu_forward(x, scale, *, tiles=None):
    """(outputs, residuals), as the rule in XLA gives them."""
    flat, block, vector, steps = cut(x, tiles or chosen("forward", x, scale))
    y = pl.pallas_call(
        forward_kernel,
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        grid=(steps,),
        in_specs=[block, vector],
        out_specs=block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=NAME,
    )(flat, scale.astype(jnp.float32)[None])
    return (y.reshape(x.shape),), ()


def tpu_backward(x, scale, *, outputs, residuals, cotangents, tiles=None):
    """Gradients by name, as the rule in XLA gives them."""
    del outputs, residuals
    flat, block, vector, steps = cut(x, tiles or chosen("backward", x, scale))
    dx, dscale = pl.pallas_call(
        functools.partial(backward_kernel, rows=flat.shape[0]),
        out_shape=(
            jax.ShapeDtypeStruct(flat.shape, x.dtype),
            jax.ShapeDtypeStruct((1, flat.shape[1]), jnp.float32),
        ),
        grid=(steps,),
        in_specs=[block, vector, block],
        out_specs=(block, vector),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),  # dscale is summed from step to step
        name=f"{NAME}_backward",
    )(flat, scale.astype(jnp.float32)[None], cotangents[0].reshape(flat.shape))
    return {"x": dx.reshape(x.shape), "scale": dscale[0].astype(scale.dtype)}


# ---- the operator --------------------------------------------------------------------------------------------------

OPERATOR = Operator(
    name=NAME,
    differentiable=("x", "scale"),
    reference=reference,
    xla=Rules(xla_forward, xla_backward),
    tpu=types.SimpleNamespace(
        unsupported=unsupported,
        forward=tpu_forward,
        backward=tpu_backward,
        tiles=chosen,
        candidates=candidates,
        memory=memory,
    ),
    gpu=f"{NAME} has no Mosaic GPU kernel yet",
)


def new_operator(
    x: jax.Array,
    scale: jax.Array,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """y = scale · activation(x).

    Args:
      x: floating [..., features].
      scale: floating [features].
      implementation: None | "pallas" | "xla" | a sequence of them.

    Returns:
      y in the shape and dtype of x; computed in float32, rounded once.

    Raises:
      TypeError: an operand is not floating.
      ValueError: `scale` does not fit the last axis of x, or `implementation` is unknown, or strict and refused.
    """
    x = checks.floating(NAME, "x", x)
    scale = checks.floating(NAME, "scale", scale, shape=x.shape[-1:], of="the last axis of x")
    (y,) = OPERATOR({"x": x, "scale": scale}, implementation=implementation)
    return y


class NewOperator(nnx.Module):
    """y = scale · activation(x), over x[..., features], with a parameter `scale[features]` that starts at one.

    Args:
      features: size of the last axis.
      param_dtype: of `scale`.
      implementation: None | "pallas" | "xla".
    """

    def __init__(
        self, features: int, *, param_dtype: jax.typing.DTypeLike = jnp.float32, implementation: str | None = None
    ):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        return new_operator(x, self.scale[...], implementation=self.implementation)
