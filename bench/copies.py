"""Does 07 copy? How near its samples and test digits come to training images.

    python bench/copies.py                               the shipped weights
    python bench/copies.py runs/07_drifting/checkpoint.pt

Median and 5% quantile of the distance to the nearest training image, of 2,000 each: in the latent
(means µ, standardised), and in pixels (from -1 to 1). Needs MNIST in data/.
"""

import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
latent = importlib.import_module("02_latent_diffusion")
drifting = importlib.import_module("07_drifting")


def nearest(points: torch.Tensor, cloud: torch.Tensor) -> tuple[float, float]:
    """Median and 5% quantile of the distances from points (N, ...) to the nearest of `cloud`."""
    parts = [torch.cdist(part.flatten(1), cloud.flatten(1)).min(1).values
             for part in points.split(200)]
    return tuple(torch.cat(parts).quantile(torch.tensor([0.5, 0.05])).tolist())


@torch.no_grad()
def main() -> None:
    file = Path(sys.argv[1]) if sys.argv[1:] else None
    model, vae = (common.load("07_drifting", name, file) for name in ("drifting", "vae"))
    args = drifting.parse_args(["--device", "cpu"])
    (images, _), (test, _), classes = common.load_images(args)
    mu, _ = latent.encode_all(vae, images)
    mu, n = (mu @ vae.R - vae.mean) / vae.std, 2000
    samples = drifting.sample(model, common.noise(args, n, 64), torch.arange(n) % len(classes))
    z = (latent.encode_all(vae, test[:n])[0] @ vae.R - vae.mean) / vae.std
    for name, x, pictures in (("samples of 07", samples, vae.to_images(samples)),
                              ("test digits, encoded", z, vae.to_images(z)),
                              ("test digits", None, test[:n])):
        distances = [*(nearest(x, mu) if x is not None else ()), *nearest(pictures, images)]
        print(name, *(f"{d:.2f}" for d in distances))


if __name__ == "__main__":
    main()
