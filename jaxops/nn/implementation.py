"""The `implementation` argument of a layer, which holds several operators."""

from jaxops.dispatch import Implementation, order_of


def static(implementation: Implementation) -> str | tuple[str, ...] | None:
    """`implementation` as an attribute of a module, which must be hashable."""
    return implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)


def strict(implementation: Implementation) -> bool:
    """Whether kernels alone were asked for."""
    return implementation is not None and "xla" not in order_of("layer", implementation)


def without_kernels(implementation: Implementation) -> Implementation:
    """The choice for an operator of the layer that has no kernels: a strict choice of kernels leaves it to XLA."""
    return None if strict(implementation) else implementation
