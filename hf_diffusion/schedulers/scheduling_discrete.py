"""D3PM: diffusion of categories (Austin et al. 2021, arXiv:2107.03006).

There are T + 1 noise levels, 0 (clean data) to T. The timestep t in 0..T-1 names the level t + 1,
so that t = 0 is the least noise and -1 is clean data. `s` is an earlier timestep than t; where it
is left out it is t - 1.

Shapes: B samples of shape (...), K categories. Categories are int64 (B, ...), distributions and
logits (B, ..., K), timesteps int64 (B,). Matrices have a row for each category that is left, so
that rows sum to 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor


Generators = torch.Generator | list[torch.Generator] | None
TRANSITION_TYPES = ("uniform", "absorbing", "gaussian", "absorbing_gaussian", "band_diagonal", "nearest_neighbor")
BETA_SCHEDULES = ("cosine", "linear", "jsd", "mutual_information")
GAUSSIAN_VARIANTS = ("paper", "images_code", "text_code")
# The lowest argument of a logarithm. A product of two such probabilities has a finite logarithm.
TINY = torch.finfo(torch.float32).tiny
# Of the eigenvalues of rates, which are sums of numbers near 1: what float64 makes of 0.
ZERO_RATE = 1e-12
# Larger tables of cumulative matrices are kept in float32, after a product in float64.
FLOAT64_TABLE_BYTES = 2**27


@dataclass
class D3PMSchedulerOutput(BaseOutput):
    """The categories at the next timestep, and the logits of x_0 that led to them."""

    prev_sample: Tensor
    pred_original_logits: Tensor | None = None


def broadcast(values: Tensor, dims: int) -> Tensor:
    """Values (B,) as (B, 1, ...) of `dims` dimensions."""
    return values.reshape(-1, *(1,) * (dims - 1))


def safe_log(p: Tensor, eps: float = 0.0) -> Tensor:
    """log(p + eps), finite for p = 0."""
    return (p + eps).clamp(min=TINY).log()


def gumbel_argmax(logits: Tensor, uniform: Tensor) -> Tensor:
    """A draw (...) from the softmax of logits (..., K) by uniform numbers (..., K) in [0, 1].

    It is exact in the precision of `uniform`. Numbers of float32 have 24 bits, so that Gumbel noise
    ends at 16.6 and categories rarer than exp(-16.6) are hardly drawn: give float64.
    """
    return (logits - (-uniform.clamp(min=TINY).log()).log()).argmax(dim=-1)


def uniform_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Numbers float64 in [0, 1) on a device; with a list, each generator draws one row."""
    if isinstance(generator, list):
        rows = [torch.rand(shape[1:], generator=g, dtype=torch.float64, device=g.device) for g in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=source).to(device)


class Kernel:
    """q of one kind of noise, at levels n int64 (B,) from 0 (clean) to T."""

    def on(self, name: str, device: torch.device) -> Tensor:
        """The table of this name on a device, copied there once."""
        copies: dict[tuple[str, torch.device], Tensor] = vars(self).setdefault("_copies", {})
        if (name, device) not in copies:
            copies[name, device] = getattr(self, name).to(device)
        return copies[name, device]

    def rows(self, x: Tensor, n: Tensor) -> Tensor:
        """q(x_n | x_0 = x) (B, ..., K) for categories x (B, ...)."""
        raise NotImplementedError

    def push(self, p: Tensor, n: Tensor) -> Tensor:
        """sum over x_0 of q(x_n | x_0) p(x_0), for p (B, ..., K); linear in p."""
        raise NotImplementedError

    def columns(self, x: Tensor, n: Tensor, m: Tensor | None = None) -> Tensor:
        """q(x_n = x | x_m) (B, ..., K) over x_m, at an earlier level m; None is n - 1."""
        raise NotImplementedError

    def likelihood(self, x: Tensor, n: Tensor) -> Tensor:
        """q(x_n = x | x_0) (B, ..., K) over x_0."""
        return self.columns(x, n, torch.zeros_like(n))

    def draw(self, x: Tensor, uniform: Tensor, n: Tensor) -> Tensor:
        """x_n from q(x_n | x_0 = x) by one uniform number for each value, (B, ...)."""
        cumulative = self.rows(x, n).cumsum(dim=-1)
        # the last entry may be less than 1 by rounding
        return (uniform.to(cumulative)[..., None] >= cumulative[..., :-1]).sum(dim=-1)


