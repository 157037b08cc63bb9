"""TensorBoard beside the log, for --tensorboard: the scalars of each line, and the figures."""
import os

from matplotlib.image import imread

FOLDER = "tensorboard"  # in the run's folder


def require_tensorboard():
    """The class that writes TensorBoard's files. Raises ValueError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard (pip install tensorboard); leave it out, or take --no-tensorboard to resume without it"
        ) from error
    return SummaryWriter


class Board:
    """Writes a run's folder for TensorBoard. epoch: the last one done, what a stopped run wrote after it is hidden; None for a
    new run."""

    def __init__(self, folder, epoch):
        self.folder, self.epoch, self.shown = folder, epoch or 0, {}
        self.writer = require_tensorboard()(os.path.join(folder, FOLDER), purge_step=epoch + 1 if epoch else None)

    def scalars(self, record):
        """Add a line of the log, by its epoch."""
        self.epoch = record["epoch"]
        for name, value in record.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, self.epoch)

    def figures(self):
        """Add the folder's figures that have changed, by the newest epoch; all so far is on the disk then."""
        for name in sorted(os.listdir(self.folder)):
            path = os.path.join(self.folder, name)
            if name.endswith(".png") and self.shown.get(name) != os.path.getmtime(path):
                self.shown[name] = os.path.getmtime(path)
                self.writer.add_image(name.removesuffix(".png"), imread(path)[..., :3], self.epoch, dataformats="HWC")
        self.writer.flush()
