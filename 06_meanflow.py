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

Where does the law come from? Write (r-t) u = ∫ v ds, and differentiate both sides by t along
the path. As t is the lower end of the integral, -u + (r-t) du/dt = -v.

A squared error is least at the mean, and the mean of x_1 - x_0 at x_t is v: so, but for the
log, the loss may use x_1 - x_0. In du/dt that is noisy; there we take the network's own v (arXiv
2512.02012): after three epochs, one step scores 2.90, not 4.94, but ten steps 0.710, not 0.477.

First we train a flow, as in 04, whose output is v. A copy then also takes r, as the gap r - t,
which at first changes nothing, and learns u; model(x, t) without r is no flow any longer. For
half of the images r = t: there the target is x_1 - x_0, as for the flow. It learns as 01 does.

Why log? It divides the gradient of an image by its error + c: Geng's weight with p = 1. Our
sinusoids of t are so fast that near t = 0 du/dt is far too large; without the weight that ruined
a training (EXPERIMENTS.md). The price: where targets differ, u leans to the most frequent.

    python 06_meanflow.py                    flow and MeanFlow, for a GPU
    python 06_meanflow.py --sample-only      no training: the shipped weights

Fréchet distances of 5,000 samples (real digits: 0.045), by the defaults on an NVIDIA H200:
    steps           1      2      5      10
    flow, Euler     50.3   5.36   0.962  0.543
    MeanFlow        1.50   0.890  0.592  0.615
    reflow of 04    0.739  0.662  0.583  0.540
