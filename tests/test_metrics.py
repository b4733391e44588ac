"""What 05 measures: distances and shares by hand, verdicts, tables, and the sets it reads."""

import argparse

import pytest
import torch
from scripts import ROOT, compare, one_line, options, usage_error
from torchvision.transforms.functional import gaussian_blur, to_pil_image

import common

F64 = torch.float64
needs_mnist = pytest.mark.skipif(
    not (ROOT / "data/MNIST/raw").exists(), reason="MNIST is not in data/")

# --------------------------------------------------------------------------------- metrics


def gaussian(mean: list, root: list, n: int = 50) -> torch.Tensor:
    """n points whose sample mean is `mean`, and covariance root @ rootᵀ, both exactly."""
    z = torch.randn(n, len(mean), dtype=F64, generator=torch.Generator().manual_seed(n))
    z = torch.linalg.qr(z - z.mean(0)).Q * (n - 1) ** 0.5
    return z @ torch.tensor(root, dtype=F64).T + torch.tensor(mean)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    one = gaussian([1.0, 2.0], [[3, 0], [0, 0.5]])
    two = gaussian([0.0, 4.0], [[1, 0], [0, 2]], n=70)
    by_hand = 1 + 4 + (3 - 1) ** 2 + (0.5 - 2) ** 2  # |Δµ|² + Σ (σ - σ')²
    assert compare.frechet_distance(one, two) == pytest.approx(by_hand)
    root = torch.tensor([[2.0, 0.0], [1.5, 0.3]]).double()  # now Σ and Σ' do not commute
    product = torch.diag(torch.tensor([9, 0.25]).double()) @ root @ root.T
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()  # tr M^½ of a 2x2 matrix
    by_hand = 1 + 4 + 9 + 0.25 + (root @ root.T).trace() - 2 * cross
    two = gaussian([0.0, 4.0], root.tolist(), n=70)
    assert compare.frechet_distance(one, two) == pytest.approx(by_hand.item())
    assert compare.frechet_distance(two, one) == pytest.approx(by_hand.item())
    assert compare.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    few = torch.randn(5, 64).double()  # fewer points than dimensions
    assert compare.frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert compare.frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25)


def test_the_standard_error_by_hand():
    """Of a mean it is s/√n; of the distance in one dimension, (m - µ)² + (s - σ)², the delta
    method's: √(4 (m - µ)² s² / n + 4 (s - σ)² s² / 2n), for Gaussian points."""
    points = torch.randn(50, dtype=F64)
    means = (points.sum() - points) / 49  # each without one point
    assert compare.standard_error(means) == pytest.approx(points.std().item() / 50**0.5)
    found, rng = [], torch.Generator().manual_seed(0)
    real = gaussian([0.0], [[1.0]], n=1000)
    for _ in range(20):
        fake = 1 + 2 * torch.randn(4000, 1, dtype=F64, generator=rng)
        part = torch.arange(4000) % 20
        found.append(compare.standard_error(torch.tensor(
            [compare.frechet_distance(real, fake[part != k]) for k in range(20)])))
    by_hand = (4 * 1 * 4 / 4000 + 4 * 1 * 4 / 8000) ** 0.5
    assert sum(found) / 20 == pytest.approx(by_hand, rel=0.15)


def test_precision_and_recall_by_hand():
    line = lambda *points: torch.tensor(points, dtype=F64)[:, None]
    share = lambda points, cloud, k: compare.near(points, cloud, k).any(1).double().mean().item()
    both = lambda real, fake, k=3: (share(fake, real, k), share(real, fake, k))
    real = line(0, 1, 2, 10)  # distance to the nearest other: 1, 1, 1, 8
    fake = line(0.5, 20, 9)  # in reach of 0; of none; of 10
    assert both(real, fake, k=1) == pytest.approx((2 / 3, 1))
    fake = line(0.5, 0.7, 0.8)  # all in reach of 0 or 1; theirs, 0.2, 0.1, 0.1, reaches nothing
    assert both(real, fake, k=1) == pytest.approx((1, 0))
    assert both(real, fake, k=2) == pytest.approx((1, 0.25))  # 0.7 + 0.3 = 1
    five = line(0, 1, 2, 3, 10)  # to the third-nearest, which is the rule: 3, 2, 2, 3, 9
    fake = line(-3.1, -2.9, 5.9, 18.9, 19.1, 40)
    assert both(five, fake) == pytest.approx((0.5, 1))


