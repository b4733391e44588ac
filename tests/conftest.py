"""What all tests here share: where the scripts are, one thread, and no way into the network."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads that wait for each other crawl

import pytest
import torch

torch.set_num_threads(1)  # in case that test_smoke.py was imported first

from scripts import compare, options

import common


@pytest.fixture(autouse=True)
def no_network_no_leftovers(tmp_path, monkeypatch):
    """A test can neither download, nor leave a file anywhere but in its own folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.fixture
def every_checkpoint(tmp_path, monkeypatch):
    """Keeps the checkpoint after n epochs as n.pt."""
    save = common.save

    def keep_too(path, state):
        save(path, state)
        if path.name == "checkpoint.pt":
            save(path.with_name(f"{len(state['history'])}.pt"), state)

    monkeypatch.setattr(common, "save", keep_too)


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The shipped classifier of 05."""
    folder = tmp_path_factory.mktemp("judge")
    args = compare.parse_args(["--device", "cpu", "--out-dir", str(folder)])
    return common.load_networks(args.state, compare.make_models(args))["judge"]


@pytest.fixture
def fast_dev(tmp_path):
    """module, options -> args of a run with everything tiny, in this test's folder."""
    return lambda module, *more: module.parse_args(options(tmp_path, *more))
