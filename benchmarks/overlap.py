"""What travels behind computation in a training step of large layers, compiled for 64 TPU v5p chips nobody has here.

Layers of an 8-billion-parameter GPT on data 4 × fsdp 4 × tensor 4, forward and backward, ZeRO 3 along fsdp: once as
this library sends (rings of neighbours beside the products, of rows, sums and weights), once with XLA's collectives
inside the same `shard_map`, and once as plain `jit` with shardings. Read from the schedule of TPU's compiler and
**modelled**: products take their operations at the peak, kernels their operations or their bytes at the bandwidth of
the HBM, whichever is longer (those of attention and those that send say nothing of operations), everything else no
time, and the transfers of one direction of one mesh axis follow each other on one link. So there is less to hide behind
than there would be. A transfer is hidden as far as it ends before the program waits for it; an XLA collective that is
not split in start and done is exposed, its bytes going both ways at once. What a kernel sends from inside is not
counted, nor the work of a loop, as attention in XLA is.

JAX_PLATFORMS=cpu python -m benchmarks.overlap [ours xla jit]     (with the extra `tpu-compile`; no TPU is used)
"""

import dataclasses
import math
import os
import re
import sys
import time
from collections import defaultdict

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxops
import sharding
from benchmarks.scale import LAYER, SIZES, Size, attend, block, shapes
from jaxops import optim
from jaxops.workbench import hlo
from jaxops.workbench.collectives import collectives
from pallas_kernels import chips
from pallas_kernels.tpu.collective_matmul import LINKS

TOPOLOGY = "v5p:4x4x4"
MESH = dict(data=4, fsdp=4, tensor=4)
LAYERS = 2
CHIP, LINK = chips.CHIPS["v5p"], LINKS["v5p"]
OVERLAP: dict = dict(overlap=True, fsdp="fsdp")
BATCH = PartitionSpec(("data", "fsdp"))


def by_jit(p: dict, x: jax.Array) -> jax.Array:
    """`benchmarks.scale.block` of plain products, which XLA partitions."""
    normed = jaxops.rms_norm(x, p["attention_norm"])
    query, key, value = (jnp.einsum("btd,dnh->btnh", normed, p[name]) for name in ("query", "key", "value"))
    x = x + jnp.einsum("btnh,nhd->btd", attend(query, key, value), p["out"])
    normed = jaxops.rms_norm(x, p["mlp_norm"])
    return x + (jax.nn.silu(normed @ p["gate"]) * (normed @ p["up"])) @ p["down"]


def training_step(size: Size, mesh: Mesh, form: str):
    """(jitted step, its abstract operands)"""
    of_layer, _ = shapes(size)
    specs = [{name: PartitionSpec(*LAYER[name]) for name in of_layer}] * LAYERS
    placed = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    parameters = [{name: placed(of_layer[name], jnp.float32, specs[0][name]) for name in of_layer}] * LAYERS
    rows = MESH["data"] * MESH["fsdp"]
    by_hand = form != "jit"
    stream = PartitionSpec(("data", "fsdp"), "tensor") if by_hand else BATCH
    x = placed((rows, size.length, size.hidden), jnp.bfloat16, PartitionSpec(("data", "fsdp"), "tensor"))
    optimizer = optim.adamw(3e-4, 0.9, 0.95, weight_decay=0.1, small=0)
    implementation = "ring" if form == "ours" else "xla"
    reduction = sharding.gradient_reduction(
        optimizer,
        axis=("data", "fsdp"),
        zero=3,
        small=1 << 14,
        precision=sharding.Precision(jnp.float32, jnp.bfloat16, reduction=jnp.bfloat16),
        implementation=implementation,
    )

    def loss(parameters, x, y):
        for p in parameters:

            def layer(p, x):
                if form == "xla":
                    p = reduction.gather(p, specs[0])
                p = {name: w.astype(jnp.bfloat16) for name, w in p.items()}
                return by_jit(p, x) if form == "jit" else block(p, x, **(OVERLAP if form == "ours" else {}))

            x = jax.checkpoint(layer, policy=reduction.policy)(p, x)
        return jnp.mean(jnp.square((x - y).astype(jnp.float32)))

    if not by_hand:
        state = jax.eval_shape(optimizer.init, parameters)
        of_state = type(state)(PartitionSpec(), specs, specs)
        state = jax.tree.map(lambda s, spec: placed(s.shape, s.dtype, spec), state, of_state)

        def step(parameters, state, x, y):
            value, grads = jax.value_and_grad(loss)(parameters, x, y)
            return value, *optimizer.apply(parameters, grads, state)

        return jax.jit(step, donate_argnums=(0, 1)), (parameters, state, x, x)

    of_state = reduction.state_specs(parameters, specs, mesh=mesh)
    init = jax.shard_map(reduction.init, mesh=mesh, in_specs=(specs,), out_specs=of_state)
    state = jax.tree.map(lambda s, spec: placed(s.shape, s.dtype, spec), jax.eval_shape(init, parameters), of_state)

    def step(parameters, state, x, y):
        def of_part(parameters, x, y):
            return lax.pmean(loss(parameters, x, y), "tensor")

        value, grads = reduction.value_and_grad(of_part)(parameters, state, x, y)
        return value, *reduction.apply(parameters, grads, state)

    local = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, of_state, stream, stream),
        out_specs=(PartitionSpec(), specs, of_state),
    )
    return jax.jit(local, donate_argnums=(0, 1)), (parameters, state, x, x)


