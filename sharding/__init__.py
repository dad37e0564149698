"""Models over several devices, made of jaxops operators: table of contents, one line per public name."""

from sharding.collective_matmul import all_gather_matmul as all_gather_matmul
from sharding.collective_matmul import matmul_reduce_scatter as matmul_reduce_scatter
from sharding.mesh import make_mesh as make_mesh
from sharding.mesh import partition_specs as partition_specs
from sharding.mesh import shard as shard
