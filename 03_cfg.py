"""Classifier-free guidance on MNIST: ask for a digit, and get a very clear one.

A network that also sees the class c of an image learns to predict the v of 01 given c, so
we can ask it for a 7. In training, c is hidden now and then, so the same network also
predicts v without c. Guidance starts from that prediction and adds s times the difference
that c makes. By Bayes' rule, this difference moves the image to where a classifier would be
surer of c, but no classifier is needed: hence the name. With s = 1 we get the prediction
with c; a larger s goes past it. The digits become clearer, but sevens more alike: guidance
trades variety for clarity.

    loss = E ‖v - v_θ(x_t, t, c)‖², c = ∅ with probability 0.1   Ho & Salimans 2022, Alg. 1
    v̂    = v_θ(x_t, t, ∅) + s (v_θ(x_t, t, c) - v_θ(x_t, t, ∅))  their Eq. 6, for ε̂
    s = 0 is unconditional, 1 conditional, above 1 guided
    x_t, v (here √ᾱ_t ε - √(1-ᾱ_t) x_0), the schedule and DDIM are those of 01

    papers          code                      shape
    x_0, x_t, ε     x0, x_t, noise            (B, 1, 28, 28), x0 in [-1, 1]
    t = 1 ... T     t = 0 ... T-1             (B,); -1 in the samplers is the clean image
    c, ∅            labels, NULL              (B,) in 0 ... 9, and -1
    v_θ(x_t, t, c)  model(x_t, t, labels)     (B, 1, 28, 28)
    v̂               guided(...)(x_t, t)       (B, 1, 28, 28)
    s = 1 + w       scale, --guidance
    p_uncond        --label-dropout           Ho & Salimans; their z_λ is x_t

The paper guides ε̂ = √(1-ᾱ_t) x_t + √ᾱ_t v̂. That is the same: the weights of the two
predictions, s and 1 - s, add up to 1, so the term with x_t stays as it is.

To show both, the class enters in two ways: as input channels, and by cross-attention, as
text does in large models. Adding it to the time embedding would be simpler.

    python 03_cfg.py                                  40 epochs, for a GPU
    python 03_cfg.py --epochs 3 --batch-size 64       for a CPU
    python 03_cfg.py --digits 3141592653              draw these; no training

Measured after 34 epochs (the shipped weights), 1,000 samples by DDIM-100 each: with s = 1,
1.25, 3 the classifier of 05_compare.py reads 97.1%, 99.2%, 100% of the digits as asked for.
Their Fréchet distances to the test digits (lower is better) are 0.142, 0.134, 0.507; training
digits have 0.155, with ±0.03 from set to set. So s = 3, the default, is clearer, but less varied.
"""

import argparse
import math
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
    parser = common.make_parser(__file__, "Guided diffusion.", epochs=40, batch_size=128, lr=2e-3)
    add, count = parser.add_argument, number(int, 1)
    add("--width", type=int, choices=[8, 16, 32, 64], default=32, help="channels at 28x28")
    add("--timesteps", type=number(int, 2), default=1000, help="T, from image to noise")
    add("--ddim-steps", type=count, default=100, help="steps of DDIM and DDPM")
    add("--tokens", type=count, default=4, help="learned tokens per class, to attend to")
    add("--label-dropout", type=number(float, 0, 1), default=0.1, help="share to hide")
    scale = number(float, 0)
    add("--guidance", type=scale, default=3.0, help="scale s in the main figures")
    sweep = [0, 1, 1.25, 1.5, 2, 3, 5]
    add("--guidance-sweep", type=scale, nargs="+", default=sweep, help="others to compare")
    add("--digits", type=digits, help="draw these classes and stop; no training")
    tiny = {"dataset": "synthetic", "train_images": 256, "epochs": 8, "batch_size": 16,
            "width": 8, "timesteps": 20, "ddim_steps": 10, "guidance_sweep": [0, 1, 3],
            "eval_samples": 20}
    if parser.parse_args(argv).digits:
        parser.set_defaults(sample_only=True)  # common.parse() reads it
    args = common.parse(parser, argv, tiny)
    if args.ddim_steps > args.timesteps:
        parser.error(f"--ddim-steps: DDIM takes at most --timesteps {args.timesteps} steps")
    classes = len(args.classes)
    if args.digits and int(max(args.digits)) >= classes:
        parser.error(f"--digits {args.digits}: there are only {classes} classes, from 0")
    return args


