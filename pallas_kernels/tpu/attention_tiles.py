"""What the TPU attention kernels know of a call before any number is seen, and how they cut its work."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from pallas_kernels import chips, tuned
from pallas_kernels.masks import Band
from pallas_kernels.padding import round_up

MOST_CANDIDATES = 48
_TABLE_BYTES = 128 << 10  # of SMEM for the schedule of one head; it is double-buffered


def computed_in(dtype) -> jnp.dtype:
    """float32 for float16, which the matrix unit does not take; else the dtype itself."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call. `scheduled`: which blocks are visited comes from a table, because more than a band decides it."""

    query_length: int
    key_length: int  # of the keys that any query can see
    head_dim: int  # of queries and keys, padded
    value_dim: int  # padded
    group: int  # query heads per key head
    dtype: str  # that it is computed in
    band: Band
    lengths: bool  # query, key or prefix lengths come with the data
    prefix: bool  # prefix lengths do
    segments: bool
    bias: str | None  # "tile", "keys" or "queries": which of the two it varies over
    mask: str | None
    alibi: bool
    scale: float
    cap: float | None
    score_mod: Callable | None
    mask_mod: Callable | None
    dropout_rate: float

    @staticmethod
    def of(
        *,
        query,
        key,
        value,
        bias=None,
        mask=None,
        query_seq_lengths=None,
        key_value_seq_lengths=None,
        query_segment_ids=None,
        prefix_lengths=None,
        alibi_slopes=None,
        scale=1.0,
        is_causal=False,
        local_window_size=None,
        logits_soft_cap=None,
        score_mod=None,
        mask_mod=None,
        dropout_rate=0.0,
        **others,
    ) -> "Problem":
        """Of the arguments of `forward`; `others` (key segments, sinks, words of dropout) have no say."""
        del others
        band = Band.of(is_causal, local_window_size)
        keys = key.shape[1]
        if band.right is not None and prefix_lengths is None:  # keys past the last query's reach are never read
            keys = max(min(keys, query.shape[1] + band.right), 1)
        return Problem(
            query_length=query.shape[1],
            key_length=keys,
            head_dim=round_up(query.shape[3], 16),
            value_dim=round_up(value.shape[3], 16),
            group=query.shape[2] // key.shape[2],
            dtype=computed_in(query.dtype).name,
            band=band,
            lengths=any(x is not None for x in (query_seq_lengths, key_value_seq_lengths, prefix_lengths)),
            prefix=prefix_lengths is not None,
            segments=query_segment_ids is not None,
            bias=None if bias is None else _kind(bias),
            mask=None if mask is None else _kind(mask),
            alibi=alibi_slopes is not None,
            scale=float(scale),
            cap=None if logits_soft_cap is None else float(logits_soft_cap),
            score_mod=score_mod,
            mask_mod=mask_mod,
            dropout_rate=float(dropout_rate),
        )

    @property
    def scheduled(self) -> bool:
        return self.lengths or self.segments or self.mask is not None or self.mask_mod is not None

    @property
    def diagonal(self) -> bool:
        """Causal and square: the queries of a block start where its last keys start."""
        return self.band.right == 0 and self.key_length == self.query_length and not self.prefix

    @property
    def bounded(self) -> bool:
        """Whether |logit| ≤ scale·|q|·|k|: nothing is added to the product."""
        return self.cap is None and self.bias is None and not self.alibi and self.score_mod is None

    @property
    def tiled(self) -> bool:
        """Whether something as large as the logits comes along, or a gradient of that size leaves."""
        return "tile" in (self.mask, self.bias)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def shape_class(self) -> dict[str, int | str]:
        """What the best tiles depend on. A window counts by its reach, and what comes with the data as if it hid
        nothing."""
        kind = "causal" if self.diagonal and self.band.left is None else "open" if self.band.open else "banded"
        extras = {
            "tiled": self.tiled,
            "lengths": self.lengths,
            "scheduled": self.scheduled and not self.lengths,
            "modified": self.score_mod is not None or self.alibi,
            "dropout": self.dropout_rate > 0,
        }
        sides = {"left": self.band.left, "right": self.band.right} if kind == "banded" else {}
        reach = {name: max(side, 1) for name, side in sides.items() if side is not None}
        same = self.head_dim == self.value_dim
        return {
            "kind": " ".join([kind, *(name for name, there in extras.items() if there)]),
            "head_dim": str(self.head_dim) if same else f"{self.head_dim}/{self.value_dim}",
            "group": self.group,
            "queries": self.query_length,
            "keys": self.key_length,
            **reach,
        }


