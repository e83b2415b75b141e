"""The longer sub-commands of `hf-diffusion`."""
