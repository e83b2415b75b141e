"""Replay of whole training runs of the DDGAN reference by the package's own game and step.

What is compared: values of the discriminator, losses, gradients, learning rates, both networks
after every update, the average, and the weights of each epoch. `AdversarialGame` says who sees
what, `Updater` is the loop's optimizer step; the replay only hands them the recorded random
numbers.
"""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.averages import SharedNetwork
from hf_diffusion.loop.reporting import Progress, RunningMeans
from hf_diffusion.loop.update import Updater, prepare_player
from hf_diffusion.losses.adversarial import fake_loss, generator_loss, real_loss
from hf_diffusion.losses.adversarial_game import AdversarialGame, AdversarialOptions
from hf_diffusion.losses.objective import Player
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from tests.golden.replay import Case
from tests.golden.replays_ddgan import decayed, toy_modules
from tests.losses.scripted import ScriptedDraw


# the names of a half step's Gaussian draws, in the order in which the reference draws them
NORMALS = ("noise_tp1", "noise_t", "z", "noise_post")


def recorded_draw(case: Case, step: int, num_timesteps: int) -> ScriptedDraw:
    """The recorded numbers of one step, the discriminator's half first, then the generator's.

    Levels lie in the middle of the recorded timesteps.
    """
    halves = [f"it{step}__{half}_" for half in ("d", "g")]
    levels = [(case[f"{half}t"].double() + 0.5) / num_timesteps for half in halves]
    return ScriptedDraw(levels, [case[f"{half}{name}"] for half in halves for name in NORMALS])


