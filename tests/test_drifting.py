"""07: the field V against its definition, and what it makes of a mixture in two dimensions."""

import pytest
import torch
from scripts import drifting, options
from torch import nn

F64 = torch.float64


def points(seed: int, n: int, shift: float = 0.0, d: int = 3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, d, generator=rng, dtype=F64) + shift


@pytest.mark.parametrize("tau", [0.02, 0.2, 2.0])
def test_the_field_changes_its_sign_when_data_and_samples_change_places(tau):
    x, data, others = points(0, 5), points(1, 40, 1.0), points(2, 30, -0.5)
    there = drifting.drifting_field(x, data, others, tau)
    back = drifting.drifting_field(x, others, data, tau)
    assert there.abs().max() > 1e-4
    torch.testing.assert_close(there, -back, rtol=1e-12, atol=1e-14)
    same = drifting.drifting_field(x, data, data, tau)
    assert same.abs().max() < 1e-14


def test_the_field_by_hand():
    """Algorithm 2 in loops, for two samples, which also repel one another but not themselves."""
    x, data, tau = points(0, 2)[:1], points(1, 3)[:1], 0.3
    y = torch.cat([data, x], 1)[0]
    distance = [[(a - b).norm().item() for b in y] for a in x[0]]
    mean = sum(map(sum, distance)) / 10
    k = torch.tensor([[0.0 if j == 3 + i else 2.718281828459045 ** (-distance[i][j] / mean / tau)
                       for j in range(5)] for i in range(2)], dtype=F64)
    k = k / (k.sum(1, keepdim=True) * k.sum(0)).sqrt()
    expected = torch.zeros(2, 3, dtype=F64)
    for i in range(2):
        for a in range(3):
            for b in range(3, 5):
                expected[i] += k[i, a] * k[i, b] * (y[a] - y[b])
    field = drifting.drifting_field(x, data, x, tau, torch.eye(2, dtype=torch.bool))
    torch.testing.assert_close(field[0], expected)


