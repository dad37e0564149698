"""Expert parallelism: a mixture of experts whose experts are split over a mesh axis X, as the tokens are.

Each device routes its own tokens, x[T_X, D]. A row goes to the device that has its expert and comes back: two
all-to-alls forward, and two backward. Between two devices there are as many slots as a capacity says, or as many as may
ever be needed; on its expert's device a row takes part in no product but its own (`jaxops.ragged_dot`).

Source: Lepikhin et al., "GShard", arXiv:2006.16668; Gale et al., "MegaBlocks", arXiv:2211.15841.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxops.dispatch import Implementation
from jaxops.nn.moe import gated_experts, route
from jaxops.ops import checks
from jaxops.ops.activations import silu
from jaxops.routing import Routing
from sharding import collectives

_NAME = "expert_parallel_mixture"


def expert_parallel_mixture(
    x: jax.Array,
    router: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    top_k: int,
    axis: str = "expert",
    capacity: float | None = None,
    normalize: bool = True,
    activation: Callable[[jax.Array], jax.Array] = silu,
    axis_names: str | Sequence[str] = (),
    dtype: Any = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, Routing, jax.Array]:
    """y[T_X] = Σ_j w_j · (activation(x[T_X] · gate_j) ∘ (x[T_X] · up_j)) · down_j over the top_k experts j of a token,

    for gate, up [E_X, D, F] and down [E_X, F, D]. Forward: all-to-all of rows x, and of y back. Backward: the same of
    dy and dx.

    Args:
      x: floating [..., d], the device's tokens, t of them.
      router: floating [d, e], the same on all devices of `axis`.
      gate, up: floating [e / X, d, f]; down: floating [e / X, f, n]: the experts follow each other.
      top_k, normalize, axis_names: as in `jaxops.top_k_routing`; `axis_names` should name `axis` for the losses to be
        over all tokens.
      capacity: each device has slots for capacity · t · top_k / X rows to each other, rounded up; 1 is what an even
        router needs. What has none is dropped: the token goes without this expert, its other weights as they are. Of
        the rows to one device those of the experts and tokens that come last. None: slots for all that could go there,
        t · min(top_k, e / X), and nothing is dropped; that many are sent, most of them empty.
      activation: of the gate, elementwise.
      dtype: what the products take; None: the common one of x and the experts. The router computes in float32.
      precision, implementation: as in `jaxops.ragged_dot`.

    Returns:
      (y [..., n] in dtype, the device's `jaxops.Routing`, how many of its t · top_k rows were dropped, int32). What an
      expert gives is rounded to dtype before it is sent back; the sum over a token's experts is float32.

    Raises `TypeError` or `ValueError` as `jaxops.ragged_dot` and `jaxops.top_k_routing` do, if `axis` is none of an
    enclosing `jax.shard_map`, if the router's experts are not X times those of `gate`, or capacity is not above 0.
    """
    size = collectives.axis_size(_NAME, axis)
    arrays = {"x": x, "router": router, "gate": gate, "up": up, "down": down}
    x, router, gate, up, down = (checks.floating(_NAME, name, array) for name, array in arrays.items())
    if gate.ndim != 3:
        raise ValueError(f"{_NAME}: gate must have shape (experts / {size}, features, hidden), got {gate.shape}")
    mine = gate.shape[0]
    if router.shape != (x.shape[-1], size * mine):
        raise ValueError(
            f"{_NAME}: router must have shape {(x.shape[-1], size * mine)} for x {x.shape} and the {mine} experts of "
            f"each of the {size} devices along {axis!r}, got {router.shape}"
        )
    for name, array in (("up", up), ("down", down)):
        if array.ndim != 3 or array.shape[0] != mine:
            raise ValueError(f"{_NAME}: {name} must have the {mine} experts of gate {gate.shape}, got {array.shape}")
    dtype = jnp.result_type(x, gate, up, down) if dtype is None else dtype
    x = collectives.copy(x, axis)
    tokens = x.reshape(-1, x.shape[-1])
    options = dict(normalize=normalize, axis_names=axis_names)
    routing = route(tokens, router, dtype, top_k, precision=precision, **options)
    tokens, gate, up, down = (array.astype(dtype) for array in (tokens, gate, up, down))

    slots = tokens.shape[0] * min(top_k, mine)
    if capacity is not None:
        capacity = checks.number(_NAME, "capacity", capacity, positive=True)
        slots = min(slots, math.ceil(capacity * tokens.shape[0] * top_k / size))
    # Rows are sorted by expert, and so by device: slot i of a device is the i-th row that goes there.
    ends = jnp.cumsum(routing.group_sizes.reshape(size, mine), axis=1, dtype=jnp.int32)
    wanted = ends[:, -1]
    slot = jnp.arange(slots, dtype=jnp.int32)
    row = (jnp.cumsum(wanted) - wanted)[:, None] + slot
    row = jnp.where(slot < wanted[:, None], row, routing.rows.shape[0]).reshape(-1)
    token = routing.rows.at[row].get(mode="fill", fill_value=tokens.shape[0])
    weight = routing.row_weights.at[row].get(mode="fill", fill_value=0)
    kept = jnp.minimum(ends, slots)

    send = lambda array: collectives.all_to_all(array, axis, 0, 0)
    arrived = send(tokens.at[token].get(mode="fill", fill_value=0))
    # Of what comes from a device, slots before ends[j] are of experts up to j; after the last they are empty.
    expert = jnp.sum(slot[None, :, None] >= send(kept)[:, None], axis=2).reshape(-1)
    groups = jnp.sum(expert[:, None] == jnp.arange(mine), axis=0, dtype=jnp.int32)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    how: dict[str, Any] = dict(activation=activation, precision=precision, implementation=implementation)
    back = send(gated_experts(arrived, gate, up, down, groups, order, **how))

    wide = jnp.promote_types(dtype, jnp.float32)
    y = jnp.zeros((tokens.shape[0], back.shape[1]), wide)
    y = y.at[token].add(weight[:, None].astype(wide) * back.astype(wide), mode="drop")
    dropped = routing.rows.shape[0] - jnp.sum(kept[:, -1])
    return y.astype(dtype).reshape(*x.shape[:-1], -1), routing, dropped