class MixingKernel(Kernel):
    """Each step forgets with probability beta_t, and draws from pi: Q = (1 - beta) I + beta 1 pi^T.

    All its products have this form, so that no matrix is ever made.
    """

    def __init__(self, betas: Tensor, stationary: Tensor):
        self.kept, self.stationary = cumulative_kept(betas), stationary

    def rows(self, x: Tensor, n: Tensor) -> Tensor:
        return self.push(F.one_hot(x, len(self.stationary)).double(), n)

    def push(self, p: Tensor, n: Tensor) -> Tensor:
        kept = broadcast(self.on("kept", p.device)[n], p.ndim).to(p)
        return kept * p + (1 - kept) * p.sum(dim=-1, keepdim=True) * self.on("stationary", p.device).to(p)

    def columns(self, x: Tensor, n: Tensor, m: Tensor | None = None) -> Tensor:
        kept = broadcast(kept_between(self.on("kept", x.device), n, m), x.ndim + 1)
        stationary = self.on("stationary", x.device)
        return kept * F.one_hot(x, len(stationary)).double() + (1 - kept) * stationary[x][..., None]

    def draw(self, x: Tensor, uniform: Tensor, n: Tensor) -> Tensor:
        kept, u = broadcast(self.on("kept", x.device)[n], x.ndim), uniform.double()
        # given that it is not kept, (u - kept) / (1 - kept) is uniform again
        fresh = ((u - kept) / (1 - kept).clamp(min=TINY)).clamp(0, 1 - 1e-16)
        drawn = torch.searchsorted(self.on("stationary", x.device).cumsum(0), fresh, right=True)
        return torch.where(u < kept, x, drawn.clamp(max=len(self.stationary) - 1))


class SpectralKernel(Kernel):
    """Steps that commute: Q_n = V diag(f_n) W with the same eigenvectors at every level.

    symmetric: (K, K), whose eigenvalues the steps share. `factors` turns eigenvalues (K,) into
    their cumulative factors (T + 1, K). Q is D^-1/2 f(symmetric) D^1/2 for `weights` D (K,).
    """

    def __init__(self, symmetric: Tensor, factors: Callable[[Tensor], Tensor], weights: Tensor | None = None):
        eigenvalues, vectors = torch.linalg.eigh(symmetric)
        root = torch.ones_like(eigenvalues) if weights is None else weights.sqrt()
        self.factors = factors(eigenvalues)
        self.left, self.right = vectors / root[:, None], vectors.T * root

    def rows(self, x: Tensor, n: Tensor) -> Tensor:
        factors = broadcast_rows(self.on("factors", x.device)[n], x.ndim + 1)
        return ((self.on("left", x.device)[x] * factors) @ self.on("right", x.device)).clamp(min=0)

    def push(self, p: Tensor, n: Tensor) -> Tensor:
        factors = broadcast_rows(self.on("factors", p.device)[n], p.ndim)
        pushed = ((p.double() @ self.on("left", p.device)) * factors) @ self.on("right", p.device)
        return pushed.clamp(min=0).to(p)

    def columns(self, x: Tensor, n: Tensor, m: Tensor | None = None) -> Tensor:
        factors = broadcast_rows(kept_between(self.on("factors", x.device), n, m), x.ndim + 1)
        return ((self.on("right", x.device).T[x] * factors) @ self.on("left", x.device).T).clamp(min=0)


