"""SimSiam's augmentation for whole batches, on any device (paper, appendix D).

`draw_views` makes every random number, `apply_views` is a pure function of pictures and draws. Each
image has its own crop, flip, jitter factors, jitter order and grayscale. The distributions and the
arithmetic are those of torchvision's RandomResizedCrop (bilinear, antialiased), RandomHorizontalFlip,
ColorJitter and RandomGrayscale on float images.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

MEAN = (0.4914, 0.4822, 0.4465)  # of the CIFAR-10 training pixels, per channel, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)

SIZE = 32
SCALE = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)
FLIP_P = 0.5
JITTER_P = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
GRAY_P = 0.2
SIGMA = (0.1, 2.0)  # pixels, of the Gaussian blur that ImageNet's views have and CIFAR's do not

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of the jitter's operations
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop.get_params
LUMA = (0.2989, 0.587, 0.114)  # as in torchvision's rgb_to_grayscale
CPU_CHUNK = 512  # pictures at a time: 6 MB


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
    sigma: torch.Tensor    # float32 [n]: of the blur, in pixels; 0 for none

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
    """Draw one view of each of n pictures, without blur.

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
        sigma=torch.zeros(n, device=generator.device),
    )


def draw_blur(draws, generator, p):
    """The Draws with blur of a random width in a view of each picture with probability p."""
    n = len(draws.sigma)
    blurred = uniform(0, 1, (n,), generator) < p
    return draws._replace(sigma=torch.where(blurred, uniform(*SIGMA, (n,), generator), 0.0))


def normalize(images, mean=MEAN, std=STD):
    """Pictures without augmentation: uint8 [B, 3, H, W] or float in [0, 1] -> float32, by each channel's mean and std."""
    if images.dtype == torch.uint8:
        images = images / 255
    # Plain numbers, channel by channel: tensors of them would be copied to the device in every step.
    return torch.cat([(images[:, i:i + 1] - mean[i]) / std[i] for i in range(3)], dim=1)


def denormalize(views):
    """The opposite of `normalize` by MEAN and STD: normalized views float [B, 3, H, W] -> pictures in [0, 1]."""
    return torch.cat([views[:, i:i + 1] * STD[i] + MEAN[i] for i in range(3)], dim=1).clamp(0, 1)


def in_eager_cpu(x):
    """Whether operations run one by one on the CPU. On CUDA, and when compiled, they fuse best where they are plain
    arithmetic; on a CPU one by one, a single operation for much of it instead saves many passes over memory."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pixel_centers(start, length, flip=None):
    """Where the centers of the output's SIZE pixels lie in a line of pixels, from its beginning, if pixels
    start .. start + length become those SIZE: float32 [B, SIZE]. Where flip (bool [B]) is true they are mirrored."""
    out = torch.arange(SIZE, device=start.device) + 0.5
    if flip is not None:
        out = torch.where(flip[:, None], SIZE - out, out)
    return start.float()[:, None] + out.expand(len(start), SIZE) * (length.float()[:, None] / SIZE)


def resampling_weights(start, length, size_in, flip=None):
    """Weights [B, SIZE, size_in] that resize pixels start .. start + length of a line to SIZE pixels.

    Bilinear, antialiased where it shrinks. Pixels outside the crop have weight 0 and the rest is
    scaled to sum 1, as PIL does. Where flip (bool [B]) is true the output is mirrored.
    """
    center = pixel_centers(start, length, flip)[:, :, None]               # [B, SIZE, 1]
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    pixel = torch.arange(size_in, device=start.device) + 0.5              # [size_in]
    weight = torch.rsub((pixel - center).abs_().mul_(1 / (length / SIZE).clamp(min=1)), 1).clamp_(min=0)
    weight.mul_((pixel > start) & (pixel < start + length))
    return weight.div_(weight.sum(dim=2, keepdim=True))


def sampling_places(start, length, size_in, flip=None):
    """What resampling_weights says where nothing shrinks, as places for F.grid_sample, for which a line reaches from -1
    to 1: [B, SIZE]. None is beyond the center of the crop's first or last pixel, so that no pixel outside counts."""
    center = pixel_centers(start, length, flip)
    center = center.clamp(start[:, None] + 0.5, (start + length)[:, None] - 0.5)
    return center * (2 / size_in) - 1


