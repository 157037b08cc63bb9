"""SimSiam's augmentation for whole batches, on any device (paper, appendix D).

`draw_views` makes every random number, `apply_views` is a pure function of pictures and draws. Each
image has its own crop, flip, jitter factors, jitter order and grayscale. The distributions and the
arithmetic are those of torchvision's RandomResizedCrop (bilinear, antialiased), RandomHorizontalFlip,
ColorJitter and RandomGrayscale on float images.
"""
import math
from typing import NamedTuple

import torch

MEAN = (0.4914, 0.4822, 0.4465)  # of the CIFAR-10 training pixels, per channel, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)

SIZE = 32
SCALE = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)
FLIP_P = 0.5
JITTER_P = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
GRAY_P = 0.2

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of the jitter's operations
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop.get_params
LUMA = (0.2989, 0.587, 0.114)  # as in torchvision's rgb_to_grayscale
CPU_CHUNK = 128


class Draws(NamedTuple):
    """The random numbers of n views; every tensor has n rows."""

    top: torch.Tensor      # int64 [n]: the crop's first row
    left: torch.Tensor     # int64 [n]: the crop's first column
    height: torch.Tensor   # int64 [n]
    width: torch.Tensor    # int64 [n]
    flip: torch.Tensor     # bool [n]
    jitter: torch.Tensor   # bool [n]: whether the colors are jittered
    order: torch.Tensor    # int64 [n, 4]: the operations' numbers, first to last
    factors: torch.Tensor  # float32 [n, 4]: brightness, contrast, saturation, hue (in turns)
    gray: torch.Tensor     # bool [n]

    def rows(self, index):
        """The draws of the images that `index` (a slice or an index tensor) selects."""
        return Draws(*(field[index] for field in self))


def uniform(low, high, shape, generator):
    """Uniform random numbers from low to high, float32, on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def epoch_generator(seed, epoch, device):
    """The generator from which everything random in an epoch comes."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def draw_crops(n, generator, height, width, scale):
    """Crops as torchvision's RandomResizedCrop.get_params draws them: the first of ten attempts that
    fits the picture, else the central crop of the nearest allowed ratio."""
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
    place = uniform(0, 1, (n, 2), generator)
    # A product in float32 can round up to the bound itself: hence the minimum.
    top = torch.minimum((place[:, 0] * (height - h + 1)).floor(), height - h)
    left = torch.minimum((place[:, 1] * (width - w + 1)).floor(), width - w)
    top = torch.where(none_fits, ((height - h) / 2).floor(), top)
    left = torch.where(none_fits, ((width - w) / 2).floor(), left)
    return top.long(), left.long(), h.long(), w.long()


def draw_views(n, generator, height=SIZE, width=SIZE, scale=SCALE):
    """Draw one view of each of n pictures.

    generator: a torch.Generator; the draws live on its device. height, width: of the pictures;
    scale: bounds of the crop's share of the picture's area. Returns Draws with n rows.
    """
    top, left, h, w = draw_crops(n, generator, height, width, scale)

    def coin(p):
        return uniform(0, 1, (n,), generator) < p

    strength = torch.tensor(JITTER, device=generator.device)
    center = torch.tensor((1.0, 1.0, 1.0, 0.0), device=generator.device)
    return Draws(
        top, left, h, w,
        flip=coin(FLIP_P),
        jitter=coin(JITTER_P),
        order=uniform(0, 1, (n, 4), generator).argsort(dim=1),
        factors=center + strength * uniform(-1, 1, (n, 4), generator),
        gray=coin(GRAY_P),
    )


def normalize(images):
    """Pictures without augmentation: uint8 [B, 3, H, W] or float in [0, 1] -> float32, by MEAN and STD."""
    if images.dtype == torch.uint8:
        images = images / 255
    # Plain numbers, channel by channel: tensors of them would be copied to the device in every step.
    return torch.cat([(images[:, i:i + 1] - MEAN[i]) / STD[i] for i in range(3)], dim=1)


