"""MeanFlow on MNIST: one step from noise to digits, without pairs.

CAREFUL: as in 04, x_0 is the NOISE, and x_1 the data, here a latent of 02.

For one step, 04b needs a reflow: it trains on pairs of noise and latent that its flow made.
MeanFlow learns one step from latents alone. Its network predicts not the velocity v at a
point of the path, but the average velocity u from there to a later time r. Then one step of
u from t = 0 to r = 1 would reach the data, however much the path bends. To average v, we would
have to follow the path, in many steps. But u obeys a law at each point, which needs only v
there and the change of u along the path, and both can be had from data and network.

    u(x_t, t, r) = 1/(r-t) ∫ v(x_s, s) ds, s = t ... r     Geng et al. 2025; the path: dx_s = v ds
    u(x_t, t, t) = v(x_t, t), the velocity of 04b          the limit r → t
    law:   u = v + (r-t) du/dt                             their "MeanFlow identity", t reversed
           du/dt = ∂u/∂x · v + ∂u/∂t, r fixed              the chain rule
    loss = E ‖(x_1 - x_0) + (r-t) du_θ/dt - u_θ‖²          at x_t = (1-t) x_0 + t x_1
           du_θ/dt: with v = u_θ(x_t, t, t), no gradient   it is part of the target
    sample: x_r = x_t + (r-t) u_θ(x_t, t, r)               one step: t = 0, r = 1

    paper           code                      shape
    ε, x, z_t       x0, x1, x_t               (B, 1, 8, 8): noise, data, and between them
    t >= r          t <= r                    (B,) from 0, noise, to 1, data: 1 minus theirs
    u_θ(z_t, r, t)  model(x_t, t, r)          (B, 1, 8, 8), minus theirs, as is v
    du/dt           total_derivative(...)     the same as theirs, since u and t both change sign

Where does the law come from? Write (r-t) u = ∫ v ds, and differentiate both sides by t along
the path. By the product rule, and as t is the lower end of the integral: -u + (r-t) du/dt = -v.
Conversely, if u obeys the law, (r-t) u and ∫ v ds change alike with t, and are 0 at t = r: they
are equal. (The path follows v; it leaves the line from x_0 to x_1 where the loss takes its x_t.)

The law contains v twice. For the first, x_1 - x_0 will do: a squared error is least at the mean,
and the mean of x_1 - x_0 at x_t is v. In du/dt it would do, too, but is noisy; there we take the
network's own v (Geng et al., arXiv 2512.02012). For half of each batch r = t: there the target
is x_1 - x_0, as for a flow, and the network learns v. The loss never gets to 0, as lines cross.

Why other sinusoids than in 04b? du/dt contains their derivative. Those of 04b turn by up to 1000
rad while t goes from 0 to 1, so a small error of the network becomes a large one of du/dt. Ours
turn by at most 1 rad. Data are means µ, as in 07: a draw of z only adds noise. The network
learns as in 01.

Left out: Geng et al. divide the squared error of each image by about itself, held constant.
With that, too many digits were a 1: after half an hour of a core, one step had a Fréchet
distance of 1.02, without it of 0.65 (EXPERIMENTS.md).

    python 06_meanflow.py                    140 minutes on a core of an Intel Xeon
    python 06_meanflow.py --sample-only      your last run's weights, or ours

Fréchet distances of 5,000 samples, one seed (real digits: 0.045):
    steps              1      2      5      10
    MeanFlow           0.394  0.306  0.222  0.197
    04b, flow, AB2                   0.275  0.199
    04b, reflow        0.374  0.308  0.257  0.241
"""

import copy
import importlib
import time
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import common
from common import COUNT, Attention, Between, ResBlock

latent = importlib.import_module("02_latent_diffusion")  # its VAE; nothing else
warnings.filterwarnings("ignore", ".*torch.jit.script")  # torch.func.jvp causes it (findings/)


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "MeanFlow.", epochs=40, lr=7e-4)
    add = parser.add_argument
    add("--width", type=int, choices=[8, 16, 32, 64], default=64, help="channels at 8x8")
    add("--vae", type=Path, metavar="FILE", help="weights of 02; None: shipped, or yours")
    add("--steps", **COUNT, nargs="+", default=[1, 2, 5, 10], help="numbers of MeanFlow steps")
    add("--equal", type=float, choices=Between(0, 1), default=0.5, help="share with r = t")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 8, "steps": [1, 2, 5], "eval_samples": 20}
    args = common.parse(parser, argv, tiny, sampling=["steps"])
    if not args.vae:  # the shipped one has seen nothing but digits
        own = args.out_dir.parent / "02_latent_diffusion" / "checkpoint.pt"
        shipped = common.WEIGHTS / "02_latent_diffusion.pt"
        args.vae = shipped if args.dataset in ("mnist", "synthetic") else own
    return args


