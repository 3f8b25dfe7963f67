"""The model layer: vision-language models built on vlm_kernels.

It uses only the public API of `vlm_kernels`, which never imports it: what a model needs and the
public API lacks is a gap in the API, not a reason to reach around it.
"""
