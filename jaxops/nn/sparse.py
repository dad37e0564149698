"""A whole model with zeros: which layers, by rules over their paths, trained on and then stored without the zeros.

`convert`, of `post_training`, makes the layers that store only what is kept.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxops.nn.paths import LINEAR, LayerReport, QuantizationReport, bytes_of, chosen, modules, replace, size_of
from jaxops.nn.pruned import PrunedLinear, Pruning

Rules = Sequence[tuple[str, Pruning | None]]


def prune_model[M: nnx.Module](model: M, rules: Rules) -> tuple[M, QuantizationReport]:
    """A copy of `model` to be trained on, whose linear layers are `PrunedLinear`, and what that did to each.

    Args:
      model: any `nnx` model; it is not changed.
      rules: (regular expression, `Pruning` or None) in their order: the first that is found in the path of an
        `nnx.Linear` or `nnx.LinearGeneral` decides; None, or no rule, leaves it as it is.

    Returns:
      The copy and a report: bytes are those after `convert`, the error is ‖w' - w‖ / ‖w‖.

    Raises:
      ValueError: no layer is found by the rules, or blocks or 4 rows do not divide its kernel (the path is named).
    """
    copy = nnx.clone(model)
    new: dict[int, nnx.Module] = {}
    reports = []
    before, saved = bytes_of(copy), 0
    for path, layer, pruning in chosen("prune_model", copy, rules, LINEAR):
        try:
            new[id(layer)] = pruned = PrunedLinear(layer, pruning)
        except (ValueError, TypeError) as error:
            raise type(error)(f"prune_model: {path}: {error}") from None
        kernel = layer.kernel[...].reshape(pruned.shapes.flat)
        gone = jnp.linalg.norm(jnp.where(pruned.mask[...], 0, kernel)) / jnp.maximum(jnp.linalg.norm(kernel), 1e-30)
        size, after = size_of(kernel), _stored(pruned)
        saved += size - after
        reports.append(LayerReport(path, str(pruning), tuple(layer.kernel.shape), size, after, float(gone)))
    replace(copy, new)
    return copy, QuantizationReport(tuple(reports), before, before - saved)


def update_masks(model: nnx.Module, sparsity: ArrayLike | None = None) -> None:
    """Makes the masks of all `PrunedLinear` layers of `model` again, in place, of the weights as they are now.

    Args:
      model: of `prune_model`.
      sparsity: of every layer whose scheme has no less; as `jaxops.pruning_schedule` gives it for a step. It may be
        traced: masks can be part of a compiled step. None: that of the scheme.

    Raises `ValueError` if the model has no such layer.
    """
    found = modules(model, (PrunedLinear,))
    if not found:
        raise ValueError("update_masks: model must hold layers of `prune_model`, got none")
    for _, layer in found:
        layer.update(sparsity)


def _stored(layer: PrunedLinear) -> int:
    """Bytes of the kernel after `convert`, indices included."""
    stored = nnx.state(nnx.clone(layer).converted())
    return sum(size_of(x) for path, x in nnx.to_flat_state(stored) if path[-1] != "bias" for x in jax.tree.leaves(x))
