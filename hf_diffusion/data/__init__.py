"""Images and labels for training, as batches that depend on (seed, epoch, index) alone."""

from hf_diffusion.data.images import ImageData, StreamingImageData, batches, load_images


__all__ = ["ImageData", "StreamingImageData", "batches", "load_images"]
