#!/usr/bin/env bash
# torch 2.14.1, CPU: torch's own attention has a gradient, but no Jacobian-vector product.
#
# MeanFlow and consistency models in continuous time train by torch.func.jvp of their network. On a CPU
# that ends in a NotImplementedError for F.scaled_dot_product_attention, and so for
# nn.MultiheadAttention, while reverse mode (grad, vjp) of the same function works: the fused kernel
# has no forward derivative. torch.no_grad does not help. It works with the plain kernel
# (torch.nn.attention.sdpa_kernel(SDPBackend.MATH)), or with softmax and two products written out.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
x, v = torch.randn(2, 2, 1, 16, 8)  # each (batch, heads, tokens, channels)
layer = torch.nn.MultiheadAttention(8, 1, batch_first=True).eval()


def fused(x):
    return F.scaled_dot_product_attention(x, x, x)


def written_out(x):
    return (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x


def jvp(function, x, v):
    try:
        return torch.func.jvp(function, (x,), (v,))[1]
    except NotImplementedError as error:
        return f"NotImplementedError: {str(error)[:75]}"


print("torch", torch.__version__)
gradient = torch.func.grad(lambda x: (fused(x) * v).sum())(x)
print("gradient of F.scaled_dot_product_attention: shape", tuple(gradient.shape))
failed = {"F.scaled_dot_product_attention": jvp(fused, x, v)}
with torch.no_grad():
    failed["the same in no_grad"] = jvp(fused, x, v)
failed["nn.MultiheadAttention"] = jvp(lambda x: layer(x, x, x, need_weights=False)[0], x[:, 0], v[:, 0])
for name, found in failed.items():
    print(f"jvp of {name}: {found}")
with sdpa_kernel(SDPBackend.MATH):
    plain = jvp(fused, x, v)
difference = (plain - jvp(written_out, x, v)).abs().max().item()
print(f"jvp by SDPBackend.MATH and written out differ by at most {difference:.0e}")
assert all(isinstance(found, str) for found in failed.values()), "it works now"
assert difference < 1e-5
PYTHON
