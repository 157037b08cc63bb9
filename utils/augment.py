"""SimSiam's augmentation for whole batches, on any device (paper, appendices A and D: no blur).

`draw_views` makes every random number; `apply_views` is a pure function of images and draws.
Distributions and arithmetic are those of torchvision's RandomResizedCrop (bilinear, antialiased),
RandomHorizontalFlip, ColorJitter and RandomGrayscale on float images.
"""
import math
from typing import NamedTuple

import torch

MEAN = (0.4914, 0.4822, 0.4465)  # of the CIFAR-10 training pixels, per channel, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)
SIZE = 32                      # of the views, in pixels
SCALE = (0.2, 1.0)             # share of the image area in a crop
RATIO = (3 / 4, 4 / 3)         # width / height of a crop
FLIP_P = 0.5
JITTER_P = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
GRAY_P = 0.2
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of these operations
CROP_ATTEMPTS = 10             # as in RandomResizedCrop.get_params
LUMA = (0.2989, 0.587, 0.114)  # as in rgb_to_grayscale
CPU_CHUNK = 512 * SIZE**2      # pixels at a time on the CPU: 6 MB stay in the cache


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
        """The Draws of the images selected by `index`, a slice or an index tensor."""
        return Draws(*(field[index] for field in self))

    def hue_slots(self):
        """Position of the hue shift in each image's order: int64 [n] in 0 .. 3."""
        return (self.order == HUE).int().argmax(dim=1)


def epoch_generator(seed, epoch, device):
    """The generator of everything random in an epoch, counted from 0."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def view_sizes(schedule, epochs):
    """Size of the views in each epoch, a list of int. schedule: '32', or sizes with their shares of
    the epochs, in order: '16:0.5,24:0.25,32:0.25'. Raises ValueError for anything else."""
    parts = schedule if ":" in schedule else f"{schedule}:1"
    try:
        pairs = [part.split(":") for part in parts.split(",")]
        sizes, shares = [int(size) for size, _ in pairs], [float(share) for _, share in pairs]
        if not (min(sizes) >= 8 and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6):
            raise ValueError
    except ValueError:
        raise ValueError(f"--view_size {schedule}: not sizes of at least 8 with shares that sum to 1") from None
    ends = [round(epochs * sum(shares[:i + 1])) for i in range(len(shares))]
    return [sizes[sum(epoch >= end for end in ends)] for epoch in range(epochs)]


def uniform(low, high, shape, generator):
    """Uniform float32 random numbers in [low, high), on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def draw_views(n, generator, height=SIZE, width=SIZE, scale=SCALE):
    """Draw one view of each of n images of height x width pixels: Draws with n rows, on the generator's
    device. scale: bounds of the crop's share of the image area. As in RandomResizedCrop.get_params, the
    first of ten attempts that fits into the image counts, else the central crop of the nearest ratio."""
    area = height * width * uniform(*scale, (n, CROP_ATTEMPTS), generator)
    ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), (n, CROP_ATTEMPTS), generator).exp()
    sides = torch.stack((area / ratio, area * ratio)).sqrt().round()      # height and width [2, n, 10]
    central = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    image, central = sides.new_tensor(((height, width), central))[:, :, None]    # [2, 1] each
    fits = ((sides > 0) & (sides <= image[:, None])).all(dim=0)           # [n, 10]
    first = fits.int().argmax(dim=1, keepdim=True).expand(2, n, 1)
    sides = torch.where(fits.any(dim=1), sides.gather(2, first)[:, :, 0], central)
    free = image - sides                                                  # [2, n]
    # The minimum: a float32 product can round up to the bound itself.
    drawn = torch.minimum((uniform(0, 1, (n, 2), generator).T * (free + 1)).floor(), free)
    corner = torch.where(fits.any(dim=1), drawn, (free / 2).floor())
    flip, jitter = (uniform(0, 1, (n,), generator) < p for p in (FLIP_P, JITTER_P))
    order = uniform(0, 1, (n, 4), generator).argsort(dim=1)
    strength, center = torch.tensor((JITTER, (1.0, 1.0, 1.0, 0.0)), device=generator.device)
    factors = center + strength * uniform(-1, 1, (n, 4), generator)
    gray = uniform(0, 1, (n,), generator) < GRAY_P
    return Draws(*corner.long(), *sides.long(), flip, jitter, order, factors, gray)


