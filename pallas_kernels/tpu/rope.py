"""y = x ∘ cos + swap(x) ∘ sin on the TPU: x is read and y is written once.

swap exchanges the halves of every head; cos and sin are as wide as a head, the first half of sin negated. A grid step
owns some tokens of one sequence with all of their heads, and a loop takes a few of them a turn. The gradient is the
turn by the negative angle.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.padding import round_up
from pallas_kernels.rotation import by_sequence

f32 = jnp.float32
LANES = 128
SUBLANES = 16  # heads are padded to so many at most
TURN = 64 * 1024  # numbers of a turn of the loop
SLACK = 4 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`tokens` of a grid step, a multiple of `turn`, those of a turn."""

    tokens: int
    turn: int

    @staticmethod
    def default(x) -> "Tiles":
        """2 MiB a block, so that a step's fixed cost hides behind its copy; a turn of 64 registers."""
        (length, _, _), token = x.shape[-3:], _token(x)
        turn = min(TURN // token, length)
        turn = turn if turn == length else turn // 8 * 8 or 8  # rows of the tables come in eights
        block = min(2 << 20, chips.current("tpu").vmem_bytes // 16) // (token * x.dtype.itemsize)
        return Tiles(max(min(block, length) // turn, 1) * turn, turn)

    def allowed(self, x) -> bool:
        """Whether the sizes divide as they have to and everything fits VMEM."""
        length = x.shape[-3]
        fine = 0 < self.turn <= self.tokens <= round_up(length, 8) and self.tokens % self.turn == 0
        fine = fine and (self.turn % 8 == 0 or self.turn == self.tokens == length)
        return fine and memory("forward", self, x, None, None) <= chips.current("tpu").vmem_bytes


def _token(x) -> int:
    """Numbers of a token as they lie in VMEM."""
    *_, heads, dim = x.shape
    return round_up(heads, SUBLANES) * round_up(dim, LANES)


def unsupported(x, cos, sin) -> str | None:
    """Why the kernel cannot take x[..., T, N, H] (an array or ShapeDtypeStruct), or None."""
    del cos, sin
    if x.dtype not in (f32, jnp.bfloat16):
        return f"x must be float32 or bfloat16 on a TPU, got {x.dtype}"
    if x.shape[-1] != LANES and x.shape[-1] % (2 * LANES):
        return f"the head size must be {LANES} or a multiple of {2 * LANES}, whole registers, got {x.shape[-1]}"
    if not Tiles(8, 8).allowed(x):
        return f"eight tokens must fit the VMEM, got {x.shape[-2]} heads of {x.shape[-1]}"
    return None


def tiles(phase: str, x, cos, sin) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return next(candidates(phase, x, cos, sin))


def candidates(phase: str, x, cos, sin) -> Iterator[Tiles]:
    """Tiles worth trying that fit the chip's VMEM, the default first."""
    default = Tiles.default(x)
    found = [default, Tiles(default.turn, default.turn), Tiles(2 * default.tokens, default.turn), Tiles(8, 8)]
    yield from (one for one in dict.fromkeys(found) if one.allowed(x))


def memory(phase: str, tiles: Tiles, x, cos, sin) -> int:
    """Bytes of VMEM that the kernel is estimated to take: every block is there twice."""
    table = 4 * round_up(x.shape[-1], LANES)
    return SLACK + 2 * tiles.tokens * (2 * _token(x) * x.dtype.itemsize + 2 * table)


def _kernel(x_ref, cos_ref, sin_ref, y_ref, *, turn):
    tokens, _, dim = x_ref.shape

    def one(i, _):
        here = pl.ds(i * turn, turn)
        x = x_ref[here].astype(f32)
        if dim == LANES:
            swapped = pltpu.roll(x, dim // 2, 2)
        else:
            swapped = jnp.concatenate([x[:, :, dim // 2 :], x[:, :, : dim // 2]], 2)
        cos, sin = (ref[here][:, None] for ref in (cos_ref, sin_ref))
        y_ref[here] = (x * cos + swapped * sin).astype(y_ref.dtype)

    lax.fori_loop(0, tokens // turn, one, None)


def _turn(x, cos, sin, tiles: Tiles, name: str):
    shape, (length, heads, dim) = x.shape, x.shape[-3:]
    x = x.reshape(-1, length, heads, dim)
    cos, sin = (by_sequence(table, shape[:-2]).astype(f32) for table in (cos, sin))
    tables = [jnp.concatenate(halves, 2) for halves in ((cos, cos), (-sin, sin))]
    block = pl.BlockSpec((None, tiles.tokens, heads, dim), lambda b, i: (b, i, 0, 0))
    table = pl.BlockSpec((None, tiles.tokens, dim), lambda b, i: (b if len(cos) > 1 else 0, i, 0))
    call = pl.pallas_call(
        functools.partial(_kernel, turn=tiles.turn),
        grid=(len(x), pl.cdiv(length, tiles.tokens)),
        in_specs=[block, table, table],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=memory("", tiles, x, None, None) + SLACK
        ),
        cost_estimate=pl.CostEstimate(
            flops=3 * math.prod(shape), transcendentals=0, bytes_accessed=2 * math.prod(shape) * x.dtype.itemsize
        ),
        name=name,
    )
    return jax.custom_batching.sequential_vmap(lambda *operands: call(*operands))(x, *tables).reshape(shape)


def forward(x: jax.Array, cos: jax.Array, sin: jax.Array, *, tiles: Tiles | None = None):
    """((y,), ()) from x[..., T, N, H], cos and sin broadcastable to [..., T, H / 2]."""
    return (_turn(x, cos, sin, tiles or next(candidates("forward", x, cos, sin)), "rope"),), ()


def backward(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, outputs, residuals, cotangents, tiles: Tiles | None = None
) -> dict[str, jax.Array]:
    """The gradient of x from the cotangent of y."""
    del outputs, residuals
    tiles = tiles or next(candidates("backward", x, cos, sin))
    return {"x": _turn(cotangents[0].astype(x.dtype), cos, -sin, tiles, "rope_backward")}
