"""Multi-head attention: flax's parameters and arguments, with rotary positions, windows, soft cap and grouped heads."""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.nnx.nn import attention as flax_attention
from jax import lax

from jaxops import dropout
from jaxops.dispatch import Implementation
from jaxops.nn.implementation import static, strict, without_kernels
from jaxops.ops.attention import dot_product_attention
from jaxops.ops.decode_attention import decode_attention
from jaxops.ops.rope import RopeScaling, rope
from pallas_kernels.masks import Band

_MUCH = 1 << 28  # bytes of weights of which flax's own code is not used without a warning
_FEW_TOKENS = 32  # of a decoding step; more are a prompt, whose products are worth the kernels of training
Cache = tuple[jax.Array, jax.Array, jax.Array]  # key[batch…, length, heads, dim], value[…], index[]: positions written


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What distinguishes one attention layer from another, besides its parameters.

    rope_base: None for no rotary embedding. local_window_size: (left, right), query i sees i-left ≤ j ≤ i+right.
    The rest as in `jaxops.dot_product_attention`.
    """

    is_causal: bool = False
    rope_base: float | None = None
    rope_scaling: float | RopeScaling | None = None
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    scale: float | None = None
    implementation: Implementation = None


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Any = flax_attention.dtypes.promote_dtype,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    *,
    implementation: Implementation = None,
    **options: Any,
) -> jax.Array:
    """out = softmax(query · keyᵀ / √dim + bias, where mask) · value, for flax's `attention_fn` hook.

    `nnx.MultiHeadAttention(attention_fn=jaxops.nn.attention_fn)` and Linen's
    `nn.MultiHeadDotProductAttention(attention_fn=jaxops.nn.attention_fn)`: the arguments are theirs. Differences: a
    row that may attend to nothing gives zeros (flax: the mean of all values), and the softmax is always in float32
    (`force_fp32_for_softmax`).

    Sown weights (`module`), a `precision` other than the default, and custom einsums need the [T, S] matrix of weights:
    these calls go to flax's own code, as they would have without this hook, with windows, lengths and segments as a
    mask, and a warning where the matrix is large. Dropout needs it not: with the same chance other weights are dropped
    than by flax's random numbers.

    Args:
      query: [batch…, T, heads, dim]; key, value: [batch…, S, key heads, dim], key heads dividing heads.
      bias, mask: broadcastable to [batch…, heads, T, S]; True (or nonzero) in `mask` attends.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **options: any other option of `jaxops.dot_product_attention` (`local_window_size`, `logits_soft_cap`, …).

    Raises `ValueError` if flax's code is needed but lacks an option that was given, or active dropout has no
    `dropout_rng`.
    """
    reason = None
    if module is not None:
        reason = "sowing the attention weights"
    elif qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        reason = "custom einsums"
    elif not default_precision(precision):
        reason = f"precision={precision!r}"
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    if reason is None:
        if dropout_rate > 0.0 and not deterministic:
            if dropout_rng is None:
                raise ValueError(f"dropout_rng: with a dropout_rate of {dropout_rate} a key must be given, got None")
            options["dropout_rate"], rows = dropout_rate, (math.prod(query.shape[:-3]), query.shape[-2])
            words = dropout.dropout_rows(dropout_rng, *((1, 1) if broadcast_dropout else rows), query.shape[-3])
            options["dropout_key"] = jnp.broadcast_to(words, (*rows, *words.shape[2:]))
        return _fused(query, key, value, bias, mask, is_causal=is_causal, implementation=implementation, **options)

    # [T, S] is there in any case: what else says who sees whom becomes part of its mask.
    mask = _everything_masked(query, key, mask, is_causal, options)
    given = sorted(name for name, option in options.items() if option is not None)
    if given or strict(implementation):
        what = ", ".join(given) or "implementation='pallas'"
        raise ValueError(
            f"attention_fn: {what} cannot be had together with {reason}, which flax's own attention serves"
        )
    size = 4 * math.prod(query.shape[:-3]) * query.shape[-2] * query.shape[-3] * key.shape[-3]
    if size >= _MUCH:
        warnings.warn(f"attention_fn: {reason} makes all weights at once, about {size / 1e9:.1f} GB", stacklevel=2)
    dropping: dict[str, Any] = {
        "broadcast_dropout": broadcast_dropout,
        "dropout_rng": dropout_rng,
        "dropout_rate": dropout_rate,
        "deterministic": deterministic,
    }
    if isinstance(module, linen.Module) or qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        group = query.shape[-2] // key.shape[-2]
        return linen.dot_product_attention(
            query,
            jnp.repeat(key, group, axis=-2),
            jnp.repeat(value, group, axis=-2),
            bias,
            mask,
            **dropping,
            precision=precision,
            module=module,
            force_fp32_for_softmax=force_fp32_for_softmax,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
    weights = flax_attention.dot_product_attention_weights(
        query, key, bias, mask, **dropping, precision=precision, module=module
    )
    # [batch…, key heads, group, T, S]: a group of query heads shares a key head
    weights = weights.reshape(*weights.shape[:-3], key.shape[-2], -1, *weights.shape[-2:])
    out = jnp.einsum("...kgts,...skh->...tkgh", weights, value, precision=precision)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def rotated(
    query: jax.Array, key: jax.Array, options: AttentionOptions, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Query and key, rotated by the positions [batch…, T] or [T] where the options say so.

    Keys of another number are those of cross-attention: they count from 0.
    """
    if options.rope_base is None:
        return query, key
    key_positions = positions if key.shape[-3] == query.shape[-3] else jnp.arange(key.shape[-3])
    rotate: dict[str, Any] = {
        "base": options.rope_base,
        "scaling": options.rope_scaling,
        "implementation": without_kernels(options.implementation),
    }
    query = rope(query, jnp.broadcast_to(positions, query.shape[:-2]), **rotate)
    return query, rope(key, jnp.broadcast_to(key_positions, key.shape[:-2]), **rotate)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    options: AttentionOptions,
    *,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    mask: jax.Array | None = None,
    **call: Any,
) -> tuple[jax.Array, Cache | None]:
    """Attention between the projections of a layer: what its NNX and its Linen form share.

    Without a cache: rotates query and key by their positions and attends. With one: the T tokens are those after the
    `index` that were seen before; their keys and values are written to the cache, and each attends to the cache up to
    itself. Writing past the end of the cache gives NaN, for an index that is known only at run time.

    Args:
      query: [batch…, T, heads, dim]; key, value: [batch…, S, key heads, dim].
      positions: [batch…, T] or [T], of the tokens of query (and key); default 0, 1, … after the cached ones.
      cache: see `Cache`. mask: [batch…, 1 or heads, T, S], S the cache's length with a cache.
      **call: further arguments of `attention_fn`.

    Returns the output [batch…, T, heads, dim] and the new cache.
    """
    tokens = query.shape[-3]
    if positions is None:
        positions = (0 if cache is None else cache[2]) + jnp.arange(tokens)
    query, key = rotated(query, key, options, positions)
    choice: dict[str, Any] = {
        "logits_soft_cap": options.logits_soft_cap,
        "scale": options.scale,
        "implementation": options.implementation,
    }
    if cache is None:
        window = options.local_window_size
        return attention_fn(
            query, key, value, mask=mask, is_causal=options.is_causal, local_window_size=window, **choice, **call
        ), None

    by_position = [
        name for name in ("prefix_lengths", "alibi_slopes", "score_mod", "mask_mod") if call.get(name) is not None
    ]
    if by_position:
        raise ValueError(f"{by_position[0]}: expected none with a cache, as its queries do not begin at position 0")
    cached_key, cached_value, index = cache
    expected = (*cached_key.shape[:-3], tokens, *cached_key.shape[-2:])
    if key.shape != expected or tokens > cached_key.shape[-3]:
        raise ValueError(
            f"inputs: with a cache of shape {cached_key.shape} the keys must have shape {expected} with at most "
            f"{cached_key.shape[-3]} tokens, got {key.shape}"
        )
    cached_key, cached_value = (
        lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=old.ndim - 3)
        for old, new in ((cached_key, key), (cached_value, value))
    )
    # Token i of the new ones sees the cache up to itself, at index + i.
    window = _window(options.local_window_size)
    plain = mask is None and not any(value is not None for name, value in call.items() if name != "dtype")
    if plain and tokens <= _FEW_TOKENS:
        new, keys, values = flax_attention.dtypes.promote_dtype(
            tuple(x.reshape(-1, *x.shape[-3:]) for x in (query, cached_key, cached_value)), dtype=call.get("dtype")
        )
        lengths = jnp.full(new.shape[:1], index + tokens, jnp.int32)
        out = decode_attention(new, keys, values, lengths, local_window_size=window, **choice).reshape(query.shape)
    else:
        seen = Band.of(True, window).allowed(index + jnp.arange(tokens)[:, None], jnp.arange(cached_key.shape[-3]))
        mask = seen if mask is None else jnp.logical_and(mask, seen)
        keys, values = cached_key.astype(query.dtype), cached_value.astype(query.dtype)
        out = attention_fn(query, keys, values, mask=mask, **choice, **call)
    fits = index + tokens <= cached_key.shape[-3]
    return jnp.where(fits, out, jnp.nan), (cached_key, cached_value, index + tokens)