class GaussianKernel(Kernel):
    """Discretised Gaussian steps, which depend on |i - j| but for the diagonal.

    One step is T x K numbers, made at once. The cumulative matrices have no closed form; they are
    made when they are first needed, in float64, and kept in float32 beyond 128 MiB.
    """

    def __init__(self, betas: Tensor, num_classes: int, variant: str = "paper", bands: int | None = None):
        last = num_classes - 1
        span = {"paper": last, "images_code": 255, "text_code": num_classes}[variant]
        values = torch.arange(num_classes, dtype=torch.float64) / last * span * 2 / last
        exponents = -(values**2) / betas[:, None]
        if bands is not None:
            exponents[:, bands + 1 :] = -math.inf
        both_sides = torch.cat([exponents, exponents[:, 1:]], dim=1)
        # (T, K), by |i - j|
        self.by_distance = (exponents - both_sides.logsumexp(dim=1, keepdim=True)).exp()
        self.by_distance[:, 0] = 0
        places = torch.arange(num_classes)
        self.distance = (places[:, None] - places).abs()
        # category i has i lower and K - 1 - i higher ones
        ends = self.by_distance.cumsum(dim=1)
        self.diagonal = 1 - ends - ends.flip(1)
        self._cumulative: Tensor | None = None
        self._between: dict[tuple[int, int], Tensor] = {}

    def one_step(self, n: int) -> Tensor:
        """The matrix (K, K) of the step from level n - 1 to n."""
        return self.by_distance[n - 1][self.distance] + self.diagonal[n - 1].diag()

    @property
    def cumulative(self) -> Tensor:
        """The matrices (T + 1, K, K) from clean data to each level."""
        if self._cumulative is None:
            steps, classes = self.by_distance.shape
            matrix = torch.eye(classes, dtype=torch.float64)
            is_large = 8 * (steps + 1) * classes**2 > FLOAT64_TABLE_BYTES
            table = torch.empty(steps + 1, classes, classes, dtype=torch.float32 if is_large else torch.float64)
            table[0] = matrix
            for n in range(1, steps + 1):
                matrix = matrix @ self.one_step(n)
                table[n] = matrix
            self._cumulative = table
        return self._cumulative

    def between(self, m: int, n: int) -> Tensor:
        """The matrix (K, K) from level m to level n."""
        if (m, n) not in self._between:
            matrix = torch.eye(len(self.distance), dtype=torch.float64)
            for level in range(m + 1, n + 1):
                matrix = matrix @ self.one_step(level)
            self._between[m, n] = matrix
        return self._between[m, n]

    def rows(self, x: Tensor, n: Tensor) -> Tensor:
        self._cumulative = self.cumulative.to(x.device)
        return self._cumulative[broadcast(n, x.ndim), x].double()

    def push(self, p: Tensor, n: Tensor) -> Tensor:
        self._cumulative = self.cumulative.to(p.device)
        matrices = self._cumulative[n].to(p)
        return (p.flatten(1, -2) @ matrices).reshape(p.shape)

    def likelihood(self, x: Tensor, n: Tensor) -> Tensor:
        self._cumulative = self.cumulative.to(x.device)
        return self._cumulative.transpose(1, 2)[broadcast(n, x.ndim), x].double()

    def columns(self, x: Tensor, n: Tensor, m: Tensor | None = None) -> Tensor:
        if m is None:
            step = broadcast(n - 1, x.ndim)
            by_distance, diagonal = self.on("by_distance", x.device), self.on("diagonal", x.device)
            distance = (x[..., None] - torch.arange(by_distance.shape[1], device=x.device)).abs()
            is_same = distance == 0
            return torch.where(is_same, diagonal[step, x][..., None], by_distance[step[..., None], distance])
        # the levels are read on the host; only runs that skip steps come here
        pairs = zip(*(levels.expand(len(x)).tolist() for levels in (m, n)))
        return torch.stack([self.between(*pair).T.to(x.device)[row] for pair, row in zip(pairs, x)])


