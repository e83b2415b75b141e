"""Classifier guidance as a guider of diffusers, for the pipelines that take one.

The noise prediction is shifted by -sqrt(1 - alpha_bar) * gradient, Algorithm 2 of arXiv:2105.05233,
before any scheduler sees it.
"""

from diffusers import ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from hf_diffusion.pipelines.pipeline_classifier_guidance import classifier_gradient


class ClassifierGuidance(BaseGuidance):
    """Shifts a prediction by the gradient of a classifier of noisy images.

    It brings classifier guidance to schedulers whose `step` takes no gradient, such as multistep
    solvers, with one forward of the denoiser a step. `classifier` is an `ADMClassifier`, `pipe` a
    `ClassifierFreeGuidancePipeline` whose model knows the same classes:

        from diffusers import DPMSolverMultistepScheduler
        from hf_diffusion import ClassifierGuidance

        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = scheduler
        guider = ClassifierGuidance(2.0, classifier=classifier, scheduler=scheduler)
        images = pipe(class_labels=[0, 1], num_inference_steps=20, guider=guider).images

    Guiders are experimental in diffusers. They are no part of a saved pipeline.

    Args:
        guidance_scale: multiplies the gradient; 0 does not guide.
        start, stop: the shares of the run between which it guides.
        classifier, scheduler: the classifier, and the scheduler of the run, from which the noise
            levels and the prediction type are read. They are not part of the saved configuration:
            set them as attributes after `from_pretrained`.

    Unlike `ClassifierGuidancePipeline` with an ancestral scheduler, whose step adds the gradient
    after x_0 was clipped, a scheduler that clips does so after this shift.
    """

    _input_predictions = ["pred_cond"]
    ignore_for_config = ["classifier", "scheduler"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        classifier: ModelMixin | None = None,
        scheduler: SchedulerMixin | None = None,
    ):
        super().__init__(start, stop, enabled)
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0, not {guidance_scale!r}")
        self.guidance_scale, self.classifier, self.scheduler = guidance_scale, classifier, scheduler

    @property
    def is_conditional(self) -> bool:
        return True

    @property
    def num_conditions(self) -> int:
        return 1

    def prepare_inputs(self, data: dict[str, Tensor | tuple[Tensor, Tensor]]) -> list:
        """The one batch, conditional; `data` holds `sample`, x_t (B, ...), and `class_labels`."""
        return [self._prepare_batch(data, 0, "pred_cond")]

    def __call__(self, data: list) -> GuiderOutput:
        """The guided prediction of the one batch; its `noise_pred` (B, ...) is the denoiser's."""
        (batch,) = data
        return self.forward(batch.noise_pred, batch.sample, batch.class_labels)

    def forward(self, pred_cond: Tensor, sample: Tensor, class_labels: Tensor) -> GuiderOutput:
        """The prediction, shifted where the run is between start and stop."""
        pred = pred_cond
        if self._enabled and self.guidance_scale > 0 and self._is_within_range():
            if self.classifier is None or self.scheduler is None:
                raise ValueError("ClassifierGuidance has no classifier or no scheduler; set both as its attributes")
            gradient = classifier_gradient(self.classifier, sample, self._timestep, class_labels)
            pred = pred_cond + self._weight(sample) * self.guidance_scale * gradient.to(pred_cond.dtype)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=None)

    def _is_within_range(self) -> bool:
        return int(self._start * self._num_inference_steps) <= self._step < int(self._stop * self._num_inference_steps)

    def _weight(self, like: Tensor) -> Tensor:
        """What the gradient is multiplied by in a prediction of the scheduler's type."""
        alpha_bar = self.scheduler.alphas_cumprod.to(like.device)[self._timestep.long()].to(like.dtype)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return -(1 - alpha_bar).sqrt()
        if kind == "v_prediction":
            return -((1 - alpha_bar) / alpha_bar).sqrt()
        if kind == "sample":
            return (1 - alpha_bar) / alpha_bar.sqrt()
        raise ValueError(f"ClassifierGuidance knows epsilon, v_prediction and sample, not prediction_type {kind!r}")
