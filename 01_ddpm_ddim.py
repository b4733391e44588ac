"""DDPM and DDIM on MNIST: one network splits image and noise, and two samplers use it.

Diffusion destroys an image x_0 in T small steps, x_1 to x_T: each makes it a little
fainter and adds a little Gaussian noise. t such steps make one Gaussian step, so we can
draw any x_t from x_0 directly. We do so, with a random t for each image, and train a
network, a U-Net, to split x_t into image and noise. A squared error is least at the mean,
so its image x̂_0 is about the mean of all digits that x_t could come from: a blur if x_t
is mostly noise. To sample, we start from pure noise, step a little towards x̂_0, and call
the network again, for a sharper image.

DDPM goes back through all T steps. If we knew x_0, Bayes' rule would give x_{t-1} from x_t
as a Gaussian; DDPM draws from that, with x̂_0 in place of x_0. DDIM is deterministic: it
takes x̂_0 and ε̂, the image and the noise that the network sees in x_t, and adds them up
again with the weights of any earlier time r. So its steps can be large, if less exact.

    q(x_t | x_{t-1}) = N(√α_t x_{t-1}, β_t I),  α_t = 1 - β_t     Ho et al. 2020, Eq. 2
    q(x_t | x_0)     = N(√ᾱ_t x_0, (1-ᾱ_t) I),  ᾱ_t = α_1 ⋯ α_t   Ho, Eq. 4, or:
    x_t   = √ᾱ_t x_0 + √(1-ᾱ_t) ε,  ε ~ N(0, I)
    v     = √ᾱ_t ε - √(1-ᾱ_t) x_0                    the target; Salimans & Ho 2022, section 4
    loss  = E ‖v - v_θ(x_t, t)‖² over x_0, t, ε      Ho, Eq. 14, for v; here a mean over pixels
    x̂_0   = √ᾱ_t x_t - √(1-ᾱ_t) v̂                    Salimans & Ho, with v̂ = v_θ(x_t, t)
    ε̂     = √(1-ᾱ_t) x_t + √ᾱ_t v̂                    so x_t = √ᾱ_t x̂_0 + √(1-ᾱ_t) ε̂
    DDPM:  x_{t-1} ~ q(x_{t-1} | x_t, x̂_0) = N(µ̃, β̃_t I)     Ho, Eq. 6, 7, with
           µ̃ = (√ᾱ_{t-1} β_t x̂_0 + √α_t (1-ᾱ_{t-1}) x_t) / (1-ᾱ_t)
           β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t)
    DDIM:  x_r = √ᾱ_r x̂_0 + √(1-ᾱ_r) ε̂ for the next r < t    Song et al. 2021, Eq. 12, η = 0

    paper           code                      shape
    x_0, x_t, ε     x0, x_t, noise            (B, 1, 28, 28), x0 in [-1, 1]
    t = 1 ... T     t = 0 ... T-1             (B,), the paper's t minus 1; -1 is the clean image
    β_t, α_t, ᾱ_t   betas, alphas, alpha_bars (T,); Song writes α_t for ᾱ_t
    v̂ = v_θ(x_t, t) v_hat = model(x_t, t)     (B, 1, 28, 28)
    x̂_0, ε̂; r       x0_hat, eps_hat; t_next   (B, 1, 28, 28); -1 ... T-2

Why v? Write √ᾱ_t = cos φ and √(1-ᾱ_t) = sin φ. For a fixed x_0 and ε, x_t then runs on an
arc from the image (φ = 0) to the noise (φ = 90°), and v = dx_t / dφ is its velocity. It is
what x_t hides: almost ε where x_t shows the image, almost -x_0 where it shows the noise.
Both x̂_0 and ε̂ come from v without a division, so their errors are no larger than that of
v. Ho et al. predict ε; then x̂_0 needs a division by √ᾱ_t, and at t = T, where that is
0.01 here, errors grow 100 times. As ‖v - v̂‖² = ‖ε - ε̂‖² / ᾱ_t, our loss counts noisy x_t
for more than theirs.

It learns in batches of 128 by Muon (convolutions with 16 channels or more: rate 0.007, weight
decay 0.1) and AdamW (all else: 0.0007, 0.01). The rates rise for 200 steps, and fall linearly
to 0 at the end. To sample, we take an average of the weights. See fit().

    python 01_ddpm_ddim.py                              40 epochs, for a GPU
    python 01_ddpm_ddim.py --epochs 5 --batch-size 64   300,000 images, for a CPU
    python 01_ddpm_ddim.py --sample-only                your last run's weights, or ours

Measured: 40 epochs take 4.7 hours on one core of an Intel Xeon, beside other work. Then 5,000
samples by DDIM-100 have a Fréchet distance of 0.153 (05_compare.py; lower is better; mean of
three seeds), training digits 0.045. Two readers found 57 and 55 of the first 64 clear.
(On an NVIDIA H200, 20 epochs with two blocks fewer at 7x7 took 69 seconds.)
Left out: the likelihood (Ho, section 3); learned variances; networks that predict ε or x_0.
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
    parser = common.make_parser(__file__, "DDPM and DDIM.", epochs=40, lr=7e-4)
    add = parser.add_argument
    add("--width", type=int, choices=[8, 16, 32, 64], default=32, help="channels at 28x28")
    add("--timesteps", type=int, choices=Between(2), default=1000, help="T, from image to noise")
    add("--ddim-steps", **COUNT, default=100, help="network calls of DDIM")
    add("--ddim-sweep", **COUNT, nargs="+", default=[10, 20, 50, 250], help="others to compare")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 8, "timesteps": 20, "ddim_steps": 10, "ddim_sweep": [2, 5],
            "eval_samples": 20}
    args = common.parse(parser, argv, tiny, sampling=["ddim_steps", "ddim_sweep"])
    if max(args.ddim_steps, *args.ddim_sweep) > args.timesteps:
        parser.error(f"--ddim-steps, --ddim-sweep: at most --timesteps {args.timesteps}")
    return args


class UNet(nn.Module):
    """x_t (B, 1, H, W), H and W multiples of 4, t (B,) from 0 to t_max -> v (B, 1, H, W)."""
    def __init__(self, width: int, t_max: float):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 4 * width, 4 * width
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
        self.mid2 = ResBlock(c3, c3, c_time)
        self.mid_attention = Attention(c3)
        self.mid3 = ResBlock(c3, c3, c_time)
        self.mid4 = ResBlock(c3, c3, c_time)
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
        h = self.mid2(self.mid1(self.down1_to_mid(h1), emb), emb)  # (B, c3, H/4, W/4)
        h = self.mid4(self.mid3(self.mid_attention(h), emb), emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0_attention(self.up0(torch.cat([h, h1], dim=1), emb))
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(width: int, timesteps: int, device: str = "cpu") -> dict[str, nn.Module]:
    model = UNet(width, timesteps).to(device, memory_format=torch.channels_last)
    return {"diffusion": model}


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


def posterior(schedule: Schedule, t: int, x_t: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean µ̃ and variance β̃_t of q(x_{t-1} | x_t, x_0), Ho et al. 2020, Eq. 6 and 7."""
    beta, alpha = float(schedule.betas[t]), float(schedule.alphas[t])
    ab = float(schedule.alpha_bars[t])
    ab_prev = float(schedule.alpha_bars[t - 1]) if t > 0 else 1.0  # ᾱ_{-1} = 1, the image
    mean = (ab_prev**0.5 * beta * x0 + alpha**0.5 * (1 - ab_prev) * x_t) / (1 - ab)
    return mean, beta * (1 - ab_prev) / (1 - ab)