def test_in_one_dimension_the_field_is_that_of_the_densities():
    """Data N(1, 0.5²), samples N(-0.5, 1): Eq. 11, by integrals in place of sums."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(1, n, 1, generator=rng, dtype=F64)
    x = torch.linspace(-2, 2, 9, dtype=F64)
    data, others, tau = 0.5 * draw(40_000) + 1, draw(40_000) - 0.5, 0.3
    field = drifting.drifting_field(x[None, :, None], data, others, tau).flatten()

    y = torch.linspace(-8, 8, 4001, dtype=F64)
    p = torch.distributions.Normal(1.0, 0.5).log_prob(y).exp()
    q = torch.distributions.Normal(-0.5, 1.0).log_prob(y).exp()
    distance = (x[:, None] - y).abs()
    mean = (distance * (p + q)).sum(1).mean() / (p + q).sum()
    k = torch.exp(-distance / (tau * mean))
    root = k.sum(0).sqrt()  # over the x of a y; that over the y of an x is the same for all y
    z = (k * (p + q)).sum(1)
    one = lambda density, power: (k / root * density * y**power).sum(1)
    expected = (one(p, 1) * one(q, 0) - one(p, 0) * one(q, 1)) / z
    assert (expected[x < 0.9] > 0).all()
    torch.testing.assert_close(field / field.norm(), expected / expected.norm(), atol=0.02, rtol=0)


def test_fields_of_all_reaches_count_alike_and_are_constant():
    """The loss is the mean square of their sum, whatever the scale; its gradient is -2 V / n."""
    torch.manual_seed(0)
    noise, data = torch.randn(2, 20, 64), torch.randn(2, 50, 64) + 1
    losses = []
    for scale in (1, 1000):
        shift = torch.zeros(64, requires_grad=True)
        loss = drifting.drifting_loss(
            lambda noise, labels, s=scale, b=shift: s * noise + b, noise, None, scale * data)
        loss.backward()
        losses.append(loss.item())
        assert shift.grad.mean() < 0  # towards the data
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and 1 < losses[0] <= 9
    for tau in (0.02, 0.2):
        loss = drifting.drifting_loss(lambda noise, _: noise, noise, None, data, taus=[tau])
        assert loss.item() == pytest.approx(1)


def test_the_first_n_samples_learn_and_the_others_only_repel_them():
    torch.manual_seed(0)
    noise, data, shift = torch.randn(2, 30, 64), torch.randn(2, 50, 64) + 1, torch.zeros(64)
    shift.requires_grad_()
    drifting.drifting_loss(lambda noise, _: noise + shift, noise, None, data, 5, [0.1]).backward()
    x, own = noise[:, :5], torch.eye(5, 30, dtype=torch.bool)
    V = drifting.drifting_field(x, data, noise, 0.1, own)
    V = V / V.square().mean((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(shift.grad, -2 * V.mean((0, 1)) / 64)
    fewer = drifting.drifting_field(x, data, x, 0.1, own[:, :5])
    assert not torch.allclose(fewer, V, atol=0.1)


def test_classes_do_not_meet():
    noise, data = torch.randn(3, 8, 64), torch.randn(3, 20, 64)
    own = torch.eye(8, dtype=torch.bool)
    together = drifting.drifting_field(noise, data, noise, 0.1, own)
    for c in range(3):
        alone = drifting.drifting_field(noise[c:c + 1], data[c:c + 1], noise[c:c + 1], 0.1, own)
        torch.testing.assert_close(together[c:c + 1], alone)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean()
            - torch.cdist(y, y).mean()).item()


def test_a_mixture_is_learned_with_all_its_modes():
    """Five spots on a circle, as toy.png shows them. Real draws have an energy distance of
    0.0005 to one another, the fresh network 0.67."""
    samples, data = drifting.toy(steps=600)[-1], drifting.toy_data(2000)
    assert energy_distance(samples, data) < 0.004
    distance = torch.cdist(samples, drifting.toy_data(5, spread=0.0)).min(1)
    assert (distance.values < 0.45).double().mean() > 0.85  # of the data 99%
    share = distance.indices.bincount(minlength=5) / len(samples)
    assert share.min() > 0.16 and share.max() < 0.24, share  # a fifth is 0.2


def test_a_row_has_an_image_of_each_class():
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2, 2])
    rows = drifting.one_of_each(labels, 3)
    assert rows.shape == (8, 3)
    assert torch.equal(labels[rows], torch.arange(3).expand(8, 3))
    for c in range(3):  # all of them, and as often as one another
        counts = rows[:, c].bincount(minlength=8)[labels == c]
        assert counts.min() >= counts.max() - 1 and counts.min() > 0
    assert torch.equal(drifting.one_of_each(labels, 4)[:, 3], torch.arange(8))  # no image of 3


def test_samples_in_one_point_have_a_field_of_finite_size():
    data = torch.randn(1, 500, 64)
    loss = drifting.drifting_loss(lambda noise, _: 0 * noise, torch.randn(1, 2, 64), None, data)
    assert loss.isfinite()


def test_each_class_meets_latents_of_its_own_images(tmp_path, monkeypatch):
    """The first number of µ stands for the class; as many data as a batch has rows."""
    seen, whole = [], []
    images = lambda n: [torch.zeros(n, 1, 28, 28), torch.arange(n) * 7 % 3]
    monkeypatch.setattr(drifting.common, "load_images", lambda args: (
        images(96), images(24), ["a", "b", "c"]))

    def encode_all(vae, x):
        whole.append(vae)
        mu = torch.zeros(len(x), 64)
        mu[:, 0] = torch.cat([images(96)[1], images(24)[1]])
        return mu, torch.full((len(x), 64), -99.0)

    def drifting_loss(model, noise, labels, data, n):
        seen.append((noise, labels, data))
        assert n == 8
        return model(noise, labels).square().mean()

    monkeypatch.setattr(drifting.latent, "encode_all", encode_all)
    monkeypatch.setattr(drifting, "drifting_loss", drifting_loss)
    for name in ("draw_nearest", "draw_toy"):
        monkeypatch.setattr(drifting, name, lambda *rest: None)
    drifting.train(drifting.parse_args(options(tmp_path, "--epochs", "1")))
    vae = whole[0]
    assert len(seen) == 96 // 16 + 1  # and the held-out loss
    for noise, labels, data in seen[:-1]:
        assert noise.shape == (3, 8 + 8, 64) and data.shape == (3, 16, 64)
        assert torch.equal(labels, torch.arange(3)[:, None])
        mu = (data * vae.std + vae.mean) @ vae.R.T
        expected = torch.arange(3.0)[:, None].expand(3, 16)
        torch.testing.assert_close(mu[:, :, 0], expected, atol=0.01, rtol=0)


def test_a_fresh_generator_depends_on_noise_and_later_on_the_class():
    torch.manual_seed(0)
    model = drifting.make_models(16, 3)["drifting"]
    noise, labels = torch.randn(5, 64), torch.tensor([0, 1, 2, 0, 1])
    assert model(noise, labels).shape == (5, 64)
    assert model(torch.randn(5, 2, 64), labels[:, None]).shape == (5, 2, 64)
    for block in model.blocks:
        nn.init.normal_(block.layer2.weight)
    assert not torch.allclose(model(noise, labels), model(noise, labels.flip(0)))
