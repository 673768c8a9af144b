"""Triton kernels for the GPU; nothing outside this package imports triton, and this package only where it is used."""
