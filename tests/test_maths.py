"""The maths of the scripts, against closed forms, Bayes' rule and numbers by hand.

It also sees to it that what scripts have in common is the same text in each of them.
"""

import inspect
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from scripts import DRAWING, cfg, ddpm, flow, latent, latent_flow, meanflow, options
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

import common

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ what the scripts share


@pytest.mark.parametrize(("modules", "names"), [
    ([latent, latent_flow], ["UNet"]),
    ([ddpm, latent, cfg], ["Schedule", "make_schedule", "q_sample", "ddim_pairs", "ddim_sample"]),
    ([ddpm, latent], ["diffusion_loss"]),
    ([ddpm, cfg], ["draw_path"]),
    ([latent, latent_flow], ["VAE", "conv_block", "encode_all"]),
    ([flow, latent_flow], ["even_times", "euler_sample", "adams_sample", "straightness",
                           "make_pairs"]),
    ([flow, latent_flow, meanflow], ["even_times"]),
    (DRAWING, ["main"]),
])
def test_siblings_share_their_text(modules, names):
    """But for the size of an image or a latent."""
    for name in names:
        texts = [inspect.getsource(getattr(module, name)) for module in modules]
        assert len({text.replace("1, 28, 28", "1, 8, 8") for text in texts}) == 1, name


def test_the_network_of_02_is_that_of_01_but_for_its_middle():
    one, two = (inspect.getsource(module.UNet).splitlines() for module in (ddpm, latent))
    changes = "        c1, c2, c3, c_time =", "        self.mid", "        h = self.mid"
    for here, there in ((one, two), (two, one)):
        for line in {*here} - {*there}:
            assert line.startswith(changes), line


@pytest.mark.parametrize("name", ["uniform", "logit-normal", "u-shaped", "half-at-0", "all-at-0"])
def test_04_and_04b_share_their_densities(name):
    u = torch.linspace(0.01, 0.99, 99)
    assert torch.equal(flow.T_DENSITIES[name](u), latent_flow.T_DENSITIES[name](u))


def test_the_network_of_03_is_that_of_01_and_the_labels():
    """With the weights of 01, and with zeros for all that reads the labels, both agree.
    (03 has two blocks fewer in the middle until its weights, too, are new.)"""
    torch.manual_seed(0)
    one, three = ddpm.UNet(8, 1000), cfg.UNet(8, 1000, 4)
    nn.init.normal_(one.conv_out.weight)
    nn.init.zeros_(three.cross_attention.out.bias)
    for block in (one.mid2, one.mid4):  # so that they change nothing
        nn.init.zeros_(block.conv2.bias)
    weights = {name.replace("mid3", "mid2"): x for name, x in one.state_dict().items()
               if not name.startswith(("mid2", "mid4"))}
    spread = torch.zeros(8, 33, 3, 3)
    spread[:, :1] = weights["conv_in.weight"]
    missing = three.load_state_dict(weights | {"conv_in.weight": spread}, strict=False)
    assert {key.split(".")[0] for key in missing.missing_keys} == {
        "label_channels", "label_tokens", "cross_attention"}
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    assert torch.allclose(one(x, t), three(x, t, torch.tensor([4, 10])), atol=1e-5)


# ------------------------------------------------------------------------------- diffusion


def exact_v(schedule, x0):
    """The network that knows x0, so that ε = (x_t - √ᾱ x0) / √(1-ᾱ) and v = √ᾱ ε - √(1-ᾱ) x0."""

    def model(x, t):
        ab = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        noise = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return ab.sqrt() * noise - (1 - ab).sqrt() * x0

    return model


def gaussian_v(schedule, s):
    """The ideal network for data N(0, s²): √ᾱ E[ε | x_t] - √(1-ᾱ) E[x0 | x_t], with
    E[ε | x_t] = √(1-ᾱ) x_t / (ᾱ s² + 1-ᾱ) and E[x0 | x_t] = √ᾱ s² x_t / (ᾱ s² + 1-ᾱ)."""

    def model(x, t):
        ab = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        return (ab * (1 - ab)).sqrt() * (1 - s**2) * x / (ab * s**2 + 1 - ab)

    return model


@pytest.mark.parametrize("timesteps", [2, 3, 10, 50, 999, 1000, 4000])
def test_schedule(timesteps):
    schedule = ddpm.make_schedule(timesteps)
    assert all(table.shape == (timesteps,) for table in schedule)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    product = 1.0
    for t in range(timesteps):
        theta = 0.01 + t / (timesteps - 1) * (math.pi / 2 - 0.02)
        product *= 1 - schedule.betas[t].item()  # ᾱ is the product of all α = 1 - β
        assert schedule.alphas[t].item() == pytest.approx(1 - schedule.betas[t].item(), rel=1e-12)
        assert product == pytest.approx(math.cos(theta) ** 2, rel=1e-9)
        assert schedule.alpha_bars[t].item() == pytest.approx(product, rel=1e-9)
    assert schedule.alpha_bars[-1].sqrt() < 0.02  # nothing of the image is left
    assert schedule.alpha_bars[0] > 0.999  # hardly any noise at the start


def test_q_sample_has_the_moments_of_eq_4():
    schedule = ddpm.make_schedule(1000)
    x0, noise = torch.full((4, 1, 2, 2), 0.5), torch.full((4, 1, 2, 2), -2.0)
    t = torch.tensor([0, 1, 500, 999])
    x_t = ddpm.q_sample(schedule, x0, t, noise)
    assert x_t.dtype == torch.float32
    for i, step in enumerate(t.tolist()):
        ab = math.prod(1 - beta for beta in schedule.betas[: step + 1].tolist())
        expected = 0.5 * ab**0.5 - 2 * (1 - ab) ** 0.5
        assert x_t[i].flatten().tolist() == pytest.approx([expected] * 4)