def crop_flip(images, draws):
    """Crop, resize and flip: uint8 [B, 3, H, W] -> float32 [B, 3, SIZE, SIZE] in [0, 1], but for rounding."""
    b, c, h, w = images.shape
    if in_eager_cpu(images) and h <= SIZE and w <= SIZE:
        # No crop shrinks: each pixel lies between two by two of the picture's. Two thirds of the products' time.
        places = torch.empty(b, SIZE, SIZE, 2)
        places[..., 0] = sampling_places(draws.left, draws.width, w, draws.flip)[:, None, :]
        places[..., 1] = sampling_places(draws.top, draws.height, h)[:, :, None]
        return F.grid_sample(images.float().mul_(1 / 255), places, padding_mode="border", align_corners=False)
    rows = resampling_weights(draws.top, draws.height, h)
    columns = resampling_weights(draws.left, draws.width, w, draws.flip)
    x = torch.bmm(images.float().view(b, c * h, w), columns.transpose(1, 2))     # [B, 3 * H, SIZE]
    return torch.matmul(rows[:, None] / 255, x.view(b, c, h, SIZE))


def change_colors(x, matrix, bias, out=None):
    """A color matrix for each picture: x float [B, 3, H, W], matrix [B, 3, 3], bias [B, 3] -> [B, 3, H, W].
    out: where to put it, contiguous, on the CPU only."""
    if in_eager_cpu(x):
        out = torch.empty_like(x) if out is None else out
        torch.baddbmm(bias[:, :, None], matrix, x.flatten(2), out=out.flatten(2))
        return out
    matrix, bias = matrix[..., None, None], bias[..., None, None]
    r, g, b = x.unbind(1)
    return torch.stack([
        matrix[:, i, 0] * r + matrix[:, i, 1] * g + matrix[:, i, 2] * b + bias[:, i] for i in range(3)
    ], dim=1)


def mean_luma(x):
    """The luma of float pictures [B, 3, H, W], as torchvision's rgb_to_grayscale, averaged over the picture: [B]."""
    means = x.mean(dim=(2, 3))
    return LUMA[0] * means[:, 0] + LUMA[1] * means[:, 1] + LUMA[2] * means[:, 2]


def luma_matrix(device):
    """The matrix [3, 3] that makes every channel the luma."""
    return torch.stack([torch.full((3,), share, device=device) for share in LUMA], dim=1)


def blends(draws):
    """Brightness, contrast and saturation of each picture, in its order: three color matrices [3, B, 3, 3] and how
    much of the picture's mean luma each adds [3, B].

    All three are factor * x + (1 - factor) * other: the other is black, the mean luma, or the luma. Where the
    colors are not jittered they leave x as it is, bit for bit.
    """
    device = draws.order.device
    i = torch.arange(3, device=device)[:, None]
    place = i + (hue_slots(draws) <= i)                                         # in the order, without the hue shift
    operation = draws.order.T.gather(0, place)                                  # [3, B]
    factor = torch.where(draws.jitter, draws.factors.T.gather(0, operation), 1.0)
    of_luma, of_mean = ((1 - factor) * (operation == other) for other in (SATURATION, CONTRAST))
    eye = torch.eye(3, device=device)
    return factor[..., None, None] * eye + of_luma[..., None, None] * luma_matrix(device), of_mean


def blend(x, matrix, of_mean):
    """One of the blends for each picture: x [B, 3, H, W], matrix [B, 3, 3], of_mean [B]; clamped to [0, 1]."""
    bias = (of_mean * mean_luma(x))[:, None].expand(-1, 3)
    return change_colors(x, matrix, bias).clamp_(0, 1)


def shift_hue(x, turns):
    """Turn the hue of float pictures [B, 3, H, W] in [0, 1] by turns [B] of the color circle.

    HSV exactly: the largest and the smallest channel value stay. In sixths of the circle and counted from cyan, the
    hue is 2 + (r - g - b + smallest) / chroma towards blue, or as much the other way where green exceeds blue. Red
    then stands at clamp(|hue| - 1, 0, 1) of the way from the smallest to the largest, green at
    clamp(2 - |hue + 1|, 0, 1), blue at clamp(2 - |hue - 1|, 0, 1).
    """
    r, g, b = x.split(1, dim=1)
    smallest = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b) - smallest
    hue = (r - g).sub_(b - smallest).div_(chroma.clamp(min=1e-12)).add_(2)  # gray pixels: 2, and no chroma to show it
    hue = torch.copysign(hue, b - g).add_(6 * turns.view(-1, 1, 1, 1))
    hue = torch.sub(hue, (hue * (1 / 6)).round_(), alpha=6)
    position = torch.cat([
        hue.abs().sub_(1), torch.rsub((hue + 1).abs_(), 2), torch.rsub((hue - 1).abs_(), 2),
    ], dim=1)
    return torch.addcmul(smallest, chroma, position.clamp_(0, 1))


def hue_turns(draws):
    """By how much of the color circle each picture's hue turns: [B]."""
    return torch.where(draws.jitter, draws.factors[:, HUE], 0.0)


def hue_slots(draws):
    """Where in its order each picture shifts the hue: int64 [B] in 0 .. 3."""
    return (draws.order == HUE).int().argmax(dim=1)


