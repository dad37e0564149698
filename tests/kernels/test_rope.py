"""rope and rope_projection on TPU and Mosaic GPU: interpreted, with races and NaN memory, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops import interpreter
from jaxops.reference.rope import rope_projection, turned, turns
from pallas_kernels import chips, gpu, tpu
from tests.compare import no_worse

bf16 = jnp.bfloat16
CASES = {  # kernel, chip, leading axes and T, D, N, H, positions shared, bias, fields of the tiles
    "gpu-projection": (gpu.rope_projection, "h100", (2, 64), 64, 2, 64, True, True, dict(columns=128, stages=2)),
    "gpu-projection-wide": (gpu.rope_projection, "h100", (70,), 128, 1, 128, False, False, None),
    "tpu-projection": (tpu.rope_projection, "v5e", (2, 128), 64, 2, 64, True, True, dict(m=128, n=128, k=128)),
    "tpu-projection-ragged": (tpu.rope_projection, "v5e", (2, 70), 64, 2, 128, False, True, None),
    "tpu-projection-wide": (tpu.rope_projection, "v5e", (40,), 64, 1, 256, True, False, None),
    "gpu": (gpu.rope, "h100", (2, 70), None, 3, 32, True, False, dict(tokens=64, vector=8, stages=2)),
    "gpu-odd": (gpu.rope, "h100", (9,), None, 2, 80, False, False, None),
    "tpu": (tpu.rope, "v5e", (2, 37), None, 3, 128, False, False, dict(tokens=16, turn=8)),
    "tpu-wide": (tpu.rope, "v5e", (40,), None, 1, 256, True, False, None),
}


def build(leading, depth, heads, dim, shared, bias, dtype=bf16):
    random = np.random.default_rng(0)
    normal = lambda *sizes: jnp.asarray(random.standard_normal(sizes), dtype)
    positions = np.arange(leading[-1]) + 3 if shared else random.integers(0, 1000, leading)
    cos, sin = turns(jnp.asarray(positions), dim, base=10000.0, scaling=None, dtype=dtype)
    operands = {"x": normal(*leading, heads, dim), "cos": cos, "sin": sin}
    if depth is not None:
        w = normal(depth, heads, dim) / depth**0.5
        operands |= {"x": normal(*leading, depth), "w": w.astype(dtype), "bias": normal(heads, dim) if bias else None}
    return operands, normal(*leading, heads, dim)


def everything(operands, dy, projecting):
    """y, and the gradients by name, in plain JAX."""
    moving = {name: x for name, x in operands.items() if name in ("x", "w", "bias") and x is not None}
    still = {name: operands[name] for name in ("cos", "sin")}

    def f(moving):
        if projecting:
            return rope_projection(**moving, **still, precision=None)
        return turned(moving["x"], **still).astype(moving["x"].dtype)

    y, transposed = jax.vjp(f, moving)
    return {"y": y} | {f"d{name}": g for name, g in transposed(dy.astype(y.dtype))[0].items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [n if n in ("gpu", "tpu") else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_interpreted(name):
    kernel, chip, *problem, fields = CASES[name]
    operands, dy = build(*problem)
    projecting, tiles = "w" in operands, fields and kernel.Tiles(**fields)
    static = {"precision": None} if projecting else {}
    with chips.target(chips.named(chip)), getattr(interpreter, name.partition("-")[0])():
        assert kernel.unsupported(**operands, **static) is None
        outputs, residuals = kernel.forward(**operands, **static, tiles=tiles)
        got = {"y": outputs[0]}
        if hasattr(kernel, "backward"):
            saved = dict(outputs=outputs, residuals=residuals, cotangents=(dy,))
            gradients = kernel.backward(**operands, **saved, **static, tiles=tiles)
            got |= {f"d{name}": g for name, g in gradients.items()}
        got = jax.block_until_ready(got)
    plain = everything(operands, dy, projecting)
    with jax.enable_x64(True):
        wide = {n: None if x is None else jnp.asarray(np.asarray(x, np.float64)) for n, x in operands.items()}
        exact = everything(wide, jnp.asarray(np.asarray(dy, np.float64)), projecting)
    assert got.keys() == (plain.keys() if hasattr(kernel, "backward") else {"y"})
    for which, x in got.items():
        no_worse(which, x, plain[which], exact[which], bf16)


def struct(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


TABLE = struct(8, 64, dtype="float32")


@pytest.mark.parametrize(
    ("kernel", "chip", "changes", "reason"),
    [
        (gpu.rope, "a100", {}, "needs compute capability 9.0, got 8.0"),
        (gpu.rope, "h100", {"x": struct(8, 2, 72)}, "so H one of 16, got 72"),
        (gpu.rope, "h100", {"x": struct(8, 2, 1024)}, "at most 256 numbers"),
        (tpu.rope, "v5e", {"x": struct(8, 2, 64)}, "the head size must be 128 or a multiple of 256"),
        (tpu.rope, "v5e", {"x": struct(8, 2, 128, dtype="float16")}, "x must be float32 or bfloat16 on a TPU"),
        (gpu.rope_projection, "h100", {"w": struct(128, 2, 96)}, "the head size must be 64 or 128, got 96"),
        (gpu.rope_projection, "b200", {}, "needs wgmma"),
        (tpu.rope_projection, "v5e", {"w": struct(128, 2, 96)}, "the head size must divide 256"),
        (tpu.rope_projection, "v5e", {"w": struct(128, 1, 64)}, "must be a multiple of 128 columns, got 1 of 64"),
        (tpu.rope_projection, "v5e", {"w": struct(128, 2, 128, dtype="float32")}, "the weights must have the dtype"),
    ],
)
def test_refusals(kernel, chip, changes, reason):
    call = dict(x=struct(8, 2, 128), cos=TABLE, sin=TABLE)
    if kernel in (gpu.rope_projection, tpu.rope_projection):
        call |= dict(x=struct(8, 128), w=struct(128, 2, 128), precision=None)
    with chips.target(chips.named(chip)):
        assert reason in kernel.unsupported(**(call | changes))


def test_tiles_fit():
    for kernel, chip, dims in ((gpu.rope, "h100", (32, 48, 80, 128, 256, 512)), (tpu.rope, "v5p", (128, 256, 512))):
        for length, heads, dim in ((1, 1, dims[0]), *((1000, 24, dim) for dim in dims)):
            call = dict(x=struct(2, length, heads, dim), cos=TABLE, sin=TABLE)
            chosen = chips.named(chip)
            with chips.target(chosen):
                assert kernel.unsupported(**call) is None
                for tiles in kernel.candidates("forward", **call):
                    assert kernel.memory("forward", tiles, **call) <= max(chosen.smem_bytes, chosen.vmem_bytes)
