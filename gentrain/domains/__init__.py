"""Convex sets: membership, reflection, uniform points, mirror maps."""