def _kind(x) -> str:
    """Which of queries and keys a [.., T, S] operand varies over."""
    return "queries" if x.shape[3] == 1 else "keys" if x.shape[2] == 1 else "tile"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`queries` and `keys` of a block, `span` keys held in VMEM; items of `sub` queries, `strip` on the diagonal.

    `part` is the number of keys between two interleave points (forward) or of an item (backward); `lag` counts the
    items by which the gradient products trail the softmax (backward); `bounded` is 1 if the softmax may do without the
    running maximum where |q|·|k| allows it (forward). Sizes are multiples of 128; `sub` and `strip` divide `queries`,
    `keys` divides `span` (and `queries`, on the causal diagonal).
    """

    queries: int
    keys: int
    span: int
    sub: int
    strip: int
    part: int = 512
    lag: int = 0
    bounded: int = 0

    @staticmethod
    def default(problem: Problem, *, backward: bool) -> "Tiles | None":
        """The largest blocks that are worth it and fit the chip's memories; None if not even the smallest do.

        1024 queries amortise the prologue of a step, 2048 on a 256-wide matrix unit (forward), whose products take half
        the time. Forward, 512 keys at a time are as good as 1024 and half the code. Masked edges and windows want finer
        blocks, a tile of bias or mask [span, queries] fewer queries. Keys are cut into spans only when VMEM demands it.
        """
        wide = chips.current("tpu").mxu == 256
        largest = 2048 if wide and not backward else 1024
        if problem.itemsize == 4 or problem.tiled or not problem.diagonal:
            largest = 512
        elif problem.band.left is not None:
            largest = 1024 if problem.band.left >= 1023 else 512
        while True:
            queries = _block(problem.query_length, largest)
            most = min(1024 if backward else 512, largest)
            keys = _divisor(queries, most) if problem.diagonal else _block(problem.key_length, most)
            sub = 256 if queries % 256 == 0 else 128
            strip = sub if wide or not backward else 128
            tiles = Tiles(
                *(queries, keys, 0, sub, strip, 512 if backward else 256),
                lag=int(wide and backward),
                # With few keys there is little to gain, and the largest weight is exactly 1 only below a maximum.
                bounded=int(not backward and problem.bounded and problem.key_length >= 512),
            ).spanning(problem, backward)
            # A short span reloads the queries too often: give up queries first.
            fits = tiles.fits(problem, backward)
            if fits and (tiles.span >= min(4096, problem.key_length) or largest <= 256):
                return tiles
            if largest <= 128:
                return tiles if fits else None
            largest //= 2

    def corner(self, problem: Problem) -> bool:
        """Whether the block on the diagonal is cut into strips: all of it is in the band but for what is above."""
        reach = problem.band.left is None or problem.band.left >= self.queries - 1
        return problem.diagonal and reach and self.span >= problem.key_length

    def spanning(self, problem: Problem, backward: bool) -> "Tiles":
        """These tiles with the span that reaches all keys, halved as long as it does not fit VMEM."""
        reach = round_up(problem.query_length, self.queries) if problem.diagonal else problem.key_length
        blocks = -(-reach // self.keys)
        tiles = dataclasses.replace(self, span=self.keys * blocks)
        while tiles.vmem(problem, backward) > _room() and blocks > 1:
            blocks = -(-blocks // 2)
            tiles = dataclasses.replace(self, span=self.keys * blocks)
        return tiles

    def wastes(self, problem: Problem, other: "Tiles") -> bool:
        """Whether more of the sequences is padding than with `other`."""
        lengths = (problem.query_length, problem.key_length)
        mine, others = (self.queries, self.span), (other.queries, other.span)
        return any(round_up(n, a) > round_up(n, b) for n, a, b in zip(lengths, mine, others, strict=True))

    def allowed(self, problem: Problem, backward: bool) -> bool:
        """Whether the sizes divide as they have to, and everything fits."""
        sizes = (self.queries, self.keys, self.span, self.sub, self.strip, self.part)
        if any(size < 128 or size % 128 for size in sizes) or self.lag < 0:
            return False
        if self.queries % self.sub or self.queries % self.strip or self.span % self.keys:
            return False
        # Whole blocks of keys lie before every block of queries, and its own last keys in the span.
        if self.corner(problem) and (self.queries % self.keys or self.span % self.queries):
            return False
        if self.bounded and (backward or not problem.bounded):
            return False
        return self.fits(problem, backward)

    def fits(self, problem: Problem, backward: bool) -> bool:
        """Whether the kernel is estimated to fit VMEM, and its schedule SMEM."""
        return self.vmem(problem, backward) <= _room() and self.smem(problem) <= _TABLE_BYTES

    def smem(self, problem: Problem) -> int:
        """Bytes of SMEM of the schedule of one head."""
        if not problem.scheduled:
            return 0
        rows = -(-problem.query_length // self.queries)
        return 4 * round_up(rows, 8) * round_up(HEADER + self.span // self.keys, 128)

    def vmem(self, problem: Problem, backward: bool) -> int:
        """Bytes of VMEM of a kernel: operands twice (they are double-buffered), scratch, and the tiles in flight."""
        size, dims = problem.itemsize, (problem.head_dim, problem.value_dim)
        wide = sum(round_up(dim, 128) for dim in dims[: 2 if backward else 1])
        queries, span = self.queries, self.span
        blocks = 2 * (2 if backward else 1) * sum(dims) * (queries + span) * size
        scratch = dims[0 if backward else 1] * queries * 4 + 24 * queries * 4 + span * wide * size
        if backward:
            scratch += sum(dims) * span * 4
        tiles = {"tile": span * queries}
        blocks += 2 * 4 * tiles.get(problem.bias or "", 0) + 2 * tiles.get(problem.mask or "", 0)
        blocks += 2 * 8 * 4 * (3 * span + 4 * queries)
        if backward:
            blocks += 2 * 4 * {"tile": span * queries, "keys": span * 128}.get(problem.bias or "", 0)
        flight = 24 * self.sub * (min(self.part, self.keys) if backward else self.keys)
        return blocks + scratch + flight


HEADER = 3  # of a row of the schedule: how many blocks are whole, how many are cut, whether the corner is only causal


def _room() -> int:
    """VMEM that a kernel may plan with; the rest is the compiler's."""
    return chips.current("tpu").vmem_bytes * 3 // 4


