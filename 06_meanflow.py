"""MeanFlow on MNIST: one step from noise to digits, without pairs.

For one step, 04 needs a reflow: it trains on pairs of noise and image that its flow made.
MeanFlow learns one step from images alone. Its network does not predict the velocity at a
point of the path, but the average velocity u from there to a later time r. Then one step of
u from t = 0 to r = 1 reaches the image, however much the path bends. To average v, we would
have to follow the path, in many steps. But u obeys a law at each point, which needs only v
there and the change of u, and the network itself can estimate that change.

    u(x_t, t, r) = 1/(r-t) ∫ v(x_s, s) ds, s = t ... r     Geng et al. 2025; the path: dx_s = v ds
    u(x_t, t, t) = v(x_t, t), the velocity of 04           the limit r → t
    law:   u = v + (r-t) du/dt                             their "MeanFlow identity", t reversed
           du/dt = ∂u/∂x · v + ∂u/∂t, r fixed              the chain rule
    loss = E log(‖(x_1 - x_0) + (r-t) du_θ/dt - u_θ‖² + c) at x_t = (1-t) x_0 + t x_1
           c = 0.01, ‖...‖² is a sum over pixels           no gradient through du_θ/dt
    sample: x_r = x_t + (r-t) u_θ(x_t, t, r)               one step: t = 0, r = 1

    paper           code                      shape
    ε, x            x0, x1                    (B, 1, 28, 28), noise and image: x_0, x_1 as in 04
    t >= r          t <= r                    (B,) from 0, noise, to 1, data: 1 minus theirs
    u_θ(z_t, r, t)  model(x_t, t, r)          (B, 1, 28, 28), minus theirs, as is v
    du/dt           du_dt                     (B, 1, 28, 28), along the path

Where does the law come from? Write (r-t) u = ∫ v ds, and differentiate both sides by t
along the path. As t is the lower end of the integral, -u + (r-t) du/dt = -v.

v is the mean of x_1 - x_0 at x_t, so that may replace v in a squared error. Geng et al. 2025
use it in du/dt, too, but there ∂u/∂x multiplies its noise. So in du/dt we take the network's
own v, u_θ(x_t, t, t), as they do later (arXiv 2512.02012). After three epochs, one step
scored 2.90, not 4.94 (Fréchet distance: lower is better), but ten steps 0.710, not 0.477.

First we train a flow, as in 04, but its output is v. (With the image as output, and x_1 - x_0
in du/dt, one step was worse.) A copy then also takes r, as the gap r - t, which at first
changes nothing, and learns u. For half of the images r = t: there the target is x_1 - x_0,
as for the flow.

Why log? For each image, its gradient is that of the squared error, divided by that error
+ c: Geng's adaptive weight with p = 1. Near t = 0 the network's (r-t) du/dt is far too large,
since its sinusoids of t are fast, and such times are rare. Without the weight, and with more
times near 0, such points ruined a training (RESULTS.md). The price: where targets differ, u
leans to the most frequent, away from their mean.

    python 06_meanflow.py                    flow and MeanFlow, for a GPU

Trained with the defaults on an NVIDIA H200, the flow (by Euler's method, measured apart) and
MeanFlow have these Fréchet distances of 5,000 samples (real digits have 0.058):
    steps           1      2      5      10
    flow            50.3   5.36   0.962  0.543
    MeanFlow        1.50   0.890  0.592  0.615
MeanFlow learned for 100 seconds, as long as 04 took for pairs and reflow. That reflow, from
04's own flow, is better: 0.739 with one step, 0.662 with two. From the very same flow, after
25 minutes each on a core of an AMD EPYC, one step of the reflow had 1.49 with both of two
seeds, one of MeanFlow 2.58 and 3.56.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import common
from common import Attention, ResBlock, number


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "MeanFlow.", epochs=10, batch_size=128, lr=2e-3)
    add, count = parser.add_argument, number(int, 1)
    add("--width", type=int, choices=[8, 16, 32, 64], default=32, help="channels at 28x28")
    add("--steps", type=count, nargs="+", default=[1, 2, 5, 10], help="of the sampler")
    add("--equal", type=number(float, 0, 1), default=0.5, help="share of images with r = t")
    add("--tangent", choices=["own", "pair"], default="own", help="v in du/dt: own, or x_1 - x_0")
    add("--derivative", choices=["difference", "jvp"], default="difference", help="for du/dt")
    add("--meanflow-epochs", type=count, default=18, help="passes for MeanFlow")
    add("--meanflow-lr", type=number(float, 1e-9), default=1e-3, help="peak rate there")
    tiny = {"dataset": "synthetic", "train_images": 256, "epochs": 8, "batch_size": 16,
            "width": 8, "steps": [1, 2, 5], "eval_samples": 20, "meanflow_epochs": 4}
    return common.parse(parser, argv, tiny)


class UNet(nn.Module):
    """vs 04: predicts u itself, and also takes r (B,), the later time; a flow leaves r out."""

    def __init__(self, width: int):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 4 * width, 4 * width
        self.c_time = c_time
        self.time = nn.Sequential(
            nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time), nn.SiLU()
        )
        self.gap = nn.Sequential(
            nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time, bias=False)
        )
        nn.init.zeros_(self.gap[-1].weight)  # at first r adds nothing (so no bias, either)
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
        self.norm_out = nn.GroupNorm(8, c1)
        self.conv_out = nn.Conv2d(c1, 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # a fresh network predicts a constant

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        emb = self.time(common.timestep_embedding(t * 1000, self.c_time))
        if r is not None:
            gap = common.timestep_embedding((r - t) * 100, self.c_time)  # 100: chosen, not tuned
            emb = emb + self.gap(gap)
        h0 = self.down0(self.conv_in(x), emb)  # (B, c1, H, W)
        h1 = self.down1_attention(self.down1(self.down0_to_1(h0), emb))  # (B, c2, H/2, W/2)
        h = self.mid1(self.down1_to_mid(h1), emb)  # (B, c3, H/4, W/4)
        h = self.mid2(self.mid_attention(h), emb)
        h = self.mid_to_up0(F.interpolate(h, scale_factor=2.0))  # (B, c2, H/2, W/2)
        h = self.up0_attention(self.up0(torch.cat([h, h1], dim=1), emb))
        h = self.up0_to_1(F.interpolate(h, scale_factor=2.0))  # (B, c1, H, W)
        h = self.up1(torch.cat([h, h0], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))  # vs 04: u itself


def make_models(args) -> dict[str, nn.Module]:
    return {name: UNet(args.width).to(args.device, memory_format=torch.channels_last)
            for name in ("flow", "meanflow")}


def draw_times(n: int, equal: int, rng=None, device="cpu") -> tuple[Tensor, Tensor]:
    """t <= r, (n,) each: the smaller and the larger of two logit-normal draws.

    For the first `equal` of them r = t. Times near 0 and 1 are rare, and both together almost
    never come: for one step, from 0 to 1, the network has to extrapolate.
    """
    times = torch.randn(2, n, generator=rng, device=device).sigmoid()
    times[1, :equal] = times[0, :equal]
    return times.amin(0), times.amax(0)


@torch.no_grad()
def total_derivative(model, x: Tensor, t: Tensor, r: Tensor, v: Tensor, by: str) -> Tensor:
    """du/dt = ∂u/∂x · v + ∂u/∂t at x (B, ...), t and r (B,): the change of u along the path.

    "jvp", a Jacobian-vector product as in Geng et al., is exact, but slower, and it follows the
    fast wiggles of the sinusoids of t. "difference" is its mean from t - 0.01 to t + 0.01.
    """
    if by == "jvp":
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no jvp
            return torch.func.jvp(lambda x, t: model(x, t, r), (x, t), (v, torch.ones_like(t)))[1]
    h = 0.01  # t + h may pass r, but there (r-t) du/dt is small; times beyond 0 and 1 are rare
    return (model(x + h * v, t + h, r) - model(x - h * v, t - h, r)) / (2 * h)


def meanflow_loss(
    model, x0: Tensor, x1: Tensor, t: Tensor, r: Tensor, equal=0, tangent="own",
    by="difference", adaptive=True,
) -> Tensor:
    """The loss above (Geng et al. 2025); or, if not `adaptive`, without the log.

    x0 (noise) and x1 (data): (B, 1, H, W); t <= r: (B,) in [0, 1], with r = t for the first
    `equal`. `tangent` is v in du/dt: the network's "own", u(x_t, t, t), or x1 - x0 of the "pair".
    """
    t_ = t.view(-1, 1, 1, 1)  # one for each image
    x_t, target = (1 - t_) * x0 + t_ * x1, x1 - x0
    with torch.no_grad():
        x, t_gap, r_gap = x_t[equal:], t[equal:], r[equal:]  # where t < r
        v = model(x, t_gap, t_gap) if tangent == "own" else target[equal:]
        du_dt = total_derivative(model, x, t_gap, r_gap, v, by)
        target[equal:] += (r.view_as(t_) - t_)[equal:] * du_dt
    error = (target - model(x_t, t, r)).square().flatten(1).sum(1)
    return (error + 0.01).log().mean() if adaptive else error.mean()


def even_times(steps: int) -> list[float]:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()


@torch.no_grad()
def meanflow_sample(model, x0: Tensor, steps: int, trace=None) -> Tensor:
    """From noise x0 (B, ...) to an image: each step goes straight to the next time by the
    average velocity (Geng et al. 2025). `trace(t, x_t)`, if given, sees every step.
    """
    x = x0
    for t, r in tqdm(list(pairwise(even_times(steps))), "MeanFlow", leave=False, delay=2):
        if trace:
            trace(t, x)
        t_, r_ = x.new_full((len(x),), t), x.new_full((len(x),), r)
        x = x + (r - t) * model(x, t_, r_)
    return x


def train(args) -> dict[str, nn.Module]:
    """Trains a flow, then, from its weights, the average velocity; returns moving averages."""
    images, _ = common.load_images(args)
    torch.manual_seed(args.seed)
    models = make_models(args)
    stage = common.Stage(args, "flow", models["flow"], args.epochs, args.lr, images)
    if stage.done < args.epochs:  # the flow will change: a MeanFlow from it is no use
        args.state["networks"].pop("meanflow", None)
    for (x1,) in stage:
        x0 = torch.randn_like(x1)
        t = torch.randn(len(x1), 1, 1, 1, device=x1.device).sigmoid()  # logit-normal, as in 04
        x_t = (1 - t) * x0 + t * x1
        stage.step(F.mse_loss(stage.model(x_t, t.flatten()), x1 - x0))
    flow, model = stage.ema, models["meanflow"]
    model.load_state_dict(flow.state_dict())  # a copy, which --resume replaces
    epochs, lr = args.meanflow_epochs, args.meanflow_lr
    stage = common.Stage(args, "meanflow", model, epochs, lr, images)
    equal = round(args.equal * args.batch_size)
    for (x1,) in stage:
        x0 = torch.randn_like(x1)
        t, r = draw_times(len(x1), equal, device=x1.device)
        stage.step(meanflow_loss(
            stage.model, x0, x1, t, r, equal, args.tangent, args.derivative))
    return {"flow": flow, "meanflow": stage.ema}


def make_figures(args, meanflow: nn.Module) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    net = common.as_function(meanflow, args)
    rng = torch.Generator().manual_seed(args.seed)  # of the CPU: the same on every device
    noise = torch.randn(16, 1, 28, 28, generator=rng).to(args.device)
    draw_path(args, net, noise)

    samplers = []
    for n in sorted({*args.steps}):
        name = f"MeanFlow, {n} step{'s' * (n > 1)}"
        made = {"name": name, "method": "MeanFlow", "sampler": "MeanFlow", "steps": n}
        samplers.append((made, lambda x, rng, n=n: meanflow_sample(net, x, n)))
    common.measure(args, samplers, noise, "Columns share their noise")


def draw_path(args, net, x0: Tensor) -> None:
    """Eight images on their way in 20 steps, and below them where one step from there ends."""
    path = []
    x1 = meanflow_sample(net, x0[:8], 20, trace=lambda t, x: path.append((t, x)))
    film = []
    for t, x in path:
        t_, r_ = x.new_full((len(x),), t), x.new_full((len(x),), 1)
        film.append(torch.cat([x, x + (1 - t) * net(x, t_, r_)]))
    film.append(torch.cat([x1, x1]))
    common.save_gif(film, args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with common.stopped(args):
        if args.sample_only:
            models = common.load_networks(args.state, make_models(args))
        else:
            models = train(args)
        make_figures(args, models["meanflow"])
    print(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    main()
