"""Layers whose weights have zeros: pruned ones, to be trained on, and those that store only what is left."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static
from jaxops.nn.quantized import Linear, Shapes, flat_bias
from jaxops.ops.block_sparse_matmul import block_sparse_matmul
from jaxops.ops.sparse_2_4_matmul import sparse_2_4_matmul
from jaxops.sparsity import BlockPattern, BlockSparse, Sparse24, prune_mask


class SparsityMask(nnx.Variable):
    """Which weights are kept, or where stored ones stand: not trained, and no `nnx.Param`."""


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How a layer is pruned: the arguments of `jaxops.prune_mask` for its kernel as [in, out].

    Raises `ValueError` for what does not go together.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        rows, columns = self.block or (4, 4)
        try:
            prune_mask(np.zeros((4 * rows, columns), np.float32), self.sparsity, pattern=self.pattern, block=self.block)
        except (ValueError, TypeError) as error:
            raise ValueError(f"Pruning: {str(error).partition(': ')[2]}") from None

    def mask(self, kernel: jax.Array, sparsity: ArrayLike | None = None) -> jax.Array:
        """The mask of kernel[in, out]; `sparsity` in place of that of the scheme, if it is less."""
        if self.sparsity is not None and sparsity is not None:
            sparsity = jnp.minimum(sparsity, self.sparsity)
        share = None if self.sparsity is None else self.sparsity if sparsity is None else sparsity
        return prune_mask(kernel, share, pattern=self.pattern, block=self.block)

    def __str__(self) -> str:
        if self.pattern == "2:4":
            return "2:4"
        blocks = f"blocks of {self.block[0]} × {self.block[1]}, " if self.block else ""
        return f"{blocks}{self.sparsity:.0%} zero"


class PrunedLinear(nnx.Module):
    """y = x · (kernel · mask) + bias: what is pruned takes no part and has no gradient, whatever the optimizer.

    The variables are those of the layer it is made from, `layer`, and `mask[in, out]`, a `SparsityMask`. A weight that
    is pruned keeps its number, and may come back when masks are made again (`update_masks`).

    Args:
      linear: an `nnx.Linear`, or an `nnx.LinearGeneral` over its input's last axes.
      pruning: which weights.

    Raises:
      TypeError: `linear` is no such layer.
      ValueError: blocks, or 4 rows, do not divide its kernel.
    """

    def __init__(self, linear: Linear, pruning: Pruning):
        self.shapes = Shapes.of("PrunedLinear", linear)
        self.layer, self.pruning = linear, pruning
        self.mask = SparsityMask(pruning.mask(linear.kernel[...].reshape(self.shapes.flat)))

    def kernel(self) -> jax.Array:
        """[in, out], with zeros where it is pruned."""
        kernel = self.layer.kernel[...].reshape(self.shapes.flat)
        return jnp.where(self.mask[...], kernel, 0)

    def update(self, sparsity: ArrayLike | None = None) -> None:
        """Makes the mask again, of the kernel as it is now; with `sparsity` if that is less than the scheme's own."""
        kernel = self.layer.kernel[...].reshape(self.shapes.flat)
        self.mask.set_value(self.pruning.mask(kernel, sparsity))

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """`x[…, *inputs]` to `[…, *outputs]`; `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"PrunedLinear: out_sharding must be None, got {out_sharding}")
        x = self.shapes.rows(jnp.asarray(x, self.layer.dtype))
        y = x @ self.kernel().astype(x.dtype)
        bias = flat_bias(self.layer)
        return self.shapes.columns(y if bias is None else y + bias.astype(y.dtype))

    def converted(self, implementation: Implementation = None) -> nnx.Module:
        """The layer for inference, which stores what is kept; for zeros anywhere the dense layer with these zeros."""
        kernel, bias = self.kernel(), flat_bias(self.layer)
        options: dict[str, Any] = dict(dtype=self.layer.dtype, shapes=self.shapes, implementation=implementation)
        if self.pruning.pattern == "2:4":
            return Sparse24Linear(Sparse24.from_dense(kernel), bias, **options)
        if self.pruning.block is not None:
            rows, columns = self.pruning.block
            pattern = BlockPattern.of(np.asarray(self.mask[...])[::rows, ::columns], self.pruning.block)
            return BlockSparseLinear(BlockSparse.from_dense(kernel, pattern=pattern), bias, **options)
        self.layer.kernel.set_value(kernel.reshape(self.layer.kernel[...].shape))
        return self.layer


class _Stored(nnx.Module):
    """y = x · w + bias, of a w of which some is stored: what such layers have in common."""

    def __init__(
        self, shape: tuple[int, int], bias: jax.Array | None, dtype: Any, shapes: Shapes | None, implementation: Any
    ):
        self.bias = None if bias is None else nnx.Param(bias)
        self.shapes = shapes or Shapes(shape[:1], shape[1:])
        self.dtype, self.implementation = dtype, static(implementation)

    def _product(self, x: jax.Array, **options: Any) -> jax.Array:
        raise TypeError(f"{type(self).__name__} has no weights")

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """`x[…, *inputs]` to `[…, *outputs]`; `out_sharding` must be None."""
        if out_sharding is not None:
            raise ValueError(f"{type(self).__name__}: out_sharding must be None, got {out_sharding}")
        x = self.shapes.rows(jnp.asarray(x, self.dtype))
        bias = None if self.bias is None else self.bias[...]
        return self.shapes.columns(self._product(x, bias=bias, implementation=self.implementation))


class BlockSparseLinear(_Stored):
    """y = x · w + bias, of a block-sparse w, by `jaxops.block_sparse_matmul`.

    The variables are the parameters `blocks[s, bk, bn]` and `bias[out]` (or None), and `rows[s]` and
    `offsets[out / bn + 1]`, which are no parameters: it can be trained on, and layers with as many blocks share a
    program.

    Args:
      weights: a `jaxops.BlockSparse`.
      bias: floating [out] or None.
      dtype: of the product and of y; None: that of x.
      shapes: for several input or output axes, as those of an `nnx.LinearGeneral`.
      implementation: None | "pallas" | "xla" | a sequence of them.
    """

    def __init__(
        self,
        weights: BlockSparse,
        bias: jax.Array | None = None,
        *,
        dtype: Any = None,
        shapes: Shapes | None = None,
        implementation: Implementation = None,
    ):
        self.blocks = nnx.Param(weights.blocks)
        self.rows = SparsityMask(jnp.asarray(weights.pattern.rows))
        self.offsets = SparsityMask(jnp.asarray(weights.pattern.offsets))
        super().__init__(weights.shape, bias, dtype, shapes, implementation)

    def _product(self, x: jax.Array, **options: Any) -> jax.Array:
        blocks = self.blocks[...].astype(x.dtype)
        return block_sparse_matmul(x, blocks, rows=self.rows[...], offsets=self.offsets[...], **options)


class Sparse24Linear(_Stored):
    """y = x · w + bias, of a w that is 2:4, by `jaxops.sparse_2_4_matmul`.

    The variables are the parameters `values[in / 2, out]` and `bias[out]` (or None), and `indices[in / 8, out]`, which
    is no parameter.

    Args:
      weights: a `jaxops.Sparse24`.
      bias, dtype, shapes, implementation: as in `BlockSparseLinear`.
    """

    def __init__(
        self,
        weights: Sparse24,
        bias: jax.Array | None = None,
        *,
        dtype: Any = None,
        shapes: Shapes | None = None,
        implementation: Implementation = None,
    ):
        self.values, self.indices = nnx.Param(weights.values), SparsityMask(weights.indices)
        super().__init__(weights.shape, bias, dtype, shapes, implementation)

    def _product(self, x: jax.Array, **options: Any) -> jax.Array:
        return sparse_2_4_matmul(x, self.values[...].astype(x.dtype), indices=self.indices[...], **options)
