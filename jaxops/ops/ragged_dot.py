"""ragged_dot: public function and XLA rules that walk over tiles of rows of one group."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxops import dispatch
from jaxops.autodiff import Operator, Rules
from jaxops.ops import checks
from jaxops.ops.row_tiles import outer_products
from jaxops.reference.ragged_dot import ragged_dot as reference
from pallas_kernels import gpu, tpu

# Rows of a tile. On a CPU it should stay in the cache with its product; an accelerator wants a product worth a launch.
_CPU_ROWS = 128
_ACCELERATOR_ROWS = 512
_FEWEST_ROWS = 16


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The rows of every group in tiles: tiles of a group follow one another, so that its matrix is fetched once."""

    bounds: jax.Array
    rows: int
    size: int  # of a tile

    @property
    def groups(self) -> int:
        return self.bounds.shape[0] - 1

    def over(self, group: Any, step: Callable, carry: Any) -> Any:
        """step(start, inside, carry) for each tile: rows start … start + size - 1, those of the group `inside`."""
        first, end = self.bounds[group], self.bounds[group + 1]

        def one(i, carry):
            low = first + i * self.size
            start = jnp.minimum(low, self.rows - self.size)  # a slice does not reach past the end
            row = start + jnp.arange(self.size, dtype=jnp.int32)
            return step(start, (low <= row) & (row < end), carry)

        return lax.fori_loop(0, lax.div(end - first + (self.size - 1), jnp.int32(self.size)), one, carry)


def _walk(most: int, bounds, rows: int) -> _Walk:
    """Tiles of about the rows of a group: what a tile holds beyond its group is computed for nothing."""
    mean = -(-rows // max(bounds.shape[0] - 1, 1))
    size = _FEWEST_ROWS
    while size < min(most, mean):
        size *= 2
    return _Walk(bounds, rows, min(size, rows))


def _rows(x, indices, start, inside):
    """The tile's rows of x, gathered if there are indices; those not `inside` are 0."""
    if indices is None:
        tile = lax.dynamic_slice_in_dim(x, start, inside.shape[0], 0)
    else:
        where = lax.dynamic_slice_in_dim(indices, start, inside.shape[0], 0)
        tile = x.at[where].get(mode="fill", fill_value=0)
    return jnp.where(inside[:, None], tile, 0)


def _write(out, indices, start, inside, tile):
    """out with the rows `inside` of the tile put in place, or added where the indices say."""
    if indices is None:
        before = lax.dynamic_slice_in_dim(out, start, tile.shape[0], 0)
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where(inside[:, None], tile.astype(out.dtype), before), start, 0
        )
    where = lax.dynamic_slice_in_dim(indices, start, tile.shape[0], 0)
    return out.at[jnp.where(inside, where, out.shape[0])].add(tile, mode="drop")


def _forward(lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, **static):
    def run(most, *operands):
        return _forward_by_tiles(most, *operands, **static)

    return (_by_platform(run, lhs, rhs, bounds, lhs_rows, out_rows, out_weights),), ()


def _forward_by_tiles(most, lhs, rhs, bounds, lhs_rows, out_rows, out_weights, *, out_size, dtype, precision):
    wide = jnp.result_type(lhs.dtype, rhs.dtype, dtype, jnp.float32)
    rows = lhs.shape[0] if lhs_rows is None else lhs_rows.shape[0]
    walk = _walk(most, bounds, rows)

    def group(g, out):
        weight = rhs[g]

        def step(start, inside, out):
            x = _rows(lhs, lhs_rows, start, inside)
            y = jnp.matmul(x, weight, precision=precision, preferred_element_type=wide)
            if out_weights is not None:
                y = y * lax.dynamic_slice_in_dim(out_weights, start, walk.size, 0).astype(wide)[:, None]
            return _write(out, out_rows, start, inside, y)

        return walk.over(g, step, out)

    # What is added up is float32; what is written once is rounded as it is written.
    out = jnp.zeros((out_size, rhs.shape[2]), dtype if out_rows is None else wide)
    return lax.fori_loop(0, walk.groups, group, out).astype(dtype)


def _backward(
    lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, *, outputs, residuals, cotangents, **static
):
    del outputs, residuals

    def run(most, *operands):
        return _backward_by_tiles(most, *operands, **static)

    return _by_platform(run, lhs, rhs, bounds, lhs_rows, out_rows, out_weights, cotangents[0])


