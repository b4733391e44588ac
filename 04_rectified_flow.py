"""Rectified flow and reflow on MNIST: straight paths from noise to digits, for sampling in one step.

Careful with the letters: x_0 was the image in 01, and is the NOISE here; x_1 is the image.

Pair every image with a noise and draw the straight line between them. At each point, a network
learns the direction of the lines: where lines cross, their average. To sample, start from a new
noise and follow these directions. Because the lines cross, their average bends, and a bent path
needs many small steps. Reflow straightens it: follow the trained flow from many noises, pair each
noise with the image where it ends, and go on training on these pairs. Their lines hardly cross, so
the direction at the start already points at the image, and one step gets there. Real images can
be such pairs, too, when the flow carries them backwards to their noise.

    x_t    = (1-t) x_0 + t x_1                                       Liu et al. 2022, section 2.1
    loss   = E ‖(x_1 - x_0) - v_θ(x_t, t)‖² on the straight lines    Liu, Eq. 1
    Euler:   z_{t+1/N} = z_t + v_θ(z_t, t) / N from z_0 = x_0        Liu, the flow dz = v dt
    reflow:  the loss (E |...| here) on pairs (z_0, z_1) of the flow, from the flow's weights
    S      = E ‖(z_1 - z_0) - v_θ(z_t, t)‖² on the flow's own paths  Liu: straightness, 0 is straight

    paper           code                      shape
    x_0 = z_0       x0, noise                 (B, 1, 28, 28)
    x_1, z_1        x1, images                (B, 1, 28, 28) in [-1, 1]
    t               t                         (B,) from 0, noise, to 1, data: the reverse of 01
    v_θ(x_t, t)     v = model(x_t, t)         (B, 1, 28, 28)

The loss stays large where lines cross, however good the network; S does not see these lines. The
code averages both over the pixels.

    python 04_rectified_flow.py                flow, pairs and reflow, for a GPU
    python 04_rectified_flow.py --epochs 8 --batch-size 64 --pairs 15000 --real-pairs 15000 \\
        --pair-steps 10 --reflow-epochs 6      an hour and a half on two CPU cores
    python 04_rectified_flow.py --sample-only  no training: the shipped weights
    python 04_rectified_flow.py --fast-dev     everything in miniature, in seconds

RESULT

Left out: a second reflow; perceptual losses for the one step (Lee et al. 2024).
"""

import copy
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
from common import Attention, ResBlock, number


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Rectified flow and reflow on MNIST.", 10, 128, 2e-3)
    add, count = parser.add_argument, number(int, 1)
    add("--width", type=int, choices=[8, 16, 32, 64, 128], default=32, help="channels at 28x28")
    add("--steps", type=count, nargs="+", default=[1, 2, 5, 10, 100], help="of Euler's method")
    add("--flow-t", choices=T_DENSITIES, default="logit-normal", help="density of t in training")
    add("--reflow-t", choices=T_DENSITIES, default="half-at-0", help="the same for the reflow")
    add("--pairs", type=number(int, 0), default=60_000, help="pairs made from noise")
    add("--real-pairs", type=number(int, 0), default=60_000, help="pairs made from images")
    add("--pair-steps", type=count, default=20, help="Heun steps to make a pair, of two calls")
    add("--reflow-epochs", type=count, default=10, help="passes over all the pairs")
    add("--reflow-lr", type=number(float, 1e-9), default=1e-3, help="peak learning rate there")
    tiny = {"epochs": 8, "batch_size": 16, "train_images": 256, "width": 8, "steps": [1, 2, 5],
            "pairs": 256, "real_pairs": 128, "pair_steps": 3, "reflow_epochs": 4,
            "eval_samples": 20}
    args = common.parse(parser, argv, tiny)
    if args.batch_size > args.pairs + args.real_pairs:
        parser.error(f"--batch-size {args.batch_size}: more than there will be pairs")
    if args.real_pairs > args.train_images:
        parser.error(f"--real-pairs {args.real_pairs}: there are {args.train_images} images")
    return args