def eager_on_cpu(x):
    """Whether operations run one by one on the CPU, where one larger operation saves passes over
    memory. Compiled and on CUDA, plain arithmetic fuses best."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pixel_centers(start, length, size, flip=None):
    """Centers of the output pixels, in input pixels, if start .. start + length is resized to `size`:
    float32 [B, size], mirrored where flip (bool [B]), clamped to the crop's outer pixel centers."""
    start, length = start.float()[:, None], length.float()[:, None]
    center = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        center = torch.where(flip[:, None], size - center, center)
    return (start + center * (length / size)).clamp(start + 0.5, start + length - 0.5)


def resampling_weights(centers, start, length, size_in):
    """Weights [B, size, size_in] that resize pixels start .. start + length of a line to `centers`:
    bilinear, antialiased where it shrinks, and of sum 1 inside the crop, as in PIL."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    pixel = torch.arange(size_in, device=start.device) + 0.5
    slope = -1 / (length / centers.shape[1]).clamp(min=1)                 # [B, 1, 1]
    weight = (pixel - centers[:, :, None]).abs_().mul_(slope).add_(1).clamp_(min=0)
    weight.mul_((pixel > start) & (pixel < start + length))
    return weight.div_(weight.sum(dim=2, keepdim=True))


def crop_flip(images, draws, size=SIZE):
    """Crop, resize, flip: uint8 [B, 3, H, W] -> float32 [B, 3, size, size], rounded [0, 1]."""
    b, c, h, w = images.shape
    x = pixel_centers(draws.left, draws.width, size, draws.flip)
    y = pixel_centers(draws.top, draws.height, size)
    columns = resampling_weights(x, draws.left, draws.width, w)
    rows = resampling_weights(y, draws.top, draws.height, h)
    x = torch.bmm(images.float().view(b, c * h, w), columns.transpose(1, 2))     # [B, 3 * H, size]
    return torch.matmul(rows[:, None] / 255, x.view(b, c, h, size))


def apply_matrix(x, matrix, bias, out=None):
    """Apply a color matrix [B, 3, 3] and a bias [B, 3] to each image: float [B, 3, H, W] -> same.
    out: contiguous, on the CPU only."""
    if eager_on_cpu(x):
        out = torch.empty_like(x) if out is None else out
        torch.baddbmm(bias[:, :, None], matrix, x.flatten(2), out=out.flatten(2))
        return out
    matrix, bias, (r, g, b) = matrix[..., None, None], bias[..., None, None], x.unbind(1)
    return torch.stack([matrix[:, i, 0] * r + matrix[:, i, 1] * g + matrix[:, i, 2] * b + bias[:, i]
                        for i in range(3)], dim=1)


def color_matrices(draws):
    """Brightness, contrast and saturation of each image, in its order, as three color matrices
    [3, B, 3, 3], and how much of the mean luma each adds [3, B]: factor * x + (1 - factor) * other, where
    other is black, the mean luma, or the luma. Without jitter the identity, bit for bit.
    Grayscale and normalization, which come last, as one matrix [B, 3, 3] and a bias [B, 3]."""
    device = draws.order.device
    # Numbers are filled in on the device: to copy them there would make the host wait.
    luma = torch.stack([torch.full((3,), share, device=device) for share in LUMA], dim=1)
    identity, i = torch.eye(3, device=device), torch.arange(3, device=device)[:, None]
    slot = i + (draws.hue_slots() <= i)                                  # skips the hue shift
    operation = draws.order.T.gather(0, slot)                            # [3, B]
    factor = torch.where(draws.jitter, draws.factors.T.gather(0, operation), 1.0)
    of_luma, of_mean = ((1 - factor) * (operation == other) for other in (SATURATION, CONTRAST))
    blends = factor[..., None, None] * identity + of_luma[..., None, None] * luma
    gray = torch.where(draws.gray[:, None, None], luma, identity)
    last = torch.stack([gray[:, i] / STD[i] for i in range(3)], dim=1)
    bias = [torch.full(draws.gray.shape, -MEAN[i] / STD[i], device=device) for i in range(3)]
    return blends, of_mean, last, torch.stack(bias, dim=1)


def blend(x, matrix, of_mean):
    """Apply a blend to each image: x [B, 3, H, W], matrix [B, 3, 3], of_mean [B]; in [0, 1]."""
    r, g, b = x.mean(dim=(2, 3)).unbind(1)
    mean_luma = LUMA[0] * r + LUMA[1] * g + LUMA[2] * b
    return apply_matrix(x, matrix, (of_mean * mean_luma)[:, None].expand(-1, 3)).clamp_(0, 1)


def shift_hue(x, turns):
    """Shift the hue of float images [B, 3, H, W] in [0, 1] by turns [B] of the color circle. As in HSV,
    the largest and smallest channel values stay. In sixths of the circle from cyan, the hue is
    2 + (r - g - b + smallest) / chroma, negative where green exceeds blue. From smallest to largest,
    red is then at |hue| - 1, green at 2 - |hue + 1|, blue at 2 - |hue - 1|, clamped to [0, 1]."""
    r, g, b = x.split(1, dim=1)
    smallest = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b) - smallest
    hue = (r - g).sub_(b - smallest).div_(chroma.clamp(min=1e-12)).add_(2)  # gray pixels: 2, no effect
    hue = torch.copysign(hue, b - g).add_(6 * turns.view(-1, 1, 1, 1))
    hue = torch.sub(hue, (hue * (1 / 6)).round_(), alpha=6)
    red, green = hue.abs().sub_(1), torch.rsub((hue + 1).abs_(), 2)
    position = torch.cat([red, green, torch.rsub((hue - 1).abs_(), 2)], dim=1)
    return torch.addcmul(smallest, chroma, position.clamp_(0, 1))


def normalize(images, mean=MEAN, std=STD):
    """Normalize images: uint8, or float in [0, 1], [B, 3, H, W] -> float32 [B, 3, H, W]."""
    if images.dtype == torch.uint8:
        images = images / 255
    # Plain numbers, channel by channel: tensors of them would be copied to the device in every step.
    return torch.cat([(images[:, i:i + 1] - mean[i]) / std[i] for i in range(3)], dim=1)


def denormalize(views):
    """The inverse of `normalize`: float [B, 3, H, W] -> float images in [0, 1]."""
    return torch.cat([views[:, i:i + 1] * STD[i] + MEAN[i] for i in range(3)], dim=1).clamp(0, 1)


def make_views(images, draws, size=SIZE):
    """The views of each image, one for each of the Draws in the list `draws`: a tuple of
    [B, 3, size, size]. Made together: fewer operations, which is what small batches wait for."""
    together = Draws(*(torch.cat(fields) for fields in zip(*draws)))
    return apply_views(torch.cat([images] * len(draws)), together, size).chunk(len(draws))


def apply_views(images, draws, size=SIZE):
    """One view of each image: uint8 [B, 3, H, W] and Draws of B rows, on one device -> normalized
    float32 [B, 3, size, size]. Without synchronization on CUDA; torch.compile takes it whole."""
    if eager_on_cpu(images):
        return apply_views_cpu(images, draws, size)
    blends, of_mean, last, bias = color_matrices(draws)
    slots, identity = draws.hue_slots(), torch.eye(3, device=images.device)
    x = crop_flip(images, draws, size)
    # Three blends before the hue shift and three after it cover all 24 orders: an image takes each
    # of its three on one side, and the identity on the other.
    for after_hue in (False, True):
        if after_hue:
            x = shift_hue(x, torch.where(draws.jitter, draws.factors[:, HUE], 0.0))
        for i in range(3):
            mine = i >= slots if after_hue else i < slots
            x = blend(x, torch.where(mine[:, None, None], blends[i], identity), of_mean[i] * mine)
    return apply_matrix(x, last, bias)


def apply_views_cpu(images, draws, size):
    """The same on the CPU, several times faster: chunks that stay in the cache, each sorted by the
    slot of the hue shift, so that every image takes only the three blends that it needs."""
    slots = torch.where(draws.jitter, draws.hue_slots(), 4)  # 4: no jitter
    views = torch.empty(len(images), 3, size, size)
    at_once = max(1, CPU_CHUNK // max(size, SIZE, *images.shape[2:])**2)
    for rows, into in zip(torch.arange(len(images)).split(at_once), views.split(at_once)):
        rows, first = rows[slots[rows].argsort()], 0
        chunk = draws.rows(rows)
        blends, of_mean, last, bias = color_matrices(chunk)
        crops = crop_flip(images.index_select(0, rows), chunk, size)
        made = torch.empty_like(crops)
        for slot, count in enumerate(slots[rows].bincount().tolist()):
            mine = slice(first, first + count)
            x, first = crops[mine], first + count
            for i in range(4 if slot < 4 else 0):
                if i == slot:
                    x = shift_hue(x, chunk.factors[mine, HUE])
                if i < 3:
                    x = blend(x, blends[i, mine], of_mean[i, mine])
            apply_matrix(x, last[mine], bias[mine], out=made[mine])
        torch.index_select(made, 0, rows.argsort(), out=into)  # much faster than index_copy_
    return views
