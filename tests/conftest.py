"""The machine every test sees: eight virtual CPU devices, no accelerator, compiled programs kept between runs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the CUDA compiler packages may be installed without their runtime
os.environ["MPLBACKEND"] = "Agg"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
