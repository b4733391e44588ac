"""06: MeanFlow against flows with a closed form, and where it starts."""

import pytest
import torch
from scripts import flow, meanflow, options
from torch import nn

import common

S = 0.3  # the data are N(0, S²), so all marginals are Gaussians, and the paths scale x


def sigma(t):
    return ((1 - t) ** 2 + (S * t) ** 2).sqrt()


def exact_u(x, t, r):
    """(x_r - x_t) / (r - t) on the path x_r = x_t σ_r / σ_t, or its limit, the velocity."""
    t, r = (time.view(-1, *[1] * (x.dim() - 1)) for time in (t, r))
    velocity = x * (S**2 * t - (1 - t)) / sigma(t) ** 2
    gap = torch.where(r == t, 1, r - t)
    return torch.where(r == t, velocity, x * (sigma(r) / sigma(t) - 1) / gap)


def times(n: int, equal: int):
    t, r = meanflow.draw_times(n, equal, torch.Generator().manual_seed(0))
    return t.double(), r.double()


def test_times_are_in_order_and_equal_where_asked():
    t, r = times(40_000, 10_000)
    assert (t <= r).all() and torch.equal(t[:10_000], r[:10_000]) and (t < r)[10_000:].all()
    assert 0 < t.min() and r.max() < 1
    one = t[:10_000].logit()  # a single draw: a standard normal
    assert abs(one.mean()) < 0.04 and abs(one.std() - 1) < 0.03
    smaller, larger = t[10_000:].logit(), r[10_000:].logit()  # means of order statistics: ±1/√π
    assert smaller.mean() == pytest.approx(-0.5642, abs=0.02)
    assert larger.mean() == pytest.approx(0.5642, abs=0.02)


@pytest.mark.parametrize(("by", "error"), [("jvp", 1e-12), ("difference", 3e-3)])
def test_the_law_of_the_average_velocity_holds_for_a_gaussian(by, error):
    t, r = times(1000, 200)
    x = torch.linspace(-3, 3, 3000, dtype=torch.float64).view(1000, 3)
    v = exact_u(x, t, t)
    du_dt = meanflow.total_derivative(exact_u, x, t, r, v, by)
    law = v + (r - t)[:, None] * du_dt
    assert (law - exact_u(x, t, r)).abs().max() < error


def test_the_derivative_of_a_network_is_that_of_its_curve():
    torch.manual_seed(0)
    net = meanflow.UNet(8)
    for weight in (net.gap[-1].weight, net.conv_out.weight):
        nn.init.normal_(weight, std=0.1)
    x, v = torch.randn(2, 4, 1, 8, 8)
    t, r = torch.tensor([[0.1, 0.4, 0.5, 0.9], [0.3, 0.5, 1.0, 0.9]])
    h = 1e-4  # the fastest wiggle of the embedding of t is 6e-3 long
    around = (net(x + h * v, t + h, r) - net(x - h * v, t - h, r)) / (2 * h)
    du_dt = meanflow.total_derivative(net, x, t, r, v, "jvp")
    torch.testing.assert_close(du_dt, around, rtol=0.02, atol=0.02)


def test_steps_of_the_exact_average_are_exact():
    x0 = torch.randn(50, 3, dtype=torch.float64)
    model = lambda x, t, r: exact_u(x, t.double(), r.double())
    for steps in (1, 2, 5):
        x1 = meanflow.meanflow_sample(model, x0, steps)
        torch.testing.assert_close(x1, S * x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tangent", ["own", "pair"])
@pytest.mark.parametrize("by", ["jvp", "difference"])
def test_the_loss_is_least_where_all_lines_have_one_velocity(tangent, by):
    x0 = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    constant = torch.full_like(x0, 1.5)
    t, r = times(8, 2)
    model = lambda x, t, r: 0 * x + 1.5
    how = (model, x0, x0 + constant, t, r, 2, tangent, by)
    assert meanflow.meanflow_loss(*how, adaptive=False).item() == pytest.approx(0, abs=1e-12)
    assert meanflow.meanflow_loss(*how).item() == pytest.approx(torch.tensor(0.01).log().item())


def test_a_network_trained_on_it_takes_one_step_to_the_data():
    """Data at -1 and 1: one step must choose, where the velocity at t = 0 points to 0.

    By the squared error: with the weight, the velocity itself would choose one of the two.
    """
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                         nn.Linear(128, 1))
    model = lambda x, t, r: body(torch.stack([x.flatten(), t, r], dim=1))[..., None, None]
    optimizer = torch.optim.Adam(body.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        x0 = torch.randn(256, 1, 1, 1)  # images of one pixel
        x1 = torch.randint(2, (256, 1, 1, 1)) * 2.0 - 1
        t, r = meanflow.draw_times(256, 128, None)
        optimizer.zero_grad()
        meanflow.meanflow_loss(model, x0, x1, t, r, 128, adaptive=False).backward()
        optimizer.step()
        schedule.step()
    x0 = torch.linspace(-2, 2, 41).view(-1, 1, 1, 1)
    x1 = meanflow.meanflow_sample(model, x0, 1)
    far = x0.abs() > 0.5
    assert (x1[far] - x0[far].sign()).abs().mean() < 0.25  # 0.10 here
    velocity = lambda x, t, r: model(x, t, t)
    x1 = meanflow.meanflow_sample(velocity, x0, 1)
    assert (x1[far] - x0[far].sign()).abs().mean() > 0.8  # its step ends near the mean, 0


def test_it_starts_as_the_flow_and_a_longer_flow_makes_it_begin_again(tmp_path):
    """Without r the network is a flow; before its training, r makes no difference."""
    typed = options(tmp_path, "--train-images", "64", "--epochs", "1", "--batch-size", "16",
                    "--meanflow-epochs", "1", "--meanflow-lr", "1e-9")
    more = ["--resume", "--epochs", "2", "--device", "cpu", "--out-dir", str(tmp_path)]
    x, t, r = torch.randn(3, 1, 28, 28), torch.rand(3), torch.ones(3)
    velocities = []
    for arguments in (typed, more):
        made = meanflow.train(meanflow.parse_args(arguments))
        with torch.no_grad():
            velocities.append(made["flow"](x, t))
            ours = made["meanflow"](x, t, r)
        torch.testing.assert_close(ours, velocities[-1], atol=1e-4, rtol=0)
    assert (velocities[0] - velocities[1]).abs().max() > 1e-3  # so the old one was not kept
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    stages = [(line["stage"], line["epoch"]) for line in common.history(state)]
    assert stages == [("flow", 1), ("flow", 2), ("meanflow", 1)]


def test_the_flow_of_06_is_that_of_04_but_for_its_output():
    """Same layers, and same weights by name; 06 has those of the gap in addition."""
    ours, theirs = meanflow.UNet(8).state_dict(), flow.UNet(8).state_dict()
    assert {name for name in ours if "gap" not in name} == theirs.keys()
    assert all(ours[name].shape == weight.shape for name, weight in theirs.items())
