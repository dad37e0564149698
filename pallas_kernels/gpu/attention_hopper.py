"""The attention kernels of Hopper GPUs: warpgroup matrix products (wgmma) fed by TMA.

After FlashAttention-3 (Shah et al., 2024): two consumer warpgroups of 64 rows each take turns at the tensor cores, one
producer warpgroup streams tiles through shared memory.

The kernels are written so that the interpreter runs the very text that the compiler compiles:
- An accumulator starts from what is added to the product anyway (acc · alpha, -delta) where that spares registers: from
  zeros it starts at no cost. A product that only accumulates keeps its accumulator for the loop.
- Both warpgroups observe every phase of every barrier, also for tiles that only the other one needs.
- Ragged edges are left to the copies, which read zeros and drop writes out of bounds.
"""

import dataclasses

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

ROWS = 64  # rows of one warpgroup: the height of a wgmma
CONSUMERS = 2
BLOCK = ROWS * CONSUMERS
WGMMA = plgpu.Layout.WGMMA


def _products(*pairs):
    """The float32 products of (lhs, rhs) pairs, or (lhs, rhs, start) for start + product, issued together."""

    def body(*accs):
        for acc, (_, _, *start) in zip(accs, pairs, strict=True):
            if start:
                acc[...] = start[0]
        for acc, (lhs, rhs, *_) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, lhs, rhs)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(body, *(plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32) for lhs, rhs, *_ in pairs))


def _sum_of_columns(x, width: int):
    """`width` columns, each the sum of every so many-th of x: sums across threads are left to the end of the loop."""
    parts = [lax.slice(x, (0, start), (x.shape[0], start + width)) for start in range(0, x.shape[1], width)]
    while len(parts) > 1:  # in pairs: rounding errors stay few
        parts = [sum(pair[1:], pair[0]) for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))]
    return parts[0]


def _anew(group):
    """`group`, computed in the step that asks: addresses of what stays, known before the loop, would take registers."""
    return lax.optimization_barrier(group)


