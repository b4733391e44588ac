"""What all tests here share: where the scripts are, one thread, and no way into the network."""

import os
import signal
import subprocess
import sys
import tempfile
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


BESIDE = {"test_bench", "test_device", "test_folders", "test_metrics", "test_whole_runs"}


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """If these files, half of the time, are to run, and others, too, then they run beside the
    others: as a process, on a second core. What it prints comes at the end."""
    moved = [item for item in session.items if item.path.stem in BESIDE]
    option = session.config.option
    if option.collectonly or option.usepdb or len(moved) in (0, len(session.items)):
        return (yield)
    session.items[:] = [item for item in session.items if item not in moved]
    session.testscollected = len(session.items)
    session.config.hook.pytest_deselected(items=moved)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(
            [*command, *(item.nodeid for item in moved)], cwd=session.config.rootpath,
            stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            done = yield
            session.testsfailed += process.wait() != 0
        finally:  # also after Ctrl-C
            process.send_signal(signal.SIGINT)  # so that it ends what it has started
        output.seek(0)
        text = output.read()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    session.config.add_cleanup(lambda: reporter.write(text))  # below the summary of the others
    session.config.add_cleanup(lambda: reporter.section("beside these ran"))  # before it
    return done


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