class ToyNetwork(nn.Module):
    """A toy network of the manifest with the call of ours."""

    def __init__(self, network: nn.Module, state: dict[str, Tensor], **config):
        super().__init__()
        network.load_state_dict(state)
        self.network, self.config = network, SimpleNamespace(num_class_embeds=None, **config)

    def forward(self, x: Tensor, t: Tensor, other: Tensor, labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
        assert labels is None and not return_dict
        return (self.network(x, t, other),)


class ToyCritic(ToyNetwork):
    """Notes the values (B,) that it gives."""

    def forward(self, *args, **options) -> tuple[Tensor]:
        (values,) = super().forward(*args, **options)
        self.values.append(values.view(-1))
        return (values.view(-1),)


class TrainReplay:
    """One run of the game and the loop's step on the golden's toy networks, batches and draws."""

    def __init__(self, case: Case):
        self.case, self.s, s = case, SimpleNamespace(**case.settings), SimpleNamespace(**case.settings)
        self.scheduler = DDGANScheduler(s.T, s.bmin, s.bmax, "geometric" if s.geo else "vp")
        toys = toy_modules(case)
        self.toy_generator = ToyNetwork(toys["TinyG"](s.C, s.nz), case.named("G_init__"), latent_dim=s.nz)
        self.toy_critic = ToyCritic(toys["TinyD"](s.C), case.named("D_init__"))
        self.toy_critic.values = []
        options = AdversarialOptions(
            divergence="js", r1_gamma=s.r1_gamma, r1_interval=s.lazy_reg or 1, r1_times_interval=False
        )
        rates = (s.lr_g, s.lr_d)
        self.game = AdversarialGame(self.scheduler, self.toy_generator, self.toy_critic, options, rates)
        accelerator = Accelerator(cpu=True)
        config = TrainingConfig(
            max_train_steps=s.iters * (s.num_epoch + 1),
            train_batch_size=s.B,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            adam_beta1=0.5,
            adam_beta2=0.9,
            max_grad_norm=None,
            use_ema=s.use_ema,
            ema_max_decay=s.ema_decay,
            # no warm-up: the reference averages with its decay from the second update on
            ema_inv_gamma=1e-30,
        )
        for player in self.game.players:
            prepare_player(config, accelerator, player)
            self.check_updates_of(player)
        self.shared = SharedNetwork(config, accelerator, self.game.generator.network)
        means = RunningMeans(accelerator.device)
        total = config.max_train_steps
        self.updater = Updater(config, accelerator, self.game, self.shared, means, Progress(accelerator), total)
        self.step = 0

    def check(self, name: str, actual) -> None:
        """Compare with what the reference had in this step.

        The first is held to a tighter tolerance.
        """
        tighter = {}
        if self.step == 0 and name.startswith("grad_"):
            tighter = self.case.exception("grads")
        elif self.step == 0 and name[:3] in ("D_r", "D_f", "G_f", "err"):
            tighter = self.case.exception("it0 logits/losses")
        self.case.check(f"it{self.step}__{name}", actual, **tighter)

    def check_updates_of(self, player: Player) -> None:
        """Look at the player's gradients as its optimizer steps, and at its weights afterwards."""
        letter = player.suffix[-1].upper()
        network = {"G": self.toy_generator, "D": self.toy_critic}[letter].network

        def before(optimizer, args, kwargs) -> None:
            self.check_values(letter)
            self.check(f"lr_{letter}", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))
            for name, parameter in network.named_parameters():
                self.check(f"grad_{letter}__{name}", parameter.grad)

        def after(optimizer, args, kwargs) -> None:
            for name, parameter in network.named_parameters():
                self.check(f"{letter}__{name}", parameter)

        player.optimizer.optimizer.register_step_pre_hook(before)
        player.optimizer.optimizer.register_step_post_hook(after)

    def check_values(self, letter: str) -> None:
        """The values that the discriminator has given in this half step, and the losses of them."""
        values, self.toy_critic.values = self.toy_critic.values, []
        if letter == "G":
            (fake,) = values
            self.check("G_fake", fake)
            self.check("errG", generator_loss("js", fake).mean())
        else:
            real, fake = values
            self.check("D_real", real)
            self.check("D_fake", fake)
            self.check("errD_real", real_loss("js", real).mean())
            self.check("errD_fake", fake_loss("js", fake).mean())

    def check_shared(self, prefix: str) -> None:
        """The weights that users get: the average where there is one."""
        average = self.shared.average
        values = self.toy_generator.parameters() if average is None else average.shadow_params
        for (name, _), value in zip(self.toy_generator.network.named_parameters(), values, strict=True):
            self.case.check(f"{prefix}{name}", value)

    def run(self) -> None:
        s = self.s
        assert list(self.case["batches"].shape) == [s.iters, s.B, s.C, s.S, s.S]
        for epoch in range(s.num_epoch + 1):
            if not s.no_lr_decay:
                self.game.generator.learning_rate = decayed(s.lr_g, epoch, s.num_epoch)
                self.game.critic.learning_rate = decayed(s.lr_d, epoch, s.num_epoch)
            for x_0 in self.case["batches"]:
                draw = recorded_draw(self.case, self.step, s.T)
                self.updater.step(self.step, [(0, {"x_0": x_0, "indices": torch.arange(s.B)}, draw)])
                draw.assert_empty()
                assert draw.spreads == [None, None], "the reference draws timesteps independently"
                if self.shared.average is not None:
                    self.check_shared(f"it{self.step}__ema__")
                self.step += 1
            self.check_shared(f"ep{epoch}__ckpt_netG__")
            self.replay_preview(epoch)
        self.updater.settle()
        assert self.updater.skips.count == 0

    def replay_preview(self, epoch: int) -> None:
        """The golden holds the draws of the epoch's samples but not the samples.

        They must fit the loop.
        """
        x, s = self.case[f"ep{epoch}__sample_x_init"], self.s
        assert x.shape[1:] == (s.C, s.S, s.S)
        with torch.no_grad():
            for j, t in enumerate(self.scheduler.timesteps):
                latent, noise = self.case[f"ep{epoch}__sample_z{j}"], self.case[f"ep{epoch}__sample_noise{j}"]
                x_0 = self.toy_generator.network(x, t.expand(len(x)), latent)
                x = self.scheduler.step(x_0, t, x, variance_noise=noise).prev_sample
        # the toy generator ends in tanh
        assert bool(x.isfinite().all()) and float(x.abs().max()) <= 1 + 1e-6


REPLAYS = {"training run": lambda case: TrainReplay(case).run()}
