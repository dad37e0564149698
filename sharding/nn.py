"""Flax NNX layers split over a mesh axis: flax's and jaxops' parameters and arguments, and where each parameter lies.

A parameter has its whole shape, and its partition as metadata (`nnx.get_partition_spec`): under `jax.set_mesh` it is
made on the mesh, else `sharding.shard` puts it there. Each layer runs in three ways, with the same collectives:

    inside jax.shard_map over its axis      on the device's shards, passed in with `nnx.split` and `nnx.merge`
    under jax.set_mesh, Auto or Explicit    on whole arrays: it makes the shard_map itself, over its axis and those
                                            that the batch is split over
    without that axis                       as the layer of one device that it is derived from

The batch is split over every explicit axis that its type names. Types say nothing of Auto axes: there `BATCH` is taken,
as far as the mesh has these axes and they divide the first dimension. XLA partitions what is left of the mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import shard_value
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh, reshard

from jaxops.nn import MoE, TransformerBlock
from jaxops.nn.attention import AttentionOptions, attend, default_precision, rotated
from jaxops.nn.implementation import without_kernels
from sharding import collectives, tensor
from sharding.context import context_parallel_attention, context_positions
from sharding.experts import expert_parallel_mixture
from sharding.mesh import check_spec, path_name

BATCH = ("data", "fsdp")


class ColumnParallelLinear(nnx.Linear):
    """y[..., N_T] = x[..., K] · kernel[K, N_T] + bias[N_T].

    Forward: nothing is sent, or with `sequence` an all-gather of x[..., S_T, K]. Backward: all-reduce, or
    reduce-scatter, of dx.

    Args:
      in_features, out_features: whole sizes, as in `nnx.Linear`.
      axis: the mesh axis T that the columns are split over.
      sequence, overlap, fsdp: as in `sharding.tensor.column_parallel`.
      **flax_arguments: those of `nnx.Linear` (`use_bias`, `dtype`, `param_dtype`, `precision`, `kernel_init`, …).

    Raises `ValueError` naming the layer, the array, its dimension and the axis if T does not divide out_features,
    or the rows that are split over it: on a mesh when the layer is made, else while tracing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axis: str = "tensor",
        sequence: bool = False,
        overlap: bool = False,
        fsdp: str | None = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **flax_arguments)
        self.axis, self.sequence, self.overlap, self.fsdp = axis, sequence, overlap, fsdp
        _place(self, "kernel", fsdp, axis)
        _place(self, "bias", axis)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`x[..., in_features]` to `[..., out_features]`; inside a shard_map, to the device's features."""
        return _run(self, super().__call__, x, whole=1, split=-2 if self.sequence else None, out_split=-1)

    def local(self, x: jax.Array) -> jax.Array:
        """The layer on the device's shards."""
        return _linear(self, tensor.column_parallel, x)


class RowParallelLinear(nnx.Linear):
    """y[..., N] = Σ_T x[..., K_T] · kernel[K_T, N] + bias[N].

    Forward: all-reduce, or with `sequence` reduce-scatter to y[..., S_T, N]. Backward: nothing is sent, or all-gather.

    Args:
      in_features, out_features: whole sizes, as in `nnx.Linear`.
      axis: the mesh axis T that the rows are split over.
      sequence, overlap, fsdp: as in `sharding.tensor.row_parallel`.
      **flax_arguments: those of `nnx.Linear`.

    Raises `ValueError` naming the layer, the array, its dimension and the axis if T does not divide in_features,
    or the rows that are split over it: on a mesh when the layer is made, else while tracing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axis: str = "tensor",
        sequence: bool = False,
        overlap: bool = False,
        fsdp: str | None = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **flax_arguments)
        self.axis, self.sequence, self.overlap, self.fsdp = axis, sequence, overlap, fsdp
        _place(self, "kernel", axis, fsdp)
        _place(self, "bias", None)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`x[..., in_features]`, inside a shard_map the device's features, to `[..., out_features]`."""
        return _run(self, super().__call__, x, whole=1, split=-1, out_split=-2 if self.sequence else None)

    def local(self, x: jax.Array) -> jax.Array:
        """The layer on the device's shards."""
        return _linear(self, tensor.row_parallel, x)


