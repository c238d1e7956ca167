"""The optimised reference: operators, drop-in modules, sharding and the input pipeline."""
