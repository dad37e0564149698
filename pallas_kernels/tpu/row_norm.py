"""What the norms of rows share on the TPU: normalise every row, and its gradient, each in one pass over HBM.

    y  = x̂ · w + bias,   x̂ = (x - mean) · r,   r = rsqrt(mean((x - mean)²) + eps)     (rms_norm: mean = 0, no bias)
    dx = r · (h - mean(h) - x̂ · mean(h · x̂)),   h = dy · w                            (rms_norm: no mean(h))
    dw = Σ_rows dy · x̂,   dbias = Σ_rows dy

With a residual, x is the sum of two arrays, rounded and written beside y. Then dx gains the cotangent of that sum.

Rows are the second-minor axis, features the minor one. A grid step owns `Tiles.rows` whole rows in VMEM; inside, a loop
takes `Tiles.group` rows by `Tiles.columns` features a turn, so that the program stays short and its values stay in
registers whatever the size of a row. The backward pass recomputes the statistics: it reads x anyway, since dx needs it.
Source: Ba et al. 2016 (layer normalisation); Zhang and Sennrich 2019 (root mean square layer normalisation).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.padding import pad_to, round_up

f32 = jnp.float32
LANES = 128
SUBLANES = 8
ROWS = 16  # the least rows of a slice: those of one bfloat16 register, or of two float32 ones
CORES = 2  # the most cores behind one device; one core simply takes both shares of the rows
SLACK = 4 << 20  # VMEM left to the compiler for spilled registers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of a grid step, a multiple of `group`, the rows of a turn (multiple of 16), and its `columns` (of 128)."""

    rows: int
    group: int
    columns: int

    @staticmethod
    def default(rows: int, features: int, itemsize: int) -> "Tiles":
        """64 registers of values a turn: fewer leave the vector units waiting, more are spilled. 2 MiB a block, so that
        a step's fixed cost hides behind its copy; less on a chip with little VMEM (v4): six blocks live at once."""
        width = round_up(features, LANES)
        columns = min(width, 2048)
        block = min(2 << 20, chips.current("tpu").vmem_bytes // 16) // (width * itemsize)
        # Never past the end: the last block may be partial but not the only one.
        most = max(min(block, rows) // ROWS, 1) * ROWS
        group = min(64 * 1024 // columns // ROWS * ROWS, most)
        return Tiles(most // group * group, group, columns)

    def allowed(self, x, residual, parameters: int, backward: bool) -> bool:
        """Whether the sizes divide as they have to, no block lies past the end, and everything fits VMEM."""
        rows, least = x.size // x.shape[-1], min(self.rows, self.group, self.columns)
        if least <= 0 or self.rows % self.group or self.group % ROWS or self.columns % LANES:
            return False
        if self.rows > max(rows // ROWS * ROWS, ROWS):
            return False
        need = _vmem_bytes(self, x.shape[-1], _width(x, residual, backward), parameters, backward)
        return need + SLACK <= chips.current("tpu").vmem_bytes


def sum_dtype(x, residual):
    """The dtype of what is normalised: that of x, or the common one of x and its residual."""
    return x.dtype if residual is None else jnp.promote_types(x.dtype, residual.dtype)


def _width(x, residual, backward: bool) -> int:
    """Bytes that one feature of a row takes in all arrays that are read and written row by row."""
    size = sum_dtype(x, residual).itemsize
    if residual is None:
        return (3 if backward else 2) * size
    return 4 * size if backward else x.dtype.itemsize + residual.dtype.itemsize + 2 * size


def _vmem_bytes(tiles: Tiles, features: int, width: int, parameters: int, backward: bool) -> int:
    """VMEM of a kernel: every operand is there twice, the next block arriving while this one is worked on."""
    columns = round_up(features, LANES)
    vectors = parameters * SUBLANES * columns * 4 * (2 if backward else 1)
    return 2 * (tiles.rows * columns * width + vectors)


def tiles(name: str, phase: str, x, residual=None, *, parameters: int) -> Tiles:
    """The tuned tiles of the nearest x[..., features] that this one allows, else the default."""
    rows, features, dtype = x.size // x.shape[-1], x.shape[-1], sum_dtype(x, residual)
    return tuned.choose(
        f"tpu.{name}.{phase}",
        chips.current("tpu"),
        {"rows": rows, "features": features},
        jnp.dtype(dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(x, residual, parameters, phase == "backward"),
        Tiles.default(rows, features, dtype.itemsize),
    )


def candidates(phase: str, x, residual=None, *, parameters: int) -> Iterator[Tiles]:
    """The default, blocks of 128 rows in slices of 128 features, then larger and smaller blocks and turns."""
    rows, features, itemsize = x.size // x.shape[-1], x.shape[-1], sum_dtype(x, residual).itemsize
    width = round_up(features, LANES)
    default = Tiles.default(rows, features, itemsize)
    found = [default, Tiles(min(128, max(rows // ROWS, 1) * ROWS), ROWS, LANES)]
    widths = sorted({min(width, columns) for columns in (512, 1024, 2048, 4096)}, reverse=True)
    for block, values, columns in itertools.product((2 << 20, 1 << 20, 4 << 20, 1 << 19), (64, 32, 128), widths):
        group = values * 1024 // columns // ROWS * ROWS
        if group:
            most = max(min(block // (width * itemsize), rows) // ROWS, 1) * ROWS
            group = min(group, most)
            found.append(Tiles(most // group * group, group, columns))
    yield from (tiles for tiles in dict.fromkeys(found) if tiles.allowed(x, residual, parameters, phase == "backward"))


def memory(phase: str, tiles: Tiles, x, residual=None, *, parameters: int) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    backward = phase == "backward"
    return _vmem_bytes(tiles, x.shape[-1], _width(x, residual, backward), parameters, backward) + SLACK


def unsupported(x, residual=None, *, parameters: int) -> str | None:
    """Why x[..., features] cannot be normalised here, or None."""
    for name, operand in {"x": x, **({} if residual is None else {"residual": residual})}.items():
        if operand.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} must be float32 or bfloat16 on a TPU, got {operand.dtype}"
    features, width, vmem = x.shape[-1], _width(x, residual, True), chips.current("tpu").vmem_bytes
    least = Tiles(ROWS, ROWS, LANES)
    if _vmem_bytes(least, features, width, parameters, True) + SLACK > vmem:
        per_feature = _vmem_bytes(least, LANES, width, parameters, True) // LANES
        most = (vmem - SLACK) // per_feature // LANES * LANES
        limit = f"{ROWS} rows must fit the {vmem >> 20} MiB of VMEM"
        return f"{limit}, that is at most {most} features of {sum_dtype(x, residual)}, got {features}"
    return None


def _over_columns(features, width, body, carry):
    """carry = body(columns, carry) for each slice of at most `width` features."""
    whole = features // width
    if whole == 1:
        carry = body(slice(0, width), carry)
    elif whole > 1:
        carry = lax.fori_loop(0, whole, lambda j, c: body(pl.ds(pl.multiple_of(j * width, width), width), c), carry)
    return body(slice(whole * width, features), carry) if features % width else carry


def _over_groups(block, rows, tiles, body):
    """body(rows of the block, first row of the array) for each group of this block that holds a row of the array."""
    first = block * tiles.rows
    groups = jnp.minimum(pl.cdiv(rows - first, tiles.group), tiles.rows // tiles.group)

    def turn(i, _):
        start = pl.multiple_of(i * tiles.group, tiles.group)
        body(pl.ds(start, tiles.group), first + start)
        return 0

    lax.fori_loop(0, groups, turn, 0)


def _means(features, tiles, terms, count):
    """The mean over each row, [group, 1], of each of the `count` arrays that terms(columns) returns."""

    def add(c, sums):
        return tuple(s + jnp.sum(t, -1, keepdims=True) for s, t in zip(sums, terms(c), strict=True))

    sums = _over_columns(features, tiles.columns, add, (jnp.zeros((tiles.group, 1), f32),) * count)
    return [s / features for s in sums]


def _centred(features, tiles, center, read, first=None):
    """Two functions columns -> (x - mean)[group, columns] in float32, or x itself: for the next sweep, and for others.

    `read(columns)` is x; `first`, if given, is to read it in the first sweep of all. The mean comes before the
    variance, so that nothing cancels.
    """
    first = first or read
    if not center:
        return first, read
    (mean,) = _means(features, tiles, lambda c: (first(c),), 1)
    return (lambda c: read(c) - mean,) * 2


def _forward_kernel(x_ref, w_ref, *refs, rows, tiles, eps, center, added):
    """refs: [bias], [residual], y, [x + residual]."""
    bias_ref, residual_ref = refs[:center], refs[center : center + added]
    y_ref, *total_ref = refs[center + added :]
    source_ref, features = total_ref[0] if added else x_ref, x_ref.shape[1]

    def group(here, _):
        def read(c):
            return source_ref[here, c].astype(f32)

        def add(c):
            total = (x_ref[here, c].astype(f32) + residual_ref[0][here, c].astype(f32)).astype(source_ref.dtype)
            source_ref[here, c] = total
            return total.astype(f32)

        first, centred = _centred(features, tiles, center, read, add if added else None)
        (variance,) = _means(features, tiles, lambda c: (jnp.square(first(c)),), 1)
        r = lax.rsqrt(variance + eps)

        def write(c, _):
            y = centred(c) * r * w_ref[:, c]
            y_ref[here, c] = (y + bias_ref[0][:, c] if center else y).astype(y_ref.dtype)
            return 0

        _over_columns(features, tiles.columns, write, 0)

    _over_groups(pl.program_id(0), rows, tiles, group)


def _backward_kernel(x_ref, w_ref, dy_ref, *refs, rows, blocks, tiles, eps, center, added):
    """refs: [the other cotangent of x], dx, dw, [dbias]."""
    added_ref, (dx_ref, dw_ref, *dbias_ref) = refs[:added], refs[added:]
    features = x_ref.shape[1]
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in (dw_ref, *dbias_ref):
            ref[...] = jnp.zeros(ref.shape, f32)

    def group(here, first):
        _, centred = _centred(features, tiles, center, lambda c: x_ref[here, c].astype(f32))

        def terms(c):
            z, h = centred(c), dy_ref[here, c].astype(f32) * w_ref[:, c]
            return (jnp.square(z), h * z, h)[: 3 if center else 2]

        variance, mean_hz, *mean_h = _means(features, tiles, terms, 3 if center else 2)
        r = lax.rsqrt(variance + eps)
        slope = jnp.square(r) * mean_hz  # dx = r · h - slope · x̂ - offset
        offset = [r * m for m in mean_h]

        def fold(ref, c, value):
            """Adds the rows of `value`, keeping eight partial sums: no sublane is crossed here."""
            if rows % tiles.group:  # rows past the end hold anything, also NaN
                row = first + lax.broadcasted_iota(jnp.int32, value.shape, 0)
                value = jnp.where(row < rows, value, 0.0)
            ref[:, c] += jnp.sum(value.reshape(-1, SUBLANES, value.shape[1]), 0)

        def write(c, _):
            normal, dy = centred(c) * r, dy_ref[here, c].astype(f32)
            dx = r * (dy * w_ref[:, c]) - slope * normal
            dx = dx - offset[0] if offset else dx
            dx_ref[here, c] = (dx + added_ref[0][here, c].astype(f32) if added else dx).astype(dx_ref.dtype)
            fold(dw_ref, c, dy * normal)
            if dbias_ref:
                fold(dbias_ref[0], c, dy)
            return 0

        _over_columns(features, tiles.columns, write, 0)

    @pl.when(block < blocks)
    def _():
        _over_groups(block, rows, tiles, group)


def _prepare(x, *parameters):
    """x as [rows ≥ 16, features], the parameters as float32 [1, features], the number of rows."""
    rows = x.size // x.shape[-1]
    return _flat(x), [p.astype(f32)[None] for p in parameters], rows


def _flat(x):
    flat = x.reshape(-1, x.shape[-1])
    return pad_to(flat, 0, max(flat.shape[0], ROWS))


def _call(kernel, semantics, vmem_bytes, operands, outputs, *, backward, **kwargs):
    """`pl.pallas_call(kernel, out_shape=outputs, …)(*operands)`, with the VMEM and the cost told to XLA."""
    x, *_ = operands
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes + SLACK),
        cost_estimate=pl.CostEstimate(
            flops=(16 if backward else 8) * x.size,
            transcendentals=x.shape[0],
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*operands, *outputs)),
        ),
        **kwargs,
    )(*operands)


def forward(x, w, bias=None, residual=None, *, eps, tiles, name):
    """(y[..., features],) in x's dtype; w is the scale with its offset added. Layer norm if there is a bias.

    With a residual (y, x + residual), both in the common dtype.
    """
    center, added = bias is not None, residual is not None
    flat, parameters, rows = _prepare(x, *((w, bias) if center else (w,)))
    block = pl.BlockSpec((tiles.rows, x.shape[-1]), lambda i: (i, 0))
    vector = pl.BlockSpec((1, x.shape[-1]), lambda i: (0, 0))
    outputs = (jax.ShapeDtypeStruct(flat.shape, sum_dtype(x, residual)),) * (2 if added else 1)
    found = _call(
        functools.partial(_forward_kernel, rows=rows, tiles=tiles, eps=eps, center=center, added=added),
        ("parallel",),
        _vmem_bytes(tiles, x.shape[-1], _width(x, residual, False), len(parameters), False),
        (flat, *parameters, *([_flat(residual)] if added else [])),
        outputs,
        backward=False,
        grid=(pl.cdiv(flat.shape[0], tiles.rows),),
        in_specs=[block] + [vector] * len(parameters) + [block] * added,
        out_specs=(block,) * len(outputs),
        name=name,
    )
    return tuple(y[:rows].reshape(x.shape) for y in found)


def backward(x, w, dy, added=None, *, eps, center, tiles, name):
    """(dx in x's shape and dtype, float32 dw[features], float32 dbias[features] if `center`).

    added: what dx gains, as x, or None.
    """
    flat, (w,), rows = _prepare(x, w)
    others = [_flat(a) for a in (dy, added) if a is not None]
    features, sums = x.shape[-1], 2 if center else 1
    blocks = pl.cdiv(flat.shape[0], tiles.rows)
    shares = min(CORES, blocks)
    steps = pl.cdiv(blocks, shares)
    # The last share may be a step short: that step stays on the block before it and does nothing.
    block = pl.BlockSpec((tiles.rows, features), lambda i, j: (jnp.minimum(i * steps + j, blocks - 1), 0))
    partial = pl.BlockSpec((None, SUBLANES, features), lambda i, j: (i, 0, 0))
    dx, *partials = _call(
        functools.partial(
            _backward_kernel,
            rows=rows,
            blocks=blocks,
            tiles=tiles,
            eps=eps,
            center=center,
            added=added is not None,
        ),
        ("parallel", "arbitrary"),
        _vmem_bytes(tiles, features, (2 + len(others)) * x.dtype.itemsize, sums, True),
        (flat, w, *others),
        (jax.ShapeDtypeStruct(flat.shape, x.dtype),)
        + (jax.ShapeDtypeStruct((shares, SUBLANES, features), f32),) * sums,
        backward=True,
        grid=(shares, steps),
        in_specs=[block, pl.BlockSpec((1, features), lambda i, j: (0, 0)), *[block] * len(others)],
        out_specs=(block,) + (partial,) * sums,
        name=name,
    )
    return dx[:rows].reshape(x.shape), *(p.sum((0, 1)) for p in partials)