@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_posterior_is_bayes_rule(timesteps):
    schedule = ddpm.make_schedule(timesteps)
    x_t, x0 = torch.tensor(0.7, dtype=F64), torch.tensor(-0.3, dtype=F64)
    for t in range(1, timesteps, max(1, timesteps // 13)):
        beta, ab_prev = schedule.betas[t].item(), schedule.alpha_bars[t - 1].item()
        # p(x_{t-1} | x_t, x0) ∝ N(x_{t-1}; √ᾱ_{t-1} x0, 1-ᾱ_{t-1}) N(x_t; √α_t x_{t-1}, β_t)
        precision = 1 / (1 - ab_prev) + (1 - beta) / beta
        mean = (ab_prev**0.5 * x0 / (1 - ab_prev) + (1 - beta) ** 0.5 * x_t / beta) / precision
        ours = ddpm.posterior(schedule, t, x_t, x0)
        assert ours[0].item() == pytest.approx(mean.item(), rel=1e-9)
        assert ours[1] == pytest.approx(1 / precision, rel=1e-9)
    mean, variance = ddpm.posterior(schedule, 0, x_t, x0)
    assert mean.item() == pytest.approx(-0.3) and variance == 0  # the last step: x̂_0, no noise


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 100), (1000, 7), (50, 50), (40, 1)])
def test_ddim_pairs(timesteps, steps):
    pairs = ddpm.ddim_pairs(timesteps, steps)
    assert len(pairs) == steps
    assert pairs[0][0] == timesteps - 1 and pairs[-1][1] == -1
    assert all(one[1] == two[0] for one, two in pairwise(pairs))
    lengths = [t - t_next for t, t_next in pairs]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1  # evenly spaced


@pytest.mark.parametrize("steps", [0, 51])
def test_ddim_pairs_refuse_more_steps_than_timesteps(steps):
    with pytest.raises(ValueError, match=f"not {steps}"):
        ddpm.ddim_pairs(50, steps)


