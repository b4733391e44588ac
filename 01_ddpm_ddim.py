"""DDPM and DDIM on MNIST: one network that predicts noise, sampled in two ways.

Diffusion destroys an image in T small steps of Gaussian noise until nothing of it is left. The
sum of many Gaussian steps is one Gaussian step, so any x_t can be drawn from x_0 directly, and a
network can be trained on one random t at a time to tell which noise was added. Sampling begins
with pure noise and walks back: DDPM by T random steps, each undoing one step of noise; DDIM by a
few deterministic ones, each aiming at the image that the network believes in and stopping short.
Both use the same trained network.

    q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I)                                  Ho et al. 2020, Eq. 4
    loss         = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²                  Ho, Eq. 14
    DDPM: x_{t-1} = µ̃_t(x_t, x̂_0) + √β̃_t z                                Ho, Eq. 6, 7, 11
    DDIM: x_s     = √ᾱ_s x̂_0 + √(1-ᾱ_s-σ²) ε̂ + σ z                         Song et al. 2021, Eq. 12
    with  x̂_0     = (x_t - √(1-ᾱ_t) ε̂) / √ᾱ_t                              Ho, Eq. 15

    paper           code                      shape
    x_0, x_t, ε     x0, x_t, noise            (B, 1, 28, 28), x0 in [-1, 1]
    t = 1 ... T     t = 0 ... T-1             (B,); t = -1 in the samplers is the clean image
    β_t, α_t, ᾱ_t   betas, alphas, alpha_bars (T,), float64
    ε̂ = ε_θ(x_t, t) eps = model(x_t, t)       (B, 1, 28, 28)

    python 01_ddpm_ddim.py                    train 40 epochs, sample, time, draw
    python 01_ddpm_ddim.py --sample-only      digits from the shipped weights, no training
    python 01_ddpm_ddim.py --fast-dev         all of it in seconds

Measured on two CPU cores (AMD EPYC with AVX-512): 0.64M weights, 8 epochs with --batch-size 64 in
58 minutes, loss 0.038; on a machine twice as fast, torch 2.15.0, 16 digits by DDPM in 19 s, by
DDIM-100 in 1.9 s. Fréchet distance by 05_compare.py, 1,000 samples each (training digits: 0.155):
DDIM with 10, 20, 50, 100, 250 steps 1.78, 1.19, 0.95, 0.91, 0.85; with η = 1 and 20, 100 steps
0.92, 0.65; DDPM 0.59. Some noise keeps correcting what a network makes of a short training.
Tried, with one pass over 40,000 images, 1,000 samples by DDIM-20, an earlier classifier: --lr 1e-3
29.9, 2e-3 26.4; with the linear schedule of Ho et al. 26.4, with the cosine 22.2 (so the cosine, at
2e-3), in batches of 128 instead of 64 24.7. Not clamping x̂_0 changed DDIM-20 by 2%: noise.

Left out: learned variances and importance-sampled t (Nichol & Dhariwal 2021), other targets than ε
(x_0 or v).
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
from tqdm import tqdm

import common
from common import Downsample, ResBlock, SelfAttention, Upsample


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(
        __file__, "DDPM and DDIM on MNIST.", epochs=40, batch_size=128, lr=2e-3
    )
    add = parser.add_argument
    add("--width", type=int, default=32, help="channels at 28x28; twice as many at 14x14 and 7x7")
    add("--blocks", type=int, default=1, help="residual blocks a level, down and up")
    add("--timesteps", type=int, default=1000, help="T, steps from image to noise in training")
    add("--ema-decay", type=float, default=0.999, help="decay of the weights' moving average")
    add("--ddim-steps", type=int, default=100, help="network calls of DDIM in the main figures")
    add("--ddim-sweep", type=int, nargs="+", default=[10, 20, 50, 250], help="others, to compare")
    tiny = {"epochs": 2, "batch_size": 32, "train_images": 256, "width": 8, "timesteps": 20,
            "ddim_steps": 10, "ddim_sweep": [2, 5], "eval_samples": 20}
    args = common.parse(parser, argv, fast_dev=tiny, shape=["width", "blocks", "timesteps"])
    if args.width % 8:
        parser.error(f"--width {args.width}: must be a multiple of 8, for the group norms")
    if args.timesteps < 2:
        parser.error("--timesteps 1: the cosine schedule needs two ends")
    for steps in (args.ddim_steps, *args.ddim_sweep):
        if not 1 <= steps <= args.timesteps:
            parser.error(f"DDIM takes 1 to {args.timesteps} (--timesteps) steps, not {steps}")
    return args


# ---------------------------------------------------------------------------------- network


class UNet(nn.Module):
    """ε_θ(x_t, t): (B, 1, 28, 28) and (B,) -> (B, 1, 28, 28). 0.6M weights at width 32."""

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
        h, skips = self.conv_in(x), []  # (B, c1, 28, 28)
        for block in self.down0:
            skips.append(h := block(h, emb))
        h = self.down0_to_1(h)  # (B, c1, 14, 14)
        for block, attention in zip(self.down1, self.down1_attention):
            skips.append(h := attention(block(h, emb)))  # (B, c2, 14, 14)
        h = self.down1_to_mid(h)  # (B, c2, 7, 7)
        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)
        h = self.mid_to_up0(h)  # (B, c2, 14, 14)
        for block, attention in zip(self.up0, self.up0_attention):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
        h = self.up0_to_1(h)  # (B, c1, 28, 28)
        for block in self.up1:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, 28, 28)


def make_model(args) -> UNet:
    model = UNet(args.width, args.blocks, args.timesteps)
    return model.to(args.device, memory_format=args.layout)


# ----------------------------------------------------------------------------------- method


class Schedule(NamedTuple):
    """How much noise at which t. Float64 on the CPU for the samplers, which take one number a
    step without asking the GPU; `signal` and `sigma` in float32 on the device, to train with.
    """

    betas: Tensor  # β_t, (T,)
    alphas: Tensor  # α_t = 1 - β_t
    alpha_bars: Tensor  # ᾱ_t = α_0 ⋯ α_t
    signal: Tensor  # √ᾱ_t
    sigma: Tensor  # √(1-ᾱ_t)


def make_schedule(timesteps: int, device: str = "cpu") -> Schedule:
    """The cosine schedule: √ᾱ_t = cos θ_t and √(1-ᾱ_t) = sin θ_t turn evenly from image to noise.

    Nichol & Dhariwal 2021, Eq. 17, with both ends kept 0.01 away: at t = 0 a little noise is left
    to predict, and at t = T-1, for any T, √ᾱ = 0.01 hides the image but can still be divided by.
    """
    theta = torch.linspace(0.01, math.pi / 2 - 0.01, timesteps, dtype=torch.float64)
    alpha_bars = theta.cos() ** 2
    alphas = alpha_bars / torch.cat([torch.ones(1), alpha_bars[:-1]])  # ᾱ_{-1} = 1, the image
    signal, sigma = theta.cos().float(), theta.sin().float()
    return Schedule(1 - alphas, alphas, alpha_bars, signal.to(device), sigma.to(device))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t from x_0 in one jump (Ho, Eq. 4). x0, noise: (B, ...); t: (B,) in 0 ... T-1."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return schedule.signal[t].view(shape) * x0 + schedule.sigma[t].view(shape) * noise


def diffusion_loss(model, schedule: Schedule, x0: Tensor, t=None, noise=None, rng=None) -> Tensor:
    """Ho et al. 2020, Algorithm 1 and Eq. 14: mean squared error of the predicted noise, a scalar.

    t (B,) and noise (B, 1, 28, 28) are drawn from `rng` where they are not given.
    """
    if t is None:
        t = torch.randint(len(schedule.betas), (len(x0),), generator=rng, device=x0.device)
    if noise is None:
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    return F.mse_loss(model(q_sample(schedule, x0, t, noise), t).float(), noise)


# --------------------------------------------------------------------------------- samplers


def posterior(schedule: Schedule, t: int, x_t: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020, Eq. 6 and 7: µ̃_t and β̃_t."""
    beta, alpha, ab = (float(table[t]) for table in schedule[:3])
    ab_prev = float(schedule.alpha_bars[t - 1]) if t > 0 else 1.0  # ᾱ_{-1} = 1, the image
    mean = (ab_prev**0.5 * beta * x0 + alpha**0.5 * (1 - ab_prev) * x_t) / (1 - ab)
    return mean, beta * (1 - ab_prev) / (1 - ab)


