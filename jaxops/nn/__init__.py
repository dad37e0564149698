"""Flax layers made of jaxops operators: table of contents, one line per public name. For Linen: `jaxops.nn.linen`."""

from jaxops.nn.attention import MultiHeadAttention as MultiHeadAttention
from jaxops.nn.attention import attention_fn as attention_fn
from jaxops.nn.block import TransformerBlock as TransformerBlock
from jaxops.nn.conv import Conv as Conv
from jaxops.nn.mlp import GatedMLP as GatedMLP
from jaxops.nn.moe import MoE as MoE
from jaxops.nn.norms import GroupNorm as GroupNorm
from jaxops.nn.norms import LayerNorm as LayerNorm
from jaxops.nn.norms import RMSNorm as RMSNorm
from jaxops.nn.post_training import LayerReport as LayerReport
from jaxops.nn.post_training import QuantizationReport as QuantizationReport
from jaxops.nn.post_training import Scheme as Scheme
from jaxops.nn.post_training import calibrate as calibrate
from jaxops.nn.post_training import convert as convert
from jaxops.nn.post_training import quantization_aware as quantization_aware
from jaxops.nn.post_training import quantize_model as quantize_model
from jaxops.nn.post_training import sensitivity as sensitivity
from jaxops.nn.quantized import FakeQuantizedLinear as FakeQuantizedLinear
from jaxops.nn.quantized import QuantizedEmbed as QuantizedEmbed
from jaxops.nn.quantized import QuantizedLinear as QuantizedLinear
from jaxops.nn.quantized import QuantizedWeight as QuantizedWeight
