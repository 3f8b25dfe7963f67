"""The version of vlm_kernels: setup.py, CMake and the package read it here."""

__version__ = "0.1.0"
