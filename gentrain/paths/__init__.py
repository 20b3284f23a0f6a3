"""Probability paths x_t = alpha(t) x_0 + sigma(t) eps, and the laws by which training draws t. Time runs from data to noise."""