@torch.no_grad()
def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None) -> Tensor:
    """Ho et al. 2020, Algorithm 2 with σ_t² = β̃_t: T steps from noise x_T (B, ...).
    Each draws x_{t-1} from q(x_{t-1} | x_t, x_0), with x̂_0 for x_0."""
    x, timesteps = x_T, len(schedule.betas)
    for t in tqdm(range(timesteps)[::-1], "DDPM", leave=False, delay=2):
        ab = float(schedule.alpha_bars[t])
        v_hat = model(x, torch.full((len(x),), t, device=x.device))
        x0_hat = ab**0.5 * x - (1 - ab) ** 0.5 * v_hat
        x, variance = posterior(schedule, t, x, x0_hat)
        if t > 0:  # the last step adds no noise
            x = x + variance**0.5 * torch.randn(x.shape, generator=rng, device=x.device)
    return x


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
    """Trains the network; returns the moving average of its weights, which draws better."""
    data, test, classes = common.load_images(args)  # images and labels
    network = {"width": args.width, "timesteps": args.timesteps}
    state = common.open_run(args, network=network, classes=classes)
    schedule = make_schedule(args.timesteps, args.device)
    torch.manual_seed(args.seed)
    model = make_models(**network, device=args.device)["diffusion"]
    noise, quick = common.noise(args, 16, 1, 28, 28)[:10], min(20, args.timesteps)

    def loss(model, x0: Tensor, labels: Tensor) -> Tensor:  # labels are for 03
        t = torch.randint(args.timesteps, (len(x0),), device=x0.device)
        return diffusion_loss(model, schedule, x0, t, torch.randn_like(x0))

    ema = fit(args, state, "diffusion", model, loss, data, test, args.epochs, args.lr,
              draw=lambda model: ddim_sample(model, schedule, noise, quick))
    return {"diffusion": ema}


def make_figures(args, diffusion: nn.Module) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    net = common.recorded(diffusion, args)
    schedule, noise = make_schedule(args.timesteps), common.noise(args, 16, 1, 28, 28)
    draw_path(args, partial(ddim_sample, net, schedule, noise, args.ddim_steps))

    samplers = []
    runs = [("DDIM", n, partial(ddim_sample, steps=n)) for n in
            sorted({args.ddim_steps, *args.ddim_sweep})]
    for sampler, n, sample in [*runs, ("DDPM", args.timesteps, ddpm_sample)]:
        made = {"name": f"{sampler}, {n} steps", "method": "diffusion", "sampler": sampler,
                "steps": n, "network_calls": n}
        samplers.append((made, lambda x, rng, sample=sample: sample(net, schedule, x, rng=rng)))
    common.draw_and_time(args, samplers, noise, "One network; columns share their noise")


def draw_path(args, sample) -> None:
    """Sampling through time, as a strip of stills and as a moving picture."""
    path = []  # (t, x_t, x̂_0) at every step
    sample(trace=lambda *state: path.append(state))
    stills = [path[i] for i in torch.linspace(0, len(path) - 1, 10).int()]
    title = f"DDIM, {len(path)} steps: x_t, and below it x̂₀, the guess of the image"
    images = []
    for digit in range(4):  # two rows each
        images += [x_t[digit] for _, x_t, _ in stills]
        images += [x0_hat[digit] for _, _, x0_hat in stills]
    times = [f"t={t}" for t, _, _ in stills]
    file = args.out_dir / "samples_path.png"
    common.save_grid(torch.stack(images), file, title, 10, ["x_t", "x̂₀"] * 4, times)
    every_fourth = path[(len(path) - 1) % 4 :: 4]  # so that the last is one of them
    film = [torch.cat([x_t[:8], x0_hat[:8]]) for _, x_t, x0_hat in every_fourth]
    common.save_gif(film, args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
