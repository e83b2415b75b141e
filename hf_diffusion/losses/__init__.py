"""Training objectives, one file a family of diffusion processes."""

from hf_diffusion.losses.gaussian import (
    VariationalTerms,
    hybrid_loss,
    loss_weight,
    mean_loss,
    min_snr_weight,
    p2_weight,
    prediction_target,
    simple_loss,
    variance_loss,
    vb_terms_bits,
    vlb_loss,
)


__all__ = [
    "VariationalTerms",
    "hybrid_loss",
    "loss_weight",
    "mean_loss",
    "min_snr_weight",
    "p2_weight",
    "prediction_target",
    "simple_loss",
    "variance_loss",
    "vb_terms_bits",
    "vlb_loss",
]
