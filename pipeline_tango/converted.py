"""Checkpoints in the original's layout as diffusers folders, converted once and kept in the Hub's cache.

`tango-cache` lists and removes what is kept. A checkpoint's folder there, `tango-converted/OWNER--NAME`, holds one
diffusers folder for each commit and dtype, and which commit a branch was last seen at.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.utils import WeakFileLock

from .json_files import read_json, write_json
from .original_hub import (
    INDEX,
    RELEASED,
    cached_commit,
    explain,
    fetch_original,
    fetch_text_encoder,
    find_repo,
    is_offline,
    lacks_index,
    license_of,
    repo_folder,
    why_unreachable,
)


# Torch and the models' classes take seconds to import: functions do it.

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 1  # raise it when the same checkpoint is converted to other files
FOLDER = "tango-converted"
RECORD = "converted.json"
PARTIAL = ".partial-"
MODELS = ("unet", "text_encoder", "vae", "vocoder")
COMMIT = r"[0-9a-f]{40}"
HUB_ID = r"([\w-][\w.-]*/)?[\w-][\w.-]*"
# For the estimate of how long it takes.
BYTES_PER_S_DOWNLOADED = 12.5e6  # 100 Mbit/s
BYTES_PER_S_CONVERTED = 50e6


def with_conversion(
    source,
    attempt,
    pipeline_class,
    *,
    dtype=None,
    variant=None,
    revision=None,
    token=None,
    cache_dir=None,
    local_files_only=None,
    force_download=False,
    remove_originals=False,
):
    """What `attempt` makes of a diffusers folder or Hub repo, or of that which an original checkpoint is converted to.

    Args:
        source (`str`): folder or Hub id.
        attempt (callable): gets `source`, or a folder in its place, and perhaps `local_files_only=True`.
        pipeline_class (`type`): `TangoPipeline`.
        remove_originals (`bool`): delete the weights that were downloaded once they are converted.
        others: as in `from_pretrained`.

    Raises:
        OSError: there is no such source, the Hub does not give it, or the disk does not take it.
        ValueError: the checkpoint is damaged, or an argument does not fit it.
    """
    source, reason, commit = str(source), None, None
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; a model is a folder or a Hub id")
    if Path(source).is_dir():
        is_original = is_original_folder(source)
    elif not re.fullmatch(HUB_ID, source):
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a folder or a Hub id such as {RELEASED[4]!r}, got {source!r}, "
            "and there is no such folder"
        )
    else:
        commit = known_commit(source, revision, cache_dir)
        is_original = is_known_original(source, commit, cache_dir)
        if not (local_files_only or is_offline()) and (reason := why_unreachable()):
            local_files_only = True
            if commit is not None:
                logger.warning("%s cannot be reached, using what is in the cache: %s", constants.ENDPOINT, reason)
    if not is_original:
        try:
            return attempt(source, **({"local_files_only": True} if reason else {}))
        except Exception as error:
            if not lacks_index(error):
                if Path(source).is_dir() or (explained := explain(error, source, reason)) is error:
                    raise
                raise explained from error
    if variant is not None:
        raise ValueError(
            f"`variant` must be None for a checkpoint in the original's layout, which has none, got {variant!r}: "
            "`dtype` is what its weights are converted to"
        )
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": bool(local_files_only) or is_offline()}
    if Path(source).is_dir():
        return attempt(str(convert_folder(source, pipeline_class, dtypes_of(dtype), force_download, options)))
    commit, folder = convert_repo(
        source, revision, commit, reason, pipeline_class, dtypes_of(dtype), force_download, options
    )
    if folder is None:  # it has become a diffusers repo
        return attempt(source)
    result = attempt(str(folder))
    if remove_originals:
        remove_weights(source, commit, cache_dir)
    return result


def known_commit(source, revision, cache_dir):
    """The commit that a revision of a Hub repo was at when the Hub was last asked, `None` if it never was."""
    if re.fullmatch(COMMIT, revision or ""):
        return revision
    ref = ref_of(source, revision, cache_dir)
    return ref.read_text() if ref.is_file() else cached_commit(source, revision, cache_dir)


def ref_of(source, revision, cache_dir):
    return kept_folder(source, cache_dir) / "refs" / quote(revision or "main", safe="")


def is_known_original(source, commit, cache_dir):
    """Whether a Hub repo was converted before, or downloaded by `tango-convert`."""
    snapshot = repo_folder(source, cache_dir) / "snapshots" / str(commit)
    return kept_folder(source, cache_dir).is_dir() or is_original_folder(snapshot)


def is_original_folder(folder):
    """Whether a folder is a checkpoint in the original's layout, that of its releases or that of its training."""
    folder = Path(folder)
    names = ("main_config.json", "pytorch_model_main.bin", "pytorch_model_2.bin")
    return not (folder / INDEX).exists() and any((folder / name).exists() for name in names)


