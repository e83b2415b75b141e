"""Every option of the training scripts acts: changed, it is found where it acts, or a test says so.

BUILT looks at a trainer that has not trained: what its option reaches, and the value that it gives
there. PINNED names the test of an option whose effect is more than a value. An option that is in
neither fails here.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.options import settings
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop import generative, sharing
from hf_diffusion.loop.start import start
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses import adversarial_game
from hf_diffusion.losses.adversarial import DIVERGENCES, fake_loss, generator_loss, real_loss
from hf_diffusion.randomness import derive_seed
from hf_diffusion.training import train_classifier, train_ddgan, train_ddpm


TESTS = Path(__file__).resolve().parents[1]
SHARED = {"dataset_name": "digits", "max_train_samples": 64, "max_train_steps": 100, "train_batch_size": 8,
          "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}  # fmt: skip
UNET = {"norm_num_groups": 4, "num_head_channels": 8}
SCRIPTS = {
    "ddpm": (train_ddpm, train_ddpm.DDPMConfig, {**UNET, "ddpm_num_inference_steps": 2}),
    "classifier": (train_classifier, train_classifier.ClassifierConfig, UNET),
    "ddgan": (
        train_ddgan,
        train_ddgan.DDGANConfig,
        {"latent_dim": 4, "latent_embed_dim": 8, "time_embed_dim": 8, "discriminator_channels": 8},
    ),
}
EVERY = tuple(SCRIPTS)
# By their arguments, since opening them takes longer than building a trainer.
DATA_SETS: dict[str, TrainingData] = {}


class Row(NamedTuple):
    """Set to `value`, beside `other` settings, an option gives `expected` where `look` looks.

    With its default, or with `usual`, it gives something else there.
    """

    option: str
    value: Any
    look: Callable[[Trainer], Any]
    expected: Any
    scripts: tuple[str, ...] = EVERY
    other: dict[str, Any] = {}
    usual: Any = None


def config_of(script: str, **changes):
    _, cls, tiny = SCRIPTS[script]
    return cls(**{**SHARED, **tiny, **changes})


def trainer_of(script: str, changes: dict[str, Any]) -> Trainer:
    module, config = SCRIPTS[script][0], config_of(script, **changes)
    config.validate()
    arguments = config.data_arguments()
    data = DATA_SETS[str(arguments)] = DATA_SETS.get(str(arguments)) or load_data(**arguments)
    config.settle(data.sample_shape)
    return module.build(config, Accelerator(cpu=True), data)


@pytest.fixture(scope="module")
def usual_trainer() -> Callable[[str, dict], Trainer]:
    """Trainers that rows share: a look leaves one as it was."""
    made: dict[str, Trainer] = {}

    def get(script: str, changes: dict[str, Any]) -> Trainer:
        key = f"{script} {changes}"
        made[key] = made.get(key) or trainer_of(script, changes)
        return made[key]

    return get


# --- where to look ---


def networks(trainer: Trainer) -> list[nn.Module]:
    return [player.network for player in trainer.objective.players]


def network(name: str) -> Callable[[Trainer], Any]:
    return lambda trainer: networks(trainer)[0].config[name]


def discriminator(name: str) -> Callable[[Trainer], Any]:
    return lambda trainer: networks(trainer)[1].discriminator.config[name]


def process(name: str) -> Callable[[Trainer], Any]:
    return lambda trainer: trainer.objective.scheduler.config[name]


def adam(look: Callable[[dict], Any]) -> Callable[[Trainer], Any]:
    return lambda trainer: {look(player.optimizer.param_groups[0]) for player in trainer.objective.players}


def rate(step: int) -> Callable[[Trainer], float]:
    """The learning rate of a step as a share of the highest."""

    def look(trainer: Trainer) -> float:
        player = trainer.objective.players[0]
        trainer.updater._set_learning_rate(player, step)
        return pytest.approx(player.optimizer.param_groups[0]["lr"] / player.learning_rate)

    return look


def events(name: str) -> Callable[[Trainer], list[int]]:
    """The steps at which something happens in a loop whose steps do nothing."""

    def look(trainer: Trainer) -> list[int]:
        seen = {name: [] for name in ("_report", "_save", "_evaluate", "draw")}
        with pytest.MonkeyPatch.context() as patch:
            for what in ("_report", "_save", "_evaluate"):
                patch.setattr(trainer, what, lambda *_, what=what: seen[what].append(trainer.step))
            patch.setattr(trainer.previews, "draw", lambda step, *_: seen["draw"].append(step))
            patch.setattr(trainer, "optimizer_step", lambda stream: None)
            patch.setattr(trainer, "step", 0)
            trainer._loop(SimpleNamespace(anywhere=lambda: False, before=lambda: False))
        return seen[name]

    return look


def preview(look: Callable[..., Any]) -> Callable[[Trainer], Any]:
    """What a grid is drawn with."""

    def asked(trainer: Trainer) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generative, "sample_grid", lambda *given: look(*given))
            return trainer.previews.preview(networks(trainer)[0])

    return asked


def measuring(name: str) -> Callable[[Trainer], Any]:
    return lambda trainer: trainer.evaluations.evaluators[0].given[name]


def workers(trainer: Trainer) -> int:
    def stream(order, start: int, total: int, workers: int):
        yield {"workers": torch.tensor(workers)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "data", SimpleNamespace(batches=stream))
        return int(next(trainer.batches())["workers"])


def is_channels_last(trainer: Trainer) -> bool:
    weights = [p for p in networks(trainer)[0].parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    batch = {"x_0": torch.zeros(2, 3, 4, 4)}
    seen = [*weights, trainer.in_layout(batch)["x_0"]]
    return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


def checkpoints_itself(module: nn.Module) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


DDPM, GAN, UNETS, SAMPLED = ("ddpm",), ("ddgan",), ("ddpm", "classifier"), ("ddpm", "ddgan")
TRANSFORMER = {"network": "transformer", "patch_size": 2}
LINEAR, CLASSES, FD = {"beta_schedule": "linear"}, {"class_conditional": True}, {"eval_metrics": ("fd",)}
COSINE = (1 + math.cos(math.pi * (75 - 5) / (100 - 5))) / 2
# The two networks of a game show what the loop, which all scripts share, does with its own options.
LOOP = GAN
BUILT = [
    # --- the run ---
    Row("output_dir", "elsewhere", lambda t: t.output_dir, Path("elsewhere"), LOOP),
    Row("seed", 5, lambda t: t.order.seed, 5, LOOP),
    Row("seed", 5, lambda t: t.draw(0).generators[0].initial_seed(), derive_seed(5, "step", 0, 0), LOOP),
    Row("preset", "fast", lambda t: t.global_batch, 64, LOOP),
    Row("preset", "fast", network("model_channels"), 32, UNETS),
    Row("max_train_steps", 7, lambda t: t.total_steps, 7, LOOP),
    Row("num_epochs", 3, lambda t: t.total_steps, 3 * 64 // 8, LOOP, {"max_train_steps": None}, usual=1),
    Row("train_batch_size", 16, lambda t: t.global_batch, 16, LOOP),
    Row("gradient_accumulation_steps", 4, lambda t: (t.global_batch, t.order.accumulation), (32, 4), LOOP),
    Row("dataloader_num_workers", 3, workers, 3, LOOP),
    # --- the optimizer: warm-up 5 and decay 30 of 100 steps, where nothing else is said ---
    Row("learning_rate", 0.5, lambda t: {player.learning_rate for player in t.objective.players}, {0.5}, LOOP),
    Row("discriminator_learning_rate", 0.5, lambda t: t.objective.players[1].learning_rate, 0.5, GAN),
    Row("lr_scheduler", "cosine", rate(75), COSINE, LOOP),
    Row("lr_warmup_steps", 10, rate(5), 0.5, LOOP),
    Row("lr_decay_steps", 50, rate(75), 0.5, LOOP),
    Row("lr_decay_ends", (40, 80, 60, 100), rate(80), 0.25, LOOP),
    Row("adam_beta1", 0.25, adam(lambda group: group["betas"][0]), {0.25}, LOOP),
    Row("adam_beta2", 0.75, adam(lambda group: group["betas"][1]), {0.75}, LOOP),
    Row("adam_weight_decay", 0.5, adam(lambda group: group["weight_decay"]), {0.5}, LOOP),
    Row("adam_epsilon", 0.5, adam(lambda group: group["eps"]), {0.5}, LOOP),
    Row("optimizer", "muon", lambda t: type(t.objective.players[0].optimizer.optimizer).__name__, "Muon", UNETS),
    # --- the average ---
    Row("use_ema", False, lambda t: t.shared.average is None, True, LOOP),
    Row("ema_max_decay", 0.5, lambda t: t.shared.average.decay, 0.5, LOOP),
    Row("ema_inv_gamma", 3.0, lambda t: t.shared.average.inv_gamma, 3.0, LOOP),
    Row("ema_power", 0.5, lambda t: t.shared.average.power, 0.5, LOOP),
    # --- speed and memory ---
    Row("gradient_checkpointing", True, lambda t: [checkpoints_itself(n) for n in networks(t)], [True], UNETS),
    Row("gradient_checkpointing", True, lambda t: [checkpoints_itself(n) for n in networks(t)], [True, True], GAN,
        {"r1_gamma": 0.0}),
    Row("torch_compile", True, lambda t: networks(t)[0]._compiled_call_impl is not None, True, LOOP),
    Row("compile_mode", "reduce-overhead", lambda t: t.updater.captures_graphs, True, LOOP, {"torch_compile": True}),
    Row("channels_last", True, is_channels_last, True, LOOP),
    # --- when something happens ---
    Row("logging_steps", 40, events("_report"), [40, 80, 100], LOOP),
    Row("sample_steps", 40, events("draw"), [40, 80], LOOP),
    Row("eval_steps", 40, events("_evaluate"), [40, 80], LOOP),
    Row("checkpointing_steps", 40, events("_save"), [40, 80, 100], LOOP),
    # --- what is drawn and measured ---
    Row("num_sample_images", 5, preview(lambda pipe, data, count, *_: count), 5, SAMPLED),
    Row("sampler", "ddpm", preview(lambda pipe, *_: type(pipe.scheduler).__name__), "LinearDDPMScheduler", DDPM),
    Row("ddpm_num_inference_steps", 3, preview(lambda *given: given[-1]["num_inference_steps"]), 3, DDPM),
    Row("guidance_scale", 3.0, preview(lambda *given: given[-1]["guidance_scale"]), 3.0, DDPM, CLASSES),
    Row("eval_split", "train[:50%]", lambda t: len(t.evaluations.evaluators), 1, other={"split": "train[50%:]"}),
    Row("eval_metrics", ("kd",), measuring("metrics"), ("kd",), SAMPLED, usual=("fd",)),
    Row("eval_num_images", 70, measuring("num_images"), 70, SAMPLED, FD),
    Row("eval_features", "trained", measuring("features"), "trained", SAMPLED, FD),
    Row("eval_batch_size", 3, measuring("batch_size"), 3, SAMPLED, FD),
    # --- the process ---
    Row("beta_schedule", "linear", process("beta_schedule"), "linear", UNETS),
    Row("beta_start", 0.01, process("beta_start"), 0.01, UNETS, LINEAR),
    Row("beta_end", 0.5, process("beta_end"), 0.5, UNETS, LINEAR),
    Row("ddpm_num_steps", 50, process("num_train_timesteps"), 50, UNETS),
    Row("rescale_betas_zero_snr", True, process("rescale_betas_zero_snr"), True, UNETS),
    Row("prediction_type", "epsilon", process("prediction_type"), "epsilon", DDPM),
    Row("variance_type", "fixed_large", process("variance_type"), "fixed_large", DDPM),
    Row("variance_type", "learned_range", network("out_channels"), 2, DDPM, {"objective": "vlb"}),
    Row("num_timesteps", 2, process("num_train_timesteps"), 2, GAN),
    Row("schedule", "geometric", process("schedule"), "geometric", GAN, {"beta_min": 0.01, "beta_max": 0.99}),
    Row("beta_min", 0.5, process("beta_min"), 0.5, GAN),
    Row("beta_max", 5.0, process("beta_max"), 5.0, GAN),
    # --- the networks ---
    Row("class_conditional", True, network("num_class_embeds"), 10, SAMPLED),
    Row("label_dropout", 0.0, network("null_class"), False, DDPM, CLASSES),
    Row("model_channels", 16, network("model_channels"), 16),
    Row("channel_mult", (1, 1), network("channel_mult"), (1, 1)),
    Row("num_res_blocks", 2, network("num_res_blocks"), 2),
    Row("dropout", 0.5, network("dropout"), 0.5),
    Row("patch_size", 2, network("patch_size"), 2, UNETS),
    Row("patch_size", 2, network("patch_size"), 2, GAN, {"resolution": 16}),
    Row("attention_resolutions", (1, 2), network("attention_resolutions"), (1, 2), UNETS),
    Row("num_head_channels", 4, network("num_head_channels"), 4, UNETS),
    Row("norm_num_groups", 2, network("norm_num_groups"), 2, UNETS),
    Row("resblock_updown", True, network("resblock_updown"), True, DDPM),
    Row("network", "transformer", lambda t: type(networks(t)[0]).__name__, "PixelTransformer2DModel", DDPM),
    Row("hidden_size", 16, network("hidden_size"), 16, DDPM, TRANSFORMER),
    Row("num_layers", 1, network("num_layers"), 1, DDPM, TRANSFORMER),
    Row("bottleneck", 2, network("bottleneck"), 2, DDPM, TRANSFORMER),
    Row("augment_probability", 0.5, network("augment_dim"), 9, DDPM),
    Row("pool", "spatial", network("pool"), "spatial", ("classifier",)),
    Row("random_crop", 0.5, lambda t: t.objective.random_crop, 0.5, ("classifier",)),
    Row("attention_sizes", (8,), network("attention_sizes"), (8,), GAN),
    Row("latent_dim", 5, network("latent_dim"), 5, GAN),
    Row("latent_embed_dim", 16, network("latent_embed_dim"), 16, GAN),
    Row("num_latent_layers", 1, network("num_latent_layers"), 1, GAN),
    Row("discriminator", "large", discriminator("variant"), "large", GAN, {"resolution": 64}),
    Row("discriminator_channels", 16, discriminator("base_channels"), 16, GAN),
    Row("time_embed_dim", 16, discriminator("time_embed_dim"), 16, GAN),
    Row("discriminator_patch_size", 2, discriminator("patch_size"), 2, GAN, {"resolution": 16}),
    Row("spectral_norm", True, lambda t: "parametrizations" in str(networks(t)[1].state_dict().keys()), True, GAN),
]  # fmt: skip

DATA, DENOISING = "data/test_{}.py::test_", "losses/test_denoising.py::test_"
GAME = "losses/test_adversarial_game.py::"
PINNED = {
    "split": DATA.format("listing") + "every_way_in_honours_slices_and_refuses_unknown_splits_streamed_or_not",
    "dataset_name": DATA.format("images") + "fashion_mnist_keeps_its_names_size_and_channel",
    "train_data_dir": DATA.format("images") + "sub_folders_are_classes_even_when_one_is_called_train",
    "image_column": DATA.format("images")
    + "columns_are_found_by_type_and_wrong_names_are_answered_with_the_right_one",
    "label_column": DATA.format("images") + "several_label_columns_are_a_choice_to_make",
    "max_train_samples": DATA.format("images") + "a_limited_set_shows_every_class_of_a_sorted_one",
    "resolution": DATA.format("decoding") + "resizing_keeps_the_aspect_and_crops_the_middle",
    "center_crop": DATA.format("decoding") + "a_random_crop_is_a_function_of_seed_epoch_and_index",
    "channels": DATA.format("decoding") + "alpha_is_kept_by_four_channels_and_made_opaque_where_absent",
    "background": DATA.format("decoding") + "the_colour_below_transparency_never_reaches_the_network",
    "max_bad_images": DATA.format("decoding") + "corrupt_images_beyond_the_limit_stop_the_run_and_are_named",
    "random_flip": DATA.format("batches") + "the_flip_of_an_image_depends_on_seed_epoch_and_index_alone",
    "streaming": DATA.format("streaming") + "a_stream_has_the_attributes_of_the_set_and_every_image_once_in_an_epoch",
    "vae": DATA.format("latents") + "every_kind_of_autoencoder_gives_latents_that_it_decodes",
    "vae_posterior": DATA.format("latents")
    + "means_are_kept_to_half_precision_and_samples_have_the_posteriors_deviation",
    "label_dropout": DENOISING + "labels_are_dropped_below_the_share_in_training_and_never_in_evaluation",
    "timestep_sampling": DENOISING + "the_levels_of_a_batch_are_spread_as_asked",
    "objective": DENOISING + "the_bound_and_the_hybrid_are_trained_where_they_are_asked_for",
    "vlb_weight": DENOISING + "the_bound_and_the_hybrid_are_trained_where_they_are_asked_for",
    "loss_weighting": DENOISING + "the_weights_of_the_timesteps_are_those_of_their_papers",
    "level_distribution": DENOISING + "logit_normal_timesteps_have_their_density_in_training_and_not_in_evaluation",
    "logit_mean": DENOISING + "logit_normal_timesteps_have_their_density_in_training_and_not_in_evaluation",
    "logit_std": DENOISING + "logit_normal_timesteps_have_their_density_in_training_and_not_in_evaluation",
    "min_snr_gamma": DENOISING + "the_weights_of_the_timesteps_are_those_of_their_papers",
    "p2_gamma": DENOISING + "the_weights_of_the_timesteps_are_those_of_their_papers",
    "p2_k": DENOISING + "the_weights_of_the_timesteps_are_those_of_their_papers",
    "generator_objective": GAME + "test_the_saturating_loss_is_the_other_side_of_the_discriminators",
    "r1_gamma": GAME + "test_r1_acts_at_its_interval_with_its_weight",
    "r1_interval": GAME + "test_r1_acts_at_its_interval_with_its_weight",
    "r1_times_interval": GAME + "test_r1_acts_at_its_interval_with_its_weight",
    "wgan_gp": GAME + "test_the_gradient_penalty_is_taken_between_real_and_generated",
    "l1_weight": GAME + "test_the_distance_to_the_data_is_that_of_the_prediction_of_x_0",
    "n_critic": GAME + "test_the_generator_plays_at_its_interval_after_the_warm_up",
    "discriminator_warmup_steps": GAME + "test_the_generator_plays_at_its_interval_after_the_warm_up",
    "discriminator_full_precision": "training/test_train_ddgan.py::"
    "test_the_discriminator_computes_in_full_precision_under_autocast_where_asked",
    "init_from": "training/test_train_ddgan.py::"
    "test_a_run_starts_from_a_denoiser_and_its_result_is_a_start_in_its_turn",
    "max_grad_norm": "loop/test_update.py::test_the_gradient_is_clipped_to_the_norm_and_the_log_has_the_norm_before",
    "max_nonfinite_steps": "training/test_train_ddpm.py::test_training_stops_when_no_step_is_finite_any_more",
    "ema_max_decays": "training/test_choosing_averages.py::test_the_best_average_is_the_model_and_all_are_told",
    "ema_metric": "training/test_choosing_averages.py::test_the_best_average_is_the_model_and_all_are_told",
    "best_metric": "training/test_evaluating_while_training.py::"
    "test_a_later_worse_model_does_not_replace_the_best_one",
    "overwrite_output_dir": "training/test_evaluating_while_training.py::"
    "test_the_best_value_so_far_is_remembered_by_a_resumed_run",
    "dry_run": "training/test_train_ddpm.py::"
    "test_dry_run_shows_settings_sizes_and_the_data_without_training",
    "checkpoints_total_limit": "training/test_train_ddpm.py::"
    "test_the_history_of_importance_sampling_survives_an_interruption",
    "resume_from_checkpoint": "training/test_train_ddpm.py::"
    "test_a_run_that_is_interrupted_three_times_ends_with_the_very_weights_of_an_uninterrupted_one",
    "push_to_hub": "training/test_sharing.py::test_a_run_pushes_private_weights_card_and_code_and_no_state",
    "hub_model_id": "training/test_sharing.py::test_a_run_pushes_private_weights_card_and_code_and_no_state",
    "hub_strategy": "training/test_sharing.py::test_a_run_pushes_private_weights_card_and_code_and_no_state",
    "hub_license": "training/test_sharing.py::"
    "test_both_forms_of_use_on_a_pushed_card_work_as_pasted_into_a_new_process",
    # In this file, below.
    "divergence": "training/test_every_setting.py::test_both_networks_play_for_the_divergence",
    "mixed_precision": "training/test_every_setting.py::test_the_start_takes_precision_and_trackers_from_the_settings",
    "allow_tf32": "training/test_every_setting.py::test_the_start_takes_precision_and_trackers_from_the_settings",
    "report_to": "training/test_every_setting.py::test_the_start_takes_precision_and_trackers_from_the_settings",
    "preset": "loop/test_start.py::test_a_preset_stands_below_what_is_given",
    "data": "commands/test_train.py::test_data_names_a_path_before_a_name",
    "max_train_minutes": "loop/test_planning.py::test_max_train_minutes_gives_the_run_that_its_config_repeats",
    "traceback": "training/test_every_setting.py::test_a_traceback_is_shown_where_it_is_asked_for",
    "hub_public": "training/test_every_setting.py::test_a_repository_is_private_unless_it_is_to_be_public",
    "cache_dir": "training/test_every_setting.py::test_the_hub_is_asked_for_a_configuration_into_a_cache",
    "dataset_config_name": "training/test_every_setting.py::test_the_hub_is_asked_for_a_configuration_into_a_cache",
}  # fmt: skip


@pytest.mark.parametrize("script", EVERY)
def test_every_option_is_looked_at_or_has_a_test_of_its_own(script):
    known = {row.option for row in BUILT if script in row.scripts or row.option in settings(TrainingConfig)}
    known |= set(PINNED)

    assert set(settings(SCRIPTS[script][1])) - known == set()


def test_the_tests_that_are_named_are_there_and_speak_of_their_option():
    texts = {file: (TESTS / file).read_text() for file in {name.split("::")[0] for name in PINNED.values()}}
    for option, name in PINNED.items():
        file, test = name.split("::")
        assert f"\ndef {test}(" in texts[file] and option in texts[file], (option, name)


@pytest.mark.parametrize("row", BUILT, ids=[f"{row.option}-{i}" for i, row in enumerate(BUILT)])
def test_an_option_acts_where_it_should(row, usual_trainer, tmp_path, monkeypatch):
    class Recorder:
        keys = ()

        def __init__(self, accelerator, metrics, *_, **given):
            self.given = {"metrics": metrics, **given}

        def prepare(self):
            self.keys = ("fd",)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generative, "SampleEvaluator", Recorder)
    # What trainers of former tests share was reset after them.
    Accelerator(cpu=True)
    for script in row.scripts:
        before = row.other | ({} if row.usual is None else {row.option: row.usual})
        usual = row.look(usual_trainer(script, before))
        changed = row.look(trainer_of(script, {**row.other, row.option: row.value}))
        assert changed == row.expected and usual != row.expected, (script, usual, changed)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_networks_play_for_the_divergence(divergence, monkeypatch):
    trainer = trainer_of("ddgan", {"divergence": divergence, "r1_gamma": 0.0})
    game, batch, value = trainer.objective, next(trainer.batches()), torch.linspace(-1.0, 2.0, 8)
    monkeypatch.setattr(adversarial_game, "discriminate", lambda net, x, *_: value if x is x_t else value + 0.5)
    x_t = batch["x_0"]
    half = game.critic.network(x_t, -x_t, torch.zeros(8, dtype=torch.long), x_t, None, 0.0, None)
    torch.testing.assert_close(half["loss"], real_loss(divergence, value) + fake_loss(divergence, value + 0.5))
    other = game.generator_values(game.generator.network, batch, trainer.draw(0))
    torch.testing.assert_close(other["loss"], generator_loss(divergence, value + 0.5))


def test_the_start_takes_precision_and_trackers_from_the_settings(tmp_path):
    usual = start(config_of("ddpm", output_dir=str(tmp_path / "usual")))
    assert (usual.mixed_precision, usual.log_with, torch.backends.cuda.matmul.allow_tf32) == ("no", [], False)
    assert torch.backends.cuda.flash_sdp_enabled()
    usual.free_memory()
    Accelerator().state._reset_state(reset_partial_state=True)
    changes = {"mixed_precision": "bf16", "report_to": ("tensorboard",), "allow_tf32": True}
    changed = start(config_of("ddpm", output_dir=str(tmp_path / "changed"), **changes))
    try:
        assert changed.mixed_precision == "bf16" and [str(t) for t in changed.log_with] == ["tensorboard"]
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        # in bfloat16 a CPU is faster by plain products
        assert torch.backends.cuda.flash_sdp_enabled() == (changed.device.type != "cpu")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.mark.parametrize("script", EVERY)
def test_a_traceback_is_shown_where_it_is_asked_for(script, tmp_path):
    words = ["--train_data_dir", "/nowhere", "--max_train_steps", "1", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="/nowhere"):
        SCRIPTS[script][0].main(words)
    with pytest.raises((ValueError, OSError), match="/nowhere"):
        SCRIPTS[script][0].main([*words, "--traceback"])


def test_a_repository_is_private_unless_it_is_to_be_public(monkeypatch):
    asked = []
    monkeypatch.setattr(sharing, "check_write_access", lambda name, private: asked.append(private) or f"me/{name}")
    for is_public in (False, True):
        sharing.prepare_sharing(config_of("ddpm", output_dir="runs/x", push_to_hub=True, hub_public=is_public))
    assert asked == [True, False]


def test_the_hub_is_asked_for_a_configuration_into_a_cache(monkeypatch):
    asked = []

    def load_dataset(name, config, cache_dir, **_):
        asked.append((name, config, cache_dir))
        raise ValueError("enough")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = config_of("ddpm", dataset_name="me/it", dataset_config_name="small", cache_dir="there")
    with pytest.raises(ValueError, match="enough"):
        load_data(**config.data_arguments())
    assert asked == [("me/it", "small", "there")]
