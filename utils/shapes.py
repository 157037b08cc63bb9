"""The built-in data set: ten classes of drawn figures in 32x32 color pictures, generated from a seed."""
import math

import numpy as np

CLASSES = ("disc", "ring", "square", "frame", "triangle", "plus", "star", "stripes", "dots", "crescent")
SIZE = 32
CHUNK = 1000             # pictures drawn from one random state; part of what a seed means

RADIUS = (8.0, 13.0)     # of the figures, in pixels
SHIFT = 5.0              # largest distance of a center from the picture's, in pixels, per axis
TURN = math.pi           # largest rotation to either side, in radians
CONTRAST = (0.25, 0.45)  # between figure and ground, either of which can be the lighter one
TINT = 0.05              # largest deviation of a channel from gray, of figure and ground each
GRADIENT = 0.10          # largest slope of the ground's brightness, from center to edge
NOISE = 0.04             # std of the pixels' noise


def box(u, v, half_width, half_height):
    """Signed distance to a box at the origin."""
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def disc(u, v):
    return np.hypot(u, v) - 0.85


def ring(u, v):
    return np.abs(np.hypot(u, v) - 0.74) - 0.2


def square(u, v):
    return box(u, v, 0.78, 0.78)


def frame(u, v):
    return np.abs(box(u, v, 0.68, 0.68)) - 0.18


def triangle(u, v):
    return np.maximum(v - 0.5, 0.866 * np.abs(u) - 0.5 * v - 0.5)


def plus(u, v):
    return np.minimum(box(u, v, 0.95, 0.27), box(u, v, 0.27, 0.95))


def star(u, v):
    # Folding the plane into one tenth of a turn leaves a single edge, from a tip to its neighboring notch.
    angle = np.abs((np.arctan2(v, u) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
    r = np.hypot(u, v)
    notch_u, notch_v = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    length = math.hypot(1.05 - notch_u, notch_v)
    return ((r * np.cos(angle) - 1.05) * notch_v + r * np.sin(angle) * (1.05 - notch_u)) / length


def stripes(u, v):
    bars = np.abs((u / 0.56 + 0.5) % 1 - 0.5) * 0.56 - 0.14
    return np.maximum(bars, box(u, v, 0.84, 0.84))


def dots(u, v):
    pitch = 0.6
    cell_u = u - pitch * np.clip(np.round(u / pitch), -1, 1)
    cell_v = v - pitch * np.clip(np.round(v / pitch), -1, 1)
    return np.hypot(cell_u, cell_v) - 0.2


def crescent(u, v):
    return np.maximum(np.hypot(u, v) - 0.9, 0.7 - np.hypot(u - 0.42, v))


FIGURES = (disc, ring, square, frame, triangle, plus, star, stripes, dots, crescent)


def draw_chunk(rng):
    """CHUNK pictures: images uint8 [CHUNK, SIZE, SIZE, 3], labels int64 [CHUNK]."""
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (CHUNK, *(shape or (1, 1)))).astype(np.float32)

    labels = rng.integers(len(CLASSES), size=CHUNK)
    radius = uniform(*RADIUS)
    turn = uniform(-TURN, TURN)
    center_x, center_y = uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    dx, dy = (x - center_x) / radius, (y - center_y) / radius
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx

    cover = np.empty((CHUNK, SIZE, SIZE), np.float32)
    for label, figure in enumerate(FIGURES):
        rows = labels == label
        cover[rows] = np.clip(0.5 - figure(u[rows], v[rows]) * radius[rows], 0, 1)

    contrast = uniform(*CONTRAST) * np.where(uniform(0, 1) < 0.5, -1, 1)
    ground = uniform(0.4, 0.6) - contrast / 2
    slope_x, slope_y = uniform(-GRADIENT, GRADIENT), uniform(-GRADIENT, GRADIENT)
    gray = ground + contrast * cover + (slope_x * x + slope_y * y) / (SIZE / 2)
    tint = uniform(-TINT, TINT, 1, 1, 3) * cover[..., None] + uniform(-TINT, TINT, 1, 1, 3) * (1 - cover[..., None])
    noise = NOISE * rng.standard_normal((CHUNK, SIZE, SIZE, 3), np.float32)
    images = gray[..., None] + tint + noise
    return np.clip(np.rint(images * 255), 0, 255).astype(np.uint8), labels


def draw_shapes(n, seed):
    """Draw n pictures from a seed: images uint8 [n, 32, 32, 3] (HWC), labels int64 [n] in 0 .. 9.

    The classes come in random order. The first m pictures of draw_shapes(n, seed) are draw_shapes(m, seed).
    """
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(n, np.int64)
    for i, start in enumerate(range(0, n, CHUNK)):
        chunk_images, chunk_labels = draw_chunk(np.random.default_rng((seed, i)))
        images[start:start + CHUNK] = chunk_images[:n - start]
        labels[start:start + CHUNK] = chunk_labels[:n - start]
    return images, labels