def test_density_and_coverage_by_hand():
    """Eight digits in a row and one far from all; the fifth neighbour decides."""
    line = lambda *points: torch.tensor(points, dtype=F64)[:, None]
    real = line(0, 1, 2, 3, 4, 5, 6, 7, 100)  # to the fifth: 5, 4, 3, 3, 3, 3, 4, 5, 97
    fake = line(3.5, 50, 60, 90, -4.5, 3.5, 3.5, 3.5, 3.5)
    near = compare.near(fake, real, 5)
    # 3.5 lies within reach of 0 to 7 and of 100 (96.5); 50, 60, 90 of 100 alone; -4.5 of 0 alone
    assert near.sum(1).tolist() == [9, 1, 1, 1, 1, 9, 9, 9, 9]
    row = compare.score(Pixels(), torch.cat([real, 0 * real], 1), {
        "images": flat_images([0] * 9)})  # all at (-1, -1): √2 from 0, √5 from 1, √10 from 2
    assert row["density"] == pytest.approx(2 / 5) and row["coverage"] == pytest.approx(2 / 9)
    one = compare.near(line(0.0), line(0.0), 5)  # of a set of one, it is the neighbour itself
    assert one.tolist() == [[True]]


def test_one_digit_far_from_all_moves_precision_and_not_density():
    """As one test digit does here: Naeem et al. 2020, section 3.1."""
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(200, 2, dtype=F64, generator=rng) for _ in range(2))
    fake = fake + 30
    far = torch.cat([real[1:], torch.tensor([[60.0, 60.0]], dtype=F64)])
    near = [compare.near(fake, cloud, 3) for cloud in (real, far)]
    precision = [hits.any(1).double().mean().item() for hits in near]
    density = [compare.near(fake, cloud, 5).sum().item() / 5 / 200 for cloud in (real, far)]
    assert precision == [0, 1] and density == [0, pytest.approx(0.2)]


class Pixels(torch.nn.Module):
    """A judge whose features are pixels, and who reads 0 in black images and 1 in white ones."""

    def __init__(self):
        super().__init__()
        self.classify = torch.nn.Linear(2, 2, bias=False)
        self.classify.weight.data = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])

    def features(self, x):
        return x[:, 0, 0, :2]


def flat_images(shades: list[int]) -> torch.Tensor:
    return torch.tensor(shades, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 28, 28)


def test_features_are_float64_in_order_with_what_is_read():
    shades = [i % 256 for i in range(1203)]
    phi, read = compare.features(Pixels(), flat_images(shades))
    assert phi.dtype == F64 and phi.shape == (1203, 2)
    assert torch.allclose(phi[:, 1], torch.tensor(shades).double() / 127.5 - 1, atol=1e-6)
    assert read.tolist() == [int(shade > 127) for shade in shades]


