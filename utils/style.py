"""One look for all figures: told apart with any color vision and in gray print, legible at the README's size."""
import os
import warnings
from contextlib import contextmanager

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's palette, in an order whose neighbors differ in lightness too.
COLORS = ("#0072b2", "#d55e00", "#56b4e9", "#000000", "#009e73", "#e69f00", "#cc79a7")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)), (0, (1, 3)))
GRAY = "0.45"
FORMATS = ("png", "svg")
DPI = 200
LONGEST_NAME = 40
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 3,
    "svg.hashsalt": "simsiam",     # the same figure is the same file
}


@contextmanager
def drawing(folder, name, width=4.2, height=3.0, formats=FORMATS, layout="constrained", dpi=DPI):
    """A figure of the style to draw into, width and height in inches, which is then written as folder/name in these
    formats. layout: None where its axes have places of their own. Raises OSError where it cannot be written."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a folder's name may be in any script
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        for ending in formats:
            stamp = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[ending]
            figure.savefig(os.path.join(folder, f"{name}.{ending}"), dpi=dpi, metadata=stamp)
            figure.set_layout_engine("none")  # it is laid out


def make_folder(folder):
    """Make a folder for figures, unless it is there. Raises OSError where it cannot be made or written to."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is not a folder; take another one for the figures")
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: no permission to write figures there")


def printable(name):
    """A name as a figure can show it: it may be long, or hold bytes that are no text, line ends, and dollar signs that are no
    formula."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name.encode(errors="backslashreplace").decode())
    name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME - 1]}…"
    return name.replace("$", r"\$")


def plain_numbers(axis):
    """Have a logarithmic axis show 0.01 and not a power."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.9f}".rstrip("0").rstrip(".")))