def _backward_by_tiles(most, lhs, rhs, bounds, lhs_rows, out_rows, out_weights, g_out, *, out_size, dtype, precision):
    """dlhs[lhs_rows_i] += w_i u_i,  drhs_g = Σ_i x_iᵀ w_i dy_i,  dw_i = u_i · x_i.

    dy_i = g[out_rows_i], u_i = dy_i · rhs_gᵀ.
    """
    wide = jnp.result_type(lhs.dtype, rhs.dtype, dtype, jnp.float32)
    narrow = jnp.promote_types(lhs.dtype, rhs.dtype)  # what the products take, as they would unfused
    rows = lhs.shape[0] if lhs_rows is None else lhs_rows.shape[0]
    walk = _walk(most, bounds, rows)
    product = functools.partial(lax.dot_general, precision=precision, preferred_element_type=wide)

    def group(g, carry):
        dlhs, drhs, dweights = carry
        weight = rhs[g].astype(narrow)

        def step(start, inside, carry):
            dlhs, drhs_of_group, dweights = carry
            x = _rows(lhs, lhs_rows, start, inside)
            dy = _rows(g_out, out_rows, start, inside)
            if out_weights is None:
                dy = dy.astype(narrow)
                dx = product(dy, weight, (((1,), (1,)), ((), ())))
            else:
                scale = lax.dynamic_slice_in_dim(out_weights, start, walk.size, 0).astype(wide)[:, None]
                dx = product(dy.astype(narrow), weight, (((1,), (1,)), ((), ())))
                dot = jnp.sum(dx * x.astype(wide), axis=1)
                dweights = _write(dweights[:, None], None, start, inside, dot[:, None])[:, 0]
                dx, dy = scale * dx, (scale * dy.astype(wide)).astype(narrow)
            drhs_of_group = drhs_of_group + outer_products(x.astype(narrow), dy, precision)
            return _write(dlhs, lhs_rows, start, inside, dx), drhs_of_group, dweights

        empty = jnp.zeros(rhs.shape[1:], wide)
        dlhs, drhs_of_group, dweights = walk.over(g, step, (dlhs, empty, dweights))
        return dlhs, lax.dynamic_update_index_in_dim(drhs, drhs_of_group.astype(drhs.dtype), g, 0), dweights

    carry = (
        jnp.zeros(lhs.shape, lhs.dtype if lhs_rows is None else wide),
        jnp.zeros_like(rhs),
        None if out_weights is None else jnp.zeros_like(out_weights),
    )
    dlhs, drhs, dweights = lax.fori_loop(0, walk.groups, group, carry)
    gradients = {"lhs": dlhs.astype(lhs.dtype), "rhs": drhs}
    return gradients if out_weights is None else gradients | {"out_weights": dweights}


def _by_platform(run: Callable, *operands):
    cpu, otherwise = (functools.partial(run, rows) for rows in (_CPU_ROWS, _ACCELERATOR_ROWS))
    return dispatch.on_cpu(cpu, otherwise, *operands)


def _cost(lhs, rhs, bounds, lhs_rows=None, out_rows=None, out_weights=None, **static) -> tuple[int, int]:
    """As if every row had a group."""
    rows = lhs.shape[0] if lhs_rows is None else lhs_rows.shape[0]
    forward = 2 * rows * rhs.shape[1] * rhs.shape[2]
    return forward, 2 * forward