def color_jitter(x, draws):
    """ColorJitter with probability, every picture in its own order: float [B, 3, H, W] in [0, 1] -> same.

    Three blends before the hue shift and three after it hold all 24 orders: a picture takes each of its three
    at the side of the hue shift where it belongs and passes the other side unchanged.
    """
    matrices, of_mean = blends(draws)
    slots = hue_slots(draws)
    unchanged = torch.eye(3, device=x.device)

    def side(x, takes):
        for i in range(3):
            mine = takes(i)
            x = blend(x, torch.where(mine[:, None, None], matrices[i], unchanged), of_mean[i] * mine)
        return x

    x = side(x, lambda i: i < slots)
    x = shift_hue(x, hue_turns(draws))
    return side(x, lambda i: i >= slots)


def finishing(draws):
    """Grayscale with probability, then normalization by MEAN and STD: color matrices [B, 3, 3] and biases [B, 3]."""
    device = draws.gray.device
    colors = torch.where(draws.gray[:, None, None], luma_matrix(device), torch.eye(3, device=device))
    matrix = torch.stack([colors[:, i] / STD[i] for i in range(3)], dim=1)
    bias = torch.stack([torch.full(draws.gray.shape, -MEAN[i] / STD[i], device=device) for i in range(3)], dim=1)
    return matrix, bias


def blur(x, sigma):
    """Gaussian blur of each picture or view: x float [B, 3, H, W], sigma [B] in pixels, 0 for none -> same.

    torchvision's gaussian_blur with a kernel of 3 pixels: a tenth of a CIFAR picture's side, as SimCLR has it.
    """
    side = torch.exp(-0.5 / sigma**2).view(-1, 1, 1, 1)  # the kernel is side, 1, side, before it is scaled to sum 1
    side, middle = side / (1 + 2 * side), 1 / (1 + 2 * side)
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = middle * x[:, :, 1:-1] + side * (x[:, :, :-2] + x[:, :, 2:])
    return middle * x[:, :, :, 1:-1] + side * (x[:, :, :, :-2] + x[:, :, :, 2:])


def apply_views(images, draws):
    """Make the views: uint8 pictures [B, 3, H, W] and their Draws (B rows, same device) -> normalized
    float32 views [B, 3, 32, 32]. Pure, batched, without host synchronization; torch.compile takes it whole.
    Blur is not in it: `blurred_views`."""
    if in_eager_cpu(images):
        return apply_views_cpu(images, draws)
    return change_colors(color_jitter(crop_flip(images, draws), draws), *finishing(draws))


def blurred_views(images, draws):
    """apply_views, and then the blur, which may well come after the normalization: it is linear and keeps a constant."""
    return blur(apply_views(images, draws), draws.sigma)


def apply_two_views(images, draws1, draws2, make_views=apply_views):
    """Both views of each picture, from their Draws: two tensors as make_views makes them, apply_views or blurred_views.
    Making them together takes half as many operations, which is what small batches wait for."""
    draws = Draws(*(torch.cat(fields) for fields in zip(draws1, draws2)))
    return make_views(torch.cat((images, images)), draws).chunk(2)


def apply_views_cpu(images, draws):
    """The same for the CPU, several times as fast: some hundred pictures at a time stay in the cache from one operation
    to the next, and those that shift the hue in the same slot go together through the three blends that they need."""
    unjittered = 4
    slots = torch.where(draws.jitter, hue_slots(draws), unjittered)
    views = torch.empty(len(images), 3, SIZE, SIZE)
    for start in range(0, len(images), CPU_CHUNK):
        chunk = slice(start, start + CPU_CHUNK)
        order = slots[chunk].argsort()
        made = make_sorted_views(images[chunk].index_select(0, order), draws.rows(chunk).rows(order), slots[chunk].bincount())
        torch.index_select(made, 0, order.argsort(), out=views[chunk])
    return views


def make_sorted_views(images, draws, counts):
    """The views of pictures in the order of their slots, the first counts[0] with the hue shift in slot 0 and so on;
    slot 4 stands for no jitter."""
    matrices, of_mean = blends(draws)
    turns = hue_turns(draws)
    matrix, bias = finishing(draws)
    crops = crop_flip(images, draws)
    views = torch.empty_like(crops)
    start = 0
    for slot, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        x = crops[rows]
        if slot < 4:
            for i in range(slot):
                x = blend(x, matrices[i, rows], of_mean[i, rows])
            x = shift_hue(x, turns[rows])
            for i in range(slot, 3):
                x = blend(x, matrices[i, rows], of_mean[i, rows])
        change_colors(x, matrix[rows], bias[rows], out=views[rows])
    return views
