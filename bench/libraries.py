"""Training and sampling speed of 01, beside two libraries that people learn diffusion from.

    pip install diffusers==0.42.1 accelerate==1.15.0 denoising-diffusion-pytorch==2.3.4
    python bench/libraries.py                     training images/s, seconds for 16 digits

Ours is train() and ddim_sample() of 01_ddpm_ddim.py, with all that its epoch contains. diffusers
trains its UNet2DModel by the loop of its tutorial "Train a diffusion model", and samples by its
DDIMPipeline; denoising-diffusion-pytorch trains its Unet by its Trainer. Each library comes twice:
in the shape of our network (as wide, downsampled twice, attention at 14x14 and 7x7), which gives
it more weights than ours, and narrower, with at most as many. Batches of 64 of the same synthetic
digits; all take turns, --rounds times, and the median counts.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")

BATCH, WARM_UP = 64, 5  # images; steps before the clock starts


def clock(device: str) -> float:
    """Seconds now, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_ours(device: str, steps: int, folder: Path) -> tuple[int, float]:
    """Weights and images/s. Two epochs; the first warms up."""
    args = ddpm.parse_args([
        "--dataset", "synthetic", "--train-images", str(steps * BATCH), "--batch-size", str(BATCH),
        "--epochs", "2", "--device", device, "--out-dir", str(folder)])
    model = ddpm.train(args)["diffusion"]
    rate = common.history(common.load_checkpoint(args))[-1]["images_per_second"]
    return sum(p.numel() for p in model.parameters()), rate


def diffusers_network(width: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))


def train_diffusers(width: int, device: str, steps: int, images) -> tuple[int, float]:
    accelerator = Accelerator(mixed_precision="fp16" if device == "cuda" else "no",
                              cpu=device == "cpu")
    model, noise_scheduler = diffusers_network(width), DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, 10_000)
    loader = DataLoader(images, batch_size=BATCH, shuffle=True)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(
        model, optimizer, loader, lr_scheduler)
    done = 0
    while done < WARM_UP + steps:
        for clean in loader:
            if done == WARM_UP:
                start = clock(device)
            noise = torch.randn(clean.shape, device=clean.device)
            t = torch.randint(0, 1000, (len(clean),), device=clean.device)
            noisy = noise_scheduler.add_noise(clean, noise, t)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy, t, return_dict=False)[0], noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            loss.detach().item()  # the tutorial writes it to its log
            done += 1
            if done == WARM_UP + steps:
                break
    rate = steps * BATCH / (clock(device) - start)
    return sum(p.numel() for p in model.parameters()), rate


def train_ddpm_pytorch(dim: int, device: str, steps: int, folder: Path) -> tuple[int, float]:
    """By its own Trainer, from a folder of PNGs."""
    model = Unet(dim=dim, dim_mults=(1, 2, 4), channels=1, full_attn=(False, True, True))
    diffusion = GaussianDiffusion(model, image_size=28, timesteps=1000)
    trainer = Trainer(diffusion, folder, train_batch_size=BATCH, train_num_steps=WARM_UP,
                      amp=device == "cuda", calculate_fid=False, augment_horizontal_flip=False,
                      save_and_sample_every=10**9, results_folder=folder / "results")
    trainer.train()
    trainer.train_num_steps = WARM_UP + steps
    start = clock(device)
    trainer.train()
    rate = steps * BATCH / (clock(device) - start)
    return sum(p.numel() for p in model.parameters()), rate


def sample_ours(device: str) -> float:
    net = common.recorded(ddpm.make_models(32, 1000, device)["diffusion"],
                          ddpm.parse_args(["--device", device]))
    schedule = ddpm.make_schedule(1000)
    x_T = torch.randn(16, 1, 28, 28, device=device)
    ddpm.ddim_sample(net, schedule, x_T, 10)  # warm-up
    start = clock(device)
    ddpm.ddim_sample(net, schedule, x_T, 100)
    return clock(device) - start


def sample_diffusers(width: int, device: str) -> float:
    pipeline = DDIMPipeline(diffusers_network(width), DDIMScheduler(num_train_timesteps=1000))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=16, num_inference_steps=10)  # warm-up
    start = clock(device)
    pipeline(batch_size=16, num_inference_steps=100)
    return clock(device) - start


def floor(device: str, n: int) -> tuple[float, float]:
    """Images/s of training if only 01's convolutions and matrix products took time, at the rate
    of one product of n x n matrices (bfloat16 on CUDA, else float32); and that rate in FLOP/s."""
    with FlopCounterMode(display=False) as counter:
        ddpm.UNet(32, 1000)(torch.randn(1, 1, 28, 28), torch.zeros(1))
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
    a @ a  # warm-up
    start = clock(device)
    for _ in range(10):
        a @ a
    rate = 10 * 2 * n**3 / (clock(device) - start)
    return rate / (3 * counter.get_total_flops()), rate  # forwards once, backwards twice as much


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--steps", type=int, help="timed training steps (20; on CUDA 200)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each one takes")
    args = parser.parse_args()
    device, steps = args.device, args.steps or (200 if args.device == "cuda" else 20)
    images, _ = common.synthetic_digits(4096, seed=0)
    rates: dict[str, list] = {}
    seconds: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as name:
        pngs, runs = Path(name, "pngs"), Path(name, "runs")
        pngs.mkdir()
        for i, image in enumerate(images):
            to_pil_image((image + 1) / 2).save(pngs / f"{i}.png")
        training = {"01_ddpm_ddim.py": lambda: train_ours(device, steps, runs)}
        sampling = {"01_ddpm_ddim.py": lambda: sample_ours(device)}
        for width in (32, 24):
            net = f"diffusers, width {width}"
            training[net] = lambda w=width: train_diffusers(w, device, steps, images)
            sampling[net] = lambda w=width: sample_diffusers(w, device)
        for dim in (32, 20):
            net = f"denoising-diffusion-pytorch, dim {dim}"
            training[net] = lambda d=dim: train_ddpm_pytorch(d, device, steps, pngs)
        for _ in range(args.rounds):
            for net, run in training.items():
                weights, rate = run()
                rates.setdefault(f"{net} ({weights:,} weights)", []).append(rate)
            for net, run in sampling.items():
                seconds.setdefault(net, []).append(run())
    cores = f"{torch.get_num_threads()} CPU cores"
    hardware = torch.cuda.get_device_name() if device == "cuda" else cores
    bound, flops = floor(device, 8192 if device == "cuda" else 2048)
    print(f"\n{hardware}, torch {torch.__version__}; median (lowest to highest)")
    print(f"a matrix product: {flops / 1e9:.0f} GFLOP/s; 01 at that rate: {bound:.0f} images/s")
    for head, unit, results in (("training", "images/s", rates),
                                ("DDIM, 100 steps, 16 digits", "s", seconds)):
        print(head)
        ours = statistics.median(next(iter(results.values())))
        for net, values in results.items():
            median = statistics.median(values)
            ratio = ours / median if unit == "images/s" else median / ours
            print(f"  {net:55} {median:8.4g} {unit} ({min(values):.4g} to {max(values):.4g})"
                  f"  01 is {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()
