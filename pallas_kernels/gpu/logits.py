"""What the losses over a vocabulary share on Hopper GPUs: logits that exist tile by tile, in registers.

    z_i = left_i[m, k_i] · right_i[k_i, n],   visited tile by tile; what is kept of them is up to the loss

A block owns 128 rows: two consumer warpgroups of 64, the height of a wgmma, and a producer that streams tiles of both
factors through shared memory by TMA, without a pause from one tile of logits to the next. It goes through all columns,
or a share of them where the rows alone would leave processors idle.

Forward, rows are tokens and columns are words: a loss keeps running sums of each row. Backward, rows are words and
columns are tokens, so that the gradient of a bias, too, is a sum along rows. What bounds the backward pass is the
number of products, of 2 · tokens · hidden · vocab operations each. Three are needed: the logits again, dx = dz · wᵀ and
dw = xᵀ · dz. Sums for dx or dw that stay on the chip, [128, hidden] in float32, do not fit a processor from a hidden
size of 512 on; pieces of them would compute the logits again for every piece and for both, at least four products.
So `gradients` walks over chunks of the vocabulary: a kernel computes the logits again and writes dz of the chunk in
bfloat16, and XLA's library multiplies it, three products in all. A chunk of dz takes 128 MiB, or, where that would be
fewer than 2048 words, 4 KiB for each token, which is x at a hidden size of 2048. dx is read and written once for each
chunk, in float32: of the time of its products, 3 % with chunks of 8192 words.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips, tuned
from pallas_kernels.gpu.attention_scores import LN2, across, down, smem
from pallas_kernels.gpu.products import CONSUMERS, DEPTH, PIECE, ROWS, WGMMA, no_wgmma, specialised
from pallas_kernels.padding import pad_to, round_up

f32 = jnp.float32
BLOCK = CONSUMERS * ROWS
CHUNK_BYTES = 128 << 20  # of dz
NARROWEST = 2048  # words of a chunk; with fewer, dx would be read and written for too few products
FINISHED = 32  # columns that are finished together: what belongs to them takes registers beside the logits
REGISTERS = 216, 72  # of a consumer and of the producer; with less than 72 for its addresses, that one spills
_OUT = (plgpu.TilingTransform((8, FINISHED)), plgpu.SwizzleTransform(2 * FINISHED))  # type: ignore[abstract]
_SPARE = 2048  # shared memory for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A block takes 128 rows and goes through `columns` at a time, in steps of which `stages` are in flight."""

    columns: int
    stages: int

    @staticmethod
    def default(problem: "Problem") -> "Tiles":
        """As wide as registers allow: the factors are then read least often. As many stages as shared memory holds, up
        to four."""
        width = min(problem.widest, round_up(problem.columns, PIECE))
        return Tiles(width, next((s for s in (4, 3) if Tiles(width, s).allowed(problem)), 2))

    def allowed(self, problem: "Problem") -> bool:
        """Whether registers and shared memory hold them."""
        if self.columns <= 0 or self.columns % PIECE or self.columns > problem.widest or self.stages < 2:
            return False
        return memory(self) <= chips.current("gpu").smem_bytes


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides about tiles: how many layers give logits, of so many columns, and whether columns have biases."""

    layers: int
    columns: int
    biased: bool

    @staticmethod
    def of(phase: str, layers: int, x, weight, biased: bool) -> "Problem":
        """Of x[tokens, hidden] and weight[hidden, vocab]. Backward, columns are tokens."""
        backward = phase == "backward"
        return Problem(layers, x.shape[0] if backward else weight.shape[1], biased and not backward)

    @property
    def widest(self) -> int:
        """Columns of a tile. All logits 256 wide take half of the registers; one layer with biases would spill."""
        return 192 if self.biased and self.layers == 1 else 256 // self.layers // PIECE * PIECE


def memory(tiles: Tiles) -> int:
    """Bytes of shared memory of a block."""
    step, out = 2 * DEPTH * (BLOCK + tiles.columns), 2 * 2 * BLOCK * FINISHED
    return tiles.stages * step + out + 4 * 4 * BLOCK + _SPARE


def tiles(name: str, phase: str, layers: int, x, weight, *, biased: bool) -> Tiles:
    """The tuned tiles of the nearest problem that fit this one, else the default."""
    (tokens, hidden), vocab = x.shape, weight.shape[1]
    problem = Problem.of(phase, layers, x, weight, biased)
    return tuned.choose(
        f"gpu.{name}.{phase}",
        chips.current("gpu"),
        {"tokens": tokens, "hidden": hidden, "vocab": vocab},
        jnp.dtype(x.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(problem),
        Tiles.default(problem),
    )


def candidates(phase: str, layers: int, x, weight, *, biased: bool) -> Iterator[Tiles]:
    """Tiles worth trying, the default first."""
    problem = Problem.of(phase, layers, x, weight, biased)
    found = [Tiles.default(problem), *(Tiles(*both) for both in itertools.product((256, 192, 128, 64), (4, 3, 2)))]
    yield from (one for one in dict.fromkeys(found) if one.allowed(problem))


def unsupported(tokens: int, vocab: int, **operands) -> str | None:
    """Why these factors, x and weight of each layer by name, cannot be multiplied here, or None."""
    if reason := no_wgmma():
        return reason
    for name, array in operands.items():
        if array.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, got {array.dtype}"
    if max(tokens, vocab) > 65535 * BLOCK:
        return f"the grid is limited to 65535 blocks of 128 tokens or words, got {tokens} tokens and {vocab} words"
    return None


# ---- tiles of logits ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tile:
    """Logits in registers, and what belongs to their rows and columns.

    logits: of each layer, float32 [64, width]. row, column: numbers of the first. row_vectors: [64], float32 or int32.
    """

    logits: tuple[jax.Array, ...]
    row: Any
    column: Any
    row_vectors: tuple[jax.Array, ...]
    column_refs: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.logits[0].shape
        return height, width

    def piece(self, start: int) -> "Tile":
        """The columns start … start + FINISHED."""
        cut = tuple(lax.slice(z, (0, start), (ROWS, start + FINISHED)) for z in self.logits)
        return dataclasses.replace(self, logits=cut, column=self.column + start)

    def of_row(self, which: int) -> jax.Array:
        """One number per row, as a tile."""
        return down(self.row_vectors[which], self.shape)

    def of_column(self, which: int) -> jax.Array:
        """One number per column, as a tile."""
        there = self.column_refs[which].at[pl.ds(self.column, self.shape[1])]
        return across(plgpu.load(there, layout=WGMMA.reduce(0), optimized=False), self.shape)

    def numbers(self, axis: int) -> jax.Array:
        """The number of each row (0) or column (1)."""
        iota = plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=WGMMA)
        return iota + (self.column if axis else self.row)


def sum_of_columns(x: jax.Array, width: int = 8) -> jax.Array:
    """`width` columns, each the sum of every so many-th of x: sums across threads are left to the end."""
    parts = [lax.slice(x, (0, start), (x.shape[0], start + width)) for start in range(0, x.shape[1], width)]
    while len(parts) > 1:  # in pairs: rounding errors stay few
        parts = [sum(pair[1:], pair[0]) for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))]
    return parts[0]


def row_of(value: float) -> jax.Array:
    """[64], one number for each row."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, f32), WGMMA.reduce(1))


