"""The views against torchvision: each image with the same parameters, and the parameters' distributions."""
import itertools
import math
import time

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as F

from utils import augment
from utils.augment import apply_views, crop_flip, draw_views

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))]
OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.fixture(scope="module")
def pictures(shapes, request):
    """200 pictures: real photographs if they are at hand, noise with every value, and flat colors."""
    try:
        real = request.getfixturevalue("cifar").train_images[:150]
    except pytest.skip.Exception:
        real = shapes.train_images[:150]
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (40, 3, 32, 32), generator=generator).byte()
    flat = torch.randint(0, 256, (10, 3, 1, 1), generator=generator).byte().expand(10, 3, 32, 32)
    flat = flat.clone()
    flat[0], flat[1], flat[2, :] = 0, 255, flat[2, :1]
    return torch.cat([real, noise, flat])


def reference_crop(image, draws, i):
    box = [int(draws.top[i]), int(draws.left[i]), int(draws.height[i]), int(draws.width[i])]
    view = F.resized_crop(image.float() / 255, *box, [32, 32], antialias=True)
    return F.hflip(view) if draws.flip[i] else view


def reference_view(image, draws, i):
    view = reference_crop(image, draws, i)
    if draws.jitter[i]:
        for operation in draws.order[i].tolist():
            view = OPERATIONS[operation](view, float(draws.factors[i, operation]))
    return F.rgb_to_grayscale(view, 3) if draws.gray[i] else view


def draws_on(draws, device):
    return augment.Draws(*(field.to(device) for field in draws))


@pytest.mark.parametrize("device", DEVICES)
def test_crop_and_flip_equal_torchvision(pictures, device):
    draws = draw_views(len(pictures), torch.Generator().manual_seed(0))
    assert draws.flip.any() and not draws.flip.all()
    views = crop_flip(pictures.to(device), draws_on(draws, device)).cpu()
    expected = torch.stack([reference_crop(picture, draws, i) for i, picture in enumerate(pictures)])
    assert (views - expected).abs().max() < 1e-5


