"""Latent diffusion on MNIST: a VAE shrinks images to 64 numbers; diffusion works on those.

Most pixels say little, yet diffusion in pixels works on all of them in every step. So a
variational autoencoder (VAE) first learns to turn an image into 64 numbers, its latent, and
back. Its encoder q gives means µ and variances σ², its decoder p rebuilds the image from
a random z ~ N(µ, σ²), so all z near µ must decode to about this image. A KL divergence (0
only for equals) pulls each N(µ, σ²) to N(0, I). As its weight w is only 0.05, images stay sharp,
but few z from N(0, I) decode to digits. So stage two trains the diffusion of 01 on latents.

    q(z|x)   = N(µ, diag σ²),  z = µ + σ e,  e ~ N(0, I)    Kingma & Welling 2014, section 3
    VAE loss = -log p(x|z) + w KL(q(z|x) ‖ N(0, I))         w = 1: minus their Eq. 10
    x_0 = (z R - mean) / std, R: see below; x_t, v, loss, samplers, learning: as in 01

    paper           code                      shape
    µ, log σ², z, e mu, logvar, z, e          (B, 64)
    x_0, x_t, ε, v  x0, x_t, noise, v         (B, 1, 8, 8); x_0 standardised, like ε

Why 1x8x8, and why R? Convolutions expect a grid whose neighbours belong together, as in the
latents of Rombach et al. 2022. A linear layer has no order. After a rotation R, each number
of z R changes mainly one place of the image. (After 3 epochs: half the Fréchet distance.)

    python 02_latent_diffusion.py                  two hours on a core of an Intel Xeon
    python 02_latent_diffusion.py --sample-only    your last run's weights, or ours

Fréchet distance (05; 5,000 by DDIM-100; mean of three seeds): 0.201; of 01 0.153.
"""

import copy
import math
import time
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import common
from common import COUNT, Attention, Between, ResBlock


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Latent diffusion.", epochs=40, lr=7e-4)
    add = parser.add_argument
    add("--vae-epochs", **COUNT, default=20, help="passes over the images for the VAE")
    add("--kl-weight", type=float, choices=Between(0), default=0.05, help="w, of the divergence")
    add("--width", type=int, choices=[8, 16, 32, 64], default=64, help="channels at 8x8")
    add("--timesteps", type=int, choices=Between(2), default=1000, help="T, from latent to noise")
    add("--ddim-steps", **COUNT, default=100, help="network calls of DDIM")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 8, "timesteps": 20, "ddim_steps": 10, "vae_epochs": 4, "eval_samples": 20}
    args = common.parse(parser, argv, tiny, sampling=["ddim_steps"])
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2, for the VAE's batch norms")
    if args.ddim_steps > args.timesteps:
        parser.error(f"--ddim-steps: at most --timesteps {args.timesteps}")
    return args


