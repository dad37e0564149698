"""block_sparse_matmul: public function and XLA rules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxops import dispatch, sparsity
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.ops.matmul import Activation, activated, after_product, before, call_unless_traced, gradients_beside
from jaxops.reference.block_sparse_matmul import block_sparse_matmul as reference
from jaxops.reference.block_sparse_matmul import columns_of, expanded
from pallas_kernels import gpu, tpu


def _strips(x: jax.Array, size: int) -> jax.Array:
    """x[m, k] as [k / size, size, m]: the columns that meet one block are contiguous, and wide."""
    return x.T.reshape(-1, size, x.shape[0])


def _rows(strips: jax.Array) -> jax.Array:
    return strips.reshape(-1, strips.shape[2]).T


def _product(x, w, take, give, size: int, precision, *, transposed: bool = False):
    """Σ x_take · w_i added to the part `give` of a result of `size` columns; w_iᵀ if `transposed`. In float32.

    On a CPU one block after another, in the cache. Elsewhere the matrix is made: there is no loop over blocks that is
    faster than one product.
    """
    inner, outer = (w.shape[2], w.shape[1]) if transposed else w.shape[1:]
    wide = jnp.promote_types(jnp.promote_types(x.dtype, w.dtype), jnp.float32)
    axis = 1 if transposed else 0

    def blocks(x, w, take, give):
        strips = _strips(x, inner)

        def add(y, block):
            w, take, give = block
            # y_giveᵀ += w_iᵀ · x_takeᵀ
            product = lax.dot_general(
                w, strips[take], (((axis,), (0,)), ((), ())), precision=precision, preferred_element_type=wide
            )
            return y.at[give].add(product), None

        start = jnp.zeros((size // outer, outer, x.shape[0]), wide)
        return _rows(lax.scan(add, start, (w, take, give))[0])

    def whole(x, w, take, give):
        shape = (x.shape[1], size)
        if transposed:
            dense = expanded(w, give, take, shape[::-1]).T
        else:
            dense = expanded(w, take, give, shape)
        return jnp.dot(x, dense, precision=precision, preferred_element_type=wide)

    return dispatch.on_cpu(blocks, whole, x, w, take, give)


def _products_of_blocks(x, dz, w, rows, columns, precision):
    """dw_i = x_rowᵀ · dz_column, for the stored blocks alone; in float32."""
    _, bk, bn = w.shape
    wide = jnp.promote_types(jnp.promote_types(x.dtype, w.dtype), jnp.float32)

    def blocks(x, dz, rows, columns):
        xs, dzs = _strips(x, bk), _strips(dz, bn)

        def one(place):
            row, column = place
            return lax.dot_general(
                xs[row], dzs[column], (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=wide
            )

        return lax.map(one, (rows, columns))

    def whole(x, dz, rows, columns):
        dense = lax.dot_general(x, dz, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=wide)
        return sparsity.blocks_of(dense, (bk, bn))[rows, columns]

    return dispatch.on_cpu(blocks, whole, x, dz, rows, columns)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _forward(x, w, rows, columns, bias=None, residual=None, *, size, activation, precision):
    dtype = jnp.promote_types(x.dtype, w.dtype)
    z = _product(_flat(x), w, rows, columns, size, precision).reshape(*x.shape[:-1], size)
    if bias is not None:
        z = z + bias.astype(z.dtype)
    return activated(z, residual, activation, dtype)


def _backward(
    x, w, rows, columns, bias=None, residual=None, *, outputs, residuals, cotangents, size, activation, precision
):
    """dz = activation'(z) · dy,  dx = dz · wᵀ,  dw_i = x_rowᵀ · dz_column,  dbias = Σ dz,  dresidual = dy."""
    del outputs
    dy = cotangents[0]
    dz = before(activation, residuals, dy)
    gradients = gradients_beside(dy, dz, bias, residual)
    dz = _flat(dz).astype(jnp.promote_types(x.dtype, w.dtype))
    dx = _product(dz, w, columns, rows, x.shape[-1], precision, transposed=True)
    dw = _products_of_blocks(_flat(x), dz, w, rows, columns, precision)
    return gradients | {"x": dx.reshape(x.shape).astype(x.dtype), "w": dw.astype(w.dtype)}


