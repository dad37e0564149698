"""The attention kernels of Blackwell GPUs: matrix products (tcgen05) into tensor memory, tiles fed by TMA.

After FlashAttention-4 (Dao-AILab, 2025): warpgroups compute, one thread row by row, so that no reduction crosses
threads; of one more warpgroup a warp fetches tiles and a warp issues products. A product of scores is issued a step
ahead of those that use the last one's weights, so the tensor core works while the softmax does.

Scores, weights and results have tensor memory of their own, and every order is made by a barrier: a weight is
overwritten when the product that reads it is done, a score is when it is in registers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.attention_scores import (
    LN2,
    LOWEST,
    Problem,
    Refs,
    Rows,
    down,
    go_through,
    walk_of_band,
)

ROWS = 128  # of one product, and threads of a warpgroup: a row each
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
FETCH, ISSUE = 0, 1  # warps of the last warpgroup


def _launch(kernel, name, operands, results, scratch, grid, groups):
    """`kernel(refs)` returns what a computing warpgroup (given its number), the fetching and the issuing warp do."""
    names = (*operands, *results)

    def body(*refs, **memory):
        compute, fetch, issue = kernel(Refs(**dict(zip(names, refs, strict=True)), **memory))
        group = lax.axis_index("group")

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(232 if groups == 2 else 240, action="increase")
            compute(group)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == FETCH)(fetch)
                pl.when(warp == ISSUE)(issue)

    arrays = plgpu.kernel(
        body,
        kernel_name=name,
        out_type=list(results.values()),
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())
    return dict(zip(results, arrays, strict=True))


def _smem(dtype, *shape):
    return plgpu.SMEM(shape, dtype, transforms=TILED)


def _fed(barriers=1, arrivals=1):
    """Barriers at which copies arrive."""
    return plgpu.Barrier(num_barriers=barriers, num_arrivals=arrivals)


def _ordered(barriers=1, arrivals=1):
    """Barriers at which products arrive, or those who share tensor memory with products."""
    return plgpu.Barrier(num_barriers=barriers, num_arrivals=arrivals, orders_tensor_core=True)


def _load(ref):
    """A tile of tensor memory in registers, read for sure when this returns."""
    x = plgpu.async_load_tmem(ref, layout=NATIVE)
    plgpu.wait_load_tmem()
    return x


def _row(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), NATIVE.reduce(1))


def forward(problem: Problem):
    """(out, lse), out with the padded head size, lse of base e over whole blocks of queries.

    Each of two warpgroups has 128 rows of its own, and takes only the tiles that these see.
    """
    B, T, S, N, K, H, V = problem.shape
    keys, dtype, groups = problem.tiles.keys, problem.dtype, 2 if max(H, V) <= 128 else 1
    block_rows = groups * ROWS
    stages, query_tiles = min(problem.tiles.stages, pl.cdiv(S, keys)), pl.cdiv(T, block_rows)
    ragged = S % keys != 0 or "key_lengths" in problem.operands

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        first = (query_tiles - 1 - lax.axis_index("tile")) * block_rows  # the longest rows first
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None

        def walk_of(row, rows):
            return walk_of_band(
                problem.band, row, rows, key_end, keys, ragged=ragged, one_loop=False,
                empty=None if query_end is None else row >= query_end,
            )  # fmt: skip

        def part(ref, group, width):
            return ref.at[:, pl.ds(group * width, width)]

        def compute(group):
            mine = Rows.of(problem, refs, NATIVE, batch, head, first + group * ROWS, ROWS)
            walk = walk_of(mine.first, ROWS)
            out = part(refs.out_acc, group, V)

            def step(n, carry, masked):
                top, total = carry
                tile = mine.tile(head, n * keys, keys, masked=masked, last=key_end - 1 if ragged else None)
                plgpu.barrier_wait(refs.scores_ready.at[group])
                x, factor, _, _ = tile.exponents(_load(part(refs.scores, group, keys)))
                seen = tile.seen() if masked else None
                if seen is not None:
                    x = jnp.where(seen, x, -jnp.inf)
                higher = jnp.maximum(top, x.max(axis=1) * factor)
                alpha = jnp.exp2(top - higher)
                p = jnp.exp2(x * factor - down(higher, x.shape))
                total = total * alpha + p.sum(axis=1)
                p = p.astype(dtype)

                @pl.when(n > walk.start)
                def _():
                    plgpu.barrier_wait(refs.out_ready.at[group])
                    plgpu.async_store_tmem(out, _load(out) * down(alpha, (ROWS, V)))

                plgpu.async_store_tmem(part(refs.weights, group, keys), p)
                plgpu.commit_tmem()
                plgpu.barrier_arrive(refs.weights_ready.at[group])
                return higher, total

            # The sink is a key that was seen first and has no value.
            sink = jnp.maximum(refs.sinks[head], LOWEST) if "sinks" in refs else None
            carry = _row(LOWEST if sink is None else sink), _row(0.0 if sink is None else 1.0)
            top, total = go_through(walk.sections(mine.first, ROWS), step, None, carry)
            pl.when(walk.steps > 0)(lambda: plgpu.barrier_wait(refs.out_ready.at[group]))

            lse = (top + jnp.log2(total)) * LN2
            inverse = jnp.where(total > 0, 1 / total, 0.0)
            if sink is None:  # total is 0 for a row that sees nothing
                lse = jnp.where(total > 0, lse, jnp.inf)
            if query_end is not None:
                inside = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=NATIVE.reduce(1)) < query_end - mine.first
                inverse = jnp.where(inside, inverse, 0.0)
                lse = jnp.where(inside, lse, jnp.inf if sink is None else sink * LN2)
            tile = refs.query_tile.at[group] if V <= H else refs.out_tile.at[group]
            for start in range(0, V, 64):
                columns = pl.ds(start, 64)
                acc = _load(refs.out_acc.at[:, pl.ds(group * V + start, 64)])
                # Where nothing was added, tensor memory holds anything.
                acc = jnp.where(down(inverse, acc.shape) > 0, acc * down(inverse, acc.shape), 0.0)
                plgpu.store(tile.at[:, columns], acc.astype(dtype), optimized=False)
            plgpu.store(refs.lse_tile.at[group], lse, optimized=False)
            plgpu.commit_smem()
            rows = pl.ds(mine.first, ROWS)
            plgpu.copy_smem_to_gmem(tile.at[:, pl.ds(0, V)], refs.out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(refs.lse_tile.at[group], refs.lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        walk = walk_of(first, block_rows)

        def fetch():
            for group in range(groups):
                rows = pl.ds(first + group * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], refs.query_tile.at[group], refs.query_ready)

            def load(n, _):
                slot = lax.rem(n - walk.start, stages)
                there = (batch, pl.ds(n * keys, keys), lax.div(head, jnp.int32(N // K)))
                for source, tiles, ready, free in (
                    (refs.key, refs.key_tiles, refs.key_ready, refs.key_free),
                    (refs.value, refs.value_tiles, refs.value_ready, refs.value_free),
                ):
                    pl.when(n - walk.start >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(source.at[there], tiles.at[slot], ready.at[slot])

            lax.fori_loop(walk.start, walk.end, load, None)

        def issue():
            walks = [walk_of(first + group * ROWS, ROWS) for group in range(groups)]
            plgpu.barrier_wait(refs.query_ready)

            def scores(n):
                slot = lax.rem(n - walk.start, stages)
                plgpu.barrier_wait(refs.key_ready.at[slot])
                return refs.key_tiles.at[slot].T, refs.key_free.at[slot]

            def score(group, n, key):
                @pl.when((n >= walks[group].start) & (n < walks[group].end))
                def _():
                    plgpu.tcgen05_mma(
                        part(refs.scores, group, keys), refs.query_tile.at[group], key, refs.scores_ready.at[group],
                        accumulate=False,
                    )  # fmt: skip

            def step(n, _):
                value_slot, more = lax.rem(n - walk.start, stages), n + 1 < walk.end
                key_slot = lax.rem(n + 1 - walk.start, stages)
                pl.when(more)(lambda: plgpu.barrier_wait(refs.key_ready.at[key_slot]))
                plgpu.barrier_wait(refs.value_ready.at[value_slot])
                for group in range(groups):
                    own = walks[group]

                    @pl.when((n >= own.start) & (n < own.end))
                    def _(group=group, own=own):
                        plgpu.barrier_wait(refs.weights_ready.at[group])

                    score(group, n + 1, refs.key_tiles.at[key_slot].T)

                    @pl.when((n >= own.start) & (n < own.end))
                    def _(group=group, own=own):
                        plgpu.tcgen05_mma(
                            part(refs.out_acc, group, V), part(refs.weights, group, keys),
                            refs.value_tiles.at[value_slot], refs.out_ready.at[group], accumulate=n > own.start,
                        )  # fmt: skip

                pl.when(more)(lambda: plgpu.tcgen05_commit_arrive(refs.key_free.at[key_slot]))
                plgpu.tcgen05_commit_arrive(refs.value_free.at[value_slot])

            @pl.when(walk.steps > 0)
            def _():
                plgpu.barrier_wait(refs.key_ready.at[0])
                for group in range(groups):
                    score(group, walk.start, refs.key_tiles.at[0].T)
                plgpu.tcgen05_commit_arrive(refs.key_free.at[0])
                lax.fori_loop(walk.start, walk.end, step, None)

        return compute, fetch, issue

    out_tile = {"out_tile": _smem(dtype, groups, ROWS, V)} if H < V else {}  # else it leaves through the query's
    result = _launch(
        kernel,
        "attention_forward",
        problem.operands,
        {
            "out": jax.ShapeDtypeStruct((B, T, N, V), dtype),
            "lse": jax.ShapeDtypeStruct((B, N, query_tiles * block_rows), jnp.float32),
        },
        out_tile
        | {
            "query_tile": _smem(dtype, groups, ROWS, H),
            "lse_tile": plgpu.SMEM((groups, ROWS), jnp.float32),
            "key_tiles": _smem(dtype, stages, keys, H),
            "value_tiles": _smem(dtype, stages, keys, V),
            "scores": plgpu.TMEM((ROWS, groups * keys), jnp.float32),
            "weights": plgpu.TMEM((ROWS, groups * keys), dtype, packed=True),
            "out_acc": plgpu.TMEM((ROWS, groups * V), jnp.float32),
            "query_ready": _fed(arrivals=groups),
            "key_ready": _fed(stages),
            "value_ready": _fed(stages),
            "key_free": _ordered(stages),
            "value_free": _ordered(stages),
            "scores_ready": _ordered(groups),
            "weights_ready": _ordered(groups),
            "out_ready": _ordered(groups),
        },
        (N, query_tiles, B),
        groups,
    )
    return result["out"], result["lse"]
