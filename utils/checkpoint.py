"""Checkpoints: written atomically, read without running code from the file."""
import os
import warnings

import torch


def save(path, state, keep_previous=False):
    """Write `state` (tensors, plain numbers, strings, lists, dicts) to path: whole or not at all.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name in one
    step. keep_previous: the file that was there stays as previous_path(path). Raises OSError.
    """
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # what torch makes of a failed write
        raise OSError(f"{path}: could not be written ({error})") from error
    if keep_previous and os.path.exists(path):
        os.replace(path, previous_path(path))  # a kill right after this leaves the previous one, whole
    os.replace(partial, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def previous_path(path):
    """Where save(..., keep_previous=True) leaves the file that it replaces: checkpoint.pt -> checkpoint-previous.pt."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-previous{extension}"


def load(path):
    """Read what `save` wrote, onto the CPU. Tensors and plain values only: code in the file does not run.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a file that is truncated, damaged or
    holds more than that.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path!r} is a folder; a .pt file in it is needed")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path!r}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: torch.load parses whatever bytes there are
        raise ValueError(
            f"{path!r} cannot be read as a checkpoint: truncated or damaged, or more than tensors and plain values"
        ) from error


def backbone_state(path):
    """The backbone's state dict out of a `backbone.pt` or `checkpoint.pt`. Raises as `load` does, and
    ValueError for a file that holds neither."""
    state = load(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        prefix = "backbone."
        state = {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
    if not isinstance(state, dict) or not isinstance(state.get("conv1.weight"), torch.Tensor):
        raise ValueError(f"{path}: no backbone in it; a backbone.pt or checkpoint.pt that main.py wrote is needed")
    return state


def load_backbone(backbone, state, path):
    """Copy a state dict into the backbone, every tensor matched by name and shape.

    path names the file in the message. Raises ValueError that lists what is missing, unexpected or of another shape.
    """
    own = backbone.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("missing:", [name for name in own if name not in state]),
            ("unexpected:", [name for name in state if name not in own]),
            ("another shape:", shapes),
        ) if names
    ]
    if problems:
        raise ValueError(f"{path} does not fit the backbone; {'; '.join(problems)}; see --arch and --width")
    backbone.load_state_dict(state)
