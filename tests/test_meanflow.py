"""06: MeanFlow against flows with a closed form."""

import pytest
import torch
from scripts import latent_flow, meanflow
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
    one = t[:10_000].logit()  # a single draw: normal, with mean 0.4
    assert abs(one.mean() - 0.4) < 0.04 and abs(one.std() - 1) < 0.03
    smaller, larger = t[10_000:].logit(), r[10_000:].logit()  # order statistics: 0.4 ± 1/√π
    assert smaller.mean() == pytest.approx(0.4 - 0.5642, abs=0.02)
    assert larger.mean() == pytest.approx(0.4 + 0.5642, abs=0.02)


def test_the_law_of_the_average_velocity_holds_for_a_gaussian():
    t, r = times(1000, 200)
    x = torch.linspace(-3, 3, 3000, dtype=torch.float64).view(1000, 3)
    v = exact_u(x, t, t)
    du_dt = meanflow.total_derivative(exact_u, x, t, r, v)
    law = v + (r - t)[:, None] * du_dt
    assert (law - exact_u(x, t, r)).abs().max() < 1e-12


def network() -> nn.Module:
    torch.manual_seed(0)
    net = meanflow.UNet(8)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn_like(weight)  # for a fresh one does not look at the times
    return net


def test_the_derivative_of_a_network_is_that_of_its_curve(monkeypatch):
    monkeypatch.setattr(common.in_bfloat16, "allowed", False)
    net, (x, v) = network(), torch.randn(2, 4, 1, 8, 8)
    t, r = torch.tensor([[0.1, 0.4, 0.5, 0.9], [0.3, 0.5, 1.0, 0.9]])
    h = 0.01
    around = (net(x + h * v, t + h, r) - net(x - h * v, t - h, r)) / (2 * h)
    du_dt = meanflow.total_derivative(net, x, t, r, v)
    torch.testing.assert_close(du_dt, around, rtol=0.01, atol=0.01)


def test_without_a_later_time_it_is_the_velocity():
    net, x, t = network(), torch.randn(3, 1, 8, 8), torch.rand(3)
    assert torch.equal(net(x, t), net(x, t, t))
    assert not torch.allclose(net(x, t), net(x, t, t + 0.5))


def test_steps_of_the_exact_average_are_exact():
    x0 = torch.randn(50, 3, dtype=torch.float64)
    model = lambda x, t, r: exact_u(x, t.double(), r.double())
    for steps in (1, 2, 5):
        x1 = meanflow.meanflow_sample(model, x0, steps)
        torch.testing.assert_close(x1, S * x0, rtol=1e-6, atol=1e-6)


def test_the_loss_is_least_where_all_lines_have_one_velocity():
    x0 = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    t, r = times(8, 2)
    model = lambda x, t, r=None: 0 * x + 1.5
    loss = meanflow.meanflow_loss(model, x0, x0 + 1.5, t, r, 2)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_the_target_by_hand():
    """u = x r + t²: so v = u(x, t, t) = x t + t² and du/dt = r v + 2 t."""
    x0, x1 = torch.randn(2, 6, 1, 1, 1, dtype=torch.float64)
    t, r = times(6, 2)
    model = lambda x, t, r=None: (x.flatten() * (t if r is None else r) + t**2).view_as(x)
    x_t, line = (x0.flatten() * (1 - t) + x1.flatten() * t), (x1 - x0).flatten()
    target = line + (r - t) * (r * (x_t * t + t**2) + 2 * t)
    expected = (target - x_t * r - t**2).square().mean()
    ours = meanflow.meanflow_loss(model, x0, x1, t, r, 2)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_network_trained_on_it_takes_one_step_to_the_data():
    """Data at -1 and 1: one step must choose, where the velocity at t = 0 points to 0."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                         nn.Linear(128, 1))
    model = lambda x, t, r=None: body(torch.stack(
        [x.flatten(), t, t if r is None else r], dim=1))[..., None, None]
    optimizer = torch.optim.Adam(body.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        x0 = torch.randn(256, 1, 1, 1)  # images of one pixel
        x1 = torch.randint(2, (256, 1, 1, 1)) * 2.0 - 1
        t, r = meanflow.draw_times(256, 128, None)
        optimizer.zero_grad()
        meanflow.meanflow_loss(model, x0, x1, t, r, 128).backward()
        optimizer.step()
        schedule.step()
    x0 = torch.linspace(-2, 2, 41).view(-1, 1, 1, 1)
    x1 = meanflow.meanflow_sample(model, x0, 1)
    far = x0.abs() > 0.5
    assert (x1[far] - x0[far].sign()).abs().mean() < 0.25  # 0.10 here
    velocity = lambda x, t, r: model(x, t, t)
    x1 = meanflow.meanflow_sample(velocity, x0, 1)
    assert (x1[far] - x0[far].sign()).abs().mean() > 0.8  # its step ends near the mean, 0


def test_its_network_is_that_of_04b_and_a_gap():
    """Same layers, and same weights by name; 06 has those of the gap in addition."""
    ours, theirs = meanflow.UNet(8).state_dict(), latent_flow.UNet(8, t_max=1).state_dict()
    assert {name for name in ours if "gap" not in name} == theirs.keys()
    assert all(ours[name].shape == weight.shape for name, weight in theirs.items())
