"""Make the file that we ship, weights/<script>.pt, from a run's checkpoint; or the reverse.

    python bench/export_weights.py runs/01_ddpm_ddim/checkpoint.pt
    python bench/export_weights.py --back weights/01_ddpm_ddim.pt --to runs/01_ddpm_ddim

It keeps the averaged weights, the large ones in half precision (not 02's rotation), the figures of
the epochs and the origin, and leaves out what only --resume needs, and the frames of the film.
--back makes a checkpoint from which --resume goes on with more epochs: the network starts from
the averaged weights, and the optimizers anew.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common


def cast(weights: dict, dtype: torch.dtype) -> dict:
    small = 4096 if dtype == torch.half else 0  # up to so many numbers, a tensor stays as it is
    return {key: x.to(dtype) if x.is_floating_point() and x.numel() > small else x
            for key, x in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, default=ROOT / "weights", help="folder of the files")
    parser.add_argument("--back", action="store_true", help="from shipped weights to a checkpoint")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for path in args.checkpoints:
        with common.one_line_error(f"{path} is not a checkpoint"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            made = args.to / ("checkpoint.pt" if args.back else f"{state['script']}.pt")
            if args.back and made.exists():
                sys.exit(f"{made} exists already: choose another folder")
            for stage in state["stages"].values():
                average = cast(stage["learned"][0], torch.float if args.back else torch.half)
                # back: the average and the model; an optimizer without an entry starts anew
                stage |= {"frames": [], "learned": [average] * (2 if args.back else 1)}
            common.save(made, state)
        print(f"wrote {made}")


if __name__ == "__main__":
    main()
