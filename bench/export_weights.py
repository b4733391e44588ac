"""Make the file that we ship, weights/<script>.pt, from a run's checkpoint.

    python bench/export_weights.py runs/01_ddpm_ddim/checkpoint.pt

It keeps the averaged weights in half precision, the history and the origin, and leaves out what
only --resume needs.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, default=ROOT / "weights", help="folder of the files")
    args = parser.parse_args()
    args.to.mkdir(exist_ok=True)
    for path in args.checkpoints:
        with common.one_line_error(f"{path} is not a checkpoint"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            networks = {name: {key: weight.half() for key, weight in network.items()}
                        for name, network in state["networks"].items()}
            shipped = args.to / f"{state['script']}.pt"
            common.save(shipped, state | {"networks": networks, "training": {}})
        print(f"wrote {shipped}")


if __name__ == "__main__":
    main()
