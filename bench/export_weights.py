"""Make the file that we ship, weights/<script>.pt, from a run's checkpoint; or the reverse.

    python bench/export_weights.py runs/01_ddpm_ddim/checkpoint.pt
    python bench/export_weights.py --back weights/01_ddpm_ddim.pt --to runs/01_ddpm_ddim

It keeps the averaged weights in half precision, the history and the origin, and leaves out what
only --resume needs. --back makes a checkpoint from which --resume goes on with more epochs: the
network starts from the averaged weights, and the optimizer anew.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common


def for_resume(state: dict, path: Path) -> dict:
    """Full precision, and for each stage what Stage.epoch keeps: epochs, weights, optimizer."""
    script = importlib.import_module(state["script"])
    args = script.parse_args(["--sample-only", "--device", "cpu", "--out-dir", str(path.parent)])
    networks = common.load_networks(args.state, script.make_models(args))
    training = {}
    for stage in {epoch["stage"] for epoch in state["history"]}:
        done = max(epoch["epoch"] for epoch in state["history"] if epoch["stage"] == stage)
        optimizer = common.Muon(networks[stage].parameters(), fused=True)
        training[stage] = [done, networks[stage].state_dict(), optimizer.state_dict()]
    networks = {name: network.state_dict() for name, network in networks.items()}
    return state | {"networks": networks, "training": training}


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
            if args.back:
                common.save(made, state)  # for --sample-only to read
                state = for_resume(state, made)
            else:
                networks = {name: {key: weight.half() for key, weight in network.items()}
                            for name, network in state["networks"].items()}
                state |= {"networks": networks, "training": {}}
            common.save(made, state)
        print(f"wrote {made}")


if __name__ == "__main__":
    main()
