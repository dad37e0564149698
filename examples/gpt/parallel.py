"""The GPT on a mesh of data × fsdp × tensor × pipeline devices: where its arrays lie, its loss and its gradients.

Along tensor the layers are those of `sharding.nn`, with the stream split by rows; along pipeline the blocks are stages;
along fsdp every array is split, and gathered where it is used (with a pipeline, once in a step). One `jax.shard_map` is
around the whole step, so that every operator sees the part of one device and may run as a kernel; inside it
`sharding.gradient_reduction` sums the gradients over the batch and updates the parameters.

A checkpoint holds the parameters layer by layer, whatever the mesh. On a pipeline the blocks are one tree of arrays
[chunks, stages, layers of a stage, …] while they are trained: `Parallel.stacked` and `Parallel.layered` go to and fro.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxops
import sharding
import sharding.nn
from gpt.model import GPT, VOCABULARY, Config, transformer_block
from jaxops.nn import TransformerBlock
from jaxops.workbench.collectives import collectives
from sharding.mesh import path_name

Tree = Any
AXES = ("data", "fsdp", "tensor", "pipeline")
BATCH = ("data", "fsdp")  # the batch is split over both
CHUNKS = {"interleaved_1f1b": 2}  # virtual stages on each device; 1 in the other schedules

# What is split over tensor, by the end of a parameter's path (Megatron-LM, https://arxiv.org/abs/1909.08053): the first
# matrix of a pair by its outputs, the second by its inputs, so that a block needs one sum per pair; the vocabulary.
_CUT: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("query", "kernel"): (None, "tensor", None),  # [width, heads, dim]
    ("key", "kernel"): (None, "tensor", None),
    ("value", "kernel"): (None, "tensor", None),
    ("out", "kernel"): ("tensor", None, None),  # [heads, dim, width]
    ("gate", "kernel"): (None, "tensor"),  # [width, hidden], after the experts if there are any
    ("up", "kernel"): (None, "tensor"),
    ("down", "kernel"): ("tensor", None),  # [hidden, width]
    ("embed", "embedding"): ("tensor", None),  # [vocabulary, width]
    ("head", "kernel"): (None, "tensor"),  # [width, vocabulary]
}


def partition_spec(path: tuple[Any, ...], shape: Sequence[int], mesh: Mesh, also: Sequence[str] = ("fsdp",)) -> P:
    """Of a parameter, or of an optimizer's copy of it: its cut over tensor, and the axes of `also` where they divide.

    Each of `also` splits the first dimension that is whole and that it divides, if there is one.
    """
    cut = _CUT.get(tuple(path_name(path).split("/")[-2:]), ()) if mesh.shape["tensor"] > 1 else ()
    entries = [*[None] * (len(shape) - len(cut)), *cut]
    for axis in also:
        size = mesh.shape[axis]
        whole = [n for n, entry in enumerate(entries) if entry is None and shape[n] % size == 0]
        if size > 1 and whole:
            entries[whole[0]] = axis
    return P(*entries)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The GPT of `config` on `mesh`, which `sharding.make_mesh` made; table: the schedule if there is a pipeline.

    Sizes must fit: `misfit` says which do not. parameters and gradients are stacked where there is a pipeline.
    """

    config: Config
    dtype: Any
    mesh: Mesh
    table: sharding.Table | None = None

    # ---- where arrays lie -------------------------------------------------------------------------------------------

    def layered(self, tree: Tree) -> Tree:
        """Every tree of parameters inside `tree` layer by layer, as checkpoints have it."""

        def unstacked(blocks: Tree) -> Tree:
            blocks = self._layers.join(blocks)
            return {n: jax.tree.map(lambda w: w[n], blocks) for n in range(self.config.layers)}

        return self._with_blocks(unstacked, tree)

    def stacked(self, tree: Tree) -> Tree:
        """The inverse of `layered`: what is trained."""

        def stacked(blocks: Tree) -> Tree:
            return self._layers.split(
                jax.tree.map(lambda *w: jnp.stack(w), *(blocks[n] for n in range(self.config.layers)))
            )

        return self._with_blocks(stacked, tree)

    def _with_blocks(self, change: Callable[[Tree], Tree], tree: Tree) -> Tree:
        """The blocks of every tree of parameters inside `tree` changed, if there is a pipeline."""
        if self.table is None:
            return tree

        def of(parameters: nnx.State) -> nnx.State:
            blocks, rest = _parts(parameters)
            return _whole(change(blocks), rest)

        return jax.tree.map(lambda x: of(x) if _is_parameters(x) else x, tree, is_leaf=_is_parameters)

    def specs(self, tree: Tree) -> Tree:
        """Where the arrays of a tree of what is trained lie."""

        def of(path: tuple, leaf: Any) -> P:
            if self.table is not None and "blocks" in path_name(path).split("/"):
                return P(None, "pipeline", None, *partition_spec(path, leaf.shape[3:], self.mesh))
            return partition_spec(path, leaf.shape, self.mesh)

        return jax.tree.map_with_path(of, tree)

    def layered_specs(self, tree: Tree) -> Tree:
        """The same of a tree layer by layer: no device holds more there than it does in training."""
        of = lambda path, leaf: partition_spec(path, leaf.shape, self.mesh, ("fsdp", "pipeline", "data"))
        return jax.tree.map_with_path(of, tree)

    # ---- loss and gradients -----------------------------------------------------------------------------------------

    def init(self, reduction: sharding.GradientReduction, parameters: Tree) -> sharding.ReductionState:
        """The optimizer's state on the mesh."""
        specs = self.specs(parameters)
        places = reduction.state_specs(parameters, specs, mesh=self.mesh)
        return jax.shard_map(reduction.init, mesh=self.mesh, in_specs=(specs,), out_specs=places)(parameters)

    def step(
        self,
        reduction: sharding.GradientReduction,
        parameters: Tree,
        state: sharding.ReductionState,
        windows: jax.Array,
        micro_batches: int = 1,
    ) -> tuple[jax.Array, Tree, sharding.ReductionState]:
        """(the mean cross-entropy of windows[batch, T + 1], new parameters, new state).

        The gradients are those of the cross-entropy and of the routers' losses. micro_batches: without a pipeline, in
        whose table they are.
        """
        specs = self.specs(parameters)
        places = reduction.state_specs(parameters, specs, mesh=self.mesh)

        def pipelined(parameters: Tree, state: Any, windows: jax.Array) -> tuple[jax.Array, Tree, Any]:
            function = sharding.pipeline_value_and_grad(self._layers, self._loss, self.table, embed_fn=self._embed)
            own = _parts(jax.tree.map(self._own, reduction.local(parameters), specs))
            loss, gradient = function(*own, windows[:, :-1], windows[:, 1:])
            gradient = jax.tree.map(self._summed, _whole(*gradient), specs)
            return loss, *reduction.apply(parameters, gradient, state)

        def whole(parameters: Tree, state: Any, windows: jax.Array) -> tuple[jax.Array, Tree, Any]:
            function = reduction.value_and_grad(self._local_loss, micro_batches=micro_batches, has_aux=True)
            (_, losses), gradients = function(parameters, state, windows)
            return lax.pmean(jnp.mean(losses), BATCH), *reduction.apply(parameters, gradients, state)

        local = whole if self.table is None else pipelined
        return jax.shard_map(local, mesh=self.mesh, in_specs=(specs, places, P(BATCH)), out_specs=(P(), specs, places))(
            parameters, state, windows
        )

    def value(self, parameters: Tree, windows: jax.Array) -> jax.Array:
        """The mean cross-entropy alone."""

        def local(parameters: Tree, windows: jax.Array) -> jax.Array:
            if self.table is None:
                return lax.pmean(self._local_loss(parameters, windows)[1], BATCH)
            function = sharding.pipeline_value(self._layers, self._loss, self.table, embed_fn=self._embed)
            own = _parts(jax.tree.map(self._own, parameters, specs))
            return function(*own, windows[:, :-1], windows[:, 1:])

        specs = self.specs(parameters)
        return jax.shard_map(local, mesh=self.mesh, in_specs=(specs, P(BATCH)), out_specs=P())(parameters, windows)

    def _local_loss(self, parameters: Tree, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(what is trained, the cross-entropy) of the device's windows."""
        if self._split:  # one sum over tensor of a gradient, not one for each use of a parameter
            parameters = jax.tree.map(lambda w: sharding.copy(w, "tensor"), parameters)
        blocks, shared = _parts(parameters)
        block = self._block
        if self.mesh.shape["fsdp"] > 1:  # what was gathered is gathered again, not kept
            block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
        x, penalty = self._embed(shared, windows[:, :-1]), 0.0
        for n in range(self.config.layers):
            x, more = block(blocks[n], x)
            penalty = penalty + more
        loss = self._loss(shared, x, windows[:, 1:])
        return loss + penalty, loss

    def _own(self, w: jax.Array, spec: P) -> jax.Array:
        """A parameter for the pipeline: whole along fsdp, once for all micro-batches, and the device's own copy.

        Within the phases only the stream is sent, each time after the last: what the devices of a stage send
        independently of each other, virtual devices of a CPU may confuse.
        """
        w = sharding.all_gather(w, "fsdp", spec.index("fsdp")) if "fsdp" in spec else w
        return sharding.copy(w, "tensor") if self._split else w

    def _summed(self, gradient: jax.Array, spec: P) -> jax.Array:
        """The gradient of a parameter from that of `_own`."""
        if self._split and "tensor" not in spec:
            gradient = lax.psum(gradient, "tensor")
        return sharding.reduce_scatter(gradient, "fsdp", spec.index("fsdp")) if "fsdp" in spec else gradient

    def _embed(self, shared: Tree, tokens: jax.Array) -> jax.Array:
        return self._ends(shared).embed(tokens)

    def _loss(self, shared: Tree, x: jax.Array, labels: jax.Array) -> jax.Array:
        ends = self._ends(shared)
        x = ends.norm(x)
        weight = ends.output_weight().astype(x.dtype)
        if self._split:
            return sharding.vocab_parallel_cross_entropy(x, weight, labels, sequence=True)
        return jaxops.linear_cross_entropy(x, weight, labels)

    def _block(self, parameters: Tree, x: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """(x, the losses of the router) after a block."""
        graph, specs = self._block_graph
        block = nnx.merge(graph, parameters if self.table else _gathered(parameters, specs))
        if not self.config.experts:
            return block(x), 0.0
        if not self._split:
            x = x + block.attention(block.attention_norm(x))
            y, penalty = block.mlp.routed(block.mlp_norm(x))
            return x + y, penalty
        # Every device of tensor has all tokens, and a part of the features inside every expert.
        x = block.attended(x)
        y, penalty = block.mlp.routed(sharding.enter(block.mlp_norm(x), "tensor", sequence=True))
        return x + sharding.leave(y, "tensor", sequence=True), lax.pmean(penalty, "tensor")

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def _split(self) -> bool:
        return self.mesh.shape["tensor"] > 1

    @functools.cached_property
    def _layers(self) -> sharding.Layers:
        assert self.table is not None
        return sharding.Layers(lambda parameters, x: self._block(parameters, x)[0], self.table)

    @functools.cached_property
    def _block_graph(self) -> tuple[nnx.GraphDef, Tree]:
        """The graph of a block, and the specs of its parameters."""
        kind = TransformerBlock
        if self._split:
            kind = functools.partial(sharding.nn.ParallelTransformerBlock, sequence=True)

        def block() -> nnx.Module:
            made = transformer_block(self.config, self.dtype, nnx.Rngs(0), kind)
            if self.config.experts:
                made.mlp.axis_names = BATCH
            return made

        graph, state = nnx.split(nnx.eval_shape(block))
        return graph, _specs(state, self.mesh)

    @functools.cached_property
    def _ends_graph(self) -> tuple[nnx.GraphDef, Tree]:
        """The graph of what is before and after the blocks, and the specs of its parameters."""

        def ends() -> nnx.Module:
            model = GPT(dataclasses.replace(self.config, layers=0), self.dtype, rngs=nnx.Rngs(0))
            if self._split:
                model.embed = sharding.nn.VocabParallelEmbed(
                    VOCABULARY, self.config.width, sequence=True, dtype=self.dtype, rngs=nnx.Rngs(0)
                )
            return model

        graph, state = nnx.split(nnx.eval_shape(ends))
        return graph, _specs(state, self.mesh)

    def _ends(self, shared: Tree) -> GPT:
        graph, specs = self._ends_graph
        return nnx.merge(graph, shared if self.table else _gathered(shared, specs))


@dataclasses.dataclass(frozen=True)
class Plain:
    """The same model of Flax's, JAX's and Optax' own operators, partitioned by XLA, on the same devices.

    A pipeline is more copies of it: its devices split the batch.
    """

    config: Config
    dtype: Any
    mesh: Mesh

    @classmethod
    def like(cls, model: Parallel) -> "Plain":
        devices, tensor = model.mesh.devices.flatten(), model.mesh.shape["tensor"]
        return cls(model.config, model.dtype, sharding.make_mesh(data=-1, tensor=tensor, devices=devices))

    def specs(self, tree: Tree) -> Tree:
        return jax.tree.map_with_path(lambda path, leaf: partition_spec(path, leaf.shape, self.mesh), tree)

    def value_and_grad(self, parameters: Tree, windows: jax.Array) -> tuple[jax.Array, Tree]:
        def trained(parameters: Tree) -> tuple[jax.Array, jax.Array]:
            loss, penalty = nnx.merge(self._graph, parameters).loss_and_penalty(windows)
            return loss + penalty, loss

        (_, loss), gradient = jax.value_and_grad(trained, has_aux=True)(parameters)
        return loss, gradient

    def value(self, parameters: Tree, windows: jax.Array) -> jax.Array:
        return nnx.merge(self._graph, parameters).loss(windows)

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: GPT(self.config, self.dtype, plain=True, rngs=nnx.Rngs(0))))[0]


