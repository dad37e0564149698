"""The attention kernels of Ampere GPUs: warp matrix products (mma) from registers, tiles copied by cp.async.

After FlashAttention-2 (Dao, 2023): one warpgroup of 64 rows per block, several blocks per core to hide each other's
latencies. What streams by is fetched a step ahead. Copies do not know bounds: sequences are filled up to whole tiles.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
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
from pallas_kernels.padding import pad_to, round_up

BLOCK = 64  # rows
LAYOUT = plgpu.Layout.WGMMA  # of scores and accumulators: that of mma's results, too


def _left(x):
    """Columns of a tile of results as the left operand of the next product: the same threads hold the same elements."""

    layout = plgpu.Layout.MMA_LHS(x.dtype)

    def regrouped(_, x):
        registers = x.registers.reshape(layout.to_mgpu().registers_shape(x.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=x.is_signed)

    regrouped.meaning = lambda x: x  # type: ignore[attr-defined]  # what the interpreter does instead
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)
    return plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=result)(regrouped)(x)


def _product(left, right, start=None):
    """start + left · right; `left` in shared memory or a tile of results, `right` in shared memory."""
    shape = left.shape[0], right.shape[1]
    acc = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT) if start is None else start
    in_memory = not isinstance(left, jax.Array)
    width = 64 if in_memory else 16  # a row of a swizzled tile, or the depth of one mma, to have few in registers
    for k in range(0, right.shape[0], width):
        if in_memory:
            a = plgpu.load(left.at[:, pl.ds(k, width)], layout=plgpu.Layout.MMA_LHS(left.dtype))
        else:
            a = _left(lax.slice(left, (0, k), (shape[0], k + width)))
        b = plgpu.load(right.at[pl.ds(k, width)], layout=plgpu.Layout.MMA_RHS(right.dtype))
        acc = plgpu.mma(acc, a, b)
    return acc


def _fetch(source, target):
    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def _launch(*call):
    options = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return launch(*call, compiler_params=options)


def _whole(operands: dict[str, jax.Array], rows: int, columns: int) -> dict[str, jax.Array]:
    """The operands with the sequences filled up to whole blocks of queries and of keys, [batch, length, heads · size]:
    copies take matrices."""
    sizes = {"query": rows, "dout": rows, "key": columns, "value": columns}
    found = {name: (operands[name], size) for name, size in sizes.items() if name in operands}
    return operands | {
        name: pad_to(x, 1, round_up(x.shape[1], size)).reshape(x.shape[0], -1, x.shape[2] * x.shape[3])
        for name, (x, size) in found.items()
    }


def _row(value):
    return plgpu.layout_cast(jnp.full((BLOCK,), value, jnp.float32), LAYOUT.reduce(1))


def forward(problem: Problem):
    """(out, lse) over whole blocks of queries, out with the padded head size, lse of base e."""
    B, T, S, N, K, H, V = problem.shape
    keys, dtype = problem.tiles.keys, problem.dtype
    query_tiles, key_tiles, wide = pl.cdiv(T, BLOCK), pl.cdiv(S, keys), max(H, V) > 128
    inputs = _whole(problem.operands, BLOCK, keys) | problem.schedule(BLOCK, keys)
    ragged = S % keys != 0 or "key_lengths" in inputs

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = query_tiles - 1 - lax.axis_index("tile")  # the longest rows first
        first = block * BLOCK
        rows = pl.ds(first, BLOCK)
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None
        walk = find_walk(
            refs, batch, head, block, problem.band, first, BLOCK, key_end, keys, limit=query_end, ragged=ragged,
            one_loop=wide,
        )  # fmt: skip

        def fetch(source, target, n):  # past the end the last one again: how many are in flight never changes
            tile = lax.clamp(0, walk.tile(lax.max(lax.min(n, walk.end - 1), walk.start)), key_tiles - 1)
            size = target.shape[1]
            columns = pl.ds(lax.div(head, jnp.int32(N // K)) * size, size)
            _fetch(source.at[batch, pl.ds(tile * keys, keys), columns], target)

        _fetch(refs.query.at[batch, rows, pl.ds(head * H, H)], refs.query_tile)
        fetch(refs.key, refs.key_tile, walk.start)
        fetch(refs.value, refs.value_tile, walk.start)
        mine = Rows.of(problem, refs, LAYOUT, batch, head, first, BLOCK)

        def step(n, carry, masked):
            acc, top, total = carry
            tile = mine.tile(head, walk.tile(n) * keys, keys, masked=masked, last=key_end - 1 if ragged else None)
            tile = dataclasses.replace(tile, loaded=tile.load())
            plgpu.wait_gmem_to_smem(1)  # the keys are here, the values may not
            s = _product(refs.query_tile, refs.key_tile.T)
            fetch(refs.key, refs.key_tile, n + 1)
            x, factor, _, _ = tile.exponents(s)
            seen = tile.seen() if masked else None
            if seen is not None:
                x = jnp.where(seen, x, -jnp.inf)
            higher = jnp.maximum(top, x.max(axis=1) * factor)
            alpha = jnp.exp2(top - higher)
            p = jnp.exp2(x * factor - down(higher, x.shape))
            total = total * alpha + p.sum(axis=1)
            if problem.dropout_rate:
                p = jnp.where(tile.kept(), p, 0.0)
            plgpu.wait_gmem_to_smem(1)  # the values are here, the next keys may not
            acc = _product(p.astype(dtype), refs.value_tile, acc * down(alpha, acc.shape))
            fetch(refs.value, refs.value_tile, n + 1)
            return acc, higher, total

        # The sink is a key that was seen first and has no value.
        sink = jnp.maximum(refs.sinks[head], LOWEST) if "sinks" in refs else None
        zeros = plgpu.layout_cast(jnp.zeros((BLOCK, V), jnp.float32), LAYOUT)
        carry = zeros, _row(LOWEST if sink is None else sink), _row(0.0 if sink is None else 1.0)
        acc, top, total = go_through(walk.sections(first, BLOCK), step, None, carry)
        plgpu.wait_gmem_to_smem(0)

        lse = (top + jnp.log2(total)) * LN2
        inverse = jnp.where(total > 0, 1 / (total * problem.kept_rate), 0.0)
        if sink is None:  # total is 0 for a row that sees nothing
            lse = jnp.where(total > 0, lse, jnp.inf)
        if query_end is not None:
            inside = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=LAYOUT.reduce(1)) < query_end - first
            inverse = jnp.where(inside, inverse, 0.0)
            lse = jnp.where(inside, lse, jnp.inf if sink is None else sink * LN2)
        out = (acc * down(inverse, acc.shape)).astype(dtype)
        plgpu.store(refs.out.at[batch, rows, pl.ds(head * V, V)], out, optimized=False)
        plgpu.store(refs.lse.at[batch, head, rows], lse, optimized=False)

    result = _launch(
        kernel,
        "attention_forward",
        inputs,
        {
            "out": jax.ShapeDtypeStruct((B, query_tiles * BLOCK, N * V), dtype),
            "lse": jax.ShapeDtypeStruct((B, N, query_tiles * BLOCK), jnp.float32),
        },
        {
            "query_tile": smem(dtype, BLOCK, H),
            "key_tile": smem(dtype, keys, H),
            "value_tile": smem(dtype, keys, V),
        },
        (N, query_tiles, B),
    )
    return result["out"].reshape(B, -1, N, V), result["lse"]


def backward_kv(problem: Problem, dout, lse, minus_delta, wanted: tuple[str, ...]):
    """{"key": dk, "value": dv} as far as `wanted`, over whole blocks of keys: keys stay, the queries of every head of
    the group stream by.

    Works on xᵀ = k qᵀ: pᵀ and dsᵀ are left operands as they are. lse is of base two and +inf for every query that
    attends to nothing, whole blocks of them.
    """
    B, T, S, N, K, H, V = problem.shape
    band, queries, dtype, heads = problem.band.transposed(), problem.tiles.queries_dkv, problem.dtype, N // K
    query_tiles, key_tiles, wide = pl.cdiv(T, queries), pl.cdiv(S, BLOCK), max(H, V) > 128
    inputs = by_keys(problem.operands) | {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    inputs = _whole(inputs, queries, BLOCK) | problem.schedule(BLOCK, queries, by_keys=True)

    def kernel(refs):
        batch, head, block = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        first = block * BLOCK
        widths = {"key": H, "value": V}
        here = {name: (batch, pl.ds(first, BLOCK), pl.ds(head * size, size)) for name, size in widths.items()}
        query_end, key_end = query_tiles * queries, refs.key_lengths[batch] if "key_lengths" in refs else None
        if "query_lengths" in refs:
            query_end = pl.cdiv(refs.query_lengths[batch], jnp.int32(queries)) * queries

        def walk_of(one):
            return find_walk(
                refs, batch, one, block, band, first, BLOCK, query_end, queries, limit=key_end, ragged=False,
                one_loop=wide,
            )  # fmt: skip

        _fetch(refs.key.at[here["key"]], refs.key_tile)
        _fetch(refs.value.at[here["value"]], refs.value_tile)
        mine = Rows.of(problem, refs, LAYOUT, batch, head, first, BLOCK, by_keys=True)

        def per_member(member, sums):
            one = head * heads + member
            walk = walk_of(one)

            def fetch(n):
                tile = lax.clamp(0, walk.tile(lax.max(lax.min(n, walk.end - 1), walk.start)), query_tiles - 1)
                rows, slot = pl.ds(tile * queries, queries), lax.rem(n - walk.start, 2)
                _fetch(refs.query.at[batch, rows, pl.ds(one * H, H)], refs.query_tiles.at[slot])
                _fetch(refs.dout.at[batch, rows, pl.ds(one * V, V)], refs.dout_tiles.at[slot])

            def step(n, sums, masked):
                sums, slot, start = dict(sums), lax.rem(n - walk.start, 2), walk.tile(n) * queries
                column = lambda ref: across(
                    plgpu.load(ref.at[batch, one, pl.ds(start, queries)], layout=LAYOUT.reduce(0), optimized=False),
                    (BLOCK, queries),
                )
                row_lse, row_minus_delta = column(refs.lse), column(refs.minus_delta)
                tile = mine.tile(one, start, queries, masked=masked)
                tile = dataclasses.replace(tile, loaded=tile.load())
                fetch(n + 1)
                plgpu.wait_gmem_to_smem(2)  # all but the next two
                query, dout = refs.query_tiles.at[slot], refs.dout_tiles.at[slot]
                x, factor, of_mod, of_cap = tile.exponents(_product(refs.key_tile, query.T), slopes="key" in sums)
                p, seen = jnp.exp2(x * factor - row_lse), tile.seen() if masked else None
                if problem.score_mod is not None:  # beyond the last query it may give anything
                    inside = row_lse < jnp.inf
                    seen = inside if seen is None else seen & inside
                p = p if seen is None else jnp.where(seen, p, 0.0)
                kept = tile.kept() if problem.dropout_rate else None
                if "value" in sums:
                    mixed = p if kept is None else jnp.where(kept, p, 0.0)
                    sums["value"] = _product(mixed.astype(dtype), dout, sums["value"])
                if "key" in sums:
                    if kept is None:
                        dp = _product(refs.value_tile, dout.T, row_minus_delta)
                    else:
                        dp = _product(refs.value_tile, dout.T)
                        dp = jnp.where(kept, dp * (1 / problem.kept_rate), 0.0) + row_minus_delta
                    ds = p * dp
                    if of_mod is not None:
                        ds = ds * (of_mod if seen is None else jnp.where(seen, of_mod, 0.0))
                    ds = ds if of_cap is None else ds * of_cap
                    sums["key"] = _product(ds.astype(dtype), query, sums["key"])
                return sums

            fetch(walk.start)
            sums = go_through(walk.sections(first, BLOCK), step, None, sums)
            plgpu.wait_gmem_to_smem(0)
            return sums

        zeros = {name: plgpu.layout_cast(jnp.zeros((BLOCK, widths[name]), jnp.float32), LAYOUT) for name in wanted}
        sums = lax.fori_loop(0, heads, per_member, zeros)
        for name, factor in (("key", problem.scale), ("value", 1 / problem.kept_rate)):
            if name in wanted:
                total = sums[name] if factor == 1 else sums[name] * factor
                if key_end is not None:
                    inside = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=LAYOUT) < key_end - first
                    total = jnp.where(inside, total, 0.0)
                plgpu.store(getattr(refs, f"d{name}").at[here[name]], total.astype(dtype), optimized=False)

    result = _launch(
        kernel,
        "attention_backward_" + "_".join(wanted),
        inputs,
        {f"d{name}": jax.ShapeDtypeStruct(inputs[name].shape, dtype) for name in wanted},
        {
            "key_tile": smem(dtype, BLOCK, H),
            "value_tile": smem(dtype, BLOCK, V),
            "query_tiles": smem(dtype, 2, queries, H),
            "dout_tiles": smem(dtype, 2, queries, V),
        },
        (K, key_tiles, B),
    )
    return {name: result[f"d{name}"].reshape(B, -1, *problem.operands[name].shape[2:]) for name in wanted}


def backward_q(problem: Problem, dout, lse, minus_delta, wanted: str):
    """`wanted` "query": dq. `wanted` "bias": its gradient [batch, heads, queries, keys], float32. Over whole tiles.

    Queries stay, keys stream by. A kernel of its own for the bias: its gradient is as large as the scores, and the
    compiler drops it where nobody asks for it.
    """
    B, T, S, N, K, H, V = problem.shape
    keys, dtype, wide = problem.tiles.keys_dq, problem.dtype, max(H, V) > 128
    key_tiles, query_tiles = pl.cdiv(S, keys), pl.cdiv(T, BLOCK)
    dense = wanted == "bias"  # every tile is written
    inputs = problem.operands | {"dout": dout, "lse": lse, "minus_delta": minus_delta}
    inputs = _whole(inputs, BLOCK, keys)
    if not dense:
        inputs |= problem.schedule(BLOCK, keys)
    ragged = S % keys != 0 or "key_lengths" in inputs

    def kernel(refs):
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        block = query_tiles - 1 - lax.axis_index("tile")
        first = block * BLOCK
        rows = pl.ds(first, BLOCK)
        key_end = refs.key_lengths[batch] if "key_lengths" in refs else S
        query_end = refs.query_lengths[batch] if "query_lengths" in refs else None
        walk = walk_of_all(key_tiles) if dense else find_walk(
            refs, batch, head, block, problem.band, first, BLOCK, key_end, keys, limit=query_end, ragged=ragged,
            one_loop=wide,
        )  # fmt: skip

        def fetch(n):
            tile = lax.clamp(0, walk.tile(lax.max(lax.min(n, walk.end - 1), walk.start)), key_tiles - 1)
            rows, of = pl.ds(tile * keys, keys), lax.div(head, jnp.int32(N // K))
            slot = lax.rem(n - walk.start, 2)
            _fetch(refs.key.at[batch, rows, pl.ds(of * H, H)], refs.key_tiles.at[slot])
            _fetch(refs.value.at[batch, rows, pl.ds(of * V, V)], refs.value_tiles.at[slot])

        _fetch(refs.query.at[batch, rows, pl.ds(head * H, H)], refs.query_tile)
        _fetch(refs.dout.at[batch, rows, pl.ds(head * V, V)], refs.dout_tile)
        fetch(walk.start)
        mine = Rows.of(problem, refs, LAYOUT, batch, head, first, BLOCK)
        load_row = lambda ref: plgpu.load(ref.at[batch, head, rows], layout=LAYOUT.reduce(1), optimized=False)
        row_lse, row_minus_delta = load_row(refs.lse), load_row(refs.minus_delta)

        def step(n, dq, masked):
            slot, column, shape = lax.rem(n - walk.start, 2), walk.tile(n) * keys, (BLOCK, keys)
            tile = mine.tile(head, column, keys, masked=masked, last=key_end - 1 if ragged else None)
            tile = dataclasses.replace(tile, loaded=tile.load())
            fetch(n + 1)
            plgpu.wait_gmem_to_smem(2)  # all but the next two
            key, value = refs.key_tiles.at[slot], refs.value_tiles.at[slot]
            x, factor, of_mod, of_cap = tile.exponents(_product(refs.query_tile, key.T), slopes=True)
            p, minus_delta = jnp.exp2(x * factor - down(row_lse, shape)), down(row_minus_delta, shape)
            if problem.dropout_rate:
                dp = _product(refs.dout_tile, value.T)
                dp = jnp.where(tile.kept(), dp * (1 / problem.kept_rate), 0.0) + minus_delta
            else:
                dp = _product(refs.dout_tile, value.T, minus_delta)
            dx = p * dp
            for slope in (of_mod,) if dense else (of_mod, of_cap):
                dx = dx if slope is None else dx * slope
            seen = tile.seen() if masked else None
            if seen is not None:
                dx = jnp.where(seen, dx, 0.0)
            if dense:
                plgpu.store(refs.dx.at[batch, head, rows, pl.ds(column, keys)], dx, optimized=False)
                return dq
            return _product(dx.astype(dtype), key, dq)

        zeros = None if dense else plgpu.layout_cast(jnp.zeros((BLOCK, H), jnp.float32), LAYOUT)
        dq = go_through(walk.sections(first, BLOCK), step, None, zeros)
        plgpu.wait_gmem_to_smem(0)
        if not dense:
            plgpu.store(
                refs.dquery.at[batch, rows, pl.ds(head * H, H)], (dq * problem.scale).astype(dtype), optimized=False
            )

    result = (
        {"dx": jax.ShapeDtypeStruct((B, N, query_tiles * BLOCK, key_tiles * keys), jnp.float32)}
        if dense
        else {"dquery": jax.ShapeDtypeStruct((B, query_tiles * BLOCK, N * H), dtype)}
    )
    (result,) = _launch(
        kernel,
        f"attention_backward_{wanted}",
        inputs,
        result,
        {
            "query_tile": smem(dtype, BLOCK, H),
            "dout_tile": smem(dtype, BLOCK, V),
            "key_tiles": smem(dtype, 2, keys, H),
            "value_tiles": smem(dtype, 2, keys, V),
        },
        (N, query_tiles, B),
    ).values()
    return result if dense else result.reshape(B, -1, N, H)
