"""What others offer for our operators: each peer takes our operands and options by our names and returns our outputs.

An option a peer has no counterpart for is not in its signature. What jax and optax users compose from several
functions is composed here as they would. torch's take and give torch tensors and run on the CPU.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxops.workbench.call import Problem

INSTALL = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "tokamax": "tokamax",
    "torch": "'jaxops[torch]'",
}  # library → what pip installs


def installed(library: str) -> bool:
    """Whether `library` can be imported here, without importing it."""
    return importlib.util.find_spec(library) is not None


def require(library: str) -> None:
    """Raises `Problem` where `library` is not installed."""
    if not installed(library):
        raise Problem(f"--against {library}: {library} is not installed: pip install {INSTALL[library]}")


def find(library: str, operator: str, operands: Mapping[str, Any]) -> Callable | str:
    """The counterpart of `operator` in `library`, or why there is none that takes these operands and options.

    Raises `Problem` where the library is not installed.
    """
    require(library)
    function = PEERS[library].get(operator)
    if function is None:
        return f"{library} has no {operator}"
    try:
        inspect.signature(function).bind(**operands)
    except TypeError as error:
        return f"{library}: {error}"
    return function


# ---- jax: jax.nn, and what is composed from jax.numpy ---------------------------------------------------------------


def jax_dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
):
    """softmax(scale · q kᵀ + bias, where masks allow) · v, of jax.nn and jax.numpy."""
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
    )


def jax_decode_attention(query, key, value, lengths, *, scale=None):
    """softmax(scale · q kᵀ, up to each length) · v, of jax.nn and jax.numpy."""
    groups, position = key.shape[2], jnp.arange(key.shape[1])
    grouped = query.reshape(query.shape[0], groups, -1, query.shape[-1])
    s = jnp.einsum("bkgh,bskh->bkgs", grouped, key, preferred_element_type=jnp.float32)
    s = jnp.where(position < lengths[:, None, None, None], s * (scale or query.shape[-1] ** -0.5), -jnp.inf)
    return jnp.einsum("bkgs,bskh->bkgh", jax.nn.softmax(s).astype(value.dtype), value).reshape(query.shape)


def jax_paged_attention(query, key_pages, value_pages, page_table, lengths, query_starts, *, scale=None):
    """The pages of each token's sequence, gathered, then attention to a cache."""
    token = jnp.arange(query.shape[0])
    sequence = jnp.searchsorted(query_starts[1:], token, side="right")
    seen = lengths[sequence] - (query_starts[sequence + 1] - token) + 1
    key, value = (x[page_table[sequence]] for x in (key_pages, value_pages))
    key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))
    return jax_decode_attention(query, key, value, seen, scale=scale)


def jax_rms_norm(x, scale=None, *, eps=1e-6, scale_offset=0.0):
    """x / √(mean(x²) + eps) · scale, of jax.nn and jax.numpy."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (y if scale is None else y * (scale.astype(jnp.float32) + scale_offset)).astype(x.dtype)


def jax_layer_norm(x, scale=None, bias=None, *, eps=1e-6, scale_offset=0.0):
    """(x - mean(x)) / √(var(x) + eps) · scale + bias, of jax.nn and jax.numpy."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=eps)
    if scale is not None:
        y = y * (scale.astype(jnp.float32) + scale_offset)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def jax_add_rms_norm(x, residual, scale=None, *, eps=1e-6, scale_offset=0.0):
    """(norm(x + residual), x + residual), of jax.numpy."""
    total = x + residual
    return jax_rms_norm(total, scale, eps=eps, scale_offset=scale_offset), total


def jax_add_layer_norm(x, residual, scale=None, bias=None, *, eps=1e-6, scale_offset=0.0):
    """(norm(x + residual), x + residual), of jax.nn and jax.numpy."""
    total = x + residual
    return jax_layer_norm(total, scale, bias, eps=eps, scale_offset=scale_offset), total