def dtypes_of(dtype):
    """Model -> dtype of its weights, as diffusers reads the argument `dtype`."""
    import torch

    if not isinstance(dtype, (dict, torch.dtype)):
        dtype = torch.float32
    values = {name: dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype for name in MODELS}
    dtypes = {}
    for name, value in values.items():
        value = getattr(torch, value, None) if isinstance(value, str) else value or torch.float32
        if not isinstance(value, torch.dtype) or not value.is_floating_point:
            raise ValueError(f"`dtype` must be a floating-point dtype such as torch.bfloat16, got {values[name]!r}")
        dtypes[name] = value
    return dtypes


def dtype_name(dtypes):
    """The dtypes of a folder, as part of its name: `bfloat16`, or that of each model where they differ."""
    names = {model: str(dtype).removeprefix("torch.") for model, dtype in dtypes.items()}
    if len(set(names.values())) == 1:
        return names["unet"]
    return "+".join(f"{model}.{name}" for model, name in sorted(names.items()))


def root_of(cache_dir):
    """Where converted folders are kept: in the Hub's cache, so that they lie on the disk that was chosen for it."""
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute() / FOLDER


def kept_folder(source, cache_dir):
    """The folder that holds what a Hub repo or a local folder was converted to."""
    if not Path(source).is_dir():
        return root_of(cache_dir) / source.replace("/", "--")
    path = Path(source).resolve()
    return root_of(cache_dir) / f"local--{path.name}--{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def entry_name(commit, dtypes):
    return f"{commit}--{dtype_name(dtypes)}--v{CONVERTER_VERSION}"


def find_entry(kept, commit, dtypes):
    """The converted folder if there is one, else `None`. It got its name when it was complete."""
    folder = kept / entry_name(commit, dtypes)
    return folder if (folder / RECORD).is_file() else None


def write_ref(path, commit):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != commit:
        partial_path = path.with_name(f"{path.name}.partial")
        partial_path.write_text(commit)
        partial_path.replace(path)


@contextlib.contextmanager
def locked(kept, source):
    """Hold the lock of one checkpoint, with its folder. What killed processes left there is removed first."""
    lock = kept.parent / ".locks" / f"{kept.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(WeakFileLock(lock, timeout=2))
            except TimeoutError:
                logger.warning("waiting for another process, which converts %s", source)
                stack.enter_context(WeakFileLock(lock))
            kept.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=kept).close()
        except OSError as error:
            raise OSError(
                f"{source} is in the original's layout, and the converted weights cannot be kept in {kept}: {error}; "
                "give a folder that can be written to as `cache_dir`, or in HF_HUB_CACHE"
            ) from error
        for leftover in kept.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                kept.rmdir()  # if nothing is in it


def convert_repo(source, revision, commit, reason, pipeline_class, dtypes, force_download, options):
    """Commit of a Hub repo, and the folder that it is converted to, by one process of all that want to.

    Args:
        source, revision: of the repo.
        commit (`str` or `None`): what `known_commit` says.
        reason (`str` or `None`): why the Hub cannot be reached.
        pipeline_class, dtypes: for `write_entry`.
        force_download (`bool`): download and convert again.
        options (`dict`): `token`, `cache_dir` and `local_files_only`.

    Returns:
        `None` for the folder of a repo that has a `model_index.json`.
    """
    kept, folder = kept_folder(source, options["cache_dir"]), None
    if not force_download and (commit == revision or options["local_files_only"]):
        folder = find_entry(kept, commit, dtypes)
    if folder is None:
        repo = find_repo(source, revision, commit, reason=reason, **options)
        commit = repo.commit
        if INDEX in repo.sizes:
            return commit, None
        folder = None if force_download else find_entry(kept, commit, dtypes)
    if folder is None:
        with locked(kept, source):
            folder = None if force_download else find_entry(kept, commit, dtypes)
            if folder is None:
                original = fetch_original(
                    repo,
                    force_download=force_download,
                    check_room=lambda num_bytes: announce(source, kept, dtypes, num_bytes, repo.sizes, repo.license),
                )
                folder = kept / entry_name(commit, dtypes)
                write_entry(original, folder, pipeline_class, dtypes, source, repo.license, options)
    with contextlib.suppress(OSError):  # a cache that can only be read
        write_ref(ref_of(source, revision, options["cache_dir"]), commit)
    return commit, folder


