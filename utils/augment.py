"""SimSiam's augmentation for whole batches, on any device (paper, appendix D).

`draw_views` makes every random number, `apply_views` is a pure function of images and draws, image by image.
Distributions and arithmetic are those of torchvision's RandomResizedCrop (bilinear, antialiased), RandomHorizontalFlip,
ColorJitter and RandomGrayscale on float images.
"""
import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

MEAN = (0.4914, 0.4822, 0.4465)  # of the CIFAR-10 training pixels, per channel, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)
SIZE = 32                      # of the views, in pixels
SCALE = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)
FLIP_P = 0.5
JITTER_P = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
GRAY_P = 0.2
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of the jitter operations
CROP_ATTEMPTS = 10                                # as in RandomResizedCrop.get_params
LUMA = (0.2989, 0.587, 0.114)                     # as in rgb_to_grayscale
CPU_CHUNK = 512 * SIZE**2                         # pixels at a time on the CPU: 6 MB stay in the cache


class Draws(NamedTuple):
    """The random numbers of n views; every tensor has n rows."""
    top: torch.Tensor      # int64 [n]: first row of the crop
    left: torch.Tensor     # int64 [n]: first column of the crop
    height: torch.Tensor   # int64 [n]
    width: torch.Tensor    # int64 [n]
    flip: torch.Tensor     # bool [n]
    jitter: torch.Tensor   # bool [n]: whether the colors are jittered
    order: torch.Tensor    # int64 [n, 4]: numbers of the operations, first to last
    factors: torch.Tensor  # float32 [n, 4]: brightness, contrast, saturation, hue (in turns)
    gray: torch.Tensor     # bool [n]

    def rows(self, index):
        """The draws of the images selected by `index`, a slice or an index tensor."""
        return Draws(*(field[index] for field in self))


def uniform(low, high, shape, generator):
    """Uniform float32 random numbers in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def epoch_generator(seed, epoch, device):
    """The generator of everything random in an epoch."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def view_sizes(schedule, epochs):
    """Size of the views in each epoch, a list of int: of '32', or of '16:0.5,24:0.25,32:0.25', which has the shares of
    the epochs, in order. Raises ValueError for what is no such schedule."""
    with contextlib.suppress(ValueError):
        parts = [part.split(":") for part in (schedule if ":" in schedule else f"{schedule}:1").split(",")]
        sizes, shares = [int(size) for size, _ in parts], [float(share) for _, share in parts]
        if min(sizes) >= 8 and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6:
            ends = [round(epochs * sum(shares[:i + 1])) for i in range(len(shares))]
            return [next(size for size, end in zip(sizes, ends) if epoch < end) for epoch in range(epochs)]
    raise ValueError(f"--view_size {schedule}: not sizes of at least 8 with shares that sum to 1")


def draw_crops(n, generator, height, width, scale):
    """Crops as in RandomResizedCrop.get_params: the first of ten attempts that fits into the image, else the central
    crop of the nearest allowed ratio. Returns top, left, height, width: int64 [n] each."""
    area = height * width * uniform(*scale, (n, CROP_ATTEMPTS), generator)
    ratio = torch.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1]), (n, CROP_ATTEMPTS), generator))
    w = torch.sqrt(area * ratio).round()
    h = torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    none_fits = ~fits.any(dim=1)
    central_w = float(min(width, round(height * RATIO[1])))
    central_h = float(min(height, round(width / RATIO[0])))
    w = torch.where(none_fits, central_w, w.gather(1, first)[:, 0])
    h = torch.where(none_fits, central_h, h.gather(1, first)[:, 0])
    position = uniform(0, 1, (n, 2), generator)
    # The minimum: a float32 product can round up to the bound itself.
    top = torch.minimum((position[:, 0] * (height - h + 1)).floor(), height - h)
    left = torch.minimum((position[:, 1] * (width - w + 1)).floor(), width - w)
    top = torch.where(none_fits, ((height - h) / 2).floor(), top)
    left = torch.where(none_fits, ((width - w) / 2).floor(), left)
    return top.long(), left.long(), h.long(), w.long()


