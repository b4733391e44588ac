"""Rectified flow in the latent of a VAE: few steps, and each of them small.

02 made the steps of diffusion cheap, by taking them in 64 numbers instead of 784 pixels; 04 made
them few, by straight ways and a reflow. Here is both: the flow of 04 in the latent of 02. The
latents of digits lie nearer to the noise than images do, so their ways bend less to begin with.

    VAE and its loss, and the latents x_1 = (z - mean) / std, as in 02
    x_t, loss, Euler's method, reflow and straightness as in 04

    paper           code                      shape
    x_0 = X_0, Z_0  x0, noise                 (B, 1, 8, 8)
    x_1 = X_1, Z_1  x1, latents               (B, 1, 8, 8), mean 0 and standard deviation 1
    t               t                         (B,) from 0, noise, to 1, data: against 02's
    v = v_θ(x_t, t) v = model(x_t, t)         (B, 1, 8, 8)

    python 04b_latent_rflow.py                     VAE, flow, pairs, reflow; sample, time, draw
    python 04b_latent_rflow.py --vae runs/02_latent_diffusion/vae.pt      with the VAE of 02
    python 04b_latent_rflow.py --sample-only       redo all figures, no training
    python 04b_latent_rflow.py --fast-dev          all of it in seconds

Measured on one core of an Intel Xeon with AVX-512 (torch 2.14.1): the VAE of 02, --pairs 30000
--pair-steps 10 --reflow-epochs 8, else as it is; flow 21 minutes, pairs 6, reflow 8.
Fréchet distance, 5,000 samples by 05_compare.py (training digits 0.058), and straightness S:
    Euler steps     1      2      5      10      S
    flow            40.3   2.82   1.17   0.923   0.40
    reflow          1.17   1.03   0.905  0.849   0.0036
One step after the reflow is as good as five before it, and many steps lose almost nothing.
Tried, width 32, ten epochs of flow, five of reflow on 30,000 pairs, with 1, 2, 5, 10 steps: flow
with logit-normal t 36.4, 2.65, 1.27, 1.05, uniform 47.7, 4.34, 1.65, 1.31; reflow with u-shaped t
1.49, 1.30, 1.14, 1.08, half-at-0 1.35, 1.22, 1.08, 1.03 (half of the pairs real), 1.33, 1.21, 1.08,
1.02 (none); with the absolute error 1.34, 1.20, 1.05, 0.99; seven epochs half-at-0 1.32, 1.21,
1.07, 1.02; five, and two all-at-0, 1.28, 1.14, 1.01, 0.95; seven all-at-0 1.25, 0.87, 1.01, 1.17.
"""

