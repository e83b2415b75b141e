"""Replay of whole training runs of the DDGAN reference: two networks, two optimizers, R1, average, decay, checkpoints."""

from types import SimpleNamespace

import torch
from torch import Tensor

from hf_diffusion.losses.adversarial import fake_loss, generator_loss, r1_penalty, r1_weight, real_loss
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from tests.golden.replays_ddgan import Case, decayed, exponential_average, toy_modules


class TrainReplay:
    """The reference's training loop with our scheduler, losses and penalty, on the draws of the golden."""

    def __init__(self, case: Case):
        self.case, self.settings, s = case, case.settings, SimpleNamespace(**case.settings)
        self.scheduler = DDGANScheduler(s.T, s.bmin, s.bmax, "geometric" if s.geo else "vp")
        toys = toy_modules(case)
        self.generator, self.critic = toys["TinyG"](s.C, s.nz), toys["TinyD"](s.C)
        self.generator.load_state_dict(case.named("G_init__"))
        self.critic.load_state_dict(case.named("D_init__"))
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=s.lr_g, betas=(0.5, 0.9))
        self.optimizer_d = torch.optim.Adam(self.critic.parameters(), lr=s.lr_d, betas=(0.5, 0.9))
        self.average = exponential_average(self.generator.parameters(), s.ema_decay) if s.use_ema else None

    def check(self, step: int, name: str, actual) -> None:
        tighter = {}
        if step == 0:
            kind = (
                "grads"
                if name.startswith("grad_")
                else "it0 logits/losses"
                if name[:3] in ("D_r", "D_f", "G_f", "err")
                else ""
            )
            tighter = self.case.exception(kind)
        self.case.check(f"it{step}__{name}", actual, **tighter)

    def pairs(self, step: int, half: str, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, noise_tp1, noise_t = (self.case[f"it{step}__{half}_{n}"] for n in ("t", "noise_tp1", "noise_t"))
        return t, *self.scheduler.q_sample_pairs(x_0, t, noise_t, noise_tp1)

    def fake(self, step: int, half: str, t: Tensor, x_tp1: Tensor) -> Tensor:
        x_0 = self.generator(x_tp1, t, self.case[f"it{step}__{half}_z"])
        return self.scheduler.sample_posterior(x_0, x_tp1, t, self.case[f"it{step}__{half}_noise_post"])

    def update(self, step: int, network: str, optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> None:
        self.check(step, f"lr_{network}", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))
        optimizer.step()
        for name, parameter in module.named_parameters():
            self.check(step, f"grad_{network}__{name}", parameter.grad)
            self.check(step, f"{network}__{name}", parameter)

    def train_critic(self, step: int, x_0: Tensor) -> None:
        self.critic.zero_grad()
        t, x_t, x_tp1 = self.pairs(step, "d", x_0)
        real = self.critic(x_t.requires_grad_(), t, x_tp1).view(-1)
        with torch.no_grad():
            x_fake = self.fake(step, "d", t, x_tp1)
        fake = self.critic(x_fake, t, x_tp1).view(-1)
        on_real, on_fake = real_loss("js", real).mean(), fake_loss("js", fake).mean()
        loss = on_real + on_fake
        if gamma := r1_weight(self.settings["r1_gamma"], step, self.settings["lazy_reg"]):
            loss = loss + r1_penalty(real, x_t, gamma).mean()
        loss.backward()
        for name, value in {"D_real": real, "D_fake": fake, "errD_real": on_real, "errD_fake": on_fake}.items():
            self.check(step, name, value)
        self.update(step, "D", self.optimizer_d, self.critic)

    def train_generator(self, step: int, x_0: Tensor) -> None:
        self.generator.zero_grad()
        t, _, x_tp1 = self.pairs(step, "g", x_0)
        fake = self.critic(self.fake(step, "g", t, x_tp1), t, x_tp1).view(-1)
        loss = generator_loss("js", fake).mean()
        loss.backward()
        self.check(step, "G_fake", fake)
        self.check(step, "errG", loss)
        self.update(step, "G", self.optimizer_g, self.generator)
        if self.average is not None:
            self.average.step(self.generator.parameters())
            self.check_weights(f"it{step}__ema__")

    def check_weights(self, prefix: str) -> None:
        values = self.average.shadow_params if self.average is not None else self.generator.parameters()
        for (name, _), value in zip(self.generator.named_parameters(), values, strict=True):
            self.case.check(f"{prefix}{name}", value)

    def run(self) -> None:
        step, s = 0, SimpleNamespace(**self.settings)
        assert list(self.case["batches"].shape) == [s.iters, s.B, s.C, s.S, s.S]
        for epoch in range(s.num_epoch + 1):
            if not s.no_lr_decay:
                for optimizer, lr in ((self.optimizer_g, s.lr_g), (self.optimizer_d, s.lr_d)):
                    optimizer.param_groups[0]["lr"] = decayed(lr, epoch, s.num_epoch)
            for x_0 in self.case["batches"]:
                self.train_critic(step, x_0)
                self.train_generator(step, x_0)
                step += 1
            self.check_weights(f"ep{epoch}__ckpt_netG__")
            self.replay_preview(epoch)

    def replay_preview(self, epoch: int) -> None:
        """The golden holds the draws of the epoch's samples but not the samples: they must fit the loop, T at a time."""
        s = self.settings
        assert self.case[f"ep{epoch}__sample_x_init"].shape[1:] == (s["C"], s["S"], s["S"])
        x = self.case[f"ep{epoch}__sample_x_init"]
        with torch.no_grad():
            for j, t in enumerate(self.scheduler.timesteps):
                latent, noise = self.case[f"ep{epoch}__sample_z{j}"], self.case[f"ep{epoch}__sample_noise{j}"]
                x = self.scheduler.step(
                    self.generator(x, t.expand(len(x)), latent), t, x, variance_noise=noise
                ).prev_sample
        assert bool(x.isfinite().all()) and float(x.abs().max()) <= 1 + 1e-6  # the toy generator ends in tanh
