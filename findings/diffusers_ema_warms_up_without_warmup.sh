#!/usr/bin/env bash
# diffusers 0.42.1: EMAModel(use_ema_warmup=False), the default, warms up, too: by another formula.
#
# One reads decay=0.9999, use_ema_warmup=False as an average that forgets at that rate from the
# first step, over some 10,000 steps. But in step n the decay is at most n / (9 + n), so the average
# is over a ninth of the steps so far: after 1,000 of them 0.991, and 0.9999 is not in force before
# step 90,000. A training of 20,000 steps never sees it, and the first step copies the weights. So
# an ablation of `decay` above 0.9996 compares equal runs there, and one of use_ema_warmup compares
# two warm-ups: True has 1 - n^(-2/3), after 10,000 steps 0.9978 where False has 0.9991, the longer
# memory. Only min_decay=decay gives a constant rate.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers.training_utils import EMAModel


def run(steps, **options):
    """The weight is 0 in the first step, then 1: the last decay, and the average at the end."""
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = EMAModel([weight], **options)
    for _ in range(steps):
        ema.step([weight])
        weight.data.fill_(1)
    return ema.cur_decay_value, ema.shadow_params[0].item()


found = {}
for options in ({"decay": 0.9999}, {"decay": 0.9999, "use_ema_warmup": True},
                {"decay": 0.9999, "min_decay": 0.9999}):
    for steps in (100, 1000, 10_000):
        decay, average = found[*options, steps] = run(steps, **options)
        print(f"diffusers {diffusers.__version__}: {options}, step {steps}: "
              f"decay {decay:.4f}, average {average:.4f}")
plain, warm, constant = [("decay",), ("decay", "use_ema_warmup"), ("decay", "min_decay")]
assert abs(found[*constant, 1000][1] - (1 - 0.9999**999)) < 0.001  # 0.095, as one expects
assert abs(found[*plain, 1000][0] - 1000 / 1009) < 1e-4, "this has changed: no warm-up by default"
assert found[*plain, 1000][1] > 0.999, "this has changed: no warm-up by default"
assert found[*warm, 10_000][0] < found[*plain, 10_000][0] < 0.9992, "this has changed"
PYTHON
