"""Operators: each folder holds the definition in plain PyTorch beside its kernels."""
