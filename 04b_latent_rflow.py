"""Rectified flow in the latent of a VAE: few steps, and each of them cheap.

CAREFUL: as in 04, x_0 is the NOISE, and x_1 the data, here a latent. 02 calls the latent x_0.

02 made each step cheap: 64 numbers instead of 784 pixels. 04 needs only a few steps. Here we
do both: the flow of 04 on the latents of 02, with its trained VAE. On an NVIDIA H200, ten
Euler steps draw 3.8 times as many digits a second as in pixels. Their Fréchet distance (05;
lower is better) is 0.293, in pixels 0.598 (though after 10 epochs, not 40).
02 explains the VAE and its latents; 04 explains the loss, Euler, AB2, reflow and S.

    paper           code                      shape
    x_0, z_0        x0, noise                 (B, 1, 8, 8)
    x_1, z_1        x1 (not the VAE's z)      (B, 1, 8, 8), mean 0 and standard deviation 1
    t               t                         (B,) from 0, noise, to 1, data: the reverse of 02
    v_θ(x_t, t)     v = model(x_t, t)         (B, 1, 8, 8)

vs 04: the network predicts v itself. Exact black is hard for v, but the decoder draws it. The
network is that of 02, and learns as in 01 (the reflow with a rate of 0.001).

    python 04b_latent_rflow.py                  for a GPU; three hours on a core of an Intel Xeon
    python 04b_latent_rflow.py --sample-only    your last run's weights, or ours

Fréchet distances of 5,000 samples, one seed (real digits: 0.045), and S of 16 latent paths:
    steps         1      2      5      10     100    S
    flow, Euler   36.0   1.66   0.455  0.293  0.212  0.35
    flow, AB2                   0.275  0.199
    reflow, Euler 0.374  0.308  0.257  0.241  0.222  0.0050
One step after the reflow beats five of Euler's before it, but not five of AB2.
"""

import copy
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import common
from common import COUNT, RATE, Attention, ResBlock


def parse_args(argv: list[str] | None = None):
    parser = common.make_parser(__file__, "Latent flow.", epochs=40, lr=7e-4)
    add = parser.add_argument
    add("--width", type=int, choices=[8, 16, 32, 64], default=64, help="channels at 8x8")
    add("--vae", type=Path, metavar="FILE", help="weights of 02; None: shipped, or yours")
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
    if not args.vae:  # the shipped one has seen nothing but digits
        own = args.out_dir.parent / "02_latent_diffusion" / "checkpoint.pt"
        shipped = common.WEIGHTS / "02_latent_diffusion.pt"
        args.vae = shipped if args.dataset in ("mnist", "synthetic") else own
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


