"""hf_diffusion: train, guide, measure and share diffusion models on the base classes of diffusers.

Importing the package imports the module of every component: diffusers loads components only from modules that are imported.
"""

from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
from hf_diffusion.models.unet_adm import ADMClassifier, ADMGenerator, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.pipelines.pipeline_classifier_guidance import ClassifierGuidancePipeline
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler, LinearDDPMScheduler


__version__ = "0.1.0"
__all__ = [
    "ADMClassifier",
    "ADMGenerator",
    "ADMUNet2DModel",
    "ClassifierFreeGuidancePipeline",
    "ClassifierGuidancePipeline",
    "CosineDDPMScheduler",
    "DDGANDiscriminator",
    "DDGANGenerator",
    "DDGANPipeline",
    "DDGANScheduler",
    "DDIMEtaScheduler",
    "LinearDDPMScheduler",
]
