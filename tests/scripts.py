"""The numbered scripts as modules, and small helpers of the tests."""

import importlib
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).parent.parent
ddpm = importlib.import_module("01_ddpm_ddim")
latent = importlib.import_module("02_latent_diffusion")
cfg = importlib.import_module("03_cfg")
flow = importlib.import_module("04_rectified_flow")
latent_flow = importlib.import_module("04b_latent_rflow")
compare = importlib.import_module("05_compare")
meanflow = importlib.import_module("06_meanflow")
drifting = importlib.import_module("07_drifting")
UNETS = [ddpm, latent, cfg, flow, latent_flow, meanflow]
DRAWING = [*UNETS, drifting]
MODULES = [*DRAWING, compare]


def options(folder: Path, *more: str) -> list[str]:
    return ["--fast-dev", "--device", "cpu", "--out-dir", str(folder), *more]


def one_line(function, *arguments) -> str:
    """The message with which the call ends the script: one line, and no traceback."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    message = end.value.code
    assert isinstance(message, str), f"status {message} instead of a message"
    assert message and "\n" not in message
    return message


def usage_error(module, typed: list[str], capsys) -> str:
    """The last line that argparse prints on what was typed; it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        module.main(["--device", "cpu", *typed])
    assert end.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    return last


def assert_same(one: dict, two: dict) -> None:
    """Two checkpoints agree bit for bit, but for the times of their epochs.

    Of a stage that is followed by another, only the average has to agree: it learns no longer.
    """
    exactly = {"rtol": 0, "atol": 0}
    assert one["stages"].keys() == two["stages"].keys()
    *_, last = one["stages"]
    for name, stage in one["stages"].items():
        again = two["stages"][name]
        n = None if name == last else 1
        torch.testing.assert_close(stage["learned"][:n], again["learned"][:n], **exactly)
        torch.testing.assert_close(stage["frames"], again["frames"], **exactly)
        timeless = {"seconds": 0, "images_per_second": 0}
        for line, line_again in zip(stage["epochs"], again["epochs"], strict=True):
            assert line | timeless == line_again | timeless


def fit(args, loss, data, epochs=1, lr=1e-3, model=None, state=None, test=None, **more):
    """fit() of 01 on a model of one weight, or of your own."""
    state = state or common.open_run(args, network={}, classes=[])
    model = model if model is not None else OneWeight()
    return ddpm.fit(args, state, "one", model, loss, data, test or data, epochs, lr, **more)


class OneWeight(torch.nn.Module):
    """A network of one weight, which starts at 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
