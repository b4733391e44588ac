#!/usr/bin/env bash
# diffusers 0.42.1: n steps of FlowMatchEulerDiscreteScheduler are n - 1 steps, and a call for nothing.
#
# One reads set_timesteps(2) as two Euler steps: noise levels 1, 0.5, 0. They are 1, 0.001, 0: n even
# levels end at the smallest of the training, and 0 is added behind them. So the last call of the
# network moves the sample by a thousandth, and the n - 1 before it go all the way. With 50 steps that
# hardly matters. Where few steps are compared it does: two steps draw what one step draws, the mean
# of the data (below, a standard deviation of 0.001; two even steps reach 0.083, and the data have
# 0.3). A list, set_timesteps(sigmas=[1, 1/2]), gives the two even steps.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import diffusers
import torch

DATA = 0.3  # the standard deviation of the data, Gaussian around 0


def velocity(x, level):
    """E[noise - data | x] for x = (1 - level) data + level noise: in closed form."""
    signal = (1 - level) * DATA**2
    return x * (level - signal) / (level**2 + (1 - level) * signal)


def by_scheduler(**steps):
    """Noise of standard deviation 1 ends with this one (all is linear in x), and the levels."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # shift = 1: even steps
    scheduler.set_timesteps(**steps)
    x = torch.ones(1, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.double() / 1000), t, x, return_dict=False)[0]
    return x.item(), [round(level, 3) for level in scheduler.sigmas.tolist()]


def by_euler(n):
    x = 1.0
    for i in range(n):
        x -= velocity(x, 1 - i / n) / n
    return x


for n in (2, 3, 5, 10):
    got, levels = by_scheduler(num_inference_steps=n)
    even, _ = by_scheduler(sigmas=[1 - i / n for i in range(n)])
    print(f"diffusers {diffusers.__version__}, {n} steps: {got:.4f}; Euler with {n} even steps "
          f"{by_euler(n):.4f}, with {n - 1} {by_euler(n - 1):.4f}; levels {levels}")
    assert levels[-2:] == [0.001, 0], "this has changed: the last step"
    assert abs(got - by_euler(n - 1)) < 0.002 < abs(got - by_euler(n)), "this has changed"
    assert abs(even - by_euler(n)) < 1e-3, "a list of levels should give even steps"
PYTHON
