"""jaxops: the operator library of JAX. Table of contents, one line per public name."""

from jaxops.dropout import dropout_rows as dropout_rows
from jaxops.inspection import explain as explain
from jaxops.inspection import target as target
from jaxops.ops.activations import gelu as gelu
from jaxops.ops.activations import relu as relu
from jaxops.ops.activations import silu as silu
from jaxops.ops.activations import squared_relu as squared_relu
from jaxops.ops.add_layer_norm import add_layer_norm as add_layer_norm
from jaxops.ops.add_rms_norm import add_rms_norm as add_rms_norm
from jaxops.ops.attention import dot_product_attention as dot_product_attention
from jaxops.ops.decode_attention import decode_attention as decode_attention
from jaxops.ops.gated_linear_unit import gated_linear_unit as gated_linear_unit
from jaxops.ops.group_norm import group_norm as group_norm
from jaxops.ops.layer_norm import layer_norm as layer_norm
from jaxops.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxops.ops.linear_distillation import linear_distillation as linear_distillation
from jaxops.ops.matmul import matmul as matmul
from jaxops.ops.paged_attention import paged_attention as paged_attention
from jaxops.ops.ragged_dot import ragged_dot as ragged_dot
from jaxops.ops.rms_norm import rms_norm as rms_norm
from jaxops.ops.rope import RopeScaling as RopeScaling
from jaxops.ops.rope import rope as rope
from jaxops.ops.softmax import softmax as softmax
from jaxops.routing import Routing as Routing
from jaxops.routing import top_k_routing as top_k_routing