def resampling_weights(start, length, size_in, flip=None):
    """Weights [B, SIZE, size_in] that resize pixels start .. start + length of a line to SIZE pixels.

    Bilinear, antialiased where it shrinks. Pixels outside the crop have weight 0 and the rest is
    scaled to sum 1, as PIL does. Where flip (bool [B]) is true the output is mirrored.
    """
    out = torch.arange(SIZE, device=start.device).expand(len(start), SIZE)
    if flip is not None:
        out = torch.where(flip[:, None], SIZE - 1 - out, out)
    start, length = start[:, None, None], length[:, None, None]
    scale = length / SIZE
    center = start + (out[:, :, None] + 0.5) * scale                      # [B, SIZE, 1]
    pixel = torch.arange(size_in, device=start.device) + 0.5              # [size_in]
    weight = (1 - (pixel - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True)


def crop_flip(images, draws):
    """Crop, resize and flip: uint8 [B, 3, H, W] -> float32 [B, 3, SIZE, SIZE] in [0, 1]."""
    b, c, h, w = images.shape
    rows = resampling_weights(draws.top, draws.height, h)
    columns = resampling_weights(draws.left, draws.width, w, draws.flip)
    x = torch.bmm((images / 255).view(b, c * h, w), columns.transpose(1, 2))     # [B, 3 * H, SIZE]
    return torch.matmul(rows[:, None], x.view(b, c, h, SIZE)).clamp(0, 1)


def grayscale(x):
    """Luma of float pictures [B, 3, H, W] -> [B, 1, H, W], as torchvision's rgb_to_grayscale."""
    r, g, b = x.split(1, dim=1)
    return (LUMA[0] * r).add(g, alpha=LUMA[1]).add(b, alpha=LUMA[2])


def blend(x, factor, to_mean, to_gray):
    """Brightness, contrast or saturation, whichever each picture has: factor * x + (1 - factor) * other,
    clamped to [0, 1]. The other picture is black, or the mean luma where to_mean is 1, or the luma
    where to_gray is 1. All three are float [B, 1, 1, 1]; a factor of 1 leaves x as it is, bit for bit."""
    gray = grayscale(x)
    other = torch.addcmul(to_mean * gray.mean(dim=(2, 3), keepdim=True), to_gray, gray)
    return torch.lerp(other, x, factor).clamp_(0, 1)


def shift_hue(x, turns):
    """Turn the hue of float pictures [B, 3, H, W] in [0, 1] by turns [B, 1, 1, 1] of the color circle.

    HSV exactly: the largest and the smallest channel value stay. With the hue h in sixths of the circle, red
    stands at clamp(|h - 3| - 1, 0, 1) of the way from the smallest to the largest, green at
    clamp(2 - |h - 2|, 0, 1), blue at clamp(2 - |h - 4|, 0, 1).
    """
    r, g, b = x.split(1, dim=1)
    largest = x.amax(dim=1, keepdim=True)
    smallest = x.amin(dim=1, keepdim=True)
    chroma = largest - smallest
    scale = 1 / chroma.clamp(min=1e-12)  # gray pixels, without chroma, have differences of 0
    hue = torch.where(
        largest == r, (g - b) * scale,
        torch.where(largest == g, (b - r) * scale + 2, (r - g) * scale + 4),
    )
    hue = torch.remainder(hue + 6 * turns, 6)
    position = torch.cat([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], dim=1)
    return torch.addcmul(smallest, chroma, position.clamp_(0, 1))


def color_jitter(x, draws, hue_slot=None):
    """ColorJitter with probability, every picture in its own order: float [B, 3, H, W] in [0, 1] -> same.

    Brightness, contrast and saturation are one blend with different partners, so three blends before
    the hue shift and three after it hold all 24 orders: a picture takes each of its three at the
    side of the hue shift where it belongs and passes the other side with factor 1.
    hue_slot: where it is known that all pictures shift the hue in this slot of their order (0 .. 3),
    the sides that none takes are left out.
    """
    def per_image(values):
        return values.to(x.dtype).view(-1, 1, 1, 1)

    neutral = (torch.arange(4, device=x.device) != HUE).to(x.dtype)              # a factor of 1, a shift of 0
    factors = torch.where(draws.jitter[:, None], draws.factors, neutral)
    slots = hue_slots(draws)
    for after_hue in (False, True):
        if after_hue:
            x = shift_hue(x, per_image(factors[:, HUE]))
        for i in range(3):
            if hue_slot is not None and (hue_slot <= i) != after_hue:
                continue
            later = slots <= i                                                   # the i-th blend follows the hue
            operation = draws.order.gather(1, (i + later.long())[:, None])       # [B, 1]
            factor = torch.where(later == after_hue, factors.gather(1, operation)[:, 0], 1.0)
            x = blend(x, per_image(factor), per_image(operation == CONTRAST), per_image(operation == SATURATION))
    return x


def hue_slots(draws):
    """Where in its order each picture shifts the hue: int64 [B] in 0 .. 3."""
    return (draws.order == HUE).int().argmax(dim=1)


def finish(x, draws):
    """Grayscale with probability, then normalization: float [B, 3, H, W] in [0, 1] -> the views."""
    return normalize(torch.lerp(x, grayscale(x), draws.gray.to(x.dtype).view(-1, 1, 1, 1)))


def apply_views(images, draws):
    """Make the views: uint8 pictures [B, 3, H, W] and their Draws (B rows, same device) -> normalized
    float32 views [B, 3, 32, 32]. Pure, batched, without host synchronization; torch.compile takes it whole."""
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        return apply_views_cpu(images, draws)
    return finish(color_jitter(crop_flip(images, draws), draws), draws)


def apply_views_cpu(images, draws):
    """The same for the CPU, several times as fast: a hundred or so pictures at a time stay in the cache from one
    operation to the next, and pictures with the hue shift in the same slot go together through fewer blends."""
    views = torch.empty(len(images), 3, SIZE, SIZE)
    unjittered = 4
    slots = torch.where(draws.jitter, hue_slots(draws), unjittered)
    for slot in range(5):
        for rows in (slots == slot).nonzero()[:, 0].split(CPU_CHUNK):
            part = draws.rows(rows)
            x = crop_flip(images[rows], part)
            if slot != unjittered:
                x = color_jitter(x, part, slot)
            views[rows] = finish(x, part)
    return views
