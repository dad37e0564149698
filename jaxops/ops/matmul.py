"""matmul: public function and XLA rules. Beside the product it fuses what comes after it, in float32."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import autodiff, dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks, row_tiles
from jaxops.reference.matmul import matmul as reference
from pallas_kernels import gpu, modifiers, tpu

Activation = Callable[[jax.Array], jax.Array]
_TRIAL = jax.ShapeDtypeStruct((2, 3), jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Plain:
    """`function` in plain JAX: what a kernel may trace into its tiles, and every order of derivative go through."""

    function: Activation

    def __call__(self, x: jax.Array) -> jax.Array:
        with autodiff.by_reference():
            return self.function(x)


def plain_activation(operator: str, function: Any) -> tuple[Activation, bool]:
    """`function`, checked and in plain JAX, and whether an operator can take it: it cannot if it uses a traced array
    from around it, which may have a gradient of its own."""
    if not callable(function):
        raise TypeError(f"{operator}: activation must be a function of an array, got {type(function).__name__}")
    try:
        hash(function)
    except TypeError as error:
        raise TypeError(f"{operator}: activation must be a hashable function: {error}") from error
    function = _Plain(function)
    program = jax.make_jaxpr(function)(_TRIAL)
    returned = program.out_avals
    if len(returned) != 1 or returned[0].shape != _TRIAL.shape:
        got = ", ".join(str(x.shape) for x in returned) or "nothing"
        raise ValueError(
            f"{operator}: activation must keep the shape of its argument, {_TRIAL.shape} in a trial, got {got}"
        )
    return function, not any(isinstance(x, jax.core.Tracer) for x in modifiers.captured(program))


def kept(z: jax.Array, dtype: Any) -> jax.Array:
    """What the gradient of an activation is computed from, saved in the dtype of the result; float16 has no range for
    what no activation has bounded yet."""
    return z if dtype == jnp.float16 else z.astype(dtype)


def pull_back(f: Callable[..., jax.Array], saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    """The gradients, in float32 or more, of the saved arguments of `f`."""
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    y, transposed = jax.vjp(f, *(z.astype(wide) for z in saved))
    return transposed(dy.astype(y.dtype))


def activated(
    z: jax.Array, residual: jax.Array | None, activation: Activation | None, dtype: Any
) -> tuple[tuple[jax.Array], tuple[jax.Array, ...]]:
    """((activation(z) + residual in `dtype`,), what `before` needs of it), of z in float32 or more."""
    y = z if activation is None else activation(z)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return (y.astype(dtype),), () if activation is None else (kept(z, dtype),)


def before(activation: Activation | None, saved: tuple[jax.Array, ...], dy: jax.Array) -> jax.Array:
    """dz = activation'(z) · dy, in float32 or more."""
    if activation is None:
        return dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    return pull_back(activation, saved, dy)[0]


def gradients_beside(
    dy: jax.Array, dz: jax.Array, bias: jax.Array | None, residual: jax.Array | None, channels: int = -1
) -> dict[str, jax.Array]:
    """dbias = Σ dz over all axes but that of the `channels`, dresidual = dy, as far as these are there."""
    gradients = {}
    if bias is not None:
        others = [axis for axis in range(dz.ndim) if axis != channels % dz.ndim]
        gradients["bias"] = jnp.sum(dz, others).astype(bias.dtype)
    if residual is not None:
        gradients["residual"] = dy.astype(residual.dtype)
    return gradients


