"""Networks and the Denoiser (network + preconditioning) through which methods and samplers see them."""
