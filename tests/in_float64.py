"""main.py in float64: two ways to compute the same then agree almost exactly."""
import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main  # noqa: E402
import simsiam  # noqa: E402


def patch():
    views, model = main.apply_two_views, simsiam.SimSiam
    main.apply_two_views = lambda *args: [view.double() for view in views(*args)]
    main.DISTANCES["cosine"] = lambda p, z: -F.cosine_similarity(p, z, dim=1).mean()
    main.monitor = lambda *args: {}  # it evaluates in float32
    simsiam.SimSiam = lambda *args: model(*args).double()


if __name__ == "__main__":
    patch()
    sys.exit(main.main())