def jax_group_norm(x, scale=None, bias=None, *, num_groups, eps=1e-6):
    """(x - mean) / √(var + eps) · scale + bias for each group of channels, of jax.nn and jax.numpy."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], num_groups, -1)
    y = jax.nn.standardize(grouped, axis=(*range(1, x.ndim - 1), -1), epsilon=eps).reshape(x.shape)
    y = y if scale is None else y * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def jax_instance_norm(x, scale=None, bias=None, *, eps=1e-6):
    """(x - mean) / √(var + eps) · scale + bias for each channel of each entry, of jax.nn and jax.numpy."""
    return jax_group_norm(x, scale, bias, num_groups=x.shape[-1], eps=eps)


def jax_batch_norm(x, scale=None, bias=None, *, eps=1e-5):
    """((x - mean) / √(var + eps) · scale + bias for each channel, mean, var), of jax.nn and jax.numpy."""
    axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
    mean, var = jnp.mean(wide, axes), jnp.var(wide, axes)
    y = jax.nn.standardize(wide, axes, mean, var, eps)
    y = y if scale is None else y * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype), mean, var


def jax_max_pool(inputs, window_shape, strides=None, padding="VALID"):
    """The largest of every window, of jax.lax."""
    return _reduce_window(inputs, -jnp.inf, jax.lax.max, window_shape, strides, padding)


def jax_avg_pool(inputs, window_shape, strides=None, padding="VALID"):
    """The mean of every window, of jax.lax."""
    total = _reduce_window(inputs.astype(jnp.float32), 0.0, jax.lax.add, window_shape, strides, padding)
    return (total / math.prod(window_shape)).astype(inputs.dtype)


def _reduce_window(inputs, init, function, window_shape, strides, padding):
    steps = tuple(strides or (1,) * len(window_shape))
    if not isinstance(padding, str):
        padding = ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(inputs, init, function, (1, *window_shape, 1), (1, *steps, 1), padding)


def jax_adaptive_avg_pool(inputs, output_shape):
    """The means of windows that share out every axis, of jax.numpy."""
    y = inputs.astype(jnp.float32)
    for axis, n in enumerate(output_shape, 1):
        size = y.shape[axis]
        parts = [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
        means = [jax.lax.slice_in_dim(y, *part, axis=axis).mean(axis) for part in parts]
        y = jnp.stack(means, axis)
    return y.astype(inputs.dtype)


def jax_global_max_pool(inputs):
    """The largest of each channel, of jax.numpy."""
    return jnp.max(inputs, range(1, inputs.ndim - 1))


def jax_global_avg_pool(inputs):
    """The mean of each channel, of jax.numpy."""
    return jnp.mean(inputs, range(1, inputs.ndim - 1))


def jax_softmax(x, axis=-1, where=None, *, temperature=1.0):
    """exp(x / temperature) / Σ exp(x / temperature), of jax.nn and jax.numpy."""
    return jax.nn.softmax(x / temperature, axis, where)


def jax_gelu(x, approximate=True):
    """x · Φ(x), of jax.nn and jax.numpy."""
    return jax.nn.gelu(x, approximate)


def jax_silu(x):
    """x · σ(x), of jax.nn and jax.numpy."""
    return jax.nn.silu(x)


def jax_relu(x):
    """max(x, 0), of jax.nn and jax.numpy."""
    return jax.nn.relu(x)


def jax_squared_relu(x):
    """max(x, 0)², of jax.nn and jax.numpy."""
    return jnp.square(jax.nn.relu(x))


def jax_linear_distillation(
    x, weight, teacher_x, teacher_weight, *, bias=None, teacher_bias=None, temperature=1.0, reduction="mean"
):
    """τ² KL(softmax of the teacher's logits / τ ‖ that of the student's), reduced, of jax.nn and jax.numpy."""
    student, teacher = jax_matmul(x, weight, bias=bias), jax_matmul(teacher_x, teacher_weight, bias=teacher_bias)
    log_p, log_q = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (student, teacher))
    return _reduced(temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1), reduction)


def jax_matmul(x, w, *, bias=None, activation=None, residual=None, precision=None):
    """activation(x · w + bias) + residual, of jax.nn and jax.numpy."""
    y = jnp.matmul(x, w, precision=precision)
    y = y if bias is None else y + bias
    y = y if activation is None else activation(y)
    return y if residual is None else y + residual


def jax_conv(
    lhs, rhs, window_strides, padding, *, dimension_numbers=None, bias=None, activation=None, residual=None, **more
):
    """activation(lhs ∗ rhs + bias) + residual, of jax.lax and jax.numpy."""
    y = jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, dimension_numbers=dimension_numbers, **more)
    channels = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers).out_spec[1]
    if bias is not None:
        y = y + jnp.expand_dims(bias, [axis for axis in range(y.ndim) if axis != channels])
    y = y if activation is None else activation(y)
    return y if residual is None else y + residual


def jax_conv_transpose(lhs, rhs, strides, padding, *, bias=None, activation=None, residual=None, **more):
    """activation(z + bias) + residual, channels last, of jax.lax and jax.numpy."""
    y = jax.lax.conv_transpose(lhs, rhs, strides, padding, **more)
    y = y if bias is None else y + bias
    y = y if activation is None else activation(y)
    return y if residual is None else y + residual


def jax_quantized_conv(lhs, rhs, scales, *window, zeros=None, lhs_scales=None, dtype=None, **rest):
    """The convolution of what the integers stand for, of jax.lax and jax.numpy: all is widened, then convolved."""
    dtype = dtype or (lhs.dtype if lhs_scales is None else lhs_scales.dtype)
    parts = [whole // part for whole, part in zip(rhs.shape, scales.shape, strict=True)]
    spread = lambda a: jnp.kron(a.astype(jnp.float32), jnp.ones(parts))
    weights = rhs.astype(jnp.float32) if zeros is None else rhs.astype(jnp.float32) - spread(zeros)
    lhs = lhs if lhs_scales is None else lhs.astype(jnp.float32) * lhs_scales
    return jax_conv(lhs.astype(dtype), (weights * spread(scales)).astype(dtype), *window, **rest).astype(dtype)


def jax_quantized_matmul(x, w, scales, zeros=None, *, x_scales=None, bias=None, dtype=None):
    """(x_scales · x) · (scales · (w - zeros)) + bias, of jax.numpy: the weights are widened, then multiplied."""
    dtype = dtype or (x.dtype if x_scales is None else x_scales.dtype)
    spread = lambda a: jnp.repeat(a.astype(jnp.float32), w.shape[0] // a.shape[0], 0)
    weights = w.astype(jnp.float32) if zeros is None else w.astype(jnp.float32) - spread(zeros)
    x = x if x_scales is None else x.astype(jnp.float32) * x_scales
    y = jnp.matmul(x.astype(dtype), (weights * spread(scales)).astype(dtype))
    return y if bias is None else (y + bias).astype(dtype)


def jax_block_sparse_matmul(x, w, *, rows, offsets, bias=None, activation=None, residual=None, precision=None):
    """matmul, of jax.numpy, of the matrix that the blocks are part of."""
    bk, bn = w.shape[1:]
    columns = jnp.searchsorted(offsets, jnp.arange(w.shape[0]), side="right") - 1
    grid = jnp.zeros((x.shape[-1] // bk, offsets.shape[0] - 1, bk, bn), w.dtype).at[rows, columns].add(w)
    dense = grid.transpose(0, 2, 1, 3).reshape(x.shape[-1], -1)
    return jax_matmul(x, dense, bias=bias, activation=activation, residual=residual, precision=precision)


def jax_sparse_2_4_matmul(x, w, *, indices, bias=None, activation=None, residual=None, precision=None):
    """matmul, of jax.numpy, of the matrix to which the values are scattered."""
    rows, columns = w.shape
    at = jnp.arange(rows)[:, None]
    places = (indices[at[:, 0] // 4] >> (2 * (at % 4)).astype(jnp.uint8)) & 3
    dense = jnp.zeros((2 * rows, columns), w.dtype).at[at // 2 * 4 + places, jnp.arange(columns)].add(w)
    return jax_matmul(x, dense, bias=bias, activation=activation, residual=residual, precision=precision)


def jax_ragged_dot(lhs, rhs, group_sizes, precision=None, preferred_element_type=None):
    """y_i = lhs_i · rhs[group of i], of jax.lax."""
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, precision, preferred_element_type)


def jax_gated_linear_unit(x, w_gate, w_up):
    """silu(x · w_gate) ∘ (x · w_up), of jax.nn and jax.numpy."""
    return jax.nn.silu(x @ w_gate) * (x @ w_up)


def jax_rope(x, positions, *, base=10000.0):
    """pairs of x rotated by position / base^(i / half), of jax.nn and jax.numpy."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] / base ** (jnp.arange(half, dtype=jnp.float32) / half)
    first, second, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def jax_rope_projection(x, w, positions, *, bias=None, base=10000.0):
    """The heads of x · w + bias, rotated by their positions, of jax.numpy."""
    y = jnp.einsum("...td,dnh->...tnh", x, w)
    return jax_rope(y if bias is None else y + bias, positions, base=base)


