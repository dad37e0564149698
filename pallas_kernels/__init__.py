"""Raw Pallas kernels for TPU and GPU, and the tile mathematics they share. Imports nothing of jaxops."""
