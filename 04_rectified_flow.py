"""Rectified flow and reflow on MNIST: straight paths from noise to digits, for one step.

CAREFUL: x_0 was the image in 01. Here x_0 is the NOISE, and x_1 is the image.

Pair each image with random noise, new each time, and draw a straight line between them. A
network learns the velocity of the lines, x_1 - x_0, at each point and time: many lines pass
through a point, and it learns their mean. To sample, start from fresh noise and follow this
velocity. The path bends, so this takes many small steps. Reflow makes paths straighter: pair
noises with the images at the end of their paths, and train a copy of the network on the pairs.
Two paths never meet, since each point and time has one velocity. Straight lines between
their ends could cross, but hardly do. So after the reflow one step gets near the end.

    x_t    = (1-t) x_0 + t x_1                                    Liu et al. 2022, section 2.1
    loss   = E ‖(x_1 - x_0) - v_θ(x_t, t)‖², t by --flow-t        Liu, Eq. 1, with uniform t
    v_θ    = (x̂_1 - x_t) / max(1-t, 0.01), x̂_1: last layer         Li & He 2025, "x-prediction"
    Euler:   z_{t+1/N} = z_t + v_θ(z_t, t) / N from z_0 = x_0     N steps to an image z_1
    AB2:     z_{t+h} = z_t + h (v + h/2 (v - v_old) / h_old)      Adams-Bashforth; _old: a step ago
    reflow:  E ‖(z_1 - z_0) - v_θ((1-t) z_0 + t z_1, t)‖₁         Liu has ‖...‖²; t by --reflow-t
    S      = E ‖(z_1 - z_0) - v_θ(z_t, t)‖² on the path           Liu; 0: straight, at one speed

    paper           code                      shape
    x_0, z_0        x0, noise                 (B, 1, 28, 28)
    x_1, z_1        x1                        (B, 1, 28, 28) in [-1, 1]
    t               t                         (B,) from 0, noise, to 1, data: the reverse of 01
    x̂_1             image, in UNet.forward    (B, 1, 28, 28)
    v_θ(x_t, t)     v = model(x_t, t)         (B, 1, 28, 28)

x_t is on a line, z_t on a path; the code writes x for both, and takes means over pixels.
Lines between random pairs cross, so the loss never gets to 0. Training: as 01, --lr 0.002.

Why does the network predict an image, and not v? v contains the noise of every pixel, which
a network cannot copy exactly: some grey stays in the black. With x̂_1, the last step (of up
to 100) ends at x̂_1 itself, and black is easy to predict: one step after a reflow is much
better, though the flow before it is worse (two steps by 46%, ten by 10%). But v_θ divides by
1-t, so we take at least 0.01 for that, and after t = 0.95 weigh errors of v by (1-t) / 0.05.

Euler's step takes the velocity at its start. AB2 estimates that at the middle of the step:
v here and one step ago tell how it changes, without another call. Its steps get longer, as
v changes fastest near the noise: t = s / (2-s), s evenly spaced. Its first and last are Euler's.

    python 04_rectified_flow.py                 flow, pairs and reflow, for a GPU
    python 04_rectified_flow.py --sample-only   your last run's weights, or ours

Trained with the defaults on an NVIDIA H200 (but with another solver for the pairs, RESULTS.md):
Fréchet distances (05; lower is better) of 5,000 samples (real digits have 0.045), and S of 16
paths in 100 Euler steps:
    steps         1      2      5      10     100    S
    flow, Euler   53.2   7.83   1.12   0.598  0.311  0.081
    flow, AB2                   0.440  0.323
    reflow, Euler 0.739  0.662  0.583  0.540  0.483  0.0023
One step after the reflow beats five of Euler's before it, but not five of AB2.
"""

import copy
import math
import time
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import common
from common import COUNT, RATE, Attention, ResBlock


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Rectified flow.", epochs=10, lr=2e-3)
    add = parser.add_argument
    add("--width", type=int, choices=[8, 16, 32, 64], default=32, help="channels at 28x28")
    add("--steps", **COUNT, nargs="+", default=[1, 2, 5, 10, 100], help="numbers of Euler steps")
    add("--ab2-steps", **COUNT, nargs="+", default=[5, 10], help="numbers of AB2 steps (flow)")
    add("--flow-t", choices=T_DENSITIES, default="logit-normal", help="density of t in the flow")
    add("--reflow-t", choices=T_DENSITIES, default="half-at-0", help="density of t in the reflow")
    add("--pairs", **COUNT, default=120_000, help="pairs of noise and data to make")
    add("--pair-steps", **COUNT, default=10, help="steps of AB2 to make a pair")
    add("--reflow-epochs", **COUNT, default=10, help="passes over all the pairs")
    add("--reflow-lr", **RATE, default=1e-3, help="peak rate of the reflow")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 8, "steps": [1, 2, 5], "ab2_steps": [4], "eval_samples": 20,
            "pairs": 256, "pair_steps": 3, "reflow_epochs": 4}
    args = common.parse(parser, argv, tiny, sampling=["steps", "ab2_steps"])
    if args.batch_size > args.pairs:
        parser.error(f"--batch-size {args.batch_size}: more than --pairs {args.pairs}")
    return args