def product_gradients(
    x: jax.Array, pairs: list[tuple[jax.Array, jax.Array]], precision: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """dx = Σ dz · wᵀ and each dw = xᵀ · dz, for the (w, dz) in `pairs`; dz is rounded to what the products take."""
    dtype = functools.reduce(jnp.promote_types, (w.dtype for w, _ in pairs), x.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    product = functools.partial(lax.dot_general, precision=precision, preferred_element_type=wide)
    dx: Any = 0
    dws = []
    for w, dz in pairs:
        dz = dz.astype(dtype)
        dx = dx + product(dz, w.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
        dws.append(row_tiles.outer_products(x.astype(dtype), dz, precision))
    return dx.astype(x.dtype), [dw.astype(w.dtype) for dw, (w, _) in zip(dws, pairs, strict=True)]


def _forward(x, w, bias=None, residual=None, *, activation, precision):
    if activation is None:
        return (reference(x, w, bias, residual, activation=None, precision=precision),), ()
    dtype = jnp.promote_types(x.dtype, w.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)

    def rows(x, residual=None):
        z = jnp.dot(x, w, precision=precision, preferred_element_type=wide)
        if bias is not None:
            z = z + bias.astype(wide)
        return sum(activated(z, residual, activation, dtype), ()), ()

    (*y, saved), _ = row_tiles.map_rows(rows, w.shape[1], x, *(() if residual is None else (residual,)))
    return tuple(y), (saved,)


def _backward(x, w, bias=None, residual=None, *, outputs, residuals, cotangents, activation, precision):
    """dz = activation'(z) · dy,  dx = dz · wᵀ,  dw = xᵀ · dz,  dbias = Σ dz,  dresidual = dy."""
    del outputs
    dy = cotangents[0]

    def rows(dy, *saved):
        dz = before(activation, saved, dy)
        sums = () if bias is None else ((jnp.ones((*dz.shape[:-1], 1), dz.dtype), dz),)
        return (dz.astype(jnp.promote_types(x.dtype, w.dtype)),), sums

    (dz,), dbias = row_tiles.map_rows(rows, w.shape[1], dy, *residuals)
    dx, (dw,) = product_gradients(x, [(w, dz)], precision)
    beside = gradients_beside(dy, dz, None, residual)
    return {"x": dx, "w": dw} | beside | ({} if bias is None else {"bias": dbias[0].astype(bias.dtype)})


_OPERATOR = Operator(
    name="matmul",
    differentiable=("x", "w", "bias", "residual"),
    reference=lambda *operands, **named: (reference(*operands, **named),),
    xla=Rules(_forward, _backward),
    tpu=tpu.matmul,
    gpu=gpu.matmul,
    partition=None,
)


def matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation(x · w + bias) + residual.

    Args:
      x: floating [..., k].
      w: floating [k, n].
      bias: floating [n] or None.
      activation: an elementwise function of a float32 array (float64 for float64) or None. May be your own: it becomes
        part of the kernel, and JAX derives its gradient.
      residual: floating [..., n] or None.
      precision: as in `jnp.matmul`.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[..., n] in the common dtype of x and w. Sums, bias, activation and residual are in float32; y is rounded once,
      at the end.

    Raises:
      TypeError: an array is not floating, or `activation` is not a function.
      ValueError: shapes do not fit, the activation changes the shape, or `implementation` is unknown or, alone, cannot
        run.
    """
    name = "matmul"
    x = checks.floating(name, "x", x)
    w = checks.weight(name, "w", w, x)
    beside, activation, known = after_product(name, (*x.shape[:-1], w.shape[1]), bias, residual, activation)
    operands = dict(x=x, w=w, **beside)
    return call_unless_traced(_OPERATOR, known, operands, implementation, activation=activation, precision=precision)


def after_product(
    operator: str,
    shape: tuple[int, ...],
    bias: Any,
    residual: Any,
    activation: Any,
    *,
    channels: int = -1,
    of: str = "the columns of w",
    like: str = "that of x · w",
) -> tuple[dict[str, jax.Array | None], Activation | None, bool]:
    """({"bias", "residual"}, activation, whether an operator can take that), checked for a product of `shape`."""
    if bias is not None:
        bias = checks.floating(operator, "bias", bias, shape=(shape[channels],), of=of)
    if residual is not None:
        residual = checks.floating(operator, "residual", residual, shape=shape, of=like)
    known = True
    if activation is not None:
        activation, known = plain_activation(operator, activation)
    return dict(bias=bias, residual=residual), activation, known


def call_unless_traced(
    operator: Operator, known: bool, operands: dict, implementation: dispatch.Implementation, **static: Any
) -> jax.Array:
    """The first output of `operator`, or of its reference where the activation is not `known` to be a constant."""
    if known:
        return operator(operands, implementation=implementation, **static)[0]
    if "xla" not in dispatch.order_of(operator.name, implementation):
        raise ValueError(
            f"{operator.name}: implementation 'pallas' was asked for, but activation uses a traced array from around it"
        )
    return operator.reference(**operands, **static)[0]