def sent(program: str, model: Parallel) -> list[dict[str, Any]]:
    """What a device sends in a run of a compiled program: the collectives, "bytes" each and "count" of them.

    The collectives inside a phase of the pipeline run as often as the schedule has the phase; those of the embedding
    and of the loss are counted as on the stages that have them.
    """
    found = []
    for one in collectives(program, dict(model.mesh.shape)):
        axis = "+".join(name for name in (one["axis"] or "?").split("+") if model.mesh.shape.get(name) != 1)
        if axis:
            table, count = model.table, one["count"]
            if one["branch"] and table is not None and count is not None:
                cells = table.micro_batches * (table.chunks if len(one["branch"]) == 1 else 1)
                count = count * cells // len(table.rows)
            found.append(one | {"axis": axis, "count": count})
    return found


def misfit(
    config: Config, batch: int, sizes: Mapping[str, int], table: sharding.Table | None, micro_batches: int
) -> str | None:
    """Why the model and the batch do not fit a mesh of these sizes, or None."""
    tensor, stages = sizes["tensor"], sizes["pipeline"]
    for name, size in (
        ("--kv-heads", config.kv_heads),
        ("--hidden", config.hidden),
        ("--length", config.length),
        ("the vocabulary", VOCABULARY),
    ):
        if size % tensor:
            return f"{name} must be a multiple of the {tensor} devices along tensor, got {size}"
    copies = sizes["data"] * sizes["fsdp"]
    if batch % copies:
        return f"--batch must be a multiple of the {copies} devices along data and fsdp, got {batch}"
    if config.experts and (stages > 1 or micro_batches > 1):
        return (
            f"--experts go with pipeline=1 and one micro-batch, got {stages} and {micro_batches}: the routers' losses "
            "are of a whole batch"
        )
    if batch // copies % micro_batches:
        return (
            f"--micro-batches must divide the {batch // copies} windows of --batch on each device along data and fsdp, "
            f"got {micro_batches}"
        )
    if table is None:
        return None
    if config.layers % (stages * table.chunks):
        chunks = f", {table.chunks} chunks each" if table.chunks > 1 else ""
        return f"--layers must be a multiple of the {stages} stages along pipeline{chunks}, got {config.layers}"
    return None


def _is_parameters(tree: Any) -> bool:
    return isinstance(tree, nnx.State) and "blocks" in tree


def _parts(parameters: nnx.State) -> tuple[Tree, nnx.State]:
    """(blocks, the rest)"""
    rest = dict(parameters.raw_mapping)
    return rest.pop("blocks"), nnx.State(rest)


def _whole(blocks: Tree, rest: nnx.State) -> nnx.State:
    """The inverse of `_parts`."""
    return nnx.State({**rest.raw_mapping, "blocks": blocks})


def _specs(state: nnx.State, mesh: Mesh) -> list[P]:
    return [partition_spec(path, leaf.shape, mesh) for path, leaf in jax.tree.leaves_with_path(state)]


def _gathered(parameters: Tree, specs: Sequence[P]) -> Tree:
    """The arrays, whole along fsdp."""
    leaves, tree = jax.tree.flatten(parameters)
    whole = [
        sharding.all_gather(leaf, "fsdp", spec.index("fsdp")) if "fsdp" in spec else leaf
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(tree, whole)