"""

import copy
import time
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import common
from common import COUNT, RATE, Attention, Between, ResBlock


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "MeanFlow.", epochs=10, lr=2e-3)
    add = parser.add_argument
    add("--width", type=int, choices=[8, 16, 32, 64], default=32, help="channels at 28x28")
    add("--steps", **COUNT, nargs="+", default=[1, 2, 5, 10], help="numbers of MeanFlow steps")
    add("--equal", type=float, choices=Between(0, 1), default=0.5, help="share with r = t")
    add("--tangent", choices=["own", "pair"], default="own", help="v in du/dt: own, or x_1 - x_0")
    add("--derivative", choices=["difference", "jvp"], default="difference", help="for du/dt")
    add("--meanflow-epochs", **COUNT, default=18, help="passes over the images for MeanFlow")
    add("--meanflow-lr", **RATE, default=1e-3, help="peak rate of MeanFlow")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 8, "steps": [1, 2, 5], "eval_samples": 20, "meanflow_epochs": 4}
    return common.parse(parser, argv, tiny, sampling=["steps"])


class UNet(nn.Module):
    """vs 04: predicts u itself, and also takes r (B,), the later time; a flow leaves r out."""
    def __init__(self, width: int, t_max: float = 1):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 4 * width, 4 * width
        self.c_time, self.time_scale = c_time, 1000 / t_max  # embed times up to 1000
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(),
                                  nn.Linear(c_time, c_time), nn.SiLU())
        self.gap = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(),
                                 nn.Linear(c_time, c_time, bias=False))
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
        self.norm_out = common.GroupNorm(8, c1)
        self.conv_out = nn.Conv2d(c1, 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # a fresh network predicts a constant

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
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


def make_models(width: int, device: str = "cpu") -> dict[str, nn.Module]:
    return {name: UNet(width).to(device, memory_format=torch.channels_last)
            for name in ("flow", "meanflow")}


def flow_loss(model, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """The error of v on the line from x0 to x1: Liu et al. 2022, Eq. 1.

    x0 (noise) and x1 (data): (B, 1, H, W); t: (B,) in [0, 1].
    The squared error makes v the mean where lines cross.
    """
    t_ = t.view(-1, 1, 1, 1)  # one for each image
    x_t = (1 - t_) * x0 + t_ * x1
    return F.mse_loss(model(x_t, t), x1 - x0)


def even_times(steps: int) -> list[float]:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()


def draw_times(n: int, equal: int, rng=None, device="cpu") -> tuple[Tensor, Tensor]:
    """t <= r, (n,) each: the smaller and the larger of two logit-normal draws.

    For the first `equal` of them r = t. Times near 0 and 1 are rare, and both together almost
    never come: for one step, from 0 to 1, the network has to extrapolate."""
    times = torch.randn(2, n, generator=rng, device=device).sigmoid()
    times[1, :equal] = times[0, :equal]
    return times.amin(0), times.amax(0)


@torch.no_grad()
def total_derivative(model, x: Tensor, t: Tensor, r: Tensor, v: Tensor, by: str) -> Tensor:
    """du/dt = ∂u/∂x · v + ∂u/∂t at x (B, ...), t and r (B,): the change of u along the path.

    "jvp", a Jacobian-vector product as in Geng et al., is exact, but slower, and it follows the
    fast wiggles of the sinusoids of t. "difference" is its mean from t - 0.01 to t + 0.01."""
    if by == "jvp":
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
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # exponential moving average
    large = [w for w in model.parameters() if w.dim() == 4 and min(w.shape[:2]) >= 16]
    small = [w for w in model.parameters() if w.dim() < 4 or min(w.shape[:2]) < 16]
    muon_lr, adamw_lr = torch.zeros(2, device=args.device)  # tensors: step() sees changes
    muon = common.Muon(large, muon_lr, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW(small, adamw_lr, weight_decay=0.01, fused=True, capturable=True)
    learned = [ema, model, muon, adamw]
    done = common.restore(state, name, epochs, learned)  # epochs of a checkpoint, or 0
    batches = len(data[0]) // args.batch_size or 1  # full ones in an epoch
    total = epochs * batches
    average = get_ema_multi_avg_fn(max(1 - 10 / total, 0))  # over about a tenth of the run
    averages, weights = ([x for x in net.state_dict().values() if x.is_floating_point()]
                         for net in (ema, model))

    def step(*batch: Tensor) -> Tensor:
        """On CUDA recorded and replayed: only work for the GPU may stand in here."""
        value = loss(model, *batch)
        model.zero_grad()
        value.backward()
        muon.step()
        adamw.step()
        average(averages, weights, None)
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
                if bar.update():  # once a second: reading a loss makes a GPU wait
                    bar.set_postfix(loss=torch.stack(losses[-100:]).mean().item())
            common.keep_epoch(args, state, name, learned, losses, chosen, start, loss, test, draw)
    return ema


def train(args) -> dict[str, nn.Module]:
    """Trains a flow, then, from its weights, the average velocity; returns moving averages."""
    data, test, classes = common.load_images(args)  # images and labels
    network = {"width": args.width}
    state = common.open_run(args, network=network, classes=classes)
    torch.manual_seed(args.seed)
    models = make_models(**network, device=args.device)
    noise = common.noise(args, 16, 1, 28, 28)[:10]

    def loss(model, x1: Tensor, labels: Tensor) -> Tensor:  # labels are for 03
        t = torch.randn(len(x1), device=x1.device).sigmoid()  # logit-normal, as in 04
        return flow_loss(model, torch.randn_like(x1), x1, t)

    def loss_of_average(model, x1: Tensor, labels: Tensor) -> Tensor:
        equal = round(args.equal * len(x1))
        t, r = draw_times(len(x1), equal, device=x1.device)
        return meanflow_loss(model, torch.randn_like(x1), x1, t, r, equal, args.tangent,
                             args.derivative)

    flow = fit(args, state, "flow", models["flow"], loss, data, test, args.epochs, args.lr,
               draw=lambda model: meanflow_sample(lambda x, t, r: model(x, t), noise, 10))
    models["meanflow"].load_state_dict(flow.state_dict())  # with --resume, fit() has its own
    meanflow = fit(args, state, "meanflow", models["meanflow"], loss_of_average, data, test,
                   args.meanflow_epochs, args.meanflow_lr,
                   draw=lambda model: meanflow_sample(model, noise, 1))
    return {"flow": flow, "meanflow": meanflow}


def make_figures(args, flow: nn.Module, meanflow: nn.Module) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    net = common.recorded(meanflow, args)
    noise = common.noise(args, 16, 1, 28, 28)
    draw_path(args, net, noise)

    samplers = []
    for n in sorted({*args.steps}):
        made = {"name": f"MeanFlow, {n} step{'s' * (n > 1)}", "method": "MeanFlow",
                "sampler": "MeanFlow", "steps": n, "network_calls": n}
        samplers.append((made, lambda x, rng, n=n: meanflow_sample(net, x, n)))
    title = "Columns share their noise"
    common.draw_and_time(args, samplers, noise, title)


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
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