def conv_block(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> latents (B, 64) -> images. Kingma & Welling 2014.
    R (64, 64), a rotation, and mean and std (64,) of z R are set after the training."""
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(  # channels in and out, kernel, stride, padding
            conv_block(nn.Conv2d(1, 16, 3, 2, 1)),  # (B, 16, 14, 14)
            conv_block(nn.Conv2d(16, 32, 3, 2, 1)),  # (B, 32, 7, 7)
            conv_block(nn.Conv2d(32, 64, 7)))  # (B, 64, 1, 1)
        self.fc_mu, self.fc_logvar, self.fc_decode = (nn.Linear(64, 64) for _ in range(3))
        self.decoder = nn.Sequential(  # ..., padding, output padding
            conv_block(nn.ConvTranspose2d(64, 32, 7)),  # (B, 32, 7, 7)
            conv_block(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1)),  # (B, 16, 14, 14)
            nn.ConvTranspose2d(16, 1, 3, 2, 1, 1))  # (B, 1, 28, 28)
        self.register_buffer("R", torch.eye(64))
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("std", torch.ones(64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """µ and log σ² of q(z | x), (B, 64) each."""
        h = self.encoder(x).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)

    def logits(self, z: Tensor) -> Tensor:
        return self.decoder(self.fc_decode(z)[:, :, None, None])  # (B, 1, 28, 28)

    def decode(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid() * 2 - 1  # from probabilities of white to [-1, 1]

    def sample_z(self, mu: Tensor, logvar: Tensor, rng=None) -> Tensor:
        """z = µ + σ e, a sample of q(z | x): the reparameterisation trick."""
        e = torch.randn(mu.shape, generator=rng, device=mu.device)
        return mu + (logvar / 2).exp() * e

    def to_latent(self, mu: Tensor, logvar: Tensor, rng=None) -> Tensor:
        """z ~ q(z | x), rotated by R and standardised, as (B, 1, 8, 8)."""
        return ((self.sample_z(mu, logvar, rng) @ self.R - self.mean) / self.std).view(-1, 1, 8, 8)

    def to_images(self, latent: Tensor) -> Tensor:
        return self.decode((latent.flatten(1) * self.std + self.mean) @ self.R.T)  # and back


@torch.no_grad()
def encode_all(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """µ and log σ², (N, 64) each, of all images."""
    parts = [vae.encode(part) for part in images.split(1000)]
    return torch.cat([mu for mu, _ in parts]), torch.cat([logvar for _, logvar in parts])


class UNet(nn.Module):
    """x_t (B, 1, H, W), H and W multiples of 4, t (B,) from 0 to t_max -> v (B, 1, H, W)."""
    def __init__(self, width: int, t_max: float):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 2 * width, 4 * width  # vs 01: a smaller middle
        self.c_time, self.time_scale = c_time, 1000 / t_max  # embed times up to 1000
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(),
                                  nn.Linear(c_time, c_time), nn.SiLU())
        self.conv_in = nn.Conv2d(1, c1, 3, padding=1)
        self.down0 = ResBlock(c1, c1, c_time)
        self.down0_to_1 = nn.Conv2d(c1, c1, 3, stride=2, padding=1)
        self.down1 = ResBlock(c1, c2, c_time)
        self.down1_attention = Attention(c2)
        self.down1_to_mid = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c3, c3, c_time)
        self.mid_attention = Attention(c3)
        self.mid2 = ResBlock(c3, c3, c_time)
        self.mid_to_up0 = nn.Conv2d(c3, c2, 3, padding=1)
        self.up0 = ResBlock(2 * c2, c2, c_time)
        self.up0_attention = Attention(c2)
        self.up0_to_1 = nn.Conv2d(c2, c1, 3, padding=1)
        self.up1 = ResBlock(2 * c1, c1, c_time)
        self.norm_out = common.GroupNorm(8, c1)
        self.conv_out = nn.Conv2d(c1, 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # a fresh network predicts a constant

    @common.in_bfloat16  # where that is fast
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
        h0 = self.down0(self.conv_in(x), emb)  # (B, c1, H, W)
        h1 = self.down1_attention(self.down1(self.down0_to_1(h0), emb))  # (B, c2, H/2, W/2)
        h = self.mid1(self.down1_to_mid(h1), emb)  # (B, c3, H/4, W/4)
        h = self.mid2(self.mid_attention(h), emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0_attention(self.up0(torch.cat([h, h1], dim=1), emb))
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(width: int, timesteps: int, device: str = "cpu") -> dict[str, nn.Module]:
    model = UNet(width, timesteps).to(device, memory_format=torch.channels_last)
    return {"diffusion": model, "vae": VAE().to(device)}


def blob_rotation(decode, mean: Tensor) -> Tensor:
    """The rotation (or reflection) R (64, 64): then each number of z R draws its own place.
    D (64, 784), the decoder's derivative at the mean z (64,): row i is what number i of z draws.
    z D = (z R) (RᵀD), so number j of z R draws row j of RᵀD. Let that be near G, blobs on a grid:
    with D Gᵀ = U S Vᵀ, ‖RᵀD - G‖ is least for R = U Vᵀ (Schönemann 1966: Procrustes problem)."""
    D = torch.autograd.functional.jacobian(lambda z: decode(z[None]).flatten(), mean).T.cpu()
    pixels, middles = torch.arange(28.0), torch.linspace(5, 22, 8)  # where digits have ink
    bump = torch.exp(-0.5 * ((pixels - middles[:, None]) / 2.5) ** 2)  # (8, 28)
    G = F.normalize(torch.einsum("iy,jx->ijyx", bump, bump).reshape(64, 784))
    U, _, Vh = torch.linalg.svd(D @ G.T)
    return U @ Vh


def vae_loss(vae: VAE, x: Tensor, kl_weight: float) -> Tensor:
    """Minus Kingma & Welling 2014, Eq. 10, but with a weight w; in nats per image, by one z.
    -log p: cross-entropy of the decoder's probabilities of white and (x+1)/2 (appendix C.1)."""
    mu, logvar = vae.encode(x)
    logits = vae.logits(vae.sample_z(mu, logvar))
    nll = F.binary_cross_entropy_with_logits(logits, (x + 1) / 2, reduction="none").sum((1, 2, 3))
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)  # KL(q(z|x) ‖ N(0, I)), appendix B
    return (nll + kl_weight * kl).mean()


