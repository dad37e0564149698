"""Arrays as the TPU attention kernels read them: sequence minor, padded to whole blocks, each with its block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.masks import Band, Blocks
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.tpu.attention_tiles import Problem, Tiles

f32 = jnp.float32


def sequence_minor(x, length: int, size: int, dim: int):
    """[batch, sequence, heads, head_dim] → [batch, heads, dim, size]: the first `length`, then zeros."""
    return pad_to(pad_to(jnp.transpose(x[:, :length], (0, 2, 3, 1)), 2, dim), 3, size)


def sequence_third(x, length: int, dim: int):
    """The way back: [batch, heads, dim, size] → [batch, length, heads, head_dim]."""
    return jnp.transpose(x[:, :, :dim, :length], (0, 3, 1, 2))


class Operands:
    """Arrays as the kernels read them, each with its block.

    `place` maps the indices of the grid to (batch, head, key head, span, block).
    """

    def __init__(self, p: Problem, t: Tiles, place):
        self.p, self.t, self.place = p, t, place
        self.size_q, self.size_k = round_up(p.query_length, t.queries), round_up(p.key_length, t.span)
        self.arrays: dict[str, jax.Array] = {}
        self.specs: dict[str, pl.BlockSpec] = {}

    def spec(self, block, index, **space) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda *grid: index(*self.place(*grid)), **space)

    def of_queries(self, dim: int) -> pl.BlockSpec:
        """[batch, heads, dim, queries]"""
        return self.spec((None, None, dim, self.t.queries), lambda b, n, h, s, i: (b, n, 0, i))

    def of_queries_by_span(self, dim: int) -> pl.BlockSpec:
        """[span, batch, heads, dim, queries]"""
        return self.spec((None, None, None, dim, self.t.queries), lambda b, n, h, s, i: (s, b, n, 0, i))

    def of_keys(self, dim: int) -> pl.BlockSpec:
        """[batch, key heads, dim, keys]"""
        return self.spec((None, None, dim, self.t.span), lambda b, n, h, s, i: (b, h, 0, s))

    def add(self, name, array, spec):
        self.arrays[name], self.specs[name] = array, spec

    def add_queries(self, dim, **named):
        for name, x in named.items():
            self.add(name, sequence_minor(x, self.p.query_length, self.size_q, dim), self.of_queries(dim))

    def add_keys(self, dim, **named):
        for name, x in named.items():
            self.add(name, sequence_minor(x, self.p.key_length, self.size_k, dim), self.of_keys(dim))

    def add_of_head(self, name, x):
        """A float32 number for each head [N]."""
        one = self.spec((None, 1, 1), lambda b, n, h, s, i: (n, 0, 0), memory_space=pltpu.SMEM)
        self.add(name, x.astype(f32)[:, None, None], one)

    def add_options(self, call: dict[str, Any]):
        """What is there beside queries, keys and values."""
        p, t = self.p, self.t
        bias, mask = call["bias"], call["mask"]
        if bias is not None:
            self._add_over_logits("bias", bias if bias.dtype == jnp.bfloat16 else bias.astype(f32), p.bias)
        if mask is not None:
            self._add_over_logits("mask", mask.astype(jnp.int8), p.mask)
        if p.segments:
            ids = pad_to(call["query_segment_ids"].astype(jnp.int32)[:, None], 2, self.size_q)
            self.add("query_segment_ids", ids, self.spec((None, 1, t.queries), lambda b, n, h, s, i: (b, 0, i)))
            ids = pad_to(call["key_value_segment_ids"].astype(jnp.int32)[:, None, : p.key_length], 2, self.size_k)
            self.add("key_value_segment_ids", ids, self.spec((None, 1, t.span), lambda b, n, h, s, i: (b, 0, s)))
        if p.lengths:
            full = {
                "query_seq_lengths": (p.query_length, p.query_length),
                "key_value_seq_lengths": (p.key_length, p.key_length),
                "prefix_lengths": (p.key_length, 0),
            }
            batch = call["query"].shape[0]
            ends = [
                jnp.full((batch,), absent, jnp.int32) if call[name] is None else jnp.clip(call[name], 0, most)
                for name, (most, absent) in full.items()
            ]
            stacked = jnp.stack(ends, 1).astype(jnp.int32)[:, None]
            self.add("lengths", stacked, self.spec((None, 1, 3), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM))
        if p.alibi:
            self.add_of_head("alibi", call["alibi_slopes"])
        if p.dropout_rate:
            words = pad_to(call["dropout_rows"], 3, self.size_q)
            self.add("dropout_rows", words, self.of_queries(2))
        if p.scheduled:
            table = self._schedule(call)
            block = (None, None, None, *table.shape[3:])
            batch, heads = table.shape[0] > 1, table.shape[1] > 1
            where = lambda b, n, h, s, i: (b if batch else 0, n if heads else 0, s, 0, 0)
            self.add("schedule", table, self.spec(block, where, memory_space=pltpu.SMEM))

    def _add_over_logits(self, name, x, kind):
        """[B or 1, N or 1, T or 1, S or 1], with keys before queries."""
        p, t = self.p, self.t
        batch, heads = x.shape[0] > 1, x.shape[1] > 1
        where = lambda b, n: (b if batch else 0, n if heads else 0)
        if kind == "tile":
            x = jnp.swapaxes(x[..., : p.key_length], 2, 3)
            x = pad_to(pad_to(x, 2, self.size_k), 3, self.size_q)
            spec = self.spec((None, None, t.span, t.queries), lambda b, n, h, s, i: (*where(b, n), s, i))
        else:  # one row, of 32 bits: a row of fewer would be a part of a register's
            x = x.astype(f32 if name == "bias" else jnp.int32)
            if kind == "keys":
                x = pad_to(x[..., : p.key_length], 3, self.size_k)
                spec = self.spec((None, None, 1, t.span), lambda b, n, h, s, i: (*where(b, n), 0, s))
            else:
                x = jnp.broadcast_to(jnp.swapaxes(x, 2, 3), (*x.shape[:2], 1, p.query_length))
                x = pad_to(x, 3, self.size_q)
                spec = self.spec((None, None, 1, t.queries), lambda b, n, h, s, i: (*where(b, n), 0, i))
        self.add(name, x, spec)

    def _schedule(self, call: dict[str, Any]) -> jax.Array:
        """int32 [B or 1, N or 1, spans, row blocks, HEADER + column blocks of a span]: which blocks a step visits.

        A row: how many blocks are whole; how many more are cut; whether the square on the diagonal, if it may go by
        strips, is only cut by the diagonal, and is left to them; then the blocks, the whole ones first.
        """
        p, t = self.p, self.t
        corner = t.corner(p)
        # The strips are causal by themselves, and so nobody sees the keys that are padding.
        band, keys = (Band(p.band.left, None), self.size_k) if corner else (p.band, p.key_length)
        names = (
            *("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids"),
            "prefix_lengths",
        )
        ids, mask = call["key_value_segment_ids"], call["mask"]
        if mask is not None and mask.shape[3] > 1:
            mask = pad_to(mask[..., : p.key_length], 3, keys, True)
        given = {name: call[name] for name in names} | {
            "key_value_segment_ids": None if ids is None else pad_to(ids[:, : p.key_length], 1, keys),
            "mask": mask,
        }
        shape = (call["query"].shape[0], call["query"].shape[2], p.query_length, keys)
        found = Blocks.of(shape, t.queries, t.keys, band, mask_mod=p.mask_mod, **given)
        touched, whole = found.touched, found.whole
        of: Any = np if isinstance(touched, np.ndarray) and isinstance(whole, np.ndarray) else jnp
        rows, columns = self.size_q // t.queries, self.size_k // t.keys
        spans = self.size_k // t.span
        touched, whole = (_widened(of, x, rows, columns) for x in (touched, whole))
        clean = of.zeros((1, 1, rows, 1), np.int32)
        if corner:
            own, row = np.arange(columns) // (t.queries // t.keys), np.arange(rows)[:, None]
            clean = (whole | (own != row)).all(3, keepdims=True)
            touched, whole = touched & ((own < row) | (own == row) & ~clean), whole & (own < row)
        lead = np.broadcast_shapes(touched.shape[:2], whole.shape[:2])

        def by_span(x):  # [.., rows, columns] → [.., spans · rows, columns of a span]
            x = of.broadcast_to(x, (*lead, rows, columns)).reshape(*lead, rows, spans, -1)
            return of.moveaxis(x, 3, 2).reshape(*lead, spans * rows, -1)

        count, order = Blocks(by_span(touched), by_span(whole)).schedule()
        clean = of.tile(of.broadcast_to(clean, (*lead, rows, 1)), (1, 1, spans, 1)).astype(np.int32)
        table = of.concatenate([count, clean, order], 3).reshape(*lead, spans, rows, -1)
        return jnp.asarray(table, jnp.int32)

    def launch(self, kernel, name, grid, out_shape, out_specs, scratch):
        spans = self.size_k // self.t.span
        # float32 in several passes: one pass of the matrix unit would round the operands to bfloat16
        precision = lax.Precision.HIGHEST if self.p.itemsize == 4 else None
        return pl.pallas_call(
            functools.partial(kernel, p=self.p, t=self.t, spans=spans, precision=precision),
            grid=grid,
            in_specs=[self.specs],
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * 3 + (pltpu.ARBITRARY,) * (len(grid) - 3),
                vmem_limit_bytes=chips.current("tpu").vmem_bytes * 7 // 8,
            ),
            name=name,
        )(self.arrays)


def _widened(of, x, rows: int, columns: int):
    """bool [.., 1 or rows, 1 or columns or fewer] as [.., rows, columns], false where there was nothing."""
    lead = x.shape[:2]
    have = x.shape[2] if x.shape[2] > 1 else rows, x.shape[3]
    x = of.broadcast_to(x, (*lead, *have))
    return of.pad(x, ((0, 0), (0, 0), (0, rows - have[0]), (0, columns - have[1])))
