"""Cross-entropy of a linear layer on the TPU; the logits [tokens, vocab] exist only tile by tile, in VMEM.

    z = x · weight (+ bias),  z = cap · tanh(z / cap),  lse_t = log Σ_v exp z_tv
    loss_t = lse_t - (1-ε) z_ty - (ε/V) Σ_v z_tv + λ lse_t²                   (ε label smoothing, λ z-loss, y the label)
    dz_tv = [(g_t + 2λ g_t lse_t + dlse_t) · exp(z_tv - lse_t) - g_t (1-ε) [v = y] - g_t ε/V] · (1 - (z_tv / cap)²)
    dx = dz · weightᵀ,   dweight = xᵀ · dz,   dbias = Σ_t dz

Forward: a block of tokens stays while the vocabulary streams past; maxima and sums are kept per lane and joined at the
end, so no step crosses lanes. Backward: one kernel, three products. A block of the vocabulary stays, with its dweight,
while the tokens stream past, transposed: logits are [vocab, tokens], what belongs to a token is a row that broadcasts
for free, and no product has to transpose an operand. dx is a float32 array in HBM to which each block of the vocabulary
adds: read while the logits are computed, written while the next are. Each core takes a share of the vocabulary and has
a dx of its own; XLA adds them.
Source: Milakov and Gimelshein 2018 (online softmax); Wijmans et al. 2024 (cut cross-entropy).
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
from pallas_kernels.tpu import matrix_unit
from pallas_kernels.tpu.matrix_unit import LANES, NN, NT, dot

f32 = jnp.float32
FLOOR = -1e30  # below every logit; -inf would make exp(-inf - -inf) of a block without any
SLACK = 6 << 20  # VMEM left to the compiler for what does not stay in registers
STRIP = 256  # of the vocabulary in one product; the arithmetic on a strip hides behind the product of the next


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A grid step takes `tokens` × `vocab` logits; multiples of 128, and of 512 beyond 512."""

    tokens: int
    vocab: int

    @staticmethod
    def default(hidden: int, itemsize: int, *, backward: bool) -> "Tiles":
        """The first that fits. What stays in VMEM decides how often the rest is read: tokens forward, vocabulary
        backward; below about 512 of it the reads, not the products, take the time."""
        vmem = chips.current("tpu").vmem_bytes - SLACK
        sizes = _BACKWARD if backward else _FORWARD
        return next((t for t in sizes if _vmem_bytes(t, hidden, itemsize, backward) <= vmem), sizes[-1])

    def allowed(self, x, backward: bool) -> bool:
        """Whether these are sizes the kernels take, and everything fits VMEM."""
        if any(size <= 0 or size % (LANES if size <= 512 else 512) for size in (self.tokens, self.vocab)):
            return False
        return _vmem_bytes(self, x.shape[-1], x.dtype.itemsize, backward) + SLACK <= chips.current("tpu").vmem_bytes

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


def _vmem_bytes(tiles: Tiles, hidden: int, itemsize: int, backward: bool) -> int:
    """VMEM of a kernel. Operands are there twice, the next block arriving while this one is worked on."""
    h, t, v = round_up(hidden, LANES), tiles.tokens, tiles.vocab
    if backward:  # x, weight, its transpose, dweight and its sum, dx; dz, logits and their kin
        operands, sums = itemsize * h * (2 * t + 2 * v + v + 2 * v), 4 * h * (v + 2 * t)
        return operands + sums + (itemsize + 4) * v * t + 8 * 4 * v * LANES
    return itemsize * h * (2 * t + 2 * v) + 4 * t * v + 8 * 4 * t * LANES