T_DENSITIES = {  # t in [0, 1] from uniform u, by the inverse of the cumulative distribution
    "uniform": lambda u: u,
    # most t near the middle: Esser et al. 2024, Eq. 19, with m = 0, s = 1
    "logit-normal": lambda u: (2**0.5 * torch.erfinv(2 * u - 1)).sigmoid(),  # of N(0, 1)
    # most t near the ends, ∝ cosh(a (2t - 1)) with a = 4: Lee et al. 2024 (their code: a = 2)
    "u-shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(4)) / 8,  # 8 = 2 a
    # half of all t are 0, the only t that one step uses; the others are u-shaped
    "half-at-0": lambda u: T_DENSITIES["u-shaped"]((2 * u - 1).clamp(min=0)),
    "all-at-0": lambda u: 0 * u,  # distillation (Liu et al.), for one step alone
}


class UNet(nn.Module):
    """x_t (B, 1, H, W), H and W multiples of 4, t (B,) from 0 to t_max -> v (B, 1, H, W)."""
    def __init__(self, width: int, t_max: float = 1):
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
        image = self.conv_out(F.silu(self.norm_out(h)))  # vs 01: x̂_1, returned as v
        left = (1 - t).clamp(min=0.01).view(-1, 1, 1, 1)  # the time to t = 1, but not 0
        return (image - x) / left  # the v that takes x to the image by t = 1


def make_models(width: int, device: str = "cpu") -> dict[str, nn.Module]:
    return {name: UNet(width).to(device, memory_format=torch.channels_last)
            for name in ("flow", "reflow")}


def flow_loss(model, x0: Tensor, x1: Tensor, t: Tensor, error=F.mse_loss) -> Tensor:
    """The error of v on the line from x0 to x1: Liu et al. 2022, Eq. 1, and a weight near t = 1.

    x0 (noise) and x1 (data): (B, 1, H, W); t: (B,) in [0, 1].
    The squared error makes v the mean where lines cross.
    Those of a reflow hardly cross; there F.l1_loss gave better images.
    """
    t_ = t.view(-1, 1, 1, 1)  # one for each image
    x_t = (1 - t_) * x0 + t_ * x1
    weight = ((1 - t_) / 0.05).clamp(max=1)  # below 1 for t > 0.95 (Li & He: 1 - t >= 0.05)
    return error(weight * model(x_t, t), weight * (x1 - x0))


def even_times(steps: int) -> list[float]:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()


@torch.no_grad()
def euler_sample(model, x0: Tensor, steps: int, trace=None) -> Tensor:
    """Euler's method from noise x0 (B, ...) to x_1; `trace(t, x_t, v)` sees every step."""
    x = x0
    for t, t_next in tqdm(list(pairwise(even_times(steps))), "Euler", leave=False, delay=2):
        v = model(x, torch.full((len(x),), t, device=x.device))
        if trace:
            trace(t, x, v)
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def adams_sample(model, x0: Tensor, steps: int, shift: float = 2.0) -> Tensor:
    """As euler_sample, but by Adams-Bashforth: a step takes the velocity at its middle,
    extrapolated from this one and the last. Its error is O(1 / steps²) for smooth v. Steps
    near t = 0 are up to `shift` times shorter (Esser et al. 2024, Eq. 23, with 1-t for t),
    which drew better. The first and last step are Euler's: in 04 the last then ends at x̂_1."""
    x, v_old, h_old = x0, None, None
    for t, t_next in pairwise([s / (shift - (shift - 1) * s) for s in even_times(steps)]):
        v = model(x, torch.full((len(x),), t, device=x.device))
        h = t_next - t
        slope = (v - v_old) / h_old if t > 0 and t_next < 1 else 0  # 0: Euler
        x = x + h * (v + h / 2 * slope)
        v_old, h_old = v, h
    return x


