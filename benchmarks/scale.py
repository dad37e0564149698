"""One training step of GPTs of 8, 70 and 405 billion parameters, compiled for 2048 TPU v5p chips that nobody has here.

The step is made of this library: sequence- and tensor-parallel layers, a pipeline, parameters split over `fsdp` and
gathered layer by layer where they are used, a loss over the split vocabulary, AdamW on float32 parameters with its
state where they lie. TPU's own compiler says whether it fits the memory of a chip, and which collectives it makes; that
these run side by side in the phases of the pipeline without waiting for each other for ever, only a TPU could say.

JAX_PLATFORMS=cpu python -m benchmarks.scale [8b 70b 405b]     (with the extra `tpu-compile`; no TPU is used)
"""

import dataclasses
import os
import sys
import time
from collections import defaultdict

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxops
import sharding
from jaxops import optim
from jaxops.workbench.collectives import collectives

TOPOLOGY = "v5p:8x16x16"
HBM = 95 * 2**30  # bytes of a v5p chip


@dataclasses.dataclass(frozen=True)
class Size:
    """Llama 3.1's shapes (arXiv:2407.21783), and how they are laid out on 2048 chips."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    mesh: dict[str, int]
    micro_batches: int
    vocabulary: int = 128256
    length: int = 8192

    @property
    def dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden * self.dim * (self.heads + self.key_heads)
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


SIZES = {
    "8b": Size(4096, 32, 32, 8, 14336, dict(data=16, fsdp=8, tensor=4, pipeline=4), 16),
    "70b": Size(8192, 80, 64, 8, 28672, dict(data=8, fsdp=8, tensor=8, pipeline=4), 16),
    "405b": Size(16384, 126, 128, 8, 53248, dict(data=4, fsdp=8, tensor=8, pipeline=8), 32),
}

# Of a layer [D, …] is split over fsdp along D, the rest over tensor; in front stand chunk, stage and depth.
LAYER = {
    "attention_norm": (),
    "query": ("fsdp", "tensor"),
    "key": ("fsdp", "tensor"),
    "value": ("fsdp", "tensor"),
    "out": ("tensor", None, "fsdp"),
    "mlp_norm": (),
    "gate": ("fsdp", "tensor"),
    "up": ("fsdp", "tensor"),
    "down": ("tensor", "fsdp"),
}
SHARED = {"embedding": ("tensor", "fsdp"), "norm": (), "head": ("fsdp", "tensor")}


def shapes(size: Size) -> tuple[dict, dict]:
    """Of one layer, and of what the first and the last stage share."""
    D, H, F, V = size.hidden, size.dim, size.mlp, size.vocabulary
    layer = dict(query=(D, size.heads, H), key=(D, size.key_heads, H), value=(D, size.key_heads, H))
    layer |= dict(out=(size.heads, H, D), gate=(D, F), up=(D, F), down=(F, D), attention_norm=(D,), mlp_norm=(D,))
    return layer, dict(embedding=(V, D), norm=(D,), head=(D, V))


def whole(parameters: dict, specs: dict) -> dict:
    """A layer's parameters in bfloat16, all-gathered over fsdp; their gradients are reduce-scattered."""
    gathered = {}
    for name, w in parameters.items():
        w = w.astype(jnp.bfloat16)
        gathered[name] = sharding.all_gather(w, "fsdp", specs[name].index("fsdp")) if "fsdp" in specs[name] else w
    return gathered


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention with rotary positions, of [B, T, heads, dim]."""
    positions = jnp.arange(query.shape[-3])
    rotated = (jaxops.rope(y, positions, base=500000.0) for y in (query, key))
    return jaxops.dot_product_attention(*rotated, value, is_causal=True)


def block(p: dict, x: jax.Array, overlap: bool = False, fsdp: str | None = None) -> jax.Array:
    """x ↦ x + attention, x + MLP of the norms of x, with parameters that are whole, or split over `fsdp`."""
    stream = dict(sequence=True, overlap=overlap, fsdp=fsdp)
    normed = jaxops.rms_norm(x, p["attention_norm"])
    matrices = (p[name] for name in ("query", "key", "value", "out"))
    x = x + sharding.heads_parallel_attention(normed, *matrices, attend=attend, **stream)
    return x + sharding.gated_mlp(jaxops.rms_norm(x, p["mlp_norm"]), p["gate"], p["up"], p["down"], **stream)


@jax.checkpoint
def layer(parameters: dict, x: jax.Array) -> jax.Array:
    return block(whole(parameters, LAYER), x)


def embed(shared: dict, tokens: jax.Array) -> jax.Array:
    return sharding.vocab_parallel_embed(tokens, whole(shared, SHARED)["embedding"], sequence=True)


def loss(shared: dict, x: jax.Array, labels: jax.Array) -> jax.Array:
    p = whole(shared, SHARED)
    return sharding.vocab_parallel_cross_entropy(jaxops.rms_norm(x, p["norm"]), p["head"], labels, sequence=True)


def training_step(size: Size, mesh: Mesh):
    """(jitted step, its abstract operands, the table of its schedule)."""
    stages, m = size.mesh["pipeline"], size.micro_batches
    table = sharding.schedule("1f1b", stages, m, overlap=True)
    depth = -(-size.layers // stages)
    deeper = size.layers % stages or stages  # the first stages have a layer more where they cannot have as many

    def stage(parameters, x, place):
        """A loop over the layers: one is compiled, whatever their number."""

        def body(x, one):
            n, parameters = one
            y = layer(parameters, x)
            return jnp.where((n < depth - 1) | (place.stage < deeper), y, x), None

        return jax.lax.scan(body, x, (jnp.arange(depth), parameters))[0]

    value_and_grad = sharding.pipeline_value_and_grad(stage, loss, table, embed_fn=embed)
    optimizer = optim.adamw(3e-4, 0.9, 0.95, weight_decay=0.1, small=0)

    of_layer, of_shared = shapes(size)
    specs = (
        {name: PartitionSpec(None, "pipeline", None, *LAYER[name]) for name in of_layer},
        {name: PartitionSpec(*SHARED[name]) for name in of_shared},
    )
    placed = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    parameters = (
        {name: placed((1, stages, depth, *of_layer[name]), jnp.float32, specs[0][name]) for name in of_layer},
        {name: placed(of_shared[name], jnp.float32, specs[1][name]) for name in of_shared},
    )
    batch = PartitionSpec(("data", "fsdp"))
    rows = size.mesh["data"] * size.mesh["fsdp"] * m
    tokens = placed((rows, size.length), jnp.int32, batch)

    state = jax.eval_shape(optimizer.init, parameters)
    state_specs = type(state)(PartitionSpec(), specs, specs)
    state = jax.tree.map(lambda x, spec: placed(x.shape, x.dtype, spec), state, state_specs)

    def step(parameters, state, tokens, labels):
        value, grads = value_and_grad(*parameters, tokens, labels)
        return value, *optimizer.apply(parameters, grads, state)

    everything = (specs, state_specs)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(*everything, batch, batch), out_specs=(PartitionSpec(), *everything)
    )
    return jax.jit(sharded, donate_argnums=(0, 1)), (parameters, state, tokens, tokens), table


def main(*names: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    for name in names or SIZES:
        size = SIZES[name]
        mesh = sharding.make_mesh(**size.mesh, devices=devices)
        start = time.perf_counter()
        step, operands, table = training_step(size, mesh)
        compiled = step.lower(*operands).compile()
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        # What is donated is counted once.
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        layout = " × ".join(f"{axis} {n}" for axis, n in size.mesh.items())
        print(f"{name}: {size.parameters / 1e9:.1f} billion parameters on {layout}, {TOPOLOGY}", flush=True)
        print(f"  {operands[2].shape[0]} sequences of {size.length} tokens, {size.micro_batches} micro-batches of 1")
        print(f"  traced and compiled in {seconds:.0f} s")
        print(f"  HBM of a chip: {total / 2**30:.1f} of {HBM / 2**30:.0f} GiB, of which temporaries "
              f"{memory.temp_size_in_bytes / 2**30:.1f}")  # fmt: skip
        print(f"  idle share of the pipeline: {table.bubble:.1%}")
        found: dict = defaultdict(lambda: [0, 0, 0])
        for one in collectives(compiled.as_text(), dict(mesh.shape)):
            row = found[one["axis"], one["kind"]]
            row[0] += one["bytes"]
            row[1] += one["bytes"] if one["overlapped"] else 0
            row[2] += 1
        print("  collectives, each counted once (those of a layer and of a phase run as often as these do):")
        for (axis, kind), (total_bytes, overlapped, count) in sorted(found.items(), key=str):
            print(f"    {axis or 'several'}: {kind}, {count} in the program, {total_bytes / 2**20:.1f} MiB, "
                  f"{overlapped / total_bytes:.0%} with work beside it")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
