"""Latent diffusion on MNIST: a VAE makes images small, and diffusion works on what is left.

Most of what a diffusion network computes concerns pixels that say little. So an autoencoder first
learns to put an image into 64 numbers and back: a variational one, whose encoder answers with a
normal distribution, so that near latents decode to like images. It can draw by itself, from pure
noise, but the latents of digits do not fill the normal distribution, and between them lies what is
no digit. So the second stage trains the diffusion of 01 on the latents of the training images, laid
out as 1x8x8: it learns where the digits are. To sample, denoise a latent and decode it once.

    VAE loss = -log p(x|z) + β KL(q(z|x) ‖ N(0, I)),  z = µ + σ ε     Kingma & Welling 2014, Eq. 10
    x_0      = (z - mean) / std, for each of the 64 dimensions         cf. Rombach et al. 2022
    x_t, loss and samplers as in 01, with nothing clamped

    paper           code                      shape
    x               x                         (B, 1, 28, 28) in [-1, 1]
    µ, log σ²       mu, logvar                (B, 64)
    x_0, x_t, ε     x0, x_t, noise            (B, 1, 8, 8)
    t = 1 ... T     t = 0 ... T-1             (B,); t = -1 in the samplers is the clean latent

    python 02_latent_diffusion.py                  both stages, then sample, time, draw
    python 02_latent_diffusion.py --sample-only    digits from the shipped weights, no training
    python 02_latent_diffusion.py --fast-dev       all of it in seconds

Measured on two CPU cores (AMD EPYC with AVX-512, torch 2.15.0): VAE (0.22M weights) 20 epochs in 2
minutes, U-Net (2.56M) 40 epochs in 35; mean squared error of reconstructed test digits 0.0037 of
pixels from 0 to 1, 2 of 64 dimensions unused. Fréchet distance, 1,000 samples by 05_compare.py:
DDIM-100 0.49, DDPM 0.40 (01's, in pixels: 0.91, 0.59; training digits 0.155), the VAE alone 11.9.
DDIM-100, one after the other: 16 images in 0.81 s against 2.62 s for 01's network in pixels, 38.5
images/s against 7.0 in batches of 128, for 3.7 against 12.3 billion multiply-adds an image. Where
arithmetic and memory are the limit, the latent wins. Where launches are, as for 16 images on a GPU,
it cannot, for it makes as many: hence, we think, the report's 5.7 s against 4.4 s in pixels.

Tried, five epochs for each stage at width 32, Fréchet distance of 2,000 samples by DDIM-100: with
cross-entropy and β = 1, 0.3, 0.05, 0.02 it was 3.77, 2.17, 1.57, 1.54 (unused dimensions 28%, 2%,
0%, 0%; mean squared error of test digits 0.0112, 0.0076, 0.0056, 0.0055); with the squared error,
summed, and β = 0.3, 0.1, 0.03, 0.01 it was 2.32, 2.04, 1.82, 1.93 (0.0072, 0.0060, 0.0056, 0.0056).
A lightly weighted prior is best: the diffusion learns the latents' distribution anyway. Width 64
gave 1.14 in place of 1.57 after as many epochs, and 2.08 after as much time, two epochs.

Left out: perceptual and adversarial losses for the decoder, which larger images need (Rombach).
"""