import json
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import Downsample, ResBlock, SelfAttention, Upsample


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(
        __file__, "Rectified flow and reflow in a latent.", epochs=10, batch_size=128, lr=2e-3
    )
    add = parser.add_argument
    add("--vae", type=Path, metavar="FILE", help="take the VAE of this vae.pt, made by 02")
    add("--vae-epochs", type=int, default=20, help="passes over the training images for the VAE")
    add("--vae-lr", type=float, default=2e-3, help="peak learning rate for the VAE")
    add("--kl-weight", type=float, default=0.05, help="β, weight of the KL divergence in its loss")
    add("--width", type=int, default=64, help="channels at 8x8; twice as many at 4x4 and 2x2")
    add("--blocks", type=int, default=1, help="residual blocks a level, down and up")
    add("--ema-decay", type=float, default=0.999, help="decay of the weights' moving average")
    add("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 100], help="Euler steps to sample by")
    add("--flow-t", choices=T_DENSITIES, default="logit-normal", help="density of t in training")
    add("--reflow-t", choices=T_DENSITIES, default="half-at-0", help="the same for the reflow")
    add("--pairs", type=int, default=60_000, help="noises to carry forwards through the flow")
    add("--real-pairs", type=int, default=0, help="latents to carry backwards through it")
    add("--pair-steps", type=int, default=20, help="steps on the way, each of two network calls")
    add("--reflow-epochs", type=int, default=10, help="passes over all the pairs")
    add("--reflow-lr", type=float, default=1e-3, help="peak learning rate of the reflow")
    tiny = {"epochs": 2, "vae_epochs": 2, "batch_size": 32, "train_images": 256, "width": 8,
            "steps": [1, 2, 5], "pairs": 256, "real_pairs": 128, "pair_steps": 3,
            "reflow_epochs": 2, "eval_samples": 20}
    args = common.parse(parser, argv, fast_dev=tiny, shape=["width", "blocks"])
    if (args.sample_only or args.export) and "flow" not in args.saved:
        sys.exit(f"{args.checkpoint} ends before the reflow's stage: go on with --resume")
    if args.width % 8:
        parser.error(f"--width {args.width}: must be a multiple of 8, for the group norms")
    if min(args.steps) < 1:
        parser.error(f"--steps {min(args.steps)}: at least 1")
    if args.batch_size > args.pairs + args.real_pairs:
        parser.error(f"--batch-size {args.batch_size}: more than there will be pairs")
    if args.real_pairs > args.train_images:
        parser.error(f"--real-pairs {args.real_pairs}: there are {args.train_images} images")
    return args


# ------------------------------------------- the VAE and its loss, word for word those of 02


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


@torch.no_grad()
def encode(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """µ and log σ², (N, 64) each, of all images."""
    mu, logvar = zip(*(vae.encode(part) for part in images.split(1000)))
    return torch.cat(mu), torch.cat(logvar)


# ---------------------------------------------------------------------------------- network


class UNet(nn.Module):
    """v_θ(x_t, t): (B, 1, 8, 8), (B,) in [0, 1] -> (B, 1, 8, 8). vs 04: smaller maps."""

    def __init__(self, width: int = 32, blocks: int = 1):
        super().__init__()
        c1, c2, c_time = width, 2 * width, 4 * width
        self.c_time = c_time
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
        emb = self.time(common.timestep_embedding(1000 * t, self.c_time))
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
    return UNet(args.width, args.blocks).to(args.device, memory_format=args.layout)


# ----------------------------------------------------------------------------------- method

T_DENSITIES = {  # t in [0, 1] from uniform u: the inverse of the density's integral
    "uniform": lambda u: u,
    # Esser et al. 2024, Eq. 19: sigmoid of a normal number, most often near the middle
    "logit-normal": lambda u: torch.special.ndtri(u).sigmoid(),
    # after Lee et al. 2024, section 4: density ∝ cosh(4 (2t - 1)), most often near the ends
    "u-shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(4)) / 8,
    # every other t is 0, where the one step of a one-step sampler is taken; the rest is u-shaped
    "half-at-0": lambda u: T_DENSITIES["u-shaped"]((2 * u - 1).clamp(min=0)),
    "all-at-0": lambda u: 0 * u,  # the distillation of Liu et al., for one step alone
}


def flow_loss(model, x0: Tensor, x1: Tensor, t: Tensor, error=F.mse_loss) -> Tensor:
    """Liu et al. 2022, Eq. 1: mean squared error of the velocity on the line from x0 to x1.

    x0, noise, and x1, data: (B, ...); t: (B,) in [0, 1]. A scalar. Where lines cross, only the
    squared `error` makes the network their mean, and so a flow; where they do not, any error does.
    """
    t_ = t.view(-1, *[1] * (x0.dim() - 1))
    x_t = (1 - t_) * x0 + t_ * x1
    return error(model(x_t, t).float(), x1 - x0)


# --------------------------------------------------------------------------------- samplers


@torch.no_grad()
def euler_sample(model, x0: Tensor, steps: int, backwards=False, heun=False, trace=None) -> Tensor:
    """From noise x0 (B, ...) along dx = v dt to an image, in equal steps of t from 0 to 1.

    backwards: from an image, in place of x0, to its noise, t from 1 to 0. heun: the mean of the
    velocities at both ends of a step, for two calls a step (Heun's method, of second order).
    `trace(t, x_t, v)`, if given, sees every step.
    """
    x, times = x0, torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    for t, s in tqdm(list(pairwise(times[::-1] if backwards else times)), "flow", leave=False,
                     delay=2):
        v = model(x, torch.full((len(x),), t, device=x.device))
        if trace:
            trace(t, x, v)
        if heun:
            v = (v + model(x + (s - t) * v, torch.full((len(x),), s, device=x.device))) / 2
        x = x + (s - t) * v
    return x


def straightness(model, x0: Tensor, steps: int) -> float:
    """Liu et al. 2022, as a mean over pixels, from noise x0 (B, ...) by Euler's steps: the
    mean squared difference of the velocity from x1 - x0; 0 where one step is enough."""
    velocities = []
    x1 = euler_sample(model, x0, steps, trace=lambda t, x, v: velocities.append(v))
    return torch.stack([(x1 - x0 - v).square().mean() for v in velocities]).mean().item()


# --------------------------------------------------------------------------------- training


def make_pairs(model, n: int, steps: int, rng: torch.Generator, device="cpu", latents=None):
    """n pairs (x0, x1), (n, 1, 8, 8) each, that the flow joins: noise from `rng` carried on to
    latents, or real latents (n, ...) carried back to noise, by `steps` of Heun's method.

    Liu et al. 2022 (reflow), and for the latents Lee et al. 2024, section 4.
    """
    start = torch.randn(n, 1, 8, 8, generator=rng).to(device) if latents is None else latents
    parts = start.split(100 if start.device.type == "cpu" else 1000)
    end = [euler_sample(model, x, steps, latents is not None, heun=True) for x in parts]
    return (start, torch.cat(end)) if latents is None else (torch.cat(end), start)


def load_pairs(args, flow: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, half precision on the device; each thousand is made once and kept as a file."""
    net, folder, pairs = common.for_sampling(flow, args), args.out_dir / "pairs", []
    folder.mkdir(exist_ok=True)
    chunks = [(kind, n, min(n + 1000, size))
              for kind, size in (("noise", args.pairs), ("latent", args.real_pairs))
              for n in range(0, size, 1000)]
    for kind, n, end in tqdm(chunks, "pairs, in thousands"):
        path = folder / f"{kind}_{n}_to_{end}_by_{args.pair_steps}_steps_{args.seed}.pt"
        if not path.exists():
            rng = torch.Generator().manual_seed(args.seed + 1000 + n)
            real = latents[n:end] if kind == "latent" else None
            x0, x1 = make_pairs(net, end - n, args.pair_steps, rng, args.device, real)
            common.save(path, {"x0": x0.half().cpu(), "x1": x1.half().cpu()})
        pairs.append(torch.load(path, map_location=args.device, weights_only=True))
    return tuple(torch.cat([pair[side] for pair in pairs]) for side in ("x0", "x1"))


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
        for batch in common.batches(*data, args.batch_size, rng):
            with torch.autocast(args.device, torch.bfloat16, "amp" in args.speed):
                loss = loss_of(net, *batch, rng)
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


def train(args) -> tuple[VAE, nn.Module, nn.Module, list]:
    """Train the VAE, the flow, and the reflow on pairs; the three EMA networks and the history."""
    images, labels = common.load_digits(args)
    history = args.saved["history"] if args.resume else []
    torch.manual_seed(args.seed)
    vae = VAE().to(args.device, memory_format=args.layout)
    there = args.saved if args.resume else {}
    if args.vae and "vae" not in there:
        there = common.load_checkpoint(args.vae, "02_latent_diffusion")
    if "vae" in there:
        vae.load_state_dict(there["vae"])
        vae.eval()
    else:
        vae = fit(args, history, "VAE", args.vae_epochs, args.vae_lr, vae, (images, labels),
                  lambda net, x, _, rng: vae_loss(net, x, rng, args.kl_weight), done={})
        mu, logvar = encode(vae, images)
        vae.mean.copy_(mu.mean(0))
        vae.std.copy_((mu.var(0) + logvar.exp().mean(0)).sqrt())  # Var z = Var µ + E σ²
    moments = torch.cat(encode(vae, images), dim=1)  # µ and log σ², (N, 128): encoded only once

    def latents(moments: Tensor, rng) -> Tensor:
        mu, logvar = moments.chunk(2, dim=1)
        return vae.to_latent(mu, logvar, torch.randn(mu.shape, generator=rng, device=mu.device))

    def draw_t(density: str, n: int, rng) -> Tensor:
        return T_DENSITIES[density](torch.rand(n, generator=rng, device=args.device))

    def of_latents(net, moments: Tensor, _, rng) -> Tensor:
        x1 = latents(moments, rng)
        x0 = torch.randn(x1.shape, generator=rng, device=args.device)
        return flow_loss(net, x0, x1, draw_t(args.flow_t, len(x1), rng))

    def of_pairs(net, x0: Tensor, x1: Tensor, rng) -> Tensor:
        t = draw_t(args.reflow_t, len(x1), rng)
        return flow_loss(net, x0.float(), x1.float(), t, error=F.l1_loss)

    torch.manual_seed(args.seed)
    flow = make_model(args)
    if args.resume and "flow" in args.saved:
        flow.load_state_dict(args.saved["flow"])
    else:
        before, data = len(history), (moments, labels)
        flow = fit(args, history, "flow", args.epochs, args.lr, flow, data, of_latents,
                   done={"vae": vae})
        if len(history) > before:
            shutil.rmtree(args.out_dir / "pairs", ignore_errors=True)  # of another flow
    real = latents(moments, torch.Generator(args.device).manual_seed(args.seed))
    pairs = load_pairs(args, flow, real)
    model = make_model(args)
    model.load_state_dict(flow.state_dict())
    reflow = fit(args, history, "reflow", args.reflow_epochs, args.reflow_lr, model, pairs,
                 of_pairs, done={"vae": vae, "flow": flow})
    return vae, flow, reflow, history


# ------------------------------------------------------------------------ figures and timings


@torch.no_grad()
def make_figures(args, vae: VAE, flow: nn.Module, reflow: nn.Module, history: list) -> None:
    """Before and after the reflow, by few and many steps: pictures, timings, and sets for 05."""
    nets = {"latent flow": common.for_sampling(flow, args),
            "latent reflow": common.for_sampling(reflow, args)}
    x0 = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(args.seed))
    x0 = x0.to(args.device)  # drawn on the CPU: the same noise on every device
    draw_paths(args, vae, nets, x0)
    lines = {}
    for stage, unit in (("VAE", "nats an image"), ("flow", "squared error of the velocity"),
                        ("reflow", "absolute error of the velocity")):
        if epochs := [x for x in history if x["stage"] == stage]:  # no VAE's, with --vae
            lines[f"{stage}: {unit}"] = ([x["epoch"] for x in epochs], [x["loss"] for x in epochs])
    common.save_plot(args.out_dir / "loss.png", lines, title="VAE, flow and reflow: training",
                     xlabel="epoch", ylabel="loss", yscale="log")

    def decoded(net, steps: int):
        return lambda x0: vae.to_images(euler_sample(net, x0, steps))

    timings = common.training_report(args, reflow, history) | {"samplers": []}
    timings["straightness"] = {name: straightness(net, x0, 100) for name, net in nets.items()}
    print("straightness (0 is straight):", timings["straightness"])
    samplers = [({"method": method, "sampler": "Euler", "steps": n}, decoded(net, n))
                for method, net in nets.items() for n in sorted({*args.steps})]
    rows = {}
    for made, sample in samplers:
        images, timing = common.time_sampler(sample, x0, large_on_cpu=8)
        timings["samplers"].append(made | timing)
        name = f"{made['method']}, {made['steps']}"
        print(f"{name} steps: {len(x0)} digits in {timing['seconds']:.3f} s; "
              f"{timing['images_per_second']:.1f} images/s")
        rows[name] = images[:10]
    (args.out_dir / "timings.json").write_text(json.dumps(timings, indent=1))
    title = "By Euler's method with so many steps, before and after one reflow; a column, a noise"
    common.save_grid(torch.cat([*rows.values()]), args.out_dir / "samples_steps.png", title,
                     columns=10, rows=[*rows])
    for made, sample in samplers if args.eval_samples else ():
        name = f"{made['method'].split()[-1]}_euler_{made['steps']}"
        common.save_eval(args, name, sample, (1, 8, 8), seed=args.seed, **made)


def draw_paths(args, vae: VAE, nets: dict, x0: Tensor) -> None:
    """Sixteen latents on their way, decoded, as a moving picture: before | after the reflow."""
    films = []
    for net in nets.values():
        path = []
        path.append(euler_sample(net, x0, 30, trace=lambda t, x, v, path=path: path.append(x)))
        films.append([vae.to_images(x).unflatten(0, (4, 4)) for x in path])
    wall = torch.ones_like(films[0][0][:, :1])
    frames = [torch.cat([one, wall, two], dim=1).flatten(0, 1) for one, two in zip(*films)]
    common.save_gif(frames, args.out_dir / "path.gif", columns=9)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.export:
        return common.export_weights(args, "vae", "flow", "ema")
    try:
        if args.sample_only:
            flow, reflow, history = make_model(args), make_model(args), args.saved["history"]
            vae = VAE().to(args.device).eval()
            vae.load_state_dict(args.saved["vae"])
            flow.load_state_dict(args.saved["flow"])
            reflow.load_state_dict(args.saved["ema"])
        else:
            vae, flow, reflow, history = train(args)
        make_figures(args, vae, flow, reflow, history)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume goes on from {args.checkpoint}, if an epoch was finished")
    print(f"pictures, timings and weights are in {args.out_dir}")


if __name__ == "__main__":
    main()
