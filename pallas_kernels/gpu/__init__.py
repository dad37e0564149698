"""Kernels for GPUs, in Mosaic GPU: one module per operator, each with unsupported, forward, backward and Tiles."""

from pallas_kernels.gpu import add_layer_norm as add_layer_norm
from pallas_kernels.gpu import add_rms_norm as add_rms_norm
from pallas_kernels.gpu import attention as attention
from pallas_kernels.gpu import batch_norm as batch_norm
from pallas_kernels.gpu import block_sparse_matmul as block_sparse_matmul
from pallas_kernels.gpu import conv as conv
from pallas_kernels.gpu import decode_attention as decode_attention
from pallas_kernels.gpu import depthwise_conv as depthwise_conv
from pallas_kernels.gpu import gated_linear_unit as gated_linear_unit
from pallas_kernels.gpu import group_norm as group_norm
from pallas_kernels.gpu import layer_norm as layer_norm
from pallas_kernels.gpu import linear_cross_entropy as linear_cross_entropy
from pallas_kernels.gpu import linear_distillation as linear_distillation
from pallas_kernels.gpu import matmul as matmul
from pallas_kernels.gpu import quantized_matmul as quantized_matmul
from pallas_kernels.gpu import ragged_dot as ragged_dot
from pallas_kernels.gpu import rms_norm as rms_norm
from pallas_kernels.gpu import rope as rope
from pallas_kernels.gpu import rope_projection as rope_projection
from pallas_kernels.gpu import softmax as softmax
