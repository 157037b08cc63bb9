"""Published end points on CIFAR-10 with a ResNet-18 of width 64, to be marked in figures. Protocols differ; each is the number
that its source gives."""
from typing import NamedTuple


class Published(NamedTuple):
    source: str
    epochs: int
    top1: float    # %
    note: str = ""


KNN = (
    Published("paper", 800, 90.0, "read off its Fig. D.1"),
    Published("lightly", 800, 90.4, "best epoch"),
    Published("PatrickHua", 800, 90.3, "9,728 test pictures"),
    Published("leftthomas", 800, 88.1),
    Published("Reza-Safdari, k = 1", 800, 86.5, "about; projector"),
    Published("lightly", 200, 76.4),
)
LINEAR = (
    Published("paper", 800, 91.8),
    Published("Reza-Safdari", 800, 91.94, "best epoch, 9,984 test pictures"),
    Published("PatrickHua", 800, 90.83),
    Published("solo-learn", 1000, 90.51, "online"),
    Published("leftthomas", 800, 90.1),
)
