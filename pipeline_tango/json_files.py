"""JSON files that hold one object: reading with errors that name the file, and writing."""

import json


LFS_POINTER = b"version https://git-lfs."


def check_file(path):
    """A ValueError if there is no file at `path`, or a substitute of it."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise ValueError(f"{path} is damaged or cut short: it is empty")
    if start == LFS_POINTER:
        raise ValueError(f"{path} is a git-LFS pointer instead of the file itself, which `git lfs pull` fetches")


def read_json(path):
    """The JSON object in `path`; a ValueError if there is none."""
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def write_json(path, content):
    """Write `content` to `path`, whose folder is created if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
