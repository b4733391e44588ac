"""What all tests here share: where the scripts are, one thread, and no way into the network."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads that wait for each other crawl

import pytest
import torch

torch.set_num_threads(1)  # in case that test_smoke.py was imported first

from scripts import options

import common


@pytest.fixture(autouse=True)
def no_network_no_leftovers(tmp_path, monkeypatch):
    """A test can neither download, nor leave a file anywhere but in its own folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


GPU_SCRIPTS = ["04b_latent_rflow", "01_ddpm_ddim"]


def gpu_script(folder: Path, minutes: str = "600") -> subprocess.Popen:
    """bench/gpu.sh in miniature, with two scripts."""
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MINUTES": minutes,
                "SCRIPTS": " ".join(GPU_SCRIPTS)}
    return subprocess.Popen(["bash", ROOT / "bench/gpu.sh", "--dry-run", folder], text=True,
                            env=os.environ | settings, stdout=subprocess.PIPE,
                            start_new_session=True)


@pytest.fixture(scope="session", autouse=True)
def first_gpu_run(request, tmp_path_factory):
    """It takes minutes, so it starts before the tests, on another core, if one will want it."""
    if not any(item.path.stem == "test_whole_runs" for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("gpu")
    process = gpu_script(folder)
    yield folder, process
    if process.poll() is None:  # its test did not come: end all that it has started
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Networks compute in float32, but in runs: those follow --no-bf16."""
    monkeypatch.setattr(common.in_bfloat16, "allowed", False)


@pytest.fixture
def every_checkpoint(tmp_path, monkeypatch):
    """Keeps the checkpoint after n epochs as n.pt."""
    save = common.save

    def keep_too(path, state):
        save(path, state)
        if path.name == "checkpoint.pt":
            save(path.with_name(f"{len(common.history(state))}.pt"), state)

    monkeypatch.setattr(common, "save", keep_too)


@pytest.fixture(scope="session")
def judge():
    """The shipped classifier of 05."""
    return common.load("05_compare", "judge")


@pytest.fixture
def fast_dev(tmp_path):
    """module, options -> args of a run with everything tiny, in this test's folder."""
    return lambda module, *more: module.parse_args(options(tmp_path, *more))
