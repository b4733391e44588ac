"""Latent diffusion on MNIST: a VAE makes images small, and diffusion works on what is left.

Most of the work of a diffusion network concerns pixels that say little. So an autoencoder first
learns to turn an image into 64 numbers, the latent, and back. It is a variational autoencoder (VAE):
its encoder outputs a Gaussian, so that nearby latents decode to similar images. It can also draw
by itself: decode a latent of pure noise. But the latents of digits fill only parts of the space,
and latents from the gaps decode to non-digits. So a second stage trains the diffusion of 01 on the
latents of the training images: it learns where the digits are. To sample, denoise a latent with the
U-Net, and decode it once.

    q(z|x)   = N(µ, v I),  z = µ + √v ε                                Kingma & Welling 2014, Eq. 10
    VAE loss = -log p(x|z) + w KL(q(z|x) ‖ N(0, I))                    w: Higgins et al. 2017 (β-VAE)
    x_0      = (z - mean) / std, for each of the 64 numbers            cf. Rombach et al. 2022
    x_t, loss and samplers as in 01, but nothing is clamped

    paper           code                      shape
    x               x                         (B, 1, 28, 28) in [-1, 1]
    µ, log v        mu, logvar                (B, 64)
    x_0, x_t, ε     x0, x_t, noise            (B, 1, 8, 8)
    t = 1 ... T     t = 0 ... T-1             (B,); t = -1 in the samplers is the clean latent

Why lay 64 numbers out as 1x8x8? Only so that the U-Net of 01 can be used as it is, which is the
choice of the report that we reproduce. Neighbours there have nothing to do with each other.

    python 02_latent_diffusion.py                  both stages; 37 minutes on two CPU cores
    python 02_latent_diffusion.py --sample-only    no training: the shipped weights
    python 02_latent_diffusion.py --fast-dev       everything in miniature, in seconds

RESULT

Left out: perceptual and adversarial losses for the decoder, which larger images need (Rombach).
"""

import math
import sys
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import Attention, ResBlock, number


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Latent diffusion on MNIST.", 40, 128, 2e-3)
    add, count = parser.add_argument, number(int, 1)
    add("--vae-epochs", type=count, default=20, help="passes over the images for the VAE")
    add("--vae-lr", type=number(float, 1e-9), default=2e-3, help="its peak learning rate")
    add("--kl-weight", type=number(float, 0), default=0.05, help="w, weight of the KL divergence")
    add("--width", type=int, choices=[8, 16, 32, 64, 128], default=64, help="channels at 8x8")
    add("--timesteps", type=number(int, 2), default=1000, help="T, steps from image to noise")
    add("--ddim-steps", type=count, default=100, help="network calls of DDIM")
    tiny = {"epochs": 8, "batch_size": 16, "train_images": 256, "width": 8, "timesteps": 20,
            "ddim_steps": 10, "vae_epochs": 4, "eval_samples": 20}
    args = common.parse(parser, argv, tiny)
    if (most := args.ddim_steps) > args.timesteps:
        parser.error(f"DDIM takes at most --timesteps {args.timesteps} steps, not {most}")
    return args


# --------------------------------------------------------------------------------- networks


