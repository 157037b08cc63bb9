"""Checkpoints: written atomically, read without running code from the file."""
import hashlib
import io
import os
import pickle
import warnings
import zipfile

import torch

DIGEST_MARK = b"sha256 "
COMMENT_LENGTH = len(DIGEST_MARK) + 2 * hashlib.sha256().digest_size


def save(path, state, keep_previous=False):
    """Write `state` (tensors, plain numbers, strings, lists, dicts) to path: whole or not at all.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name in one
    step. keep_previous: the file that was there stays as previous_path(path). Raises OSError that names
    path; then the file that was there is as it was.
    """
    content = with_digest(state)
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and os.path.exists(path):
            keep(path)
        os.replace(partial, path)
        sync_folder(os.path.dirname(path) or ".")
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error
    finally:  # also when Ctrl-C ends it: half a file takes room that the next one may need
        if os.path.lexists(partial):
            os.remove(partial)


def with_digest(state):
    """The bytes of a file: what torch.save writes, a zip archive, and in its comment the SHA-256 of all before."""
    buffer = io.BytesIO()  # in memory first: torch's own writing is slower and does not say why it failed
    torch.save(state, buffer)
    buffer.seek(-2, os.SEEK_END)  # the archive ends with its comment's length
    buffer.write(COMMENT_LENGTH.to_bytes(2, "little"))
    buffer.write(DIGEST_MARK + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getbuffer()


def is_whole(content):
    """Whether a file's bytes agree with their digest, or, in a zip archive that torch.save wrote, with its own
    checksums, which leave out some of its headers. True where there is neither."""
    start, digest = content[:-COMMENT_LENGTH], content[-COMMENT_LENGTH:].tobytes()
    if digest.startswith(DIGEST_MARK):
        return digest == DIGEST_MARK + hashlib.sha256(start).hexdigest().encode()
    if not zipfile.is_zipfile(io.BytesIO(content)):  # other files are torch.load's to judge
        return True
    archive = zipfile.ZipFile(io.BytesIO(content))
    return not archive.comment and archive.testzip() is None  # a comment: a digest that is not whole


def keep(path):
    """Give the file its previous_path as a second name, so that the first never lacks a file; where the file
    system has no second names, rename it."""
    second = f"{previous_path(path)}.partial"
    try:
        if os.path.lexists(second):  # of a killed run
            os.remove(second)
        os.link(path, second)
    except OSError:
        second = path
    os.replace(second, previous_path(path))


def sync_folder(folder):
    """Have the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous_path(path):
    """Where save(..., keep_previous=True) leaves the file that it replaces: checkpoint.pt -> checkpoint-previous.pt."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-previous{extension}"


def load(path):
    """Read what `save` wrote, onto the CPU. Tensors and plain values only: code in the file does not run.

    Raises FileNotFoundError, IsADirectoryError, another OSError where the file cannot be read, and ValueError for a
    file that is truncated, damaged (its digest does not agree) or holds more than that.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path!r} is a folder; a .pt file in it is needed")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path!r}: no such file")
    with open(path, "rb") as file:
        content = memoryview(file.read())
    try:
        if not is_whole(content):
            raise zipfile.BadZipFile("a checksum does not agree")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: torch.load parses whatever bytes there are
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            reason = "there is more in it than tensors and plain values, and code in a file is not run"
        else:
            reason = "truncated or damaged" if content else "the file is empty"
        raise ValueError(f"{path!r} cannot be read as a checkpoint: {reason}") from error


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


def load_module(module, state, path):
    """Copy a state dict into the module, every tensor matched by name and shape.

    path names the file in the message. Raises ValueError that lists what is missing, unexpected or of another shape.
    """
    own = module.state_dict()
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
        raise ValueError(f"{path} does not fit the network; {'; '.join(problems)}; see --arch and --width")
    module.load_state_dict(state)