def digits(text: str) -> str:
    """An argparse type: a string of the digits 0 to 9."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: only the digits 0 to 9")
    return text


NULL = -1  # ∅, the label of an image whose label is hidden


class UNet(nn.Module):
    """That of 01, and labels (B,): as 32 more input channels, and by cross-attention."""

    def __init__(self, width: int, t_max: float, tokens: int, classes: int = 10):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 4 * width, 4 * width
        self.c_time, self.time_scale = c_time, 1000 / t_max  # embed times up to 1000
        self.time = nn.Sequential(
            nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU()
        )
        self.label_channels = nn.Embedding(classes + 1, 32)  # the last is for NULL
        self.conv_in = nn.Conv2d(1 + 32, c1, 3, padding=1)
        self.down0 = ResBlock(c1, c1, c_time)
        self.down0_to_1 = nn.Conv2d(c1, c1, 3, stride=2, padding=1)
        self.down1 = ResBlock(c1, c2, c_time)
        self.down1_attention = Attention(c2)
        self.down1_to_mid = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c3, c3, c_time)
        self.mid_attention = Attention(c3)
        self.mid2 = ResBlock(c3, c3, c_time)
        # Several tokens a class: with one, the softmax is 1, and all pixels get the same.
        self.label_tokens = nn.Embedding(classes + 1, tokens * 32)
        self.cross_attention = Attention(c3, 32)
        self.mid_to_up0 = nn.Conv2d(c3, c2, 3, padding=1)
        self.up0 = ResBlock(2 * c2, c2, c_time)
        self.up0_attention = Attention(c2)
        self.up0_to_1 = nn.Conv2d(c2, c1, 3, padding=1)
        self.up1 = ResBlock(2 * c1, c1, c_time)
        self.norm_out = nn.GroupNorm(8, c1)
        self.conv_out = nn.Conv2d(c1, 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # a fresh network predicts a constant

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
        labels = labels % self.label_tokens.num_embeddings  # -1 becomes the last
        channels = self.label_channels(labels)[:, :, None, None]  # (B, 32, 1, 1)
        channels = channels.expand(-1, -1, *x.shape[2:])
        tokens = self.label_tokens(labels).unflatten(1, (-1, 32))  # (B, tokens, 32)
        x = torch.cat([x, channels], dim=1)  # (B, 33, H, W)
        h0 = self.down0(self.conv_in(x), emb)  # (B, c1, H, W)
        h1 = self.down1_attention(self.down1(self.down0_to_1(h0), emb))  # (B, c2, H/2, W/2)
        h = self.mid1(self.down1_to_mid(h1), emb)  # (B, c3, H/4, W/4)
        h = self.mid2(self.mid_attention(h), emb)
        h = self.cross_attention(h, tokens)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0_attention(self.up0(torch.cat([h, h1], dim=1), emb))
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(args) -> dict[str, nn.Module]:
    model = UNet(args.width, args.timesteps, args.tokens, len(args.classes))
    return {"diffusion": model.to(args.device, memory_format=torch.channels_last)}


class Schedule(NamedTuple):
    """How much noise there is at each t, (T,) each."""

    betas: Tensor  # β_t, float64 on the CPU: the samplers read single numbers
    alphas: Tensor  # α_t = 1 - β_t
    alpha_bars: Tensor  # ᾱ_t = α_0 ⋯ α_t
    signal_scale: Tensor  # √ᾱ_t, float32 on the device, for training
    noise_scale: Tensor  # √(1-ᾱ_t)


def make_schedule(timesteps: int, device: str = "cpu") -> Schedule:
    """The cosine schedule: √ᾱ_t = cos φ_t, √(1-ᾱ_t) = sin φ_t, with φ_t evenly spaced.

    Nichol & Dhariwal 2021, Eq. 17, but φ_t runs from 0.01 to π/2 - 0.01, for any T. So at
    t = 0 a little noise is left, for the samplers divide by 1-ᾱ_t; and at t = T-1 a hundredth
    of the image, too little to see, so that sampling may start from pure noise.
    """
    phi = torch.linspace(0.01, math.pi / 2 - 0.01, timesteps, dtype=torch.float64)
    alpha_bars = phi.cos() ** 2  # ᾱ_t comes first; α_t and β_t follow from it
    alphas = alpha_bars / torch.cat([torch.ones(1), alpha_bars[:-1]])  # ᾱ_{-1} = 1
    signal, noise = phi.cos().float(), phi.sin().float()
    return Schedule(1 - alphas, alphas, alpha_bars, signal.to(device), noise.to(device))


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t from x_0 in one step (Ho, Eq. 4). x0, noise: (B, 1, H, W); t: (B,) in 0 ... T-1."""
    signal_scale = schedule.signal_scale[t].view(-1, 1, 1, 1)  # one for each image
    noise_scale = schedule.noise_scale[t].view(-1, 1, 1, 1)
    return signal_scale * x0 + noise_scale * noise


def hide_labels(labels: Tensor, share: float) -> Tensor:
    """Each of the labels (B,) becomes ∅ with probability `share` (p_uncond in Algorithm 1)."""
    hidden = torch.rand(labels.shape, device=labels.device) < share
    return labels.masked_fill(hidden, NULL)


def diffusion_loss(
    model, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor
) -> Tensor:
    """Ho & Salimans 2022, Algorithm 1, but for v: the mean squared error of the prediction.

    x0, noise: (B, 1, H, W); t: (B,) in 0 ... T-1; labels: (B,), some of them ∅.
    """
    x_t = q_sample(schedule, x0, t, noise)
    v = q_sample(schedule, noise, t, -x0)  # √ᾱ_t ε + √(1-ᾱ_t) (-x_0)
    return F.mse_loss(model(x_t, t, labels), v)


