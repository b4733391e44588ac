"""How good are digits by diffusers after equally many minutes? The rival of bench/recipe.py.

    pip install diffusers==0.42.1
    OMP_NUM_THREADS=1 python bench/recipe_diffusers.py --images 60000

UNet2DModel in the shape of our network (32, 64 and 64 channels, attention at 14x14 and 7x7),
trained by the recipe of its tutorial "Train a diffusion model": batches of 16, AdamW with a rate
of 1e-4 that warms up for 500 steps and then falls as a cosine, gradients clipped to a norm of 1,
1,000 timesteps with linear β, no average of weights. DDIM-50 of the library draws 2,000 digits.
Appends a line to results.jsonl. Needs MNIST in data/.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from recipe import common, ddpm, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60_000, help="in the training, with repeats")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/recipe"))
    mine = parser.parse_args()
    folder, batch, steps = mine.out_dir, mine.batch_size, mine.images // mine.batch_size
    folder.mkdir(parents=True, exist_ok=True)
    (digits, _), (test, _), _ = common.load_images(ddpm.parse_args(["--device", "cpu"]))
    torch.manual_seed(mine.seed)
    net = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    net = net.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=mine.lr)
    rates = get_cosine_schedule_with_warmup(optimizer, 500, steps)
    order = torch.cat([torch.randperm(len(digits)) for _ in range(-(-mine.images // len(digits)))])
    losses, start = [], time.process_time()
    for index in tqdm(order[: steps * batch].split(batch), "diffusers", mininterval=10):
        noise, t = torch.randn(batch, 1, 28, 28), torch.randint(1000, (batch,))
        predicted = net(scheduler.add_noise(digits[index], noise, t), t, return_dict=False)[0]
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    rate = steps * batch / (time.process_time() - start)
    file = f"diffusers_{mine.images}_{mine.seed}"
    torch.save(net.state_dict(), folder / f"{file}.pt")

    @torch.no_grad()
    def sample(x: torch.Tensor) -> torch.Tensor:
        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(50)
        for t in ddim.timesteps:
            x = ddim.step(net(x, t, return_dict=False)[0], t, x).prev_sample
        return x

    score({"arm": f"diffusers+batch={batch}+lr={mine.lr:g}", "seed": mine.seed,
           "images": steps * batch, "loss": sum(losses[-2000:]) / len(losses[-2000:]),
           "images_per_second": rate}, {"DDIM-50": sample}, test, mine.samples, folder, file)


if __name__ == "__main__":
    main()
