"""Rectified flow and reflow on MNIST: straight ways from noise to digits, for one step.

Pair every image with a noise, draw the straight line between them, and teach a network which way
the lines run at each point: the average of all lines that cross there. To sample, follow these
directions from a new noise. The lines cross, so their average bends, and a bent way needs many
small steps. Reflow makes it straight: follow the trained flow from many noises, pair each noise
with the image it led to, and train again on these pairs. Their lines hardly cross any more, so the
new flow's direction at the start already points at the image, and one step gets there.

    x_t  = (1-t) x_0 + t x_1                       Liu et al. 2022, section 2.1
    loss = E ‖(x_1 - x_0) - v_θ(x_t, t)‖²          Liu, Eq. 1; in the reflow E |...|
    Euler: x_{t+1/N} = x_t + v_θ(x_t, t) / N       Liu, section 2.1, the flow dx = v dt
    reflow: the loss on pairs (x_0, x_1) where x_1 is where the flow leads from x_0
    S    = ∫ E ‖(x_1 - x_0) - v_θ(x_t, t)‖² dt     Liu: the straightness, 0 on straight ways

    paper           code                      shape
    x_0 = X_0, Z_0  x0, noise                 (B, 1, 28, 28)
    x_1 = X_1, Z_1  x1, images                (B, 1, 28, 28) in [-1, 1]
    t               t                         (B,) from 0, noise, to 1, data: against 01's
    v = v_θ(x_t, t) v = model(x_t, t)         (B, 1, 28, 28)

    python 04_rectified_flow.py                  flow, pairs, reflow; then sample, time, draw
    python 04_rectified_flow.py --sample-only    redo all figures, no training
    python 04_rectified_flow.py --fast-dev       all of it in seconds

Measured on two CPU cores (Intel Xeon with AVX-512, torch 2.14.1), network of 01: --epochs 8
--batch-size 64 --pairs 15000 --real-pairs 15000 --pair-steps 10 --reflow-epochs 6, in 32 minutes
for the flow on both cores, 27 for the pairs and 24 for the reflow on one. Fréchet distance, 5,000
samples by 05_compare.py (training digits 0.058), and straightness S:
    Euler steps     1      2      5      10      S
    flow            52.4   8.19   1.24   0.797   0.077
    reflow          2.63   2.24   1.72   1.55    0.0036
One step after the reflow looks like five before it, but does not score so. Much of the distance is
noise left in the black, too faint to see: with values below 16 of 255 set to black one step scores
1.55, and five before the reflow 1.15.
Tried (1,000 samples, 2,000 for 5 steps): logit-normal t for the flow: after one epoch 45.5, 8.17,
3.41 with 1, 2, 5 steps, uniform t 64.3, 27.6, 5.11. Squared error in the reflow: 3.47, 2.55, 1.65
with 1, 2, 10 steps, absolute 2.51, 2.16, 1.52. Two more epochs at --reflow-t all-at-0: 2.25 with
one step, 40 with two. What real pairs and half of t at 0 give was measured in the latent: see 04b.

Left out: a second reflow; perceptual losses for the one step (Lee et al. 2024).
"""