def _cost(x, w, *_, **__):
    product = 2 * math.prod(x.shape[:-1]) * math.prod(w.shape)
    return product, 2 * product


_OPERATOR = Operator(
    name="block_sparse_matmul",
    differentiable=("x", "w", "bias", "residual"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.block_sparse_matmul,
    gpu=gpu.block_sparse_matmul,
    partition=None,
    cost=_cost,
)


def block_sparse_matmul(
    x: ArrayLike,
    w: "sparsity.BlockSparse | ArrayLike",
    *,
    rows: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y = activation(x · w + bias) + residual, of a w[k, n] of which only some blocks are stored.

    dx = dz · wᵀ,   dw_i = (x columns of block i)ᵀ · (dz columns of block i), for the stored blocks alone

    Args:
      x: floating [..., k].
      w: a `jaxops.BlockSparse`; or its stored blocks, floating [s, bk, bn] sorted by column, with `rows` and `offsets`:
        the pattern is data then, and patterns of as many blocks share a compiled program.
      rows: integer [s], the row of each block in the grid of k / bk rows.
      offsets: integer [n / bn + 1]: the blocks of column c are offsets[c] … offsets[c + 1] - 1.
      bias: floating [n] or None.
      activation: as in `jaxops.matmul`.
      residual: floating [..., n] or None.
      precision: as in `jnp.matmul`.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      y[..., n] in the common dtype of x and w. Sums, bias, activation and residual are in float32; y is rounded once,
      at the end. Blocks at the same place are added. Indices that are traced are not checked but clipped.

    Raises:
      TypeError: an array is not floating, indices are not integer, or `activation` is not a function.
      ValueError: shapes do not fit, blocks do not divide k, rows or offsets are missing, superfluous or out of range,
        or `implementation` is unknown or, alone, cannot run.

    Source: Gray et al., GPU kernels for block-sparse weights, 2017.
    """
    name = "block_sparse_matmul"
    x = checks.floating(name, "x", x)
    if isinstance(w, sparsity.BlockSparse):
        if rows is not None or offsets is not None:
            raise ValueError(f"{name}: rows and offsets are part of a BlockSparse w, and must be None")
        if w.shape[0] != x.shape[-1]:
            raise ValueError(f"{name}: w must have shape ({x.shape[-1]}, n) for x {x.shape}, got {w.shape}")
        pattern = w.pattern
        w, rows, offsets = w.blocks, pattern.rows, pattern.offsets
        if jnp.shape(w) != (len(rows), *pattern.block):
            raise ValueError(
                f"{name}: w must have blocks of shape {(len(rows), *pattern.block)}, those of its pattern, "
                f"got {jnp.shape(w)}"
            )
    elif rows is None or offsets is None:
        raise ValueError(f"{name}: rows and offsets must be given for a w that is no BlockSparse")
    w = checks.floating(name, "w", w)
    if w.ndim != 3 or not w.shape[1] or not w.shape[2] or x.shape[-1] % w.shape[1]:
        raise ValueError(f"{name}: w must be blocks (s, bk, bn) with bk dividing {x.shape[-1]}, got {w.shape}")
    count, bk, bn = w.shape
    rows = checks.integer(name, "rows", rows, shape=(count,), of="one for each block")
    offsets = checks.array(name, "offsets", offsets)
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name}: offsets must have shape (n / {bn} + 1,), got {offsets.shape}")
    offsets = checks.integer(name, "offsets", offsets, shape=offsets.shape, of="")
    size, height = (offsets.shape[0] - 1) * bn, x.shape[-1] // bk
    if not isinstance(rows, jax.core.Tracer) and not isinstance(offsets, jax.core.Tracer):
        sparsity.check_indices(name, np.asarray(rows), np.asarray(offsets), height, offsets.shape[0] - 1)
    beside, activation, known = after_product(name, (*x.shape[:-1], size), bias, residual, activation)
    rows = jnp.clip(rows.astype(jnp.int32), 0, max(height - 1, 0))
    columns = columns_of(offsets.astype(jnp.int32), count)
    operands = dict(x=x, w=w, rows=rows, columns=columns, **beside)
    static = dict(size=size, activation=activation, precision=precision)
    return call_unless_traced(_OPERATOR, known, operands, implementation, **static)