def jax_linear_cross_entropy(
    x, weight, labels, *, bias=None, label_smoothing=0.0, z_loss=0.0, logits_soft_cap=None, reduction="mean"
):
    """-log softmax(x · weight)[label], reduced, of jax.nn and jax.numpy."""
    z = (x @ weight).astype(jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)
    if logits_soft_cap is not None:
        z = logits_soft_cap * jnp.tanh(z / logits_soft_cap)
    log_p = jax.nn.log_softmax(z)
    loss = -(1 - label_smoothing) * jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    if label_smoothing:
        loss = loss - label_smoothing * jnp.mean(log_p, -1)
    if z_loss:
        loss = loss + z_loss * jax.nn.logsumexp(z, -1) ** 2
    return _reduced(loss, reduction)


# ---- flax and optax -------------------------------------------------------------------------------------------------


def flax_dot_product_attention(query, key, value, bias=None, mask=None, *, is_causal=False):
    """softmax(scale · q kᵀ + bias, where masks allow) · v, of flax.linen."""
    import flax.linen as nn

    if is_causal:
        causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
        mask = causal if mask is None else mask & causal
    return nn.dot_product_attention(query, key, value, bias, mask)


def flax_rms_norm(x, scale=None, *, eps=1e-6):
    """x / √(mean(x²) + eps) · scale, of flax.linen."""
    import flax.linen as nn

    module = nn.RMSNorm(epsilon=eps, dtype=x.dtype, use_scale=scale is not None)
    return module.apply({"params": {} if scale is None else {"scale": scale}}, x)


