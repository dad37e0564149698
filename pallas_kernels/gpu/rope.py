"""y = rope(x) on GPUs: x is read and y is written once, by TMA, wherever the heads lie.

A block, one warpgroup, takes some tokens of one sequence. It keeps their cos and sin in registers and goes through the
heads; the halves of a head come and leave as copies of their own, so both numbers of a pair are in one thread. The
gradient is the turn by the negative angle.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips
from pallas_kernels.rotation import by_sequence

THREADS = 128
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
MAX_COPY = 256  # elements one TMA copy moves along an axis
_MOST = 48  # numbers of a half that a thread may hold: four halves and their results are in registers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`tokens` of a block, a thread reading `vector` numbers at once, and `stages` heads on their way."""

    tokens: int
    vector: int
    stages: int

    @staticmethod
    def default(half: int) -> "Tiles | None":
        """The longest vectors, then 16 numbers to a thread: more blocks hide more latency. None: nothing fits."""
        for vector in (8, 4, 2, 1):
            tokens = least = THREADS * vector // math.gcd(THREADS * vector, half)
            while (tokens + least) * half <= 16 * THREADS and tokens + least <= MAX_COPY:
                tokens += least
            if Tiles(tokens, vector, 4).allowed(half):
                return Tiles(tokens, vector, 4)
        return None

    def allowed(self, half: int) -> bool:
        """Whether a tile lies evenly over the threads, which can hold it, and one copy moves it."""
        fine = self.stages >= 2 and 0 < self.tokens <= MAX_COPY and self.vector in (1, 2, 4, 8)
        return fine and self.tokens * half % (THREADS * self.vector) == 0 and self.tokens * half <= _MOST * THREADS


def unsupported(x, cos, sin) -> str | None:
    """Why the kernel cannot take x[..., T, N, H] (an array or ShapeDtypeStruct), or None."""
    del cos, sin
    chip, dim = chips.current("gpu"), x.shape[-1]
    if chip.capability < (9, 0):
        capability = ".".join(map(str, chip.capability))
        return f"heads are streamed by TMA, which needs compute capability 9.0, got {capability}"
    if x.dtype not in DTYPES:
        return f"x must be float32, bfloat16 or float16, got {x.dtype}"
    least = 32 // x.dtype.itemsize
    if dim % least:
        return f"half a head must be a multiple of 16 bytes, which TMA copies, so H one of {least}, got {dim}"
    if dim // 2 > MAX_COPY or Tiles.default(dim // 2) is None:
        return f"half a head must be at most {MAX_COPY} numbers that lie evenly over {THREADS} threads, got {dim // 2}"
    if math.prod(x.shape[:-3]) > 65535:
        return f"the grid is limited to 65535 sequences, got {math.prod(x.shape[:-3])}"
    return None


def tiles(phase: str, x, cos, sin) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; operands as for `unsupported`."""
    return next(candidates(phase, x, cos, sin))


def candidates(phase: str, x, cos, sin) -> Iterator[Tiles]:
    """Tiles worth trying, the default first."""
    default, half = Tiles.default(x.shape[-1] // 2), x.shape[-1] // 2
    assert default is not None, "`unsupported` refuses what no tiles fit"
    found = [default, *(dataclasses.replace(default, stages=s) for s in (2, 3, 6))]
    found += [dataclasses.replace(default, tokens=factor * default.tokens) for factor in (2, 4)]
    yield from (one for one in dict.fromkeys(found) if one.allowed(half))


def memory(phase: str, tiles: Tiles, x, cos, sin) -> int:
    """Bytes of shared memory of a block: heads that arrive, two that leave, cos and sin."""
    return tiles.tokens * x.shape[-1] * ((tiles.stages + 2) * x.dtype.itemsize + 4) + 2048


def _turn(x, cos, sin, tiles: Tiles, name: str):
    """[x₁ cos - x₂ sin, x₂ cos + x₁ sin] of x[..., T, N, H]."""
    shape, (length, heads, dim) = x.shape, x.shape[-3:]
    x, half, tokens = x.reshape(-1, length, heads, dim), dim // 2, tiles.tokens
    cos, sin = (by_sequence(table, shape[:-2]) for table in (cos, sin))
    stages, layout = min(tiles.stages, heads + 1), plgpu.Layout.WG_STRIDED((tokens, half), vec_size=tiles.vector)

    def body(x_ref, cos_ref, sin_ref, y_ref, arriving, leaving, turns, ready, turns_ready):
        batch, here = lax.axis_index("batch"), pl.ds(lax.axis_index("tile") * tokens, tokens)
        for i, ref in enumerate((cos_ref, sin_ref)):
            plgpu.copy_gmem_to_smem(ref.at[batch if len(cos) > 1 else 0, here], turns.at[i], turns_ready)

        def fetch(head):
            slot = lax.rem(head, stages)
            for i in range(2):
                source = x_ref.at[batch, here, head, pl.ds(i * half, half)]
                plgpu.copy_gmem_to_smem(source, arriving.at[slot, i], ready.at[slot])

        for head in range(min(stages - 1, heads)):
            fetch(jnp.int32(head))
        plgpu.barrier_wait(turns_ready)
        cosine, sine = (plgpu.load(turns.at[i], layout=layout) for i in range(2))

        def step(head, _):
            slot, out = lax.rem(head, stages), lax.rem(head, 2)
            plgpu.barrier_wait(ready.at[slot])
            first, second = (plgpu.load(arriving.at[slot, i], layout=layout).astype(jnp.float32) for i in range(2))
            plgpu.wait_smem_to_gmem(2)  # what left the slot of this head two heads ago
            leaving[out, 0] = (first * cosine - second * sine).astype(x.dtype)
            leaving[out, 1] = (second * cosine + first * sine).astype(x.dtype)
            plgpu.commit_smem()  # also orders the loads before the copy that overwrites the next slot
            for i in range(2):
                target = y_ref.at[batch, here, head, pl.ds(i * half, half)]
                plgpu.copy_smem_to_gmem(leaving.at[out, i], target)
            pl.when(head + (stages - 1) < heads)(lambda: fetch(head + (stages - 1)))

        lax.fori_loop(0, heads, step, None)
        plgpu.wait_smem_to_gmem(0)

    (y,) = plgpu.kernel(
        body,
        kernel_name=name,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        scratch_types=dict(
            arriving=plgpu.SMEM((stages, 2, tokens, half), x.dtype),
            leaving=plgpu.SMEM((2, 2, tokens, half), x.dtype),
            turns=plgpu.SMEM((2, tokens, half), jnp.float32),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            turns_ready=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(pl.cdiv(length, tokens), len(x)),
        grid_names=("tile", "batch"),
    )(x, cos, sin)
    return y.reshape(shape)


def forward(x: jax.Array, cos: jax.Array, sin: jax.Array, *, tiles: Tiles | None = None):
    """((y,), ()) from x[..., T, N, H], cos and sin broadcastable to [..., T, H / 2]."""
    tiles = tiles or next(candidates("forward", x, cos, sin))
    return (_turn(x, cos, sin, tiles, "rope"),), ()


def backward(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, outputs, residuals, cotangents, tiles: Tiles | None = None
) -> dict[str, jax.Array]:
    """The gradient of x from the cotangent of y."""
    del outputs, residuals
    tiles = tiles or next(candidates("backward", x, cos, sin))
    return {"x": _turn(cotangents[0].astype(x.dtype), cos, -sin, tiles, "rope_backward")}
