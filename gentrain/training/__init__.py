"""The multi-role training engine: the only package that imports deepspeed."""
