"""A folder of photographs of mixed sizes, modes and formats, cut from those that installed packages ship.

    python tests/tiles.py FOLDER [COUNT]

Every photograph is a class: FOLDER/train/NAME from its left seven tenths, FOLDER/test/NAME from the rest. With
scikit-learn and matplotlib there are three of them, with scikit-image 17.
"""
import importlib.util
import os
import random
import sys
from pathlib import Path

from PIL import Image

PLACES = {
    "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"]),
    "matplotlib": ("mpl-data/sample_data", ["grace_hopper.jpg"]),
    "skimage": ("data", "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
                "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg".split()),
}
FORMATS = [("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("png", "RGB"), ("png", "RGBA"), ("png", "P"), ("png", "L"),
           ("webp", "RGB"), ("bmp", "RGB"), ("tif", "RGB"), ("JPEG", "RGB"), ("PNG", "LA")]


def cut_tiles(folder, count, seed=0):
    """Write `count` tiles of 24 to 160 pixels a side below folder, 4 of 5 of them for training; returns the classes."""
    sources = []
    for package, (place, names) in PLACES.items():
        spec = importlib.util.find_spec(package)
        if spec:
            paths = [Path(spec.submodule_search_locations[0], place, name) for name in names]
            sources += [path for path in paths if path.exists()]
    rng, images = random.Random(seed), [Image.open(path).convert("RGB") for path in sources]
    for i in range(count):
        source = i % len(sources)
        image, split = images[source], "test" if i // len(sources) % 5 == 4 else "train"
        width, height, border = rng.randint(24, 160), rng.randint(24, 160), int(0.7 * image.width)
        first, last = (0, border - width) if split == "train" else (border, max(border, image.width - width))
        left, top = rng.randint(first, last), rng.randint(0, image.height - height)
        extension, mode = rng.choice(FORMATS)
        place = Path(folder, split, sources[source].stem)
        place.mkdir(parents=True, exist_ok=True)
        tile = image.crop((left, top, min(left + width, image.width), top + height)).convert(mode)
        tile.save(place / f"{i:06}.{extension}")
    return sorted(path.stem for path in sources)


if __name__ == "__main__":
    os.makedirs(sys.argv[1])
    print(*cut_tiles(sys.argv[1], int((*sys.argv, 5000)[2])))
