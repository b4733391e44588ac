#!/usr/bin/env bash
# torch 2.14.1, CPU: with one seed, the first numbers of a larger randn are not those of a smaller one.
#
# To compare samplers one fixes the noise by a seed, looks at ten samples first and draws more later,
# and expects that the ten are the first of the more. With images of 28x28 that holds. It does not if
# the count of numbers is not a multiple of 16: torch fills blocks of 16, and then draws the last 16
# numbers anew, so they depend on where the tensor ends. Below 16 numbers it takes another algorithm,
# and nothing agrees. So the first points of a toy in the plane, or of samples of 3 numbers, change
# with the size of the batch. (torch.rand does not do that.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def noise(draw, *shape):
    return draw(*shape, generator=torch.Generator().manual_seed(0))


def agree(draw, few, many, *each):
    """How many of `few` samples are the first ones of `many`."""
    return int((noise(draw, few, *each) == noise(draw, many, *each)[:few]).flatten(1).all(1).sum())


print("torch", torch.__version__)
found = {}
for few, many, each in ((10, 64, (1, 28, 28)), (10, 64, (3,)), (10, 64, (2,)), (5, 64, (2,))):
    found[few, each] = agree(torch.randn, few, many, *each)
    print(f"randn{(few, *each)}: {found[few, each]} of {few} samples are the first of "
          f"randn{(many, *each)}; rand: {agree(torch.rand, few, many, *each)}")
    assert agree(torch.rand, few, many, *each) == few, "rand has changed"
assert found == {(10, (1, 28, 28)): 10, (10, (3,)): 4, (10, (2,)): 2, (5, (2,)): 0}, \
    "randn has changed"
PYTHON