def _tiles(x, weight, *, backward: bool) -> Tiles:
    """The tuned tiles of the nearest problem that fit this one, else the default."""
    (tokens, hidden), vocab = x.shape, weight.shape[1]
    return tuned.choose(
        f"tpu.linear_cross_entropy.{'backward' if backward else 'forward'}",
        chips.current("tpu"),
        {"tokens": tokens, "hidden": hidden, "vocab": vocab},
        jnp.dtype(x.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(x, backward),
        Tiles.default(hidden, x.dtype.itemsize, backward=backward),
    )


def tiles(phase: str, x, weight, labels, bias=None, **options) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return _tiles(x, weight, backward=phase == "backward")


def candidates(phase: str, x, weight, labels, bias=None, **options) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM: the default first, then blocks of 128, then every other size."""
    backward, (tokens, hidden), vocab = phase == "backward", x.shape, weight.shape[1]
    sizes = (2048, 1024, 512, 256, 128)
    found = [Tiles.default(hidden, x.dtype.itemsize, backward=backward), Tiles(LANES, LANES)]
    found += [Tiles(*both) for both in itertools.product(sizes, (4096, *sizes))]
    seen = set()
    for tiles in found:
        cut = tiles.fitted(tokens, vocab, least=2 if backward else 1)
        if tiles.allowed(x, backward) and cut not in seen:
            seen.add(cut)
            yield tiles


def memory(phase: str, tiles: Tiles, x, weight, labels, bias=None, **options) -> int:
    """Bytes of VMEM that the kernel of `phase` is estimated to take."""
    backward = phase == "backward"
    cut = tiles.fitted(x.shape[0], weight.shape[1], least=2 if backward else 1)
    return _vmem_bytes(cut, x.shape[-1], x.dtype.itemsize, backward) + SLACK


def unsupported(
    x, weight, labels, bias=None, *, label_smoothing: float, z_loss: float, logits_soft_cap: float | None
) -> str | None:
    """Why the kernels cannot take these operands (arrays or ShapeDtypeStructs), or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    if weight.dtype != x.dtype:
        return f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}"
    if reason := matrix_unit.unsupported(x.dtype, None):
        return reason
    vmem = chips.current("tpu").vmem_bytes

    def fits(hidden):
        return _vmem_bytes(_BACKWARD[-1], hidden, x.dtype.itemsize, True) + SLACK <= vmem

    if not fits(x.shape[-1]):
        most = max(h for h in range(0, x.shape[-1], LANES) if fits(h))
        limit = f"the least tiles must fit the {vmem >> 20} MiB of VMEM"
        return f"{limit}, that is hidden ≤ {most} in {x.dtype}, got {x.shape[-1]}"
    return None


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