class Schedule(NamedTuple):
    """How much noise there is at each t, (T,) each."""
    betas: Tensor  # β_t, float64 on the CPU: the samplers read single numbers
    alphas: Tensor  # α_t = 1 - β_t
    alpha_bars: Tensor  # ᾱ_t, the product of all α up to t
    signal_scale: Tensor  # √ᾱ_t, float32 on the device, for training
    noise_scale: Tensor  # √(1-ᾱ_t)


def make_schedule(timesteps: int, device: str = "cpu") -> Schedule:
    """The cosine schedule: √ᾱ_t = cos φ_t, √(1-ᾱ_t) = sin φ_t, with φ_t evenly spaced (after
    Nichol & Dhariwal 2021, Eq. 17), from 0.01 to π/2 - 0.01 for any T. So at t = 0 a little noise
    is left, as the samplers divide by 1-ᾱ_t, and 1% of the image at t = T-1, under noise."""
    phi = torch.linspace(0.01, math.pi / 2 - 0.01, timesteps, dtype=torch.float64)
    alpha_bars = phi.cos() ** 2  # ᾱ_t comes first; α_t and β_t follow from it
    alphas = alpha_bars / torch.cat([torch.ones(1), alpha_bars[:-1]])  # ᾱ_{-1} = 1
    signal, noise = phi.cos().float(), phi.sin().float()
    return Schedule(1 - alphas, alphas, alpha_bars, signal.to(device), noise.to(device))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t in one step: Ho et al. 2020, Eq. 4. x0, noise: (B, 1, H, W); t: (B,) in 0 ... T-1."""
    signal_scale = schedule.signal_scale[t].view(-1, 1, 1, 1)  # one for each image
    noise_scale = schedule.noise_scale[t].view(-1, 1, 1, 1)
    return signal_scale * x0 + noise_scale * noise


def diffusion_loss(model, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Ho et al. 2020, Algorithm 1, but for v: the mean squared error of the prediction.
    x0, noise: (B, 1, H, W); t: (B,) in 0 ... T-1."""
    x_t = q_sample(schedule, x0, t, noise)
    v = q_sample(schedule, noise, t, -x0)  # roles swapped: √ᾱ_t ε - √(1-ᾱ_t) x_0
    return F.mse_loss(model(x_t, t), v)


