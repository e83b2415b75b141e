"""Which settings a checkpoint is tied to: those of the method and the networks.

What one turns on advice of the run itself is free.
"""

from hf_diffusion.config.resuming import changeable_settings, differences, tied_settings
from hf_diffusion.training.train_classifier import ClassifierConfig
from hf_diffusion.training.train_ddgan import DDGANConfig
from hf_diffusion.training.train_ddpm import DDPMConfig


RUN = {"dataset_name": "digits", "max_train_steps": 10}


def test_what_makes_other_weights_is_tied_and_what_tunes_the_training_may_change():
    ddpm, ddgan, classifier = (config(**RUN) for config in (DDPMConfig, DDGANConfig, ClassifierConfig))
    assert {"prediction_type", "beta_schedule", "channel_mult", "class_conditional"} <= set(tied_settings(ddpm))
    assert {"num_timesteps", "divergence", "latent_dim", "discriminator_channels"} <= set(tied_settings(ddgan))
    assert {"ddpm_num_steps", "pool"} <= set(tied_settings(classifier))
    # what the run advises where one side wins, or where it diverges
    advised = {"r1_gamma", "r1_interval", "n_critic", "discriminator_learning_rate", "learning_rate"}
    assert advised <= set(changeable_settings(ddgan)) and not advised & set(tied_settings(ddgan))


def test_nothing_of_logging_sampling_machine_or_place_is_compared():
    for config in (DDPMConfig(**RUN), DDGANConfig(**RUN), ClassifierConfig(**RUN)):
        compared = set(tied_settings(config)) | set(changeable_settings(config))
        free = {
            "output_dir",
            "logging_steps",
            "sample_steps",
            "ddpm_num_inference_steps",
            "guidance_scale",
            "eval_steps",
        }
        free |= {"mixed_precision", "resume_from_checkpoint", "push_to_hub", "train_batch_size", "max_train_steps"}
        assert not compared & free


def test_settings_that_only_one_of_the_two_knows_do_not_count():
    assert differences({"a": 1, "gone": 2}, {"a": 1, "new": 3}) == []
    assert differences({"a": 1, "b": [1, 2]}, {"a": 2, "b": [1, 2]}) == ["a was 1 and is 2"]