def flax_layer_norm(x, scale=None, bias=None, *, eps=1e-6):
    """(x - mean(x)) / √(var(x) + eps) · scale + bias, of flax.linen."""
    import flax.linen as nn

    parameters = {name: p for name, p in (("scale", scale), ("bias", bias)) if p is not None}
    module = nn.LayerNorm(epsilon=eps, dtype=x.dtype, use_scale=scale is not None, use_bias=bias is not None)
    return module.apply({"params": parameters}, x)


def flax_add_rms_norm(x, residual, scale=None, *, eps=1e-6):
    """(norm(x + residual), x + residual), the norm of flax.linen."""
    total = x + residual
    return flax_rms_norm(total, scale, eps=eps), total


def flax_add_layer_norm(x, residual, scale=None, bias=None, *, eps=1e-6):
    """(norm(x + residual), x + residual), the norm of flax.linen."""
    total = x + residual
    return flax_layer_norm(total, scale, bias, eps=eps), total


def flax_group_norm(x, scale=None, bias=None, *, num_groups, eps=1e-6):
    """(x - mean) / √(var + eps) · scale + bias for each group of channels, of flax.linen."""
    import flax.linen as nn

    parameters = {name: p for name, p in (("scale", scale), ("bias", bias)) if p is not None}
    module = nn.GroupNorm(
        num_groups, epsilon=eps, dtype=x.dtype, use_scale=scale is not None, use_bias=bias is not None
    )
    return module.apply({"params": parameters}, x)


def flax_instance_norm(x, scale=None, bias=None, *, eps=1e-6):
    """(x - mean) / √(var + eps) · scale + bias for each channel of each entry, of flax.linen."""
    return flax_group_norm(x, scale, bias, num_groups=x.shape[-1], eps=eps)


def flax_batch_norm(x, scale=None, bias=None, *, eps=1e-5):
    """((x - mean) / √(var + eps) · scale + bias for each channel, mean, var), of flax.linen."""
    import flax.linen as nn

    parameters = {name: p for name, p in (("scale", scale), ("bias", bias)) if p is not None}
    module = nn.BatchNorm(
        use_running_average=False,
        momentum=0.0,  # the running averages are those of this batch
        epsilon=eps,
        dtype=x.dtype,
        use_scale=scale is not None,
        use_bias=bias is not None,
    )
    stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
    y, new = module.apply({"params": parameters, "batch_stats": stats}, x, mutable=["batch_stats"])
    return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