import json
import math
import sys
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common
from common import Downsample, ResBlock, SelfAttention, Upsample


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(
        __file__, "Latent diffusion on MNIST.", epochs=40, batch_size=128, lr=2e-3
    )
    add = parser.add_argument
    add("--vae-epochs", type=int, default=20, help="passes over the training images for the VAE")
    add("--vae-lr", type=float, default=2e-3, help="peak learning rate for the VAE")
    add("--kl-weight", type=float, default=0.05, help="β, weight of the KL divergence in its loss")
    add("--width", type=int, default=64, help="channels at 8x8; twice as many at 4x4 and 2x2")
    add("--blocks", type=int, default=1, help="residual blocks a level, down and up")
    add("--timesteps", type=int, default=1000, help="T, steps from latent to noise in training")
    add("--ema-decay", type=float, default=0.999, help="decay of the weights' moving average")
    add("--ddim-steps", type=int, default=100, help="network calls of DDIM")
    tiny = {"epochs": 2, "vae_epochs": 2, "batch_size": 32, "train_images": 256, "width": 8,
            "timesteps": 20, "ddim_steps": 10, "eval_samples": 20}
    args = common.parse(parser, argv, fast_dev=tiny, shape=["width", "blocks", "timesteps"])
    if (args.sample_only or args.export) and "vae" not in args.saved:
        sys.exit(f"{args.checkpoint} ends in the VAE's stage: go on with --resume")
    if args.width % 8:
        parser.error(f"--width {args.width}: must be a multiple of 8, for the group norms")
    if args.timesteps < 2:
        parser.error("--timesteps 1: the cosine schedule needs two ends")
    if args.ddim_steps > args.timesteps:
        parser.error(f"DDIM takes 1 to {args.timesteps} (--timesteps) steps, not {args.ddim_steps}")
    return args


