#!/usr/bin/env bash
# torchdiffeq 0.2.5: odeint(velocity, x, [0, 1]) with dopri5 calls the velocity at t > 1.
#
# A flow is trained for t from 0, noise, to 1, data, and odeint(..., tensor([0., 1.])) reads as if it
# asked for no other. The adaptive solvers dopri5 (the default) and dopri8 do: their last step ends
# beyond 1 (below at 1.08 and 1.09), and the answer at 1 is interpolated. So a network is called at
# times that it has never seen, and what it says there has a share in the sample. One that divides
# by 1 - t changes its sign there. SciPy's RK45 ends its last step at 1. With
# options={"step_t": tensor([1.0])} torchdiffeq does, too. (Reported before: its issue 78.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchdiffeq==0.2.5 torch==2.14.1 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import scipy.integrate
import torch
from torchdiffeq import odeint

DATA = 0.3  # the standard deviation of the data, Gaussian around 0; noise has 1
seen = []


def velocity(t, x):
    """E[data - noise | x] for x = (1 - t) noise + t data: in closed form."""
    seen.append(float(t))
    return x * (t * DATA**2 - (1 - t)) / ((1 - t) ** 2 + (t * DATA) ** 2)


start, span = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
for method in ("dopri5", "dopri8"):
    for options in ({}, {"step_t": span[1:]}):
        seen.clear()
        end = odeint(velocity, start, span, method=method, options=options)[-1].item()
        print(f"torchdiffeq {version('torchdiffeq')}, {method}, {[*options]}: {len(seen)} calls, "
              f"times up to {max(seen):.2f}, ends at {end:.6f} (exact: {DATA})")
        assert abs(end - DATA) < 1e-4
        assert (max(seen) > 1.01) == (not options), "this has changed"
seen.clear()
scipy.integrate.solve_ivp(velocity, (0, 1), [1.0], rtol=1e-7, atol=1e-9)
print(f"scipy {scipy.__version__}, RK45: {len(seen)} calls, times up to {max(seen):.2f}")
assert max(seen) <= 1
PYTHON