# ------------------------------------------------------------------------------------------------ forward
def _forward_kernel(x_ref, w_ref, labels_ref, *refs, vocab, tiles, label_smoothing, z_loss, logits_soft_cap, with_bias):
    *bias_ref, loss_ref, lse_ref, top_ref, sum_ref, picked_ref, total_ref, labels_column = refs
    j, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, FLOOR, f32)
        for ref in (sum_ref, picked_ref, total_ref):
            ref[...] = jnp.zeros(ref.shape, f32)
        labels_column[...] = jnp.broadcast_to(labels_ref[...], (LANES, tiles.tokens)).T

    _clear_past_the_end(w_ref, j, vocab)
    columns = matrix_unit.turn(tiles.vocab, 0, most=2 * STRIP)
    rows = matrix_unit.turn(tiles.tokens, columns * x_ref.shape[1])
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

    def inside(groups, offsets, value):
        """The groups of 128 columns with `value` past the end of the vocabulary."""
        if vocab % tiles.vocab == 0:
            return groups
        return [jnp.where(lane < vocab - o, g, value) for g, o in zip(groups, offsets, strict=True)]

    def gather(here, strip, z):
        """Takes a strip of products into the running statistics, each [rows, 128]."""
        if with_bias:
            z = z + bias_ref[0][:, strip]
        if logits_soft_cap is not None:
            z = logits_soft_cap * jnp.tanh(z * (1 / logits_soft_cap))
        groups = [z[:, u : u + LANES] for u in range(0, z.shape[1], LANES)]
        offsets = [j * tiles.vocab + strip.start + u for u in range(0, z.shape[1], LANES)]
        if label_smoothing:
            total_ref[here] += functools.reduce(jnp.add, inside(groups, offsets, 0.0))
        groups = inside(groups, offsets, FLOOR)
        label, picked = labels_column[here], picked_ref[here]
        for g, o in zip(groups, offsets, strict=True):
            picked = jnp.where(lane == label - o, g, picked)
        picked_ref[here] = picked
        old = top_ref[here]
        top = functools.reduce(jnp.maximum, groups, old)
        top_ref[here] = top
        new = functools.reduce(jnp.add, [jnp.exp(g - top) for g in groups])
        sum_ref[here] = sum_ref[here] * jnp.exp(old - top) + new

    def turn(row, column):
        here = pl.ds(row, rows)
        _overlapped(
            column, columns, lambda strip: dot(x_ref[here], w_ref[:, strip], NN, None), functools.partial(gather, here)
        )

    _loop(tiles.tokens, rows, lambda row: _loop(tiles.vocab, columns, functools.partial(turn, row)))

    @pl.when(j == last)
    def _():
        top = jnp.max(top_ref[...], 1, keepdims=True)
        lse = top + jnp.log(jnp.sum(sum_ref[...] * jnp.exp(top_ref[...] - top), 1, keepdims=True))
        loss = lse - (1 - label_smoothing) * jnp.sum(picked_ref[...], 1, keepdims=True)
        if label_smoothing:
            loss = loss - (label_smoothing / vocab) * jnp.sum(total_ref[...], 1, keepdims=True)
        if z_loss:
            loss = loss + z_loss * jnp.square(lse)
        for ref, column in ((loss_ref, loss), (lse_ref, lse)):
            ref[...] = jnp.broadcast_to(column, (tiles.tokens, LANES)).T[:1]


def _prepare(x, weight, bias, tiles, backward):
    """Operands grown to whole tiles: x[tokens, hidden] with zeros, bias as float32 [1, vocab]; and the tiles.

    Backward gets at least two blocks of tokens: see `_backward_kernel`.

    The weight keeps its size whenever it can, being expensive to copy: `_clear_past_the_end` copes with its last block.
    """
    (tokens, hidden), vocab = x.shape, weight.shape[1]
    tiles = tiles or _tiles(x, weight, backward=backward)
    least = 2 if backward else 1
    tiles = tiles.fitted(tokens, vocab, least=least)
    wide = round_up(hidden, LANES)
    blocks = max(pl.cdiv(tokens, tiles.tokens), least)
    x = pad_to(pad_to(x, 1, wide), 0, blocks * tiles.tokens)
    weight = pad_to(weight, 0, wide)
    if vocab < tiles.vocab:
        weight = pad_to(weight, 1, tiles.vocab)
    bias = [] if bias is None else [pad_to(bias.astype(f32)[None], 1, round_up(vocab, tiles.vocab))]
    return x, weight, bias, tiles


def _row(vector, size, value=0):
    """vector[tokens] as [1, size]; the new entries are `value`."""
    return pad_to(vector[None], 1, size, value)


def _call(kernel, semantics, tiles, x, weight, *, backward, **kwargs):
    """`pl.pallas_call(kernel, …)` with the VMEM and the cost told to XLA.

    Under `vmap` the calls follow one another: Mosaic batches no array that stays in HBM, and one call fills the chip.
    """
    logits, (passes, products) = x.shape[0] * weight.shape[1], (2, 3) if backward else (1, 1)
    call = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=_vmem_bytes(tiles, x.shape[1], x.dtype.itemsize, backward) + SLACK,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * x.shape[1],
            transcendentals=logits,
            bytes_accessed=passes * (x.size + weight.size) * x.dtype.itemsize,
        ),
        **kwargs,
    )
    return jax.custom_batching.sequential_vmap(lambda *operands: call(*operands))