import json
import math
import shutil
import sys
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import Downsample, ResBlock, SelfAttention, Upsample


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(
        __file__, "Rectified flow and reflow on MNIST.", epochs=10, batch_size=128, lr=2e-3
    )
    add = parser.add_argument
    add("--width", type=int, default=32, help="channels at 28x28; twice as many at 14x14 and 7x7")
    add("--blocks", type=int, default=1, help="residual blocks a level, down and up")
    add("--ema-decay", type=float, default=0.999, help="decay of the weights' moving average")
    add("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 100], help="Euler steps to sample by")
    add("--flow-t", choices=T_DENSITIES, default="logit-normal", help="density of t in training")
    add("--reflow-t", choices=T_DENSITIES, default="half-at-0", help="the same for the reflow")
    add("--pairs", type=int, default=60_000, help="noises to carry forwards through the flow")
    add("--real-pairs", type=int, default=60_000, help="images to carry backwards through it")
    add("--pair-steps", type=int, default=20, help="steps on the way, each of two network calls")
    add("--reflow-epochs", type=int, default=10, help="passes over all the pairs")
    add("--reflow-lr", type=float, default=1e-3, help="peak learning rate of the reflow")
    tiny = {"epochs": 2, "batch_size": 32, "train_images": 256, "width": 8, "steps": [1, 2, 5],
            "pairs": 256, "real_pairs": 128, "pair_steps": 3, "reflow_epochs": 2,
            "eval_samples": 20}
    args = common.parse(parser, argv, fast_dev=tiny, shape=["width", "blocks"])
    if (args.sample_only or args.export) and "flow" not in args.saved:
        sys.exit(f"{args.checkpoint} ends in the flow's stage: go on with --resume")
    if args.width % 8:
        parser.error(f"--width {args.width}: must be a multiple of 8, for the group norms")
    if min(args.steps) < 1:
        parser.error(f"--steps {min(args.steps)}: at least 1")
    if args.batch_size > args.pairs + args.real_pairs:
        parser.error(f"--batch-size {args.batch_size}: more than there will be pairs")
    if args.real_pairs > args.train_images:
        parser.error(f"--real-pairs {args.real_pairs}: there are {args.train_images} images")
    return args


# ---------------------------------------------------------------------------------- network


class UNet(nn.Module):
    """v_θ(x_t, t): (B, 1, 28, 28), (B,) in [0, 1] -> (B, 1, 28, 28). vs 01: t is continuous."""

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


def make_pairs(model, n: int, steps: int, rng: torch.Generator, device="cpu", images=None):
    """n pairs (x0, x1), (n, 1, 28, 28) each, that the flow joins: noise from `rng` carried on to
    images, or real images (n, ...) carried back to noise, by `steps` of Heun's method.

    Liu et al. 2022 (reflow), and for the images Lee et al. 2024, section 4.
    """
    start = torch.randn(n, 1, 28, 28, generator=rng).to(device) if images is None else images
    parts = start.split(100 if start.device.type == "cpu" else 1000)
    end = [euler_sample(model, x, steps, images is not None, heun=True) for x in parts]
    return (start, torch.cat(end)) if images is None else (torch.cat(end), start)


def load_pairs(args, flow: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, half precision on the device; each thousand is made once and kept as a file."""
    net, folder, pairs = common.for_sampling(flow, args), args.out_dir / "pairs", []
    folder.mkdir(exist_ok=True)
    chunks = [(kind, n, min(n + 1000, size))
              for kind, size in (("noise", args.pairs), ("image", args.real_pairs))
              for n in range(0, size, 1000)]
    for kind, n, end in tqdm(chunks, "pairs, in thousands"):
        path = folder / f"{kind}_{n}_to_{end}_by_{args.pair_steps}_steps_{args.seed}.pt"
        if not path.exists():
            rng = torch.Generator().manual_seed(args.seed + 1000 + n)
            real = images[n:end] if kind == "image" else None
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


def train(args) -> tuple[nn.Module, nn.Module, list]:
    """Train the flow, make pairs, train the reflow on them; both EMA networks and the history."""
    images, labels = common.load_digits(args)
    history = args.saved["history"] if args.resume else []

    def draw_t(density: str, n: int, rng) -> Tensor:
        return T_DENSITIES[density](torch.rand(n, generator=rng, device=args.device))

    def of_images(net, x1: Tensor, _, rng) -> Tensor:
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
        before = len(history)
        data = images, labels
        flow = fit(args, history, "flow", args.epochs, args.lr, flow, data, of_images, done={})
        if len(history) > before:
            shutil.rmtree(args.out_dir / "pairs", ignore_errors=True)  # of another flow
    pairs = load_pairs(args, flow, images)
    model = make_model(args)
    model.load_state_dict(flow.state_dict())
    reflow = fit(args, history, "reflow", args.reflow_epochs, args.reflow_lr, model, pairs,
                 of_pairs, done={"flow": flow})
    draw_loss_by_t(args, flow, reflow, pairs)
    return flow, reflow, history


@torch.no_grad()
def draw_loss_by_t(args, flow: nn.Module, reflow: nn.Module, pairs: tuple) -> None:
    """The loss in each tenth of t: where the lines cross, and that they hardly do after reflow."""
    rng = torch.Generator(args.device).manual_seed(args.seed)
    x1 = common.load_digits(args, train=False)[0][:500]
    x0 = torch.randn(x1.shape, generator=rng, device=args.device)
    there = [half[:500].float() for half in pairs]
    lines = {"flow, test digits": (flow, x0, x1), "reflow, its pairs": (reflow, *there)}
    for name, (model, x0, x1) in lines.items():
        u = torch.rand(len(x1), generator=rng, device=args.device)
        losses = [flow_loss(model, x0, x1, (i + u) / 10).item() for i in range(10)]
        lines[name] = ([(i + 0.5) / 10 for i in range(10)], losses)
    title = "What the direction leaves open: the ways cross before the reflow, hardly after it"
    common.save_plot(args.out_dir / "loss_by_t.png", lines, title=title, yscale="log",
                     xlabel="t (0 is noise, 1 data)", ylabel="squared error of the velocity")


# ------------------------------------------------------------------------ figures and timings


def make_figures(args, flow: nn.Module, reflow: nn.Module, history: list) -> None:
    """Before and after the reflow, by few and many steps: pictures, timings, and sets for 05."""
    nets = {"rectified flow": common.for_sampling(flow, args),
            "reflow": common.for_sampling(reflow, args)}
    x0 = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(args.seed))
    x0 = x0.to(args.device)  # drawn on the CPU: the same noise on every device
    draw_paths(args, nets, x0)
    lines = {}
    for stage, unit in (("flow", "squared error"), ("reflow", "absolute error")):
        epochs = [x for x in history if x["stage"] == stage]
        lines[f"{stage}: {unit}"] = ([x["epoch"] for x in epochs], [x["loss"] for x in epochs])
    common.save_plot(args.out_dir / "loss.png", lines, title="Flow and reflow: training loss",
                     xlabel="epoch", ylabel="error of the velocity", yscale="log")

    timings = common.training_report(args, reflow, history) | {"samplers": []}
    timings["straightness"] = {name: straightness(net, x0, 100) for name, net in nets.items()}
    print("straightness (0 is straight):", timings["straightness"])
    samplers = [({"method": method, "sampler": "Euler", "steps": n},
                 partial(euler_sample, net, steps=n))
                for method, net in nets.items() for n in sorted({*args.steps})]
    rows = {}
    for made, sample in samplers:
        images, timing = common.time_sampler(sample, x0)
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
        common.save_eval(args, name, sample, seed=args.seed, **made)


def draw_paths(args, nets: dict, x0: Tensor) -> None:
    """The ways of four digits as stills, of sixteen as a moving picture, before and after."""
    paths = {name: [] for name in nets}  # (t, x_t, v) at every step
    for net, path in zip(nets.values(), paths.values()):
        x1 = euler_sample(net, x0, 30, trace=lambda *state, path=path: path.append(state))
        path.append((1.0, x1, torch.zeros_like(x1)))
    stills, images = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30], []
    for digit in range(2):
        for path in paths.values():
            images += [path[i][1][digit] for i in stills]
            images += [(x + (1 - t) * v)[digit] for t, x, v in (path[i] for i in stills)]
    title = "On the way: x_t, and below it where its direction points, x_t + (1-t) v"
    names = [f"{name}{what}" for name in nets for what in (": x_t", ": points at")] * 2
    common.save_grid(torch.stack(images), args.out_dir / "samples_path.png", title,
                     columns=len(stills), rows=names, below=[f"t={i / 30:.1f}" for i in stills])
    film = []
    for (_, before, _), (_, after, _) in [*zip(*paths.values())][::2]:  # noise makes large files
        wall = torch.ones_like(before[:4, None])  # before | after
        film.append(torch.cat([before.unflatten(0, (4, 4)), wall, after.unflatten(0, (4, 4))], 1))
    common.save_gif([frame.flatten(0, 1) for frame in film], args.out_dir / "path.gif", columns=9)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.export:
        return common.export_weights(args, "flow", "ema")
    try:
        if args.sample_only:
            flow, reflow, history = make_model(args), make_model(args), args.saved["history"]
            flow.load_state_dict(args.saved["flow"])
            reflow.load_state_dict(args.saved["ema"])
        else:
            flow, reflow, history = train(args)
        make_figures(args, flow, reflow, history)
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume goes on from {args.checkpoint}, if an epoch was finished")
    print(f"pictures, timings and weights are in {args.out_dir}")


if __name__ == "__main__":
    main()
