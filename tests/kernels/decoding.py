"""Calls of the decoding kernels in small, and what they are compared with: the reference in float64 and in their dtype.

What the cache holds beyond a length is NaN, and so are its scales; table entries beyond a length are out of range.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.reference.decode_attention import decode_attention as decode_reference
from jaxops.reference.paged_attention import paged_attention as paged_reference
from tests.compare import no_worse


def case(*, heads=(4, 2), dim=128, dtype="bfloat16", window=None, cap=None, sinks=False, quantised=False, tiles=None,
         tokens=1, keys=None, lengths=(1,), counts=None, page=None, left_over=0):  # fmt: skip
    """Contiguous: `keys` of the cache and `tokens` of each sequence. In pages of `page`: `counts`, the new tokens of
    each sequence, and `left_over` tokens of none."""
    return locals()


def build(c):
    """(operands, options) of a kernel's forward."""
    random = np.random.default_rng(0)
    (N, K), H, lengths = c["heads"], c["dim"], np.asarray(c["lengths"], np.int32)
    if c["page"] is None:
        pages, size = len(lengths), c["keys"]
        table, query = np.arange(pages)[:, None], (pages, c["tokens"], N, H)
        more = {}
    else:
        size, most = c["page"], -(-max(lengths) // c["page"])
        pages, starts = len(lengths) * most + 3, np.concatenate([[0], np.cumsum(c["counts"])])
        table = random.permutation(pages)[: len(lengths) * most].reshape(len(lengths), most)
        query = (starts[-1] + c["left_over"], N, H)
        used = np.arange(most) * size < lengths[:, None]
        more = {"page_table": np.where(used, table, 1 << 20), "query_starts": starts}
    written = np.zeros((pages, size), bool)
    for row, length in zip(table, lengths, strict=True):
        written[row] = np.arange(row.size * size).reshape(-1, size) < length
    operands = {"query": jnp.asarray(random.standard_normal(query), c["dtype"]), "lengths": jnp.asarray(lengths)}
    for name in ("key", "value"):
        if c["quantised"]:
            operands[name] = jnp.asarray(random.integers(-127, 128, (pages, size, K, H)), jnp.int8)
            scales = random.uniform(0.5, 1.5, (pages, K, size)) / 64
            operands[f"{name}_scales"] = jnp.asarray(np.where(written[:, None], scales, np.nan), jnp.float32)
        else:
            cache = random.standard_normal((pages, size, K, H))
            operands[name] = jnp.asarray(np.where(written[:, :, None, None], cache, np.nan), c["dtype"])
    operands |= {name: jnp.asarray(x, jnp.int32) for name, x in more.items()}
    if c["sinks"]:
        operands["sinks"] = jnp.asarray(random.standard_normal(N) + 2, jnp.float32)
    return operands, {"scale": H**-0.5, "left": c["window"], "logits_soft_cap": c["cap"]}


def compare(operands, options, got):
    """Both results are as near to the oracle as twice what the unfused form is."""
    reference = decode_reference if operands["query"].ndim == 4 else paged_reference
    plain = jax.jit(lambda operands: reference(**operands, **options))
    with jax.enable_x64(True):
        exact = {n: np.asarray(x, np.float64) if x.dtype.name.endswith(("16", "t32")) and n not in INDICES else x
                 for n, x in operands.items()}  # fmt: skip
        want = [np.asarray(x) for x in plain(exact)]
    for name, mine, unfused, oracle in zip(("out", "lse"), got, plain(operands), want, strict=True):
        assert (mine.shape, mine.dtype) == (unfused.shape, unfused.dtype), name
        known = np.isfinite(oracle)  # lse is +inf where nothing is seen
        np.testing.assert_array_equal(np.asarray(mine)[~known], oracle[~known], err_msg=name)
        # The unfused form of a quantised cache rounds its keys, and so its statistics, to 16 bits.
        no_worse(name, np.asarray(mine)[known], np.asarray(unfused)[known], oracle[known], operands["query"].dtype)


INDICES = ("lengths", "page_table", "query_starts")