def test_crop_shrinks_larger_pictures_as_torchvision_does():
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (20, 3, 96, 70), generator=generator).byte()
    draws = draw_views(20, generator, 96, 70)
    expected = torch.stack([reference_crop(picture, draws, i) for i, picture in enumerate(pictures)])
    assert (crop_flip(pictures, draws) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_whole_chain_equals_torchvision(pictures, device):
    draws = draw_views(len(pictures), torch.Generator().manual_seed(2))
    assert 0 < draws.jitter.sum() < len(pictures) and 0 < draws.gray.sum() < len(pictures)
    views = apply_views(pictures.to(device), draws_on(draws, device)).cpu()
    expected = torch.stack([
        F.normalize(reference_view(picture, draws, i), augment.MEAN, augment.STD) for i, picture in enumerate(pictures)
    ])
    difference = (views - expected) * torch.tensor(augment.STD).view(3, 1, 1)
    assert difference.abs().max() < 2 / 255
    assert difference.abs().mean() < 1e-5


def test_every_order_of_the_jitter_equals_torchvision(pictures):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    draws = draw_views(24, torch.Generator().manual_seed(3))
    draws = draws._replace(order=orders, jitter=torch.ones(24, dtype=torch.bool), gray=torch.zeros(24, dtype=torch.bool))
    views = apply_views(pictures[:24], draws)
    for i in range(24):
        expected = F.normalize(reference_view(pictures[i], draws, i), augment.MEAN, augment.STD)
        assert (views[i] - expected).abs().max() * 0.27 < 2 / 255, orders[i]


def test_a_view_depends_on_its_own_picture_and_draws_alone(pictures):
    draws = draw_views(len(pictures), torch.Generator().manual_seed(4))
    views = apply_views(pictures, draws)
    for rows in (slice(0, 1), slice(60, 130)):
        torch.testing.assert_close(apply_views(pictures[rows], draws.rows(rows)), views[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(pictures, device):
    draws = draws_on(draw_views(len(pictures), torch.Generator().manual_seed(0)), device)
    # aot_eager traces and functionalizes as the default does, without its minute of code generation on a CPU.
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(apply_views, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        compiled(pictures.to(device), draws), apply_views(pictures.to(device), draws), rtol=1e-4, atol=1e-4
    )


def test_draws_are_a_function_of_the_seed():
    first, again, other = (draw_views(100, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    drawn = [(a, b) for name, a, b in zip(first._fields, first, other) if name != "sigma"]  # without blur it is 0
    assert not any(torch.equal(a, b) for a, b in drawn)


# ---- distributions

N = 20_000


def torchvision_crops(height, width):
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    get_params = transforms.RandomResizedCrop.get_params
    return np.array([get_params(picture, list(augment.SCALE), list(augment.RATIO)) for _ in range(N)]).T


def our_crops(height, width, **options):
    draws = draw_views(N, torch.Generator().manual_seed(1), height, width, **options)
    return np.stack([draws.top.numpy(), draws.left.numpy(), draws.height.numpy(), draws.width.numpy()])


def same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov test at the level of one in 10,000."""
    values = np.union1d(a, b)
    a, b = np.sort(a), np.sort(b)
    distance = np.abs(
        np.searchsorted(a, values, side="right") / len(a) - np.searchsorted(b, values, side="right") / len(b)
    ).max()
    return distance < math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(a) + 1 / len(b)))


def crop_statistics(crops):
    top, left, height, width = crops.astype(float)
    return {
        "area": height * width, "ratio": width / height, "top": top, "left": left,
        "bottom": top + height, "right": left + width,
    }


@pytest.mark.parametrize("height, width", [(32, 32), (16, 40)])  # in the second the central crop is frequent
def test_crops_are_distributed_as_torchvisions(height, width):
    ours, reference = crop_statistics(our_crops(height, width)), crop_statistics(torchvision_crops(height, width))
    for name in ours:
        assert same_distribution(ours[name], reference[name]), name


def test_the_test_of_crops_can_fail():
    wrong = crop_statistics(our_crops(32, 32, scale=(0.25, 1.0)))
    assert not same_distribution(wrong["area"], crop_statistics(torchvision_crops(32, 32))["area"])


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(*augment.JITTER)
    reference = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(N)]
    draws = draw_views(N, torch.Generator().manual_seed(1))
    for operation in range(4):
        assert same_distribution(draws.factors[:, operation].numpy(), np.array([row[1 + operation] for row in reference]))
    ours = np.unique(draws.order.numpy(), axis=0, return_counts=True)
    theirs = np.unique(np.array([row[0].tolist() for row in reference]), axis=0, return_counts=True)
    assert len(ours[0]) == 24 and (ours[0] == theirs[0]).all()
    chi_square = ((ours[1] - theirs[1]) ** 2 / (ours[1] + theirs[1])).sum()
    assert chi_square < 58.6  # 23 degrees of freedom, one in 15,000


def test_rates_of_flip_jitter_and_grayscale():
    draws = draw_views(N, torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    white = torch.tensor([[[0.0, 1.0]]] * 3)
    pipelines = {
        "flip": (transforms.RandomHorizontalFlip(0.5), lambda view: view[0, 0, 0] == 1),
        "jitter": (transforms.RandomApply([lambda view: view + 1], 0.8), lambda view: view[0, 0, 0] == 1),
        "gray": (transforms.RandomGrayscale(0.2), lambda view: view[0, 0, 1] != 1),
    }
    for name, (transform, changed) in pipelines.items():
        reference = np.mean([bool(changed(transform(white))) for _ in range(4000)])
        ours = getattr(draws, name).float().mean().item()
        assert abs(ours - reference) < 4 * math.sqrt(0.25 / N + 0.25 / 4000), name
        independent = getattr(draws, name)[1:].logical_xor(getattr(draws, name)[:-1]).float().mean().item()
        assert abs(independent - 2 * ours * (1 - ours)) < 4 * math.sqrt(0.25 / N), name


# ---- speed


@pytest.fixture
def one_thread():
    """Where threads wait for one another, other work on the machine slows them down more than it does a single one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_views_are_made_several_times_as_fast_as_picture_by_picture(pictures, one_thread):
    """Five times and more. Medians of interleaved rounds."""
    pipeline = transforms.Compose([
        transforms.RandomResizedCrop(32, augment.SCALE),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(*augment.JITTER)], augment.JITTER_P),
        transforms.RandomGrayscale(augment.GRAY_P),
        transforms.ToTensor(),
        transforms.Normalize(augment.MEAN, augment.STD),
    ])
    batch = torch.cat([pictures, pictures, pictures])[:512]
    images = [F.to_pil_image(picture) for picture in batch]
    generator = torch.Generator().manual_seed(0)
    seconds = {"one by one": [], "batched": []}
    for _ in range(5):
        start = time.perf_counter()
        for image in images[:128]:
            pipeline(image)
        seconds["one by one"].append((time.perf_counter() - start) / 128)
        start = time.perf_counter()
        apply_views(batch, draw_views(512, generator))
        seconds["batched"].append((time.perf_counter() - start) / 512)
    one_by_one, batched = (float(np.median(values)) for values in seconds.values())
    print(f"one by one {1 / one_by_one:,.0f} views/s, batched {1 / batched:,.0f} views/s, {one_by_one / batched:.1f} times")
    assert one_by_one > 5 * batched
