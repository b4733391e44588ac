"""Classifier-free guidance on MNIST: ask for a digit, and get a very clear one.

A network that also sees the class c of an image learns to predict the v of 01 given c, so
we can ask it for a 7. In training, c is hidden now and then, so the same network also
predicts v without c. Guidance starts from that prediction and adds s times the difference
that c makes. With s = 1 this is the prediction with c; a larger s goes past it. The digits
become clearer, but those of one class more alike: guidance trades variety for clarity.

    ∇log p(x_t|c) - ∇log p(x_t) = ∇log p(c|x_t)                  gradients by x_t; Bayes' rule

The right side points to where a classifier would be surer of c. The left one needs none, hence
the name: ∇log p is -ε̂/√(1-ᾱ_t), so it is the difference of the two predictions of v, times
-√ᾱ_t/√(1-ᾱ_t). The minus is no mistake: x̂_0 contains -√(1-ᾱ_t) v̂, and moves along ∇log p(c|x_t).

    loss = E ‖v - v_θ(x_t, t, c)‖², c = ∅ with probability 0.1   Ho & Salimans 2022, Alg. 1
    v̂    = v_θ(x_t, t, ∅) + s (v_θ(x_t, t, c) - v_θ(x_t, t, ∅))  their Eq. 6, for ε̂
    s = 0: without c, 1: with c, above: guided                   all else: as in 01

    papers          code                      shape
    x_0, x_t, ε     x0, x_t, noise            (B, 1, 28, 28), x0 in [-1, 1]
    t = 1 ... T     t = 0 ... T-1             (B,), the paper's t minus 1; -1 is the clean image
    β_t, α_t, ᾱ_t   betas, alphas, alpha_bars (T,); Song writes α_t for ᾱ_t
    x̂_0, ε̂; r       x0_hat, eps_hat; t_next   (B, 1, 28, 28); -1 ... T-2
    c               labels                    (B,) in 0 ... 9, or where it is hidden:
    ∅               NULL                      -1
    v_θ(x_t, t, c)  model(x_t, t, labels)     (B, 1, 28, 28)
    v̂               guided(...)(x_t, t)       (B, 1, 28, 28)
    s = 1 + w       scale, --guidance         the paper guides ε̂, linear in v̂: so it is the same

The class enters twice, to show how each is done: as input channels, and by cross-attention (each
pixel takes a weighted mean of learned tokens of its class), as text does in large models.

It learns in batches of 128 by Muon (convolutions with 16 channels or more: rate 0.007, weight
decay 0.1) and AdamW (all else: 0.0007, 0.01). The rates rise for 200 steps, and fall linearly
to 0 at the end. To sample, we take an average of the weights. See fit().

    python 03_cfg.py                                  40 epochs, for a GPU
    python 03_cfg.py --epochs 3 --batch-size 64       for a CPU
    python 03_cfg.py --digits 3141592653              these, by your weights or ours

Measured after 34 epochs by --lr 0.002, 1,000 samples by DDIM-100: with s = 1, 1.25, 3 the
classifier of 05 reads 97.1%, 99.2%, 100% as asked for; recall is 0.883, 0.839, 0.536; Fréchet
distances are 0.142, 0.134, 0.507 (as many training digits of each class: 0.102). So s = 3, the
default, makes all digits clear, and shows the price: less variety.
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
    parser = common.make_parser(__file__, "Guided diffusion.", epochs=40, lr=7e-4)
    add, scale = parser.add_argument, {"type": float, "choices": Between(0)}
    add("--width", type=int, choices=[8, 16, 32, 64], default=32, help="channels at 28x28")
    add("--timesteps", type=int, choices=Between(2), default=1000, help="T, from image to noise")
    add("--ddim-steps", **COUNT, default=100, help="steps of DDIM and DDPM")
    add("--tokens", **COUNT, default=4, help="learned tokens for each class, to attend to")
    add("--label-dropout", type=float, choices=Between(0, 1), default=0.1, help="share to hide")
    add("--guidance", **scale, default=3.0, help="scale s in the main figures")
    sweep = [0, 1, 1.25, 1.5, 2, 3, 5]
    add("--guidance-sweep", **scale, nargs="+", default=sweep, help="others to compare")
    add("--digits", help="draw these classes and stop; no training")
    tiny = {"dataset": "synthetic", "train_images": 128, "epochs": 8, "batch_size": 16,
            "width": 8, "timesteps": 20, "ddim_steps": 10, "guidance_sweep": [0, 1, 3],
            "eval_samples": 20}
    parser.set_defaults(sample_only=parser.parse_args(argv or []).digits is not None)
    args = common.parse(parser, argv, tiny,
                        sampling=["ddim_steps", "guidance", "guidance_sweep", "digits"])
    if args.ddim_steps > args.timesteps:
        parser.error(f"--ddim-steps: at most --timesteps {args.timesteps}")
    if args.digits is not None:
        args.digits = common.asked_classes(parser, args)
    return args


NULL = -1  # vs 01: ∅, the label of an image whose class is hidden


def hide_labels(labels: Tensor, share: float) -> Tensor:
    """Each of the labels (B,) becomes ∅ with probability `share` (p_uncond in Algorithm 1)."""
    hidden = torch.rand(labels.shape, device=labels.device) < share
    return labels.masked_fill(hidden, NULL)


class UNet(nn.Module):
    """vs 01: labels (B,), too, as c_label more input channels, and by cross-attention."""
    def __init__(self, width: int, t_max: float, tokens: int, classes: int = 10, c_label=32):
        super().__init__()
        c1, c2, c3, c_time = width, 2 * width, 4 * width, 4 * width
        self.c_time, self.time_scale = c_time, 1000 / t_max  # embed times up to 1000
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(),
                                  nn.Linear(c_time, c_time), nn.SiLU())
        self.label_channels = nn.Embedding(classes + 1, c_label)  # the last is for NULL
        self.conv_in = nn.Conv2d(1 + c_label, c1, 3, padding=1)
        self.down0 = ResBlock(c1, c1, c_time)
        self.down0_to_1 = nn.Conv2d(c1, c1, 3, stride=2, padding=1)
        self.down1 = ResBlock(c1, c2, c_time)
        self.down1_attention = Attention(c2)
        self.down1_to_mid = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.mid1 = ResBlock(c3, c3, c_time)
        self.mid_attention = Attention(c3)
        self.mid2 = ResBlock(c3, c3, c_time)
        # Several tokens a class: with one, the softmax is 1, and all pixels get the same.
        self.label_tokens = nn.Embedding(classes + 1, tokens * c_label)
        self.cross_attention = Attention(c3, c_label)
        self.mid_to_up0 = nn.Conv2d(c3, c2, 3, padding=1)
        self.up0 = ResBlock(2 * c2, c2, c_time)
        self.up0_attention = Attention(c2)
        self.up0_to_1 = nn.Conv2d(c2, c1, 3, padding=1)
        self.up1 = ResBlock(2 * c1, c1, c_time)
        self.norm_out = common.GroupNorm(8, c1)
        self.conv_out = nn.Conv2d(c1, 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # a fresh network predicts a constant

    @common.in_bfloat16  # where that is fast
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        emb = self.time(common.timestep_embedding(t * self.time_scale, self.c_time))
        labels = labels % self.label_tokens.num_embeddings  # -1 becomes the last
        channels = self.label_channels(labels)[:, :, None, None]  # (B, 32, 1, 1)
        x = torch.cat([x, channels.expand(-1, -1, *x.shape[2:])], dim=1)  # (B, 33, H, W)
        tokens = self.label_tokens(labels).unflatten(1, (-1, channels.shape[1]))  # (B, tokens, 32)
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


def make_models(width: int, timesteps: int, tokens: int, classes: int, device="cpu") -> dict:
    model = UNet(width, timesteps, tokens, classes)
    return {"diffusion": model.to(device, memory_format=torch.channels_last)}


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


def diffusion_loss(
    model, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor
) -> Tensor:
    """Ho & Salimans 2022, Algorithm 1, but for v: the mean squared error of the prediction.
    x0, noise: (B, 1, H, W); t: (B,) in 0 ... T-1; vs 01: labels (B,), some of them ∅."""
    x_t = q_sample(schedule, x0, t, noise)
    v = q_sample(schedule, noise, t, -x0)  # roles swapped: √ᾱ_t ε - √(1-ᾱ_t) x_0
    return F.mse_loss(model(x_t, t, labels), v)


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


def ddpm_sample(model, schedule: Schedule, x_T: Tensor, rng=None, steps=None) -> Tensor:
    """vs 01: DDPM is DDIM with η = 1, and may take fewer steps; a test compares the two."""
    return ddim_sample(model, schedule, x_T, steps or len(schedule.betas), eta=1.0, rng=rng)


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
    network |= {"tokens": args.tokens, "classes": len(classes)}
    state = common.open_run(args, network=network, classes=classes)
    schedule = make_schedule(args.timesteps, args.device)
    torch.manual_seed(args.seed)
    model = make_models(**network, device=args.device)["diffusion"]
    noise, quick = common.noise(args, 16, 1, 28, 28)[:10], min(20, args.timesteps)
    ten = torch.arange(10, device=args.device) % len(classes)

    def loss(model, x0: Tensor, labels: Tensor) -> Tensor:  # vs 01: with labels
        t = torch.randint(args.timesteps, (len(x0),), device=x0.device)
        labels = hide_labels(labels, args.label_dropout)
        return diffusion_loss(model, schedule, x0, t, torch.randn_like(x0), labels)

    ema = fit(args, state, "diffusion", model, loss, data, test, args.epochs, args.lr,
              draw=lambda model: ddim_sample(partial(model, labels=ten), schedule, noise, quick))
    return {"diffusion": ema}


def make_figures(args, diffusion: nn.Module) -> None:
    """16 images from the same noise by every sampler: pictures, timings, sets for 05."""
    net, names = common.recorded(diffusion, args), common.load_checkpoint(args)["classes"]
    schedule, noise = make_schedule(args.timesteps), common.noise(args, 16, 1, 28, 28)
    if args.digits:
        return draw_digits(args, net, schedule, names)

    def sample(x: Tensor, rng=None, s=args.guidance, eta=0.0, trace=None) -> Tensor:
        labels = torch.arange(len(x), device=x.device) % len(names)  # the classes in turn
        v_hat = guided(net, labels, s, len(names))
        return ddim_sample(v_hat, schedule, x, args.ddim_steps, eta, rng, trace)

    draw_path(args, partial(sample, noise))

    samplers, n = [], args.ddim_steps
    runs = [("DDIM", 0.0, s) for s in sorted({args.guidance, *args.guidance_sweep})]
    for sampler, eta, s in [*runs, ("DDPM", 1.0, args.guidance)]:
        made = {"name": f"{sampler}, {n} steps, s = {s:g}", "method": "guided diffusion",
                "sampler": sampler, "steps": n, "guidance": s,
                "network_calls": n if s in (0, 1) else 2 * n}  # a doubled batch counts as two
        made |= {"classes": len(names)} if s else {}  # with s = 0, no class was asked for
        samplers.append((made, partial(sample, s=s, eta=eta)))
    title = "Columns share their noise and, with s > 0, their class"
    title += f" (the first 10 of {len(names)} classes)" * (len(names) > 10)
    common.draw_and_time(args, samplers, noise, title, (names * 10)[:10])


def draw_digits(args, net, schedule: Schedule, names: list[str]) -> None:
    """--digits: the classes that were asked for, in one picture, twenty to a row."""
    x_T, images = common.noise(args, len(args.digits), 1, 28, 28), []
    for i in range(0, len(x_T), 100):
        labels = torch.tensor(args.digits[i : i + 100], device=args.device)
        v_hat = guided(net, labels, args.guidance, len(names))
        images.append(ddim_sample(v_hat, schedule, x_T[i : i + 100], args.ddim_steps))
    shown = args.digits[:20]
    path = args.out_dir / f"digits_{''.join(map(str, shown))}.png"
    title = " ".join(names[i] for i in shown) + " ..." * (len(args.digits) > 20)
    common.save_grid(torch.cat(images), path, f"Guided, s = {args.guidance:g}: {title}", 20)
    common.say(path)


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
