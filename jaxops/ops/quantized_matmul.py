"""quantized_matmul: public function and XLA rules."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.reference.quantized_matmul import quantized_matmul as reference
from pallas_kernels import gpu, tpu

_NAME = "quantized_matmul"
INTEGERS = (jnp.dtype(jnp.int8), jnp.dtype(jnp.int4))
FLOATS = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


def _forward(*operands, **static):
    return reference(*operands, **static), ()


def _operator(*differentiable: str) -> Operator:
    """The operator whose integers have no gradient; the others have the reference's."""

    def cost(x, w, **_):
        product = 2 * math.prod(x.shape) * w.shape[1]
        return product, 2 * product

    return Operator(
        name=_NAME,
        differentiable=differentiable,
        reference=reference,
        xla=Rules(_forward, None),
        tpu=tpu.quantized_matmul,
        gpu=gpu.quantized_matmul,
        partition=None,
        cost=cost,
    )


_OPERATOR = _operator("x", "scales", "zeros", "bias")
_BOTH = _operator("scales", "zeros", "x_scales", "bias")


def quantized_matmul(
    x: ArrayLike,
    w: ArrayLike,
    scales: ArrayLike,
    *,
    zeros: ArrayLike | None = None,
    x_scales: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = (x_scales · x) · (scales · (w - zeros)) + bias, of quantised weights, and of quantised x if `x_scales` are
    there.

    What `jaxops.quantize(w, axis=0)` and `jaxops.quantize(x)` return is what this takes. The weights are read as they
    are stored, once; no wider copy of them is in memory where a kernel serves.

    Args:
      x: floating [..., k] (float32, bfloat16 or float16); or int8, float8_e4m3fn or float8_e5m2 [..., k] with
        `x_scales`.
      w: int8, int4, float8_e4m3fn or float8_e5m2 [k, n].
      scales: floating [g, n]: one for each column of each of g groups of k / g consecutive rows of w; g = 1 is one for
        each column.
      zeros: floating or integer [g, n], the values of w that stand for 0; None: 0. Not for float8.
      x_scales: floating [..., 1], one for each row of x.
      bias: floating [n] or None.
      dtype: of y; None: the dtype of x, or for quantised x that of x_scales.
      implementation: None, "pallas", "xla", or a sequence tried in order. None: the kernel as far as it serves, but
        XLA, which is faster there, for float8 w with one scale a column.

    Returns:
      y[..., n]. Products of integers are exact, others are summed in float32; y is rounded once, at the end. In XLA,
      weights with zeros or of several groups are rounded to the dtype of x before the product.

    Raises:
      TypeError: a dtype is none of those above.
      ValueError: shapes do not fit, g does not divide k, x_scales are missing or superfluous, or `implementation` is
        unknown or, alone, cannot run.

    Gradients of floating x, scales, zeros, x_scales and bias are computed in XLA; w has none.

    Sources: Jacob et al., arXiv:1712.05877 (integer products, zero points); Frantar et al., GPTQ, arXiv:2210.17323
    (groups of rows).
    """
    x, w, scales, zeros = quantised_operands(_NAME, ("x", x), ("w", w), scales, zeros, x_scales)
    if x.ndim == 0:
        raise ValueError(f"{_NAME}: x must have at least one axis, got a scalar")
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        hint = "; is it transposed?" if w.ndim == 2 and w.shape[1] == x.shape[-1] else ""
        raise ValueError(f"{_NAME}: w must have shape ({x.shape[-1]}, n) for x {x.shape}, got {w.shape}{hint}")
    k, n = w.shape
    if scales.ndim != 2 or scales.shape[1] != n or not scales.shape[0] or k % scales.shape[0]:
        raise ValueError(f"{_NAME}: scales must have shape (g, {n}) with g dividing {k}, got {scales.shape}")
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"{_NAME}: zeros must have the shape of scales, {scales.shape}, got {zeros.shape}")
    if x_scales is not None:
        x_scales = checks.floating(_NAME, "x_scales", x_scales, shape=(*x.shape[:-1], 1), of="one for each row of x")
    if bias is not None:
        bias = checks.floating(_NAME, "bias", bias, shape=(n,), of="the last axis of w")
    operands = dict(x=x, w=w, scales=scales, zeros=zeros, x_scales=x_scales, bias=bias)
    dtype = result_dtype(_NAME, dtype, x if x_scales is None else x_scales)
    if implementation is None and w.dtype in FLOATS and scales.shape[0] == 1:
        implementation = "xla"  # which converts float8 in fewer steps, if there is nothing to scale within the sum
    return (_OPERATOR if x_scales is None else _BOTH)(operands, implementation=implementation, dtype=dtype)[0]


def quantised_operands(
    operator: str, x: tuple[str, Any], w: tuple[str, Any], scales: Any, zeros: Any, x_scales: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """x, w (each given with its name), scales and zeros as arrays of dtypes that go together; shapes are left to
    check."""
    (x_name, given_x), (w_name, given_w) = x, w
    one, other = checks.array(operator, x_name, given_x), checks.array(operator, w_name, given_w)
    if other.dtype not in INTEGERS + FLOATS:
        allowed = ", ".join(dtype.name for dtype in INTEGERS + FLOATS)
        raise TypeError(f"{operator}: {w_name} must be of one of {allowed}, got {other.dtype}")
    quantised = one.dtype in (jnp.dtype(jnp.int8), *FLOATS)
    if not quantised and one.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(
            f"{operator}: {x_name} must be float32, bfloat16, float16, or int8 or float8 with {x_name}_scales, "
            f"got {one.dtype}"
        )
    if quantised != (x_scales is not None):
        of = f"an int8 or float8 {x_name}"
        wanted = f"must be given for {of}" if quantised else f"are for {of}, not {one.dtype}"
        raise ValueError(f"{operator}: {x_name}_scales {wanted}, got {'None' if quantised else 'an array'}")
    scales = checks.floating(operator, "scales", scales)
    if zeros is not None:
        zeros = checks.array(operator, "zeros", zeros)
        if other.dtype in FLOATS:
            raise ValueError(f"{operator}: zeros are for integer {w_name}, not {other.dtype}, got an array")
        if jnp.issubdtype(zeros.dtype, jnp.integer):
            zeros = zeros.astype(scales.dtype if scales.dtype != jnp.float16 else jnp.float32)
        zeros = checks.floating(operator, "zeros", zeros)
    return one, other, scales, zeros


def result_dtype(operator: str, dtype: Any, like: jax.Array) -> str:
    """The name of `dtype`, or of that of `like` where it is None."""
    dtype = like.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{operator}: dtype must be floating, got {dtype}")
    return dtype.name