def flax_max_pool(inputs, window_shape, strides=None, padding="VALID"):
    """The largest of every window, of flax.linen."""
    import flax.linen as nn

    return nn.max_pool(inputs, window_shape, strides, padding)


def flax_avg_pool(inputs, window_shape, strides=None, padding="VALID", count_include_pad=True):
    """The mean of every window, of flax.linen."""
    import flax.linen as nn

    return nn.avg_pool(inputs, window_shape, strides, padding, count_include_pad)


def optax_linear_cross_entropy(x, weight, labels, *, bias=None, reduction="mean"):
    """-log softmax(x · weight)[label], reduced, with the loss of optax."""
    import optax

    z = (x @ weight).astype(jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)
    return _reduced(optax.softmax_cross_entropy_with_integer_labels(z, labels), reduction)


# ---- tokamax --------------------------------------------------------------------------------------------------------


def _tokamax():
    """The library. It reads absl's flags, which would take the arguments of this program for theirs."""
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["jaxops"])
    return tokamax


def tokamax_dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
):
    """softmax(scale · q kᵀ + bias, where masks allow) · v, of tokamax."""
    return _tokamax().dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
    )


def tokamax_rms_norm(x, scale=None, *, eps=1e-6, scale_offset=0.0):
    """x / √(mean(x²) + eps) · scale, of tokamax."""
    return _tokamax().layer_norm(x, scale, None, epsilon=eps, scale_offset=scale_offset, subtract_mean=False)


def tokamax_layer_norm(x, scale=None, bias=None, *, eps=1e-6, scale_offset=0.0):
    """(x - mean(x)) / √(var(x) + eps) · scale + bias, of tokamax."""
    return _tokamax().layer_norm(x, scale, bias, epsilon=eps, scale_offset=scale_offset)


def tokamax_gated_linear_unit(x, w_gate, w_up):
    """silu(x · w_gate) ∘ (x · w_up), of tokamax."""
    return _tokamax().gated_linear_unit(x, (w_gate, w_up), activation=jax.nn.silu)


def tokamax_ragged_dot(lhs, rhs, group_sizes, precision=None, preferred_element_type=None):
    """y_i = lhs_i · rhs[group of i], of tokamax."""
    return _tokamax().ragged_dot(
        lhs, rhs, group_sizes, precision=precision, preferred_element_type=preferred_element_type
    )


def tokamax_linear_cross_entropy(x, weight, labels, *, reduction="mean"):
    """-log softmax(x · weight)[label], reduced, of tokamax."""
    return _tokamax().linear_softmax_cross_entropy_loss(x, labels, weight, reduction=reduction)


# ---- torch ----------------------------------------------------------------------------------------------------------


def torch_dot_product_attention(query, key, value, *, scale=None, is_causal=False):
    """softmax(scale · q kᵀ + bias, where masks allow) · v, of torch.nn.functional."""
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = (x.transpose(-3, -2) for x in (query, key, value))
    grouped = query.shape[-3] != key.shape[-3]
    return scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped
    ).transpose(-3, -2)


def torch_outputs(y: Any) -> dict[str, Any]:
    """What a peer returned by name, as `comparison.outputs_of` has it."""
    return {f"output[{i}]": part for i, part in enumerate(y)} if isinstance(y, tuple) else {"output": y}


def torch_rms_norm(x, scale=None, *, eps=1e-6):
    """x / √(mean(x²) + eps) · scale, of torch.nn.functional."""
    from torch.nn.functional import rms_norm

    return rms_norm(x, x.shape[-1:], scale, eps)


def torch_layer_norm(x, scale=None, bias=None, *, eps=1e-6):
    """(x - mean(x)) / √(var(x) + eps) · scale + bias, of torch.nn.functional."""
    from torch.nn.functional import layer_norm

    return layer_norm(x, x.shape[-1:], scale, bias, eps)


def torch_add_rms_norm(x, residual, scale=None, *, eps=1e-6):
    """(norm(x + residual), x + residual), the norm of torch.nn.functional."""
    total = x + residual
    return torch_rms_norm(total, scale, eps=eps), total


