"""The GPT as a training program: its functions compiled for the mesh, of everything that is trained.

What is trained is {"parameters", "optimizer"} and, where gradients are compressed, "left_out": what that has left out
so far. A checkpoint has the same layer by layer, without padding, and of what was left out the sum over the devices, so
that it belongs to no mesh.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxops.optim
import sharding
from gpt import checkpoints
from gpt.model import GPT
from gpt.parallel import BATCH, Parallel, Plain


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and what is done with it on its mesh."""

    model: Parallel | Plain
    state: Any  # shapes, dtypes and shardings of what is trained
    layered: Any  # the same as checkpoints have them
    windows: jax.ShapeDtypeStruct
    initial: Callable[[], Any]
    advance: Any  # jitted (state, windows) -> state, loss
    loss: Callable[[Any, Any], jax.Array]  # (parameters, windows) -> loss
    to_layers: Callable[[Any], Any]
    to_stages: Callable[[Any], Any]

    @functools.cached_property
    def step(self) -> Any:
        """`advance`, compiled."""
        return self.advance.lower(self.state, self.windows).compile()

    def read(self, path: Path, compressed: bool) -> Any:
        """The state of a checkpoint, which a run wrote that compressed its gradients or did not."""
        like = {name: self.layered[name] for name in ("parameters", "optimizer")}
        layered = checkpoints.restore(path, like | ({"left_out": like["parameters"]} if compressed else {}))
        if "left_out" in self.layered and not compressed:
            layered["left_out"] = jax.tree.map(jnp.zeros_like, layered["parameters"])
        return self.to_stages({name: layered[name] for name in self.layered})

    def put(self, read: Callable[[slice], np.ndarray]) -> jax.Array:
        """Windows onto the mesh, of which every process reads the rows of its own devices."""
        shape, place = self.windows.shape, self.windows.sharding
        return jax.make_array_from_callback(shape, place, lambda index: read(index[0]))


def program(model: Parallel | Plain, args: argparse.Namespace) -> Program:
    """The GPT, trained by AdamW with warm-up, cosine decay and clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.warmup, args.steps, 0.1 * args.learning_rate
    )

    def decayed(parameters):  # everything but the scales of norms
        return jax.tree.map_with_path(lambda path, _: "scale" not in jax.tree_util.keystr(path), parameters)

    options = dict(b2=0.95, weight_decay=0.1, mask=decayed)
    if isinstance(model, Plain):
        plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, **options))
        return _plain_program(model, plain, args)
    # small=0: every moment has the place of its parameter, so that a checkpoint goes on on any mesh
    optimizer = jaxops.optim.adamw(schedule, max_norm=1.0, small=0, **options)
    reduction = sharding.gradient_reduction(
        optimizer, axis=BATCH, zero=min(args.zero, 2), reduce="sum", compression=args.compress, small=0
    )

    def whole():
        """Layer by layer, and without padding."""
        parameters = nnx.state(GPT(model.config, model.dtype, rngs=nnx.Rngs(args.seed)))
        left_out = {"left_out": parameters} if args.compress else {}
        return {"parameters": parameters, "optimizer": optimizer.init(parameters), **left_out}

    def trained(parameters, state):
        left_out = {} if state.error is None else {"left_out": state.error}
        return {"parameters": parameters, "optimizer": state.optimizer, **left_out}

    def initial():
        parameters = model.stacked(whole()["parameters"])
        return trained(parameters, model.init(reduction, parameters))

    def step(state, windows):
        before = sharding.ReductionState(state["optimizer"], state.get("left_out"), None)
        micro_batches = 1 if model.table else args.micro_batches or 1
        loss, *after = model.step(reduction, state["parameters"], before, windows, micro_batches)
        return trained(*after), loss

    def to_layers(state):
        if args.compress:
            add_up = lambda left, like: jnp.zeros(like.shape, like.dtype) if left is None else left.sum(0)
            sums = jax.tree.map(add_up, state["left_out"], state["parameters"], is_leaf=lambda x: x is None)
            state = state | {"left_out": sums}
        return model.layered(jax.tree.map(_fit, state, in_stages))

    def to_stages(layered):
        state = model.stacked(layered)
        if args.compress:
            deal_out = lambda like, x: like and jnp.broadcast_to(_fit(x, like, 1) / like.shape[0], like.shape)
            left = jax.tree.map(deal_out, shapes["left_out"], state["left_out"], is_leaf=lambda x: x is None)
            state = state | {"left_out": left}
        return jax.tree.map(_fit, state, shapes)

    layers, shapes = jax.eval_shape(whole), jax.eval_shape(initial)
    in_stages = jax.eval_shape(model.stacked, layers)
    places = model.specs(shapes["parameters"])
    places = trained(places, reduction.state_specs(shapes["parameters"], places, mesh=model.mesh))
    layered, state = _placed(model, layers, model.layered_specs(layers)), _placed(model, shapes, places)
    return _jitted(model, args, state, layered, initial, step, to_layers, to_stages)


def _plain_program(model: Plain, optimizer: optax.GradientTransformation, args: argparse.Namespace) -> Program:
    """The same, of everybody else's operators."""

    def initial():
        parameters = nnx.state(GPT(model.config, model.dtype, rngs=nnx.Rngs(args.seed)))
        return {"parameters": parameters, "optimizer": optimizer.init(parameters)}

    def step(state, windows):
        loss, gradient = model.value_and_grad(state["parameters"], windows)
        updates, after = optimizer.update(gradient, state["optimizer"], state["parameters"])
        return {"parameters": optax.apply_updates(state["parameters"], updates), "optimizer": after}, loss

    shapes = jax.eval_shape(initial)
    state = _placed(model, shapes, model.specs(shapes))
    return _jitted(model, args, state, state, initial, step, lambda state: state, lambda state: state)


def _fit(x: jax.Array, like: Any, first: int = 0) -> jax.Array:
    """x with the sizes of `like` from dimension `first` on: cut, or filled up with zeros at the end."""
    sizes = like.shape[first:]
    x = x[tuple(map(slice, sizes))]
    return lax.pad(x, x.dtype.type(0), [(0, size - there, 0) for size, there in zip(sizes, x.shape, strict=True)])


def _placed(model: Parallel | Plain, shapes: Any, specs: Any) -> Any:
    """The shapes, with where their arrays lie."""
    shardings = jax.tree.map(lambda spec: NamedSharding(model.mesh, spec), specs)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def _jitted(model: Any, args: argparse.Namespace, state, layered, initial, step, to_layers, to_stages) -> Program:
    """The functions, each with where its results lie."""
    shardings = functools.partial(jax.tree.map, lambda leaf: leaf.sharding)
    batched, everywhere = NamedSharding(model.mesh, P(BATCH)), NamedSharding(model.mesh, P())
    return Program(
        model=model,
        state=state,
        layered=layered,
        windows=jax.ShapeDtypeStruct((args.batch, model.config.length + 1), jnp.int32, sharding=batched),
        initial=jax.jit(initial, out_shardings=shardings(state)),
        advance=jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), everywhere)),
        loss=jax.jit(model.value, out_shardings=everywhere),
        to_layers=jax.jit(to_layers, out_shardings=shardings(layered)),
        to_stages=jax.jit(to_stages, out_shardings=shardings(state)),
    )