def partial_sums() -> jax.Array:
    """Zeros [64, 8]: what `sum_of_columns` is added to."""
    return plgpu.layout_cast(jnp.zeros((ROWS, 8), f32), WGMMA)


def add_exponentials(top, total, z, factor: float):
    """(top, total, e, decay) of the running Σ exp2(factor · z - top): e are the tile's, decay is of what was there."""
    higher = jnp.maximum(top, z.max(axis=1) * factor)
    e, decay = jnp.exp2(z * factor - down(higher, z.shape)), jnp.exp2(top - higher)
    return higher, total * down(decay, total.shape) + sum_of_columns(e), e, decay


def log_sum(top, total) -> jax.Array:
    """The logarithm, of base e, of a sum that `add_exponentials` made; `total` is [64]."""
    return (top + jnp.log2(total)) * LN2


def _share(rows: int, count: int) -> int:
    """How many of `count` tiles a block goes through: the least time, with one more for its start and its end."""
    blocks, cores = pl.cdiv(rows, BLOCK), chips.current("gpu").cores
    shares = min(range(1, count + 1), key=lambda s: pl.cdiv(blocks * s, cores) * (pl.cdiv(count, s) + 1))
    return pl.cdiv(count, shares)


def sweep(
    name: str,
    factors: Sequence[tuple[jax.Array, jax.Array]],
    by_row: Sequence[jax.Array],
    by_column: Sequence[jax.Array],
    carry: Callable,
    visit: Callable,
    finish: Callable,
    *,
    kept: int,
    tiles: Tiles,
    written: bool = False,
):
    """([kept, shares, m] float32, [m, n] or None): what a loss keeps of each row, and what it writes of each logit.

    factors: (left[m, k], right[k, n]) of each layer, k and n multiples of 64; left[k, m] if something is `written`.
    by_row, by_column: vectors [m] and [n]. A consumer starts from carry(), goes through its logits by
    visit(tile, carry) -> (carry, what to write or None), a tile being FINISHED columns wide, and ends with
    finish(carry) -> `kept` vectors of its rows.
    """
    (rows, n), dtype = (factors[0][0].shape[int(written)], factors[0][1].shape[1]), factors[0][0].dtype
    m, columns, layers = round_up(rows, 8), tiles.columns, len(factors)
    steps = [len(right) // DEPTH for _, right in factors]
    stages, count = tiles.stages, pl.cdiv(n, columns)
    share = _share(rows, count)
    shares, blocks = pl.cdiv(count, share), pl.cdiv(rows, BLOCK)
    operands = [array for left, right in factors for array in (left if written else pad_to(left, 0, m), right)]
    operands += [pad_to(vector, 0, blocks * BLOCK) for vector in by_row]
    operands += [pad_to(vector, 0, count * columns) for vector in by_column]

    def body(*refs, left_tiles, right_tiles, kept_tile, out_tile, ready, free):
        factor_refs, refs = list(itertools.batched(refs[: 2 * layers], 2)), refs[2 * layers :]
        row_refs, refs = refs[: len(by_row)], refs[len(by_row) :]
        column_refs, results = refs[: len(by_column)], refs[len(by_column) :]
        block, part = lax.axis_index("row"), lax.axis_index("share")
        first_tile = part * share
        visits = lax.min(jnp.int32(share), count - first_tile)

        def consumer(group):
            first = block * BLOCK + group * ROWS
            rows = pl.ds(first, ROWS)
            row_vectors = [plgpu.load(ref.at[rows], layout=WGMMA.reduce(1), optimized=False) for ref in row_refs]

            def products(t):
                def accumulate(*accs):
                    before = t * sum(steps)
                    for acc, length in zip(accs, steps, strict=True):

                        def step(i, _, acc=acc, before=before):
                            slot = lax.rem(before + i, stages)
                            plgpu.barrier_wait(ready.at[slot])
                            left = left_tiles.at[slot, group]
                            plgpu.wgmma(acc, left.T if written else left, right_tiles.at[slot])
                            plgpu.wgmma_wait(1)  # that of the step before is through: its tiles are free
                            pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(before + i - 1, stages)]))

                        lax.fori_loop(0, length, step, None)
                        plgpu.wgmma_wait(0)
                        before = before + length
                        plgpu.barrier_arrive(free.at[lax.rem(before - 1, stages)])
                    return tuple(acc[...] for acc in accs)

                return pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, columns), f32)] * layers)

            def step(t, carry):
                column = (first_tile + t) * columns
                tile = Tile(products(t), first, column, tuple(row_vectors), tuple(column_refs))
                for i, start in enumerate(range(0, columns, FINISHED)):
                    carry, value = visit(tile.piece(start), carry)
                    if written:
                        out = out_tile.at[i % 2, group]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before the last has left
                        out[...] = value.astype(dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(out, results[1].at[rows, pl.ds(column + start, FINISHED)])
                return carry

            totals = finish(lax.fori_loop(0, visits, step, carry()))
            for which, total in enumerate(totals):
                kept_tile[which, group] = total
            plgpu.commit_smem()
            for which in range(kept):
                plgpu.copy_smem_to_gmem(kept_tile.at[which, group], results[0].at[which, part, rows])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(number, at):  # one loop over the steps of all tiles: nested ones take more registers
                t, i = at
                slot = lax.rem(number, stages)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))

                def copy(left, right, begin):
                    depth = pl.ds((i - begin) * DEPTH, DEPTH)
                    for g in range(CONSUMERS):
                        rows = pl.ds(block * BLOCK + g * ROWS, ROWS)
                        there = left.at[depth, rows] if written else left.at[rows, depth]
                        plgpu.copy_gmem_to_smem(there, left_tiles.at[slot, g], ready.at[slot])
                    over = pl.ds(t * columns, columns)
                    plgpu.copy_gmem_to_smem(right.at[depth, over], right_tiles.at[slot], ready.at[slot])

                begin = 0
                for (left, right), length in zip(factor_refs, steps, strict=True):
                    mine = (i >= begin) & (i < begin + length)
                    copying = functools.partial(copy, left, right, begin)
                    pl.when(mine)(copying) if layers > 1 else copying()
                    begin += length
                last = i == sum(steps) - 1
                return lax.select(last, t + 1, t), lax.select(last, jnp.int32(0), i + 1)

            lax.fori_loop(0, visits * sum(steps), load, (first_tile, jnp.int32(0)))

        specialised(consumer, producer, REGISTERS)

    found = plgpu.kernel(
        body,
        kernel_name=name,
        out_type=[jax.ShapeDtypeStruct((max(kept, 1), shares, blocks * BLOCK), f32)]
        + [jax.ShapeDtypeStruct((m, n), dtype)] * written,
        scratch_types=dict(
            left_tiles=smem(dtype, stages, CONSUMERS, ROWS, DEPTH),  # or [DEPTH, ROWS]: both are 64
            right_tiles=smem(dtype, stages, DEPTH, columns),
            kept_tile=plgpu.SMEM((max(kept, 1), CONSUMERS, ROWS), f32),
            out_tile=plgpu.SMEM((2, CONSUMERS, ROWS, FINISHED), dtype, transforms=_OUT),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS + 1),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        ),
        grid=(blocks, shares),
        grid_names=("row", "share"),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    return found[0][:, :, :rows], found[1][:rows] if written else None