def straightness(model, x0: Tensor, steps: int) -> float:
    """S of Liu et al. 2022, a mean over all values, in `steps` Euler steps from x0 (B, ...)."""
    velocities = []
    x1 = euler_sample(model, x0, steps, trace=lambda t, x, v: velocities.append(v))
    return torch.stack([(x1 - x0 - v).square().mean() for v in velocities]).mean().item()


def make_pairs(model, n: int, steps: int, rng, device="cpu") -> tuple[Tensor, Tensor]:
    """n pairs (x0, x1), (n, 1, 28, 28) each: noise, and what `steps` steps of AB2 make of it."""
    x0 = torch.randn(n, 1, 28, 28, generator=rng).to(device)
    parts = x0.split(1000 if x0.is_cuda else 100)
    return x0, torch.cat([adams_sample(model, part, steps) for part in parts])


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
    """Trains the flow, makes pairs, trains the reflow on them; returns moving averages."""
    data, test, classes = common.load_images(args)  # images and labels
    network = {"width": args.width}
    state = common.open_run(args, network=network, classes=classes)
    torch.manual_seed(args.seed)
    models = make_models(**network, device=args.device)
    noise = common.noise(args, 16, 1, 28, 28)[:10]

    def loss(model, x1: Tensor, labels: Tensor) -> Tensor:  # labels are for 03
        t = T_DENSITIES[args.flow_t](torch.rand(len(x1), device=x1.device))
        return flow_loss(model, torch.randn_like(x1), x1, t)

    def reflow_loss(model, x0: Tensor, x1: Tensor) -> Tensor:
        t = T_DENSITIES[args.reflow_t](torch.rand(len(x1), device=x1.device))
        return flow_loss(model, x0.float(), x1.float(), t, error=F.l1_loss)  # kept as float16

    flow = fit(args, state, "flow", models["flow"], loss, data, test, args.epochs, args.lr,
               draw=lambda model: adams_sample(model, noise, 5))
    net = common.recorded(flow, args)
    pairs, test = common.kept_pairs(args, flow, lambda n, rng: make_pairs(
        net, n, args.pair_steps, rng, args.device))
    models["reflow"].load_state_dict(flow.state_dict())  # on --resume, fit() loads its own
    reflow = fit(args, state, "reflow", models["reflow"], reflow_loss, pairs, test,
                 args.reflow_epochs, args.reflow_lr,
                 draw=lambda model: euler_sample(model, noise, 1))
    return {"flow": flow, "reflow": reflow}


def make_figures(args, flow: nn.Module, reflow: nn.Module) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    nets = {"rectified flow": flow, "reflow": reflow}
    nets = {method: common.recorded(net, args) for method, net in nets.items()}
    noise = common.noise(args, 16, 1, 28, 28)
    draw_path(args, nets, noise)

    samplers = []
    for method, sampler, solve, counts in (
            ("rectified flow", "Euler", euler_sample, args.steps),
            ("rectified flow", "AB2", adams_sample, args.ab2_steps),
            ("reflow", "Euler", euler_sample, args.steps)):
        for n in sorted({*counts}):
            made = {"name": f"{method}, {sampler}, {n} step{'s' * (n > 1)}", "method": method,
                    "sampler": sampler, "steps": n, "network_calls": n}
            def draw(x, rng, net=nets[method], solve=solve, n=n):
                return solve(net, x, n)
            samplers.append((made, draw))
    straight = {name: straightness(net, noise, 100) for name, net in nets.items()}
    title = "Columns share their noise"
    common.draw_and_time(args, samplers, noise, title, straightness=straight)


def draw_path(args, nets: dict, x0: Tensor) -> None:
    """Paths before and after the reflow: two digits as stills, eight as a film."""
    def path(net):
        states = []  # (x_t, x̂_1) at every step
        x1 = euler_sample(net, x0, 30, lambda t, x, v: states.append((x, x + (1 - t) * v)))
        return [*states, (x1, x1)]
    paths = [path(net) for net in nets.values()]
    # for two digits, and each network: a row of x_t, and one of x̂_1
    images = [state[k][i] for i in range(2) for path in paths
              for k in (0, 1) for state in path[::3]]
    title = "On the path: x_t, and below it x̂₁, the guess of the image"
    rows = [f"{name}: {what}" for name in nets for what in ("x_t", "x̂₁")] * 2
    below = [f"t={i / 10:.1f}" for i in range(11)]
    file = args.out_dir / "samples_path.png"
    common.save_grid(torch.stack(images), file, title, 11, rows, below)
    film = [torch.cat([x[:8] for x, _ in states]) for states in zip(*paths)]
    common.save_gif(film[::2], args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
