"""The views against torchvision's: each image with the same draws, and the distributions of the draws."""
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional as F

from utils import augment
from utils.augment import apply_views, crop_flip, draw_views

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
N = 20_000  # draws, for distributions


@pytest.fixture(scope="module")
def images(shapes, request):
    """200 images: photographs where CIFAR-10 is at hand, noise with every value, and single colors."""
    try:
        real = request.getfixturevalue("cifar").train_images[:150]
    except pytest.skip.Exception:
        real = shapes.train_images[:150]
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (40, 3, 32, 32), generator=generator).byte()
    flat = torch.randint(0, 256, (10, 3, 1, 1), generator=generator).byte().repeat(1, 1, 32, 32)
    flat[0], flat[1], flat[2, :] = 0, 255, flat[2, :1]
    return torch.cat([real, noise, flat])


def draw(n, seed, *size, device="cpu"):
    return augment.Draws(*(field.to(device) for field in draw_views(n, torch.Generator().manual_seed(seed), *size)))


def expected_crops(images, draws, size=32):
    crops = []
    for i, image in enumerate(images):
        box = [int(field[i]) for field in (draws.top, draws.left, draws.height, draws.width)]
        crop = F.resized_crop(image / 255, *box, [size, size], antialias=True)
        crops.append(F.hflip(crop) if draws.flip[i] else crop)
    return torch.stack(crops)


def expected_views(images, draws, size=32):
    adjust, views = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue), []
    for i, view in enumerate(expected_crops(images, draws, size)):
        for operation in draws.order[i].tolist() if draws.jitter[i] else []:
            view = adjust[operation](view, float(draws.factors[i, operation]))
        views.append(F.rgb_to_grayscale(view, 3) if draws.gray[i] else view)
    return F.normalize(torch.stack(views), augment.MEAN, augment.STD)


def difference(views, expected):
    """Per pixel, on the scale of images in [0, 1]."""
    return ((views.cpu() - expected) * torch.tensor(augment.STD).view(3, 1, 1)).abs()


@on_devices
def test_crop_and_flip_match_torchvision(images, device):
    large = torch.randint(0, 256, (20, 3, 96, 70), generator=torch.Generator().manual_seed(1)).byte()
    for batch in (images, large):
        draws = draw(len(batch), 0, *batch.shape[2:], device=device)
        assert draws.flip.any() and not draws.flip.all()
        for size in (32, 24, 16, 9, 48):
            crops = crop_flip(batch.to(device), draws, size).cpu()
            assert (crops - expected_crops(batch, draws, size)).abs().max() < 1e-5


@on_devices
@pytest.mark.parametrize("size", [32, 24, 16])
def test_views_match_torchvision(images, device, size):
    draws = draw(len(images), 2, device=device)
    assert 0 < draws.jitter.sum() < len(images) and 0 < draws.gray.sum() < len(images)
    views = apply_views(images.to(device), draws, size)
    wrong = difference(views, expected_views(images, draws, size))
    assert wrong.max() < 2 / 255 and wrong.mean() < 1e-5


def test_jitter_matches_torchvision_in_every_order(images):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    yes = torch.ones(24, dtype=torch.bool)
    draws = draw(24, 3)._replace(order=orders, jitter=yes, gray=~yes)
    assert difference(apply_views(images[:24], draws), expected_views(images[:24], draws)).max() < 2 / 255


def test_normalize_matches_torchvision_and_has_an_inverse(images):
    normalized = augment.normalize(images)
    torch.testing.assert_close(normalized, F.normalize(images / 255, augment.MEAN, augment.STD))
    torch.testing.assert_close(augment.denormalize(normalized), images / 255, rtol=0, atol=1e-6)


