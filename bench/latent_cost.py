"""What does a sample cost in the latent (02) and in pixels (01)? Work, latency and throughput.

    python bench/latent_cost.py

DDIM with 100 steps, one after the other, with untrained networks of the sizes that are shipped.
Multiply-adds are those of convolutions and matrix products.
"""

import importlib
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ddpm = importlib.import_module("01_ddpm_ddim")
latent = importlib.import_module("02_latent_diffusion")


def main() -> None:
    for name, script, shape in (("pixels", ddpm, (1, 28, 28)), ("latent", latent, (1, 8, 8))):
        args = script.parse_args()
        models = script.make_models(args.width, args.timesteps, args.device)
        schedule = script.make_schedule(args.timesteps)
        decode = models["vae"].eval().to_images if "vae" in models else lambda x: x
        net = common.recorded(models["diffusion"], args)

        @torch.no_grad()
        def sample(noise, rng, net=net, script=script, schedule=schedule, decode=decode):
            return decode(script.ddim_sample(net, schedule, noise, 100))

        noise = torch.randn(128, *shape, device=args.device)
        with FlopCounterMode(display=False) as counter:
            sample(noise[:1], None, net=models["diffusion"])
        line = f"{name}: {counter.get_total_flops() / 2e6:,.0f} million multiply-adds an image"
        for n in (16, 64, 128):
            _, seconds = common.time_draw(args, sample, noise[:n])
            line += f"; {n} images in {seconds:.3f} s, {n / seconds:.1f} images/s"
        print(line)


if __name__ == "__main__":
    main()
