"""AlphaFold 3 in plain PyTorch, its data and training step, and the systems people run today."""
