"""hf_diffusion: train, guide, measure and share diffusion models on the classes of diffusers.

diffusers finds the class of a component in a module of `sys.modules`. So importing the package
puts the module of every component there. A module runs when it is first asked for an attribute,
since torch and diffusers take seconds.
"""

import sys
from typing import TYPE_CHECKING, Any

from hf_diffusion.lazy_modules import put_into_sys_modules


if TYPE_CHECKING:
    from hf_diffusion.models.clip_noisy import NoisyCLIP
    from hf_diffusion.models.mlp_points import PointDenoiser, PointDiscriminator, PointGenerator, PointMeanFlowDenoiser
    from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
    from hf_diffusion.models.transformer_pixel import PixelTransformer2DModel
    from hf_diffusion.models.transformer_tokens import TokenTransformerModel
    from hf_diffusion.models.unet_adm import ADMClassifier, ADMGenerator, ADMMeanFlowUNet2DModel, ADMUNet2DModel
    from hf_diffusion.pipelines.guiders import ClassifierGuidance
    from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
    from hf_diffusion.pipelines.pipeline_classifier_guidance import ClassifierGuidancePipeline
    from hf_diffusion.pipelines.pipeline_consistency import ConsistencyPipeline
    from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
    from hf_diffusion.pipelines.pipeline_discrete_image import DiscreteImagePipeline
    from hf_diffusion.pipelines.pipeline_discrete_text import DiscreteTextPipeline
    from hf_diffusion.pipelines.pipeline_edm import EDMPipeline
    from hf_diffusion.pipelines.pipeline_flow_matching import FlowMatchingPipeline
    from hf_diffusion.pipelines.pipeline_mean_flow import MeanFlowPipeline
    from hf_diffusion.pipelines.pipeline_score_sde import ScoreSdePipeline
    from hf_diffusion.pipelines.pipeline_text_to_image import TextToImagePipeline
    from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler
    from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
    from hf_diffusion.schedulers.scheduling_discrete import D3PMScheduler
    from hf_diffusion.schedulers.scheduling_edm import EDMHeunScheduler
    from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler
    from hf_diffusion.schedulers.scheduling_gaussian import (
        CosineDDPMScheduler,
        DDIMEtaScheduler,
        ImprovedPNDMScheduler,
        LinearDDPMScheduler,
    )
    from hf_diffusion.schedulers.scheduling_masked import MDLMScheduler, UDLMScheduler
    from hf_diffusion.schedulers.scheduling_score import (
        AnnealedLangevinScheduler,
        ScoreSdeSubVPScheduler,
        ScoreSdeVEScheduler,
        ScoreSdeVPScheduler,
    )
    from hf_diffusion.schedulers.scheduling_unipc import UniPCTimestepsScheduler

__version__ = "0.2.0"

