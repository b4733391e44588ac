"""Kill every script at random moments, resume it, and compare with runs that nobody disturbed.

    python bench/kills.py              100 kills, 20 for each script; half an hour on a CPU core
    python bench/kills.py --kills 5 --scripts 01_ddpm_ddim

The runs are miniatures (--fast-dev). kill -9 comes after a random time, anywhere from the first
import to the last file. A run that ends is compared and started anew until the kills are used up:
weights and evaluation sets must be the same, bit for bit. In the end bench/export_weights.py is
killed, too: the file that it replaces must be the old or the new one, and whole.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["01_ddpm_ddim", "02_latent_diffusion", "03_cfg", "04_rectified_flow",
           "04b_latent_rflow", "06_meanflow"]


def attempt(command: list, seconds: float | None = None) -> bool:
    """Run a command; True if it ended, and False if it had to be killed after `seconds`."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen([sys.executable, *command], env=settings, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        errors = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{errors}")
    return True


def results(folder: Path) -> dict:
    """All averaged weights and evaluation sets that a run has left."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        state = torch.load(path, weights_only=True)
        if "images" in state:
            found[path.stem] = state["images"]
        for name, stage in state.get("stages", {}).items():
            found |= {f"{name} {key}": value for key, value in stage["learned"][0].items()}
    return found


def where(folder: Path) -> str:
    """What a run was doing, by the files that it had finished."""
    sets = len([*folder.glob("eval_*.pt")])
    if sets or (folder / "timings.json").exists():
        return "sets for 05"
    if (folder / "path.gif").exists():
        return "pictures and timings"
    if not (folder / "checkpoint.pt").exists():
        return "start, first epoch"
    *_, stage = torch.load(folder / "checkpoint.pt", weights_only=True)["stages"]
    pairs = [*folder.glob("pairs/*.pt")]
    return "pairs, reflow" if pairs and stage == "flow" else f"in or after {stage}"


def kill_script(script: str, kills: int, folder: Path, rng: random.Random) -> Counter:
    command = [ROOT / f"{script}.py", "--fast-dev", "--device", "cpu", "--out-dir"]
    start = time.perf_counter()
    attempt([*command, folder / "whole"])
    seconds = time.perf_counter() - start
    whole, moments, runs = results(folder / "whole"), Counter(), 0
    while kills or (folder / "killed").exists():
        resume = ["--resume"] if (folder / "killed" / "checkpoint.pt").exists() else []
        start = time.perf_counter()
        if attempt([*command, folder / "killed", *resume],
                   rng.uniform(0, seconds) if kills else None):
            if not resume:  # the machine may be less busy than it was
                seconds = min(seconds, time.perf_counter() - start)
            again, runs = results(folder / "killed"), runs + 1
            assert whole.keys() == again.keys(), f"{script}: {whole.keys() ^ again.keys()}"
            wrong = [key for key in whole if not torch.equal(whole[key], again[key])]
            assert not wrong, f"{script}: {wrong}"
            shutil.rmtree(folder / "killed")
        else:
            kills -= 1
            moments[where(folder / "killed")] += 1
    print(f"{script}: killed {sum(moments.values())} times in {runs} runs, all {len(whole)} arrays "
          f"as in a run of {seconds:.0f} s without kills; killed during", dict(moments), flush=True)
    return moments


def kill_export(checkpoint: Path, kills: int, folder: Path, rng: random.Random) -> None:
    command = [ROOT / "bench" / "export_weights.py", checkpoint, "--to", folder]
    start = time.perf_counter()
    attempt(command)
    seconds = time.perf_counter() - start
    file, = folder.glob("*.pt")
    whole = file.read_bytes()
    for _ in range(kills):
        attempt(command, rng.uniform(0.5, 1) * seconds)
        assert file.read_bytes() == whole
    print(f"export_weights.py: killed {kills} times, and the file was whole each time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            kill_script(script, args.kills // len(args.scripts), Path(folder, script), rng)
        checkpoint = Path(folder, args.scripts[0], "whole", "checkpoint.pt")
        kill_export(checkpoint, 5, Path(folder, "weights"), rng)


if __name__ == "__main__":
    main()