class MultiHeadAttention(nnx.MultiHeadAttention):
    """out = W_out · attention(W_query · x, W_key · x, W_value · x), per head.

    A drop-in for `nnx.MultiHeadAttention`: every argument of it is accepted except `attention_fn`, and the parameters
    have the same names and shapes (`query.kernel[in, heads, dim]`, `key`, `value`, `out`), with fewer key heads by
    `num_kv_heads`. Sown weights and a `precision` other than the default are served by flax's own attention (see
    `attention_fn`).

    Args:
      num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features: as in flax.
      is_causal: whether query i attends to keys j ≤ i only; the same argument of a call overrides it.
      use_rope: rotate queries and keys by their positions; `rope_base`, `rope_scaling`: see `jaxops.rope`.
      local_window_size, logits_soft_cap, scale: see `jaxops.dot_product_attention`.
      implementation: None | "pallas" | "xla" | a sequence of them.
      **flax_arguments: those of `nnx.MultiHeadAttention`.

    Decoding: `init_cache((batch, length, features))`, then calls with `decode=True`, each with the next token or
    tokens (flax: one token). The cache holds `num_kv_heads` heads. Filling it beyond `length` gives NaN.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        is_causal: bool = False,
        use_rope: bool = False,
        rope_base: float = 10000.0,
        rope_scaling: float | RopeScaling | None = None,
        local_window_size: int | tuple[int | None, int | None] | None = None,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **flax_arguments: Any,
    ):
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            attention_fn=attention_fn,
            rngs=rngs,
            **flax_arguments,
        )
        self.options = AttentionOptions(
            is_causal=is_causal,
            rope_base=rope_base if use_rope else None,
            rope_scaling=rope_scaling,
            local_window_size=local_window_size,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            implementation=static(implementation),
        )

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: jax.Array | None = None,
        **attention_arguments: Any,
    ) -> jax.Array:
        """Attends from `inputs_q[batch…, T, in_features]` to `inputs_k`, `inputs_v` (default: itself).

        Arguments as in flax, and: `decode` defaults to False, `is_causal` to the constructor's;
        `input_positions[batch…, T]` are the rotary positions; **attention_arguments are further ones of
        `jaxops.dot_product_attention`: `bias`, `query_seq_lengths`, `key_value_seq_lengths`, `query_segment_ids`,
        `key_value_segment_ids` (default: the queries'), `sinks`, and except with a cache, whose queries do not begin
        at position 0, `prefix_lengths`, `alibi_slopes`, `score_mod` and `mask_mod`. Returns [batch…, T, out_features].
        """
        inputs_k, inputs_v = sources(inputs_q, inputs_k, inputs_v, self.in_features)
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:  # normalize_qk
            query, key = self.query_ln(query), self.key_ln(key)

        decode = bool(self.decode) if decode is None else decode
        variables: Any = (self.cached_key, self.cached_value, self.cache_index)
        if decode and any(variable is None for variable in variables):
            raise ValueError("decode: there is no cache yet, call `init_cache` first")
        cache = tuple(variable[...] for variable in variables) if decode else None
        options = self.options if is_causal is None else dataclasses.replace(self.options, is_causal=is_causal)
        x, cache = attend(
            query,
            key,
            value,
            options,
            positions=input_positions,
            cache=cache,
            mask=mask,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            **self._dropout(deterministic, rngs),
            **attention_arguments,
        )
        for variable, new in zip(variables, cache or (), strict=decode):
            variable[...] = new
        return self.out(x, out_sharding=out_sharding)

    def _dropout(self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None) -> dict[str, Any]:
        """The dropout arguments of `attention_fn`; a key is drawn only if dropout is active."""
        if self.dropout_rate == 0.0:
            return {}
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError("deterministic: with dropout it must be given to the call or the constructor, got None")
        if deterministic:
            return {}
        stream = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        if stream is None:
            raise ValueError(
                "rngs: active dropout needs them in the call, or in the constructor with keep_rngs=True, got None"
            )
        return {
            "dropout_rng": stream(),
            "dropout_rate": self.dropout_rate,
            "broadcast_dropout": self.broadcast_dropout,
            "deterministic": False,
        }


def sources(
    inputs_q: jax.Array, inputs_k: jax.Array | None, inputs_v: jax.Array | None, in_features: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The inputs of keys and values: by default those of the queries, and those of the keys."""
    if inputs_k is None and inputs_v is not None:
        raise ValueError(
            "inputs_k: must be given if inputs_v is (for the same input in both, give inputs_k alone), got None"
        )
    if in_features is not None and inputs_q.shape[-1] != in_features:
        raise ValueError(f"inputs_q: expected {in_features} features, got shape {inputs_q.shape}")
    inputs_k = inputs_q if inputs_k is None else inputs_k
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def _window(window: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None] | None:
    return (window, window) if isinstance(window, int) else window


def _everything_masked(query, key, mask, is_causal, options):
    """One mask of `mask` and, taken out of `options`, window, lengths and segments: for [batch…, heads, T, S]."""
    batch = query.shape[:-3]
    row, column = jnp.arange(query.shape[-3])[:, None], jnp.arange(key.shape[-3])
    seen = [] if mask is None else [mask]
    band = Band.of(is_causal, _window(options.pop("local_window_size", None)))
    if not band.open:
        seen.append(band.allowed(row, column))
    for name, position in (("query_seq_lengths", row), ("key_value_seq_lengths", column)):
        if (length := options.pop(name, None)) is not None:
            seen.append(position < length.reshape(*batch, 1, 1, 1))
    segments, key_segments = options.pop("query_segment_ids", None), options.pop("key_value_segment_ids", None)
    if segments is not None:
        key_segments = segments if key_segments is None else key_segments
        seen.append(segments[..., None, :, None] == key_segments[..., None, None, :])
    return functools.reduce(jnp.logical_and, seen) if seen else None


def _fused(query, key, value, bias, mask, **options):
    """`dot_product_attention` for any number of batch axes, and masks of any dtype and broadcastable rank."""
    batch = query.shape[:-3]
    if key.shape[:-3] != batch or value.shape[:-3] != batch:
        raise ValueError(
            f"key, value: expected the batch axes of query, {batch}, got {key.shape[:-3]} and {value.shape[:-3]}"
        )

    def four_axes(x):
        if x is None or (len(batch) == 1 and x.ndim == 4):
            return x
        # Only the batch axes are spelt out; heads, T and S may stay 1.
        x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
        if len(batch) != 1:
            x = jnp.broadcast_to(x, batch + x.shape[-3:])
        return x.reshape(-1 if len(batch) != 1 else x.shape[0], *x.shape[-3:])

    for name in ("query_segment_ids", "key_value_segment_ids"):
        if options.get(name) is not None:
            options[name] = options[name].reshape(-1, options[name].shape[-1])
    if options.get("query_segment_ids") is not None and options.get("key_value_segment_ids") is None:
        options["key_value_segment_ids"] = options["query_segment_ids"]
    flat = [x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    mask = None if mask is None else mask.astype(bool)
    out = dot_product_attention(flat[0], flat[1], flat[2], four_axes(bias), four_axes(mask), **options)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def default_precision(precision: Any) -> bool:
    """Whether products of this precision are what they are without one; a pair is of both operands."""
    if precision is None:
        return True
    if isinstance(precision, tuple):
        return all(map(default_precision, precision))
    return not isinstance(precision, lax.DotAlgorithmPreset) and lax.Precision(precision) == lax.Precision.DEFAULT
