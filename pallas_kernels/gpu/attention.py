"""Flash attention on GPUs, forward and backward. Which chip is compiled for decides which of three kernels runs.

    x = scale · q kᵀ    x = cap · tanh(x / cap)    x = x + bias - slope · |i - j|    x = score_mod(x, batch, head, i, j)
    x = -inf where masked                                                             (each where given)
    lse = log(Σ_j exp(x_ij) + exp(sink))    p = exp(x - lse)    out = (z ∘ p) v
    dv = (z ∘ p)ᵀ dout    dx = p ∘ (z ∘ dout vᵀ - delta)    delta = Σ_dim out ∘ dout    dbias = dx · score_mod'
    ds = dbias · (1 - tanh²)    dq = scale · ds k    dk = scale · dsᵀ q    dsink = -Σ exp(sink - lse) · delta

query, out [batch, queries, heads, dim]; key, value [batch, keys, kv_heads, dim]; lse [batch, heads, queries], float32.
The head size of value and out may be another. z is what dropout multiplies with: 0 or 1 / (1 - rate).

    capability   kernels                      products                    copies
    8.0          attention_ampere.py          mma, from registers         cp.async
    9.0          attention_hopper.py          wgmma                       TMA, by a warpgroup of their own
    10.0         attention_blackwell.py       tcgen05, in tensor memory   TMA, by a warp of their own
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import chips, modifiers, tuned
from pallas_kernels.gpu import attention_ampere as ampere
from pallas_kernels.gpu import attention_blackwell as blackwell
from pallas_kernels.gpu import attention_hopper as hopper
from pallas_kernels.gpu.attention_scores import LOG2E, Problem, not_lowered, whole_rows
from pallas_kernels.masks import Band
from pallas_kernels.padding import pad_to, round_up

_KERNELS = {(8, 0): ampere, (9, 0): hopper, (10, 0): blackwell}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Columns of one step: `keys` (forward), `keys_dq` (dq), `queries_dkv` (dk, dv). So many `stages` are in flight."""

    keys: int
    keys_dq: int
    queries_dkv: int
    stages: int = 2
    stages_backward: int = 2

    @staticmethod
    def default(dims: tuple[int, int], extras: bool, capability: tuple[int, int]) -> "Tiles":
        """`dims`: the padded head sizes of query and value. `extras`: a score takes more than the product."""
        dim = max(dims)
        if capability == (8, 0):
            # Registers hold scores, weights, accumulators and the operands of what is being multiplied; shared memory
            # is for two blocks of a core, or more.
            return Tiles(64, 64, 64) if dim <= 64 else Tiles(64, 32, 32) if dim <= 128 else Tiles(32, 32, 32)
        if capability == (10, 0):
            # 512 columns of tensor memory: scores, half as many of weights, accumulators; of two blocks in the forward.
            if dim <= 64:
                return Tiles(keys=128, keys_dq=128, queries_dkv=128, stages=3)
            if dim <= 128:
                return Tiles(keys=64, keys_dq=128, queries_dkv=64, stages=4)
            return Tiles(keys=64, keys_dq=64, queries_dkv=64, stages_backward=1)
        # A thread has 240 registers for the float32 tile of scores, its 16-bit copy and one or two [64, dim]
        # accumulators; within that, wide tiles amortise the barriers. Extras hold one more number per score.
        if dim > 128:
            # Least tiles; two stages of the backward would not fit shared memory.
            return Tiles(keys=64, keys_dq=64, queries_dkv=64, stages_backward=1)
        if dim == 128:
            return Tiles(64, 64, 64) if extras else Tiles(keys=128, keys_dq=128, queries_dkv=64)
        return Tiles(keys=128, keys_dq=64, queries_dkv=64) if extras else Tiles(keys=256, keys_dq=128, queries_dkv=128)

    def smem_bytes(self, phase: str, dims: tuple[int, int], itemsize: int, capability: tuple[int, int]) -> int:
        """Shared memory of a block of `phase`, the most of its kernels: what stays, what streams, then statistics,
        barriers and alignment."""
        rows = {(8, 0): 64, (10, 0): 256 if phase == "forward" and max(dims) <= 128 else 128}.get(capability, 128)
        stages = self.stages if phase == "forward" else self.stages_backward
        if capability == (8, 0):
            stages = 1 if phase == "forward" else 2
        row = sum(dims) * itemsize  # of key and value, or of query and dout
        if phase == "forward":
            stays = dims[0] + (dims[1] if dims[0] != dims[1] and capability != (8, 0) else 0)
            return rows * stays * itemsize + stages * self.keys * row + 4096
        return rows * row + stages * max(self.keys_dq, self.queries_dkv) * (row + 8) + 4096

    def allowed(
        self, phase: str, dims: tuple[int, int], itemsize: int, extras: bool, capability: tuple[int, int]
    ) -> bool:
        """Whether copies and products take these sizes, and everything fits shared and tensor memory; registers are not
        counted.

        What is read without bounds is padded to multiples of 256, which the tiles have to divide.
        """
        sizes = (self.keys,) if phase == "forward" else (self.keys_dq, self.queries_dkv)
        stages = self.stages if phase == "forward" else self.stages_backward
        least = 32 if capability == (8, 0) else 64
        if any(not least <= size <= 256 or size % least for size in sizes) or stages < 1:
            return False
        if any(256 % size and (extras or capability != (9, 0)) for size in sizes):
            return False
        if phase == "backward" and self.queries_dkv > 128:  # lse and delta are padded to whole blocks
            return False
        if capability == (10, 0):
            if phase == "forward":
                columns = (2 if max(dims) <= 128 else 1) * (self.keys * 3 // 2 + dims[1])
            else:
                sums = sum(dims) if max(dims) <= 128 else max(dims)
                columns = max(self.keys_dq * 5 // 2 + dims[0], self.queries_dkv * 5 // 2 + sums)
            if columns > 512:
                return False
        return self.smem_bytes(phase, dims, itemsize, capability) <= chips.current("gpu").smem_bytes


def _extras(
    bias=None, mask=None, query_segment_ids=None, logits_soft_cap=None, score_mod=None, mask_mod=None,
    alibi_slopes=None, dropout_rows=None, **others,
) -> bool:  # fmt: skip
    """Whether a score takes more than the product and a band."""
    del others
    extras = bias, mask, query_segment_ids, logits_soft_cap, score_mod, mask_mod, alibi_slopes, dropout_rows
    return any(x is not None for x in extras)


def _dims(query, value) -> tuple[int, int]:
    return round_up(query.shape[3], 64), round_up(value.shape[3], 64)


def _shape_class(query, key, value, *, is_causal: bool, local_window_size=None, **call) -> dict[str, int | str]:
    """What the best tiles depend on."""
    band = Band.of(is_causal, local_window_size)
    kind = "open" if band.open else "causal" if band == Band(None, 0) else "banded"
    return {
        "kind": f"{kind} extras" if _extras(**call) else kind,
        "head_dim": str(max(_dims(query, value))),
        "group": query.shape[2] // key.shape[2],
        "queries": query.shape[1],
        "keys": key.shape[1],
    }


def tiles(phase: str, query, key, value, **call) -> Tiles:
    """What `forward` or `backward` (the `phase`) takes when it is given no tiles; `call` as for `unsupported`."""
    dims, itemsize, extras, chip = _dims(query, value), query.dtype.itemsize, _extras(**call), chips.current("gpu")
    return tuned.choose(
        f"gpu.attention.{phase}",
        chip,
        _shape_class(query, key, value, **call),
        jnp.dtype(query.dtype).name,
        Tiles,
        lambda tiles: tiles.allowed(phase, dims, itemsize, extras, chip.capability),
        Tiles.default(dims, extras, chip.capability),
    )


_tiles = tiles  # where an argument has this name


def candidates(phase: str, query, key, value, **call) -> Iterator[Tiles]:
    """Tiles worth trying that the chip's memories allow: the default first, then blocks of 128.

    Some will not fit the registers: only the compiler knows.
    """
    del key
    dims, itemsize, extras = _dims(query, value), query.dtype.itemsize, _extras(**call)
    capability = chips.current("gpu").capability
    default = Tiles.default(dims, extras, capability)
    if phase == "forward":
        changes = [{"keys": keys, "stages": stages} for keys in (128, 64, 192, 256, 32) for stages in (2, 3, 4)]
    else:
        changes = [
            {"keys_dq": keys, "queries_dkv": queries, "stages_backward": stages}
            for keys, queries, stages in itertools.product((128, 64, 192, 32), (128, 64, 32), (2, 1, 3))
        ]
    if capability == (8, 0):  # how many stages are in flight is fixed
        changes = [change for change in changes if 2 in (change.get("stages"), change.get("stages_backward"))]
    found = dict.fromkeys([default, *(dataclasses.replace(default, **change) for change in changes)])
    yield from (tiles for tiles in found if tiles.allowed(phase, dims, itemsize, extras, capability))


def memory(phase: str, tiles: Tiles, query, key, value, **call) -> int:
    """Bytes of shared memory that a block of `phase` is estimated to take."""
    del key, call
    return tiles.smem_bytes(phase, _dims(query, value), query.dtype.itemsize, chips.current("gpu").capability)


def tile(phase: str, tiles: Tiles, query, key, value, **call) -> tuple[int, int]:
    """(queries, keys) of the blocks that the schedule of `phase` counts: of dq in the backward."""
    del key, call
    capability = chips.current("gpu").capability
    if phase == "backward":
        return 64 if capability == (8, 0) else 128, tiles.keys_dq
    two = capability == (10, 0) and max(_dims(query, value)) <= 128
    return 64 if capability == (8, 0) else 256 if two else 128, tiles.keys


def unsupported(
    query, key, value, *, scale: float, is_causal: bool, local_window_size=None, logits_soft_cap=None, bias=None,
    score_mod=None, mask_mod=None, **others,
) -> str | None:  # fmt: skip
    """Why these kernels cannot serve these operands on the current chip, in one sentence, or None.

    `others` are the optional operands that are served whatever they are: mask, lengths, prefixes, segments, sinks,
    slopes, dropout.
    """
    del is_causal, local_window_size, others
    chip = chips.current("gpu")
    if chip.capability not in _KERNELS:
        ours = ", ".join(".".join(map(str, capability)) for capability in _KERNELS)
        capability = ".".join(map(str, chip.capability))
        return f"the kernels are for GPUs of compute capability {ours}, not {capability} ({chip.name})"
    dtypes = [jnp.dtype(x.dtype) for x in (query, key, value)]
    if dtypes[0] not in (jnp.bfloat16, jnp.float16) or len(set(dtypes)) > 1:
        return f"query, key and value must share bfloat16 or float16, got {', '.join(x.name for x in dtypes)}"
    if max(query.shape[3], value.shape[3]) > 256:
        return f"the head dimension must be at most 256, got {max(query.shape[3], value.shape[3])}"
    if not (math.isfinite(scale) and scale > 0):
        return f"scale must be positive and finite, got {scale}"
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        return f"logits_soft_cap must be positive, got {logits_soft_cap}"
    if bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"bias must be bfloat16, float16 or float32, got {bias.dtype}"
    if max(query.shape[0], pl.cdiv(query.shape[1], 64), pl.cdiv(key.shape[1], 64)) > 65535:
        return f"the grid is limited to 65535 batches and blocks of 64 rows, got {query.shape} and {key.shape}"
    return modifiers.no_kernel(score_mod, mask_mod, bias) or not_lowered(score_mod, mask_mod)


def forward(query, key, value, *, tiles: Tiles | None = None, **call) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """((out, lse), ()): see the head of this file. A row that sees nothing has out 0 and lse +inf, or the sink if any.

    `call`: the static options scale, is_causal, local_window_size, logits_soft_cap, score_mod, mask_mod, dropout_rate;
    the optional operands bias, mask, query_seq_lengths, key_value_seq_lengths, query_segment_ids,
    key_value_segment_ids, prefix_lengths, sinks, alibi_slopes, dropout_rows.
    """
    kernels = _KERNELS[chips.current("gpu").capability]
    problem = Problem.of(query, key, value, tiles=tiles or _tiles("forward", query, key, value, **call), **call)
    out, lse = kernels.forward(problem)
    return (out[:, : query.shape[1], :, : value.shape[3]], lse[..., : query.shape[1]]), ()


def backward(
    query, key, value, *, outputs, residuals, cotangents, tiles: Tiles | None = None, **call
) -> dict[str, jax.Array]:
    """The gradients of query, key and value, and of bias and sinks if given; see the head of this file.

    `outputs` is (out, lse) as `forward` returns it; of `cotangents` only that of out counts: lse is a residual.
    `call` is as for `forward`.
    """
    del residuals
    (out, lse), dout = outputs, cotangents[0]
    kernels = _KERNELS[chips.current("gpu").capability]
    problem = Problem.of(query, key, value, tiles=tiles or _tiles("backward", query, key, value, **call), **call)
    bias, sinks, lengths = (call.get(name) for name in ("bias", "sinks", "query_seq_lengths"))
    _B, T, S, _N, _K, H, V = problem.shape
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32)
    gradients, sunk = {}, jnp.zeros_like(delta)  # what the sink takes of the gradient of a row
    if sinks is not None:
        sunk = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse) * delta
        gradients["sinks"] = -jnp.sum(sunk, axis=(0, 2)).astype(sinks.dtype)
    if lengths is not None:  # with a sink, lse is finite beyond them
        lse = jnp.where(jnp.arange(T) < lengths[:, None, None], lse, jnp.inf)
    rows = round_up(T, 128)  # whole blocks of any kernel, and the stride of a copy is a multiple of 16 bytes
    arguments = (
        whole_rows(pad_to(dout.astype(query.dtype), 3, V)),
        pad_to(lse * LOG2E, 2, rows, jnp.inf),
        pad_to(-delta, 2, rows),
    )
    gradients["query"] = kernels.backward_q(problem, *arguments, "query")
    # Beyond a head size of 128 the two sums do not fit the registers together, and on Hopper not either beside a slope
    # or the numbers of dropout: one kernel each.
    crowded = kernels is hopper and (problem.score_mod is not None or problem.dropout_rate > 0)
    together = max(H, V) <= 128 and not crowded
    for wanted in (("key", "value"),) if together else (("key",), ("value",)):
        gradients |= kernels.backward_kv(problem, *arguments, wanted)
    for name, x in (("query", query), ("key", key), ("value", value)):
        gradients[name] = gradients[name][:, : x.shape[1], :, : x.shape[3]]
    if bias is not None:
        # A bias that is the same for every key is seen only by the sink: Σ_j dx_ij = exp(sink - lse) · delta.
        dx = sunk[..., None] if bias.shape[3] == 1 else kernels.backward_q(problem, *arguments, "bias")[..., :T, :S]
        axes = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        gradients["bias"] = jnp.sum(dx, axis=axes, keepdims=True).astype(bias.dtype)
    return gradients