@torch.no_grad()
def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None, clamp=True, trace=None) -> Tensor:
    """Ho et al. 2020, Algorithm 2: T random steps from noise x_T (B, ...) to an image.

    Written with x̂_0, to clamp it to [-1, 1]; with clamp=False it is Algorithm 2 to the letter,
    with σ_t² = β̃_t. `trace(t, x_t, x0_hat)`, if given, sees every step.
    """
    x, timesteps = x_T, len(schedule.betas)
    for t in tqdm(reversed(range(timesteps)), "DDPM", timesteps, leave=False, delay=2):
        ab = float(schedule.alpha_bars[t])
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x0_hat = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        if clamp:
            x0_hat = x0_hat.clamp(-1, 1)
        if trace:
            trace(t, x, x0_hat)
        x, variance = posterior(schedule, t, x, x0_hat)
        if t > 0:  # the last step adds no noise
            x = x + variance**0.5 * torch.randn(x.shape, generator=rng, device=x.device)
    return x


def ddim_pairs(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """(t, next t) from T-1 down to -1, the clean image, evenly: [(999, 989), ..., (9, -1)]."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM takes 1 to {timesteps} steps, not {steps}")
    times = torch.linspace(-1, timesteps - 1, steps + 1, dtype=torch.float64).round().long()
    times = times.flip(0).tolist()
    return list(pairwise(times))


@torch.no_grad()
def ddim_sample(
    model, schedule: Schedule, x_T: Tensor, steps: int, eta=0.0, rng=None, clamp=True, trace=None
) -> Tensor:
    """Song et al. 2021, Eq. 12: `steps` steps from noise x_T (B, ...) to an image.

    eta = 0 is deterministic; eta = 1 adds the noise of Eq. 16 and with steps = T is DDPM.
    `trace(t, x_t, x0_hat)`, if given, sees every step.
    """
    x = x_T
    alpha_bars = [*schedule.alpha_bars.tolist(), 1.0]  # ᾱ_{-1} = 1, the clean image
    for t, s in tqdm(ddim_pairs(len(schedule.betas), steps), "DDIM", leave=False, delay=2):
        ab, ab_s = alpha_bars[t], alpha_bars[s]
        eps = model(x, torch.full((len(x),), t, device=x.device))
        x0_hat = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        if clamp:  # then ε̂ must be derived anew, or x̂_0 and ε̂ no longer make up x_t
            x0_hat = x0_hat.clamp(-1, 1)
            eps = (x - ab**0.5 * x0_hat) / (1 - ab) ** 0.5
        if trace:
            trace(t, x, x0_hat)
        sigma = eta * ((1 - ab_s) / (1 - ab) * (1 - ab / ab_s)) ** 0.5  # Eq. 16
        x = ab_s**0.5 * x0_hat + (1 - ab_s - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=rng, device=x.device)
    return x


# --------------------------------------------------------------------------------- training


def train(args) -> tuple[nn.Module, list]:
    """Train, with a checkpoint at each epoch's end; returns the EMA network and its history."""
    images, labels = common.load_digits(args)
    steps_per_epoch = len(images) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    schedule = make_schedule(args.timesteps, args.device)

    torch.manual_seed(args.seed)
    model = make_model(args)
    ema = common.EMA(model, args.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, fused="fused" in args.speed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(  # 200 steps up, then straight down to zero
        optimizer, lambda step: min((step + 1) / 200, 1) * max(1 - step / total_steps, 0)
    )
    rng = torch.Generator(args.device).manual_seed(args.seed)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scheduler": scheduler}
    history = common.restore(args, rng, parts) if args.resume else []
    ema.updates, scheduler.base_lrs = scheduler.last_epoch, [args.lr]  # --lr may be a new one

    net = torch.compile(model) if "compile" in args.speed else model
    progress = common.Progress(args, history, steps_per_epoch, args.epochs)
    for _ in range(progress.done, args.epochs):
        for x0, _ in common.batches(images, labels, args.batch_size, rng):
            with torch.autocast(args.device, torch.bfloat16, "amp" in args.speed):
                loss = diffusion_loss(net, schedule, x0, rng=rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ema.update(model)
            progress.step(loss)
        progress.end_epoch(scheduler.get_last_lr()[0])
        common.save_checkpoint(args, history, rng, parts)
    progress.bar.close()
    draw_loss_by_t(args, ema.model, schedule)
    return ema.model, history


@torch.no_grad()
def draw_loss_by_t(args, model: nn.Module, schedule: Schedule) -> None:
    """The loss in each tenth of the timesteps, on 256 test digits: where the difficulty lies."""
    x0 = common.load_digits(args, train=False)[0][:256]
    rng = torch.Generator(args.device).manual_seed(args.seed)
    noise = torch.randn(x0.shape, generator=rng, device=args.device)
    edges = torch.linspace(0, args.timesteps, min(args.timesteps, 10) + 1).long().tolist()
    middles, losses = [], []
    for low, high in pairwise(edges):
        t = torch.randint(low, high, (len(x0),), generator=rng, device=args.device)
        middles.append((low + high) / 2)
        losses.append(diffusion_loss(model, schedule, x0, t, noise).item())
    title = "DDPM: the less noise there is, the harder it is to tell from the image"
    common.save_plot(args.out_dir / "loss_by_t.png", {"test digits": (middles, losses)},
                     title=title, xlabel="timestep t (0 is clean)", yscale="log",
                     ylabel="squared error of the noise")


# ------------------------------------------------------------------------ figures and timings


def make_figures(args, model: nn.Module, history: list) -> None:
    """16 digits from the same noise by every sampler: pictures, timings, and the sets for 05."""
    net, schedule = common.for_sampling(model, args), make_schedule(args.timesteps)
    x_T = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(args.seed))
    x_T = x_T.to(args.device)  # drawn on the CPU: the same noise on every device
    rng = torch.Generator(args.device)
    path = []  # (t, x_t, x̂_0) at every step
    ddim_sample(net, schedule, x_T, args.ddim_steps, trace=lambda *state: path.append(state))
    draw_path(args, path)
    line = {"training": ([x["epoch"] for x in history], [x["loss"] for x in history])}
    common.save_plot(args.out_dir / "loss.png", line, title="DDPM: training loss",
                     xlabel="epoch", ylabel="squared error of the noise")

    timings = common.training_report(args, model, history) | {"samplers": []}
    samplers = {("DDPM", args.timesteps): partial(ddpm_sample, net, schedule, rng=rng)}
    for n in sorted({args.ddim_steps, *args.ddim_sweep}, reverse=True):
        samplers["DDIM", n] = partial(ddim_sample, net, schedule, steps=n)
    rows = {}
    for (name, n), sample in reversed(samplers.items()):  # DDPM last: on a CPU it takes its time
        rng.manual_seed(args.seed)
        images, timing = common.time_sampler(sample, x_T)
        timings["samplers"].append({"sampler": name, "steps": n, **timing})
        title = f"{name}, {n} steps: {len(x_T)} digits in {timing['seconds']:.2f} s"
        print(f"{title}; {timing['images_per_second']:.1f} images/s")
        path = args.out_dir / f"samples_{name.lower()}_{n}.png"
        common.save_grid(images, path, title, columns=8)
        rows[f"{name} {n}"] = images[:10]
    (args.out_dir / "timings.json").write_text(json.dumps(timings, indent=1))
    title = "One network; a column starts from one noise; DDIM by number of steps, and DDPM"
    common.save_grid(torch.cat([*rows.values()]), args.out_dir / "samples_steps.png", title,
                     columns=10, rows=[*rows])
    for (name, n), sample in reversed(samplers.items()) if args.eval_samples else ():
        rng.manual_seed(args.seed)
        how = {"method": "diffusion", "sampler": name, "steps": n, "seed": args.seed}
        common.save_eval(args, f"{name.lower()}_{n}", sample, **how)


def draw_path(args, path: list) -> None:
    """Sampling through time, as a strip of stills and as a moving picture."""
    stills = [path[i] for i in torch.linspace(0, len(path) - 1, 10).long()]
    title = f"DDIM, {len(path)} steps: x_t on its way, and below it x̂₀, the image then expected"
    images = [state[k][digit] for digit in range(4) for k in (1, 2) for state in stills]
    common.save_grid(torch.stack(images), args.out_dir / "samples_path.png", title, columns=10,
                     rows=["x_t", "x̂₀"] * 4, below=[f"t={t}" for t, _, _ in stills])
    film = [torch.cat([x_t[:8], x0_hat[:8]]) for _, x_t, x0_hat in [*path[::4], path[-1]]]
    common.save_gif(film, args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.export:
        return common.export_weights(args, "ema")
    try:
        if args.sample_only:
            model, history = make_model(args), args.saved["history"]
            model.load_state_dict(args.saved["ema"])
        else:
            model, history = train(args)
        make_figures(args, model, history)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume goes on from {args.checkpoint}, if an epoch was finished")
    print(f"pictures, timings and weights are in {args.out_dir}")


if __name__ == "__main__":
    main()