class AbsorbingKernel(Kernel):
    """Another noise on K - 1 categories, from which each step may absorb into the last category."""

    def __init__(self, inner: Kernel, betas: Tensor, num_classes: int):
        self.inner, self.kept, self.mask = inner, cumulative_kept(betas), num_classes - 1

    def rows(self, x: Tensor, n: Tensor) -> Tensor:
        kept = broadcast(self.on("kept", x.device)[n], x.ndim + 1)
        rows = self.inner.rows(x.clamp(max=self.mask - 1), n) * kept
        rows = torch.cat([rows, (1 - kept).expand(*x.shape, 1)], dim=-1)
        return torch.where((x == self.mask)[..., None], F.one_hot(x, self.mask + 1).to(rows), rows)

    def push(self, p: Tensor, n: Tensor) -> Tensor:
        kept = broadcast(self.on("kept", p.device)[n], p.ndim).to(p)
        others, masked = p[..., :-1], p[..., -1:]
        masked = masked + (1 - kept) * others.sum(dim=-1, keepdim=True)
        return torch.cat([kept * self.inner.push(others, n), masked], dim=-1)

    def columns(self, x: Tensor, n: Tensor, m: Tensor | None = None) -> Tensor:
        return self._absorb(x, self.inner.columns(x.clamp(max=self.mask - 1), n, m), n, m)

    def likelihood(self, x: Tensor, n: Tensor) -> Tensor:
        return self._absorb(x, self.inner.likelihood(x.clamp(max=self.mask - 1), n), n, torch.zeros_like(n))

    def _absorb(self, x: Tensor, inner: Tensor, n: Tensor, m: Tensor | None) -> Tensor:
        kept = broadcast(kept_between(self.on("kept", x.device), n, m), x.ndim + 1)
        stays = F.pad(inner * kept, (0, 1))
        absorbed = torch.cat([(1 - kept).expand(*x.shape, self.mask), torch.ones_like(stays[..., :1])], dim=-1)
        return torch.where((x == self.mask)[..., None], absorbed, stays)


def cumulative_kept(betas: Tensor) -> Tensor:
    """prod(1 - beta) at levels 0 to T, (T + 1,)."""
    return torch.cat([torch.ones_like(betas[:1]), (1 - betas).cumprod(dim=0)])


def kept_between(table: Tensor, n: Tensor, m: Tensor | None) -> Tensor:
    """Entry n over entry m of a table of products (T + 1, ...); m None is n - 1."""
    before = table[n - 1 if m is None else m]
    # nothing comes back from nothing
    return torch.where(before == 0, 0.0, table[n] / before.where(before != 0, torch.ones_like(before)))


def broadcast_rows(values: Tensor, dims: int) -> Tensor:
    """Values (B, K) as (B, 1, ..., K) of `dims` dimensions."""
    return values.reshape(values.shape[0], *(1,) * (dims - 2), values.shape[1])


def cosine_betas(steps: int) -> Tensor:
    """beta_t of Hoogeboom et al. 2021: the share that is kept falls as a cosine, not its square."""
    share = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).cos()
    return (1 - share[1:] / share[:-1]).clamp(max=0.999)


def jsd_betas(steps: int) -> Tensor:
    """beta_t = 1 / (T - t): the share that is kept falls linearly to 0."""
    return 1 / torch.arange(steps, 0, -1, dtype=torch.float64)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return -torch.special.xlogy(p, p).sum(dim=-1)


def information_removed(matrix: Tensor, frequencies: Tensor) -> Tensor:
    """1 - I(x_t; x_0) / H(x_0) for q(x_t | x_0) (..., K, K) and p(x_0) (K,)."""
    joint = frequencies[:, None] * matrix
    return (entropy(joint.flatten(-2)) - entropy(joint.sum(dim=-2))) / entropy(frequencies)


def mutual_information_betas(steps: int, frequencies: Tensor, matrix: Callable[[float], Tensor]) -> Tensor:
    """beta_t (T,) that remove the same information about x_0 in each step, all in the last.

    matrix: q(x_t | x_0) (K, K) for the share that is kept.
    """
    # from 1e-5 to 1 in the rate's integral, and up to where float64 keeps nothing
    rates = torch.logspace(-5, math.log10(36), 300, dtype=torch.float64)
    removed = torch.stack([information_removed(matrix(math.exp(-rate)), frequencies) for rate in rates.tolist()])
    removed, rates = torch.cat([torch.zeros(1).double(), removed]), torch.cat([torch.zeros(1).double(), rates])
    wanted = torch.arange(1, steps, dtype=torch.float64) / steps
    place = torch.searchsorted(removed.cummax(0).values, wanted).clamp(1, len(rates) - 1)
    share = ((wanted - removed[place - 1]) / (removed[place] - removed[place - 1]).clamp(min=TINY)).clamp(0, 1)
    kept = torch.cat([torch.ones(1), (-(rates[place - 1] + share * (rates[place] - rates[place - 1]))).exp()])
    return torch.cat([1 - kept[1:] / kept[:-1], torch.ones(1).double()])


