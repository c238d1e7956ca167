"""Commands about the operators: what compiles, what is right, what is fast, and which tiles to launch."""
