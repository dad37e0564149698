"""What the norms of rows share on the TPU: normalise every row, and its gradient, each in one pass over HBM.

    y  = x̂ · w + bias,   x̂ = (x - mean) · r,   r = rsqrt(mean((x - mean)²) + eps)     (rms_norm: mean = 0, no bias)
    dx = r · (h - mean(h) - x̂ · mean(h · x̂)),   h = dy · w                            (rms_norm: no mean(h))
    dw = Σ_rows dy · x̂,   dbias = Σ_rows dy

With a residual, x is the sum of two arrays, rounded and written beside y. Then dx gains the cotangent of that sum.
y has a dtype of its own; in int8 it is divided by the largest of its row / 127, which is written beside it.

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
INT8_ROWS = 32  # the least rows of a slice of 8-bit integers
CORES = 2  # the most cores behind one device; one core simply takes both shares of the rows
SLACK = 4 << 20  # VMEM left to the compiler for spilled registers


@dataclasses.dataclass(frozen=True)
class Load:
    """What a kernel holds of an array of `rows` × `features`: `dtype` is that of the rows, `width` the bytes that one
    feature of a row takes in all arrays that are read and written row by row, `vectors` the float32 arrays
    [8, features] that all rows share, `least` the rows of the smallest slice."""

    rows: int
    features: int
    dtype: jnp.dtype
    width: int
    vectors: int = 0
    least: int = ROWS

    @staticmethod
    def of(phase: str, x, residual=None, *, parameters: int, dtype=None) -> "Load":
        """Of a norm whose y has a dtype. Backward, x is the sum if there is a residual, and the parameters' gradients
        are held, too."""
        common, backward = sum_dtype(x, residual), phase == "backward"
        size = common.itemsize
        width = jnp.dtype(dtype or common).itemsize  # of y, or of its cotangent
        if backward:
            width += (2 if residual is None else 3) * size
        else:
            width += size if residual is None else x.dtype.itemsize + residual.dtype.itemsize + size
        vectors, least = parameters * (2 if backward else 1), INT8_ROWS if dtype == "int8" else ROWS
        return Load(x.size // x.shape[-1], x.shape[-1], common, width, vectors, least)

    def vmem_bytes(self, tiles: "Tiles") -> int:
        """VMEM of a kernel: every operand is there twice, the next block arriving while this one is worked on."""
        columns = round_up(self.features, LANES)
        return 2 * columns * (tiles.rows * self.width + self.vectors * SUBLANES * 4)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`rows` of a grid step, a multiple of `group`, the rows of a turn (multiple of 16), and its `columns` (of 128)."""

    rows: int
    group: int
    columns: int

    @staticmethod
    def default(load: Load) -> "Tiles":
        """64 registers of values a turn: fewer leave the vector units waiting, more are spilled. 2 MiB a block, so that
        a step's fixed cost hides behind its copy; less on a chip with little VMEM (v4): six blocks live at once."""
        columns = min(round_up(load.features, LANES), 2048)
        return Tiles._of(load, min(2 << 20, chips.current("tpu").vmem_bytes // 16), 64, columns)

    @staticmethod
    def _of(load: Load, block_bytes: int, registers: int, columns: int) -> "Tiles":
        """Blocks of about `block_bytes`, turns of about so many registers."""
        block = block_bytes // (round_up(load.features, LANES) * load.dtype.itemsize)
        # Never past the end: the last block may be partial but not the only one.
        most = max(min(block, load.rows) // load.least, 1) * load.least
        group = min(max(registers * 1024 // columns // load.least, 1) * load.least, most)
        return Tiles(most // group * group, group, columns)

    def allowed(self, load: Load) -> bool:
        """Whether the sizes divide as they have to, no block lies past the end, and everything fits VMEM."""
        if min(self.rows, self.group, self.columns) <= 0:
            return False
        if self.rows % self.group or self.group % load.least or self.columns % LANES:
            return False
        if self.rows > max(load.rows // load.least, 1) * load.least:
            return False
        return load.vmem_bytes(self) + SLACK <= chips.current("tpu").vmem_bytes


def sum_dtype(x, residual):
    """The dtype of what is normalised: that of x, or the common one of x and its residual."""
    return jnp.dtype(x.dtype if residual is None else jnp.promote_types(x.dtype, residual.dtype))


def tiles(name: str, phase: str, load: Load) -> Tiles:
    """The tuned tiles of the nearest x[..., features] that this one allows, else the default."""
    return tuned.choose(
        f"tpu.{name}.{phase}",
        chips.current("tpu"),
        {"rows": load.rows, "features": load.features},
        load.dtype.name,
        Tiles,
        lambda tiles: tiles.allowed(load),
        Tiles.default(load),
    )


def candidates(load: Load) -> Iterator[Tiles]:
    """The default, blocks of 128 rows in slices of 128 features, then larger and smaller blocks and turns."""
    width, least = round_up(load.features, LANES), load.least
    found = [Tiles.default(load), Tiles(min(128, max(load.rows // least, 1) * least), least, LANES)]
    widths = sorted({min(width, columns) for columns in (512, 1024, 2048, 4096)}, reverse=True)
    for block, registers, columns in itertools.product((2 << 20, 1 << 20, 4 << 20, 1 << 19), (64, 32, 128), widths):
        found.append(Tiles._of(load, block, registers, columns))
    yield from (tiles for tiles in dict.fromkeys(found) if tiles.allowed(load))


def memory(tiles: Tiles, load: Load) -> int:
    """Bytes of VMEM that a kernel is estimated to take."""
    return load.vmem_bytes(tiles) + SLACK


def unsupported(load: Load, dtype: str | None = None, **operands) -> str | None:
    """Why a kernel cannot hold these rows, given the dtype of y and the named operands that are rows, or None."""
    dtypes = {name: operand.dtype for name, operand in operands.items() if operand is not None}
    if dtype not in (None, "int8"):
        dtypes["dtype"] = jnp.dtype(dtype)
    for name, found in dtypes.items():
        if found not in (jnp.float32, jnp.bfloat16):
            return f"{name} must be float32 or bfloat16 on a TPU, got {found}"
    vmem, least = chips.current("tpu").vmem_bytes, Tiles(load.least, load.least, LANES)
    if load.vmem_bytes(least) + SLACK > vmem:
        per_feature = dataclasses.replace(load, features=LANES).vmem_bytes(least) // LANES
        most = (vmem - SLACK) // per_feature // LANES * LANES
        limit = f"{load.least} rows must fit the {vmem >> 20} MiB of VMEM"
        return f"{limit}, that is at most {most} features of {load.dtype}, got {load.features}"
    return None


def over_columns(features, width, body, carry):
    """carry = body(columns, carry) for each slice of at most `width` features."""
    whole = features // width
    if whole == 1:
        carry = body(slice(0, width), carry)
    elif whole > 1:
        carry = lax.fori_loop(0, whole, lambda j, c: body(pl.ds(pl.multiple_of(j * width, width), width), c), carry)
    return body(slice(whole * width, features), carry) if features % width else carry


def over_groups(block, rows, tiles, body):
    """body(rows of the block, first row of the array) for each group of this block that holds a row of the array."""
    first = block * tiles.rows
    groups = jnp.minimum(pl.cdiv(rows - first, tiles.group), tiles.rows // tiles.group)

    def turn(i, _):
        start = pl.multiple_of(i * tiles.group, tiles.group)
        body(pl.ds(start, tiles.group), first + start)
        return 0

    lax.fori_loop(0, groups, turn, 0)


def fold(features, tiles, combine, start, terms):
    """`combine` of terms(columns)[group, columns] over each row, [group, 1], beginning with `start`."""
    return over_columns(
        features,
        tiles.columns,
        lambda c, carry: combine(carry, terms(c)),
        jnp.full((tiles.group, 1), start, f32),
    )


def largest(carry, values):
    """The larger of each row's `carry` and its values: what `fold` combines by."""
    return jnp.maximum(carry, jnp.max(values, -1, keepdims=True))


def _put_lanes(ref, start, column):
    """ref[0, start:][:group] = column[group, 1]: rows become lanes, 32 at a time, so that none crosses a register."""
    for k in range(0, column.shape[0], INT8_ROWS):
        part, first = column[k : k + INT8_ROWS], start + k
        window = pl.ds(pl.multiple_of(first // LANES * LANES, LANES), LANES)
        row = lax.broadcasted_iota(jnp.int32, (INT8_ROWS, LANES), 1) - lax.rem(first, LANES)
        spread = jnp.where(row == lax.broadcasted_iota(jnp.int32, row.shape, 0), part, 0.0)
        here = (row[:1] >= 0) & (row[:1] < INT8_ROWS)
        ref[:, window] = jnp.where(here, jnp.sum(spread, 0, keepdims=True), ref[:, window])


def _means(features, tiles, terms, count):
    """The mean over each row, [group, 1], of each of the `count` arrays that terms(columns) returns."""

    def add(c, sums):
        return tuple(s + jnp.sum(t, -1, keepdims=True) for s, t in zip(sums, terms(c), strict=True))

    sums = over_columns(features, tiles.columns, add, (jnp.zeros((tiles.group, 1), f32),) * count)
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
    """refs: [bias], [residual], y, [x + residual], [scales]."""
    bias_ref, residual_ref = refs[:center], refs[center : center + added]
    y_ref, *total_ref = refs[center + added :]
    scales_ref = total_ref.pop() if y_ref.dtype == jnp.int8 else None
    source_ref, features = total_ref[0] if added else x_ref, x_ref.shape[1]

    def group(here, first_row):
        def read(c):
            return source_ref[here, c].astype(f32)

        def add(c):
            total = (x_ref[here, c].astype(f32) + residual_ref[0][here, c].astype(f32)).astype(source_ref.dtype)
            source_ref[here, c] = total
            return total.astype(f32)

        first, centred = _centred(features, tiles, center, read, add if added else None)
        if scales_ref is None or center:
            (variance,) = _means(features, tiles, lambda c: (jnp.square(first(c)),), 1)
            r = lax.rsqrt(variance + eps)
        else:  # the largest of x · r · w in the sweep of the variance

            def both(c, carry):
                z = first(c)
                return carry[0] + jnp.sum(jnp.square(z), -1, keepdims=True), largest(carry[1], jnp.abs(z * w_ref[:, c]))

            total, top = over_columns(features, tiles.columns, both, (jnp.zeros((tiles.group, 1), f32),) * 2)
            r = lax.rsqrt(total / features + eps)
            top = top * r

        def result(c):
            y = centred(c) * r * w_ref[:, c]
            return y + bias_ref[0][:, c] if center else y

        if scales_ref is not None:
            if center:
                top = fold(features, tiles, largest, 0.0, lambda c: jnp.abs(result(c)))
            scale = top * (1 / 127)
            scale = jnp.where(scale >= jnp.finfo(f32).tiny, scale, 1.0)  # nothing but zeros, or what is flushed to them
            _put_lanes(scales_ref, lax.rem(first_row, tiles.rows), scale)
            inverse = 1 / scale

        def write(c, _):
            y = result(c)
            if scales_ref is not None:
                y = jnp.round(y * inverse).astype(jnp.int32)
            y_ref[here, c] = y.astype(y_ref.dtype)
            return 0

        over_columns(features, tiles.columns, write, 0)

    over_groups(pl.program_id(0), rows, tiles, group)


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

        over_columns(features, tiles.columns, write, 0)

    @pl.when(block < blocks)
    def _():
        over_groups(block, rows, tiles, group)


def flat(x, least=ROWS):
    """`x` as [rows ≥ least, features]."""
    rows = x.reshape(-1, x.shape[-1])
    return pad_to(rows, 0, max(rows.shape[0], least))


def call(kernel, semantics, vmem_bytes, operands, outputs, *, flops, **kwargs):
    """`pl.pallas_call(kernel, out_shape=outputs, …)(*operands)`, with the VMEM and the cost told to XLA: `flops` for
    each element of the first operand."""
    x, *_ = operands
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes + SLACK),
        cost_estimate=pl.CostEstimate(
            flops=flops * x.size,
            transcendentals=x.shape[0],
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*operands, *outputs)),
        ),
        **kwargs,
    )(*operands)


def forward(x, w, bias=None, residual=None, *, eps, tiles, name, dtype=None):
    """(y[..., features],) in `dtype` or x's; w is the scale with its offset added. Layer norm if there is a bias.

    With a residual (y, x + residual), the sum in the common dtype. In int8 y is (values, scales), the sum before them.
    """
    center, added = bias is not None, residual is not None
    load = Load.of("forward", x, residual, parameters=1 + center, dtype=dtype)
    rows, x_rows = load.rows, flat(x, load.least)
    parameters = [p.astype(f32)[None] for p in ((w, bias) if center else (w,))]
    block = pl.BlockSpec((tiles.rows, x.shape[-1]), lambda i: (i, 0))
    vector = pl.BlockSpec((1, x.shape[-1]), lambda i: (0, 0))
    steps, kinds = pl.cdiv(x_rows.shape[0], tiles.rows), [dtype or load.dtype] + [load.dtype] * added
    outputs = [jax.ShapeDtypeStruct(x_rows.shape, kind) for kind in kinds]
    out_specs = [block] * len(outputs)
    if dtype == "int8":
        lanes = round_up(tiles.rows, LANES)
        outputs.append(jax.ShapeDtypeStruct((steps, 1, lanes), f32))
        out_specs.append(pl.BlockSpec((None, 1, lanes), lambda i: (i, 0, 0)))
    found = call(
        functools.partial(_forward_kernel, rows=rows, tiles=tiles, eps=eps, center=center, added=added),
        ("parallel",),
        load.vmem_bytes(tiles),
        (x_rows, *parameters, *([flat(residual, load.least)] if added else [])),
        outputs,
        flops=8,
        grid=(steps,),
        in_specs=[block] + [vector] * len(parameters) + [block] * added,
        out_specs=out_specs,
        name=name,
    )
    whole = tuple(y[:rows].reshape(x.shape) for y in found[: len(kinds)])
    if dtype != "int8":
        return whole
    scales = found[-1][:, 0, : tiles.rows].reshape(-1)[:rows].reshape(*x.shape[:-1], 1)
    return (*whole[::-1], scales)


def backward(x, w, dy, added=None, *, eps, center, tiles, name):
    """(dx in x's shape and dtype, float32 dw[features], float32 dbias[features] if `center`).

    added: what dx gains, as x, or None.
    """
    rows, x_rows, w = x.size // x.shape[-1], flat(x), w.astype(f32)[None]
    others = [flat(a) for a in (dy, added) if a is not None]
    features, sums = x.shape[-1], 2 if center else 1
    blocks = pl.cdiv(x_rows.shape[0], tiles.rows)
    shares = min(CORES, blocks)
    steps = pl.cdiv(blocks, shares)
    # The last share may be a step short: that step stays on the block before it and does nothing.
    block = pl.BlockSpec((tiles.rows, features), lambda i, j: (jnp.minimum(i * steps + j, blocks - 1), 0))
    partial = pl.BlockSpec((None, SUBLANES, features), lambda i, j: (i, 0, 0))
    dx, *partials = call(
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
        Load.of("backward", x, added, parameters=sums, dtype=dy.dtype.name).vmem_bytes(tiles),
        (x_rows, w, *others),
        (jax.ShapeDtypeStruct(x_rows.shape, x.dtype),)
        + (jax.ShapeDtypeStruct((shares, SUBLANES, features), f32),) * sums,
        flops=16,
        grid=(shares, steps),
        in_specs=[block, pl.BlockSpec((1, features), lambda i, j: (0, 0)), *[block] * len(others)],
        out_specs=(block,) + (partial,) * sums,
        name=name,
    )
    return dx[:rows].reshape(x.shape), *(p.sum((0, 1)) for p in partials)
