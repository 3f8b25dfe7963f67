"""Triton kernels, one file an op; importing one registers its ops in `vlm_kernels_triton`."""