class UNet(nn.Module):
    """vs 04b: u from t to r, (B,) each, from 0 to 1; without r, r = t and u = v."""
    def __init__(self, width: int):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 2 * width, 4 * width  # vs 01: a smaller middle
        self.c_time = c_time
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(),
                                  nn.Linear(c_time, c_time), nn.SiLU())
        self.gap = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(),  # vs 04b: embeds r - t
                                 nn.Linear(c_time, c_time))
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
    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        gap = torch.zeros_like(t) if r is None else r - t
        emb = self.time(common.timestep_embedding(t, self.c_time))  # vs 04b: at most 1 rad
        emb = emb + self.gap(common.timestep_embedding(gap, self.c_time))
        h0 = self.down0(self.conv_in(x), emb)  # (B, c1, H, W)
        h1 = self.down1_attention(self.down1(self.down0_to_1(h0), emb))  # (B, c2, H/2, W/2)
        h = self.mid1(self.down1_to_mid(h1), emb)  # (B, c3, H/4, W/4)
        h = self.mid2(self.mid_attention(h), emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0_attention(self.up0(torch.cat([h, h1], dim=1), emb))
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(width: int, device: str = "cpu") -> dict[str, nn.Module]:
    net = UNet(width).to(device, memory_format=torch.channels_last)
    return {"meanflow": net, "vae": latent.VAE().to(device)}


def even_times(steps: int) -> list[float]:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()


def draw_times(n: int, equal: int, rng=None, device="cpu") -> tuple[Tensor, Tensor]:
    """t <= r, (n,) each: the smaller and the larger of two logit-normal draws (logits of mean
    0.4, and deviation 1; Geng et al.: -0.4, for their t); r = t for the first `equal`."""
    times = (torch.randn(2, n, generator=rng, device=device) + 0.4).sigmoid()
    times[1, :equal] = times[0, :equal]
    return times.amin(0), times.amax(0)


def total_derivative(model, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """du/dt = ∂u/∂x · v + ∂u/∂t at x (B, ...), t and r (B,): the change of u along the path, a
    Jacobian-vector product, in one pass."""
    return torch.func.jvp(lambda x, t: model(x, t, r), (x, t), (v, torch.ones_like(t)))[1]


def meanflow_loss(model, x0: Tensor, x1: Tensor, t: Tensor, r: Tensor, equal: int = 0) -> Tensor:
    """The loss above: Geng et al. 2025, Eq. 9 to 11, but with the network's v in du/dt.
    x0 (noise) and x1 (data): (B, 1, H, W); t <= r: (B,) in [0, 1], r = t for the first `equal`."""
    t_, gap = t.view(-1, 1, 1, 1), (r - t).view(-1, 1, 1, 1)  # one for each image
    x_t, target = (1 - t_) * x0 + t_ * x1, x1 - x0
    with torch.no_grad():
        x, t_rest = x_t[equal:], t[equal:]  # of images with t < r; for all others the gap is 0
        v = model(x, t_rest)
        target[equal:] += gap[equal:] * total_derivative(model, x, t_rest, r[equal:], v)
    return F.mse_loss(model(x_t, t, r), target)


@torch.no_grad()
def meanflow_sample(model, x0: Tensor, steps: int, trace=None) -> Tensor:
    """From noise x0 (B, ...) to x_1: each step goes straight to the next time by the
    average velocity (Geng et al. 2025). `trace(t, x_t)`, if given, sees every step."""
    x = x0
    for t, r in tqdm(list(pairwise(even_times(steps))), "MeanFlow", leave=False, delay=2):
        if trace:
            trace(t, x)
        t_, r_ = x.new_full((len(x),), t), x.new_full((len(x),), r)
        x = x + (r - t) * model(x, t_, r_)
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
    """Trains the average velocity on latents of the VAE; returns its moving average."""
    data, test, classes = common.load_images(args)  # images and labels
    network = {"width": args.width}
    state = common.open_run(args, network=network, classes=classes)
    torch.manual_seed(args.seed)
    models = make_models(**network, device=args.device)
    noise = common.noise(args, 16, 1, 8, 8)[:10]
    if "vae" not in state["stages"]:  # with --resume, it is in our checkpoint
        weights = common.load("02_latent_diffusion", "vae", args.vae, args.device).state_dict()
        state["stages"]["vae"] = {"epochs": [], "frames": [], "learned": [weights]}
    vae = models["vae"].eval().requires_grad_(False)  # fixed from here on
    vae.load_state_dict(state["stages"]["vae"]["learned"][0])

    def means(images: Tensor) -> Tensor:
        mu, _ = latent.encode_all(vae, images)  # vs 04b: no draws of z, as in 07
        return ((mu @ vae.R - vae.mean) / vae.std).view(-1, 1, 8, 8)

    def loss(model, x1: Tensor) -> Tensor:
        equal = round(args.equal * len(x1))
        t, r = draw_times(len(x1), equal, device=x1.device)
        return meanflow_loss(model, torch.randn_like(x1), x1, t, r, equal)

    meanflow = fit(args, state, "meanflow", models["meanflow"], loss, [means(data[0])],
                   [means(test[0])], args.epochs, args.lr,
                   draw=lambda model: vae.to_images(meanflow_sample(model, noise, 1)))
    return {"meanflow": meanflow, "vae": vae}


@torch.no_grad()
def make_figures(args, meanflow: nn.Module, vae: nn.Module) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    net = common.recorded(meanflow, args)
    noise = common.noise(args, 16, 1, 8, 8)
    draw_path(args, net, vae, noise)

    samplers = []
    for n in sorted({*args.steps}):
        made = {"name": f"MeanFlow, {n} step{'s' * (n > 1)}", "method": "MeanFlow",
                "sampler": "MeanFlow", "steps": n, "network_calls": n}
        def draw(x, rng, n=n):
            return vae.to_images(meanflow_sample(net, x, n))
        samplers.append((made, draw))
    common.draw_and_time(args, samplers, noise, "Columns share their noise")


def draw_path(args, net, vae: nn.Module, x0: Tensor) -> None:
    """Eight latents on their way in 20 steps, and below them where one step from there ends."""
    path = []
    x1 = meanflow_sample(net, x0[:8], 20, trace=lambda t, x: path.append((t, x)))
    film = []
    for t, x in path:
        t_, r_ = x.new_full((len(x),), t), x.new_full((len(x),), 1)
        film.append(vae.to_images(torch.cat([x, x + (1 - t) * net(x, t_, r_)])))
    film.append(vae.to_images(torch.cat([x1, x1])))
    common.save_gif(film, args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