def forward(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
    tiles: Tiles | None = None,
):
    """((loss, lse), ()), [tokens] each, from x[tokens, hidden], weight[hidden, vocab], labels[tokens], bias[vocab]."""
    tokens, vocab = x.shape[0], weight.shape[1]
    x, weight, bias, tiles = _prepare(x, weight, bias, tiles, backward=False)
    padded, hidden = x.shape
    row = pl.BlockSpec((1, tiles.tokens), lambda i, j: (0, i))
    statistic = pltpu.VMEM((tiles.tokens, LANES), f32)
    loss, lse = _call(
        functools.partial(
            _forward_kernel,
            vocab=vocab,
            tiles=tiles,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logits_soft_cap=logits_soft_cap,
            with_bias=bool(bias),
        ),
        ("parallel", "arbitrary"),
        tiles,
        x,
        weight,
        backward=False,
        grid=(padded // tiles.tokens, pl.cdiv(vocab, tiles.vocab)),
        in_specs=[
            pl.BlockSpec((tiles.tokens, hidden), lambda i, j: (i, 0)),
            pl.BlockSpec((hidden, tiles.vocab), lambda i, j: (0, j)),
            row,
        ]
        + [pl.BlockSpec((1, tiles.vocab), lambda i, j: (0, j)) for _ in bias],
        out_specs=[row] * 2,
        out_shape=[jax.ShapeDtypeStruct((1, padded), f32)] * 2,
        scratch_shapes=[statistic] * 4 + [pltpu.VMEM((tiles.tokens, LANES), jnp.int32)],
        name="linear_cross_entropy",
    )(x, weight, _row(labels, padded), *bias)
    return (loss[0, :tokens], lse[0, :tokens]), ()


# ------------------------------------------------------------------------------------------------ backward
def _backward_kernel(
    xt_ref,
    w_ref,
    labels_ref,
    lse_ref,
    g_ref,
    slope_ref,
    *refs,
    vocab,
    blocks,
    tiles,
    label_smoothing,
    logits_soft_cap,
    with_bias,
):
    """Grid (share of the vocabulary, block of it, block of tokens); everything is [vocab or hidden, tokens].

    dx_hbm[share, hidden, tokens] is added to through two buffers. Step s reads its block while step s-1 computes, and
    its write ends while step s+1 computes. The read for s+1 starts once the write of s-1 has ended: with two blocks of
    tokens or more, what it reads was written at s-1 or before.
    """
    bias_ref, refs = (refs[:1], refs[1:]) if with_bias else ((), refs)
    dx_hbm, dw_ref, db_ref, wt_ref, dw_sum, db_sum, dz_ref, dx_ref, bias_column, reading, writing = refs
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

    def logits_gradient(strip, z):
        """dz of a strip of products [strip, tokens]."""
        if with_bias:
            z = z + bias_column[strip, :1]
        if logits_soft_cap is not None:
            bent = jnp.tanh(z * (1 / logits_soft_cap))
            z = logits_soft_cap * bent
        row = lax.broadcasted_iota(jnp.int32, z.shape, 0) + (block * tiles.vocab + strip.start)
        g = g_ref[...]
        dz = slope_ref[...] * jnp.exp(z - lse_ref[...])
        dz = dz - jnp.where(row == labels_ref[...], (1 - label_smoothing) * g, 0.0)
        if label_smoothing:
            dz = dz - (label_smoothing / vocab) * g
        if logits_soft_cap is not None:
            dz = dz * (1 - jnp.square(bent))
        if vocab % tiles.vocab:
            dz = jnp.where(row < vocab, dz, 0.0)
        if with_bias:
            db_sum[strip] += functools.reduce(jnp.add, [dz[:, u : u + LANES] for u in range(0, tiles.tokens, LANES)])
        dz_ref[strip] = dz.astype(dz_ref.dtype)

    @pl.when(block < blocks)
    def _():
        @pl.when(t == 0)
        def _():
            _clear_past_the_end(w_ref, block, vocab)

            def start_block(start):
                here = pl.ds(start, LANES)
                wt_ref[:, here] = w_ref[here].T
                dw_sum[here] = jnp.zeros((LANES, tiles.vocab), f32)

            _loop(w_ref.shape[0], LANES, start_block)
            if with_bias:
                bias_column[...] = jnp.broadcast_to(bias_ref[0][...], (LANES, tiles.vocab)).T
                db_sum[...] = jnp.zeros(db_sum.shape, f32)

        def turn(start):
            _overlapped(start, columns, lambda strip: dot(wt_ref[strip], xt_ref[...], NN, None), logits_gradient)

        columns = matrix_unit.turn(tiles.vocab, w_ref.shape[0] * tiles.tokens, most=2 * STRIP)
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
            if with_bias:
                db_ref[...] = jnp.sum(db_sum[...].T, 0, keepdims=True)


def backward(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    outputs,
    residuals,
    cotangents,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
    tiles: Tiles | None = None,
) -> dict[str, jax.Array]:
    """Gradients of x, weight and bias (if present) from lse[tokens] and the cotangents of loss and lse, or None."""
    operands = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    (tokens, hidden), vocab, dtype = x.shape, weight.shape[1], x.dtype
    x, weight, bias, tiles = _prepare(x, weight, bias, tiles, backward=True)
    padded, wide = x.shape
    g, lse = cotangents[0].astype(f32), outputs[1]
    slope = g * (1 + 2 * z_loss * lse)
    if cotangents[1] is not None:
        slope = slope + cotangents[1].astype(f32)
    # Tokens past the end: g = 0 and lse = ∞, so that dz is 0 whatever the bias.
    rows = (_row(labels, padded), _row(lse, padded, jnp.inf), _row(g, padded), _row(slope, padded))
    blocks = pl.cdiv(vocab, tiles.vocab)
    shares = min(chips.current("tpu").cores, blocks)
    rounds = pl.cdiv(blocks, shares)

    def along_vocab(height):
        # The last share may be a round short: it stays on the block before and does nothing.
        return pl.BlockSpec((height, tiles.vocab), lambda p, v, t: (0, jnp.minimum(p * rounds + v, blocks - 1)))

    def along_tokens(height):
        return pl.BlockSpec((height, tiles.tokens), lambda p, v, t: (0, t))

    dx, dw, db = _call(
        functools.partial(
            _backward_kernel,
            vocab=vocab,
            blocks=blocks,
            tiles=tiles,
            label_smoothing=label_smoothing,
            logits_soft_cap=logits_soft_cap,
            with_bias=bool(bias),
        ),
        ("parallel", "arbitrary", "arbitrary"),
        tiles,
        x,
        weight,
        backward=True,
        grid=(shares, rounds, padded // tiles.tokens),
        in_specs=[along_tokens(wide), along_vocab(wide), *[along_tokens(1)] * 4, *[along_vocab(1) for _ in bias]],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), along_vocab(wide), along_vocab(1)],
        out_shape=[
            jax.ShapeDtypeStruct((shares, wide, padded), f32),
            jax.ShapeDtypeStruct(weight.shape, dtype),
            jax.ShapeDtypeStruct((1, blocks * tiles.vocab), f32),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiles.vocab, wide), dtype),
            pltpu.VMEM((wide, tiles.vocab), f32),
            pltpu.VMEM((tiles.vocab, LANES), f32),
            pltpu.VMEM((tiles.vocab, tiles.tokens), dtype),
            pltpu.VMEM((2, wide, tiles.tokens), f32),
            pltpu.VMEM((tiles.vocab, LANES), f32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        name="linear_cross_entropy_backward",
    )(x.T, weight, *rows, *bias)
    grads = {"x": dx.sum(0).T[:tokens, :hidden], "weight": dw[:hidden, :vocab], "bias": db[0, :vocab]}
    return {name: grads[name].astype(operand.dtype) for name, operand in operands.items()}
