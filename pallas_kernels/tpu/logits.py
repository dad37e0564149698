"""Losses of linear layers onto one vocabulary on the TPU; logits [tokens, vocab] exist only tile by tile, in VMEM.

    z = x · weight (+ bias) of each layer;  the loss of each token from its z
    dz of the first layer from z and what the forward pass kept;  dx = dz · weightᵀ,  dweight = xᵀ · dz,  dbias = Σ dz

What becomes of the logits is the loss's own: it gives a function of a strip of them, here called `visit`.

Forward: a block of tokens stays while the vocabulary streams past; statistics are kept per lane and joined at the end,
so no step crosses lanes. Backward: one kernel; of one layer, three products. A block of the vocabulary stays, with its
dweight, while the tokens stream past, transposed: logits are [vocab, tokens], what belongs to a token is a row that
broadcasts for free, and no product has to transpose an operand. dx is a float32 array in HBM to which each block of the
vocabulary adds: read while the logits are computed, written while the next are. Each core takes a share of the
vocabulary and has a dx of its own; XLA adds them.
Source: Milakov and Gimelshein 2018 (online softmax); Wijmans et al. 2024 (cut cross-entropy).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuned
from pallas_kernels.padding import pad_to, round_up
from pallas_kernels.tpu import matrix_unit
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, dot

f32 = jnp.float32
FLOOR = -1e30  # below every logit; -inf would make exp(-inf - -inf) of a block without any
SLACK = 6 << 20  # VMEM left to the compiler for what does not stay in registers
STRIP = 256  # of the vocabulary in one product; the arithmetic on a strip hides behind the product of the next


class Layer(NamedTuple):
    """x[tokens, hidden], weight[hidden, vocab], bias[vocab] or None."""

    x: Any
    weight: Any
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A grid step takes `tokens` × `vocab` logits; multiples of 128, and of 512 beyond 512."""

    tokens: int
    vocab: int

    @staticmethod
    def default(layers: Sequence[Layer], *, backward: bool) -> "Tiles":
        """The first that fits. What stays in VMEM decides how often the rest is read: tokens forward, vocabulary
        backward; below about 512 of it the reads, not the products, take the time."""
        vmem = chips.current("tpu").vmem_bytes - SLACK
        sizes = _BACKWARD if backward else _FORWARD
        return next((t for t in sizes if _vmem_bytes(t, layers, backward) <= vmem), sizes[-1])

    def allowed(self, layers: Sequence[Layer], backward: bool) -> bool:
        """Whether these are sizes the kernels take, and everything fits VMEM."""
        if any(size <= 0 or size % (LANES if size <= 512 else 512) for size in (self.tokens, self.vocab)):
            return False
        return _vmem_bytes(self, layers, backward) + SLACK <= chips.current("tpu").vmem_bytes

    def fitted(self, tokens: int, vocab: int, *, least: int) -> "Tiles":
        """The same number of blocks, but at least `least` of tokens, cut evenly."""
        return Tiles(
            _share(tokens, max(pl.cdiv(tokens, self.tokens), least)),
            _share(vocab, pl.cdiv(vocab, self.vocab)),
        )


_FORWARD = tuple(
    Tiles(*s) for s in ((1024, 1024), (1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))
)
_BACKWARD = tuple(
    Tiles(*s) for s in ((512, 2048), (512, 1024), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128))
)


def _share(size, blocks):
    """The least tile that cuts `size` into at most `blocks`."""
    each = pl.cdiv(size, blocks)
    return round_up(each, LANES if each <= 512 else 512)


def _vmem_bytes(tiles: Tiles, layers: Sequence[Layer], backward: bool) -> int:
    """VMEM of a kernel. Operands are there twice, the next block arriving while this one is worked on."""
    h, *others = (round_up(layer.x.shape[1], LANES) for layer in layers)
    itemsize, t, v, more = layers[0].x.dtype.itemsize, tiles.tokens, tiles.vocab, len(others)
    if backward:  # x, weight, its transpose, dweight and its sum, dx; dz, logits and their kin
        operands, sums = itemsize * h * (2 * t + 2 * v + v + 2 * v), 4 * h * (v + 2 * t)
        operands += itemsize * sum(others) * (2 * t + 2 * v + v)
        return operands + sums + (itemsize + 4 * (1 + more)) * v * t + 8 * 4 * v * LANES
    return itemsize * (h + sum(others)) * (2 * t + 2 * v) + (1 + more) * (4 * t * v + 8 * 4 * t * LANES)