def draw_views(n, generator, height=SIZE, width=SIZE, scale=SCALE):
    """Draw one view of each of n images of height x width pixels: Draws with n rows, on the generator's device. scale:
    bounds of the crop's share of the image area."""
    def coin(p):
        return uniform(0, 1, (n,), generator) < p

    top, left, h, w = draw_crops(n, generator, height, width, scale)
    strength, center = torch.tensor((JITTER, (1.0, 1.0, 1.0, 0.0)), device=generator.device)
    return Draws(
        top, left, h, w,
        flip=coin(FLIP_P),
        jitter=coin(JITTER_P),
        order=uniform(0, 1, (n, 4), generator).argsort(dim=1),
        factors=center + strength * uniform(-1, 1, (n, 4), generator),
        gray=coin(GRAY_P),
    )


def eager_on_cpu(x):
    """Whether operations run one by one on the CPU. Compiled and on CUDA, plain arithmetic fuses best; one by one on a
    CPU, a single larger operation saves many passes over memory."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pixel_centers(start, length, size, flip=None):
    """Centers of the output pixels, in input pixels, if start .. start + length is resized to `size`: float32
    [B, size]; mirrored where flip (bool [B]) is true."""
    out = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        out = torch.where(flip[:, None], size - out, out)
    return start.float()[:, None] + out.expand(len(start), size) * (length.float()[:, None] / size)


def resampling_weights(start, length, size_in, size, flip=None):
    """Weights [B, size, size_in] that resize pixels start .. start + length of a line to `size` pixels: bilinear,
    antialiased where it shrinks, normalized to sum 1 without the pixels outside the crop, as PIL does."""
    center = pixel_centers(start, length, size, flip)[:, :, None]         # [B, size, 1]
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    pixel = torch.arange(size_in, device=start.device) + 0.5              # [size_in]
    weight = torch.rsub((pixel - center).abs_().mul_(1 / (length / size).clamp(min=1)), 1).clamp_(min=0)
    weight.mul_((pixel > start) & (pixel < start + length))
    return weight.div_(weight.sum(dim=2, keepdim=True))


def sampling_positions(start, length, size_in, size, flip=None):
    """The same as positions for F.grid_sample, where a line reaches from -1 to 1: [B, size]. Only for crops that do
    not shrink. Clamped to the centers of the crop's first and last pixel, so that no pixel outside counts."""
    center = pixel_centers(start, length, size, flip)
    center = center.clamp(start[:, None] + 0.5, (start + length)[:, None] - 0.5)
    return center * (2 / size_in) - 1


def crop_flip(images, draws, size=SIZE):
    """Crop, resize and flip: uint8 [B, 3, H, W] -> float32 [B, 3, size, size] in [0, 1], up to rounding."""
    b, c, h, w = images.shape
    if eager_on_cpu(images) and h <= size and w <= size:  # no crop shrinks; two thirds of the time of the products
        positions = torch.empty(b, size, size, 2)
        positions[..., 0] = sampling_positions(draws.left, draws.width, w, size, draws.flip)[:, None, :]
        positions[..., 1] = sampling_positions(draws.top, draws.height, h, size)[:, :, None]
        return F.grid_sample(images.float().mul_(1 / 255), positions, padding_mode="border", align_corners=False)
    rows = resampling_weights(draws.top, draws.height, h, size)
    columns = resampling_weights(draws.left, draws.width, w, size, draws.flip)
    x = torch.bmm(images.float().view(b, c * h, w), columns.transpose(1, 2))     # [B, 3 * H, size]
    return torch.matmul(rows[:, None] / 255, x.view(b, c, h, size))