def torch_add_layer_norm(x, residual, scale=None, bias=None, *, eps=1e-6):
    """(norm(x + residual), x + residual), the norm of torch.nn.functional."""
    total = x + residual
    return torch_layer_norm(total, scale, bias, eps=eps), total


def torch_group_norm(x, scale=None, bias=None, *, num_groups, eps=1e-6):
    """(x - mean) / √(var + eps) · scale + bias for each group of channels, of torch.nn.functional."""
    from torch.nn.functional import group_norm

    return group_norm(x.movedim(-1, 1), num_groups, scale, bias, eps).movedim(1, -1)


def torch_instance_norm(x, scale=None, bias=None, *, eps=1e-6):
    """(x - mean) / √(var + eps) · scale + bias for each channel of each entry, of torch.nn.functional."""
    return torch_group_norm(x, scale, bias, num_groups=x.shape[-1], eps=eps)


def torch_batch_norm(x, scale=None, bias=None, *, eps=1e-5):
    """((x - mean) / √(var + eps) · scale + bias for each channel, mean, var), of torch.nn.functional."""
    from torch.nn.functional import batch_norm

    axes, wide = tuple(range(x.ndim - 1)), x.float()
    y = batch_norm(x.movedim(-1, 1), None, None, scale, bias, training=True, eps=eps).movedim(1, -1)
    return y, wide.mean(axes), wide.var(axes, correction=0)


def torch_max_pool(inputs, window_shape, strides):
    """The largest of every window of images, of torch.nn.functional."""
    from torch.nn.functional import max_pool2d

    return max_pool2d(inputs.movedim(-1, 1), window_shape, strides).movedim(1, -1)


def torch_avg_pool(inputs, window_shape, strides):
    """The mean of every window of images, of torch.nn.functional."""
    from torch.nn.functional import avg_pool2d

    return avg_pool2d(inputs.movedim(-1, 1), window_shape, strides).movedim(1, -1)


def torch_adaptive_avg_pool(inputs, output_shape):
    """The means of windows that share out images, of torch.nn.functional."""
    from torch.nn.functional import adaptive_avg_pool2d

    return adaptive_avg_pool2d(inputs.movedim(-1, 1), output_shape).movedim(1, -1)


def torch_softmax(x, axis=-1, *, temperature=1.0):
    """exp(x / temperature) / Σ exp(x / temperature), of torch.nn.functional."""
    return (x / temperature).softmax(axis)


def torch_gelu(x, approximate=True):
    """x · Φ(x), of torch.nn.functional."""
    from torch.nn.functional import gelu

    return gelu(x, approximate="tanh" if approximate else "none")


def torch_silu(x):
    """x · σ(x), of torch.nn.functional."""
    from torch.nn.functional import silu

    return silu(x)


def torch_relu(x):
    """max(x, 0), of torch.nn.functional."""
    return x.relu()


def torch_conv(lhs, rhs, window_strides, padding, *, dimension_numbers=None, bias=None, activation=None):
    """activation(lhs ∗ rhs + bias) of two axes, of torch; the activation is relu or none."""
    import torch

    numbers = jax.lax.conv_dimension_numbers(tuple(lhs.shape), tuple(rhs.shape), dimension_numbers)
    relu = activation is not None
    if lhs.ndim != 4 or (relu and getattr(activation, "__name__", "") != "relu"):
        raise NotImplementedError("torch's convolution is taken for two spatial axes, with relu or no activation")
    lhs, rhs = lhs.permute(numbers.lhs_spec), rhs.permute(numbers.rhs_spec)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[2:], rhs.shape[2:], window_strides, padding)
    (top, bottom), (left, right) = padding
    lhs = torch.nn.functional.pad(lhs, (left, right, top, bottom))
    y = torch.nn.functional.conv2d(lhs, rhs, bias, tuple(window_strides))
    y = torch.relu(y) if relu else y
    return y.permute([numbers.out_spec.index(axis) for axis in range(4)])


def torch_matmul(x, w, *, bias=None, residual=None):
    """x · w + bias + residual, of torch.nn.functional."""
    y = x @ w
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def torch_gated_linear_unit(x, w_gate, w_up):
    """silu(x · w_gate) ∘ (x · w_up), of torch.nn.functional."""
    return torch_silu(x @ w_gate) * (x @ w_up)


