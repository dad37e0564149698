"""Flax layers made of jaxops operators: table of contents, one line per public name. For Linen: `jaxops.nn.linen`."""

from jaxops.nn.attention import MultiHeadAttention as MultiHeadAttention
from jaxops.nn.attention import attention_fn as attention_fn
from jaxops.nn.block import TransformerBlock as TransformerBlock
from jaxops.nn.mlp import GatedMLP as GatedMLP
from jaxops.nn.moe import MoE as MoE
from jaxops.nn.norms import GroupNorm as GroupNorm
from jaxops.nn.norms import LayerNorm as LayerNorm
from jaxops.nn.norms import RMSNorm as RMSNorm
from jaxops.nn.quantized import QuantizedLinear as QuantizedLinear
from jaxops.nn.quantized import QuantizedWeight as QuantizedWeight
