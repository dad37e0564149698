"""Chunks of a vocabulary: a part of all logits that a processor holds well, where all of them would be too many."""

import functools
from collections.abc import Callable
from typing import Any

from jax import lax

from jaxops import dispatch

# Logits of all tokens against one chunk of the vocabulary, held at a time: 16 MiB in float32 is about a processor's
# last cache. An accelerator has the memory for more, and adding to dx for every small chunk would cost it more than the
# products.
_CPU_ELEMENTS = 1 << 22
_ACCELERATOR_ELEMENTS = 1 << 25
# Narrower chunks leave the products bound by the traffic of x and dx.
_NARROWEST = 512


def by_platform(run: Callable, *operands: Any) -> Any:
    """`run(elements, *operands)` with the number of logits to hold at a time."""
    cpu, otherwise = (functools.partial(run, elements) for elements in (_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS))
    return dispatch.on_cpu(cpu, otherwise, *operands)


def chunk_width(elements: int, tokens: int, hidden: int, vocab: int) -> int:
    """The columns of a chunk. With few tokens it is the chunk of the weight and its gradient that take the memory."""
    return min(vocab, max(_NARROWEST, elements // max(tokens, 2 * hidden)))


def loop(vocab: int, width: int, step: Callable, carry: Any) -> Any:
    """carry = step(start, width, carry) over all chunks: whole ones in a loop, then what remains."""
    whole, rest = divmod(vocab, width)
    carry = lax.fori_loop(0, whole, lambda i, carry: step(i * width, width, carry), carry)
    return step(whole * width, rest, carry) if rest else carry