def torch_linear_cross_entropy(x, weight, labels, *, bias=None, label_smoothing=0.0, reduction="mean"):
    """-log softmax(x · weight)[label], reduced, of torch.nn.functional."""
    from torch.nn.functional import cross_entropy

    z = torch_matmul(x, weight, bias=bias).float().flatten(0, -2)
    loss = cross_entropy(z, labels.long().flatten(), label_smoothing=label_smoothing, reduction=reduction)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def _reduced(loss, reduction: str):
    return {"mean": jnp.mean, "sum": jnp.sum, "none": lambda loss: loss}[reduction](loss)


PEERS: dict[str, dict[str, Callable]] = {
    "jax": {
        "add_layer_norm": jax_add_layer_norm,
        "add_rms_norm": jax_add_rms_norm,
        "block_sparse_matmul": jax_block_sparse_matmul,
        "adaptive_avg_pool": jax_adaptive_avg_pool,
        "avg_pool": jax_avg_pool,
        "batch_norm": jax_batch_norm,
        "global_avg_pool": jax_global_avg_pool,
        "global_max_pool": jax_global_max_pool,
        "max_pool": jax_max_pool,
        "decode_attention": jax_decode_attention,
        "dot_product_attention": jax_dot_product_attention,
        "gated_linear_unit": jax_gated_linear_unit,
        "gelu": jax_gelu,
        "group_norm": jax_group_norm,
        "instance_norm": jax_instance_norm,
        "layer_norm": jax_layer_norm,
        "linear_cross_entropy": jax_linear_cross_entropy,
        "linear_distillation": jax_linear_distillation,
        "conv": jax_conv,
        "conv_transpose": jax_conv_transpose,
        "matmul": jax_matmul,
        "paged_attention": jax_paged_attention,
        "quantized_conv": jax_quantized_conv,
        "quantized_matmul": jax_quantized_matmul,
        "ragged_dot": jax_ragged_dot,
        "relu": jax_relu,
        "rms_norm": jax_rms_norm,
        "rope": jax_rope,
        "rope_projection": jax_rope_projection,
        "silu": jax_silu,
        "softmax": jax_softmax,
        "sparse_2_4_matmul": jax_sparse_2_4_matmul,
        "squared_relu": jax_squared_relu,
    },
    "flax": {
        "add_layer_norm": flax_add_layer_norm,
        "add_rms_norm": flax_add_rms_norm,
        "avg_pool": flax_avg_pool,
        "batch_norm": flax_batch_norm,
        "max_pool": flax_max_pool,
        "dot_product_attention": flax_dot_product_attention,
        "group_norm": flax_group_norm,
        "instance_norm": flax_instance_norm,
        "layer_norm": flax_layer_norm,
        "rms_norm": flax_rms_norm,
    },
    "optax": {"linear_cross_entropy": optax_linear_cross_entropy},
    "tokamax": {
        "dot_product_attention": tokamax_dot_product_attention,
        "gated_linear_unit": tokamax_gated_linear_unit,
        "layer_norm": tokamax_layer_norm,
        "linear_cross_entropy": tokamax_linear_cross_entropy,
        "ragged_dot": tokamax_ragged_dot,
        "rms_norm": tokamax_rms_norm,
    },
    "torch": {
        "add_layer_norm": torch_add_layer_norm,
        "add_rms_norm": torch_add_rms_norm,
        "adaptive_avg_pool": torch_adaptive_avg_pool,
        "avg_pool": torch_avg_pool,
        "batch_norm": torch_batch_norm,
        "max_pool": torch_max_pool,
        "dot_product_attention": torch_dot_product_attention,
        "gated_linear_unit": torch_gated_linear_unit,
        "gelu": torch_gelu,
        "group_norm": torch_group_norm,
        "instance_norm": torch_instance_norm,
        "layer_norm": torch_layer_norm,
        "linear_cross_entropy": torch_linear_cross_entropy,
        "conv": torch_conv,
        "matmul": torch_matmul,
        "relu": torch_relu,
        "rms_norm": torch_rms_norm,
        "silu": torch_silu,
        "softmax": torch_softmax,
    },
}