class VocabParallelEmbed(nnx.Embed):
    """y[..., S, D] = embedding[V_T, D][ids], each row from the device that has it.

    Forward: all-reduce of y, or with `sequence` reduce-scatter to y[..., S_T, D]. Backward: nothing is sent, or
    all-gather. Its transpose is the weight of `sharding.tensor.vocab_parallel_cross_entropy`.

    Args:
      num_embeddings, features: whole sizes, as in `nnx.Embed`.
      axis: the mesh axis T that the vocabulary is split over.
      sequence: whether y is split by rows.
      **flax_arguments: those of `nnx.Embed`.

    Raises `ValueError` naming the layer, the array, its dimension and the axis if T does not divide the vocabulary,
    or the rows that are split over it: on a mesh when the layer is made, else while tracing.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        axis: str = "tensor",
        sequence: bool = False,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(num_embeddings, features, rngs=rngs, **flax_arguments)
        self.axis, self.sequence = axis, sequence
        _place(self, "embedding", axis, None)

    def __call__(self, ids: jax.Array) -> jax.Array:  # type: ignore[override]
        """Integer `ids[..., S]` to `[..., S, features]`."""
        return _run(self, super().__call__, ids, whole=0, split=None, out_split=-2 if self.sequence else None)

    def local(self, ids: jax.Array) -> jax.Array:
        """The layer on the device's shards."""
        (embedding,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        return tensor.vocab_parallel_embed(ids, embedding, axis=self.axis, sequence=self.sequence)


class ParallelTransformerBlock(TransformerBlock):
    """h = x + attention(norm(x));  y = h + mlp(norm(h)): heads and hidden features split over T.

    Two pairs of products. Forward: two all-reduces of x[..., S, D]. Backward: two more. With `sequence` the stream is
    x[..., S_T, D], and each all-reduce becomes a reduce-scatter and an all-gather, the same bytes; norms and residual
    connections then work on 1 / T of the rows.

    With `context` the sequence is split over C besides, x[..., S_C, D], or with `sequence` x[..., S_{C, T}, D], a
    device of C having the rows of all its T one after the other. Keys and values of the device's heads go round C
    (`sharding.context_parallel_attention`), and nothing else is sent along it but gradients of parameters.

    Parameters, names and shapes are those of `jaxops.nn.TransformerBlock`, and so are checkpoints.

    Args:
      num_heads, in_features, hidden_features: whole sizes. T must divide heads, key heads and hidden features.
      axis: the mesh axis T.
      sequence: whether the stream is split by rows outside the products.
      overlap: with `sequence`, whether rows and sums travel beside the products (`sharding.collective_matmul`).
      fsdp: the mesh axis that every matrix's other dimension, in_features, is split over: gathered beside the products
        with `overlap`, else before.
      replicate_kv: for fewer key heads than devices: every device has all of them and uses the one its heads share.
      context: the mesh axis C, which may be that of fsdp. Positions are then those of the whole sequence.
      balanced: the sequence is in the order of `sharding.context_order`, in which causal attention gives all devices of
        C the same work.
      **arguments: further ones of `jaxops.nn.TransformerBlock`, except attention's `dropout_rate`, and with `context`
        no `precision` other than the default.

    There is no decoding with a cache. Raises `ValueError` for an option that is not there, and while tracing for a size
    that T does not divide, a sequence that C does not, a mesh without C, and as `sharding.context_parallel_attention`.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        hidden_features: int,
        *,
        axis: str = "tensor",
        sequence: bool = False,
        overlap: bool = False,
        fsdp: str | None = None,
        replicate_kv: bool = False,
        context: str | None = None,
        balanced: bool = False,
        rngs: nnx.Rngs,
        **arguments: Any,
    ):
        if balanced and context is None:
            raise ValueError("ParallelTransformerBlock: balanced is an order of a split sequence, got no context axis")
        if context is not None and context == axis:
            raise ValueError(f"ParallelTransformerBlock: context must be another mesh axis than axis, got {context!r}")
        if context is not None and not default_precision(arguments.get("precision")):
            raise ValueError(
                f"ParallelTransformerBlock: precision must be the default with context, got {arguments['precision']!r}"
            )
        if arguments.get("dropout_rate"):
            raise ValueError(
                f"ParallelTransformerBlock: dropout_rate must be 0, got {arguments['dropout_rate']}; for dropout "
                "between layers see sharding.dropout"
            )
        super().__init__(num_heads, in_features, hidden_features, rngs=rngs, **arguments)
        self.axis, self.sequence, self.overlap, self.fsdp = axis, sequence, overlap, fsdp
        self.replicate_kv, self.context, self.balanced = replicate_kv, context, balanced
        for name in ("query", "key", "value"):
            heads = None if replicate_kv and name != "query" else axis
            _place(getattr(self.attention, name), "kernel", fsdp, heads, None)
            _place(getattr(self.attention, name), "bias", heads, None)
        _place(self.attention.out, "kernel", axis, None, fsdp)
        _place(self.attention.out, "bias", None)
        for linear in (self.mlp.gate, self.mlp.up):
            _place(linear, "kernel", fsdp, axis)
        _place(self.mlp.down, "kernel", axis, fsdp)

    def __call__(  # type: ignore[override]
        self, x: jax.Array, *, input_positions: jax.Array | None = None, is_causal: bool | None = None
    ) -> jax.Array:
        """`x[..., S, in_features]` to the same shape; inside a shard_map the device's rows, if they are split.

        input_positions: [..., S] of the whole sequence, for rotary embeddings; inside a shard_map with `context`, of
        its part, [..., S / C]. is_causal: instead of the constructor's.
        """
        rows = -2 if self.sequence else None
        return _run(
            self,
            super().__call__,
            x,
            whole=2,
            split=rows,
            out_split=rows,
            positions=input_positions,
            is_causal=is_causal,
        )

    def local(self, x: jax.Array, **attention_arguments: Any) -> jax.Array:
        """The block on the device's shards; further keywords of `jaxops.dot_product_attention` are of its heads.

        With `context` these are `query_segment_ids`, `key_value_segment_ids`, both [..., S / C], and `sinks`.
        """
        how = _how(self)
        x = self.attended(x, **attention_arguments)
        mlp, h = self.mlp, self.mlp_norm(x)
        h, *kernels = _promoted(mlp.dtype, h, *(linear.kernel[...] for linear in (mlp.gate, mlp.up, mlp.down)))
        return x + tensor.gated_mlp(h, *kernels, activation=mlp.activation, implementation=mlp.implementation, **how)

    def attended(
        self,
        x: jax.Array,
        *,
        is_causal: bool | None = None,
        input_positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        **arguments: Any,
    ) -> jax.Array:
        """h = x + attention(norm(x)), the first half of `local`: for a block with another second half."""
        layer, residual, x = self.attention, x, self.attention_norm(x)
        options = layer.options if is_causal is None else dataclasses.replace(layer.options, is_causal=is_causal)

        def heads(query, key, value):
            if layer.query_ln is not None and layer.key_ln is not None:
                query, key = layer.query_ln(query), layer.key_ln(key)
            if self.context is not None:
                more = {"positions": input_positions, "mask": mask, **arguments}
                return self._ring(self.context, query, key, value, options, **more)
            return attend(
                query,
                key,
                value,
                options,
                positions=input_positions,
                mask=mask,
                dtype=layer.dtype,
                precision=layer.precision,
                **arguments,
            )[0]

        parts = (layer.query, layer.key, layer.value, layer.out)
        biases = [None if part.bias is None else part.bias[...] for part in parts]
        x, *kernels = _promoted(layer.dtype, x, *(part.kernel[...] for part in parts))
        return residual + tensor.heads_parallel_attention(
            x,
            *kernels,
            attend=heads,
            biases=biases,
            replicate_kv=self.replicate_kv,
            precision=layer.precision,
            implementation=without_kernels(options.implementation),
            **_how(self),
        )

    def _ring(
        self,
        axis: str,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        options: AttentionOptions,
        *,
        positions: jax.Array | None,
        **arguments: Any,
    ) -> jax.Array:
        """`attend` for a sequence that is split over `axis`."""
        name = type(self).__name__
        given = {option: x for option, x in arguments.items() if x is not None}
        if refused := given.keys() - {"query_segment_ids", "key_value_segment_ids", "sinks"}:
            raise ValueError(f"{name}: {min(refused)} must be None with context {axis!r}, as a ring has none")
        collectives.axis_size(f"{name}, context", axis)
        if self.balanced and query.shape[-3] % 2:
            raise ValueError(
                f"{name}: its query has shape {query.shape}, its dimension {query.ndim - 3} must be a multiple of 2 if "
                f"balanced, two blocks for each device along {axis!r}"
            )
        if positions is None:
            positions = context_positions(query.shape[-3], axis=axis, balanced=self.balanced)
        query, key, value = _promoted(self.attention.dtype, *rotated(query, key, options, positions), value)
        return context_parallel_attention(
            query,
            key,
            value,
            axis=axis,
            balanced=self.balanced,
            is_causal=options.is_causal,
            local_window_size=options.local_window_size,
            logits_soft_cap=options.logits_soft_cap,
            scale=options.scale,
            implementation=options.implementation,
            **given,
        )


class ExpertParallelMoE(MoE):
    """y[T_X] = Σ_j w_j · (activation(x · gate_j) ∘ (x · up_j)) · down_j over a token's top_k experts, experts split
    over X.

    Forward: two all-to-alls, of the tokens to their experts and back. Backward: two more. The tokens are split over X,
    too. Parameters, names and shapes are those of `jaxops.nn.MoE`, and so are checkpoints.

    Args:
      in_features, hidden_features, num_experts: whole sizes. X must divide the experts, and the first dimension of x.
      axis: the mesh axis X.
      capacity: None (no token is dropped), or as in `sharding.expert_parallel_mixture`.
      **arguments: further ones of `jaxops.nn.MoE`; of `axis_names` the losses' mean is over X, too.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        *,
        axis: str = "expert",
        capacity: float | None = None,
        rngs: nnx.Rngs,
        **arguments: Any,
    ):
        super().__init__(in_features, hidden_features, num_experts, rngs=rngs, **arguments)
        self.axis, self.capacity = axis, capacity
        _place(self.router, "kernel", None, None)
        for experts in (self.gate, self.up, self.down):
            _place(experts, "kernel", axis, None, None)

    def __call__(self, x: jax.Array, *, return_routing: bool = False) -> Any:
        """`x[batch, ..., in_features]` to `[batch, ..., out_features]`.

        With `return_routing` also the device's `jaxops.Routing` with the losses: inside a shard_map over the axis, or
        on a mesh without it. Raises `ValueError` otherwise.
        """
        mesh = get_abstract_mesh()
        if return_routing and self.axis in mesh.manual_axes:
            return self.local(x, return_routing=True)
        if mesh.shape.get(self.axis, 1) == 1:
            return super().__call__(x, return_routing=return_routing)
        if return_routing:
            raise ValueError(
                f"{type(self).__name__}: return_routing must be False outside a jax.shard_map over {self.axis!r}, "
                "as every device has a routing of its own"
            )
        return _run(self, super().__call__, x, whole=1, split=-x.ndim, out_split=-x.ndim)

    def local(self, x: jax.Array, *, return_routing: bool = False) -> Any:
        """The layer on the device's tokens and experts."""
        names = (self.axis_names,) if isinstance(self.axis_names, str) else self.axis_names
        y, routing, _ = expert_parallel_mixture(
            x,
            *(part.kernel[...] for part in (self.router, self.gate, self.up, self.down)),
            top_k=self.top_k,
            axis=self.axis,
            capacity=self.capacity,
            normalize=self.normalize,
            activation=self.activation,
            axis_names=(self.axis, *(name for name in names if name != self.axis)) if return_routing else (),
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
        )
        return (y, routing) if return_routing else y


