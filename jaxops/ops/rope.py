"""rope: public function; rope_projection: public function and XLA rules."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.ops.matmul import product_gradients
from jaxops.reference.rope import RopeScaling as RopeScaling
from jaxops.reference.rope import rope as reference
from jaxops.reference.rope import rope_projection as projected
from jaxops.reference.rope import turned, turns
from pallas_kernels import gpu, tpu


def rope(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10000.0,
    scaling: float | RopeScaling | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """[y₁, y₂] = [x₁ cos a - x₂ sin a, x₂ cos a + x₁ sin a],  a_i = position · base^(-2i / H).

    x₁ and x₂ are the halves of the last axis (as in Llama and GPT-NeoX), not its even and odd elements.

    Args:
      x: floating [..., T, N, H], H even; computed in float32 whatever its dtype (float64 for float64).
      positions: integer or floating, broadcastable to [..., T]. Not differentiable where they are integers.
      base: above 0.
      scaling: None; a number that divides every frequency (linear interpolation of positions); or a `RopeScaling`
        (Llama 3).
      implementation: None or "xla": XLA, which makes the rotation a part of what comes before or after it and saves
        nothing for the gradient. "pallas", or a sequence that begins with it: a kernel that reads x and writes y once;
        it saves x where it is differentiated, and takes integer positions.

    Returns:
      y in the shape and dtype of x.

    Raises:
      TypeError: x is not floating, positions are not numbers, or base or scaling is of another type.
      ValueError: H is odd, x has fewer than 3 axes, positions do not broadcast, a number is out of its range, or
        `implementation` is unknown or, alone, cannot run.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
    """
    order = ("xla",) if implementation is None else dispatch.order_of("rope", implementation)
    x = checks.floating("rope", "x", x)
    if x.ndim < 3 or x.shape[-1] % 2:
        raise ValueError(f"rope: x must have shape [..., T, N, H] with H even, got {x.shape}")
    positions, base, scaling = _rotation("rope", positions, base, scaling, to=x.shape[:-2], of="[..., T] of x")
    moving = jnp.issubdtype(positions.dtype, jnp.floating)
    if moving and order == ("pallas",):
        raise ValueError("rope: implementation 'pallas' was asked for, but floating positions have a gradient, in XLA")
    if moving or order[0] == "xla":
        return reference(x, positions, base=base, scaling=scaling)
    positions = jnp.broadcast_to(positions, jnp.broadcast_shapes(positions.shape, x.shape[-3:-2]))
    cos, sin = turns(positions, x.shape[-1], base=base, scaling=scaling, dtype=x.dtype)
    return _ROPE(dict(x=x, cos=cos, sin=sin), implementation=order)[0]


def _turned(x, cos, sin):
    return (turned(x, cos, sin).astype(x.dtype),)


def _turned_back(x, cos, sin, *, outputs, residuals, cotangents):
    del x, outputs, residuals
    return {"x": turned(cotangents[0], cos, -sin)}


_ROPE = Operator(
    name="rope",
    differentiable=("x",),
    reference=_turned,
    xla=Rules(lambda x, cos, sin: (_turned(x, cos, sin), ()), _turned_back),
    tpu=tpu.rope,
    gpu=gpu.rope,
)


def _rotation(name: str, positions, base, scaling, *, to: tuple[int, ...], of: str):
    """The checked arguments of a rotation; positions broadcast to the shape `to`."""
    positions = checks.array(name, "positions", positions)
    if not (jnp.issubdtype(positions.dtype, jnp.integer) or jnp.issubdtype(positions.dtype, jnp.floating)):
        raise TypeError(f"{name}: positions must be integer or floating, got {positions.dtype}")
    checks.broadcastable(name, "positions", positions, to=to, of=of)
    base = checks.number(name, "base", base, positive=True)
    if isinstance(scaling, RopeScaling):
        for field in ("factor", "low_frequency_factor", "high_frequency_factor", "original_length"):
            checks.number(name, f"scaling.{field}", getattr(scaling, field), positive=True)
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise ValueError(f"{name}: scaling.high_frequency_factor must be above low_frequency_factor, got {scaling}")
    elif scaling is not None:
        scaling = checks.number(name, "scaling", scaling, positive=True)
    return positions, base, scaling


def _forward(x, w, cos, sin, bias=None, *, precision):
    return (projected(x, w, cos, sin, bias, precision=precision),), ()


def _backward(x, w, cos, sin, bias=None, *, outputs, residuals, cotangents, precision):
    """dz = dy turned back,  dx = dz · wᵀ,  dw = xᵀ · dz,  dbias = Σ dz."""
    del outputs, residuals
    dz = turned(cotangents[0], cos, -sin)
    flat = dz.reshape(*dz.shape[:-2], w.shape[1] * w.shape[2])
    dx, (dw,) = product_gradients(x, [(w.reshape(w.shape[0], -1), flat)], precision)
    gradients = {"x": dx, "w": dw.reshape(w.shape)}
    if bias is not None:
        gradients["bias"] = jnp.sum(dz, tuple(range(dz.ndim - 2))).astype(bias.dtype)
    return gradients


_PROJECTION = Operator(
    name="rope_projection",
    differentiable=("x", "w", "bias"),
    reference=lambda *operands, **named: (projected(*operands, **named),),
    xla=Rules(_forward, _backward),
    tpu=tpu.rope_projection,
    gpu=gpu.rope_projection,
    partition=None,
)


def rope_projection(
    x: jax.Array,
    w: jax.Array,
    positions: jax.Array,
    *,
    bias: jax.Array | None = None,
    base: float = 10000.0,
    scaling: float | RopeScaling | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = rope(x · w + bias, positions) of every head: a projection to queries or keys, turned as it is made.

    Args:
      x: floating [..., T, D].
      w: floating [D, N, H], H even: N heads of H.
      positions: integer or floating, broadcastable to [..., T]. Not differentiable here.
      bias: floating [N, H] or None.
      base, scaling: as in `jaxops.rope`.
      precision: of the product, as in `jnp.matmul`.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[..., T, N, H] in the common dtype of x and w. The sum, the bias and the rotation are float32; y is rounded once.
      Differentiable in x, w and bias, for which nothing is saved but x and w.

    Raises:
      TypeError: an array is of another kind, or base or scaling of another type.
      ValueError: shapes do not fit, H is odd, a number is out of its range, or `implementation` is unknown or, alone,
        cannot run.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
    """
    name = "rope_projection"
    x, w = checks.floating(name, "x", x), checks.floating(name, "w", w)
    if x.ndim < 2:
        raise ValueError(f"{name}: x must have shape [..., T, D], got {x.shape}")
    if w.ndim != 3 or w.shape[0] != x.shape[-1] or w.shape[2] % 2:
        raise ValueError(f"{name}: w must have shape ({x.shape[-1]}, N, H) for x {x.shape}, H even, got {w.shape}")
    if bias is not None:
        bias = checks.floating(name, "bias", bias, shape=w.shape[1:], of="the heads of w")
    positions, base, scaling = _rotation(name, positions, base, scaling, to=x.shape[:-1], of="[..., T] of x")
    positions = lax.stop_gradient(jnp.broadcast_to(positions, jnp.broadcast_shapes(positions.shape, x.shape[-2:-1])))
    dtype = jnp.promote_types(x.dtype, w.dtype)
    cos, sin = turns(positions, w.shape[2], base=base, scaling=scaling, dtype=dtype)
    operands = dict(x=x, w=w, cos=cos, sin=sin, bias=bias)
    return _PROJECTION(operands, implementation=implementation, precision=precision)[0]
