"""Measures of samples: Frechet and kernel distances, precision and recall, label accuracy, bits per dimension."""

from hf_diffusion.evaluation.feature_networks import load_feature_network
from hf_diffusion.evaluation.measures import measure_images
from hf_diffusion.evaluation.reference import reference_statistics
from hf_diffusion.evaluation.sampling import sample_images


__all__ = ["load_feature_network", "measure_images", "reference_statistics", "sample_images"]