def _launch(kernel, *call):
    """`kernel(refs)` returns what a consumer warpgroup (given its number) and the producer do."""

    def body(refs):
        consumer, producer = kernel(refs)
        group = lax.axis_index("group")

        @pl.when(group < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            consumer(group)

        @pl.when(group == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            producer()

    return launch(
        *(body, *call),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _barriers(stages, arrivals=1):
    return plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals)


def forward(problem: Problem):
    """(out, lse), out with the padded head size, lse of base e over whole blocks of queries."""
    B, T, S, N, K, H, V = problem.shape
    keys, dtype = problem.tiles.keys, problem.dtype
    stages, query_tiles, wide = min(problem.tiles.stages, pl.cdiv(S, keys)), pl.cdiv(T, BLOCK), max(H, V) > 128
    inputs = problem.operands | problem.schedule(BLOCK, keys)
    ragged = S % keys != 0 or "key_lengths" in inputs
    width = V if V <= 128 else 64  # of one rescaled product: [64, 256] twice would not fit the registers
    pieces = [pl.ds(start, width) for start in range(0, V, width)]

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = query_tiles - 1 - lax.axis_index("tile")  # the longest rows first
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None
        walk = find_walk(
            refs, batch, head, block, problem.band, block * BLOCK, BLOCK, key_end, keys, limit=query_end,
            ragged=ragged, one_loop=wide,
        )  # fmt: skip

        def consumer(group):
            first = block * BLOCK + group * ROWS
            rows = pl.ds(first, ROWS)
            query, out = refs.query_tile.at[group], (refs.query_tile if H == V else refs.out_tile).at[group]
            plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], query, refs.query_ready.at[group])
            mine = Rows.of(problem, refs, WGMMA, batch, head, first, ROWS)
            plgpu.barrier_wait(refs.query_ready.at[group])

            def swap_turns():  # the other warpgroup's products run under this one's softmax
                plgpu.barrier_arrive(refs.turn)
                plgpu.barrier_wait(refs.turn)

            def step(n, carry, masked):
                accs, top, total = carry
                slot, shape = lax.rem(n - walk.start, stages), (ROWS, keys)
                tile = mine.tile(head, walk.tile(n) * keys, keys, masked=masked, last=key_end - 1 if ragged else None)
                plgpu.barrier_wait(refs.ready.at[slot])

                def scores(acc):
                    plgpu.wgmma(acc, query, refs.key_tiles.at[slot].T)
                    loaded = tile.load()  # while the product runs
                    swap_turns()
                    return acc[...], loaded

                s, loaded = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
                tile = dataclasses.replace(tile, loaded=loaded)
                plgpu.barrier_arrive(refs.key_free.at[slot])
                x, factor, _, _ = tile.exponents(s)
                seen = tile.seen() if masked else None
                if seen is not None:
                    x = jnp.where(seen, x, -jnp.inf)
                higher = jnp.maximum(top, x.max(axis=1) * factor)
                alpha = jnp.exp2(top - higher)
                p = jnp.exp2(x * factor - down(higher, shape))
                total = total * down(alpha, total.shape) + _sum_of_columns(p, 8)
                if problem.dropout_rate:
                    p = jnp.where(tile.kept(), p, 0.0)
                p = p.astype(dtype)
                swap_turns()
                scaled = []
                for acc, piece in zip(accs, pieces, strict=True):
                    scaled += _products((p, refs.value_tiles.at[slot, :, piece], acc * down(alpha, acc.shape)))
                plgpu.barrier_arrive(refs.value_free.at[slot])
                return tuple(scaled), higher, total

            def skip(n, _):
                slot = lax.rem(n - walk.start, stages)
                plgpu.barrier_wait(refs.ready.at[slot])
                for free in (refs.key_free, refs.value_free):
                    plgpu.barrier_arrive(free.at[slot])
                    swap_turns()

            row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))
            zeros = tuple(plgpu.layout_cast(jnp.zeros((ROWS, piece.size), jnp.float32), WGMMA) for piece in pieces)
            # The sink is a key that was seen first and has no value.
            sink = jnp.maximum(refs.sinks[head], LOWEST) if "sinks" in refs else None
            none = plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), WGMMA)
            carry = zeros, row(LOWEST if sink is None else sink), none
            pl.when(group == 1)(swap_turns)
            accs, top, total = go_through(walk.sections(first, ROWS), step, skip, carry)
            pl.when(group == 0)(swap_turns)
            total = total.sum(axis=1)
            if sink is not None:
                total += jnp.exp2(sink - top)

            lse = (top + jnp.log2(total)) * LN2
            inverse = jnp.where(total > 0, 1 / (total * problem.kept_rate), 0.0)
            if sink is None:  # total is 0 for a row that sees nothing
                lse = jnp.where(total > 0, lse, jnp.inf)
            if query_end is not None:
                inside = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1)) < query_end - first
                inverse = jnp.where(inside, inverse, 0.0)
                lse = jnp.where(inside, lse, jnp.inf if sink is None else sink * LN2)
            for acc, piece in zip(accs, pieces, strict=True):
                out[:, piece] = (acc * down(inverse, acc.shape)).astype(dtype)
            refs.lse_tile[group] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, refs.out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(refs.lse_tile.at[group], refs.lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(n, _):
                slot = lax.rem(n - walk.start, stages)
                there = (batch, pl.ds(walk.tile(n) * keys, keys), lax.div(head, jnp.int32(N // K)))
                for source, tiles, free in (
                    (refs.key, refs.key_tiles, refs.key_free),
                    (refs.value, refs.value_tiles, refs.value_free),
                ):
                    pl.when(n - walk.start >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(source.at[there], tiles.at[slot], refs.ready.at[slot])

            lax.fori_loop(walk.start, walk.end, load, None)

        return consumer, producer

    out_tile = {"out_tile": smem(dtype, CONSUMERS, ROWS, V)} if H != V else {}  # else it leaves through the query's
    result = _launch(
        kernel,
        "attention_forward",
        inputs,
        {
            "out": jax.ShapeDtypeStruct((*problem.operands["query"].shape[:3], V), dtype),
            "lse": jax.ShapeDtypeStruct((B, N, query_tiles * BLOCK), jnp.float32),
        },
        out_tile
        | {
            "query_tile": smem(dtype, CONSUMERS, ROWS, H),
            "lse_tile": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            "key_tiles": smem(dtype, stages, keys, H),
            "value_tiles": smem(dtype, stages, keys, V),
            "query_ready": _barriers(CONSUMERS),
            "ready": _barriers(stages, 2),
            "key_free": _barriers(stages, CONSUMERS),
            "value_free": _barriers(stages, CONSUMERS),
            "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
        },
        (N, query_tiles, B),
    )
    return result["out"], result["lse"]


def backward_kv(problem: Problem, dout, lse, minus_delta, wanted: tuple[str, ...]):
    """{"key": dk, "value": dv} as far as `wanted`: keys stay, the queries of every head of the group stream by.

    Works on xᵀ = k qᵀ: pᵀ and dsᵀ are left operands as they are. lse is of base two and +inf for every query that
    attends to nothing, whole blocks of them.
    """
    B, T, S, N, K, H, V = problem.shape
    band, queries, dtype, heads = problem.band.transposed(), problem.tiles.queries_dkv, problem.dtype, N // K
    query_tiles, wide, tight = pl.cdiv(T, queries), max(H, V) > 128, H + V > 128
    stages = min(problem.tiles.stages_backward, query_tiles * heads)
    inputs = by_keys(problem.operands) | problem.schedule(BLOCK, queries, by_keys=True)
    inputs |= {"dout": dout, "lse": lse, "minus_delta": minus_delta}

    def kernel(refs):
        batch, head, block = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        query_end, key_end = query_tiles * queries, refs.key_lengths[batch] if "key_lengths" in refs else None
        if "query_lengths" in refs:
            query_end = pl.cdiv(refs.query_lengths[batch], jnp.int32(queries)) * queries

        def walk_of(member):
            return find_walk(
                refs, batch, head * heads + member, block, band, block * BLOCK, BLOCK, query_end, queries,
                limit=key_end, ragged=False, one_loop=wide,
            )  # fmt: skip

        def consumer(group):
            first = block * BLOCK + group * ROWS
            rows = pl.ds(first, ROWS)
            here = (batch, rows, head)
            key, value = refs.key_tile.at[group], refs.value_tile.at[group]
            plgpu.copy_gmem_to_smem(refs.key.at[here], key, refs.key_value_ready.at[group])
            plgpu.copy_gmem_to_smem(refs.value.at[here], value, refs.key_value_ready.at[group])
            mine = Rows.of(problem, refs, WGMMA, batch, head, first, ROWS, by_keys=True)
            plgpu.barrier_wait(refs.key_value_ready.at[group])

            def accumulate(**sums):
                def per_member(member, before):
                    walk, one = walk_of(member), head * heads + member

                    def step(n, _, masked):
                        slot, shape = lax.rem(before + n - walk.start, stages), (ROWS, queries)
                        tile = mine.tile(one, walk.tile(n) * queries, queries, masked=masked)
                        plgpu.barrier_wait(refs.ready.at[slot])
                        column = lambda ref: across(plgpu.load(ref.at[slot], layout=WGMMA.reduce(0)), shape)
                        query, dout = refs.query_tiles.at[slot], refs.dout_tiles.at[slot]
                        mine_now = _anew(group) if tight else group
                        key, value = refs.key_tile.at[mine_now], refs.value_tile.at[mine_now]
                        (s,) = _products((key, query.T))
                        tile = dataclasses.replace(tile, loaded=tile.load())
                        x, factor, of_mod, of_cap = tile.exponents(s, slopes="key" in sums)
                        row_lse = column(refs.lse_tiles)
                        p, seen = jnp.exp2(x * factor - row_lse), tile.seen() if masked else None
                        if problem.score_mod is not None:  # beyond the last query it may give anything
                            inside = row_lse < jnp.inf
                            seen = inside if seen is None else seen & inside
                        p = p if seen is None else jnp.where(seen, p, 0.0)
                        kept = tile.kept() if problem.dropout_rate else None
                        weight = p  # times the slopes now: later, they would hold registers
                        if of_mod is not None:
                            weight = weight * (of_mod if seen is None else jnp.where(seen, of_mod, 0.0))
                        weight = weight if of_cap is None else weight * of_cap
                        if "value" in sums:
                            plgpu.wgmma(
                                sums["value"], (p if kept is None else jnp.where(kept, p, 0.0)).astype(dtype), dout
                            )
                        if "key" in sums:
                            minus_delta = column(refs.minus_delta_tiles)
                            if kept is None:
                                (dp,) = _products((value, dout.T, minus_delta))
                            else:
                                (dp,) = _products((value, dout.T))
                                dp = jnp.where(kept, dp * (1 / problem.kept_rate), 0.0) + minus_delta
                            plgpu.wgmma(sums["key"], (weight * dp).astype(dtype), query)
                        plgpu.wgmma_wait(0)
                        plgpu.commit_smem()  # orders the loads of lse and delta before the copies that overwrite them
                        plgpu.barrier_arrive(refs.free.at[slot])

                    def skip(n, _):
                        slot = lax.rem(before + n - walk.start, stages)
                        plgpu.barrier_wait(refs.ready.at[slot])
                        plgpu.barrier_arrive(refs.free.at[slot])

                    go_through(walk.sections(block * BLOCK, BLOCK), step, skip, None)
                    return before + walk.steps

                lax.fori_loop(0, heads, per_member, jnp.int32(0))
                return {name: acc[...] for name, acc in sums.items()}

            widths = {"key": H, "value": V}
            sums = pl.run_scoped(accumulate, **{name: plgpu.ACC((ROWS, widths[name]), jnp.float32) for name in wanted})
            for name, tile, factor in (("key", key, problem.scale), ("value", value, 1 / problem.kept_rate)):
                if name in wanted:
                    total = sums[name] if factor == 1 else sums[name] * factor
                    if key_end is not None:
                        inside = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=WGMMA) < key_end - first
                        total = jnp.where(inside, total, 0.0)
                    tile[...] = total.astype(dtype)
            plgpu.commit_smem()
            for name, tile in (("key", key), ("value", value)):
                if name in wanted:
                    plgpu.copy_smem_to_gmem(tile, getattr(refs, f"d{name}").at[here])
            plgpu.wait_smem_to_gmem(0)

        def producer():
            def per_member(member, before):
                walk, one = walk_of(member), head * heads + member

                def load(n, _):
                    number = before + n - walk.start
                    slot, rows = lax.rem(number, stages), pl.ds(walk.tile(n) * queries, queries)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                    for source, tiles in (
                        (refs.query.at[batch, rows, one], refs.query_tiles),
                        (refs.dout.at[batch, rows, one], refs.dout_tiles),
                        (refs.lse.at[batch, one, rows], refs.lse_tiles),
                        (refs.minus_delta.at[batch, one, rows], refs.minus_delta_tiles),
                    ):
                        plgpu.copy_gmem_to_smem(source, tiles.at[slot], refs.ready.at[slot])

                lax.fori_loop(walk.start, walk.end, load, None)
                return before + walk.steps

            lax.fori_loop(0, heads, per_member, jnp.int32(0))

        return consumer, producer

    result = _launch(
        kernel,
        "attention_backward_" + "_".join(wanted),
        inputs,
        {f"d{name}": jax.ShapeDtypeStruct(problem.operands[name].shape, dtype) for name in wanted},
        {
            "key_tile": smem(dtype, CONSUMERS, ROWS, H),
            "value_tile": smem(dtype, CONSUMERS, ROWS, V),
            "query_tiles": smem(dtype, stages, queries, H),
            "dout_tiles": smem(dtype, stages, queries, V),
            "lse_tiles": plgpu.SMEM((stages, queries), jnp.float32),
            "minus_delta_tiles": plgpu.SMEM((stages, queries), jnp.float32),
            "key_value_ready": _barriers(CONSUMERS, 2),
            "ready": _barriers(stages, 4),
            "free": _barriers(stages, CONSUMERS),
        },
        (K, pl.cdiv(S, BLOCK), B),
    )
    return {name: result[f"d{name}"] for name in wanted}


def backward_q(problem: Problem, dout, lse, minus_delta, wanted: str):
    """`wanted` "query": dq. `wanted` "bias": its gradient [batch, heads, queries, keys], float32, over whole tiles.

    Queries stay, keys stream by. A kernel of its own for the bias: its gradient is as large as the scores, and the
    compiler drops it where nobody asks for it.
    """
    B, T, S, N, K, H, V = problem.shape
    keys, dtype, wide, tight = problem.tiles.keys_dq, problem.dtype, max(H, V) > 128, H + V > 128
    key_tiles, query_tiles = pl.cdiv(S, keys), pl.cdiv(T, BLOCK)
    stages = min(problem.tiles.stages_backward, key_tiles)
    dense = wanted == "bias"  # every tile is written
    inputs = problem.operands | {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    if not dense:
        inputs |= problem.schedule(BLOCK, keys)
    ragged = S % keys != 0 or "key_lengths" in inputs

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = query_tiles - 1 - lax.axis_index("tile")
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None
        walk = walk_of_all(key_tiles) if dense else find_walk(
            refs, batch, head, block, problem.band, block * BLOCK, BLOCK, key_end, keys, limit=query_end, ragged=ragged,
            one_loop=wide,
        )  # fmt: skip

        def consumer(group):
            first = block * BLOCK + group * ROWS
            rows = pl.ds(first, ROWS)
            query, dout = refs.query_tile.at[group], refs.dout_tile.at[group]
            plgpu.copy_gmem_to_smem(refs.query.at[batch, rows, head], query, refs.query_ready.at[group])
            plgpu.copy_gmem_to_smem(refs.dout.at[batch, rows, head], dout, refs.query_ready.at[group])
            mine = Rows.of(problem, refs, WGMMA, batch, head, first, ROWS)
            load_row = lambda ref: plgpu.load(ref.at[batch, head, rows], layout=WGMMA.reduce(1), optimized=False)
            row_lse, row_minus_delta = load_row(refs.lse), load_row(refs.minus_delta)
            plgpu.barrier_wait(refs.query_ready.at[group])

            def accumulate(*dq):
                def step(n, _, masked):
                    slot, shape = lax.rem(n - walk.start, stages), (ROWS, keys)
                    column = walk.tile(n) * keys
                    tile = mine.tile(head, column, keys, masked=masked, last=key_end - 1 if ragged else None)
                    plgpu.barrier_wait(refs.ready.at[slot])
                    key, value = refs.key_tiles.at[slot], refs.value_tiles.at[slot]
                    mine_now = _anew(group) if tight else group
                    query, dout = refs.query_tile.at[mine_now], refs.dout_tile.at[mine_now]
                    minus_delta = down(row_minus_delta, shape)
                    early = (minus_delta,) if tight and not problem.dropout_rate else ()
                    s, dp = _products((query, key.T), (dout, value.T, *early))
                    tile = dataclasses.replace(tile, loaded=tile.load())
                    x, factor, of_mod, of_cap = tile.exponents(s, slopes=True)
                    p = jnp.exp2(x * factor - down(row_lse, shape))
                    if problem.dropout_rate:
                        dp = jnp.where(tile.kept(), dp * (1 / problem.kept_rate), 0.0)
                    if not early:
                        dp = dp + minus_delta
                    dx = p * dp
                    for slope in (of_mod,) if dense else (of_mod, of_cap):
                        dx = dx if slope is None else dx * slope
                    seen = tile.seen() if masked else None
                    if seen is not None:
                        dx = jnp.where(seen, dx, 0.0)
                    if dense:
                        columns = pl.ds(column, keys)
                        plgpu.store(refs.dx.at[batch, head, rows, columns], dx, optimized=False)
                    else:
                        plgpu.wgmma(dq[0], dx.astype(dtype), key)
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(refs.free.at[slot])

                def skip(n, _):
                    slot = lax.rem(n - walk.start, stages)
                    plgpu.barrier_wait(refs.ready.at[slot])
                    plgpu.barrier_arrive(refs.free.at[slot])

                go_through(walk.sections(first, ROWS), step, skip, None)
                return [acc[...] for acc in dq]

            if dense:
                accumulate()
            else:
                (dq,) = pl.run_scoped(accumulate, plgpu.ACC((ROWS, H), jnp.float32))
                query[...] = (dq * problem.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query, refs.dquery.at[batch, rows, head])
                plgpu.wait_smem_to_gmem(0)

        def producer():
            def load(n, _):
                slot = lax.rem(n - walk.start, stages)
                there = (batch, pl.ds(walk.tile(n) * keys, keys), lax.div(head, jnp.int32(N // K)))
                pl.when(n - walk.start >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                plgpu.copy_gmem_to_smem(refs.key.at[there], refs.key_tiles.at[slot], refs.ready.at[slot])
                plgpu.copy_gmem_to_smem(refs.value.at[there], refs.value_tiles.at[slot], refs.ready.at[slot])

            lax.fori_loop(walk.start, walk.end, load, None)

        return consumer, producer

    result = (
        {"dx": jax.ShapeDtypeStruct((B, N, query_tiles * BLOCK, key_tiles * keys), jnp.float32)}
        if dense
        else {"dquery": jax.ShapeDtypeStruct(problem.operands["query"].shape, dtype)}
    )
    return _launch(
        kernel,
        f"attention_backward_{wanted}",
        inputs,
        result,
        {
            "query_tile": smem(dtype, CONSUMERS, ROWS, H),
            "dout_tile": smem(dtype, CONSUMERS, ROWS, V),
            "key_tiles": smem(dtype, stages, keys, H),
            "value_tiles": smem(dtype, stages, keys, V),
            "query_ready": _barriers(CONSUMERS, 2),
            "ready": _barriers(stages, 2),
            "free": _barriers(stages, CONSUMERS),
        },
        (N, query_tiles, B),
    )[next(iter(result))]