@pytest.mark.parametrize(("n_real", "n_fake"), [(2000, 6), (2000, 1100), (6, 6), (5, 8)])
def test_a_score_is_of_equally_many_real_and_drawn_images(n_real, n_fake, monkeypatch):
    """Precision and recall; the distance is one to all the real images."""
    compared, distance = [], []
    monkeypatch.setattr(compare, "near", lambda *sets: (
        compared.append(sets) or torch.ones(len(sets[0]), len(sets[1])) > 0))
    monkeypatch.setattr(compare, "frechet_distance", lambda *sets: distance.append(sets) or 7.0)
    real = torch.arange(2.0 * n_real, dtype=F64).view(-1, 2)
    images = flat_images([i % 200 for i in range(n_fake)])
    row = compare.score(Pixels(), real, {"images": images, "method": "m"})
    assert (row["N"], row["method"], row["distance"]) == (n_fake, "m", 7)
    n = min(n_real, n_fake)
    assert (row["precision"], row["recall"], row["coverage"], row["density"]) == (1, 1, 1, n / 5)
    assert "images" not in row and "accuracy" not in row  # for there are no labels
    (some_fake, some_real, k), (again_real, again_fake, again_k), third = compared
    assert torch.equal(some_real, again_real) and torch.equal(some_fake, again_fake)
    assert third[0] is some_fake and third[1] is some_real and (k, again_k, third[2]) == (3, 3, 5)
    assert len(some_real) == len(some_fake) == n
    assert len(some_real.unique(dim=0)) == len(some_real)  # none twice
    assert torch.isin(some_real, real).all()
    assert torch.equal(distance[0][0], real) and len(distance[0][1]) == n_fake