def ddim_pairs(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """(t, next t), evenly from T-1 down to -1 (x_0). 100 of 1000: (999, 989) ... (9, -1)."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM takes 1 to {timesteps} steps, not {steps}")
    times = torch.linspace(timesteps - 1, -1, steps + 1, dtype=torch.float64).round().int()
    return list(pairwise(times.tolist()))


@torch.no_grad()
def ddim_sample(model, schedule: Schedule, x_T: Tensor, steps: int, eta=0.0, rng=None,
                trace=None) -> Tensor:
    """Song et al. 2021, Eq. 12: `steps` steps from noise x_T (B, ...) to x_0. eta = 0 draws no
    noise; up to 1, fresh noise replaces a part of ε̂ (Eq. 16); eta = 1 with steps = T is DDPM.
    `trace(t, x_t, x0_hat)`, if given, sees every step."""
    x, alpha_bars = x_T, [*schedule.alpha_bars.tolist(), 1.0]  # so index -1 has no noise
    pairs = ddim_pairs(len(schedule.betas), steps)
    for t, t_next in tqdm(pairs, "DDIM", leave=False, delay=2):
        ab, ab_next = alpha_bars[t], alpha_bars[t_next]
        v_hat = model(x, torch.full((len(x),), t, device=x.device))
        x0_hat = ab**0.5 * x - (1 - ab) ** 0.5 * v_hat
        eps_hat = (1 - ab) ** 0.5 * x + ab**0.5 * v_hat
        if trace:
            trace(t, x, x0_hat)
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)) ** 0.5  # Eq. 16
        x = ab_next**0.5 * x0_hat + (1 - ab_next - sigma**2) ** 0.5 * eps_hat
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=rng, device=x.device)
    return x


def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None) -> Tensor:
    """vs 01: DDPM is DDIM with all T steps and η = 1; a test compares the two."""
    return ddim_sample(model, schedule, x_T, len(schedule.betas), eta=1.0, rng=rng)


def fit(args, state, name, model, loss, data, test, epochs, lr, draw=None) -> nn.Module:
    """Trains `model` so that loss(model, *batch) falls; returns an average of its weights.
    data, test: lists of tensors, one row per image; draw(network) -> ten images to see."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # moving average
    large = [w for w in model.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]
    small = [w for w in model.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]
    muon_lr, adamw_lr = torch.zeros(2, device=args.device)  # tensors: step() sees changes
    muon = common.Muon(large, muon_lr, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW(small, adamw_lr, weight_decay=0.01, fused=True, capturable=True)
    learned = [ema, model, muon, adamw]
    done = common.restore(state, name, epochs, learned)  # epochs of a checkpoint, or 0
    batches = len(data[0]) // args.batch_size or 1  # full ones in an epoch
    total = epochs * batches
    averages, weights = ([x for x in net.state_dict().values() if x.is_floating_point()]
                         for net in (ema, model))

    def step(*batch: Tensor) -> Tensor:
        """On CUDA recorded and replayed: only work for the GPU may stand here."""
        value = loss(model, *batch)
        model.zero_grad()
        value.backward()
        muon.step()
        adamw.step()
        return value.detach()

    step = common.recorded(step, args, one_shape=True)
    with tqdm(total=total, initial=done * batches, desc=name, mininterval=1) as bar:
        for epoch in range(done, epochs):
            torch.manual_seed(epoch + 1000 * args.seed)  # so a resumed run is the same
            order = torch.randperm(len(data[0]), device=args.device).split(args.batch_size)
            losses, start = [], time.perf_counter()
            for chosen in order[:batches]:
                i = epoch * batches + len(losses)
                rate = lr * min((i + 1) / min(200, total / 10), 1) * (1 - i / total)
                muon_lr.fill_(10 * rate)  # up for at most 200 steps, then down to 0
                adamw_lr.fill_(rate)
                losses.append(step(*[part[chosen] for part in data]))
                average = get_ema_multi_avg_fn(1 - 10 / (i + 10))  # Karras et al. 2024
                average(averages, weights, None)  # over a tenth of the steps (Eq. 127)
                if bar.update():  # once a second: reading a loss makes a GPU wait
                    bar.set_postfix(loss=torch.stack(losses[-100:]).mean().item())
            common.keep_epoch(args, state, name, learned, losses, chosen, start, loss, test, draw)
    return ema


def train(args) -> dict[str, nn.Module]:
    """Trains the VAE, then the U-Net on its latents; returns the moving average of each."""
    data, test, classes = common.load_images(args)  # images and labels
    network = {"width": args.width, "timesteps": args.timesteps}
    state = common.open_run(args, network=network, classes=classes)
    schedule = make_schedule(args.timesteps, args.device)
    torch.manual_seed(args.seed)
    models = make_models(**network, device=args.device)
    noise, quick = common.noise(args, 16, 1, 8, 8)[:10], min(20, args.timesteps)
    vae = fit(args, state, "vae", models["vae"],
              lambda model, x, labels: vae_loss(model, x, args.kl_weight), data, test,
              args.vae_epochs, args.lr, draw=lambda model: model.decode(noise.flatten(1)))
    mu, logvar = encode_all(vae, data[0])
    if "diffusion" not in state["stages"]:  # else the U-Net has learned with this R: keep it
        vae.R.copy_(blob_rotation(vae.decode, mu.mean(0)))
        vae.mean.copy_((mu @ vae.R).mean(0))
        vae.std.copy_(((mu @ vae.R).var(0) + logvar.exp().mean(0) @ vae.R**2).sqrt())  # of z R
        state["stages"]["vae"]["learned"][0] = vae.state_dict()  # for the checkpoints
    draw_vae(args, vae, *test, classes)

    def loss(model, mu: Tensor, logvar: Tensor) -> Tensor:
        x0 = vae.to_latent(mu, logvar)  # vs 01: x_0 is a latent, drawn anew each time
        t = torch.randint(args.timesteps, (len(x0),), device=x0.device)
        return diffusion_loss(model, schedule, x0, t, torch.randn_like(x0))

    ema = fit(args, state, "diffusion", models["diffusion"], loss, [mu, logvar],
              encode_all(vae, test[0]), args.epochs, args.lr,
              draw=lambda model: vae.to_images(ddim_sample(model, schedule, noise, quick)))
    return {"diffusion": ema, "vae": vae}


@torch.no_grad()
def draw_vae(args, vae: VAE, x: Tensor, labels: Tensor, classes: list[str]) -> None:
    """Test images through the VAE: reconstructions, and a map of their means µ."""
    mu, _ = encode_all(vae, x)
    common.save_grid(torch.cat([x[:10], vae.decode(mu[:10])]), args.out_dir / "samples_vae.png",
                     "Through the VAE", len(x[:10]), ["test images", "reconstructions"])
    unit = torch.eye(64, device=x.device)  # 64 steps along z, a gap, 64 along z R
    steps = [unit.view(8, 8, 64), 0 * unit[:8, None], vae.R.T.reshape(8, 8, 64)]
    ends = mu.mean(0) + 2 * torch.cat(steps, dim=1).flatten(0, 1)
    drawn = vae.decode(ends) - vae.decode(mu.mean(0)[None])
    drawn /= drawn.abs().amax((1, 2, 3), keepdim=True).clamp(min=0.01)
    common.save_grid(drawn, args.out_dir / "samples_latent_order.png",
                     "What each number draws: of z on the left, of z R on the right", 17)
    mu, labels = (mu - mu.mean(0)).cpu(), labels[:2000].cpu()
    points = mu[:2000] @ torch.linalg.svd(mu, full_matrices=False).Vh[:2].T  # (2000, 2)
    by_class = {classes[i]: points[labels == i].tolist() for i in labels.unique().tolist()}
    common.save_plot(args.out_dir / "latent_map.png", by_class, ".", xlabel="component 1",
                     ylabel="component 2", title=f"Principal components of {len(points)} means µ")


@torch.no_grad()
def make_figures(args, diffusion: nn.Module, vae: VAE) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    if args.sample_only and (found := common.test_images(args)):  # only these need images
        draw_vae(args, vae, *found)
    net = common.recorded(diffusion, args)
    schedule, noise = make_schedule(args.timesteps), common.noise(args, 16, 1, 8, 8)
    path, n = [], args.ddim_steps  # (t, x_t, x̂_0) at every step
    ddim_sample(net, schedule, noise[:8], n, trace=lambda *state: path.append(state))
    film = [vae.to_images(torch.cat([x_t, x0_hat])) for _, x_t, x0_hat in path[(n - 1) % 4 :: 4]]
    common.save_gif(film, args.out_dir / "path.gif", columns=8)  # x_t, and below it x̂_0
    samplers = [({"name": "VAE alone", "method": "VAE prior", "sampler": "decoder", "steps": 1,
                  "network_calls": 1}, lambda x, rng: vae.decode(x.flatten(1)))]  # z ~ N(0, I)
    runs = [("DDIM", n, partial(ddim_sample, steps=n)), ("DDPM", args.timesteps, ddpm_sample)]
    for sampler, n, sample in runs:
        made = {"name": f"{sampler}, {n} steps", "method": "latent diffusion", "sampler": sampler,
                "steps": n, "network_calls": n}
        samplers.append((made, lambda x, rng, sample=sample: (
            vae.to_images(sample(net, schedule, x, rng=rng)))))
    common.draw_and_time(args, samplers, noise, "Columns share their noise: z in row 1, x_T below")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
