"""Data sets with fixed train and held-out splits, read in an order that is a function of (seed, samples seen)."""