# --------------------------------------------------------------------------------- networks


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> latents (B, 64) -> images. Kingma & Welling 2014.

    The diffusion works on latents as (B, 1, 8, 8), of mean 0 and standard deviation 1: `mean` and
    `std` (64,) are measured once on the training images, and saved with the weights.
    """

    def __init__(self):
        super().__init__()

        def block(conv: nn.Module) -> list[nn.Module]:
            return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]

        self.encoder = nn.Sequential(
            *block(nn.Conv2d(1, 16, 3, stride=2, padding=1)),  # (B, 16, 14, 14)
            *block(nn.Conv2d(16, 32, 3, stride=2, padding=1)),  # (B, 32, 7, 7)
            *block(nn.Conv2d(32, 64, 7)),  # (B, 64, 1, 1)
            nn.Flatten(),
        )
        self.fc_mu, self.fc_logvar = nn.Linear(64, 64), nn.Linear(64, 64)
        self.fc_decode = nn.Linear(64, 64)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (64, 1, 1)),
            *block(nn.ConvTranspose2d(64, 32, 7)),  # (B, 32, 7, 7)
            *block(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1)),  # (B, 16, 14, 14)
            nn.ConvTranspose2d(16, 1, 3, 2, 1, 1),  # (B, 1, 28, 28)
        )
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("std", torch.ones(64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """µ and log σ² of q(z | x), (B, 64) each."""
        h = self.encoder(x)
        return self.fc_mu(h), self.fc_logvar(h)

    def logits(self, z: Tensor) -> Tensor:
        return self.decoder(self.fc_decode(z))

    def decode(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid() * 2 - 1

    def to_latent(self, mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """A draw from q(z | x), standardised, (B, 1, 8, 8)."""
        z = mu + (logvar / 2).exp() * noise
        return ((z - self.mean) / self.std).view(-1, 1, 8, 8)

    def to_images(self, latent: Tensor) -> Tensor:
        return self.decode(latent.flatten(1) * self.std + self.mean)


class UNet(nn.Module):
    """ε_θ(x_t, t): (B, 1, 8, 8) and (B,) -> (B, 1, 8, 8). vs 01: 8, 4, 2 pixels a side, wider."""

    def __init__(self, width: int = 32, blocks: int = 1, timesteps: int = 1000):
        super().__init__()
        c1, c2, c_time = width, 2 * width, 4 * width
        self.c_time, self.time_scale = c_time, 1000 / timesteps
        self.time = nn.Sequential(
            nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(1, c1, 3, padding=1)
        self.down0 = nn.ModuleList(ResBlock(c1, c1, c_time) for _ in range(blocks))
        self.down0_to_1 = Downsample(c1)
        self.down1 = nn.ModuleList(ResBlock(c2 if i else c1, c2, c_time) for i in range(blocks))
        self.down1_attention = nn.ModuleList(SelfAttention(c2) for _ in range(blocks))
        self.down1_to_mid = Downsample(c2)
        self.mid1 = ResBlock(c2, c2, c_time)
        self.mid_attention = SelfAttention(c2)
        self.mid2 = ResBlock(c2, c2, c_time)
        self.mid_to_up0 = Upsample(c2, c2)
        self.up0 = nn.ModuleList(ResBlock(2 * c2, c2, c_time) for _ in range(blocks))
        self.up0_attention = nn.ModuleList(SelfAttention(c2) for _ in range(blocks))
        self.up0_to_1 = Upsample(c2, c1)
        self.up1 = nn.ModuleList(ResBlock(2 * c1, c1, c_time) for _ in range(blocks))
        self.norm_out = nn.GroupNorm(8, c1)
        self.conv_out = common.zero_init(nn.Conv2d(c1, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
        h, skips = self.conv_in(x), []  # (B, c1, 8, 8)
        for block in self.down0:
            skips.append(h := block(h, emb))
        h = self.down0_to_1(h)  # (B, c1, 4, 4)
        for block, attention in zip(self.down1, self.down1_attention):
            skips.append(h := attention(block(h, emb)))  # (B, c2, 4, 4)
        h = self.down1_to_mid(h)  # (B, c2, 2, 2)
        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)
        h = self.mid_to_up0(h)  # (B, c2, 4, 4)
        for block, attention in zip(self.up0, self.up0_attention):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
        h = self.up0_to_1(h)  # (B, c1, 8, 8)
        for block in self.up1:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, 8, 8)


def make_model(args) -> UNet:
    model = UNet(args.width, args.blocks, args.timesteps)
    return model.to(args.device, memory_format=args.layout)


# ----------------------------------------------------------------------------------- method


def vae_loss(vae: VAE, x: Tensor, rng=None, kl_weight: float = 0.05) -> Tensor:
    """Kingma & Welling 2014, Eq. 10, in nats an image: -log p(x|z) + β KL, with one draw of z.

    x, from -1 to 1, are probabilities of white, so -log p is a binary cross-entropy (appendix C.1).
    """
    mu, logvar = (h.float() for h in vae.encode(x))
    noise = torch.randn(mu.shape, generator=rng, device=x.device)
    logits = vae.logits(mu + (logvar / 2).exp() * noise)
    error = F.binary_cross_entropy_with_logits(logits.float(), (x + 1) / 2, reduction="none")
    return (error.sum((1, 2, 3)) + kl_weight * kl_divergence(mu, logvar)).mean()


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(µ, σ²) ‖ N(0, I)) in nats, (B, 64) -> (B,): Kingma & Welling 2014, appendix B."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)


class Schedule(NamedTuple):
    """How much noise at which t, as in 01."""

    betas: Tensor  # β_t, (T,)
    alphas: Tensor  # α_t = 1 - β_t
    alpha_bars: Tensor  # ᾱ_t = α_0 ⋯ α_t
    signal: Tensor  # √ᾱ_t
    sigma: Tensor  # √(1-ᾱ_t)


def make_schedule(timesteps: int, device: str = "cpu") -> Schedule:
    """01's cosine schedule. At t = T-1 an x̂_0 that nothing clamps is divided by √ᾱ = 0.01."""
    theta = torch.linspace(0.01, math.pi / 2 - 0.01, timesteps, dtype=torch.float64)
    alpha_bars = theta.cos() ** 2
    alphas = alpha_bars / torch.cat([torch.ones(1), alpha_bars[:-1]])  # ᾱ_{-1} = 1, no noise
    signal, sigma = theta.cos().float(), theta.sin().float()
    return Schedule(1 - alphas, alphas, alpha_bars, signal.to(device), sigma.to(device))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t from x_0 in one jump (Ho, Eq. 4). x0, noise: (B, ...); t: (B,) in 0 ... T-1."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return schedule.signal[t].view(shape) * x0 + schedule.sigma[t].view(shape) * noise


def diffusion_loss(model, schedule: Schedule, x0: Tensor, t=None, noise=None, rng=None) -> Tensor:
    """Ho et al. 2020, Algorithm 1 and Eq. 14, as in 01. x0, noise: (B, 1, 8, 8); t: (B,)."""
    if t is None:
        t = torch.randint(len(schedule.betas), (len(x0),), generator=rng, device=x0.device)
    if noise is None:
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    return F.mse_loss(model(q_sample(schedule, x0, t, noise), t).float(), noise)