def forward(name: str, layers, by_row, carry, visit, finish, *, kept: int, tiles: Tiles) -> jax.Array:
    """What `sweep` keeps of each token, [kept, shares, tokens], over all words of the layers (x, weight, bias or None).

    The biases that there are, in the order of the layers, are the first vectors by column.
    """
    factors, biases = [], []
    for x, weight, bias in layers:
        k, n = (round_up(size, DEPTH) for size in weight.shape)
        factors.append((pad_to(x, 1, k), pad_to(pad_to(weight, 0, k), 1, n)))
        biases += [] if bias is None else [bias.astype(f32)]
    return sweep(name, factors, by_row, biases, carry, visit, finish, kept=kept, tiles=tiles)[0]


def gradients(name: str, layers, by_token, visit: Callable, *, tiles: Tiles) -> dict[str, jax.Array]:
    """x, weight and bias: the gradients of the first of the layers (x, weight, bias or None).

    by_token(start) are vectors [tokens] with the value of each beyond the end, for the chunk of words that begins at
    `start`. visit(tile) -> dz, with words as rows and tokens as columns. Biases that there are, in the order of the
    layers, are the first vectors by row.
    """
    (tokens, hidden), vocab, dtype = layers[0][0].shape, layers[0][1].shape[1], layers[0][0].dtype
    wide, words = round_up(tokens, PIECE), round_up(vocab, DEPTH)
    width = chunk_width(tokens, vocab)
    xs, weights, biases = [], [], []
    for x, weight, bias in layers:
        k = round_up(x.shape[1], DEPTH)
        xs.append(pad_to(pad_to(x, 0, wide), 1, k))
        weights.append(pad_to(pad_to(weight, 0, k), 1, words))
        biases += [] if bias is None else [pad_to(bias.astype(f32), 0, words)]
    transposed, with_bias = [x.T for x in xs], layers[0][2] is not None

    def one(tile, total):
        dz = visit(tile)
        return (total + sum_of_columns(dz) if with_bias else total), dz

    def chunk(start, size, carry):
        dx, dweight, dbias = carry
        cut = [lax.dynamic_slice_in_dim(weight, start, size, 1) for weight in weights]
        vectors = [pad_to(v, 0, round_up(wide, tiles.columns), value) for v, value in by_token(start)]
        sums, dz = sweep(
            f"{name}_backward",
            list(zip(cut, transposed, strict=True)),
            [lax.dynamic_slice_in_dim(bias, start, size) for bias in biases],
            vectors,
            partial_sums,
            one,
            lambda total: (total.sum(axis=1),) if with_bias else (),
            kept=int(with_bias),
            tiles=tiles,
            written=True,
        )
        product = lambda a, b, over: lax.dot_general(a, b, (over, ((), ())), preferred_element_type=f32)
        dx = dx + product(dz, cut[0], ((0,), (1,)))
        part = product(xs[0], dz, ((0,), (1,))).astype(dtype)
        dweight = lax.dynamic_update_slice_in_dim(dweight, part, start, 1)
        if with_bias:
            dbias = lax.dynamic_update_slice_in_dim(dbias, sums[0].sum(0), start, 0)
        return dx, dweight, dbias

    carry = jnp.zeros(xs[0].shape, f32), jnp.zeros_like(weights[0]), jnp.zeros(words if with_bias else 0, f32)
    whole, rest = divmod(words, width)
    carry = lax.fori_loop(0, whole, lambda i, carry: chunk(i * width, width, carry), carry)
    dx, dweight, dbias = chunk(whole * width, rest, carry) if rest else carry
    found = {"x": dx[:tokens, :hidden].astype(dtype), "weight": dweight[:hidden, :vocab]}
    return found | ({"bias": dbias[:vocab].astype(layers[0][2].dtype)} if with_bias else {})


def chunk_width(tokens: int, vocab: int) -> int:
    """The words of a chunk of `gradients`, in whole blocks."""
    return min(round_up(vocab, DEPTH), max(NARROWEST, CHUNK_BYTES // (2 * tokens) // BLOCK * BLOCK))