@pytest.mark.parametrize("steps", [1, 7, 50, None])
def test_with_the_exact_v_samplers_return_the_image(steps):
    """By DDIM, and by DDPM (None): no noise may be added in its last step."""
    schedule = ddpm.make_schedule(1000)
    x0 = torch.rand(3, 1, 28, 28, dtype=F64, generator=seeded(0)) * 2 - 1
    x_T = torch.randn(x0.shape, dtype=F64, generator=seeded(1))
    model = exact_v(schedule, x0)
    if steps:
        sample = ddpm.ddim_sample(model, schedule, x_T, steps)
    else:
        sample = ddpm.ddpm_sample(model, schedule, x_T, seeded(2))
    assert torch.allclose(sample, x0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samplers_give_the_variance_of_gaussian_data(sampler):
    """With the ideal network for N(0, 0.5²) the samples are N(0, 0.5²): no step may go astray."""
    schedule, rng = ddpm.make_schedule(1000), seeded(0)
    x_T = torch.randn(20, 1, 28, 28, generator=rng, dtype=F64)
    model = gaussian_v(schedule, 0.5)
    if sampler == "ddim":  # x_t / √(ᾱ_t s² + 1-ᾱ_t) is constant on the paths of this flow
        x = ddpm.ddim_sample(model, schedule, x_T, 1000)
        assert torch.allclose(x / x_T, torch.tensor(0.5, dtype=F64), rtol=0.01)
    else:
        x = ddpm.ddpm_sample(model, schedule, x_T, rng)
        assert abs((x * x_T).mean()) < 0.02  # the noise of a thousand steps hides the start
    assert x.std().item() == pytest.approx(0.5, rel=0.02)


def test_one_step_of_ddim_with_noise_by_hand():
    """Song, Eq. 12 and 16, for T = 50, two steps, η = 0.7, and a network that says 0.3."""
    schedule, x_T = ddpm.make_schedule(50), torch.tensor([[[[1.2]]]], dtype=F64)
    seen = []
    ddpm.ddim_sample(lambda x, t: torch.full_like(x, 0.3), schedule, x_T, 2, eta=0.7,
                     rng=seeded(5), trace=lambda *step: seen.append(step))
    (t, _, x0_hat), (t_next, x_next, _) = seen
    assert t == 49 and t_next == 24
    ab, ab_next = (math.cos(0.01 + t / 49 * (math.pi / 2 - 0.02)) ** 2 for t in (49, 24))
    expected_x0 = ab**0.5 * 1.2 - (1 - ab) ** 0.5 * 0.3
    eps = (1 - ab) ** 0.5 * 1.2 + ab**0.5 * 0.3
    assert ab**0.5 * expected_x0 + (1 - ab) ** 0.5 * eps == pytest.approx(1.2)  # = x_t
    sigma = 0.7 * ((1 - ab_next) / (1 - ab)) ** 0.5 * (1 - ab / ab_next) ** 0.5
    noise = torch.randn(1, 1, 1, 1, generator=seeded(5)).item()
    expected = ab_next**0.5 * expected_x0 + (1 - ab_next - sigma**2) ** 0.5 * eps + sigma * noise
    assert x0_hat.item() == pytest.approx(expected_x0)
    assert x_next.item() == pytest.approx(expected)


def test_ddim_with_eta_1_and_all_steps_is_ddpm():
    schedule, model = ddpm.make_schedule(60), gaussian_v(ddpm.make_schedule(60), 0.5)
    x_T = torch.randn(4, 1, 28, 28, dtype=F64)
    one = ddpm.ddpm_sample(model, schedule, x_T, seeded(1))
    two = ddpm.ddim_sample(model, schedule, x_T, 60, eta=1.0, rng=seeded(1))
    assert torch.allclose(one, two, atol=1e-9)


@pytest.mark.parametrize("sample", [
    ddpm.ddpm_sample, partial(ddpm.ddim_sample, steps=5, eta=0.5), latent.ddpm_sample])
def test_samples_follow_the_seed_and_stay_in_float32(sample):
    schedule, x_T = ddpm.make_schedule(20), torch.randn(2, 1, 28, 28)
    model = gaussian_v(schedule, 0.5)
    network = lambda x, t: model(x, t).float()
    one, same, other = (sample(network, schedule, x_T, rng=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.dtype == torch.float32


def test_v_is_the_velocity_on_the_arc():
    """dx_t / dφ for √ᾱ_t = cos φ, by central differences, where the loss asks for it."""
    schedule, x0 = ddpm.make_schedule(100), torch.rand(6, 1, 4, 4, dtype=F64) * 2 - 1
    noise, t = torch.randn(x0.shape, dtype=F64), torch.tensor([0, 1, 20, 50, 98, 99])
    phi = (0.01 + t / 99 * (math.pi / 2 - 0.02)).double().view(-1, 1, 1, 1)
    on_arc = lambda phi: phi.cos() * x0 + phi.sin() * noise
    v = (on_arc(phi + 1e-5) - on_arc(phi - 1e-5)) / 2e-5
    seen = []
    loss = ddpm.diffusion_loss(lambda x, t: seen.append(x) or v, schedule, x0, t=t, noise=noise)
    assert loss < 1e-9
    assert torch.allclose(seen[0], on_arc(phi), atol=1e-6)


def test_the_loss_is_the_error_of_v():
    schedule, x0 = ddpm.make_schedule(100), torch.rand(8, 1, 28, 28) * 2 - 1
    exact = exact_v(schedule, x0.double())
    t = torch.randint(100, (8,))
    assert ddpm.diffusion_loss(exact, schedule, x0, t, torch.randn_like(x0)).item() < 1e-6
    noise = torch.full_like(x0, 2.0)
    loss = lambda t: ddpm.diffusion_loss(
        lambda x, t: torch.zeros_like(x), schedule, x0, torch.full((8,), t), noise).item()
    assert loss(0) == pytest.approx(4, rel=0.03)  # v is almost the noise ...
    assert loss(99) == pytest.approx(x0.square().mean().item(), rel=0.15)  # ... or minus the image


@pytest.mark.parametrize("module", [ddpm, latent, cfg])
def test_training_draws_every_t_with_fresh_noise(module, tmp_path, monkeypatch):
    seen, held_out = [], []

    def spy(model, schedule, x0, t, noise, *labels):
        (seen if model.training else held_out).append((t, noise))
        return sum(weight.mean() for weight in model.parameters())  # quick, and it has gradients

    monkeypatch.setattr(module, "diffusion_loss", spy)
    monkeypatch.setattr(module, "ddim_sample", lambda model, schedule, x_T, *rest: x_T)
    more = ["--vae-epochs", "1"] if module is latent else []
    module.train(module.parse_args(options(tmp_path, "--epochs", "8", *more)))
    times, noise = (torch.cat(part) for part in zip(*seen))
    shares = torch.bincount(times, minlength=20) / len(times)  # 1,024 draws, 51 of each t
    assert len(shares) == 20 and shares.min() > 0.025 and shares.max() < 0.08
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert len(noise.flatten(1).unique(dim=0)) == len(noise) == 1024
    assert len(held_out) == 8  # the loss of an epoch on test images is always of the same draws
    for t, noise in held_out[1:]:
        assert torch.equal(t, held_out[0][0]) and torch.equal(noise, held_out[0][1])


# --------------------------------------------------------------------------------- the VAE


def test_the_layers_of_the_vae_are_those_of_the_report():
    vae, x, outputs = latent.VAE(), torch.rand(5, 1, 28, 28) * 2 - 1, []
    layers = [m for m in vae.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in layers:
        layer.register_forward_hook(lambda m, i, out: outputs.append(tuple(out.shape[1:])))
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (5, 64)
    image = vae.decode(mu)
    assert image.shape == x.shape and image.min() >= -1 and image.max() <= 1
    assert outputs == [(16, 14, 14), (32, 7, 7), (64, 1, 1), (32, 7, 7), (16, 14, 14), (1, 28, 28)]
    assert [layer.kernel_size[0] for layer in layers] == [3, 3, 7, 7, 3, 3]
    by_hand = [16 * 9 + 16, 32 * 16 * 9 + 32, 64 * 32 * 49 + 64,  # convolutions with biases
               3 * (64 * 64 + 64),  # µ, log v, and the way back
               64 * 32 * 49 + 32, 32 * 16 * 9 + 16, 16 * 9 + 1,  # transposed convolutions
               2 * (16 + 32 + 64 + 32 + 16)]  # five batch norms
    assert sum(p.numel() for p in vae.parameters()) == sum(by_hand)


def test_the_loss_of_the_vae_by_hand():
    """In nats per image: the cross-entropy of every pixel, and the weighted KL divergence."""
    torch.manual_seed(0)
    vae, x = latent.VAE().eval(), torch.rand(3, 1, 28, 28, generator=seeded(1)) * 2 - 1
    nn.init.zeros_(vae.fc_logvar.weight)
    nn.init.constant_(vae.fc_logvar.bias, math.log(9))  # v = 9, so the noise is 3 ε
    with torch.no_grad():
        mu, _ = vae.encode(x)
        z = mu + 3 * torch.randn(mu.shape, generator=seeded(0))
        white, target = (vae.decode(z).double() + 1) / 2, (x.double() + 1) / 2
        nats = -(target * white.log() + (1 - target) * (1 - white).log()).sum((1, 2, 3)).mean()
        kl = torch.distributions.kl_divergence(Normal(mu.double(), 3.0), Normal(0, 1))
        losses = []
        for w in (0, 0.3):
            torch.manual_seed(0)
            losses.append(latent.vae_loss(vae, x, w).item())
        plain, weighted = losses
    assert plain == pytest.approx(nats.item(), rel=1e-5)
    assert weighted == pytest.approx((nats + 0.3 * kl.sum(1).mean()).item(), rel=1e-5)


def test_latents_are_standardised_and_decoded_back():
    torch.manual_seed(0)
    vae, size = latent.VAE().eval(), torch.linspace(0.5, 4, 64)
    mu, logvar = torch.randn(4000, 64) * size + 5 * size, torch.zeros(4000, 64) - 2
    vae.mean.copy_(5 * size)
    vae.std.copy_((size**2 + math.exp(-2)).sqrt())  # Var z = Var µ + E v
    x0 = vae.to_latent(mu, logvar, seeded(1))
    assert x0.shape == (4000, 1, 8, 8)
    assert x0.mean(0).abs().max() < 0.07 and (x0.std(0) - 1).abs().max() < 0.05  # 4 σ
    z = mu + math.exp(-1) * torch.randn(mu.shape, generator=seeded(1))  # σ = exp(log v / 2)
    assert torch.allclose(vae.to_images(x0[:9]), vae.decode(z[:9]), atol=1e-5)


def test_a_latent_without_a_rotation_is_the_standardised_z():
    torch.manual_seed(0)
    vae, mu, logvar = latent.VAE(), torch.randn(5, 64), torch.randn(5, 64)
    vae.mean.normal_(), vae.std.uniform_(1, 2)
    z = vae.sample_z(mu, logvar, seeded(1))
    assert torch.equal(vae.to_latent(mu, logvar, seeded(1)).flatten(1), (z - vae.mean) / vae.std)


@torch.no_grad()
def test_latents_are_rotated_and_back():
    torch.manual_seed(0)
    vae, mu = latent.VAE().eval(), torch.randn(5, 64)
    plain = vae.decode(mu)
    vae.R.copy_(torch.linalg.qr(torch.randn(64, 64))[0])
    vae.mean.normal_(), vae.std.uniform_(1, 2)
    x0 = vae.to_latent(mu, torch.full_like(mu, -99))  # without noise
    torch.testing.assert_close(vae.to_images(x0), plain, atol=1e-5, rtol=0)


def test_the_rotation_finds_the_order_that_was_hidden():
    """A linear decoder of 64 blobs, whose numbers a random rotation has mixed."""
    torch.manual_seed(0)
    bump = Normal(torch.linspace(5, 22, 8)[:, None], 2.5).log_prob(torch.arange(28.0)).exp()
    blobs = nn.functional.normalize((bump[:, None, :, None] * bump[:, None, :]).view(64, 784))
    mixed, shift = torch.linalg.qr(torch.randn(64, 64))[0], torch.rand(784)
    R = latent.blob_rotation(lambda z: (z @ mixed @ blobs + shift).view(-1, 1, 28, 28), shift[:64])
    torch.testing.assert_close(R.T @ R, torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(R, mixed, atol=1e-2, rtol=0)  # T Tᵀ is close to singular
    assert torch.equal((mixed.T @ R).argmax(1), torch.arange(64))  # z mixedᵀ is read by R


def test_all_images_are_encoded_in_order():
    torch.manual_seed(0)
    vae, x = latent.VAE().eval(), torch.rand(1203, 1, 28, 28)
    mu, logvar = latent.encode_all(vae, x)
    assert mu.shape == logvar.shape == (1203, 64) and not mu.requires_grad
    for i in (0, 999, 1000, 1202):
        one = vae.encode(x[i : i + 1])
        assert torch.allclose(mu[i], one[0], atol=1e-5)
        assert torch.allclose(logvar[i], one[1], atol=1e-5)


def test_the_ddpm_of_02_is_that_of_01():
    schedule, model = ddpm.make_schedule(60), gaussian_v(ddpm.make_schedule(60), 1.7)
    x_T = torch.randn(4, 1, 8, 8, dtype=F64)
    one = ddpm.ddpm_sample(model, schedule, x_T, seeded(1))
    assert torch.allclose(one, latent.ddpm_sample(model, schedule, x_T, seeded(1)), atol=1e-9)


# ---------------------------------------------------------------------------- the guidance


def spy_on_labels(seen: list):
    """A network whose v is x + 10 t + the label; it keeps the labels of each call."""

    def model(x, t, labels):
        seen.append(labels)
        return x + (10 * t + labels).view(-1, 1, 1, 1)

    return model


@pytest.mark.parametrize(("scale", "shift"), [
    (0, [-1, -1, -1]),  # the null class alone, whose label is -1
    (1, [3, 0, 9]),
    (2.5, [9, 1.5, 24]),  # -1 + 2.5 (3 + 1), -1 + 2.5 (0 + 1), -1 + 2.5 (9 + 1)
])
def test_guidance_by_hand(scale, shift):
    seen, labels = [], torch.tensor([3, 0, 9])
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([5, 7, 7])
    v = cfg.guided(spy_on_labels(seen), labels, scale)(x, t)
    expected = x + (torch.tensor([50, 70, 70]) + torch.tensor(shift)).view(-1, 1, 1, 1)
    assert torch.allclose(v, expected, atol=1e-5)
    assert len(seen) == 1  # one call, on a doubled batch where both answers are needed
    assert len(seen[0]) == (3 if scale in (0, 1) else 6)


@pytest.mark.parametrize("label", [-1, 10, 11])
def test_labels_that_are_no_digits_are_refused(label):
    with pytest.raises(ValueError, match="labels are 0 to 9, not"):
        cfg.guided(None, torch.tensor([3, label]), 2.0)


def test_as_many_labels_as_classes_and_the_null_label_is_the_last_embedding():
    cfg.guided(None, torch.tensor([0, 25]), 2.0, classes=26)
    with pytest.raises(ValueError, match="labels are 0 to 2, not"):
        cfg.guided(None, torch.tensor([3]), 2.0, classes=3)
    torch.manual_seed(0)
    model = cfg.UNet(8, 1000, 4, classes=3)
    torch.nn.init.normal_(model.conv_out.weight)
    x, t = torch.randn(1, 1, 28, 28).expand(4, -1, -1, -1), torch.full((4,), 5)
    out = model(x, t, torch.tensor([0, 1, 2, cfg.NULL]))
    with torch.no_grad():
        model.label_channels.weight[3] += 1  # the fourth of four
    changed = (model(x, t, torch.tensor([0, 1, 2, cfg.NULL])) != out).flatten(1).any(1)
    assert changed.tolist() == [False, False, False, True]


def test_a_hidden_label_does_not_matter_and_others_do():
    schedule, x0 = cfg.make_schedule(100), torch.rand(64, 1, 4, 4) * 2 - 1
    labels, seen = torch.arange(64) % 10, []
    model = spy_on_labels(seen)

    def loss(labels):
        torch.manual_seed(0)
        hidden = cfg.hide_labels(labels, 0.3)
        t, noise = torch.randint(100, (64,)), torch.randn_like(x0)
        return cfg.diffusion_loss(model, schedule, x0, t, noise, hidden).item()

    before = loss(labels)
    hidden = seen[0] == -1
    assert 5 < hidden.sum() < 35  # some samples of the batch, not all or none
    assert torch.equal(seen[0][~hidden], labels[~hidden])
    for i in range(64):
        changed = labels.clone()
        changed[i] = (labels[i] + 1) % 10
        assert (loss(changed) == before) == hidden[i]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_hidden_at_the_stated_rate(rate):
    torch.manual_seed(0)
    seen = [cfg.hide_labels(torch.randint(10, (50,)), rate) for _ in range(200)]
    hidden = (torch.stack(seen) == -1).double()
    assert hidden.mean().item() == pytest.approx(rate, abs=0.015)  # 10,000 draws: 5 sigma at 0.1
    spread = hidden.sum(1).var().item()  # of a batch's number: binomial, as each is drawn alone
    assert spread == pytest.approx(50 * rate * (1 - rate), rel=0.4)


def perturbed(model: nn.Module) -> nn.Module:
    """No weight is zero any longer, and no branch is shut."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(0))
    return model


@pytest.mark.parametrize("path", ["label_channels", "label_tokens"])
def test_the_class_enters_by_each_path_alone(path):
    torch.manual_seed(0)
    model, x = perturbed(cfg.UNet(8, 1000, 4)), torch.randn(1, 1, 28, 28).expand(11, -1, -1, -1)
    with torch.no_grad():
        other = model.label_tokens if path == "label_channels" else model.label_channels
        other.weight.zero_()
        v = model(x, torch.full((11,), 500), torch.arange(11)).flatten(1)
        assert torch.pdist(v).min() > 1e-2  # ten classes and the null class: all different
        getattr(model, path).weight.zero_()
        v = model(x, torch.full((11,), 500), torch.arange(11)).flatten(1)
        assert torch.pdist(v).max() < 1e-4  # and by no other


def test_one_token_would_make_the_attention_blind():
    """The reason for several tokens a class: with one, no pixel asks anything of its own."""

    def spread_of_answers(tokens):
        torch.manual_seed(0)
        model = cfg.UNet(8, 1000, tokens)
        nn.init.normal_(model.cross_attention.out.weight)
        x = torch.randn(1, 32, 7, 7)
        context = model.label_tokens(torch.tensor([3])).unflatten(1, (-1, 32))
        assert context.shape == (1, tokens, 32)
        return (model.cross_attention(x, context) - x).flatten(2).var(2).max().item()

    assert spread_of_answers(1) < 1e-10 and spread_of_answers(4) > 1e-3


def test_the_ddpm_of_03_is_that_of_01_and_takes_fewer_steps():
    schedule, model = ddpm.make_schedule(60), gaussian_v(ddpm.make_schedule(60), 0.5)
    x_T = torch.randn(4, 1, 8, 8, dtype=F64)
    one = ddpm.ddpm_sample(model, schedule, x_T, seeded(1))
    assert torch.allclose(one, cfg.ddpm_sample(model, schedule, x_T, seeded(1)), atol=1e-9)
    one = ddpm.ddim_sample(model, schedule, x_T, 7, eta=1.0, rng=seeded(1))
    two = cfg.ddpm_sample(model, schedule, x_T, seeded(1), steps=7)
    assert torch.allclose(one, two, atol=1e-9)


# ------------------------------------------------------------------------------- the flows


def decay(k):
    """dx/dt = -k x, which ends in x(1) = x(0) exp(-k)."""
    return lambda x, t: -k * x


def two_points(x, t):
    """The exact flow from N(0, I) to ±(1, ..., 1): v = (E[x_1 | x_t] - x_t) / (1 - t)."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    mean = torch.tanh(t * x.flatten(1).sum(1).view_as(t) / (1 - t) ** 2)
    return (mean - x) / (1 - t)


def test_constant_velocity_is_straight_and_one_step_exact():
    x0 = torch.randn(4, 1, 3, 3, dtype=F64)
    v = torch.randn(4, 1, 3, 3, dtype=F64)
    for steps in (1, 2, 7):
        assert torch.allclose(flow.euler_sample(lambda x, t: v, x0, steps), x0 + v)
        assert flow.straightness(lambda x, t: v, x0, steps) == pytest.approx(0, abs=1e-20)
        assert torch.allclose(flow.adams_sample(lambda x, t: v, x0, steps), x0 + v)


@pytest.mark.parametrize(("solve", "order"), [(flow.euler_sample, 1), (flow.adams_sample, 2)])
def test_the_error_falls_with_the_step_as_the_method_must(solve, order):
    x, k, errors = torch.ones(1, 1, dtype=F64), 1.5, []
    exact = math.exp(-k)
    for n in (50, 100, 200):
        errors.append(abs(solve(decay(k), x, n).item() - exact))
    assert errors[-1] / exact < (0.006 if order == 1 else 1e-4)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)


def test_euler_calls_the_network_at_the_start_of_each_step():
    times, seen = [], []
    model = lambda x, t: times.append(t[0].item()) or torch.ones_like(x)
    flow.euler_sample(model, torch.zeros(1, 1), 4, trace=lambda *step: seen.append(step))
    assert times == [0, 0.25, 0.5, 0.75]
    assert [t for t, _, _ in seen] == times
    assert [x.item() for _, x, _ in seen] == times  # with v = 1, x is t
    assert all(v.item() == 1 for _, _, v in seen)


def test_ab2_is_exact_where_the_velocity_changes_evenly():
    """By hand, v = 2t from t = 0, 0.2, 0.5 to 1: nothing, 0.5² - 0.2², and by Euler 0.5 x 1."""
    seen = []
    model = lambda x, t: seen.append(t[0].item()) or 2 * t.view(-1, 1) + 0 * x
    end = flow.adams_sample(model, torch.zeros(1, 1), 3)
    assert seen == pytest.approx([0, 0.2, 0.5]) and end.item() == pytest.approx(0.21 + 0.5)
    seen.clear()
    end = flow.adams_sample(model, torch.zeros(1, 1), 4, shift=1)  # even steps
    assert seen == [0, 0.25, 0.5, 0.75] and end.item() == pytest.approx(0.75**2 - 0.25**2 + 0.375)


def test_the_velocity_of_04_leads_to_the_image_that_the_network_draws():
    """Whatever x_t is: with the same image at all times, all samplers end in it."""
    torch.manual_seed(0)
    model = flow.UNet(8).eval()  # conv_out is 0 but for its bias: one grey everywhere
    x0 = torch.randn(5, 1, 28, 28)
    image = model.conv_out.bias.expand_as(x0)
    for steps in (1, 3, 100):
        torch.testing.assert_close(flow.euler_sample(model, x0, steps), image, atol=1e-5, rtol=0)
        torch.testing.assert_close(flow.adams_sample(model, x0, steps), image, atol=1e-5, rtol=0)
    t = torch.tensor([0.0, 0.5, 0.9, 0.96, 0.99])
    v, factor = model(x0, t), torch.tensor([1, 2, 10, 25, 100]).view(-1, 1, 1, 1)
    torch.testing.assert_close(v, (image - x0) * factor)
    late = torch.tensor([0.991, 0.999, 1 - 1e-6, 1 - 1e-7, 1.0])  # no later time is faster
    torch.testing.assert_close(model(x0, late), (image - x0) * 100)
    assert torch.equal(model.train()(x0, t), v)


def test_the_loss_of_04_is_the_error_of_the_image_over_the_time_left():
    """v errs by (x̂_1 - x_1) / (1-t); from t = 0.95 on the loss counts 0.05 for 1-t. Above 0.99
    the network's own 1-t is 0.01, so there v is slower than a line to the right image."""
    torch.manual_seed(0)
    model = flow.UNet(8)
    x0, x1 = torch.randn(2, 5, 1, 28, 28)
    error = (model.conv_out.bias - x1).square().mean()
    for t, left in ((0.0, 1), (0.5, 0.5), (0.9, 0.1), (0.95, 0.05), (0.97, 0.05), (0.99, 0.05)):
        loss = flow.flow_loss(model, x0, x1, torch.full((5,), t))
        torch.testing.assert_close(loss, error / left**2, rtol=1e-3, atol=0)
    model.conv_out.bias.data.fill_(0.5)
    half = torch.full_like(x1, 0.5)  # the network is right ...
    assert flow.flow_loss(model, x0, half, torch.full((5,), 0.99)).item() < 1e-6
    for t in (0.995, 0.999, 1.0):  # ... and is said to be too slow, but this counts for little
        slow = (1 - (1 - t) / 0.01) * (1 - t) / 0.05
        by_hand = slow**2 * (half - x0).square().mean().item()
        loss = flow.flow_loss(model, x0, half, torch.full((5,), t)).item()
        assert loss == pytest.approx(by_hand, rel=0.01, abs=1e-9) and loss < 0.01


@pytest.fixture(scope="module")
def shipped_flow():
    return common.load("04_rectified_flow", "flow")


@pytest.mark.parametrize("t", [0.9, 0.95, 0.97, 0.99, 0.995, 0.999])
def test_the_shipped_flow_learns_what_it_draws_with(t, shipped_flow):
    """Its function is the same in training: no time has another clamp there."""
    x1, _ = common.synthetic_digits(4, seed=0)
    x0, losses = torch.randn(x1.shape, generator=seeded(0)), []
    for training in (True, False):
        with torch.no_grad():
            losses.append(flow.flow_loss(shipped_flow.train(training), x0, x1, torch.full((4,), t)))
    assert torch.equal(*losses) and losses[0].isfinite()


def runge_kutta(model, x, steps: int):
    """The classical method, of order 4. Unlike Euler's, it also asks for v at t = 1."""
    for t, t_next in pairwise(flow.even_times(steps)):
        h, v = t_next - t, lambda x, t: model(x, torch.full((len(x),), t))
        k1 = v(x, t)
        k2 = v(x + h / 2 * k1, t + h / 2)
        k3 = v(x + h / 2 * k2, t + h / 2)
        k4 = v(x + h * k3, t_next)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_a_method_of_higher_order_draws_the_same_digits(shipped_flow):
    """Also with v at t = 1, which is finite. Of 48 noises the median difference is 0.011, but that
    of two is 0.3. Of eight, 400 steps of Euler are nearer to Runge-Kutta's than to Euler's 100."""
    x = torch.ones(1, 1, dtype=F64)
    assert runge_kutta(decay(1.5), x, 10).item() == pytest.approx(math.exp(-1.5), rel=1e-5)
    x0 = torch.randn(2, 1, 28, 28, generator=seeded(0))
    with torch.no_grad():
        x1 = runge_kutta(shipped_flow.eval(), x0, 25)
    assert x1.isfinite().all()
    assert (x1 - flow.euler_sample(shipped_flow, x0, 100)).square().mean().sqrt() < 0.02


def test_straightness_by_hand():
    """v = a t is straight in space but not in time: S = a² times the variance of k/N."""
    x0, a, n = torch.zeros(2, 1, 2, 2, dtype=F64), 3.0, 10
    model = lambda x, t: a * t.view(-1, 1, 1, 1).double().expand_as(x)
    assert flow.straightness(model, x0, n) == pytest.approx(a**2 * (n**2 - 1) / (12 * n**2))


def test_the_loss_of_a_flow_has_noise_at_0_and_data_at_1():
    x0, x1, seen = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), []
    spy = lambda x, t: seen.append(x) or torch.zeros_like(x)
    loss = flow.flow_loss(spy, x0, x1, torch.tensor([0.0, 0.95, 0.25]))
    assert torch.equal(seen[0][0], x0[0])
    assert torch.allclose(seen[0][1], 0.05 * x0[1] + 0.95 * x1[1])
    assert torch.allclose(seen[0][2], 0.75 * x0[2] + 0.25 * x1[2])
    assert loss.item() == pytest.approx((x1 - x0).square().mean().item())
    t = 0.9 * torch.rand(3)
    assert flow.flow_loss(lambda x, t: x1 - x0, x0, x1, t).item() == pytest.approx(0, abs=1e-12)
    loss = flow.flow_loss(spy, x0, x1, t, error=F.l1_loss)
    assert loss.item() == pytest.approx((x1 - x0).abs().mean().item())
    for late in (0.96, 1.0):  # there both the network's velocity and its aim shrink
        loss = flow.flow_loss(spy, x0, x1, torch.full((3,), late))
        shorter = (x1 - x0) * (1 - late) / 0.05
        assert loss.item() == pytest.approx(shorter.square().mean().item(), rel=1e-4)


def loss_of_points(model, x0, x1, t):
    """flow_loss takes images, so each point (B, D) becomes one of D channels and one pixel."""
    return flow.flow_loss(lambda x, t: model(x.flatten(1), t)[..., None, None],
                          x0[..., None, None], x1[..., None, None], t)


def test_the_loss_is_least_for_the_exact_flow():
    rng = seeded(0)
    x0 = torch.randn(4000, 2, generator=rng)
    x1 = (torch.randint(2, (4000, 1), generator=rng) * 2.0 - 1).expand(-1, 2)
    t = 0.9 * torch.rand(4000, generator=rng)
    best = loss_of_points(two_points, x0, x1, t)
    for wrong in (lambda x, t: -two_points(x, t), lambda x, t: two_points(x, 0.9 - t),
                  lambda x, t: 1.1 * two_points(x, t)):
        assert loss_of_points(wrong, x0, x1, t) > 1.005 * best


def train_small_flow(draw_batch, steps: int):
    """A small network of 2D points and t, trained by flow_loss on draw_batch() -> x0, x1, t."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    model = lambda x, t: net(torch.cat([x, t.view(-1, 1)], dim=1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        loss = loss_of_points(model, *draw_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_trained_flow_lands_on_the_data():
    """A few hundred steps on two points: from noise at t = 0 one must arrive there at t = 1."""
    points = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    model = train_small_flow(lambda: (torch.randn(256, 2), points[torch.randint(2, (256,))],
                                      torch.rand(256)), steps=400)
    ends = flow.euler_sample(model, torch.randn(500, 2), 100)
    nearest = torch.cdist(ends, points).min(1)
    assert nearest.values.median() < 0.15
    assert 150 < nearest.indices.sum() < 350  # both, about equally often


def test_a_reflow_straightens_the_flow():
    """Trained on the pairs of a flow that bends, one step goes where the flow needed a hundred."""
    noise = torch.randn(4000, 2, generator=seeded(0))
    ends = flow.euler_sample(two_points, noise, 100)

    def draw_batch():
        index, u = torch.randint(4000, (256,)), torch.rand(256)
        return noise[index], ends[index], flow.T_DENSITIES["half-at-0"](u)

    model = train_small_flow(draw_batch, steps=500)
    before, after = (flow.straightness(v, noise[:500], 50) for v in (two_points, model))
    assert after < 0.2 * before
    errors = [(flow.euler_sample(v, noise, 1) - ends).square().mean() for v in (two_points, model)]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize(("name", "integral"), [
    ("uniform", lambda t: t),
    ("logit-normal", lambda t: torch.special.ndtr(torch.logit(t))),
    ("u-shaped", lambda t: 0.5 + torch.sinh(4 * (2 * t - 1)) / (2 * math.sinh(4))),
    ("half-at-0", lambda t: 0.75 + torch.sinh(4 * (2 * t - 1)) / (4 * math.sinh(4))),
])
def test_t_follows_its_density(name, integral):
    """A density's t(u) is the inverse of its integral; that of cosh is a sinh."""
    u = torch.linspace(0.001, 0.999, 999, dtype=F64)
    t = flow.T_DENSITIES[name](u)
    smooth = u > 0.5 if name == "half-at-0" else u > 0
    assert not t[~smooth].any()
    assert torch.allclose(integral(t[smooth]), u[smooth], atol=1e-9)
    ends = flow.T_DENSITIES[name](torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0, 1], abs=1e-6)
    assert not flow.T_DENSITIES["all-at-0"](u).any()


@pytest.mark.parametrize(("module", "shape"), [(flow, (1, 28, 28)), (latent_flow, (1, 8, 8))])
def test_pairs_reproduce_and_are_joined_by_the_flow(module, shape):
    make = lambda seed: module.make_pairs(decay(0.7), 150, 20, seeded(seed))
    x0, x1 = make(3)
    assert x0.shape == x1.shape == (150, *shape)
    assert all(torch.equal(a, b) for a, b in zip((x0, x1), make(3)))
    assert not torch.equal(x0, make(4)[0])
    assert x0.std().item() == pytest.approx(1, abs=0.03)  # the noise is x0, and not x1
    assert torch.allclose(x1, x0 * math.exp(-0.7), atol=1e-2)


class Decay(nn.Module):
    """The flow dx/dt = -k x, as a network of one weight."""

    def __init__(self, k: float):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k), requires_grad=False)

    def forward(self, x, t):
        return -self.k * x