# --------------------------------------------------------------------------------- samplers


def ddim_pairs(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """(t, next t) from T-1 down to -1, the clean latent, evenly: [(999, 989), ..., (9, -1)]."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM takes 1 to {timesteps} steps, not {steps}")
    times = torch.linspace(-1, timesteps - 1, steps + 1, dtype=torch.float64).round().long()
    times = times.flip(0).tolist()
    return list(pairwise(times))


@torch.no_grad()
def ddim_sample(
    model, schedule: Schedule, x_T: Tensor, steps: int, eta=0.0, rng=None, trace=None
) -> Tensor:
    """Song et al. 2021, Eq. 12: `steps` steps from noise x_T (B, ...) to a latent.

    eta = 0 is deterministic; eta = 1 adds the noise of Eq. 16 and with steps = T is DDPM.
    `trace(t, x_t, x0_hat)`, if given, sees every step.
    """
    x = x_T
    alpha_bars = [*schedule.alpha_bars.tolist(), 1.0]  # ᾱ_{-1} = 1, the clean latent
    for t, s in tqdm(ddim_pairs(len(schedule.betas), steps), "denoise", leave=False, delay=2):
        ab, ab_s = alpha_bars[t], alpha_bars[s]
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x0_hat = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        if trace:
            trace(t, x, x0_hat)
        sigma = eta * ((1 - ab_s) / (1 - ab) * (1 - ab / ab_s)) ** 0.5  # Eq. 16
        x = ab_s**0.5 * x0_hat + (1 - ab_s - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=rng, device=x.device)
    return x


def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None) -> Tensor:
    """vs 01: DDPM as Song et al. derive it, DDIM with all steps and η = 1 (01's tests agree)."""
    return ddim_sample(model, schedule, x_T, len(schedule.betas), eta=1.0, rng=rng)


# --------------------------------------------------------------------------------- training


def fit(args, history: list, stage: str, epochs: int, lr: float, model, data, loss_of, done: dict):
    """01's training loop, for both stages; `done` are finished networks to save along."""
    steps_per_epoch = len(data[0]) // args.batch_size
    total_steps = epochs * steps_per_epoch
    ema = common.EMA(model, args.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr, fused="fused" in args.speed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(  # 200 steps up, then straight down to zero
        optimizer, lambda step: min((step + 1) / 200, 1) * max(1 - step / total_steps, 0)
    )
    rng = torch.Generator(args.device).manual_seed(args.seed)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scheduler": scheduler}
    if args.resume and history[-1]["stage"] == stage:
        common.restore(args, rng, parts)
    ema.updates, scheduler.base_lrs = scheduler.last_epoch, [lr]  # the rate may be a new one

    net = torch.compile(model) if "compile" in args.speed else model
    progress = common.Progress(args, history, steps_per_epoch, epochs, stage)
    for _ in range(progress.done, epochs):
        for x0, _ in common.batches(*data, args.batch_size, rng):
            with torch.autocast(args.device, torch.bfloat16, "amp" in args.speed):
                loss = loss_of(net, x0, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ema.update(model)
            progress.step(loss)
        progress.end_epoch(scheduler.get_last_lr()[0])
        common.save_checkpoint(args, history, rng, parts | done)
    progress.bar.close()
    return ema.model


def train(args) -> tuple[nn.Module, VAE, list]:
    """Train the VAE, then the diffusion on its latents; returns both EMA networks, the history."""
    images, labels = common.load_digits(args)
    history = args.saved["history"] if args.resume else []
    torch.manual_seed(args.seed)
    vae = VAE().to(args.device, memory_format=args.layout)
    if args.resume and "vae" in args.saved:
        vae.load_state_dict(args.saved["vae"])
        vae.eval()
    else:
        vae = fit(args, history, "VAE", args.vae_epochs, args.vae_lr, vae, (images, labels),
                  partial(vae_loss, kl_weight=args.kl_weight), done={})
        mu, logvar = encode(vae, images)
        vae.mean.copy_(mu.mean(0))
        vae.std.copy_((mu.var(0) + logvar.exp().mean(0)).sqrt())  # Var z = Var µ + E σ²
        common.save(args.out_dir / "vae.pt", common.origin(args) | {"vae": vae.state_dict()})
    draw_vae(args, vae)

    latents = torch.cat(encode(vae, images), dim=1)  # µ and log σ², (N, 128): encoded only once
    schedule = make_schedule(args.timesteps, args.device)

    def loss_of(net, moments: Tensor, rng) -> Tensor:
        mu, logvar = moments.chunk(2, dim=1)
        noise = torch.randn(mu.shape, generator=rng, device=mu.device)
        return diffusion_loss(net, schedule, vae.to_latent(mu, logvar, noise), rng=rng)

    torch.manual_seed(args.seed)
    model = fit(args, history, "diffusion", args.epochs, args.lr, make_model(args),
                (latents, labels), loss_of, done={"vae": vae})
    return model, vae, history


@torch.no_grad()
def encode(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """µ and log σ², (N, 64) each, of all images."""
    mu, logvar = zip(*(vae.encode(part) for part in images.split(1000)))
    return torch.cat(mu), torch.cat(logvar)


@torch.no_grad()
def draw_vae(args, vae: VAE) -> None:
    """What the VAE does with test digits: reconstructions, a map of the latents, walks in them."""
    x, labels = common.load_digits(args, train=False)
    mu, logvar = encode(vae, x)
    kl = kl_divergence(mu, logvar).mean()
    x_hat = torch.cat([vae.decode(part) for part in mu.split(1000)])
    error = ((x_hat - x) / 2).square().mean()
    dead = (mu.var(0) < 0.01).sum()
    print(f"VAE on test digits: mean squared error {error:.4f} (of pixels from 0 to 1), KL "
          f"{kl:.1f} nats, {dead} of 64 dimensions unused")
    pairs = [x[:10], x_hat[:10], x[10:20], x_hat[10:20]]
    common.save_grid(torch.cat(pairs), args.out_dir / "samples_reconstructed.png",
                     f"Test digits above their reconstructions; mean squared error {error:.4f}",
                     columns=10, rows=["digits", "VAE"] * 2)
    steps = torch.linspace(0, 1, 10, device=x.device)[:, None]
    walks = [vae.decode((1 - steps) * mu[i] + steps * mu[i + 1]) for i in range(0, 10, 2)]
    common.save_grid(torch.cat(walks), args.out_dir / "samples_walk.png",
                     "Straight walks through the latent, from digit to digit", columns=10)
    axes = torch.linalg.svd(mu - mu.mean(0), full_matrices=False).Vh[:2]
    spots = ((mu - mu.mean(0)) @ axes.T)[:2000].cpu()
    by_digit = {str(d): spots[labels[:2000].cpu() == d].T.tolist() for d in range(10)}
    common.save_plot(args.out_dir / "latent_map.png", by_digit, style=".", xlabel="first component",
                     title="2,000 test digits in the latent: its two principal components",
                     ylabel="second component")


# ------------------------------------------------------------------------ figures and timings


@torch.no_grad()
def make_figures(args, model: nn.Module, vae: VAE, history: list) -> None:
    """16 digits from the same noise by every sampler: pictures, timings, and the sets for 05."""
    net, schedule = common.for_sampling(model, args), make_schedule(args.timesteps)
    x_T = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(args.seed))
    x_T = x_T.to(args.device)  # drawn on the CPU: the same noise on every device
    rng = torch.Generator(args.device)
    path = []  # (t, x_t, x̂_0) at every step
    ddim_sample(net, schedule, x_T, args.ddim_steps, trace=lambda *state: path.append(state))
    film = [torch.cat([vae.to_images(x_t[:8]), vae.to_images(x0_hat[:8])])
            for _, x_t, x0_hat in [*path[::4], path[-1]]]  # x_t, and below it x̂_0, decoded
    common.save_gif(film, args.out_dir / "path.gif", columns=8)
    lines = {}
    for stage, unit in (("VAE", "nats an image"), ("diffusion", "squared error of the noise")):
        epochs = [x for x in history if x["stage"] == stage]
        lines[f"{stage}: {unit}"] = ([x["epoch"] for x in epochs], [x["loss"] for x in epochs])
    common.save_plot(args.out_dir / "loss.png", lines, title="VAE and latent diffusion: training",
                     xlabel="epoch", yscale="log", ylabel="loss")

    def decoded(sampler, **how):
        return lambda x: vae.to_images(sampler(net, schedule, x, **how))

    samplers = {  # vs 01: each ends in the decoder; the VAE alone decodes noise
        ("VAE prior", "decoder", 1): lambda x: vae.decode(x.flatten(1)),
        ("latent diffusion", "DDIM", args.ddim_steps): decoded(ddim_sample, steps=args.ddim_steps),
        ("latent diffusion", "DDPM", args.timesteps): decoded(ddpm_sample, rng=rng),
    }
    timings = common.training_report(args, model, history) | {"samplers": []}
    rows = {}
    for (method, name, n), sample in samplers.items():
        rng.manual_seed(args.seed)
        images, timing = common.time_sampler(sample, x_T, large_on_cpu=8)
        how = {"method": method, "sampler": name, "steps": n}
        timings["samplers"].append(how | timing)
        title = f"{method}, {name}, {n} steps: {len(x_T)} digits in {timing['seconds']:.3f} s"
        print(f"{title}; {timing['images_per_second']:.1f} images/s")
        path = args.out_dir / f"samples_{name.lower()}_{n}.png"
        common.save_grid(images, path, title, columns=8)
        rows[method if name == "decoder" else f"{name} {n}"] = images[:10]
    timings["cost"] = compare_cost(args, model, vae)
    (args.out_dir / "timings.json").write_text(json.dumps(timings, indent=1))
    title = "A column starts from one noise: decoded at once, after DDIM, after DDPM"
    common.save_grid(torch.cat([*rows.values()]), args.out_dir / "samples_all.png", title,
                     columns=10, rows=[*rows])
    for (method, name, n), sample in samplers.items() if args.eval_samples else ():
        rng.manual_seed(args.seed)
        how = {"method": method, "sampler": name, "steps": n, "seed": args.seed}
        common.save_eval(args, f"{name.lower()}_{n}", sample, (1, 8, 8), **how)


def compare_cost(args, latent_net: nn.Module, vae: VAE) -> dict:
    """DDIM in the latent and, by a fresh network of 01's size, in pixels: work, latency, rate."""
    schedule, pixel_net, cost = make_schedule(args.timesteps), UNet(32), {}
    pixel_net = pixel_net.to(args.device, memory_format=args.layout)
    for name, model, shape, finish in (("pixels", pixel_net, (1, 28, 28), nn.Identity()),
                                       ("latent", latent_net, (1, 8, 8), vae.to_images)):
        net, x = common.for_sampling(model, args), torch.randn(16, *shape, device=args.device)

        def sample(x: Tensor, net=net, finish=finish) -> Tensor:
            return finish(ddim_sample(net, schedule, x, args.ddim_steps))

        _, cost[name] = common.time_sampler(sample, x, large_on_cpu=8)
        with FlopCounterMode(display=False) as counter:
            sample(x[:1], model)
        cost[name]["multiply_adds_an_image"] = work = counter.get_total_flops() // 2
        print(f"DDIM-{args.ddim_steps}, {name}: {work / 1e6:,.0f} million multiply-adds an image; "
              f"16 images in {cost[name]['seconds']:.3f} s; {cost[name]['large_batch']} at once: "
              f"{cost[name]['images_per_second']:.1f} images/s")
    return cost


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.export:
        return common.export_weights(args, "vae", "ema")
    try:
        if args.sample_only:
            model, vae, history = make_model(args), VAE().to(args.device), args.saved["history"]
            model.load_state_dict(args.saved["ema"])
            vae.load_state_dict(args.saved["vae"])
            vae.eval()
        else:
            model, vae, history = train(args)
        make_figures(args, model, vae, history)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume goes on from {args.checkpoint}, if an epoch was finished")
    print(f"pictures, timings and weights are in {args.out_dir}")


if __name__ == "__main__":
    main()