def convert_folder(source, pipeline_class, dtypes, force, options):
    """The folder that a local folder is converted to, if it or a file of it has changed since it was."""
    from .original import needed_files, read_main_config

    source, kept, digest = Path(source), kept_folder(source, options["cache_dir"]), hashlib.sha256()
    for root in (source, source.parent):  # the original's training puts its log one level up
        for name in sorted(needed_files(read_main_config(source))):
            if (root / name).is_file():
                stat = (root / name).stat()
                digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns]).encode())
    state, license = digest.hexdigest()[:40], license_of(source)  # in place of a commit
    if not force and (folder := find_entry(kept, state, dtypes)):
        return folder
    with locked(kept, source):
        if not force and (folder := find_entry(kept, state, dtypes)):
            return folder
        sizes = {path.name: path.stat().st_size for path in source.glob("*.bin")}
        announce(source, kept, dtypes, 0, sizes, license)
        folder = kept / entry_name(state, dtypes)
        write_entry(source, folder, pipeline_class, dtypes, str(source.resolve()), license, options)
        for other in kept.iterdir():  # of the folder as it was before it changed
            if (other / RECORD).is_file() and not other.name.startswith(state):
                shutil.rmtree(other, ignore_errors=True)
        return folder


def announce(source, kept, dtypes, num_bytes_to_fetch, sizes, license):
    """Say what is going to happen, or raise `OSError` if the disk has no room for it."""
    num_bytes_to_read = num_bytes_to_write = 0
    for models, names in (
        (("unet", "text_encoder"), ("pytorch_model_main.bin", "pytorch_model_2.bin")),
        (("vae", "vocoder"), ("pytorch_model_vae.bin", "pytorch_model.bin")),
    ):
        size = max(sizes.get(name) or 0 for name in names)
        num_bytes_to_read += size
        num_bytes_to_write += size * max(dtypes[model].itemsize for model in models) / 4  # the files are in float32
    fetch = ""
    if num_bytes_to_fetch:
        duration = minutes(num_bytes_to_fetch / BYTES_PER_S_DOWNLOADED)
        fetch = f"{giga(num_bytes_to_fetch)} to download ({duration} at 100 Mbit/s), "
    needed, free = num_bytes_to_fetch + num_bytes_to_write, shutil.disk_usage(kept).free
    if needed > free:
        raise OSError(
            f"{source} needs {giga(needed)} of disk ({fetch}{giga(num_bytes_to_write)} to write), and {kept.parent} "
            f"has {giga(free)} free: make room (`tango-cache` lists and removes what is kept), or give a folder on "
            "another disk as `cache_dir`, or in HF_HUB_CACHE"
        )
    logger.warning(
        "%s is in the original's layout and is converted once: %s%s to write in %s (%s); it is kept in %s "
        "(`tango-cache` lists and removes it); licence of the weights: %s",
        source,
        fetch,
        giga(num_bytes_to_write),
        dtype_name(dtypes),
        minutes(num_bytes_to_read / BYTES_PER_S_CONVERTED),
        kept,
        license or "its card names none",
    )


def giga(num_bytes):
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 5e7 else f"{num_bytes / 1e6:.1f} MB"


def minutes(seconds):
    return f"about {max(round(seconds / 60), 1)} min" if seconds >= 30 else "less than half a minute"