def guided(model, labels: Tensor, scale: float, classes: int = 10):
    """The function (x, t) -> v̂ for labels (B,), which the samplers take as `model`: Eq. 6.

    Scales 0 and 1 take a plain call, all others a call on a doubled batch. Labels that are
    not in 0 ... classes - 1 raise a ValueError.
    """
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"labels are 0 to {classes - 1}, not {labels.unique().tolist()}")
    null = torch.full_like(labels, NULL)
    if scale in (0, 1):
        chosen = labels if scale == 1 else null
        return lambda x, t: model(x, t, chosen)
    both = torch.cat([null, labels])

    def v_hat(x: Tensor, t: Tensor) -> Tensor:
        v_null, v_c = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_null + scale * (v_c - v_null)

    return v_hat


def ddim_pairs(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """(t, next t), evenly from T-1 down to -1 (x_0). 100 of 1000: (999, 989) ... (9, -1)."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM takes 1 to {timesteps} steps, not {steps}")
    times = torch.linspace(timesteps - 1, -1, steps + 1, dtype=torch.float64).round().int()
    return list(pairwise(times.tolist()))


@torch.no_grad()
def ddim_sample(
    model, schedule: Schedule, x_T: Tensor, steps: int, eta=0.0, rng=None, trace=None
) -> Tensor:
    """Song et al. 2021, Eq. 12: `steps` steps from noise x_T (B, ...) to an image.

    eta = 0 draws no noise. eta up to 1 replaces a part of ε̂ by fresh noise (Eq. 16); eta = 1
    is DDPM if steps = T. `trace(t, x_t, x0_hat)`, if given, sees every step.
    """
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


def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None, steps=None) -> Tensor:
    """DDPM as DDIM with η = 1: the same as in 01, but it can take fewer steps."""
    return ddim_sample(model, schedule, x_T, steps or len(schedule.betas), eta=1.0, rng=rng)


def train(args) -> dict[str, nn.Module]:
    """Train the network; returns the moving average of its weights."""
    data = common.load_images(args)  # images, labels
    schedule = make_schedule(args.timesteps, args.device)
    torch.manual_seed(args.seed)
    model = make_models(args)["diffusion"]
    stage = common.Stage(args, "diffusion", model, args.epochs, args.lr, *data)
    for x0, labels in stage:
        t = torch.randint(args.timesteps, (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        labels = hide_labels(labels, args.label_dropout)
        stage.step(diffusion_loss(stage.model, schedule, x0, t, noise, labels))
    return {"diffusion": stage.ema}


def make_figures(args, diffusion: nn.Module) -> None:
    """Ten classes and many scales of guidance: pictures, timings, and sets for 05."""
    net = common.as_function(diffusion, args)
    schedule = make_schedule(args.timesteps)
    if args.digits:
        return draw_digits(args, net, schedule)
    rng = torch.Generator().manual_seed(args.seed)  # of the CPU: the same on every device
    noise = torch.randn(16, 1, 28, 28, generator=rng).to(args.device)
    classes = len(args.classes)

    def sample(x_T: Tensor, rng=None, s=args.guidance, sampler=ddim_sample, **more):
        labels = torch.arange(len(x_T), device=x_T.device) % classes  # 0 ... 9, 0 ...
        v_hat = guided(net, labels, s, classes)
        return sampler(v_hat, schedule, x_T, steps=args.ddim_steps, rng=rng, **more)

    draw_path(args, partial(sample, noise))
    samplers, n = [], args.ddim_steps
    runs = [("DDIM", ddim_sample, s) for s in sorted({args.guidance, *args.guidance_sweep})]
    for kind, sampler, s in [*runs, ("DDPM", ddpm_sample, args.guidance)]:
        calls = n if s in (0, 1) else 2 * n  # a doubled batch counts as two
        made = {"name": f"{kind}, {n} steps, s = {s:g}", "method": "guided diffusion",
                "sampler": kind, "guidance": s, "steps": n, "network_calls": calls}
        if s:
            made["classes"] = classes  # sample() asks for them in turn
        samplers.append((made, partial(sample, s=s, sampler=sampler)))
    overview = "Columns share their noise and, with s > 0, their class"
    names = [args.classes[i % classes] for i in range(10)]
    common.measure(args, samplers, noise, overview, below=names)


def draw_digits(args, net, schedule: Schedule) -> None:
    """--digits: the classes that were asked for, in one picture, twenty to a row."""
    labels = torch.tensor([int(digit) for digit in args.digits], device=args.device)
    rng = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(len(labels), 1, 28, 28, generator=rng)
    v_hat = guided(net, labels, args.guidance, len(args.classes))
    images = ddim_sample(v_hat, schedule, x_T.to(args.device), args.ddim_steps)
    shown = args.digits[:20]
    path = args.out_dir / f"digits_{shown}.png"
    names = " ".join(args.classes[int(digit)] for digit in shown)
    names += " ..." if len(labels) > 20 else ""
    common.save_grid(images, path, f"Guided, s = {args.guidance:g}: {names}", 20)
    print(path)


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
    with common.stopped(args):
        if args.sample_only:
            models = common.load_networks(args.state, make_models(args))
        else:
            models = train(args)
        make_figures(args, **models)
    print(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    main()
