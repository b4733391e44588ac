"""How much of a Fréchet distance is grey that the eye does not see?

    python bench/faint.py runs/results/*/eval_*.pt     evaluation sets, or folders of pictures

For each set: the share of faint pixels (1 to 15 of 255), and its distance as it is and with these
pixels black. The classifier sees them, we do not. Needs MNIST in data/.
"""

import importlib
import sys
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
compare = importlib.import_module("05_compare")


def faint(judge, real: Tensor, images: Tensor) -> tuple[float, float, float]:
    """The share of faint pixels in uint8 images (N, 1, 28, 28); the distance, and without them."""
    grey = (images > 0) & (images < 16)
    distances = [compare.frechet_distance(real, compare.features(judge, x)[0])
                 for x in (images, images.masked_fill(grey, 0))]
    return grey.double().mean().item(), *distances


def main() -> None:
    args, judge = compare.parse_args(["--device", "cpu"]), common.load("05_compare", "judge")
    _, (test, _), _ = common.load_images(args)
    real, _ = compare.features(judge, common.to_uint8(test))
    for path in map(Path, sys.argv[1:]):
        images = compare.load_set(path, 10**9)["images"]
        share, as_it_is, without = faint(judge, real, images)
        print(f"{path}: N = {len(images):,}, faint {share:.1%}, distance {as_it_is:.3g}, "
              f"without them {without:.3g}")


if __name__ == "__main__":
    main()
