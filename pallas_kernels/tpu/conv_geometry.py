"""What the kernels of convolutions share: the geometry of a call, its arrays as rows of pixels, and the rows of an
image that a block needs, with those around them, in VMEM."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import matrix_unit

f32 = jnp.float32
LONGEST = 1024  # pixels of a row (of all images taken at once): a turn's program is written out for them


@dataclasses.dataclass(frozen=True)
class Geometry:
    """x[images, height, width, channels] with a window of `size`, `pads` (low, high) and `dilation`, each for two axes;
    `joined`: the batch that is taken at once, beside the pixels, or 1."""

    images: int
    height: int
    width: int
    channels: int
    columns: int
    size: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    joined: int
    dtype: Any
    out_dtype: Any
    read: int
    saved: int
    full: bool

    @property
    def out(self) -> tuple[int, int]:
        window = [(size - 1) * d + 1 for size, d in zip(self.size, self.dilation, strict=True)]
        height, width = (
            size + sum(pads) - w + 1 for size, pads, w in zip((self.height, self.width), self.pads, window, strict=True)
        )
        return height, width

    @property
    def pixels(self) -> int:
        """Pixels of a row of the input."""
        return self.width * self.joined


def _two(first: Any, second: Any) -> tuple[Any, Any]:
    return first, second


def problem_of(
    kind: type[Geometry],
    lhs,
    rhs,
    residual,
    *,
    activation,
    dtype,
    dimension_numbers,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    feature_group_count,
    batch_group_count,
    precision,
    saving=True,
) -> Any:
    """The problem, of a `kind`, or why no kernel has it: of groups, precision and memory the callers know more."""
    del feature_group_count, batch_group_count
    if len(window_strides) not in (1, 2):
        return f"conv must have one or two spatial axes on a TPU, got {len(window_strides)}"
    if lhs.dtype not in (jnp.float32, jnp.bfloat16) or rhs.dtype != lhs.dtype:
        return f"lhs and rhs must both be float32 or bfloat16 on a TPU, got {lhs.dtype} and {rhs.dtype}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the result must be float32 or bfloat16 on a TPU, got {dtype}"
    if residual is not None and residual.dtype not in (jnp.float32, jnp.bfloat16):
        return f"residual must be float32 or bfloat16 on a TPU, got {residual.dtype}"
    if any(one != 1 for one in (*window_strides, *lhs_dilation)):
        return f"strides and lhs_dilation must be 1, got {window_strides} and {lhs_dilation}"
    precision = precision[0] if isinstance(precision, tuple) else precision
    one: tuple[int, ...] = (1,) * (2 - len(window_strides))
    batch, channels, *image = (lhs.shape[axis] for axis in dimension_numbers.lhs_spec)
    columns, _, *window = (rhs.shape[axis] for axis in dimension_numbers.rhs_spec)
    height, width = _two(*one, *image)
    joined = batch if width % 8 and batch % 8 == 0 and batch * width <= LONGEST else 1
    problem = kind(
        images=batch // joined,
        height=height,
        width=width,
        channels=channels,
        columns=columns,
        size=_two(*one, *window),
        pads=_two(*[(0, 0)] * len(one), *padding),
        dilation=_two(*one, *rhs_dilation),
        joined=joined,
        dtype=jnp.dtype(lhs.dtype).name,
        out_dtype=jnp.dtype(dtype).name,
        read=int(residual is not None),
        saved=int(saving and activation is not None),
        full=matrix_unit.full(lhs.dtype, precision),
    )
    if min(problem.out) < 1:
        return f"there must be a result, got one of the sizes {problem.out}"
    widest = max(problem.pixels, problem.out[1])
    if widest > LONGEST:
        return f"a row must have at most {LONGEST} pixels, got {widest}"
    if min(low for low, _ in problem.pads) < 0 or min(high for _, high in problem.pads) < 0:
        return f"padding must not be negative on a TPU, got {padding}"
    return problem


def moved(z: jax.Array, by: int, width: int, out: int) -> jax.Array:
    """z[rows, pixels, columns], of which `width` pixels count, such that pixel q is its pixel q + by, for q < out; 0
    where there is none."""
    first, last = max(0, -by), min(out, width - by)
    if first >= last:
        return jnp.zeros((z.shape[0], out, z.shape[2]), z.dtype)
    parts = [z[:, first + by : last + by]]
    if first:
        parts.insert(0, jnp.zeros((z.shape[0], first, z.shape[2]), z.dtype))
    if last < out:
        parts.append(jnp.zeros((z.shape[0], out - last, z.shape[2]), z.dtype))
    return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of an image that arrive: block k of `blocks` has `count` of them, from row k · `rows` - `low` on; those
    outside of the `height` do not arrive."""

    rows: int
    count: int
    low: int
    height: int
    blocks: int

    def parts(self) -> list[tuple[int, int, int, int]]:
        """(first, last, start, end): of the blocks first to last, the rows start to end are inside the image."""
        found: dict[tuple[int, int], list[int]] = {}
        for block in range(self.blocks):
            first = block * self.rows - self.low
            start = min(max(0, -first), self.count)
            end = max(start, min(self.count, self.height - first))
            found.setdefault((start, end), []).append(block)
        return [(blocks[0], blocks[-1], start, end) for (start, end), blocks in found.items()]

    def each(self, place: jax.Array, act: Callable[[int, int], None]) -> None:
        """act(start, end) for the block at `place`."""
        parts = self.parts()
        for first, last, start, end in parts:
            some = lambda start=start, end=end: act(start, end)
            if len(parts) == 1:
                some()
            else:
                pl.when((place >= first) & (place <= last))(some)

    def outside(self, place: jax.Array, act: Callable[[int, int], None]) -> None:
        """act(first, last) for the rows before and after those that arrive."""

        def both(start, end):
            act(0, start)
            act(end, self.count)

        self.each(place, both)

    def copies(self, arrays: list, block: jax.Array, act: Callable[[Any], Any]) -> None:
        """act(copy) for each of `arrays`, (in HBM, in VMEM twice, two semaphores), and `block`, counted over images."""
        image, place, slot = lax.div(block, self.blocks), lax.rem(block, self.blocks), lax.rem(block, 2)

        def some(start, end):
            inside = pl.ds(place * self.rows - self.low + start, end - start)
            for source, there, arrived in arrays:
                if end > start:
                    to = there.at[slot, pl.ds(start, end - start)]
                    act(pltpu.make_async_copy(source.at[image, inside], to, arrived.at[slot]))

        self.each(place, some)