def nearest(one, two) -> float:
    """The least distance between images of two batches; of independent noises it is near 40."""
    return torch.cdist(one.float().flatten(1), two.float().flatten(1)).min().item()


def kept_pairs(module, args, k: float, made: list):
    """All pairs of Decay(k), to learn from and for tests; `made` notes how many are made anew."""
    net = Decay(k)
    return common.kept_pairs(args, net, lambda n, rng: (
        made.append(n) or module.make_pairs(net, n, args.pair_steps, rng)))


def test_pairs_are_kept_by_the_thousand(fast_dev, tmp_path):
    """A kill among them loses one chunk, and other steps make other pairs from the same noise."""
    args = fast_dev(flow, "--pairs", "2100", "--pair-steps", "1")
    folder, made = tmp_path / "pairs", []
    whole, test = kept_pairs(flow, args, 0.5, made)
    assert whole.shape == (2, 2100, 1, 28, 28) and test.shape == (2, 2000, 1, 28, 28)
    assert made == [1000] * 5 and whole.dtype == test.dtype == torch.half
    noise, ends = torch.cat([whole, test], dim=1)
    assert len(noise.flatten(1).unique(dim=0)) == 4100  # no noise twice, nor in both
    torch.testing.assert_close(ends, noise / 2, rtol=0, atol=2e-3)  # one Euler step, 1 - ½
    made.clear()
    sorted(folder.iterdir())[1].unlink()
    for one, again in zip((whole, test), kept_pairs(flow, args, 0.5, made), strict=True):
        assert torch.equal(one, again)
    assert made == [1000]
    args.pairs, args.pair_steps = 1050, 2  # nothing of that is there
    other, test = kept_pairs(flow, args, 0.5, made)
    assert made[1:] == [1000] * 3 and other.shape == test.shape == (2, 1050, 1, 28, 28)
    assert torch.equal(torch.cat([other, test], dim=1)[0], noise[:2100])
    assert not torch.equal(other[1], ends[:1050])
    assert len([*folder.iterdir()]) == 8


@pytest.mark.parametrize("module", [flow, latent_flow])
def test_another_flow_has_pairs_and_noise_of_its_own(module, fast_dev, tmp_path):
    args, made = fast_dev(module, "--pairs", "200"), []
    one = torch.cat(kept_pairs(module, args, 0.5, made), dim=1)
    folder = tmp_path / "pairs"
    old = {*folder.iterdir()}
    for name in ("notes.txt", "mine.pt", "pairs_of_shoes.pt", "0_to_1000_by_10_AB2_0.pt"):
        (folder / name).write_text("not ours")
    two = torch.cat(kept_pairs(module, args, 0.7, made), dim=1)
    assert len(old) == 2 and not old & {*folder.iterdir()} and len([*folder.iterdir()]) == 6
    far = 30 if module is flow else 5  # of 64 numbers, not of 784
    assert nearest(one[0], two[0]) > far
    for seed in (0, 1, 5):  # nor is any of the noise of the figures, or of the progress
        args.seed = seed
        assert nearest(common.noise(args, 16, *one.shape[2:]), two[0]) > far
    assert torch.equal(two, torch.cat(kept_pairs(module, args, 0.7, made), dim=1))
    assert made == [200] * 4  # the last were those that were kept
