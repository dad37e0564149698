"""The attention kernels of Blackwell GPUs: matrix products (tcgen05) into tensor memory, tiles fed by TMA.

After FlashAttention-4 (Dao-AILab, 2025): warpgroups compute, one thread row by row, so that no reduction crosses
threads; of one more warpgroup a warp fetches tiles and a warp issues products. A product of scores is issued a step
ahead of those that use the last one's weights, so the tensor core works while the softmax does.

Scores, weights and results have tensor memory of their own, and every order is made by a barrier: a weight is
overwritten when the product that reads it is done, a score is when it is in registers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.attention_scores import (
    LN2,
    LOWEST,
    Problem,
    Rows,
    across,
    by_keys,
    down,
    find_walk,
    go_through,
    launch,
    smem,
    walk_of_all,
)

ROWS = 128  # of one product, and threads of a warpgroup: a row each
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE
FETCH, ISSUE = 0, 1  # warps of the last warpgroup


def _launch(kernel, *call, groups):
    """`kernel(refs)` returns what a computing warpgroup (given its number), the fetching and the issuing warp do."""

    def body(refs):
        compute, fetch, issue = kernel(refs)
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

    return launch(
        *(body, *call),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


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


def _part(ref, number, width):
    return ref.at[:, pl.ds(number * width, width)]


def forward(problem: Problem):
    """(out, lse), out with the padded head size, lse of base e over whole blocks of queries.

    Each of two warpgroups has 128 rows of its own and, of a band, takes only the tiles that these see.
    """
    B, T, S, N, K, H, V = problem.shape
    keys, dtype, groups = problem.tiles.keys, problem.dtype, 2 if max(H, V) <= 128 else 1
    block_rows, width = groups * ROWS, 128 if V % 128 == 0 else 64  # of what is rescaled at a time, in registers
    stages, query_tiles = min(problem.tiles.stages, pl.cdiv(S, keys)), pl.cdiv(T, block_rows)
    inputs = problem.operands | problem.schedule(block_rows, keys)
    ragged = S % keys != 0 or "key_lengths" in inputs

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = query_tiles - 1 - lax.axis_index("tile")  # the longest rows first
        first = block * block_rows
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None

        def walk_of(row, rows):
            return find_walk(
                refs, batch, head, block, problem.band, row, rows, key_end, keys, limit=query_end, ragged=ragged,
                one_loop=False,
            )  # fmt: skip

        walk = walk_of(first, block_rows)

        def compute(group):
            mine = Rows.of(problem, refs, NATIVE, batch, head, first + group * ROWS, ROWS)
            own = walk_of(mine.first, ROWS)
            out = _part(refs.out_acc, group, V)

            def step(n, carry, masked):
                top, total = carry
                last = key_end - 1 if ragged else None
                tile = mine.tile(head, own.tile(n) * keys, keys, masked=masked, last=last)
                tile = dataclasses.replace(tile, loaded=tile.load())
                plgpu.barrier_wait(refs.scores_ready.at[group])
                x, factor, _, _ = tile.exponents(_load(_part(refs.scores, group, keys)))
                seen = tile.seen() if masked else None
                if seen is not None:
                    x = jnp.where(seen, x, -jnp.inf)
                higher = jnp.maximum(top, x.max(axis=1) * factor)
                alpha = jnp.exp2(top - higher)
                p = jnp.exp2(x * factor - down(higher, x.shape))
                total = total * alpha + p.sum(axis=1)
                if problem.dropout_rate:
                    p = jnp.where(tile.kept(), p, 0.0)
                p = p.astype(dtype)

                @pl.when(n > own.start)
                def rescale():
                    plgpu.barrier_wait(refs.out_ready.at[group])
                    for start in range(0, V, width):
                        piece = out.at[:, pl.ds(start, width)]
                        plgpu.async_store_tmem(piece, _load(piece) * down(alpha, (ROWS, width)))

                plgpu.async_store_tmem(_part(refs.weights, group, keys), p)
                plgpu.commit_tmem()
                plgpu.barrier_arrive(refs.weights_ready.at[group])
                return higher, total

            # The sink is a key that was seen first and has no value.
            sink = jnp.maximum(refs.sinks[head], LOWEST) if "sinks" in refs else None
            carry = _row(LOWEST if sink is None else sink), _row(0.0 if sink is None else 1.0)
            top, total = go_through(own.sections(mine.first, ROWS), step, None, carry)
            pl.when(own.steps > 0)(lambda: plgpu.barrier_wait(refs.out_ready.at[group]))
            plgpu.barrier_wait(refs.query_ready)  # also where there was nothing to do, a copy may be under way

            lse = (top + jnp.log2(total)) * LN2
            inverse = jnp.where(total > 0, 1 / (total * problem.kept_rate), 0.0)
            if sink is None:  # total is 0 for a row that sees nothing
                lse = jnp.where(total > 0, lse, jnp.inf)
            if query_end is not None:
                inside = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=NATIVE.reduce(1)) < query_end - mine.first
                inverse = jnp.where(inside, inverse, 0.0)
                lse = jnp.where(inside, lse, jnp.inf if sink is None else sink * LN2)
            tile = refs.query_tile.at[group] if V == H else refs.out_tile.at[group]
            for start in range(0, V, 64):
                acc = _load(refs.out_acc.at[:, pl.ds(group * V + start, 64)])
                # Where nothing was added, tensor memory holds anything.
                acc = jnp.where(down(inverse, acc.shape) > 0, acc * down(inverse, acc.shape), 0.0)
                plgpu.store(tile.at[:, pl.ds(start, 64)], acc.astype(dtype), optimized=False)
            plgpu.store(refs.lse_tile.at[group], lse, optimized=False)
            plgpu.commit_smem()
            rows = pl.ds(mine.first, ROWS)
            plgpu.copy_smem_to_gmem(tile, refs.out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(refs.lse_tile.at[group], refs.lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def fetch():
            for group in range(groups):
                rows = pl.ds(first + group * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], refs.query_tile.at[group], refs.query_ready)

            def load(n, _):
                slot = lax.rem(n - walk.start, stages)
                there = (batch, pl.ds(walk.tile(n) * keys, keys), lax.div(head, jnp.int32(N // K)))
                for source, tiles, ready, free in (
                    (refs.key, refs.key_tiles, refs.key_ready, refs.key_free),
                    (refs.value, refs.value_tiles, refs.value_ready, refs.value_free),
                ):
                    pl.when(n - walk.start >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(source.at[there], tiles.at[slot], ready.at[slot])

            lax.fori_loop(walk.start, walk.end, load, None)

        def issue():
            owns = [walk_of(first + group * ROWS, ROWS) for group in range(groups)]
            within = lambda group, n: (n >= owns[group].start) & (n < owns[group].end)

            def score(group, n, slot):
                @pl.when(within(group, n))
                def _():
                    plgpu.tcgen05_mma(
                        _part(refs.scores, group, keys), refs.query_tile.at[group], refs.key_tiles.at[slot].T,
                        refs.scores_ready.at[group], accumulate=False,
                    )  # fmt: skip

            def step(n, _):
                slot, ahead, more = (
                    lax.rem(n - walk.start, stages),
                    lax.rem(n + 1 - walk.start, stages),
                    n + 1 < walk.end,
                )
                pl.when(more)(lambda: plgpu.barrier_wait(refs.key_ready.at[ahead]))
                plgpu.barrier_wait(refs.value_ready.at[slot])
                for group in range(groups):
                    pl.when(within(group, n))(functools.partial(plgpu.barrier_wait, refs.weights_ready.at[group]))
                    score(group, n + 1, ahead)

                    @pl.when(within(group, n))
                    def _(group=group):
                        plgpu.tcgen05_mma(
                            _part(refs.out_acc, group, V), _part(refs.weights, group, keys), refs.value_tiles.at[slot],
                            refs.out_ready.at[group], accumulate=n > owns[group].start,
                        )  # fmt: skip

                pl.when(more)(lambda: plgpu.tcgen05_commit_arrive(refs.key_free.at[ahead]))
                plgpu.tcgen05_commit_arrive(refs.value_free.at[slot])

            plgpu.barrier_wait(refs.query_ready)

            @pl.when(walk.steps > 0)
            def _():
                plgpu.barrier_wait(refs.key_ready.at[0])
                for group in range(groups):
                    score(group, walk.start, 0)
                plgpu.tcgen05_commit_arrive(refs.key_free.at[0])
                lax.fori_loop(walk.start, walk.end, step, None)

        return compute, fetch, issue

    out_tile = {"out_tile": smem(dtype, groups, ROWS, V)} if H != V else {}  # else it leaves through the query's
    result = _launch(
        kernel,
        "attention_forward",
        inputs,
        {
            "out": jax.ShapeDtypeStruct((*problem.operands["query"].shape[:3], V), dtype),
            "lse": jax.ShapeDtypeStruct((B, N, query_tiles * block_rows), jnp.float32),
        },
        out_tile
        | {
            "query_tile": smem(dtype, groups, ROWS, H),
            "lse_tile": plgpu.SMEM((groups, ROWS), jnp.float32),
            "key_tiles": smem(dtype, stages, keys, H),
            "value_tiles": smem(dtype, stages, keys, V),
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
        groups=groups,
    )
    return result["out"], result["lse"]


# ---- backward: two warpgroups share a block of 128 rows, each has half of the columns of every tile ----------------

HALVES = 2


def _in_turn(refs, steps, stages: int, score: Callable, use: Callable):
    """(before, after, issue) of a kernel whose every step multiplies twice: `score(slot)` makes what the warpgroups
    compute weights from, `use(slot, step)` multiplies by these.

    A warpgroup calls `before(step)` when it has computed its weights and `after()` when it has stored them.
    """

    def before(step):
        pl.when(step > 0)(lambda: plgpu.barrier_wait(refs.used))

    def after():
        plgpu.commit_tmem()
        plgpu.barrier_arrive(refs.weights_ready)

    def issue():
        def score_tile(step):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(refs.ready.at[slot])
            score(slot)
            plgpu.tcgen05_commit_arrive(refs.scores_ready)

        def body(step, _):
            ahead = lambda: pl.when(step + 1 < steps)(lambda: score_tile(step + 1))
            plgpu.barrier_wait(refs.weights_ready)
            if stages > 1:  # else the next tile waits for the memory of this one
                ahead()
            slot = lax.rem(step, stages)
            use(slot, step)
            plgpu.tcgen05_commit_arrive(refs.free.at[slot])
            plgpu.tcgen05_commit_arrive(refs.used)
            if stages == 1:
                ahead()

        plgpu.barrier_wait(refs.rows_ready)
        pl.when(steps > 0)(lambda: score_tile(jnp.int32(0)))
        lax.fori_loop(0, steps, body, None)

    return before, after, issue


def _turns(stages: int):
    return {
        "rows_ready": _fed(arrivals=2),
        "ready": _fed(stages, 2),
        "free": _ordered(stages),
        "scores_ready": _ordered(),
        "weights_ready": _ordered(arrivals=HALVES),
        "used": _ordered(),
    }


def backward_kv(problem: Problem, dout, lse, minus_delta, wanted: tuple[str, ...]):
    """{"key": dk, "value": dv} as far as `wanted`: keys stay, the queries of every head of the group stream by.

    Works on xᵀ = k qᵀ: pᵀ and dsᵀ are left operands as they are. lse is of base two and +inf for every query that
    attends to nothing, whole blocks of them.
    """
    B, T, S, N, K, H, V = problem.shape
    band, queries, dtype, heads = problem.band.transposed(), problem.tiles.queries_dkv, problem.dtype, N // K
    query_tiles, width = pl.cdiv(T, queries), queries // HALVES
    stages = min(problem.tiles.stages_backward, query_tiles * heads)
    inputs = by_keys(problem.operands) | problem.schedule(ROWS, queries, by_keys=True)
    inputs |= {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    sizes = {"key": H, "value": V}

    def kernel(refs):
        batch, head, block = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        first = block * ROWS
        here = batch, pl.ds(first, ROWS), head
        query_end, key_end = query_tiles * queries, refs.key_lengths[batch] if "key_lengths" in refs else None
        if "query_lengths" in refs:
            query_end = pl.cdiv(refs.query_lengths[batch], jnp.int32(queries)) * queries

        def walk_of(member):
            return find_walk(
                refs, batch, head * heads + member, block, band, first, ROWS, query_end, queries, limit=key_end,
                ragged=False, one_loop=False,
            )  # fmt: skip

        steps = lax.fori_loop(0, heads, lambda member, sum: sum + walk_of(member).steps, jnp.int32(0))

        def score(slot):
            plgpu.tcgen05_mma(refs.scores, refs.key_tile, refs.query_tiles.at[slot].T, accumulate=False)
            if "key" in wanted:
                plgpu.tcgen05_mma(refs.dscores, refs.value_tile, refs.dout_tiles.at[slot].T, accumulate=False)

        def use(slot, step):
            if "value" in wanted:
                plgpu.tcgen05_mma(refs.value_sum, refs.weights, refs.dout_tiles.at[slot], accumulate=step > 0)
            if "key" in wanted:
                plgpu.tcgen05_mma(refs.key_sum, refs.dweights, refs.query_tiles.at[slot], accumulate=step > 0)

        before, after, issue = _in_turn(refs, steps, stages, score, use)

        def compute(half):
            mine = Rows.of(problem, refs, NATIVE, batch, head, first, ROWS, by_keys=True)

            def per_member(member, done):
                walk, one = walk_of(member), head * heads + member

                def step(n, _, masked):
                    start, shape = walk.tile(n) * queries + half * width, (ROWS, width)
                    columns = pl.ds(start, width)
                    column = lambda ref: across(
                        plgpu.load(ref.at[batch, one, columns], layout=NATIVE.reduce(0), optimized=False), shape
                    )
                    tile = mine.tile(one, start, width, masked=masked)
                    tile = dataclasses.replace(tile, loaded=tile.load())
                    plgpu.barrier_wait(refs.scores_ready)
                    s = _load(_part(refs.scores, half, width))
                    x, factor, of_mod, of_cap = tile.exponents(s, slopes="key" in wanted)
                    row_lse = column(refs.lse)
                    p, seen = jnp.exp2(x * factor - row_lse), tile.seen() if masked else None
                    if problem.score_mod is not None:  # beyond the last query it may give anything
                        inside = row_lse < jnp.inf
                        seen = inside if seen is None else seen & inside
                    p = p if seen is None else jnp.where(seen, p, 0.0)
                    kept = tile.kept() if problem.dropout_rate else None
                    ds = None
                    if "key" in wanted:
                        dp = _load(_part(refs.dscores, half, width))
                        if kept is not None:
                            dp = jnp.where(kept, dp * (1 / problem.kept_rate), 0.0)
                        ds = p * (dp + column(refs.minus_delta))
                        if of_mod is not None:
                            ds = ds * (of_mod if seen is None else jnp.where(seen, of_mod, 0.0))
                        ds = ds if of_cap is None else ds * of_cap
                    before(done + n - walk.start)
                    if "value" in wanted:
                        weights = p if kept is None else jnp.where(kept, p, 0.0)
                        plgpu.async_store_tmem(_part(refs.weights, half, width), weights.astype(dtype))
                    if ds is not None:
                        plgpu.async_store_tmem(_part(refs.dweights, half, width), ds.astype(dtype))
                    after()

                go_through(walk.sections(first, ROWS), step, None, None)
                return done + walk.steps

            lax.fori_loop(0, heads, per_member, jnp.int32(0))
            pl.when(steps > 0)(lambda: plgpu.barrier_wait(refs.used))
            plgpu.barrier_wait(refs.rows_ready)  # also where there was nothing to do, a copy may be under way
            for number, name in enumerate(wanted):

                @pl.when(half == number)
                def _(name=name):
                    tile, sums = getattr(refs, f"{name}_tile"), getattr(refs, f"{name}_sum")
                    factor = problem.scale if name == "key" else 1 / problem.kept_rate
                    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=NATIVE)
                    for start in range(0, sizes[name], 64):
                        # Where nothing was added, tensor memory holds anything.
                        total = jnp.where(
                            jnp.broadcast_to(steps > 0, (ROWS, 64)), _load(sums.at[:, pl.ds(start, 64)]) * factor, 0.0
                        )
                        if key_end is not None:
                            total = jnp.where(row < key_end - first, total, 0.0)
                        plgpu.store(tile.at[:, pl.ds(start, 64)], total.astype(dtype), optimized=False)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(tile, getattr(refs, f"d{name}").at[here])
                    plgpu.wait_smem_to_gmem(0)

        def fetch():
            plgpu.copy_gmem_to_smem(refs.key.at[here], refs.key_tile, refs.rows_ready)
            plgpu.copy_gmem_to_smem(refs.value.at[here], refs.value_tile, refs.rows_ready)

            def per_member(member, done):
                walk, one = walk_of(member), head * heads + member

                def load(n, _):
                    number, rows = done + n - walk.start, pl.ds(walk.tile(n) * queries, queries)
                    slot = lax.rem(number, stages)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                    ready = refs.ready.at[slot]
                    plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, one], refs.query_tiles.at[slot], ready)
                    plgpu.copy_gmem_to_smem(refs.dout.at[batch, rows, one], refs.dout_tiles.at[slot], ready)

                lax.fori_loop(walk.start, walk.end, load, None)
                return done + walk.steps

            lax.fori_loop(0, heads, per_member, jnp.int32(0))

        return compute, fetch, issue

    memory = {"scores": plgpu.TMEM((ROWS, queries), jnp.float32)}
    if "value" in wanted:
        memory |= {"weights": plgpu.TMEM((ROWS, queries), dtype, packed=True)}
    if "key" in wanted:
        memory |= {
            "dscores": plgpu.TMEM((ROWS, queries), jnp.float32),
            "dweights": plgpu.TMEM((ROWS, queries), dtype, packed=True),
        }
    memory |= {f"{name}_sum": plgpu.TMEM((ROWS, sizes[name]), jnp.float32) for name in wanted}
    result = _launch(
        kernel,
        "attention_backward_" + "_".join(wanted),
        inputs,
        {f"d{name}": jax.ShapeDtypeStruct(problem.operands[name].shape, dtype) for name in wanted},
        {
            "key_tile": smem(dtype, ROWS, H),
            "value_tile": smem(dtype, ROWS, V),
            "query_tiles": smem(dtype, stages, queries, H),
            "dout_tiles": smem(dtype, stages, queries, V),
        }
        | _turns(stages)
        | memory,
        (K, pl.cdiv(S, ROWS), B),
        groups=HALVES,
    )
    return {name: result[f"d{name}"] for name in wanted}


def backward_q(problem: Problem, dout, lse, minus_delta, wanted: str):
    """`wanted` "query": dq. `wanted` "bias": its gradient [batch, heads, queries, keys], float32, over whole tiles.

    Queries stay, keys stream by. A kernel of its own for the bias: its gradient is as large as the scores, and the
    compiler drops it where nobody asks for it.
    """
    B, T, S, N, K, H, V = problem.shape
    keys, dtype = problem.tiles.keys_dq, problem.dtype
    key_tiles, query_tiles, width = pl.cdiv(S, keys), pl.cdiv(T, ROWS), keys // HALVES
    stages = min(problem.tiles.stages_backward, key_tiles)
    dense = wanted == "bias"  # every tile is written
    inputs = problem.operands | {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    if not dense:
        inputs |= problem.schedule(ROWS, keys)
    ragged = S % keys != 0 or "key_lengths" in inputs

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = query_tiles - 1 - lax.axis_index("tile")
        first = block * ROWS
        rows = pl.ds(first, ROWS)
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None
        walk = walk_of_all(key_tiles) if dense else find_walk(
            refs, batch, head, block, problem.band, first, ROWS, key_end, keys, limit=query_end, ragged=ragged,
            one_loop=False,
        )  # fmt: skip

        def score(slot):
            plgpu.tcgen05_mma(refs.scores, refs.query_tile, refs.key_tiles.at[slot].T, accumulate=False)
            plgpu.tcgen05_mma(refs.dscores, refs.dout_tile, refs.value_tiles.at[slot].T, accumulate=False)

        def use(slot, step):
            if not dense:
                plgpu.tcgen05_mma(refs.query_sum, refs.dweights, refs.key_tiles.at[slot], accumulate=step > 0)

        before, after, issue = _in_turn(refs, walk.steps, stages, score, use)

        def compute(half):
            mine = Rows.of(problem, refs, NATIVE, batch, head, first, ROWS)
            load_row = lambda ref: plgpu.load(ref.at[batch, head, rows], layout=NATIVE.reduce(1), optimized=False)
            row_lse, row_minus_delta = load_row(refs.lse), load_row(refs.minus_delta)

            def step(n, _, masked):
                column, shape = walk.tile(n) * keys + half * width, (ROWS, width)
                tile = mine.tile(head, column, width, masked=masked, last=key_end - 1 if ragged else None)
                tile = dataclasses.replace(tile, loaded=tile.load())
                plgpu.barrier_wait(refs.scores_ready)
                x, factor, of_mod, of_cap = tile.exponents(_load(_part(refs.scores, half, width)), slopes=True)
                p = jnp.exp2(x * factor - down(row_lse, shape))
                dp = _load(_part(refs.dscores, half, width))
                if problem.dropout_rate:
                    dp = jnp.where(tile.kept(), dp * (1 / problem.kept_rate), 0.0)
                dx = p * (dp + down(row_minus_delta, shape))
                for slope in (of_mod,) if dense else (of_mod, of_cap):
                    dx = dx if slope is None else dx * slope
                seen = tile.seen() if masked else None
                if seen is not None:
                    dx = jnp.where(seen, dx, 0.0)
                before(n - walk.start)
                if dense:
                    plgpu.store(refs.dx.at[batch, head, rows, pl.ds(column, width)], dx, optimized=False)
                else:
                    plgpu.async_store_tmem(_part(refs.dweights, half, width), dx.astype(dtype))
                after()

            go_through(walk.sections(first, ROWS), step, None, None)
            pl.when(walk.steps > 0)(lambda: plgpu.barrier_wait(refs.used))
            plgpu.barrier_wait(refs.rows_ready)  # also where there was nothing to do, a copy may be under way
            if dense:
                return

            @pl.when(half == 0)
            def _():
                for start in range(0, H, 64):
                    # Where nothing was added, tensor memory holds anything.
                    dq = jnp.where(
                        jnp.broadcast_to(walk.steps > 0, (ROWS, 64)),
                        _load(refs.query_sum.at[:, pl.ds(start, 64)]) * problem.scale,
                        0.0,
                    )
                    plgpu.store(refs.query_tile.at[:, pl.ds(start, 64)], dq.astype(dtype), optimized=False)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(refs.query_tile, refs.dquery.at[batch, rows, head])
                plgpu.wait_smem_to_gmem(0)

        def fetch():
            plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], refs.query_tile, refs.rows_ready)
            plgpu.copy_gmem_to_smem(refs.dout.at[batch, rows, head], refs.dout_tile, refs.rows_ready)

            def load(step, _):
                slot = lax.rem(step, stages)
                there = batch, pl.ds(walk.tile(step + walk.start) * keys, keys), lax.div(head, jnp.int32(N // K))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                plgpu.copy_gmem_to_smem(refs.key.at[there], refs.key_tiles.at[slot], refs.ready.at[slot])
                plgpu.copy_gmem_to_smem(refs.value.at[there], refs.value_tiles.at[slot], refs.ready.at[slot])

            lax.fori_loop(0, walk.steps, load, None)

        return compute, fetch, issue

    memory = {"scores": plgpu.TMEM((ROWS, keys), jnp.float32), "dscores": plgpu.TMEM((ROWS, keys), jnp.float32)}
    if dense:
        result = {"dx": jax.ShapeDtypeStruct((B, N, query_tiles * ROWS, key_tiles * keys), jnp.float32)}
    else:
        result = {"dquery": jax.ShapeDtypeStruct(problem.operands["query"].shape, dtype)}
        memory |= {
            "dweights": plgpu.TMEM((ROWS, keys), dtype, packed=True),
            "query_sum": plgpu.TMEM((ROWS, H), jnp.float32),
        }
    (result,) = _launch(
        kernel,
        f"attention_backward_{wanted}",
        inputs,
        result,
        {
            "query_tile": smem(dtype, ROWS, H),
            "dout_tile": smem(dtype, ROWS, V),
            "key_tiles": smem(dtype, stages, keys, H),
            "value_tiles": smem(dtype, stages, keys, V),
        }
        | _turns(stages)
        | memory,
        (N, query_tiles, B),
        groups=HALVES,
    ).values()
    return result