def _block(size: int, largest: int) -> int:
    """The block that cuts `size` into the fewest even pieces of at most `largest`: little is wasted on padding."""
    even = -(-size // -(-size // largest))
    return round_up(even, 128 if even <= 512 else 256)


def _divisor(queries: int, most: int) -> int:
    return max(n for n in range(128, min(queries, most) + 1, 128) if queries % n == 0)


def chosen(problem: Problem, *, backward: bool) -> Tiles:
    """The tuned tiles of the nearest problem, if there are any that this one allows, else the default."""
    default = Tiles.default(problem, backward=backward)
    assert default is not None, "`unsupported` refuses what no tiles fit"
    return tuned.choose(
        f"tpu.attention.{'backward' if backward else 'forward'}",
        chips.current("tpu"),
        problem.shape_class(),
        problem.dtype,
        Tiles,
        lambda tiles: tiles.allowed(problem, backward) and not tiles.wastes(problem, default),
        default,
        lambda tiles: tiles.spanning(problem, backward),
    )


def candidates(problem: Problem, *, backward: bool) -> Iterator[Tiles]:
    """The default, blocks of 128, then the others, those that differ least from the default first."""
    default = Tiles.default(problem, backward=backward)
    if default is None:
        return
    longest = round_up(problem.query_length, 128)
    shortest = round_up(problem.key_length, 128)
    found: dict[Tiles, None] = {}
    for queries, keys in itertools.product((128, 256, 512, 1024, 2048), (128, 256, 512, 1024)):
        if queries > max(longest, 128) or keys > shortest or (problem.diagonal and queries % keys):
            continue
        lags, bounds = ((0, 1), (0,)) if backward else ((0,), (0, 1) if problem.bounded else (0,))
        for sub, part, lag, bounded in itertools.product((128, 256), (256, 512), lags, bounds):
            if sub > queries or part > max(keys, 256):
                continue
            strips = {sub, 128} if problem.diagonal and backward else {sub}
            for strip in strips:
                found[Tiles(queries, keys, 0, sub, strip, part, lag, bounded).spanning(problem, backward)] = None
    small = Tiles(*[128] * 6)  # a grid step for each pair of blocks of 128

    def far(tiles: Tiles) -> float:
        """Doublings from the default, each field for itself."""
        pairs = zip(dataclasses.astuple(tiles), dataclasses.astuple(default), strict=True)
        return sum(abs(math.log2((a or 0.5) / (b or 0.5))) for a, b in pairs)

    order = [default, small, *sorted(found, key=far)]
    fitting = (tiles for tiles in dict.fromkeys(order) if tiles.allowed(problem, backward))
    allowed = (tiles for tiles in fitting if not tiles.wastes(problem, default))
    yield from itertools.islice(allowed, MOST_CANDIDATES)
