"""bench/gpu.sh on a CPU, in miniature."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from scripts import ROOT

SCRIPTS = ["04b_latent_rflow", "01_ddpm_ddim"]


def gpu_script(folder: Path, status: int = 0, minutes: str = "600") -> list[str]:
    """What bench/gpu.sh prints, in miniature, with two scripts."""
    settings = {"PYTHON": sys.executable, "MINUTES": minutes, "SCRIPTS": " ".join(SCRIPTS)}
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh", "--dry-run", folder],
                          check=False, text=True, env=os.environ | settings, stdout=subprocess.PIPE)
    lines = done.stdout.splitlines()
    assert done.returncode == status, lines
    return lines


def test_the_script_for_a_gpu_stops_in_time(tmp_path):
    last = gpu_script(tmp_path, status=1, minutes="0")[-1]
    assert last.startswith("not done: machine 04b_latent_rflow")
    assert not list(tmp_path.glob("*.log"))


def test_the_script_for_a_gpu_runs_in_miniature_and_repeats_nothing(tmp_path):
    folder = tmp_path
    lines = gpu_script(folder)
    assert lines[-1] == f"all is done: {folder}/results.md"
    stages = [line.split(":")[0] for line in lines if ": " in line][:-1]
    assert {*SCRIPTS, "machine", "graphs", "no_graphs", "speed_ups", "05_compare"} <= {*stages}
    assert len([line for line in lines if "done in" in line]) + 1 >= len(stages)
    text = (folder / "results.md").read_text()
    for found in (*SCRIPTS, "DDIM, 2 steps", "Fréchet distance", "40 epochs of training",
                  "eager"):
        assert found in text
    weights = {path.stem for path in (folder / "weights").iterdir()}
    assert weights == {*SCRIPTS}
    for script in SCRIPTS:
        with tarfile.open(folder / f"{script}.tgz") as file:
            names = file.getnames()
        assert {f"weights/{script}.pt", f"{script}/samples.png", f"{script}/metrics.jsonl"} <= {
            *names} and not [name for name in names if "eval_" in name or "checkpoint" in name]

    (folder / "04b_latent_rflow.seconds").unlink()  # as if it had been cut off
    (folder / "02_latent_diffusion").mkdir()  # whose VAE the checkpoint of 04b has already
    (folder / "02_latent_diffusion" / "checkpoint.pt").touch()
    again = gpu_script(folder)
    assert [line.split(":")[0] for line in again if "--device" in line] == ["04b_latent_rflow"]
    assert "--resume" in again[0] and "--vae" not in again[0]
    log = (folder / "04b_latent_rflow.log").read_text()
    assert f"weights: {folder}/04b_latent_rflow/checkpoint.pt" in log
