"""Models over several devices, made of jaxops operators: table of contents, one line per public name."""

from sharding.collective_matmul import all_gather_matmul as all_gather_matmul
from sharding.collective_matmul import matmul_reduce_scatter as matmul_reduce_scatter
from sharding.collectives import all_gather as all_gather
from sharding.collectives import all_gather_same as all_gather_same
from sharding.collectives import all_to_all as all_to_all
from sharding.collectives import copy as copy
from sharding.collectives import reduce_scatter as reduce_scatter
from sharding.mesh import make_mesh as make_mesh
from sharding.mesh import partition_specs as partition_specs
from sharding.mesh import shard as shard
from sharding.pipeline import Layers as Layers
from sharding.pipeline import Place as Place
from sharding.pipeline import pipeline_value as pipeline_value
from sharding.pipeline import pipeline_value_and_grad as pipeline_value_and_grad
from sharding.schedules import Table as Table
from sharding.schedules import schedule as schedule
from sharding.tensor import column_parallel as column_parallel
from sharding.tensor import dropout as dropout
from sharding.tensor import enter as enter
from sharding.tensor import gated_mlp as gated_mlp
from sharding.tensor import heads_parallel_attention as heads_parallel_attention
from sharding.tensor import leave as leave
from sharding.tensor import row_parallel as row_parallel
from sharding.tensor import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
from sharding.tensor import vocab_parallel_embed as vocab_parallel_embed
