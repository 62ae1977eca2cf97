"""Triton kernels, each with a torch twin. They run on CUDA, and in the interpreter for tests."""