def _linear(layer, function: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    bias = None if layer.bias is None else layer.bias[...]
    x, kernel, bias = layer.promote_dtype((x, layer.kernel[...], bias), dtype=layer.dtype)
    return function(x, kernel, bias, precision=layer.precision, **_how(layer))


def _how(layer) -> dict[str, Any]:
    return {"axis": layer.axis, "sequence": layer.sequence, "overlap": layer.overlap, "fsdp": layer.fsdp}


def _promoted(dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    dtype = jax.numpy.result_type(*arrays) if dtype is None else dtype
    return [array.astype(dtype) for array in arrays]


def _place(layer: Any, name: str, *spec: str | None) -> None:
    """Says where the parameter `name` of a layer lies, and puts it there if a mesh is set that has the axes."""
    variable = getattr(layer, name, None)
    if variable is None:
        return
    variable.set_metadata(out_sharding=spec)
    mesh = get_abstract_mesh()
    if not mesh.empty and not mesh.manual_axes and {axis for axis in spec if axis} <= set(mesh.axis_names):
        check_spec(type(layer).__name__, name, variable.shape, PartitionSpec(*spec), mesh)
        variable.set_value(shard_value(variable[...], spec, None, None))


def _run(
    layer: Any,
    alone: Callable,
    x: jax.Array,
    *,
    whole: int,
    split: int | None,
    out_split: int | None,
    positions: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`layer.local` on the shards of this mesh, or `alone`, the layer of one device, where it has not the layer's axis.

    whole: how many dimensions of x, from the last, may be split over no other axis. split, out_split: which dimensions
    of x and of the result are split over the layer's axis. positions: [..., S], beside x. options: not traced.
    The rows of a layer with a context axis are split over that first.
    """
    mesh, axis, called = get_abstract_mesh(), layer.axis, type(layer).__name__
    context = getattr(layer, "context", None)
    beside = {} if positions is None else {"input_positions": positions}
    if axis in mesh.manual_axes:
        return layer.local(x, **beside, **options)
    if context is not None and not mesh.empty and not {axis, context} <= set(mesh.axis_names):
        raise ValueError(
            f"{called}: context {context!r} and axis {axis!r} must be axes of the mesh, which has {mesh.axis_names}"
        )
    if context in mesh.manual_axes:  # XLA aborts on a ring in a shard_map inside of it
        raise ValueError(
            f"{called}: axis must be an axis of the jax.shard_map that context {context!r} is of, got {axis!r}, with "
            f"axes {tuple(mesh.manual_axes)} there"
        )
    if mesh.shape.get(axis, 1) == mesh.shape.get(context, 1) == 1:
        return alone(x, **beside, **options)

    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    rank = x.ndim + (whole == 0)  # an embedding adds the features
    parts = mesh.shape[axis] if -x.ndim == split or -rank == out_split else 1  # of the first dimension
    batch: tuple[str, ...] = ()
    for name in BATCH if x.ndim > whole else ():
        more = parts * mesh.shape.get(name, 1)
        if kinds.get(name) == AxisType.Auto and name not in (axis, context) and x.shape[0] % more == 0:
            batch, parts = (*batch, name), more

    def spec_of(rank: int, dimension: int | None) -> PartitionSpec:
        """Where the first dimensions of x lie besides, the rows over context, one dimension over the layer's axis."""
        entries: list[tuple[str, ...]] = [()] * rank
        for i, entry in enumerate(jax.typeof(x).sharding.spec[: x.ndim - whole]):
            names = entry if isinstance(entry, tuple) else (entry,)
            entries[i] = tuple(name for name in names if name not in (None, axis, context))
        if x.ndim > whole:
            entries[0] += batch
        if context is not None:
            entries[-2] += (context,)
        if dimension is not None:
            entries[dimension] += (axis,)
        return PartitionSpec(*(entry or None for entry in entries))

    def spec_of_positions(array: jax.Array) -> PartitionSpec:
        """As x lies, where the dimension is not one for all."""
        sides = zip(array.shape, x.shape[-1 - array.ndim : -1], x_spec[-1 - array.ndim : -2], strict=False)
        return PartitionSpec(*(entry if size == of_x else None for size, of_x, entry in sides), context)

    graph, state = nnx.split(layer)
    parameters, tree = jax.tree.flatten(state)
    specs = jax.tree.leaves(nnx.get_partition_spec(state))
    for (path, array), spec in zip(jax.tree.leaves_with_path(state), specs, strict=True):
        check_spec(called, path_name(path), array.shape, spec, mesh)
    if x.ndim < max(whole, -(split or 0)) or rank < -(out_split or 0):
        raise ValueError(f"{called}: its input must have rows to be split over {axis!r}, got shape {x.shape}")
    x_spec, y_spec = spec_of(x.ndim, split), spec_of(rank, out_split)
    check_spec(called, "its input", x.shape, x_spec, mesh)
    given = (parameters, x, beside)
    in_specs = (specs, x_spec, {name: spec_of_positions(array) for name, array in beside.items()})
    explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    if explicit:
        given = jax.tree.map(reshard, given, in_specs)

    def on_shards(parameters, x, beside):
        return nnx.merge(graph, jax.tree.unflatten(tree, parameters)).local(x, **beside, **options)

    names = {axis, *batch, *explicit, *([] if context is None else [context])}
    fsdp = getattr(layer, "fsdp", None)
    if fsdp is not None:
        if not any(fsdp in (entry if isinstance(entry, tuple) else (entry,)) for entry in x_spec):
            raise ValueError(
                f"{called}: its input must be split over {fsdp!r}, as the parameters are, got shape {x.shape}, split "
                f"as {x_spec}"
            )
        names.add(fsdp)
    return jax.shard_map(on_shards, in_specs=in_specs, out_specs=y_spec, axis_names=names)(*given)