def test_classes_that_take_turns_are_no_luck():
    """Without any part of such a set, its classes are as even as with it."""
    real = torch.rand(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    even = compare.score(Pixels(), real, {"images": flat_images([0, 255] * 100)})
    assert compare.standard_error(even["without"]) < 1e-6
    sorted_ = compare.score(Pixels(), real, {"images": flat_images([0] * 100 + [255] * 100)})
    assert compare.standard_error(sorted_["without"]) > 1e-3


def test_accuracy_is_the_share_that_is_read_as_it_was_asked_for():
    samples = {"images": flat_images([0, 1, 2, 253, 254, 255]),
               "labels": torch.tensor([0, 0, 1, 1, 1, 0])}
    row = compare.score(Pixels(), torch.randn(9, 2, dtype=F64), samples)
    assert row["accuracy"] == pytest.approx(4 / 6) and row["misread"] == pytest.approx(2 / 6)


def test_the_floor_is_the_mean_of_ten_draws():
    real = torch.randn(300, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    phi = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    images = flat_images([i % 256 for i in range(200)])
    training = {"images": images, "labels": torch.arange(200) % 2}
    row = compare.floor_of(Pixels(), real, phi, training, 50)
    rng = torch.Generator().manual_seed(0)
    by_hand = torch.tensor([compare.frechet_distance(
        real, phi[torch.randperm(200, generator=rng)[:50]]) for _ in range(10)])
    assert row["N"] == 50 and "accuracy" in row
    assert row["distance"] == pytest.approx(by_hand.mean().item())
    # two draws share a quarter of their images, so they differ by too little
    assert row["error"] == pytest.approx(by_hand.std().item() / 0.75**0.5) and row["error"] > 0
    assert compare.floor_of(Pixels(), real, phi, training, 300)["error"] is None


def test_a_floor_can_have_as_many_of_each_class(monkeypatch):
    real = torch.randn(300, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 150 + [1] * 30 + [2] * 20)
    phi = labels[:, None].double() + torch.zeros(200, 2, dtype=F64)  # tells the class

    def drawn(n, even):
        counts = []
        monkeypatch.setattr(compare, "frechet_distance", lambda real, fake: counts.append(
            fake[:, 0].long().bincount(minlength=3).tolist()) or 1.0)
        training = {"images": flat_images([i % 256 for i in range(200)]), "labels": labels}
        row = compare.floor_of(Pixels(), real, phi, training, n, even)
        assert row["N"] == sum(counts[0])
        return row["method"], counts[:10]

    method, counts = drawn(30, even=True)
    assert method == "training images, classes alike" and counts == [[10, 10, 10]] * 10
    assert drawn(90, even=True)[1] == [[20, 20, 20]] * 10  # there are no more of class 2
    method, counts = drawn(60, even=False)
    assert method == "training images" and min(count[0] for count in counts) > 30


@pytest.fixture(scope="module")
def digits(judge):
    """The features of 1,000 synthetic digits, and 400 others with labels."""
    real, _ = compare.features(judge, common.to_uint8(common.synthetic_digits(1000, seed=1)[0]))
    return real, *common.synthetic_digits(400, seed=2)


def test_worse_digits_score_worse(judge, digits):
    real, images, labels = digits

    def scores(images, labels):
        return compare.score(judge, real, {"images": common.to_uint8(images), "labels": labels})

    good = scores(images, labels)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noised = [scores(images + s * noise, labels) for s in (0.2, 0.4, 0.8)]
    blurred = [scores(gaussian_blur(images, 9, s), labels) for s in (0.7, 1.2, 2.0)]
    dropped = [scores(images[labels > d], labels[labels > d]) for d in (0, 2, 5)]
    for series in (noised, blurred, dropped):
        distances = [good["distance"]] + [row["distance"] for row in series]
        assert distances == sorted(distances) and distances[1] > 1.5 * distances[0]
    assert noised[-1]["precision"] < 0.5 * good["precision"]
    assert dropped[-1]["recall"] < 0.6 * good["recall"]
    assert dropped[-1]["precision"] > 0.9 * good["precision"]  # what is left are still digits
    assert good["accuracy"] > 0.95 > noised[-1]["accuracy"]
    wrong = scores(images, (labels + 1) % 10)
    assert wrong["accuracy"] < 0.05 and wrong["distance"] == good["distance"]


@needs_mnist
def test_the_shipped_classifier_reads_mnist(judge, tmp_path):
    args = compare.parse_args(["--device", "cpu", "--data-dir", str(ROOT / "data"),
                               "--out-dir", str(tmp_path)])
    _, (images, labels), _ = common.load_images(args)
    assert len(images) == 10_000
    images, labels = images[::4], labels[::4]
    _, read = compare.features(judge, common.to_uint8(images))
    assert (read == labels).double().mean() > 0.994


def test_a_classifier_trained_on_synthetic_digits_reads_others(fast_dev):
    """It sees shifted images, each with its own label."""
    args = fast_dev(compare, "--train-images", "1024", "--epochs", "2")
    judge = compare.train(args)["judge"]
    images, labels = common.synthetic_digits(500, seed=2)
    _, read = compare.features(judge, common.to_uint8(images))
    assert (read == labels).double().mean() > 0.9


# --------------------------------------------------------------------------------- verdicts

CLAIMS = {claim[0].split(".")[0]: claim for claim in compare.CLAIMS}
SURE = torch.zeros(20)  # no luck in the distance
ROW = {"method": "diffusion", "sampler": "DDIM", "steps": 100, "above": 1.2, "seconds": 1.0,
       "N": 1000, "images_per_second": 20.0, "without": SURE, "note": ""}
SPREAD = torch.tensor([-0.01, 0.01] * 10)  # a standard error of 0.01 √19 = 0.0436
DDPM = ROW | {"sampler": "DDPM", "steps": 1000}
LATENT = ROW | {"method": "latent diffusion"}
GUIDED = [ROW | {"method": "guided diffusion", "guidance": 1, "misread": 0.02},
          ROW | {"method": "guided diffusion", "guidance": 3}]


@pytest.mark.parametrize(("claim", "other", "verdict"), [
    ("1a", [DDPM | {"seconds": 5.1}], "faster"),
    ("1a", [DDPM | {"seconds": 4.9}], "not 5 times as fast"),
    ("1b", [DDPM | {"above": 1.21}], "better"),
    ("1b", [DDPM | {"above": 0.97}], "as good"),
    ("1b", [DDPM | {"above": 0.95}], "worse"),
    # the margin is 1.25 · 0.89 - 1.2 = -0.0875, its standard error √19 |1.25 · 0.01 - 0| = 0.0545
    ("1b", [DDPM | {"above": 0.89, "without": SPREAD}], "open"),
    ("1b", [DDPM | {"above": 0.87, "without": SPREAD}], "worse"),  # -0.1125 < -0.109
    ("1b", [DDPM | {"above": 1.05, "without": SPREAD}], "as good"),  # 0.1125
    ("1b", [DDPM | {"above": 1.04, "without": SPREAD}], "open"),
    # better: 1.28 - 1.2 is less than two of its errors, 0.0872, and 1.29 - 1.2 is more
    ("1b", [DDPM | {"above": 1.28, "without": SPREAD}], "as good"),
    ("1b", [DDPM | {"above": 1.29, "without": SPREAD}], "better"),
    ("2", [LATENT | {"images_per_second": 19.0, "above": 1.45, "without": SPREAD}],
     "slower; open"),
    ("2", [LATENT | {"images_per_second": 21.0, "above": 1.45, "without": SPREAD}], "faster; open"),
    ("1b", [DDPM | {"steps": 500}], "not measured"),
    ("1b", [DDPM | {"above": -0.01}], "worse"),
    ("2", [LATENT | {"images_per_second": 21.0}], "faster; as good"),
    ("2", [LATENT | {"images_per_second": 19.0}], "slower; as good"),
    ("2", [LATENT | {"above": 1.6}], "faster; worse"),
    # shares of 1,000: 20 and 5 differ by 15, two errors are 2 √(21·0.979 + 6·0.994) = 10.3
    ("3", [GUIDED[0], GUIDED[1] | {"misread": 0.005}], "better"),
    ("3", [GUIDED[0], GUIDED[1] | {"misread": 0.0}], "better"),
    ("3", [GUIDED[0], GUIDED[1] | {"misread": 0.011}], "as good"),  # 25 - 11 > 13.3, 20 - 11 < 11.4
    ("3", [GUIDED[0], GUIDED[1] | {"misread": 0.02}], "open"),
    ("3", [GUIDED[0], GUIDED[1] | {"misread": 0.06}], "worse"),
    ("3", [GUIDED[1] | {"misread": 0.011}], "not measured"),
])
def test_claims_follow_their_rules(claim, other, verdict):
    """Each about ROW, or two rows of their own; the figures are those of the two rows."""
    name, sets, found, figures = compare.judge_claim([ROW, *other], 1000, *CLAIMS[claim])
    assert name.startswith(f"{claim}.") and " against " in sets
    assert found == verdict
    if "not measured" in verdict:
        assert figures.startswith("no ")
    elif claim == "1a":
        assert "1 against" in figures and f"{other[0]['seconds']}" in figures


def test_what_a_claim_lacks_is_named():
    def lacking(claim, *rows):
        found = compare.judge_claim(list(rows), 1000, *CLAIMS[claim])
        assert found[2] == "not measured"
        return found[3]

    assert lacking("1a") == "no seconds for 16 of diffusion DDIM 100"
    assert lacking("1a", ROW) == "no seconds for 16 of diffusion DDPM 1000"
    untimed = {key: value for key, value in ROW.items() if key != "seconds"}
    for row in (untimed, ROW | {"seconds": None}):
        assert lacking("1a", row, DDPM) == "no seconds for 16 of diffusion DDIM 100"
    assert lacking("1b", ROW, DDPM | {"N": 500}) == "no above the floor of diffusion DDPM 1000"
    assert lacking("1a", ROW, DDPM | {"note": "on a GPU"}) == "seconds for 16: of two machines"


def test_times_compare_across_sizes_of_sets_and_distances_across_machines():
    few = DDPM | {"N": 500, "seconds": 9.0, "above": 0.1}
    assert compare.judge_claim([ROW, few], 1000, *CLAIMS["1a"])[2] == "faster"
    both = [ROW, few, DDPM | {"seconds": 4.0}]  # that of 1,000 counts
    assert compare.judge_claim(both, 1000, *CLAIMS["1a"])[2] == "not 5 times as fast"
    gpu = LATENT | {"note": "on a GPU"}
    found = compare.judge_claim([ROW, gpu], 1000, *CLAIMS["2"])
    assert found[2] == "not measured; as good" and found[3].startswith("images/s: of two machines")


def test_all_six_claims_are_judged():
    assert sorted({key[0] for key in CLAIMS}) == ["1", "2", "3", "4", "5", "6"]
    assert len(CLAIMS) == len(compare.CLAIMS)  # each has a number of its own


def test_sets_of_the_same_noise_share_their_luck():
    """A claim about two sets whose distances move together is decided, however much they move."""
    flow = ROW | {"method": "rectified flow", "sampler": "Euler", "steps": 5}
    flow["without"] = 10 * SPREAD
    reflow = flow | {"method": "reflow", "steps": 1, "above": 1.19}
    assert compare.judge_claim([flow, reflow], 1000, *CLAIMS["4a"])[2] == "better"
    reflow["without"] = 10 * SPREAD.roll(1)  # now they move apart
    assert compare.judge_claim([flow, reflow], 1000, *CLAIMS["4a"])[2] == "open"


# ------------------------------------------------------------------------------------ sets


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("content", [
    b"not a set", b"", torch.zeros(8, 1, 28, 28), [1], {"image": 1}, {"images": [1, 2]},
    {"images": torch.zeros(8, 1, 28, 28)}, {"images": torch.zeros(8, 28, 28).byte()},
    {"images": torch.zeros(4, 1, 28, 28).byte()}, {"images": torch.zeros(8, 1, 28, 32).byte()},
    {"images": torch.zeros(8, 1, 28, 28).byte(), "labels": torch.zeros(7)},
])
def test_what_is_not_an_evaluation_set_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "set.pt"
    torch.save(content, path) if type(content) is not bytes else path.write_bytes(content)
    assert "set.pt" in one_line(compare.load_set, path, 100)


def test_a_missing_set_and_a_folder_without_pictures_are_refused(tmp_path):
    assert "nothing.pt" in one_line(compare.load_set, tmp_path / "nothing.pt", 100)
    assert str(tmp_path) in one_line(compare.load_set, tmp_path, 100)


def write_set(folder, name: str, n: int, seconds: float, seed: int = 0, **made):
    """An evaluation set of n digits, as common.draw_and_time makes it.

    With seed 0 these are the first training digits of 05's --fast-dev, which has 512.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (part[:n] for part in common.synthetic_digits(512, seed))
    made = {"script": folder.name, "hardware": "a machine", "name": name, "method": "diffusion",
            "sampler": "DDIM", "steps": 100, "seconds": seconds, "images_per_second": 16 / seconds,
            "args": {"dataset": "synthetic", "fast_dev": True}} | made
    torch.save(made | {"images": common.to_uint8(images), "labels": labels},
               folder / f"eval_{name}.pt")
    return folder / f"eval_{name}.pt"


def compared(judge, folder, *more: str) -> str:
    """comparison.md of what is in folder/runs."""
    (folder / "runs").mkdir(exist_ok=True)
    args = compare.parse_args(options(folder / "out", "--runs", str(folder / "runs"), *more))
    args.out_dir.mkdir()
    compare.make_figures(args, judge)
    return (folder / "out" / "comparison.md").read_text()


def tables(text: str) -> list[list[dict]]:
    """The tables of a Markdown text, as rows of {heading: cell}."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            head = None
        elif head is None:
            head, rows = cells, []
            found.append(rows)
        elif set(cells[0]) != {"-"}:
            rows.append(dict(zip(head, cells, strict=True)))
    return found


def test_sets_of_different_size_never_share_a_table(judge, tmp_path, capsys):
    """One table, one floor, one page of verdicts and one plot for each size N."""
    folder = tmp_path / "runs" / "01_ddpm_ddim"
    write_set(folder, "DDIM", 20, 2.0)
    write_set(folder, "DDIM 10", 20, 0.25, steps=10, seed=3)
    write_set(folder, "DDPM", 40, 20.0, sampler="DDPM", steps=1000)
    text = compared(judge, tmp_path)
    assert text in capsys.readouterr().out
    twenty, verdicts, forty, more_verdicts = tables(text)
    where = [text.index(line) for line in ("N = 20 ", "DDIM ", "N = 40 ", "DDPM ")]
    assert where[0] < where[1] < where[2] and text.index("training images") > where[0]
    assert [(row["method"], row["sampler"], row["steps"]) for row in twenty] == [
        ("diffusion", "DDIM", "10"), ("diffusion", "DDIM", "100"), ("training images", "", "")]
    assert [(row["method"], row["sampler"], row["steps"]) for row in forty] == [
        ("diffusion", "DDPM", "1,000"), ("training images", "", "")]
    assert [row["seconds for 16"] for row in twenty] == ["0.25", "2", ""]
    assert float(twenty[0]["Fréchet distance"]) > 0
    above = float(twenty[0]["Fréchet distance"]) - float(twenty[2]["Fréchet distance"])
    assert float(twenty[0]["above the floor"]) == pytest.approx(above, rel=0.02)
    assert twenty[2]["above the floor"] == ""
    assert all(float(row["standard error"]) > 0 for row in twenty)  # of the floor: of a draw
    assert twenty[2]["Fréchet distance"] != forty[1]["Fréchet distance"]
    found = {(row["claim"][:2], row["verdict"]) for row in [*verdicts, *more_verdicts]}
    assert ("1a", "faster") in found  # 2 s against 20 s, for a time does not depend on N
    assert {verdict[:12] for claim, verdict in found if claim != "1a"} == {"not measured"}
    plots = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"quality_network_calls_20.png", "quality_network_calls_40.png"} <= plots


def test_rows_of_equal_size_are_judged(judge, tmp_path):
    write_set(tmp_path / "runs" / "01_ddpm_ddim", "DDIM", 20, 2.0)
    write_set(tmp_path / "runs" / "01_ddpm_ddim", "DDPM", 20, 20.0, sampler="DDPM", steps=1000)
    write_set(tmp_path / "runs" / "02_latent_diffusion", "latent", 20, 0.1,
              method="latent diffusion", hardware="another machine")
    scores, verdicts = tables(compared(judge, tmp_path))
    assert [row["times"] for row in scores] == ["", "", "on another machine", ""]
    found = {row["claim"].split(".")[0]: row["verdict"] for row in verdicts}
    assert found.pop("1a") == "faster"  # 2 s against 20 s
    assert found.pop("1b") == "open"  # the same images, so few that they are below the floor
    assert found.pop("2") == "not measured; open"  # its time is of another machine
    assert {verdict.split(";")[0] for verdict in found.values()} == {"not measured"}


def test_a_set_with_as_many_of_each_class_has_a_floor_of_its_own(judge, tmp_path):
    write_set(tmp_path / "runs" / "01_ddpm_ddim", "DDIM", 20, 2.0, seed=3)
    write_set(tmp_path / "runs" / "07_drifting", "drifting", 20, 2.0, seed=4, method="drifting",
              classes=10)
    scores, _ = tables(compared(judge, tmp_path))
    found = {row["method"]: row for row in scores}
    number = lambda method, key: float(found[method][key])
    for method, floor in (("diffusion", "training images"),
                          ("drifting", "training images, classes alike")):
        above = number(method, "Fréchet distance") - number(floor, "Fréchet distance")
        assert number(method, "above the floor") == pytest.approx(above, rel=0.02)


def test_times_of_another_machine_are_not_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar",
                        lambda axes, x, y, *rest, **how: drawn.append(([*x], [*y])))
    rows = [ROW | {"network_calls": 100, "distance": 2.0},
            LATENT | {"network_calls": 50, "distance": 3.0, "note": "on a GPU"}]
    compare.draw(argparse.Namespace(out_dir=tmp_path), 1000, rows, floor=1.0)
    assert drawn == [([100], [2.0]), ([50], [3.0]), ([1.0], [2.0])]  # by calls, by seconds


