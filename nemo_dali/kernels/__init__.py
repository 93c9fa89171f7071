"""Pixel, mask, plan and ranking kernels: a NumPy reference (the oracle), Numba for the CPU, CUDA for GPUs.

The sources lie in ``kernels/`` at the top of the repository. Beside this file are links to them, so that Python, type
checkers and editors find them here in every kind of installation. ``kernels/`` itself is no package: that top-level
name belongs to another project.
"""
