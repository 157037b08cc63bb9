"""Files that are whole or absent: checkpoints, written atomically, and JSON."""
import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import time

import torch

from simsiam import read_file as load  # noqa: F401 (the counterpart of save)
from utils.cli import info, warn

LEFT_BEHIND = 600  # seconds after which the half file of a writer that was killed is removed
fcntl = None  # on Windows, where nothing is locked
with contextlib.suppress(ImportError):
    import fcntl


def to_bytes(state):
    """What torch.save writes. In memory first: its own writer does not say why writing failed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def save(path, state, keep_previous=False):
    """Write `state` (tensors, plain numbers, strings, lists, dicts) with torch.save, as `writing`."""
    write(path, to_bytes(state), keep_previous)


def write(path, content, keep_previous=False):
    """Write bytes to path, as `writing` does."""
    with writing(path, keep_previous) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path, keep_previous=False):
    """A file to write in the context, which becomes path at its end, atomically. keep_previous: the
    replaced file stays as previous_path(path). Raises OSError that names path, which is unchanged."""
    partial = f"{path}.{secrets.token_hex(4)}.partial"  # of this writer alone
    for left in glob.glob(f"{glob.escape(path)}*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(left) > LEFT_BEHIND:
                os.remove(left)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        if keep_previous and os.path.exists(path):
            os.replace(path, previous_path(path))
        os.replace(partial, path)
        if hasattr(os, "O_DIRECTORY"):  # not on Windows
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):
                os.fsync(folder)  # the new name too survives a power cut
            os.close(folder)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error
    finally:  # also after Ctrl-C: half a file takes room that the next one may need
        if os.path.lexists(partial):
            os.remove(partial)


def sync(file):
    """Flush an open file, given by its number, to the disk, where the file system can."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EROFS, errno.EPERM):
            raise


def lock(path, wait=False):
    """Open a file, locked until it is closed. If another process has it, waits or raises BlockingIOError."""
    file = open(path, "ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            file.close()
            raise
        info(f"waiting for another process that has locked {path}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks
        warn(f"{path} cannot be locked ({error.strerror})")
    return file


def previous_path(path):
    """checkpoint.pt -> checkpoint-previous.pt."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-previous{extension}"


def digest(tensors):
    """SHA-256, hexadecimal, of a state dict's names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return found.hexdigest()


def write_json(path, content):
    """Write a JSON file atomically. Raises OSError that names it."""
    write(path, f"{json.dumps(content, indent=2)}\n".encode())


def read_json(path, *keys):
    """The object in a JSON file. Raises OSError, and ValueError if it is none or lacks these keys."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return content | {key: content[key] for key in keys}
    except (ValueError, TypeError, KeyError) as error:  # also bytes that are not text
        raise ValueError(f"{path}: not the JSON that is written here ({error})") from error
