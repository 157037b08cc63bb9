"""The input, to be looked at: pictures and their two views, with what was drawn written under each."""
from matplotlib.patches import Rectangle

from utils.augment import denormalize
from utils.style import COLORS, DASHES, drawing

COLUMNS = 6
LEFT, SIDE, GAP, WORDS = 0.25, 1.25, 0.14, 0.82  # inches: the margin, a picture, between them, the words under a view
NAMES = ("brightness", "contrast", "saturation", "hue")  # by the numbers of utils.augment


def words_of(draws, row):
    """What was drawn for the view in this row of the Draws, in lines, the jitter in its order."""
    top, left, height, width = (int(field[row]) for field in (draws.top, draws.left, draws.height, draws.width))
    lines = [f"crop {height}×{width} at ({top}, {left})" + (", flip" if draws.flip[row] else "")]
    if draws.jitter[row]:
        for number in draws.order[row].tolist():
            factor = float(draws.factors[row, number])
            lines.append(f"hue {360 * factor:+.0f}°".replace("-", "−") if NAMES[number] == "hue" else f"{NAMES[number]} ×{factor:.2f}")
    else:
        lines.append("no jitter")
    if draws.gray[row]:
        lines.append("gray")
    if draws.sigma[row]:
        lines.append(f"blur σ {float(draws.sigma[row]):.2f}")
    return "\n".join(lines)


def to_pixels(views):
    """Normalized views as pictures, numpy float [B, H, W, 3] in [0, 1]."""
    return denormalize(views).permute(0, 2, 3, 1).cpu().numpy()


def plot_views(folder, images, views1, views2, draws1, draws2):
    """Make views.png and views.svg: the first pictures with the crops' outlines, and under them two views of each with
    their draws.

    images: uint8 [B, 3, H, W]; views1, views2: normalized views float [B, 3, 32, 32] of them, draws1, draws2 their Draws.
    """
    count = min(COLUMNS, len(images))
    rows = (images[:count].permute(0, 2, 3, 1).cpu().numpy(), to_pixels(views1[:count]), to_pixels(views2[:count]))
    width, height = LEFT + count * (SIDE + GAP), 3 * SIDE + 2 * WORDS + 2 * GAP
    tops = (height - GAP / 2, height - SIDE - 1.5 * GAP, height - 2 * SIDE - WORDS - 1.5 * GAP)
    with drawing(folder, "views", width, height, layout=None) as figure:
        for row, (name, pictures) in enumerate(zip(("picture", "view 1", "view 2"), rows)):
            for column, pixels in enumerate(pictures):
                corner = (LEFT + column * (SIDE + GAP), tops[row] - SIDE)
                axes = figure.add_axes((corner[0] / width, corner[1] / height, SIDE / width, SIDE / height), xticks=[], yticks=[])
                axes.imshow(pixels)
                axes.spines[:].set_visible(False)
                if column == 0:
                    axes.set_ylabel(name)
                if row == 0:
                    for color, dash, draws in zip(COLORS, DASHES, (draws1, draws2)):
                        outline(axes, draws, column, color, dash)
                else:
                    axes.spines[:].set(visible=True, color=COLORS[row - 1], linewidth=2, linestyle=DASHES[row - 1])
                    words = words_of((draws1, draws2)[row - 1], column)
                    axes.annotate(words, (0, 0), (0, -3), xycoords="axes fraction", textcoords="offset points", va="top", fontsize=7)


def outline(axes, draws, row, color, dash):
    """Draw the edge of the crop in this row of the Draws over its picture, on white that shows on any picture."""
    corner = (int(draws.left[row]) - 0.5, int(draws.top[row]) - 0.5)
    for look in ({"edgecolor": "white", "linewidth": 3}, {"edgecolor": color, "linewidth": 2, "linestyle": dash}):
        axes.add_patch(Rectangle(corner, int(draws.width[row]), int(draws.height[row]), fill=False, clip_on=False, **look))