def test_a_view_depends_only_on_its_image_and_draws(images):
    draws = draw(len(images), 4)
    views = apply_views(images, draws)
    for rows in (slice(0, 1), slice(60, 130)):
        torch.testing.assert_close(apply_views(images[rows], draws.rows(rows)), views[rows], rtol=0, atol=1e-5)
    for count in (1, 2, 4):
        several = [draw(len(images), seed) for seed in range(count)]
        for made, alone in zip(augment.make_views(images, several), several, strict=True):
            torch.testing.assert_close(made, apply_views(images, alone), rtol=0, atol=1e-5)
    # More images than are computed at a time on a CPU.
    for n, pixels in ((1100, 32), (130, 96)):
        many = torch.randint(0, 256, (n, 3, pixels, pixels), generator=torch.Generator().manual_seed(2)).byte()
        draws = draw(n, 0, pixels, pixels)
        parts = [apply_views(many[rows], draws.rows(rows), pixels) for rows in torch.arange(n).split(50)]
        torch.testing.assert_close(apply_views(many, draws, pixels), torch.cat(parts), rtol=0, atol=1e-5)


@on_devices
def test_apply_views_compiles_without_graph_breaks(images, device):
    images, draws = images.to(device), draw(len(images), 0, device=device)
    # aot_eager traces as inductor does, without its minute of code generation on a CPU.
    compiled = torch.compile(apply_views, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(images, draws), apply_views(images, draws), rtol=1e-4, atol=1e-4)


def same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov test at the level of 1 in 10,000."""
    values, a, b = np.union1d(a, b), np.sort(a), np.sort(b)
    shares = [np.searchsorted(x, values, side="right") / len(x) for x in (a, b)]
    critical = math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(a) + 1 / len(b)))
    return np.abs(shares[0] - shares[1]).max() < critical


def crop_statistics(top, left, height, width):
    return {"area": height * width, "ratio": width / height, "top": top, "left": left, "bottom": top + height,
            "right": left + width}


@pytest.mark.parametrize("height, width", [(32, 32), (16, 40)])  # (16, 40) often falls back to the central crop
def test_crops_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    crop, empty = transforms.RandomResizedCrop(32, (0.2, 1.0)), torch.empty(3, height, width)
    theirs = crop_statistics(*np.array([crop.get_params(empty, crop.scale, crop.ratio) for _ in range(N)], float).T)
    ours, other = (crop_statistics(*(field.double().numpy() for field in draw(N, 1, height, width, scale)[:4]))
                   for scale in ((0.2, 1.0), (0.25, 1.0)))
    assert all(same_distribution(ours[name], theirs[name]) for name in ours)
    assert not same_distribution(other["area"], theirs["area"])


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(N)]
    draws = draw(N, 1)
    assert all(torch.equal(a, b) for a, b in zip(draw(N, 1), draws))
    assert not any(torch.equal(a, b) for a, b in zip(draw(N, 2), draws))
    for operation in range(4):
        assert same_distribution(draws.factors[:, operation].numpy(), np.array([row[1 + operation] for row in theirs]))
    orders, counts = np.unique(draws.order.numpy(), axis=0, return_counts=True)
    their_orders, their_counts = np.unique(np.stack([row[0] for row in theirs]), axis=0, return_counts=True)
    assert len(orders) == 24 and (orders == their_orders).all()
    chi_square = ((counts - their_counts) ** 2 / (counts + their_counts)).sum()
    assert chi_square < 58.6  # 23 degrees of freedom, 1 in 15,000


@pytest.mark.parametrize("name, transform", [
    ("flip", transforms.RandomHorizontalFlip(0.5)), ("gray", transforms.RandomGrayscale(0.2)),
    ("jitter", transforms.RandomApply([lambda view: view + 1], 0.8))])
def test_flips_jitter_and_grayscale_are_as_frequent_as_torchvisions(name, transform):
    torch.manual_seed(0)
    image = torch.tensor([0.0, 1.0]).expand(3, 1, 2) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    theirs = np.mean([not torch.equal(transform(image), image) for _ in range(4000)])
    drawn = getattr(draw(N, 1), name)
    ours = drawn.double().mean().item()
    assert abs(ours - theirs) < 4 * math.sqrt(0.25 / N + 0.25 / 4000)
    changes = (drawn[1:] ^ drawn[:-1]).double().mean().item()  # images are independent
    assert abs(changes - 2 * ours * (1 - ours)) < 4 * math.sqrt(0.25 / N)