def apply_matrix(x, matrix, bias, out=None):
    """Apply a color matrix to each image: x float [B, 3, H, W], matrix [B, 3, 3], bias [B, 3] -> [B, 3, H, W].
    out: contiguous destination, on the CPU only."""
    if eager_on_cpu(x):
        out = torch.empty_like(x) if out is None else out
        torch.baddbmm(bias[:, :, None], matrix, x.flatten(2), out=out.flatten(2))
        return out
    matrix, bias, (r, g, b) = matrix[..., None, None], bias[..., None, None], x.unbind(1)
    return torch.stack([
        matrix[:, i, 0] * r + matrix[:, i, 1] * g + matrix[:, i, 2] * b + bias[:, i] for i in range(3)], dim=1)


def luma_matrix(device):
    """The color matrix [3, 3] that turns every channel into the luma."""
    return torch.stack([torch.full((3,), share, device=device) for share in LUMA], dim=1)


def hue_slots(draws):
    """Position of the hue shift in each image's order: int64 [B] in 0 .. 3."""
    return (draws.order == HUE).int().argmax(dim=1)


def blend_matrices(draws):
    """Brightness, contrast and saturation of each image, in its order, as three color matrices [3, B, 3, 3], and how
    much of the mean luma each adds [3, B]: factor * x + (1 - factor) * other, where other is black, the mean luma, or
    the luma. Without jitter they are the identity, bit for bit."""
    device = draws.order.device
    i = torch.arange(3, device=device)[:, None]
    slot = i + (hue_slots(draws) <= i)                                          # skips the hue shift
    operation = draws.order.T.gather(0, slot)                                   # [3, B]
    factor = torch.where(draws.jitter, draws.factors.T.gather(0, operation), 1.0)
    of_luma, of_mean = ((1 - factor) * (operation == other) for other in (SATURATION, CONTRAST))
    eye = torch.eye(3, device=device)
    return factor[..., None, None] * eye + of_luma[..., None, None] * luma_matrix(device), of_mean


def blend(x, matrix, of_mean):
    """Apply one blend to each image: x [B, 3, H, W], matrix [B, 3, 3], of_mean [B]; clamped to [0, 1]."""
    means = x.mean(dim=(2, 3))
    mean_luma = LUMA[0] * means[:, 0] + LUMA[1] * means[:, 1] + LUMA[2] * means[:, 2]
    return apply_matrix(x, matrix, (of_mean * mean_luma)[:, None].expand(-1, 3)).clamp_(0, 1)


def shift_hue(x, turns):
    """Shift the hue of float images [B, 3, H, W] in [0, 1] by turns [B] of the color circle.

    Exactly HSV: the largest and smallest channel values stay. In sixths of the circle and counted from cyan, the hue is
    2 + (r - g - b + smallest) / chroma, negative where green exceeds blue. From smallest to largest, red is then at
    clamp(|hue| - 1, 0, 1), green at clamp(2 - |hue + 1|, 0, 1), blue at clamp(2 - |hue - 1|, 0, 1).
    """
    r, g, b = x.split(1, dim=1)
    smallest = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b) - smallest
    hue = (r - g).sub_(b - smallest).div_(chroma.clamp(min=1e-12)).add_(2)  # gray pixels: 2, without effect
    hue = torch.copysign(hue, b - g).add_(6 * turns.view(-1, 1, 1, 1))
    hue = torch.sub(hue, (hue * (1 / 6)).round_(), alpha=6)
    position = torch.cat([hue.abs().sub_(1), torch.rsub((hue + 1).abs_(), 2), torch.rsub((hue - 1).abs_(), 2)], dim=1)
    return torch.addcmul(smallest, chroma, position.clamp_(0, 1))


