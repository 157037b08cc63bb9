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
    """Write `state` (tensors, plain numbers, strings, lists, dicts) to path as `write` does."""
    write(path, with_digest(state), keep_previous)


def write(path, content, keep_previous=False):
    """Write bytes to path: whole or not at all.

    They go to a temporary file in the same folder, reach the disk, and take the name in one
    step. keep_previous: the file that was there stays as previous_path(path). Raises OSError that names
    path; then the file that was there is as it was.
    """
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
    file that is truncated, damaged (its digest does not agree) or holds more than that, which it then names.
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
            reason = needed_code(content)
        else:
            reason = "truncated or damaged" if content else "the file is empty"
        raise ValueError(f"{path!r} cannot be read as a checkpoint: {reason}") from error


def needed_code(content):
    """Why a file of torch.save that holds more than tensors and plain values is not read: a reason in words."""
    try:
        needed = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except Exception:  # of any kind, as in load
        needed = []
    return (
        f"there is more in it than tensors and plain values{': ' * bool(needed)}{', '.join(needed[:3])}{' ...' * (len(needed) > 3)}; code in a "
        "file is not run. If you trust the file, save its state_dict alone where the code that wrote it is at hand"
    )


def sha256(content):
    """The SHA-256 of bytes, hexadecimal: what sha256sum prints for a file of them."""
    return hashlib.sha256(content).hexdigest()


def tensors_digest(tensors):
    """A SHA-256, hexadecimal, of a state dict's names, shapes and values, however it is stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
