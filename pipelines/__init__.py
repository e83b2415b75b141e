"""Sampling: one pipeline a file, each of which travels to the Hub with the weights."""

from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline


__all__ = ["ClassifierFreeGuidancePipeline", "DDGANPipeline"]