def choose(name: str, phase: str, layers: Sequence[Layer]) -> Tiles:
    """The tuned tiles of the nearest problem that fit this one, else the default."""
    (tokens, hidden), vocab, backward = layers[0].x.shape, layers[0].weight.shape[1], phase == "backward"
    return tuned.choose(
        f"tpu.{name}.{phase}",
        chips.current("tpu"),
        {"tokens": tokens, "hidden": hidden, "vocab": vocab},
        jnp.dtype(layers[0].x.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(layers, backward),
        Tiles.default(layers, backward=backward),
    )


def candidates(phase: str, layers: Sequence[Layer]) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM: the default first, then blocks of 128, then every other size."""
    backward, tokens, vocab = phase == "backward", layers[0].x.shape[0], layers[0].weight.shape[1]
    sizes = (2048, 1024, 512, 256, 128)
    found = [Tiles.default(layers, backward=backward), Tiles(LANES, LANES)]
    found += [Tiles(*both) for both in itertools.product(sizes, (4096, *sizes))]
    seen = set()
    for tiles in found:
        cut = tiles.fitted(tokens, vocab, least=2 if backward else 1)
        if tiles.allowed(layers, backward) and cut not in seen:
            seen.add(cut)
            yield tiles


def memory(phase: str, tiles: Tiles, layers: Sequence[Layer]) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    backward = phase == "backward"
    cut = tiles.fitted(layers[0].x.shape[0], layers[0].weight.shape[1], least=2 if backward else 1)
    return _vmem_bytes(cut, layers, backward) + SLACK


def unsupported(layers: dict[str, Any]) -> str | None:
    """Why the kernels cannot take these factors, x and weight of each layer by name, or None."""
    (first, x), *others = layers.items()
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{first} must be float32 or bfloat16 on a TPU, got {x.dtype}"
    for name, factor in others:
        if factor.dtype != x.dtype:
            return f"{name} must have the dtype of {first}, {x.dtype}, got {factor.dtype}"
    if reason := matrix_unit.unsupported(x.dtype, None):
        return reason
    vmem = chips.current("tpu").vmem_bytes
    hiddens = [one.shape[-1] for one in list(layers.values())[::2]]

    def fits(hiddens):
        made = [Layer(jax.ShapeDtypeStruct((1, hidden), x.dtype), None) for hidden in hiddens]
        return _vmem_bytes(_BACKWARD[-1], made, True) + SLACK <= vmem

    if fits(hiddens):
        return None
    limit = f"the least tiles must fit the {vmem >> 20} MiB of VMEM"
    if others[1:]:
        return f"{limit}, those of hidden sizes {hiddens} in {x.dtype} do not"
    most = max(h for h in range(0, hiddens[0], LANES) if fits([h]))
    return f"{limit}, that is hidden ≤ {most} in {x.dtype}, got {hiddens[0]}"


def _loop(size, turn, body):
    """body(start) for start in 0, turn … size - turn."""
    if size == turn:
        body(0)
    else:
        lax.fori_loop(0, size // turn, lambda i, _: body(pl.multiple_of(i * turn, turn)), None)


def _overlapped(start, size, product, rest):
    """rest(strip, product(strip)) for each strip of start … start + size, each product issued before the last rest."""
    strips = [pl.ds(start + u, min(STRIP, size - u)) for u in range(0, size, STRIP)]
    before = product(strips[0])
    for n, strip in enumerate(strips):
        following = product(strips[n + 1]) if n + 1 < len(strips) else None
        rest(strip, before)
        before = following


def _clear_past_the_end(w_ref, block, vocab):
    """The last block of the vocabulary may be partial: past its end lies anything, and 0 · NaN would stay a NaN."""
    width = w_ref.shape[1]
    if vocab % width:

        @pl.when(block == vocab // width)
        def _():
            inside = lax.broadcasted_iota(jnp.int32, (LANES, width), 1) < vocab % width

            def clear(start):
                here = pl.ds(start, LANES)
                w_ref[here] = jnp.where(inside, w_ref[here], jnp.zeros((), w_ref.dtype))

            _loop(w_ref.shape[0], LANES, clear)


def _split(refs, *counts):
    """The first counts[0] of `refs`, the next counts[1] and so on, and the rest."""
    parts, refs = [], list(refs)
    for count in counts:
        parts.append(refs[:count])
        refs = refs[count:]
    return *parts, refs


def _where(biased: Sequence[bool], found: Sequence[Any]) -> list[Any]:
    """One of `found` for each layer that has a bias, None for the others."""
    rest = iter(found)
    return [next(rest) if there else None for there in biased]


def _vectors(vectors: Sequence[tuple[jax.Array, Any]], size: int) -> list[jax.Array]:
    """Each vector[tokens] as [1, size]; the new entries are the value beside it."""
    return [pad_to(vector[None], 1, size, value) for vector, value in vectors]


# ------------------------------------------------------------------------------------------------ forward
@dataclasses.dataclass(frozen=True)
class Strip:
    """Logits of some tokens and words: [rows, columns] of each layer."""

    logits: list[jax.Array]
    first: Any  # the number of the first word
    vocab: int
    partial: bool  # whether a block of the vocabulary reaches past its end
    _columns: Sequence[Any]
    _here: Any

    def of_token(self, which: int) -> jax.Array:
        """The vector of this number that was given, the same in all lanes: [rows, 128]."""
        return self._columns[which][self._here]

    def offsets(self) -> list[Any]:
        """The numbers of the first words of the groups."""
        return [self.first + u for u in range(0, self.logits[0].shape[1], LANES)]

    @property
    def lane(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (self.logits[0].shape[0], LANES), 1)

    def groups(self, z: jax.Array, past_the_end: float) -> list[jax.Array]:
        """z as groups of 128 columns, with this value past the end of the vocabulary."""
        groups = [z[:, u : u + LANES] for u in range(0, z.shape[1], LANES)]
        if not self.partial:
            return groups
        return [
            jnp.where(self.lane < self.vocab - o, g, past_the_end) for g, o in zip(groups, self.offsets(), strict=True)
        ]


def add_exponentials(top, total, groups):
    """(maxima, sums of exponentials below them, those exponentials, by how much the sums before fell), per lane."""
    new = functools.reduce(jnp.maximum, groups, top)
    parts, decay = [jnp.exp(g - new) for g in groups], jnp.exp(top - new)
    return new, total * decay + functools.reduce(jnp.add, parts), parts, decay


def log_sum(top, total):
    """(log Σ exp of a row, what a lane's sums are multiplied by to be added up): [tokens, 1] and [tokens, 128]."""
    most = jnp.max(top, 1, keepdims=True)
    factor = jnp.exp(top - most)
    return most + jnp.log(jnp.sum(total * factor, 1, keepdims=True)), factor


def _forward_kernel(*refs, counts, biased, tiles, vocab, initial, visit, finish):
    xs, ws, vectors, biases, outputs, statistics, columns = _split(refs, *counts)
    bias_of = _where(biased, biases)
    j, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(j == 0)
    def _():
        for ref, value in zip(statistics, initial, strict=True):
            ref[...] = jnp.full(ref.shape, value, f32)
        for ref, vector in zip(columns, vectors, strict=True):
            ref[...] = jnp.broadcast_to(vector[...], (LANES, tiles.tokens)).T

    for w_ref in ws:
        _clear_past_the_end(w_ref, j, vocab)
    width = matrix_unit.turn(tiles.vocab, 0, most=2 * STRIP)
    rows = matrix_unit.turn(tiles.tokens, width * sum(x_ref.shape[1] for x_ref in xs))

    def gather(here, strip, products):
        """Takes a strip of products into the running statistics, each [rows, 128]."""
        logits = [z if b is None else z + b[:, strip] for z, b in zip(products, bias_of, strict=True)]
        one = Strip(logits, j * tiles.vocab + strip.start, vocab, vocab % tiles.vocab != 0, columns, here)
        for ref, new in zip(statistics, visit(one, [ref[here] for ref in statistics]), strict=True):
            ref[here] = new

    def turn(row, column):
        here = pl.ds(row, rows)

        def products(strip):
            return [dot(x_ref[here], w_ref[:, strip], NN, None) for x_ref, w_ref in zip(xs, ws, strict=True)]

        _overlapped(column, width, products, functools.partial(gather, here))

    _loop(tiles.tokens, rows, lambda row: _loop(tiles.vocab, width, functools.partial(turn, row)))

    @pl.when(j == last)
    def _():
        for ref, column in zip(outputs, finish([ref[...] for ref in statistics]), strict=True):
            ref[...] = jnp.broadcast_to(column, (tiles.tokens, LANES)).T[:1]


def _prepare(layers: Sequence[Layer], tiles: Tiles, least: int) -> tuple[list[Layer], Tiles]:
    """Operands grown to whole tiles: x[tokens, hidden] with zeros, biases as float32 [1, vocab]; and the tiles.

    Backward gets at least two blocks of tokens: see `_backward_kernel`.

    A weight keeps its size whenever it can, being expensive to copy: `_clear_past_the_end` copes with its last block.
    """
    tokens, vocab = layers[0].x.shape[0], layers[0].weight.shape[1]
    tiles = tiles.fitted(tokens, vocab, least=least)
    blocks = max(pl.cdiv(tokens, tiles.tokens), least)

    def grown(x, weight, bias):
        wide = round_up(x.shape[1], LANES)
        weight = pad_to(weight, 0, wide)
        if vocab < tiles.vocab:
            weight = pad_to(weight, 1, tiles.vocab)
        bias = None if bias is None else pad_to(bias.astype(f32)[None], 1, round_up(vocab, tiles.vocab))
        return Layer(pad_to(pad_to(x, 1, wide), 0, blocks * tiles.tokens), weight, bias)

    return [grown(*layer) for layer in layers], tiles


def _call(kernel, semantics, tiles, layers, *, backward, **kwargs):
    """`pl.pallas_call(kernel, …)` with the VMEM and the cost told to XLA.

    Under `vmap` the calls follow one another: Mosaic batches no array that stays in HBM, and one call fills the chip.
    """
    (x, weight, _), *others = layers
    words = x.shape[0] * weight.shape[1]
    moved = lambda layer: (layer.x.size + layer.weight.size) * x.dtype.itemsize
    call = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=_vmem_bytes(tiles, layers, backward) + SLACK
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * words * ((3 if backward else 1) * x.shape[1] + sum(layer.x.shape[1] for layer in others)),
            transcendentals=words * len(layers),
            bytes_accessed=(2 if backward else 1) * moved(layers[0]) + sum(map(moved, others)),
        ),
        **kwargs,
    )
    return jax.custom_batching.sequential_vmap(lambda *operands: call(*operands))