# From here to the end of UNet: word for word as in 02.
def conv_block(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] -> latents (B, 64) -> images. Kingma & Welling 2014.
    R (64, 64), a rotation, and mean and std (64,) of z R are set after the training."""
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(  # channels in and out, kernel, stride, padding
            conv_block(nn.Conv2d(1, 16, 3, 2, 1)),  # (B, 16, 14, 14)
            conv_block(nn.Conv2d(16, 32, 3, 2, 1)),  # (B, 32, 7, 7)
            conv_block(nn.Conv2d(32, 64, 7)))  # (B, 64, 1, 1)
        self.fc_mu, self.fc_logvar, self.fc_decode = (nn.Linear(64, 64) for _ in range(3))
        self.decoder = nn.Sequential(  # ..., padding, output padding
            conv_block(nn.ConvTranspose2d(64, 32, 7)),  # (B, 32, 7, 7)
            conv_block(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1)),  # (B, 16, 14, 14)
            nn.ConvTranspose2d(16, 1, 3, 2, 1, 1))  # (B, 1, 28, 28)
        self.register_buffer("R", torch.eye(64))
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("std", torch.ones(64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """µ and log σ² of q(z | x), (B, 64) each."""
        h = self.encoder(x).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)

    def logits(self, z: Tensor) -> Tensor:
        return self.decoder(self.fc_decode(z)[:, :, None, None])  # (B, 1, 28, 28)

    def decode(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid() * 2 - 1  # from probabilities of white to [-1, 1]

    def sample_z(self, mu: Tensor, logvar: Tensor, rng=None) -> Tensor:
        """z = µ + σ e, a sample of q(z | x): the reparameterisation trick."""
        e = torch.randn(mu.shape, generator=rng, device=mu.device)
        return mu + (logvar / 2).exp() * e

    def to_latent(self, mu: Tensor, logvar: Tensor, rng=None) -> Tensor:
        """z ~ q(z | x), rotated by R and standardised, as (B, 1, 8, 8)."""
        return ((self.sample_z(mu, logvar, rng) @ self.R - self.mean) / self.std).view(-1, 1, 8, 8)

    def to_images(self, latent: Tensor) -> Tensor:
        return self.decode((latent.flatten(1) * self.std + self.mean) @ self.R.T)  # and back


@torch.no_grad()
def encode_all(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """µ and log σ², (N, 64) each, of all images."""
    parts = [vae.encode(part) for part in images.split(1000)]
    return torch.cat([mu for mu, _ in parts]), torch.cat([logvar for _, logvar in parts])


class UNet(nn.Module):
    """x_t (B, 1, H, W), H and W multiples of 4, t (B,) from 0 to t_max -> v (B, 1, H, W)."""
    def __init__(self, width: int, t_max: float):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 2 * width, 4 * width  # vs 01: a smaller middle
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
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, H, W)


def make_models(width: int, device: str = "cpu") -> dict[str, nn.Module]:
    nets = {name: UNet(width, t_max=1).to(device, memory_format=torch.channels_last)
            for name in ("flow", "reflow")}
    return nets | {"vae": VAE().to(device)}


def flow_loss(model, x0: Tensor, x1: Tensor, t: Tensor, error=F.mse_loss) -> Tensor:
    """The error of v on the line from x0 to x1: Liu et al. 2022, Eq. 1.

    x0 (noise) and x1 (data): (B, 1, H, W); t: (B,) in [0, 1].
    The squared error makes v the mean where lines cross.
    Those of a reflow hardly cross; there F.l1_loss gave better images.
    """
    t_ = t.view(-1, 1, 1, 1)  # one for each image
    x_t = (1 - t_) * x0 + t_ * x1
    return error(model(x_t, t), x1 - x0)


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
    """n pairs (x0, x1), (n, 1, 8, 8) each: noise, and what `steps` steps of AB2 make of it."""
    x0 = torch.randn(n, 1, 8, 8, generator=rng).to(device)
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
    noise = common.noise(args, 16, 1, 8, 8)[:10]
    vae = load_vae(args, state, models["vae"])  # in eval mode, and fixed from here on
    data, test = (encode_all(vae, images) for images, _ in (data, test))  # vs 04: µ and log σ²

    def loss(model, mu: Tensor, logvar: Tensor) -> Tensor:
        x1 = vae.to_latent(mu, logvar)  # vs 04: x_1 is a latent, drawn anew each time
        t = T_DENSITIES[args.flow_t](torch.rand(len(x1), device=x1.device))
        return flow_loss(model, torch.randn_like(x1), x1, t)

    def reflow_loss(model, x0: Tensor, x1: Tensor) -> Tensor:
        t = T_DENSITIES[args.reflow_t](torch.rand(len(x1), device=x1.device))
        return flow_loss(model, x0.float(), x1.float(), t, error=F.l1_loss)  # kept as float16

    flow = fit(args, state, "flow", models["flow"], loss, data, test, args.epochs, args.lr,
               draw=lambda model: vae.to_images(adams_sample(model, noise, 5)))
    net = common.recorded(flow, args)
    pairs, test = common.kept_pairs(args, flow, lambda n, rng: make_pairs(
        net, n, args.pair_steps, rng, args.device))
    models["reflow"].load_state_dict(flow.state_dict())  # on --resume, fit() loads its own
    reflow = fit(args, state, "reflow", models["reflow"], reflow_loss, pairs, test,
                 args.reflow_epochs, args.reflow_lr,
                 draw=lambda model: vae.to_images(euler_sample(model, noise, 1)))
    return {"flow": flow, "reflow": reflow, "vae": vae}


def load_vae(args, state: dict, vae: VAE) -> VAE:
    """The VAE of --vae, which our checkpoint then holds, too; with --resume, that one."""
    if "vae" not in state["stages"]:
        weights = common.load("02_latent_diffusion", "vae", args.vae, args.device).state_dict()
        state["stages"]["vae"] = {"epochs": [], "frames": [], "learned": [weights]}
        common.say(f"the VAE is that of {args.vae}")
    vae.load_state_dict(state["stages"]["vae"]["learned"][0])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def make_figures(args, flow: nn.Module, reflow: nn.Module, vae: VAE) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    nets = {"latent flow": flow, "latent reflow": reflow}
    nets = {method: common.recorded(net, args) for method, net in nets.items()}
    noise = common.noise(args, 16, 1, 8, 8)
    draw_path(args, vae, nets, noise)

    samplers = []
    for method, sampler, solve, counts in (
            ("latent flow", "Euler", euler_sample, args.steps),
            ("latent flow", "AB2", adams_sample, args.ab2_steps),
            ("latent reflow", "Euler", euler_sample, args.steps)):
        for n in sorted({*counts}):
            made = {"name": f"{method}, {sampler}, {n} step{'s' * (n > 1)}", "method": method,
                    "sampler": sampler, "steps": n, "network_calls": n}
            def draw(x, rng, net=nets[method], solve=solve, n=n):
                return vae.to_images(solve(net, x, n))  # vs 04: decoded
            samplers.append((made, draw))
    straight = {name: straightness(net, noise, 100) for name, net in nets.items()}
    title = "Columns share their noise"
    common.draw_and_time(args, samplers, noise, title, straightness=straight)


def draw_path(args, vae: VAE, nets: dict, x0: Tensor) -> None:
    """A film of eight latents on their way, decoded; below them the same after the reflow."""
    def path(net):
        states = []  # x_t at every step
        x1 = euler_sample(net, x0, 30, lambda t, x, v: states.append(x))
        return [*states, x1]
    paths = [path(net) for net in nets.values()]
    film = [torch.cat([vae.to_images(x[:8]) for x in states]) for states in zip(*paths)]
    common.save_gif(film[::2], args.out_dir / "path.gif", columns=8)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    networks = common.trained(args, make_models) if args.sample_only else train(args)
    make_figures(args, **networks)
    common.say(f"the results are in {args.out_dir}")


if __name__ == "__main__":
    common.run(main)