__all__ = [
    "ADMClassifier",
    "ADMGenerator",
    "ADMMeanFlowUNet2DModel",
    "ADMUNet2DModel",
    "AnnealedLangevinScheduler",
    "ClassifierFreeGuidancePipeline",
    "ClassifierGuidance",
    "ClassifierGuidancePipeline",
    "ConsistencyPipeline",
    "ConsistencyScheduler",
    "CosineDDPMScheduler",
    "D3PMScheduler",
    "DDGANDiscriminator",
    "DDGANGenerator",
    "DDGANPipeline",
    "DDGANScheduler",
    "DDIMEtaScheduler",
    "DiscreteImagePipeline",
    "DiscreteTextPipeline",
    "EDMHeunScheduler",
    "EDMPipeline",
    "FlowMatchingPipeline",
    "FlowMatchingScheduler",
    "ImprovedPNDMScheduler",
    "LinearDDPMScheduler",
    "MDLMScheduler",
    "MeanFlowPipeline",
    "NoisyCLIP",
    "PixelTransformer2DModel",
    "PointDenoiser",
    "PointDiscriminator",
    "PointGenerator",
    "PointMeanFlowDenoiser",
    "ScoreSdePipeline",
    "ScoreSdeSubVPScheduler",
    "ScoreSdeVEScheduler",
    "ScoreSdeVPScheduler",
    "TextToImagePipeline",
    "TokenTransformerModel",
    "UDLMScheduler",
    "UniPCTimestepsScheduler",
]
# The same at run time: a module and the public classes that it defines.
_COMPONENTS = {
    "hf_diffusion.models.clip_noisy": ("NoisyCLIP",),
    "hf_diffusion.models.mlp_points": (
        "PointDenoiser",
        "PointDiscriminator",
        "PointGenerator",
        "PointMeanFlowDenoiser",
    ),
    "hf_diffusion.models.ncsnpp_ddgan": (
        "DDGANDiscriminator",
        "DDGANGenerator",
    ),
    "hf_diffusion.models.transformer_pixel": ("PixelTransformer2DModel",),
    "hf_diffusion.models.unet_adm": (
        "ADMClassifier",
        "ADMGenerator",
        "ADMMeanFlowUNet2DModel",
        "ADMUNet2DModel",
    ),
    "hf_diffusion.models.transformer_tokens": ("TokenTransformerModel",),
    "hf_diffusion.pipelines.guiders": ("ClassifierGuidance",),
    "hf_diffusion.pipelines.pipeline_classifier_free_guidance": ("ClassifierFreeGuidancePipeline",),
    "hf_diffusion.pipelines.pipeline_classifier_guidance": ("ClassifierGuidancePipeline",),
    "hf_diffusion.pipelines.pipeline_consistency": ("ConsistencyPipeline",),
    "hf_diffusion.pipelines.pipeline_ddgan": ("DDGANPipeline",),
    "hf_diffusion.pipelines.pipeline_discrete_image": ("DiscreteImagePipeline",),
    "hf_diffusion.pipelines.pipeline_discrete_text": ("DiscreteTextPipeline",),
    "hf_diffusion.pipelines.pipeline_edm": ("EDMPipeline",),
    "hf_diffusion.pipelines.pipeline_flow_matching": ("FlowMatchingPipeline",),
    "hf_diffusion.pipelines.pipeline_mean_flow": ("MeanFlowPipeline",),
    "hf_diffusion.pipelines.pipeline_score_sde": ("ScoreSdePipeline",),
    "hf_diffusion.pipelines.pipeline_text_to_image": ("TextToImagePipeline",),
    "hf_diffusion.schedulers.scheduling_consistency": ("ConsistencyScheduler",),
    "hf_diffusion.schedulers.scheduling_ddgan": ("DDGANScheduler",),
    "hf_diffusion.schedulers.scheduling_discrete": ("D3PMScheduler",),
    "hf_diffusion.schedulers.scheduling_edm": ("EDMHeunScheduler",),
    "hf_diffusion.schedulers.scheduling_flow": ("FlowMatchingScheduler",),
    "hf_diffusion.schedulers.scheduling_gaussian": (
        "CosineDDPMScheduler",
        "DDIMEtaScheduler",
        "ImprovedPNDMScheduler",
        "LinearDDPMScheduler",
    ),
    "hf_diffusion.schedulers.scheduling_masked": (
        "MDLMScheduler",
        "UDLMScheduler",
    ),
    "hf_diffusion.schedulers.scheduling_score": (
        "AnnealedLangevinScheduler",
        "ScoreSdeSubVPScheduler",
        "ScoreSdeVEScheduler",
        "ScoreSdeVPScheduler",
    ),
    "hf_diffusion.schedulers.scheduling_unipc": ("UniPCTimestepsScheduler",),
}

for _module in _COMPONENTS:
    put_into_sys_modules(_module)


def __getattr__(name: str) -> Any:
    for module, classes in _COMPONENTS.items():
        if name in classes:
            return getattr(sys.modules[module], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