def nearest_neighbors(embeddings: Tensor, count: int) -> list[list[int]]:
    """The `count` nearest other categories of each, by the distance of embeddings (K, D)."""
    distance = torch.cdist(embeddings.double(), embeddings.double())
    return distance.fill_diagonal_(math.inf).topk(count, largest=False).indices.tolist()


def neighbor_rates(neighbors: Sequence[Sequence[int]]) -> Tensor:
    """Symmetric rates (K, K) between neighbours, 1/2k for each direction; rows sum to 0."""
    classes = len(neighbors)
    links = torch.zeros(classes, classes, dtype=torch.float64)
    for category, others in enumerate(neighbors):
        links[category, list(others)] = 1 / len(others)
    rates = (links + links.T) / 2
    return rates - rates.sum(dim=1).diag()


def band(num_classes: int, bands: int) -> Tensor:
    """1 where |i - j| <= bands, float64 (K, K)."""
    places = torch.arange(num_classes)
    return ((places[:, None] - places).abs() <= bands).double()


class D3PMScheduler(SchedulerMixin, ConfigMixin):
    """The forward process and the posterior of D3PM; the network predicts x_0.

    Args:
        num_classes: K, with the category that absorbs where there is one.
        transition_type: what a step does with a category, with probability beta_t:
            "uniform" draws any; "absorbing" takes `mask_token_id`; "gaussian" moves to a near one
            by a discretised Gaussian of variance beta_t; "absorbing_gaussian" does so, and is
            absorbed by the last category with probability 1 / (T - t); "band_diagonal" draws one
            within `transition_bands`; "nearest_neighbor" moves along the graph of `neighbors`.
        beta_schedule: "cosine", "linear" from `beta_start` to `beta_end`, "jsd" (beta_t =
            1 / (T - t)), or "mutual_information", which removes equal information about data of
            `frequencies` in each step (not for Gaussian steps).
        trained_betas: the betas (T,) themselves. For steps that forget the last may be 1.
        mask_token_id: None takes the middle category, grey for images.
        transition_bands: zero beyond |i - j| of so many, for "uniform" and "gaussian", too.
        gaussian_variant: the kernel of the "paper", or of the published code, which differs from it
            except for K = 256: "images_code" or "text_code".
        neighbors: K lists of categories, such as `nearest_neighbors` finds.
        frequencies: p(x_0) (K,), for "mutual_information".
        prediction_type: what the network's output means. "logits" are K a channel, to which x_t is
            added; "logistic" are location and log scale a channel of a truncated logistic
            distribution; see `x_0_logits`.
        posterior_form: "joint" is Eq. 4 of the paper, whose minimiser is not p(x_0 | x_t) but for
            absorbing noise; "mixture" averages q(x_s | x_t, x_0) over p(x_0 | x_t), which is exact
            for that.
        decoder: the step to clean data; "x0" takes the network's p(x_0), as the published code for
            images, "posterior" the same form as other steps, as that for text.
        eps: added to probabilities before their logarithm. The published code has 1e-6, which moves
            the bound by up to 6e-3 bits; 0 is exact.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_classes: int = 256,
        num_train_timesteps: int = 1000,
        transition_type: str = "uniform",
        beta_schedule: str = "cosine",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        trained_betas: Sequence[float] | None = None,
        mask_token_id: int | None = None,
        transition_bands: int | None = None,
        gaussian_variant: str = "paper",
        neighbors: Sequence[Sequence[int]] | None = None,
        frequencies: Sequence[float] | None = None,
        prediction_type: str = "logits",
        posterior_form: str = "joint",
        decoder: str = "x0",
        eps: float = 0.0,
    ):
        self._check()
        if "_use_default_values" in self.config:
            # diffusers counts positional arguments as defaults, which from_config drops
            self.register_to_config(_use_default_values=[])
        # made when first needed: a component that is only loaded should cost nothing
        self._betas: Tensor | None = None
        self._kernel: Kernel | None = None
        self.set_timesteps(self.config.num_train_timesteps)

    def _check(self) -> None:
        config = self.config
        choices = {
            "transition_type": TRANSITION_TYPES,
            "beta_schedule": BETA_SCHEDULES,
            "gaussian_variant": GAUSSIAN_VARIANTS,
            "prediction_type": ("logits", "logistic"),
            "posterior_form": ("joint", "mixture"),
            "decoder": ("x0", "posterior"),
        }
        for name, allowed in choices.items():
            if config[name] not in allowed:
                raise ValueError(f"unknown {name} {config[name]!r}; choose from {list(allowed)}")
        if config.num_classes < 2 or config.num_train_timesteps < 1:
            raise ValueError(
                f"num_classes={config.num_classes} must be at least 2 and num_train_timesteps="
                f"{config.num_train_timesteps} at least 1"
            )
        if config.mask_token_id is not None and not 0 <= config.mask_token_id < config.num_classes:
            raise ValueError(
                f"mask_token_id={config.mask_token_id} is no category; give 0 to {config.num_classes - 1}"
            )
        if config.transition_type == "band_diagonal" and config.transition_bands is None:
            raise ValueError("band_diagonal needs transition_bands, how far a step may move")
        if config.transition_type == "nearest_neighbor" and len(config.neighbors or ()) != config.num_classes:
            raise ValueError(
                f"nearest_neighbor needs neighbors, a list for each of the {config.num_classes} categories"
            )
        if config.beta_schedule == "mutual_information" and config.trained_betas is None:
            if len(config.frequencies or ()) != config.num_classes:
                raise ValueError(
                    f"mutual_information needs frequencies, p(x_0) of the {config.num_classes} categories"
                )
            if "gaussian" in config.transition_type:
                raise ValueError("mutual_information has no Gaussian steps; choose linear, cosine or jsd")
        if config.trained_betas is not None and len(config.trained_betas) != config.num_train_timesteps:
            raise ValueError(
                f"{len(config.trained_betas)} trained_betas were given for num_train_timesteps="
                f"{config.num_train_timesteps}; give one for each"
            )

    @property
    def mask_token_id(self) -> int | None:
        """The category that absorbs, None where none does."""
        if self.config.transition_type == "absorbing_gaussian":
            return self.config.num_classes - 1
        if self.config.transition_type != "absorbing":
            return None
        given = self.config.mask_token_id
        return self.config.num_classes // 2 if given is None else given

    @property
    def stationary(self) -> Tensor:
        """The distribution (K,) that sampling starts from."""
        classes = self.config.num_classes
        if self.mask_token_id is None:
            return torch.full((classes,), 1 / classes, dtype=torch.float64)
        return F.one_hot(torch.tensor(self.mask_token_id), classes).double()

    @property
    def betas(self) -> Tensor:
        """The betas (T,), float64, of which entry t leads to timestep t."""
        if self._betas is None:
            self._betas = self._make_betas()
        return self._betas

    @property
    def kernel(self) -> Kernel:
        """The noise of this process."""
        if self._kernel is None:
            self._kernel = self._make_kernel(self.betas)
        return self._kernel

    def _make_betas(self) -> Tensor:
        config, steps = self.config, self.config.num_train_timesteps
        if config.trained_betas is not None:
            return torch.tensor(list(config.trained_betas), dtype=torch.float64)
        if config.beta_schedule == "linear":
            return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
        if config.beta_schedule == "cosine":
            return cosine_betas(steps)
        if config.beta_schedule == "jsd":
            return jsd_betas(steps)
        frequencies = torch.tensor(list(config.frequencies), dtype=torch.float64)
        everything = torch.arange(config.num_classes)[None]
        level = torch.ones(1, dtype=torch.int64)

        def matrix(kept: float) -> Tensor:
            return self._make_kernel(torch.tensor([1 - kept], dtype=torch.float64)).rows(everything, level)[0]

        return mutual_information_betas(steps, frequencies / frequencies.sum(), matrix)

    def _make_kernel(self, betas: Tensor) -> Kernel:
        config, classes, bands = self.config, self.config.num_classes, self.config.transition_bands
        kind = config.transition_type
        if kind == "gaussian":
            return GaussianKernel(betas, classes, config.gaussian_variant, bands)
        if kind == "absorbing_gaussian":
            inner = GaussianKernel(betas, classes - 1, config.gaussian_variant, bands)
            return AbsorbingKernel(inner, jsd_betas(len(betas)), classes)
        if kind == "nearest_neighbor":
            kept = cumulative_kept(betas)[:, None]
            # exp(rates * c) with c = -log(kept); eigenvalue 0, which LAPACK only comes near to,
            # stays 1 where nothing else is kept
            return SpectralKernel(
                neighbor_rates(config.neighbors), lambda values: kept ** (-values).where(-values > ZERO_RATE, 0.0)
            )
        if kind == "band_diagonal":
            near = band(classes, bands)
            width = near.sum(dim=1)
            symmetric = near / (width[:, None] * width).sqrt()
            return SpectralKernel(symmetric, lambda values: cumulative_kept(betas[:, None] * (1 - values)), width)
        if kind == "uniform" and bands is not None:
            near = band(classes, bands) / classes
            moves = near - near.sum(dim=1).diag()
            return SpectralKernel(moves, lambda values: cumulative_kept(-betas[:, None] * values))
        return MixingKernel(betas, self.stationary)

    def transition_matrix(self, t: int, s: int | None = None) -> Tensor:
        """q(x_t | x_s) float64 (K, K), s = -1 for clean data; for looking at, not for computing."""
        everything = torch.arange(self.config.num_classes)[None]
        n, m = torch.tensor([t + 1]), None if s is None else torch.tensor([s + 1])
        return self.kernel.columns(everything, n, m)[0].T

    def cumulative_matrix(self, t: int) -> Tensor:
        """q(x_t | x_0) float64 (K, K)."""
        return self.kernel.rows(torch.arange(self.config.num_classes)[None], torch.tensor([t + 1]))[0]

    # --- categories and values ------------------------------------------------------------------

    def to_values(self, x: Tensor) -> Tensor:
        """Categories as numbers in [-1, 1], float32, as networks see them."""
        return x.float() * (2 / (self.config.num_classes - 1)) - 1

    def to_categories(self, values: Tensor) -> Tensor:
        """The nearest categories of numbers in [-1, 1]."""
        last = self.config.num_classes - 1
        return ((values.float() + 1) * (last / 2)).round().long().clamp(0, last)

    def x_0_logits(self, model_output: Tensor, x_t: Tensor) -> Tensor:
        """Logits of x_0 (B, ..., K), of the network's output for x_t (B, C, ...).

        An output (B, ..., K) is taken as it is. Otherwise its channels are K C logits, or C
        locations and C log scales.
        """
        if model_output.ndim == x_t.ndim + 1:
            return model_output
        classes = self.config.num_classes
        if self.config.prediction_type == "logistic":
            location, log_scale = model_output.chunk(2, dim=1)
            return logistic_logits(torch.tanh(location + self.to_values(x_t)), log_scale, classes)
        logits = model_output.unflatten(1, (x_t.shape[1], classes)).movedim(2, -1)
        return logits + F.one_hot(x_t, classes).to(logits)

    # --- the process ----------------------------------------------------------------------------

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) by uniform numbers: one a value (B, ...), or Gumbel-max (B, ..., K)."""
        if noise.shape == x_0.shape:
            return self.kernel.draw(x_0, noise, t + 1)
        return gumbel_argmax(safe_log(self.kernel.rows(x_0, t + 1), self.config.eps), noise)

    def sample_prior(self, uniform: Tensor) -> Tensor:
        """x_T (...) from the stationary distribution by uniform numbers (...) in [0, 1]."""
        if self.mask_token_id is not None:
            return torch.full(uniform.shape, self.mask_token_id, device=uniform.device)
        classes = self.config.num_classes
        return (uniform.double() * classes).long().clamp(0, classes - 1)

    def posterior_logits(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """log q(x_t | x_s) + log q(x_s | x_0) (B, ..., K): logits of q(x_s | x_t, x_0).

        x_0: categories (B, ...), Eq. 3, or a distribution (B, ..., K), Eq. 4.
        """
        n, m = t + 1, t if s is None else s + 1
        is_known = not x_0.is_floating_point()
        dtype = torch.float64 if is_known else x_0.dtype
        before = self.kernel.rows(x_0, m) if is_known else self.kernel.push(x_0, m)
        likelihood = self.kernel.columns(x_t, n, None if s is None else m).to(dtype)
        before = safe_log(before, self.config.eps)
        logits = safe_log(likelihood, self.config.eps) + before
        return self._decoded(before, logits, m)

    def predicted_logits(self, x_0_logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """Logits of p(x_s | x_t) (B, ..., K) for logits of x_0, in `posterior_form`."""
        p = x_0_logits.softmax(dim=-1)
        if self.config.posterior_form == "joint":
            logits = self.posterior_logits(p, x_t, t, s)
        else:
            likelihood = self.kernel.likelihood(x_t, t + 1).to(p)
            # an x_0 that cannot have led to x_t has no posterior
            share = torch.where(likelihood > 0, p / likelihood.clamp(min=TINY), 0.0)
            logits = self.posterior_logits(share, x_t, t, s)
        return self._decoded(x_0_logits, logits, t if s is None else s + 1)

    def _decoded(self, clean: Tensor, logits: Tensor, m: Tensor) -> Tensor:
        """Logits at level m, which the decoder "x0" replaces by those of x_0 where m is 0."""
        if self.config.decoder == "posterior":
            return logits
        return torch.where(broadcast(m == 0, logits.ndim), clean, logits)

    # --- sampling -------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose N timesteps, evenly from T - 1 to 0, or a descending list of one's own.

        A step goes from one to the next by the product of the matrices between them. Raises
        ValueError for more than T and for a list that does not descend within T.
        """
        total = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass either num_inference_steps or timesteps, and not both")
        if timesteps is None:
            if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= total:
                raise ValueError(
                    f"num_inference_steps must be between 1 and num_train_timesteps={total}, not "
                    f"{num_inference_steps!r}"
                )
            chosen = torch.linspace(total - 1, 0, num_inference_steps, dtype=torch.float64).round().long()
        else:
            chosen = torch.as_tensor(list(timesteps)).long()
            inside = len(chosen) > 0 and 0 <= int(chosen[-1]) and int(chosen[0]) < total
            if not inside or (chosen.diff() >= 0).any():
                raise ValueError(f"timesteps must descend between {total - 1} and 0, not {timesteps!r}")
        self.timesteps = chosen.to(device)
        self.num_inference_steps = len(chosen)
        # by timestep, so that no step reads a number from a GPU
        self._previous = torch.arange(-1, total - 1)
        self._previous[chosen] = torch.cat([chosen[1:], torch.tensor([-1])])
        self._previous = self._previous.to(device)
        self._skips = len(chosen) < total

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The sample as it is: every scheduler of diffusers has this method."""
        return sample

    def previous_timestep(self, t: Tensor) -> Tensor:
        """The timestep after t (B,) in the run, -1 for clean data."""
        return self._previous.to(t.device)[t]

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> D3PMSchedulerOutput | tuple[Tensor, Tensor]:
        """The categories at the run's next timestep; the last step takes the most probable ones.

        noise: uniform numbers (B, ..., K) instead of those that `generator` draws, in float64.
        """
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        s = self.previous_timestep(t)
        # float64, since rare categories decide between many steps
        clean = self.x_0_logits(model_output, sample).double()
        logits = self.predicted_logits(clean, sample, t, s if self._skips else None)
        if noise is None:
            noise = uniform_noise(logits.shape, generator, logits.device)
        drawn = gumbel_argmax(logits, noise.to(logits.device).double())
        drawn = torch.where(broadcast(s < 0, drawn.ndim), logits.argmax(dim=-1), drawn)
        return D3PMSchedulerOutput(drawn, clean) if return_dict else (drawn, clean)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def logistic_logits(location: Tensor, log_scale: Tensor, num_classes: int, eps: float = 1e-6) -> Tensor:
    """Logits (..., K) of a logistic distribution truncated to K equal bins of [-1, 1].

    location and log_scale: (...), Sec. 4 and App. B of the paper.
    """
    centers = torch.linspace(-1, 1, num_classes, dtype=location.dtype, device=location.device)
    # the published networks start with narrow distributions
    inverse_scale = (2 - log_scale).exp()[..., None]
    centered, half = centers - location[..., None], 1 / (num_classes - 1)
    upper = F.logsigmoid(inverse_scale * (centered + half))
    lower = F.logsigmoid(inverse_scale * (centered - half))
    return upper + torch.log1p(-(lower - upper).exp() + eps)