T_DENSITIES = {  # t in [0, 1] from uniform u: the inverse of the density's integral
    "uniform": lambda u: u,
    # sigmoid of a normal number, most often near the middle: Esser et al. 2024, Eq. 19
    "logit-normal": lambda u: torch.special.ndtri(u).sigmoid(),
    # density ∝ cosh(4 (2t - 1)), most often near the ends: the idea of Lee et al. 2024, section 4,
    # but steeper than in their code, cosh(2 (2t - 1))
    "u-shaped": lambda u: 0.5 + torch.asinh((2 * u - 1) * math.sinh(4)) / 8,
    # every other t is 0, where a sampler of one step takes it; the others are u-shaped
    "half-at-0": lambda u: T_DENSITIES["u-shaped"]((2 * u - 1).clamp(min=0)),
    "all-at-0": lambda u: 0 * u,  # distillation (Liu et al.), for one step alone
}


# ---------------------------------------------------------------------------------- network


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
    model = UNet(args.width, t_max=1).to(args.device, memory_format=torch.channels_last)
    return {"flow": model, "reflow": copy.deepcopy(model)}


# ----------------------------------------------------------------------------------- method


def flow_loss(model, x0: Tensor, x1: Tensor, t: Tensor, error=F.mse_loss) -> Tensor:
    """Liu et al. 2022, Eq. 1: the mean squared error of the velocity on the line from x0 to x1.

    x0, noise, and x1, data: (B, ...); t: (B,) in [0, 1]. Where lines cross, only the squared
    error has their average as its minimum; where they do not, any other `error` does as well.
    """
    t_ = t.view(-1, *[1] * (x0.dim() - 1))
    x_t = (1 - t_) * x0 + t_ * x1
    return error(model(x_t, t), x1 - x0)


# --------------------------------------------------------------------------------- samplers


def even_times(steps: int) -> list[float]:
    """steps + 1 times from 0 to 1."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()


@torch.no_grad()
def euler_sample(model, x0: Tensor, steps: int, trace=None) -> Tensor:
    """From noise x0 (B, ...) to an image along dx = v dt, by Euler's method in `steps` steps.

    `trace(t, x_t, v)`, if given, sees every step.
    """
    x = x0
    for t, t_next in tqdm(list(pairwise(even_times(steps))), "Euler", leave=False, delay=2):
        v = model(x, torch.full((len(x),), t, device=x.device))
        if trace:
            trace(t, x, v)
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def heun_solve(model, x: Tensor, times: list[float]) -> Tensor:
    """Follow dx = v dt from x (B, ...) at times[0] to times[-1] by Heun's method.

    Each step takes the average of the velocities at its two ends: second order, for two calls.
    """
    for t, t_next in pairwise(times):
        v = model(x, torch.full((len(x),), t, device=x.device))
        x_next = x + (t_next - t) * v
        v_next = model(x_next, torch.full((len(x),), t_next, device=x.device))
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def straightness(model, x0: Tensor, steps: int) -> float:
    """S of Liu et al. 2022, as a mean over pixels, from noise x0 (B, ...) by Euler's method."""
    velocities = []
    x1 = euler_sample(model, x0, steps, trace=lambda t, x, v: velocities.append(v))
    return torch.stack([(x1 - x0 - v).square().mean() for v in velocities]).mean().item()


def make_pairs(model, n: int, steps: int, rng: torch.Generator, device="cpu", x1=None):
    """n pairs (x0, x1), (n, 1, 28, 28) each: noise from `rng` and where the flow takes it, or
    where real data x1 (n, ...) comes from: the same flow backwards in time.
    """
    start = torch.randn(n, 1, 28, 28, generator=rng).to(device) if x1 is None else x1
    times = even_times(steps) if x1 is None else even_times(steps)[::-1]
    size = 1000 if start.is_cuda else 100
    end = torch.cat([heun_solve(model, part, times) for part in start.split(size)])
    return (start, end) if x1 is None else (end, start)


# --------------------------------------------------------------------------------- training