def write_entry(original_folder, folder, pipeline_class, dtypes, source, license, options):
    """Convert a checkpoint into `folder`, which appears when it is complete."""
    from safetensors import SafetensorError

    from .original import open_original, save_pipeline

    try:
        original = open_original(original_folder, download=partial(fetch_text_encoder, **options))
    except ValueError as error:
        if repo_folder(source, options["cache_dir"]) not in original_folder.parents:
            raise
        raise ValueError(f"{error}; `force_download=True` fetches {source} again") from error
    commit = folder.name.split("--")[0]
    record = {"source": source, "commit": commit, "dtype": dtype_name(dtypes), "license": license}
    try:
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder.parent) as temporary:
            partial_folder = Path(temporary) / "folder"  # made with ordinary permissions, unlike the temporary one
            partial_folder.mkdir()
            save_pipeline(original, partial_folder, pipeline_class, dtypes)
            write_json(partial_folder / RECORD, {**record, "converter_version": CONVERTER_VERSION})
            if folder.exists():  # converted before, and forced to be again
                folder.rename(Path(temporary) / "old")
            partial_folder.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{source} was not converted, and nothing was left in {folder.parent}: {error}; the disk may be full "
            f"({giga(shutil.disk_usage(folder.parent).free)} free)"
        ) from error
    for other in folder.parent.glob(f"{commit}--{dtype_name(dtypes)}--v*"):
        if other != folder:  # of an older converter
            shutil.rmtree(other, ignore_errors=True)
    return folder


def remove_weights(source, commit, cache_dir):
    """Delete what was downloaded of one commit, but for what other commits in the Hub's cache share."""
    if not (repo_folder(source, cache_dir) / "snapshots" / commit).is_dir():
        return
    strategy = scan_cache_dir(cache_dir).delete_revisions(commit)
    logger.info("%s: %s of originals deleted", source, strategy.expected_freed_size_str)
    strategy.execute()


def list_entries(cache_dir=None):
    """What is kept: `dict`s with what was recorded, `path` and `num_bytes`. Leftovers of killed processes, which the
    next conversion removes, have no `source`."""
    entries = []
    for path in sorted(root_of(cache_dir).glob("*/*")):
        if path.name.startswith(PARTIAL) or (path / RECORD).is_file():
            record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            entries.append({**record, "path": path, "num_bytes": num_bytes})
    return entries


def remove_entries(sources, cache_dir=None):
    """Delete all that is kept of some checkpoints. Returns the bytes that this frees.

    Args:
        sources (`list` of `str`, *optional*): Hub ids and folders as `list_entries` has them. `None` for all.

    Raises:
        ValueError: nothing is kept of a source.
        OSError: a process is converting it.
    """
    entries = list_entries(cache_dir)
    folders = {entry["path"].parent: entry.get("source") for entry in entries}
    unknown = set(sources or ()) - set(folders.values())
    if unknown:
        raise ValueError(f"nothing is kept of {', '.join(sorted(unknown))} in {root_of(cache_dir)}")
    removed = 0
    for folder, source in folders.items():
        if sources is not None and source not in sources:
            continue
        try:
            with WeakFileLock(folder.parent / ".locks" / f"{folder.name}.lock", timeout=1):
                removed += sum(entry["num_bytes"] for entry in entries if entry["path"].parent == folder)
                shutil.rmtree(folder)
        except TimeoutError as error:
            raise OSError(f"{source or folder} is being converted by another process") from error
    return removed


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="tango-cache",
        description="List the checkpoints in the original's layout that were converted when they were first loaded, "
        "or remove them. The downloaded originals lie in the Hub's cache: `hf cache ls` and `hf cache rm`.",
    )
    parser.add_argument("--remove", nargs="+", metavar="SOURCE", help="delete all that is kept of these")
    parser.add_argument("--remove_all", action="store_true", help="delete all that is kept")
    parser.add_argument("--cache_dir", metavar="FOLDER", help="what `from_pretrained` got (default: the Hub's cache)")
    args = parser.parse_args(argv)
    try:
        if args.remove or args.remove_all:
            freed = remove_entries(None if args.remove_all else args.remove, args.cache_dir)
            sys.stdout.write(f"removed {giga(freed)}\n")
            return 0
        entries = list_entries(args.cache_dir)
        for entry in entries:
            name = entry.get("source", "left by a killed process; the next conversion removes it")
            details = f"{entry.get('commit', '')[:7]}  {entry.get('dtype', '')}  {giga(entry['num_bytes'])}"
            sys.stdout.write(f"{name}  {details}  {entry['path']}\n")
        total = giga(sum(entry["num_bytes"] for entry in entries))
        sys.stdout.write(f"{len(entries)} in {root_of(args.cache_dir)}, {total}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
