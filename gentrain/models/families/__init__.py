"""Families of pretrained pipelines of diffusers: one file each says how its pipelines become a denoiser, a codec and a path."""
