"""Samplers: from noise to data along a path, with classifier-free guidance."""
