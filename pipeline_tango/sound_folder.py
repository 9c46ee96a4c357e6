"""The folder of a list of prompts: its lock, its manifest, which of its files are whose, and adding a sound to it."""

import json
import os
import signal
import socket
import struct
import threading
from contextlib import ExitStack, contextmanager, suppress

from .sound_files import beside, written_beside


LOCK_NAME = ".tango.lock"


class FolderError(ValueError):
    """A folder cannot take the sounds: it is in use, cannot be written to, or holds files that would be lost."""


# Manifest


def read_manifest(path, strict=False):
    """Records by file name. A line that a killed run left incomplete is skipped: its sound is generated again.

    Raises:
        FolderError: if `strict` and a line is neither a record nor the beginning of one: the file is not ours.
    """
    records = {}
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record["file"]] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            if strict and not '{"file": "'.startswith(line[:10].strip()):
                raise FolderError(
                    f"{path}, line {number}, is no record of a sound: this command did not write the file. Give "
                    "another folder, or --overwrite"
                ) from None
    return records


def encode_manifest(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


# Lock


@contextmanager
def locked(folder):
    """Keep other runs out of `folder`, which is created if need be. A killed run locks nothing.

    Raises:
        FolderError: if another run is in the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = take_lock(folder / LOCK_NAME)
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error}") from error
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                os.unlink(folder / LOCK_NAME)


def take_lock(path):
    while True:
        file = open(path, "a+b", buffering=0)
        try:
            if not lock_file(file):
                file.seek(0)
                owner = file.read(200).decode("utf-8", "replace").strip() or "another process"
                raise FolderError(
                    f"another run is making sounds in {path.parent} ({owner}): wait for it, give another folder, or "
                    "start the processes together with torchrun or accelerate launch"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the run before has just removed its lock: take a new one


def lock_file(file):
    """Whether this process has the file now. Where the file system has no locks, it always does."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            file.seek(1000)  # a byte that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # such as some network file systems
        return True
    return True


# Which files are whose


def check_writable(path):
    """A file can be written beside `path`, and `path` is no folder."""
    part = beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink(missing_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except (OSError, ValueError) as error:
        raise FolderError(f"cannot write to {path.parent}: {error}") from error


def check_unchanged(path, record, sound, optional):
    """The sound at `path` was made with the settings of `sound`, of which the `optional` ones may be absent."""
    for name in (*sound, *optional):
        if record.get(name) != sound.get(name):
            raise FolderError(
                f"{path} was made with {name} {record.get(name)!r}, not {sound.get(name)!r}: give another folder, or "
                "--overwrite"
            )


def check_ours(paths, sound, has_manifest):
    """The files of a sound without a record in the manifest are not there: they would not be ours to replace.

    Earlier versions, when killed, left a sound without a record. A file that looks like one may stay until it is
    compared with what is made: see `add_sound`.
    """
    for path in paths:
        if path.exists() and not (has_manifest and looks_like(path, sound["seconds"])):
            raise not_ours(path)


def not_ours(path):
    return FolderError(
        f"{path} is there already and this command has no record of it: give another folder, or --overwrite to "
        "replace it"
    )


def looks_like(path, seconds):
    """Whether a file is a 16-bit mono WAV of that length, with the header that `encode_wav` writes."""
    with open(path, "rb") as file:
        header = file.read(44)
        num_bytes = file.seek(0, os.SEEK_END)
    if len(header) < 44 or header[:4] != b"RIFF" or header[8:16] != b"WAVEfmt ":
        return False
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", header[20:36])
    return (kind, channels, bits) == (1, 1, 16) and abs((num_bytes - 44) / 2 - seconds * rate) <= 1


# Adding a sound


def add_sound(manifest, sound, contents, may_replace):
    """Write the files of a sound, `{path: bytes}` with the sound itself last, and its record.

    The record comes before the files get their names: no file of ours is ever without a record, and a record without
    its sound is one of a sound that is still to be made.

    Args:
        may_replace (`bool`): files that are there are ours, or the user has said that they may be replaced.
    """
    for path, content in contents.items():
        if not may_replace and path.exists() and path.read_bytes() != content:
            raise not_ours(path)
    with ExitStack() as stack:
        parts = {path: stack.enter_context(written_beside(path, content)) for path, content in contents.items()}
        stack.enter_context(uninterrupted())
        list(contents)[-1].unlink(missing_ok=True)  # or an earlier sound could be left with the new record
        with open(manifest, "ab", buffering=0) as file:  # one write a line: processes do not mix
            file.write(encode_manifest([sound]))
        for path, part in parts.items():
            os.replace(part, path)


@contextmanager
def uninterrupted():
    """Let Ctrl-C and SIGTERM wait for the end of the block."""
    received = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