def train(args) -> dict[str, nn.Module]:
    """Train the flow, make pairs, train the reflow on them; returns their moving averages."""
    images, labels = common.load_digits(args)
    torch.manual_seed(args.seed)
    models, folder = make_models(args), args.out_dir / "pairs"
    stage = common.Stage(args, "flow", models["flow"], args.epochs, args.lr, images, labels)
    if stage.done < args.epochs:
        shutil.rmtree(folder, ignore_errors=True)  # the pairs of another flow
    for x1, _ in stage:
        x0 = torch.randn(x1.shape, generator=stage.rng, device=x1.device)
        u = torch.rand(len(x1), generator=stage.rng, device=x1.device)
        stage.step(flow_loss(stage.net, x0, x1, T_DENSITIES[args.flow_t](u)))
    flow = stage.ema
    pairs = load_pairs(args, common.as_function(flow, args, sampling=True), folder, images)
    model, lr = models["reflow"], args.reflow_lr
    model.load_state_dict(flow.state_dict())
    stage = common.Stage(args, "reflow", model, args.reflow_epochs, lr, *pairs)
    for x0, x1 in stage:
        u = torch.rand(len(x1), generator=stage.rng, device=x1.device)
        t = T_DENSITIES[args.reflow_t](u)
        stage.step(flow_loss(stage.net, x0.float(), x1.float(), t, error=F.l1_loss))
    return {"flow": flow, "reflow": stage.ema}


def load_pairs(args, net, folder: Path, data: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, in half precision on the device; each thousand is made once and kept in a file."""
    folder.mkdir(exist_ok=True)
    chunks = [(kind, n, min(n + 1000, size))
              for kind, size in (("noise", args.pairs), ("real", args.real_pairs))
              for n in range(0, size, 1000)]
    pairs = []
    for kind, n, end in tqdm(chunks, "pairs, in thousands"):
        path = folder / f"{kind}_{n}_to_{end}_by_{args.pair_steps}_steps_{args.seed}.pt"
        if not path.exists():
            rng = torch.Generator().manual_seed(args.seed + 1000 + n)
            real = data[n:end] if kind == "real" else None
            pair = make_pairs(net, end - n, args.pair_steps, rng, args.device, real)
            common.save(path, {"x0": pair[0].half().cpu(), "x1": pair[1].half().cpu()})
        pairs.append(torch.load(path, map_location=args.device, weights_only=True))
    return tuple(torch.cat([pair[side] for pair in pairs]) for side in ("x0", "x1"))


# ------------------------------------------------------------------------ figures and timings


def make_figures(args, flow: nn.Module, reflow: nn.Module) -> None:
    """16 digits from the same noise by every sampler: pictures, timings, and sets for 05."""
    nets = {"rectified flow": common.as_function(flow, args, sampling=True),
            "reflow": common.as_function(reflow, args, sampling=True)}
    x0 = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(args.seed))
    x0 = x0.to(args.device)  # drawn on the CPU: the same noise on every device
    draw_path(args, nets, x0)

    samplers = []
    for method, net in nets.items():
        for n in sorted({*args.steps}):
            made = {"name": f"{method}, {n} steps", "method": method, "sampler": "Euler"}
            samplers.append((made | {"steps": n}, lambda x, rng, net=net, n=n: euler_sample(net, x, n)))
    straight = {name: straightness(net, x0, 100) for name, net in nets.items()}
    print(f"straightness S (0 is straight): {straight}")
    overview = "Euler sampling, before and after one reflow; columns share their noise"
    common.measure(args, samplers, x0, overview, straightness=straight)


def draw_path(args, nets: dict, x0: Tensor) -> None:
    """Paths before and after the reflow: two digits as stills, sixteen as a moving picture."""
    paths = {name: [] for name in nets}  # (t, x_t, v) at every step
    for net, path in zip(nets.values(), paths.values()):
        x1 = euler_sample(net, x0, 30, trace=lambda *state, path=path: path.append(state))
        path.append((1.0, x1, torch.zeros_like(x1)))
    images = []
    for digit in range(2):
        for path in paths.values():
            images += [x[digit] for t, x, v in path[::3]]
            images += [(x + (1 - t) * v)[digit] for t, x, v in path[::3]]
    title = "On the path: x_t, and below it where its velocity points, x_t + (1-t) v"
    rows = [f"{name}{what}" for name in nets for what in (": x_t", ": points at")] * 2
    common.save_grid(torch.stack(images), args.out_dir / "samples_path.png", title, 11, rows=rows,
                     below=[f"t={t:.1f}" for t, _, _ in path[::3]])
    film = []
    for (_, before, _), (_, after, _) in [*zip(*paths.values())][::2]:
        wall = torch.ones_like(before[:4, None])  # before | after
        frame = [before.unflatten(0, (4, 4)), wall, after.unflatten(0, (4, 4))]
        film.append(torch.cat(frame, dim=1).flatten(0, 1))
    common.save_gif(film, args.out_dir / "path.gif", columns=9)


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