def conv_block(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> latents (B, 64) -> images. Kingma & Welling 2014.

    `mean` and `std` (64,) of the training images' latents are measured once and saved.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            conv_block(nn.Conv2d(1, 16, 3, 2, 1)),  # (B, 16, 14, 14)
            conv_block(nn.Conv2d(16, 32, 3, 2, 1)),  # (B, 32, 7, 7)
            conv_block(nn.Conv2d(32, 64, 7)),  # (B, 64, 1, 1)
        )
        self.fc_mu, self.fc_logvar = nn.Linear(64, 64), nn.Linear(64, 64)
        self.fc_decode = nn.Linear(64, 64)
        self.decoder = nn.Sequential(
            conv_block(nn.ConvTranspose2d(64, 32, 7)),  # (B, 32, 7, 7)
            conv_block(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1)),  # (B, 16, 14, 14)
            nn.ConvTranspose2d(16, 1, 3, 2, 1, 1),  # (B, 1, 28, 28)
        )
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("std", torch.ones(64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """µ and log v of q(z | x), (B, 64) each."""
        h = self.encoder(x).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)

    def logits(self, z: Tensor) -> Tensor:
        return self.decoder(self.fc_decode(z)[:, :, None, None])

    def decode(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid() * 2 - 1

    def to_latent(self, mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """A draw from q(z | x), of mean 0 and standard deviation 1, laid out as (B, 1, 8, 8)."""
        z = mu + (logvar / 2).exp() * noise
        return ((z - self.mean) / self.std).view(-1, 1, 8, 8)

    def to_images(self, latent: Tensor) -> Tensor:
        return self.decode(latent.flatten(1) * self.std + self.mean)


@torch.no_grad()
def encode(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """µ and log v, (N, 64) each, of all images."""
    mu, logvar = zip(*(vae.encode(part) for part in images.split(1000)))
    return torch.cat(mu), torch.cat(logvar)


class UNet(nn.Module):
    """Images (B, 1, H, W) and times (B,) from 0 to t_max -> (B, 1, H, W), zero when untrained.

    H and W are multiples of 4, width of 8. With width 32 it has 0.64M weights.
    """

    def __init__(self, width: int, t_max: float):
        super().__init__()
        c1, c2, c_time = width, 2 * width, 4 * width
        self.c_time, self.time_scale = c_time, 1000 / t_max
        self.time = nn.Sequential(
            nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(1, c1, 3, padding=1)
        self.down0 = ResBlock(c1, c1, c_time)
        self.down0_to_1 = nn.Conv2d(c1, c1, 3, stride=2, padding=1)
        self.down1 = ResBlock(c1, c2, c_time)
        self.down1_attention = Attention(c2)
        self.down1_to_mid = nn.Conv2d(c2, c2, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c2, c2, c_time)
        self.mid_attention = Attention(c2)
        self.mid2 = ResBlock(c2, c2, c_time)
        self.mid_to_up0 = nn.Conv2d(c2, c2, 3, padding=1)
        self.up0 = ResBlock(2 * c2, c2, c_time)
        self.up0_attention = Attention(c2)
        self.up0_to_1 = nn.Conv2d(c2, c1, 3, padding=1)
        self.up1 = ResBlock(2 * c1, c1, c_time)
        self.norm_out = nn.GroupNorm(8, c1)
        self.conv_out = common.zero_init(nn.Conv2d(c1, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
        h0 = self.down0(self.conv_in(x), emb)  # (B, c1, H, W)
        h1 = self.down1(self.down0_to_1(h0), emb)  # (B, c2, H/2, W/2)
        h1 = self.down1_attention(h1)
        h = self.mid1(self.down1_to_mid(h1), emb)  # (B, c2, H/4, W/4)
        h = self.mid2(self.mid_attention(h), emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0(torch.cat([h, h1], dim=1), emb)  # the skip
        h = self.up0_attention(h)
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(args) -> dict[str, nn.Module]:
    model, vae = UNet(args.width, args.timesteps), VAE().to(args.device)
    return {"diffusion": model.to(args.device, memory_format=torch.channels_last), "vae": vae}


# ----------------------------------------------------------------------------------- method


def vae_loss(vae: VAE, x: Tensor, kl_weight: float, rng=None) -> Tensor:
    """Kingma & Welling 2014, Eq. 10, in nats per image, with one draw of z.

    x is taken as probabilities of white: -log p is a binary cross-entropy (appendix C.1).
    """
    mu, logvar = vae.encode(x)
    noise = torch.randn(mu.shape, generator=rng, device=x.device)
    logits = vae.logits(mu + (logvar / 2).exp() * noise)
    error = F.binary_cross_entropy_with_logits(logits, (x + 1) / 2, reduction="none")
    return (error.sum((1, 2, 3)) + kl_weight * kl_divergence(mu, logvar)).mean()


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(µ, v) ‖ N(0, I)) in nats, (B, 64) -> (B,): Kingma & Welling 2014, appendix B."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)


class Schedule(NamedTuple):
    """How much noise there is at each t: for the samplers in float64 on the CPU, from where they
    read one number a step, and for training in float32 on the device.
    """

    betas: Tensor  # β_t, (T,)
    alphas: Tensor  # α_t = 1 - β_t
    alpha_bars: Tensor  # ᾱ_t = α_0 ⋯ α_t
    signal: Tensor  # √ᾱ_t, float32
    noise: Tensor  # √(1-ᾱ_t), float32


def make_schedule(timesteps: int, device: str = "cpu") -> Schedule:
    """The cosine schedule: √ᾱ_t = cos θ_t and √(1-ᾱ_t) = sin θ_t, with θ_t evenly spaced.

    Nichol & Dhariwal 2021, Eq. 17, but 0.01 short of both ends: t = 0 has a little noise to
    predict, and at t = T-1, for any T, √ᾱ = 0.01 hides the image and is not yet a division by 0.
    """
    theta = torch.linspace(0.01, math.pi / 2 - 0.01, timesteps, dtype=torch.float64)
    alpha_bars = theta.cos() ** 2
    alphas = alpha_bars / torch.cat([torch.ones(1), alpha_bars[:-1]])  # ᾱ_{-1} = 1, no noise
    signal, noise = theta.cos().float(), theta.sin().float()
    return Schedule(1 - alphas, alphas, alpha_bars, signal.to(device), noise.to(device))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t from x_0 in one step (Ho, Eq. 4). x0, noise: (B, ...); t: (B,) in 0 ... T-1."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return schedule.signal[t].view(shape) * x0 + schedule.noise[t].view(shape) * noise


def diffusion_loss(model, schedule: Schedule, x0: Tensor, t=None, noise=None, rng=None) -> Tensor:
    """Ho et al. 2020, Algorithm 1 and Eq. 14: the mean squared error of the predicted noise.

    x0: (B, ...); t (B,) and noise (B, ...) are drawn from `rng` if they are not given.
    """
    if t is None:
        t = torch.randint(len(schedule.betas), (len(x0),), generator=rng, device=x0.device)
    if noise is None:
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    return F.mse_loss(model(q_sample(schedule, x0, t, noise), t), noise)


# --------------------------------------------------------------------------------- samplers


def ddim_pairs(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """(t, next t), evenly spaced from T-1 down to -1, no noise: [(999, 989), ..., (9, -1)]."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM takes 1 to {timesteps} steps, not {steps}")
    times = torch.linspace(timesteps - 1, -1, steps + 1, dtype=torch.float64).round().int()
    return list(pairwise(times.tolist()))


@torch.no_grad()
def ddim_sample(
    model, schedule: Schedule, x_T: Tensor, steps: int, eta=0.0, rng=None, trace=None
) -> Tensor:
    """Song et al. 2021, Eq. 12: `steps` steps from noise x_T (B, ...) to a latent.

    eta = 0 is deterministic; eta = 1 adds the noise of Eq. 16 and is DDPM if steps = T.
    `trace(t, x_t, x0_hat)`, if given, sees every step.
    """
    x, alpha_bars = x_T, [*schedule.alpha_bars.tolist(), 1.0]  # ᾱ_{-1} = 1, no noise
    for t, t_next in tqdm(ddim_pairs(len(schedule.betas), steps), "DDIM", leave=False, delay=2):
        ab, ab_next = alpha_bars[t], alpha_bars[t_next]
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x0_hat = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        if trace:
            trace(t, x, x0_hat)
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)) ** 0.5  # Eq. 16
        x = ab_next**0.5 * x0_hat + (1 - ab_next - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=rng, device=x.device)
    return x


def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None) -> Tensor:
    """vs 01: DDPM as DDIM with all steps and η = 1, which a test shows to be the same."""
    return ddim_sample(model, schedule, x_T, len(schedule.betas), eta=1.0, rng=rng)


# --------------------------------------------------------------------------------- training


def train(args) -> dict[str, nn.Module]:
    """Train the VAE, then the diffusion on its latents; returns their moving averages."""
    images, labels = common.load_digits(args)
    schedule = make_schedule(args.timesteps, args.device)
    torch.manual_seed(args.seed)
    models = make_models(args)
    stage = common.Stage(args, "vae", models["vae"], args.vae_epochs, args.vae_lr, images, labels)
    for x, _ in stage:
        stage.step(vae_loss(stage.model, x, args.kl_weight, stage.rng))
    vae = stage.ema
    mu, logvar = encode(vae, images)  # of all images, once
    vae.mean.copy_(mu.mean(0))
    vae.std.copy_((mu.var(0) + logvar.exp().mean(0)).sqrt())  # Var z = Var µ + E v
    args.state["networks"]["vae"] = vae.state_dict()
    draw_vae(args, vae)
    model = models["diffusion"]
    stage = common.Stage(args, "diffusion", model, args.epochs, args.lr, mu, logvar)
    for mu, logvar in stage:
        noise = torch.randn(mu.shape, generator=stage.rng, device=mu.device)
        x0 = vae.to_latent(mu, logvar, noise)  # vs 01: x_0 is a latent
        stage.step(diffusion_loss(stage.net, schedule, x0, rng=stage.rng))
    return {"diffusion": stage.ema, "vae": vae}


@torch.no_grad()
def draw_vae(args, vae: VAE) -> None:
    """What the VAE does with test digits: reconstructions, walks between them, a map of them."""
    x, labels = common.load_digits(args, train=False)
    mu, logvar = encode(vae, x)
    x_hat = torch.cat([vae.decode(part) for part in mu.split(1000)])
    error, kl = ((x_hat - x) / 2).square().mean(), kl_divergence(mu, logvar).mean()
    print(f"VAE on test digits: mean squared error {error:.4f} of pixels in [0, 1], KL {kl:.1f} "
          f"nats, {(mu.var(0) < 0.01).sum()} of 64 numbers unused")
    weights = torch.linspace(0, 1, 10, device=x.device)[:, None]
    walks = [vae.decode((1 - weights) * mu[i] + weights * mu[i + 1]) for i in range(0, 8, 2)]
    title = f"Test digits and their reconstructions (error {error:.4f}); walks between two latents"
    common.save_grid(torch.cat([x[:10], x_hat[:10], *walks]), args.out_dir / "samples_vae.png",
                     title, 10, rows=["test digits", "reconstructions", *["walk"] * 4])
    axes = torch.linalg.svd((mu - mu.mean(0)).cpu(), full_matrices=False).Vh[:2]
    spots, labels = ((mu - mu.mean(0)).cpu() @ axes.T)[:2000], labels[:2000].cpu()
    by_digit = {str(d): spots[labels == d].T.tolist() for d in range(10)}
    common.save_plot(args.out_dir / "latent_map.png", by_digit, style=".", xlabel="first component",
                     title="2,000 test digits in the latent: two principal components",
                     ylabel="second component")


# ------------------------------------------------------------------------ figures and timings


@torch.no_grad()
def make_figures(args, diffusion: nn.Module, vae: VAE) -> None:
    """16 digits from the same noise by every sampler: pictures, timings, and sets for 05."""
    net = common.as_function(diffusion, args, sampling=True)
    schedule = make_schedule(args.timesteps)
    x_T = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(args.seed))
    x_T = x_T.to(args.device)  # drawn on the CPU: the same noise on every device
    draw_path(args, vae, partial(ddim_sample, net, schedule, x_T, args.ddim_steps))

    def ddim(x: Tensor, rng) -> Tensor:  # vs 01: every sampler ends in the decoder
        return vae.to_images(ddim_sample(net, schedule, x, args.ddim_steps))

    def ddpm(x: Tensor, rng) -> Tensor:
        return vae.to_images(ddpm_sample(net, schedule, x, rng))

    samplers = [({"name": "the VAE alone", "method": "VAE prior", "sampler": "decoder", "steps": 1},
                 lambda x, rng: vae.decode(x.flatten(1)))]
    for name, n, sample in (("DDIM", args.ddim_steps, ddim), ("DDPM", args.timesteps, ddpm)):
        made = {"name": f"{name}, {n} steps", "method": "latent diffusion"}
        samplers.append((made | {"sampler": name, "steps": n}, sample))
    common.measure(args, samplers, x_T, "Columns share their noise; every row ends in the decoder")


def draw_path(args, vae: VAE, sample) -> None:
    """Sampling through time as a moving picture: x_t and below it x̂_0, both decoded."""
    path = []  # (t, x_t, x̂_0) at every step
    sample(trace=lambda *state: path.append(state))
    film = [vae.to_images(torch.cat([x_t[:8], x0_hat[:8]]))
            for _, x_t, x0_hat in [*path[::4], path[-1]]]
    common.save_gif(film, args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        ready = args.sample_only
        models = common.load_networks(args.state, make_models(args)) if ready else train(args)
        make_figures(args, **models)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume continues from {args.checkpoint} if an epoch was finished")
    print(f"pictures, timings and weights are in {args.out_dir}")


if __name__ == "__main__":
    main()