def divisor(rows: int, most: int) -> int:
    """The largest divisor of `rows` up to `most`: a turn of a loop over them."""
    return max(turn for turn in range(1, most + 1) if rows % turn == 0)


def clear(ref: Any, first: int, last: int) -> None:
    """Zeros in its rows first to last."""

    def row(index, _):
        ref[index] = jnp.zeros(ref.shape[1:], ref.dtype)
        return 0

    lax.fori_loop(first, last, row, 0)


def arrive(blocks: jax.Array, block: jax.Array, ahead: bool, copies: Callable[[jax.Array, Callable], None]) -> None:
    """Waits for the rows of a block; those of the next one are on their way if they are fetched `ahead`."""
    start = lambda copy: copy.start()
    if ahead:
        pl.when(block == 0)(lambda: copies(block, start))
        pl.when(block + 1 < blocks)(lambda: copies(block + 1, start))
    else:
        copies(block, start)
    copies(block, lambda copy: copy.wait())


def in_hbm(x: jax.Array) -> jax.Array:
    """x where the kernel fetches it from: XLA might bring it to VMEM before, and wait."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def view(a, problem: Geometry, width: int):
    """a[batch, height, width, channels] as [images, height, pixels, channels]."""
    if problem.joined > 1:
        a = a.transpose(1, 2, 0, 3)
    return a.reshape(problem.images, -1, width * problem.joined, a.shape[-1])


def back(a, problem: Geometry, width: int):
    """The inverse of `view`."""
    if problem.joined > 1:
        return a.reshape(-1, width, problem.joined, a.shape[-1]).transpose(2, 0, 1, 3)
    return a.reshape(problem.images, -1, width, a.shape[-1])