_OPERATOR = Operator(
    name="ragged_dot",
    differentiable=("lhs", "rhs", "out_weights"),
    reference=reference,
    xla=Rules(_forward, _backward),
    tpu=tpu.ragged_dot,
    gpu=gpu.ragged_dot,
    partition=lambda spec: (jax.sharding.PartitionSpec(None, None),),  # a group's rows may lie on any device
    cost=_cost,
)


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    group_offset: jax.Array | None = None,
    *,
    lhs_rows: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    out_weights: jax.Array | None = None,
    out_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """y_i = x_i · rhs[g_i], where the first group_sizes[0] rows are of group 0, the next group_sizes[1] of group 1, ….

    As `jax.lax.ragged_dot`: a mixture of experts is a product in which every expert has its own rows. Rows may be
    gathered and scattered on the way, without a gathered copy in memory:

        x_i = lhs[lhs_rows[i]],   out[out_rows[i]] += out_weights[i] · y_i

    Args:
      lhs: floating [t, k]; without `lhs_rows`, t = m.
      rhs: floating [g, k, n].
      group_sizes: integer [g], or of any length if `group_offset` is given. Negative ones count as 0. They need not sum
        to m: rows after the last group give 0, and what a group has beyond m is not there.
      precision: as in `jax.lax.dot`.
      preferred_element_type: the dtype of the result; default the common one of lhs and rhs. Sums are float32 at least.
      group_offset: integer scalar: rhs[j] belongs to group group_offset + j. Rows of groups that rhs does not have
        give 0.
      lhs_rows: integer [m]; an index outside [0, t) stands for a row of zeros.
      out_rows: integer [m]; rows of the same index are added; an index outside [0, out_size) is left out.
      out_weights: floating [m].
      out_size: rows of the result if `out_rows` is given, t by default; a Python int.
      implementation: None (the best that can run), "pallas", "xla", or a sequence tried in order.

    Returns:
      [m, n], or [out_size, n] with `out_rows`. Differentiable in lhs, rhs and out_weights.

    Raises:
      TypeError: an array is not of the kind above, or `out_size` is not a Python int.
      ValueError: shapes do not fit, or `implementation` is unknown or, alone, cannot run.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", arXiv:2211.15841; the fused
    gather and scatter: Tan et al., "Scattered Mixture-of-Experts Implementation", arXiv:2403.08245.
    """
    name = "ragged_dot"
    lhs, rhs = checks.floating(name, "lhs", lhs), checks.floating(name, "rhs", rhs)
    if lhs.ndim != 2:
        raise ValueError(f"{name}: lhs must have shape (t, k), got {lhs.shape}")
    if rhs.ndim != 3 or rhs.shape[1] != lhs.shape[1]:
        hint = "; is it transposed?" if rhs.ndim == 3 and rhs.shape[2] == lhs.shape[1] else ""
        raise ValueError(
            f"{name}: rhs must have shape (g, {lhs.shape[1]}, n) for lhs {lhs.shape}, got {rhs.shape}{hint}"
        )
    rows = lhs.shape[0]
    if lhs_rows is not None:
        lhs_rows = checks.array(name, "lhs_rows", lhs_rows)
        if lhs_rows.ndim != 1:
            raise ValueError(f"{name}: lhs_rows must have one axis, got shape {lhs_rows.shape}")
        rows = lhs_rows.shape[0]
        lhs_rows = _indices(checks.integer(name, "lhs_rows", lhs_rows, shape=(rows,), of="m"), lhs.shape[0])
    of_rows = "one for each row of lhs_rows" if lhs_rows is not None else "one for each row of lhs"
    size = rows
    if out_rows is not None:
        size = lhs.shape[0] if out_size is None else out_size
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: out_size must be a Python int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name}: out_size must be at least 0, got {size}")
        out_rows = _indices(checks.integer(name, "out_rows", out_rows, shape=(rows,), of=of_rows), size)
    elif out_size is not None:
        raise ValueError(f"{name}: out_size must be None without out_rows, got {out_size}")
    if out_weights is not None:
        out_weights = checks.floating(name, "out_weights", out_weights, shape=(rows,), of=of_rows)
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype) if preferred_element_type is None else preferred_element_type
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: preferred_element_type must be a floating dtype, got {dtype}")
    (out,) = _OPERATOR(
        dict(
            lhs=lhs,
            rhs=rhs,
            bounds=_bounds(name, group_sizes, group_offset, rhs.shape[0], rows),
            lhs_rows=lhs_rows,
            out_rows=out_rows,
            out_weights=out_weights,
        ),
        implementation=implementation,
        out_size=size,
        dtype=dtype,
        precision=precision,
    )
    return out


def _indices(x, size: int):
    """int32 indices; what is outside [0, size), also a negative one, becomes `size`."""
    return jnp.where((x >= 0) & (x < size), x, size).astype(jnp.int32)


def _bounds(name: str, group_sizes, group_offset, groups: int, rows: int):
    """Where the groups of rhs begin and end, int32 [groups + 1], rising in [0, rows]."""
    sizes = checks.array(name, "group_sizes", group_sizes)
    if sizes.ndim != 1:
        raise ValueError(f"{name}: group_sizes must have one axis, got shape {sizes.shape}")
    shape = (groups,) if group_offset is None else sizes.shape
    sizes = checks.integer(name, "group_sizes", sizes, shape=shape, of="the groups of rhs")
    sizes = jnp.clip(sizes, 0, rows).astype(jnp.int32)
    # Saturated at every step: the sum of large sizes may not fit an int32.
    ends = lax.associative_scan(lambda a, b: jnp.minimum(a + b, rows), sizes)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    if group_offset is None:
        return bounds
    offset = checks.integer(name, "group_offset", group_offset, shape=(), of="a scalar")
    # Groups before the first and after the last have no rows.
    return bounds[jnp.clip(offset + jnp.arange(groups + 1), 0, sizes.shape[0])]