def color_jitter(x, draws):
    """ColorJitter with probability, each image in its own order: float [B, 3, H, W] in [0, 1] -> same. Three blends
    before the hue shift and three after it cover all 24 orders: an image takes each of its three on one side, and the
    identity on the other."""
    (matrices, of_mean), slots, identity = blend_matrices(draws), hue_slots(draws), torch.eye(3, device=x.device)
    for side in (-1, 1):
        if side == 1:
            x = shift_hue(x, torch.where(draws.jitter, draws.factors[:, HUE], 0.0))
        for i in range(3):
            mine = i < slots if side == -1 else i >= slots
            x = blend(x, torch.where(mine[:, None, None], matrices[i], identity), of_mean[i] * mine)
    return x


def gray_and_normalize(draws):
    """Grayscale with probability, then normalization, as color matrices [B, 3, 3] and biases [B, 3]."""
    gray, device = draws.gray, draws.gray.device
    colors = torch.where(gray[:, None, None], luma_matrix(device), torch.eye(3, device=device))
    bias = torch.stack([torch.full(gray.shape, -MEAN[i] / STD[i], device=device) for i in range(3)], dim=1)
    return torch.stack([colors[:, i] / STD[i] for i in range(3)], dim=1), bias


def normalize(images, mean=MEAN, std=STD):
    """Normalize images without augmentation: uint8, or float in [0, 1], [B, 3, H, W] -> float32 [B, 3, H, W]."""
    if images.dtype == torch.uint8:
        images = images / 255
    # Plain numbers, channel by channel: tensors of them would be copied to the device in every step.
    return torch.cat([(images[:, i:i + 1] - mean[i]) / std[i] for i in range(3)], dim=1)


def denormalize(views):
    """The inverse of `normalize`: float [B, 3, H, W] -> float images in [0, 1]."""
    return torch.cat([views[:, i:i + 1] * STD[i] + MEAN[i] for i in range(3)], dim=1).clamp(0, 1)


def apply_views(images, draws, size=SIZE):
    """Make the views: uint8 images [B, 3, H, W] and their Draws (B rows, same device) -> normalized float32 views
    [B, 3, size, size]. Pure and batched, without host synchronization on CUDA; torch.compile takes it whole."""
    if eager_on_cpu(images):
        return apply_views_cpu(images, draws, size)
    return apply_matrix(color_jitter(crop_flip(images, draws, size), draws), *gray_and_normalize(draws))


def make_views(images, draws, size=SIZE):
    """TEMP"""
    both = Draws(*(torch.cat(fields) for fields in zip(*draws)))
    return apply_views(torch.cat(len(draws) * [images]), both, size).chunk(len(draws))


def apply_views_cpu(images, draws, size):
    """The same on the CPU, several times faster: chunks that stay in the cache, each sorted by the slot of the hue
    shift, so that every image takes only the three blends that it needs."""
    unjittered = 4
    slots = torch.where(draws.jitter, hue_slots(draws), unjittered)
    views = torch.empty(len(images), 3, size, size)
    at_once = max(1, CPU_CHUNK // max(size, SIZE, *images.shape[2:])**2)
    for start in range(0, len(images), at_once):
        chunk = slice(start, start + at_once)
        order = slots[chunk].argsort()
        sorted_draws = draws.rows(chunk).rows(order)
        matrices, of_mean = blend_matrices(sorted_draws)
        matrix, bias = gray_and_normalize(sorted_draws)
        crops = crop_flip(images[chunk].index_select(0, order), sorted_draws, size)
        made, first = torch.empty_like(crops), 0
        for slot, count in enumerate(slots[chunk].bincount().tolist()):
            rows = slice(first, first + count)
            first += count
            x = crops[rows]
            for i in range(4 if slot < unjittered else 0):
                if i == slot:
                    x = shift_hue(x, sorted_draws.factors[rows, HUE])
                if i < 3:
                    x = blend(x, matrices[i, rows], of_mean[i, rows])
            apply_matrix(x, matrix[rows], bias[rows], out=made[rows])
        torch.index_select(made, 0, order.argsort(), out=views[chunk])
    return views
