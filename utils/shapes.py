"""The built-in data set: ten classes of drawn shapes in 32x32 color images, generated from a seed. Two
views share little but the class: the same muted colors in all images, a rotation and size for each
shape, light and dark shapes in turn, and so many that each crop shows some."""
import math

import numpy as np

from utils.cli import bar

SIZE = 32
CHUNK = 1000                  # images drawn from one random state; part of what a seed means
PITCH = (13.0, 17.0)          # from one shape to the next, in pixels
FILL = (0.38, 0.48)           # a shape's radius over the pitch
CELLS = 4                     # per axis; even, so that light and dark alternate
CONTRAST = (0.36, 0.3, 0.24)  # of a shape, lighter or darker, with the gray ground
NOISE = 0.04                  # std of the pixels' noise


def box(u, v, half_width, half_height):
    """Signed distance to a box at the origin."""
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def star(u, v):
    """Folded into a tenth of a turn, one edge is left, from a tip to the next notch."""
    angle = np.abs((np.arctan2(v, u) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
    r, notch_u, notch_v = np.hypot(u, v), 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    distance = (r * np.cos(angle) - 1.05) * notch_v + r * np.sin(angle) * (1.05 - notch_u)
    return distance / math.hypot(1.05 - notch_u, notch_v)


def dots(u, v):
    u, v = (each - 0.6 * np.clip(np.round(each / 0.6), -1, 1) for each in (u, v))
    return np.hypot(u, v) - 0.2


SHAPES = {  # signed distances, negative inside, for u and v from -1 to 1
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.74) - 0.2,
    "square": lambda u, v: box(u, v, 0.78, 0.78),
    "frame": lambda u, v: np.abs(box(u, v, 0.68, 0.68)) - 0.18,
    "triangle": lambda u, v: np.maximum(v - 0.5, 0.866 * np.abs(u) - 0.5 * v - 0.5),
    "plus": lambda u, v: np.minimum(box(u, v, 0.95, 0.27), box(u, v, 0.27, 0.95)),
    "star": star,
    "stripes": lambda u, v: np.maximum(np.abs((u / 0.56 + 0.5) % 1 - 0.5) * 0.56 - 0.14, box(u, v, 0.84, 0.84)),
    "dots": dots,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.7 - np.hypot(u - 0.42, v))}
CLASSES = tuple(SHAPES)


def draw_chunk(rng):
    """Draw images uint8 [CHUNK, SIZE, SIZE, 3] and labels int64 [CHUNK]."""
    def per_image(low, high, *shape):
        return rng.uniform(low, high, (CHUNK, *shape)).astype(np.float32)
    labels = rng.integers(len(CLASSES), size=CHUNK)
    # A rotated and shifted grid of cells: s and t run from -0.5 to 0.5 in each.
    pitch, turn = per_image(*PITCH, 1, 1), per_image(-math.pi, math.pi, 1, 1)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    s = (np.cos(turn) * x + np.sin(turn) * y) / pitch + per_image(0, CELLS, 1, 1)
    t = (np.cos(turn) * y - np.sin(turn) * x) / pitch + per_image(0, CELLS, 1, 1)
    column, row = np.floor(s), np.floor(t)
    s, t = s - column - 0.5, t - row - 0.5
    cell = (row % CELLS * CELLS + column % CELLS).astype(np.int64)
    def per_cell(low, high):
        return per_image(low, high, CELLS * CELLS)[np.arange(CHUNK)[:, None, None], cell]
    # A rotated and scaled shape in each cell: u, v run from -1 to 1 over it.
    turn, fill = per_cell(-math.pi, math.pi), per_cell(*FILL)
    u = (np.cos(turn) * s + np.sin(turn) * t) / fill
    v = (np.cos(turn) * t - np.sin(turn) * s) / fill
    radius, cover = fill * pitch, np.empty((CHUNK, SIZE, SIZE), np.float32)
    for label, distance in enumerate(SHAPES.values()):
        rows = labels == label
        cover[rows] = np.clip(0.5 - distance(u[rows], v[rows]) * radius[rows], 0, 1)
    sign = 1 - 2 * ((row + column) % 2)
    color = np.float32(0.5) + (sign * cover)[..., None] * np.float32(CONTRAST)
    images = color + NOISE * rng.standard_normal((CHUNK, SIZE, SIZE, 3), np.float32)
    return np.clip(np.rint(images * 255), 0, 255).astype(np.uint8), labels


def draw_shapes(n, seed):
    """Draw n images from a seed: uint8 [n, 32, 32, 3], and labels int64 [n]; the first m are those of n = m."""
    numbers = bar(range(math.ceil(n / CHUNK)), desc="shapes", leave=False, delay=2)
    chunks = [draw_chunk(np.random.default_rng((seed, i))) for i in numbers]
    images, labels = (np.concatenate(parts)[:n] for parts in zip(*chunks))
    return images, labels