def test_only_the_first_n_of_each_set_count_if_n_is_given(judge, tmp_path):
    write_set(tmp_path / "runs" / "01_ddpm_ddim", "DDIM", 40, 2.0)
    text = compared(judge, tmp_path, "--eval-samples", "20")
    scores, _ = tables(text)
    assert "N = 20 " in text and "N = 40" not in text and len(scores) == 2


def test_a_floor_of_fewer_digits_than_the_set_says_so_and_guidance_may_be_none(judge, tmp_path):
    write_set(tmp_path / "runs" / "01_ddpm_ddim", "DDIM", 40, 2.0, guidance=None)
    text = compared(judge, tmp_path, "--train-images", "30", "--batch-size", "30")
    assert "N = 40 (floor: 30)" in text
    assert "above the floor" not in tables(text)[0][0]  # unlike sizes do not compare


def test_a_sweep_without_any_class_has_no_accuracy_to_draw(judge, tmp_path, monkeypatch):
    file = write_set(tmp_path / "runs" / "03_cfg", "DDIM", 20, 2.0, guidance=0.0)
    write_set(tmp_path / "runs" / "03_cfg", "DDIM_20", 20, 2.0, guidance=1.0, steps=20)
    made = torch.load(file, weights_only=True)
    del made["labels"]  # as 03 leaves them out where no class was asked for
    torch.save(made, file)
    drawn = {}
    monkeypatch.setattr(common, "save_plot", lambda path, lines, **labels: drawn.update(lines))
    compared(judge, tmp_path)
    assert {*drawn} == {"Fréchet distance", "precision", "recall"}
    assert [scale for scale, _ in drawn["recall"]] == [0]  # that of 20 steps is left out