def forward(
    name: str,
    layers: Sequence[Layer],
    vectors: Sequence[tuple[jax.Array, Any]],
    initial: Sequence[float],
    visit: Callable[[Strip, list[jax.Array]], Sequence[jax.Array]],
    finish: Callable[[list[jax.Array]], Sequence[jax.Array]],
    *,
    outputs: int,
    tiles: Tiles | None = None,
) -> list[jax.Array]:
    """As many vectors[tokens] in float32 as there are `outputs`.

    vectors: (what belongs to a token, its value past the last one). initial: of the statistics, which are [rows, 128].
    visit(strip, statistics) gives the new statistics, finish(statistics) the outputs, each [tokens, 1].
    """
    tokens, vocab = layers[0].x.shape[0], layers[0].weight.shape[1]
    layers, tiles = _prepare(layers, tiles or choose(name, "forward", layers), 1)
    padded = layers[0].x.shape[0]
    rows = _vectors(vectors, padded)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    row = pl.BlockSpec((1, tiles.tokens), lambda i, j: (0, i))
    found = _call(
        functools.partial(
            _forward_kernel,
            counts=(len(layers), len(layers), len(rows), len(biases), outputs, len(initial)),
            biased=[layer.bias is not None for layer in layers],
            tiles=tiles,
            vocab=vocab,
            initial=initial,
            visit=visit,
            finish=finish,
        ),
        ("parallel", "arbitrary"),
        tiles,
        layers,
        backward=False,
        grid=(padded // tiles.tokens, pl.cdiv(vocab, tiles.vocab)),
        in_specs=[
            *(pl.BlockSpec((tiles.tokens, layer.x.shape[1]), lambda i, j: (i, 0)) for layer in layers),
            *(pl.BlockSpec((layer.x.shape[1], tiles.vocab), lambda i, j: (0, j)) for layer in layers),
            *[row] * len(rows),
            *(pl.BlockSpec((1, tiles.vocab), lambda i, j: (0, j)) for _ in biases),
        ],
        out_specs=[row] * outputs,
        out_shape=[jax.ShapeDtypeStruct((1, padded), f32)] * outputs,
        scratch_shapes=[
            *(pltpu.VMEM((tiles.tokens, LANES), f32) for _ in initial),
            *(pltpu.VMEM((tiles.tokens, LANES), vector.dtype) for vector in rows),
        ],
        name=name,
    )(*(layer.x for layer in layers), *(layer.weight for layer in layers), *rows, *biases)
    return [one[0, :tokens] for one in found]


# ------------------------------------------------------------------------------------------------ backward
@dataclasses.dataclass(frozen=True)
class Turned:
    """Logits of some words and a block of tokens: [words, tokens] of each layer."""

    logits: list[jax.Array]
    first: Any  # the number of the first word
    _vectors: Sequence[Any]

    def of_token(self, which: int) -> jax.Array:
        """The vector of this number that was given, [1, tokens]."""
        return self._vectors[which][...]

    def words(self) -> jax.Array:
        """The numbers of the words."""
        return lax.broadcasted_iota(jnp.int32, self.logits[0].shape, 0) + self.first


def _backward_kernel(*refs, counts, biased, vocab, blocks, tiles, visit):
    """Grid (share of the vocabulary, block of it, block of tokens); everything is [vocab or hidden, tokens].

    dx_hbm[share, hidden, tokens] is added to through two buffers. Step s reads its block while step s-1 computes, and
    its write ends while step s+1 computes. The read for s+1 starts once the write of s-1 has ended: with two blocks of
    tokens or more, what it reads was written at s-1 or before.
    """
    xts, ws, vectors, biases, outputs, wts, bias_columns, scratch = _split(refs, *counts)
    dx_hbm, dw_ref, db_ref = outputs
    dw_sum, db_sum, dz_ref, dx_ref, reading, writing = scratch
    xt_ref, w_ref, bias_of = xts[0], ws[0], _where(biased, bias_columns)
    share, v, t = (pl.program_id(axis) for axis in range(3))
    rounds, turns = pl.num_programs(1), pl.num_programs(2)
    block = share * rounds + v
    step, steps = v * turns + t, jnp.minimum(rounds, blocks - share * rounds) * turns
    slot = lax.rem(step, 2)

    def place(s):
        return dx_hbm.at[share, :, pl.ds(pl.multiple_of(lax.rem(s, turns) * tiles.tokens, LANES), tiles.tokens)]

    def read(s):
        return pltpu.make_async_copy(place(s), dx_ref.at[lax.rem(s, 2)], reading.at[lax.rem(s, 2)])

    def write(s):
        return pltpu.make_async_copy(dx_ref.at[lax.rem(s, 2)], place(s), writing.at[lax.rem(s, 2)])

    def logits_gradient(strip, products):
        """dz of a strip of products [strip, tokens]."""
        logits = [z if b is None else z + b[strip, :1] for z, b in zip(products, bias_of, strict=True)]
        one = Turned(logits, block * tiles.vocab + strip.start, vectors)
        dz = visit(one)
        if vocab % tiles.vocab:
            dz = jnp.where(one.words() < vocab, dz, 0.0)
        if biased[0]:
            db_sum[strip] += functools.reduce(jnp.add, [dz[:, u : u + LANES] for u in range(0, tiles.tokens, LANES)])
        dz_ref[strip] = dz.astype(dz_ref.dtype)

    @pl.when(block < blocks)
    def _():
        @pl.when(t == 0)
        def _():
            for one, turned in zip(ws, wts, strict=True):
                _clear_past_the_end(one, block, vocab)

                def start_block(start, one=one, turned=turned):
                    here = pl.ds(start, LANES)
                    turned[:, here] = one[here].T
                    if one is w_ref:
                        dw_sum[here] = jnp.zeros((LANES, tiles.vocab), f32)

                _loop(one.shape[0], LANES, start_block)
            for bias, column in zip(biases, bias_columns, strict=True):
                column[...] = jnp.broadcast_to(bias[...], (LANES, tiles.vocab)).T
            if biased[0]:
                db_sum[...] = jnp.zeros(db_sum.shape, f32)

        def turn(start):
            def products(strip):
                return [dot(turned[strip], one[...], NN, None) for turned, one in zip(wts, xts, strict=True)]

            _overlapped(start, columns, products, logits_gradient)

        columns = matrix_unit.turn(tiles.vocab, sum(one.shape[0] for one in ws) * tiles.tokens, most=2 * STRIP)
        _loop(tiles.vocab, columns, turn)

        @pl.when(step > 0)
        def _():
            write(step - 1).wait()

        @pl.when((step + 1 < steps) & (step + 1 >= turns))
        def _():
            read(step + 1).start()

        @pl.when(v == 0)
        def _():
            def clear(start):
                dx_ref[slot, pl.ds(start, LANES)] = jnp.zeros((LANES, tiles.tokens), f32)

            _loop(w_ref.shape[0], LANES, clear)

        @pl.when(v > 0)
        def _():
            read(step).wait()

        def products(start):
            here = pl.ds(start, height)
            dw_sum[here] += dot(xt_ref[here], dz_ref[...], NT, None)
            dx_ref[slot, here] += dot(w_ref[here], dz_ref[...], NN, None)

        height = matrix_unit.turn(w_ref.shape[0], 2 * tiles.vocab * tiles.tokens, most=512)
        _loop(w_ref.shape[0], height, products)
        write(step).start()

        @pl.when(step + 1 == steps)
        def _():
            write(step).wait()

        @pl.when(t + 1 == turns)
        def _():
            def end_block(start):
                here = pl.ds(start, LANES)
                dw_ref[here] = dw_sum[here].astype(dw_ref.dtype)

            _loop(w_ref.shape[0], LANES, end_block)
            if biased[0]:
                db_ref[...] = jnp.sum(db_sum[...].T, 0, keepdims=True)


def gradients(
    name: str,
    layers: Sequence[Layer],
    vectors: Sequence[tuple[jax.Array, Any]],
    visit: Callable[[Turned], jax.Array],
    *,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of the first layer's x, weight and bias (if present); visit(strip) is the gradient of its logits.

    vectors: (what belongs to a token, its value past the last one, for which the gradient must be 0 whatever the bias).
    """
    operands = {"x": layers[0].x, "weight": layers[0].weight}
    operands |= {} if layers[0].bias is None else {"bias": layers[0].bias}
    (tokens, hidden), vocab, dtype = layers[0].x.shape, layers[0].weight.shape[1], layers[0].x.dtype
    layers, tiles = _prepare(layers, tiles or choose(name, "backward", layers), 2)
    padded, wide = layers[0].x.shape
    rows = _vectors(vectors, padded)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    blocks = pl.cdiv(vocab, tiles.vocab)
    shares = min(chips.current("tpu").cores, blocks)
    rounds = pl.cdiv(blocks, shares)

    def along_vocab(height):
        # The last share may be a round short: it stays on the block before and does nothing.
        return pl.BlockSpec((height, tiles.vocab), lambda p, v, t: (0, jnp.minimum(p * rounds + v, blocks - 1)))

    def along_tokens(height):
        return pl.BlockSpec((height, tiles.tokens), lambda p, v, t: (0, t))

    heights = [layer.x.shape[1] for layer in layers]
    dx, dw, db = _call(
        functools.partial(
            _backward_kernel,
            counts=(len(layers), len(layers), len(rows), len(biases), 3, len(layers), len(biases)),
            biased=[layer.bias is not None for layer in layers],
            vocab=vocab,
            blocks=blocks,
            tiles=tiles,
            visit=visit,
        ),
        ("parallel", "arbitrary", "arbitrary"),
        tiles,
        layers,
        backward=True,
        grid=(shares, rounds, padded // tiles.tokens),
        in_specs=[
            *map(along_tokens, heights),
            *map(along_vocab, heights),
            *[along_tokens(1)] * len(rows),
            *[along_vocab(1)] * len(biases),
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), along_vocab(wide), along_vocab(1)],
        out_shape=[
            jax.ShapeDtypeStruct((shares, wide, padded), f32),
            jax.ShapeDtypeStruct(layers[0].weight.shape, dtype),
            jax.ShapeDtypeStruct((1, blocks * tiles.vocab), f32),
        ],
        scratch_shapes=[
            *(pltpu.VMEM((tiles.vocab, height), dtype) for height in heights),
            *(pltpu.VMEM((tiles.vocab, LANES), f32) for _ in biases),
            pltpu.VMEM((wide, tiles.vocab), f32),
            pltpu.VMEM((tiles.vocab, LANES), f32),
            pltpu.VMEM((tiles.vocab, tiles.tokens), dtype),
            pltpu.VMEM((2, wide, tiles.tokens), f32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        name=f"{name}_backward",
    )(*(layer.x.T for layer in layers), *(layer.weight for layer in layers), *rows, *biases)
    grads = {"x": dx.sum(0).T[:tokens, :hidden], "weight": dw[:hidden, :vocab], "bias": db[0, :vocab]}
    return {name: grads[name].astype(operand.dtype) for name, operand in operands.items()}
