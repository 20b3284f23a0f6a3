"""Methods: one file per algorithm. Roles, losses and the order of updates; plain torch, no ranks, no devices, no files."""