def test_without_any_sets_the_floor_stands_alone(judge, tmp_path, capsys):
    typed = options(tmp_path / "out", "--runs", str(tmp_path / "none"))
    assert "--runs: there is no folder" in usage_error(compare, typed, capsys)
    text = compared(judge, tmp_path)
    assert [row["method"] for row in tables(text)[0]] == ["training images"]
    assert "no seconds for 16 of diffusion DDIM 100" in text


def test_a_set_and_a_folder_of_pictures_score_alike(judge, tmp_path, capsys):
    images = common.to_uint8(common.synthetic_digits(30, seed=3)[0])
    torch.save({"images": images}, tmp_path / "set.pt")
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        to_pil_image(image).save(tmp_path / "folder" / f"{i:03}.png")
    files = [str(tmp_path / "set.pt"), str(tmp_path / "folder")]
    compare.make_figures(compare.parse_args(options(tmp_path / "out", *files)), judge)
    rows = {row["method"]: row for row in tables(capsys.readouterr().out)[0]}
    one, two = (rows[file] for file in files)
    assert one["Fréchet distance"] == two["Fréchet distance"]
    assert one["precision"] == two["precision"] and one["recall"] == two["recall"]
    assert not (tmp_path / "out" / "comparison.md").exists()  # that is for what is in runs/


def test_a_classifier_trained_while_scoring_files_can_be_loaded_again(tmp_path):
    """The files of one call are no option of the next."""
    images = common.to_uint8(common.synthetic_digits(10, seed=3)[0])
    torch.save({"images": images}, tmp_path / "set.pt")
    typed = options(tmp_path / "out", "--train-images", "64", "--epochs", "1")
    compare.train(compare.parse_args([*typed, str(tmp_path / "set.pt")]))
    again = ["--device", "cpu", "--out-dir", str(tmp_path / "out"), "--dataset", "synthetic"]
    assert compare.parse_args(again).files == []
