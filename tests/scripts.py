"""The numbered scripts as modules, and small helpers of the tests."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ddpm = importlib.import_module("01_ddpm_ddim")
latent = importlib.import_module("02_latent_diffusion")
cfg = importlib.import_module("03_cfg")
flow = importlib.import_module("04_rectified_flow")
latent_flow = importlib.import_module("04b_latent_rflow")
compare = importlib.import_module("05_compare")
meanflow = importlib.import_module("06_meanflow")
DRAWING = [ddpm, latent, cfg, flow, latent_flow, meanflow]
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
    """Two checkpoints agree bit for bit, but for the times in their histories.

    Of the training, only the last stage has to agree: what is done is not needed any longer.
    """
    last = one["history"][-1]["stage"]
    torch.testing.assert_close(one["networks"], two["networks"], rtol=0, atol=0)
    torch.testing.assert_close(one["training"][last], two["training"][last], rtol=0, atol=0)
    timeless = {"seconds": 0, "images_per_second": 0}
    for epoch, again in zip(one["history"], two["history"], strict=True):
        assert epoch | timeless == again | timeless