@dataclasses.dataclass
class Traffic:
    """Of one mesh axis, in seconds of its links: sent, and of that not hidden."""

    sent: float = 0.0
    exposed: float = 0.0
    transfers: int = 0


def modelled(text: str, sizes: dict[str, int]) -> tuple[float, dict[str, Traffic]]:
    """(seconds of the step, {axis: traffic}) of a compiled program without loops, as the module says."""
    facts = hlo.instructions(text)
    communication = {one["name"]: one for one in collectives(text, sizes)}
    clock, free = 0.0, defaultdict(float)
    ends: dict[str, tuple[str, float]] = {}  # of a started transfer: its axis, and when it has ended
    found: dict[str, Traffic] = defaultdict(Traffic)
    entry = text[text.index("ENTRY ") :]
    for line in entry.splitlines():
        if not (match := re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line)):
            continue
        one = facts[match[1]]
        if one.name in communication:
            sent = communication[one.name]
            axis = sent["axis"] or "?"
            n = math.prod(devices_along(name, sizes, line) for name in axis.split("+"))
            if one.opcode == "collective-permute-start":
                seconds = sent["bytes"] / LINK
                link = (axis, direction(line, sizes, axis))
                free[link] = max(free[link], clock) + seconds
                ends[one.name] = axis, free[link]
            else:  # (n - 1) / n of the array, by both directions of the ring, twice for an all-reduce
                seconds = sent["bytes"] * (n - 1) / n / 2 / LINK * (2 if sent["kind"] == "all-reduce" else 1)
                clock += seconds
                found[axis].exposed += seconds
            found[axis].sent += seconds
            found[axis].transfers += 1
        elif one.opcode == "collective-permute-done":
            started = re.search(r"collective-permute-done\([^%]*%([\w.-]+)", line)
            assert started is not None, line
            axis, end = ends.pop(started[1])
            found[axis].exposed += max(0.0, end - clock)
            clock = max(clock, end)
        elif one.opcode == "custom-call":
            said = re.search(r'"cost_estimate":\{"flops":"(\d+)"', line)
            clock += max(int(said[1]) / CHIP.flops if said else 0.0, one.bytes / CHIP.bandwidth)
        else:
            clock += (one.flops or 0) / CHIP.flops
    return clock, dict(found)


def devices_along(axis: str, sizes: dict[str, int], line: str) -> int:
    """Of a mesh axis, or of one that XLA has named for itself in the line."""
    named = re.search(rf"'{axis}'=(\d+)", line)
    return sizes.get(axis) or (int(named[1]) if named else 1)


def direction(line: str, sizes: dict[str, int], axis: str) -> int:
    """1 or -1: the way along the axis that a permutation's first pair goes."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", line[line.index("source_target_pairs") :])
    stride = 1
    for name in reversed(sizes):
        if name == axis:
            break
        stride *= sizes[name]
    n = sizes.get(axis, 1)
    steps = {(int(b) // stride - int(a) // stride) % n for a, b in pairs}
    return 1 if steps == {1} else -1


def main(*names: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = sharding.make_mesh(**MESH, devices=devices)
    sizes = dict(mesh.shape)
    for form in names or ("ours", "xla", "jit"):
        began = time.perf_counter()
        step, operands = training_step(SIZES["8b"], mesh, form)
        compiled = step.lower(*operands).compile()
        text = compiled.as_text()
        seconds, found = modelled(text, sizes)
        temp = compiled.memory_analysis().temp_size_in_bytes / 2**30
        print(f"{form}: {LAYERS} layers, step {1e3 * seconds:.2f} ms modelled, temporaries {temp:.1f} GiB, compiled in "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        for axis, one in sorted(found.items()):
            hidden = 1 - one.exposed / max(one.sent, 1e-12)
            print(
                f"  {axis}: {one.transfers} transfers, {1e3 * one.sent:.2f} ms of a link, {hidden:.0%} hidden",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
