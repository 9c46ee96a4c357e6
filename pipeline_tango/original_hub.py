"""Checkpoints in the original's layout on the Hub: what a repo holds, why it cannot be had, and fetching it.

Every error is an `OSError` of one sentence, and comes within ten seconds.
"""

import difflib
import logging
import socket
import threading
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import ModelCard, constants, model_info, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


logger = logging.getLogger(__name__)

RELEASED = (
    "declare-lab/tango",
    "declare-lab/tango-full",
    "declare-lab/tango-full-ft-audiocaps",
    "declare-lab/tango-full-ft-audio-music-caps",
    "declare-lab/tango2",
    "declare-lab/tango2-full",
    "declare-lab/tango-af-ac-ft-ac",
    "declare-lab/tango-music-af-ft-mc",
)
INDEX = "model_index.json"  # what a diffusers repo has, and one in the original's layout has not
CONNECT_TIMEOUT_IN_S = 4.0
REQUEST_TIMEOUT_IN_S = 8.0

# Base of all errors of the HTTP library under huggingface_hub, which has changed: requests, httpx, httpx2
HTTP_ERROR = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"][-1]


@dataclass
class HubRepo:
    """A repo at one commit.

    Attributes:
        name (`str`): Hub id.
        commit (`str`): full hash.
        sizes (`dict`): path -> bytes, `None` where the Hub does not say. Offline, of the files that are there.
        license (`str`, *optional*): what the card says.
        options (`dict`): `token`, `cache_dir` and `local_files_only` of every request.
    """

    name: str
    commit: str
    sizes: dict
    license: str | None
    options: dict


def is_offline():
    return constants.HF_HUB_OFFLINE


def why_unreachable():
    """Why the Hub cannot be reached, `None` if it can: a connection to its host or the proxy, and no request.

    What cannot be connected to may still be reached as the Hub's client was set up: then a request decides.
    """
    url = urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = url.hostname, url.port or (80 if url.scheme == "http" else 443)
    reasons = ["no answer"]

    def connect():
        try:
            socket.create_connection(address, timeout=CONNECT_TIMEOUT_IN_S).close()
            reasons.clear()
        except OSError as error:
            reasons[:] = [str(error)]

    def request():
        try:
            model_info(RELEASED[0], timeout=CONNECT_TIMEOUT_IN_S)
            reasons.clear()
        except HfHubHTTPError:  # an answer of the Hub all the same
            reasons.clear()
        except (HTTP_ERROR, OSError) as error:
            reasons[:] = [" ".join(str(error).split()) or reasons[0]]

    for target in (connect, request):
        thread = threading.Thread(target=target, daemon=True)  # looking up a name has no timeout of its own
        thread.start()
        thread.join(CONNECT_TIMEOUT_IN_S)
        if not reasons:
            return None
    return reasons[0]


def chain_of(error):
    """An error and what it came from."""
    errors = []
    while error is not None and error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def lacks_index(error):
    """Whether loading failed because a repo that is there has no index of a pipeline."""
    return any(isinstance(each, RemoteEntryNotFoundError) and INDEX in str(each) for each in chain_of(error))


def explain(error, source, reason=None):
    """`OSError` that says in one sentence why the Hub did not give `source`. Other errors are returned as they are.

    Args:
        error (`Exception`): what the Hub's client or diffusers raised.
        source (`str`): the name asked for.
        reason (`str`, *optional*): why the Hub cannot be reached.
    """
    if not isinstance(error, (OSError, HTTP_ERROR, EntryNotFoundError)):
        return error
    errors, hub = chain_of(error), constants.ENDPOINT

    def caused_by(*kinds):
        return next((each for each in errors if isinstance(each, kinds)), None)

    close = difflib.get_close_matches(source, RELEASED, n=1, cutoff=0.8)
    hint = f"; did you mean {close[0]!r}?" if close and close[0] != source else ""
    if reason is not None:
        return OSError(
            f"there is no folder {source!r} here, no complete copy of a Hub repo of that name in the cache, and {hub} "
            f"cannot be reached: {reason}{hint}"
        )
    if caused_by(GatedRepoError):
        return OSError(
            f"{source} is gated: accept its conditions at {hub}/{source}, then run `hf auth login`, set HF_TOKEN or "
            "pass `token`"
        )
    if caused_by(RevisionNotFoundError):
        return OSError(f"{hub}/{source} has no such `revision`: it must be a branch, a tag or a commit of that repo")
    status = getattr(getattr(caused_by(HfHubHTTPError), "response", None), "status_code", None)
    if caused_by(RemoteEntryNotFoundError):
        return error
    if caused_by(RepositoryNotFoundError) or status == 404:
        return OSError(
            f"there is no folder {source!r} here, and {hub} has no repo {source!r}, or it is private and needs a "
            f"`token`{hint}"
        )
    if is_offline() and caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError):
        return OSError(f"{source} is not in the cache, and the Hub is not asked as long as HF_HUB_OFFLINE is set")
    if status is not None:
        return OSError(f"{hub} answers {status} for {source}; try again later")
    transport = caused_by(HTTP_ERROR)
    if transport is not None and not isinstance(transport, HfHubHTTPError):
        return OSError(f"the connection to {hub} failed while {source} was fetched: {transport}; try again")
    return error


def find_repo(source, revision, known_commit, *, reason=None, token=None, cache_dir=None, local_files_only=False):
    """The repo `source` at one commit, as [`HubRepo`]. Asks the Hub once, or not at all.

    Args:
        source (`str`): Hub id.
        revision (`str` or `None`): branch, tag or commit. `None` is "main".
        known_commit (`str` or `None`): what the revision was when the Hub was last asked.
        reason (`str`, *optional*): why the Hub cannot be reached.
        token, cache_dir, local_files_only: as in diffusers.

    Raises:
        OSError: the Hub has no such repo or revision, may not show it, or cannot be reached and nothing is known.
    """
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": True}
    if not local_files_only:
        try:
            info = model_info(
                source, revision=revision, token=token, timeout=REQUEST_TIMEOUT_IN_S, files_metadata=True
            )
            license = info.card_data.license if info.card_data is not None else None
            sizes = {file.rfilename: file.size for file in info.siblings}
            return HubRepo(source, info.sha, sizes, license, {**options, "local_files_only": False})
        except (HTTP_ERROR, OSError) as error:
            if not isinstance(error, HfHubHTTPError):
                reason = " ".join(str(error).split()) or "no answer"
            if known_commit is None or isinstance(error, RevisionNotFoundError):
                raise explain(error, source, reason) from error
            logger.warning("%s; using what is in the cache", " ".join(str(error).split()))
    elif known_commit is None:
        why = "HF_HUB_OFFLINE is set" if is_offline() else reason or "`local_files_only` is set"
        raise OSError(f"{source} is not in the cache, and the Hub cannot be asked: {why}")
    snapshot = repo_folder(source, cache_dir) / "snapshots" / known_commit
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    sizes = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files}
    return HubRepo(source, known_commit, sizes, None, options)


def repo_folder(source, cache_dir):
    """Where the Hub's client keeps a repo."""
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{source.replace('/', '--')}"


def cached_commit(source, revision, cache_dir):
    """The commit that the Hub's cache knows a revision by, `None` if there is none."""
    ref = repo_folder(source, cache_dir) / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def fetch_original(repo, *, force_download=False, check_room=lambda num_bytes: None):
    """Download the files of a checkpoint that are needed, and config and tokenizer of its text encoder.

    Args:
        repo ([`HubRepo`])
        force_download (`bool`): fetch again what is in the cache.
        check_room (callable): gets the bytes of the weights that are to be fetched, before they are.

    Returns:
        `Path`: folder for `open_original`.

    Raises:
        OSError: the repo is no checkpoint of the original, or the Hub does not give it.
    """
    from .original import (
        CONFIG_FILES,
        RELEASED_WEIGHTS,
        TRAINING_WEIGHTS,
        find,
        is_hub_id,
        needed_files,
        read_main_config,
    )

    is_of_training = TRAINING_WEIGHTS[0] in repo.sizes and RELEASED_WEIGHTS[0] not in repo.sizes
    weights = TRAINING_WEIGHTS if is_of_training else RELEASED_WEIGHTS
    configs = ("summary.jsonl",) if is_of_training else ("main_config.json", "vae_config.json", "stft_config.json")
    missing = [name for name in (*configs, *weights) if name not in repo.sizes]
    if missing and repo.options["local_files_only"]:
        raise OSError(f"{repo.name} is not wholly cached, and the Hub is not asked: {', '.join(missing)} missing")
    if missing:
        raise OSError(
            f"{repo.name} at {repo.commit[:7]} has neither {INDEX} nor all files of a checkpoint "
            f"in the original's layout: {', '.join(missing)} missing"
        )
    download = partial(snapshot_download, force_download=force_download, **repo.options)
    try:
        folder = Path(download(repo.name, revision=repo.commit, allow_patterns=list(CONFIG_FILES)))
        main_config = read_main_config(folder)
        files = sorted(needed_files(main_config, weights) & set(repo.sizes))
        small = [name for name in files if name not in weights]
        folder = Path(download(repo.name, revision=repo.commit, allow_patterns=small))
        if repo.license is None and (folder / "README.md").is_file():
            repo.license = ModelCard.load(folder / "README.md").data.license
    except (HTTP_ERROR, OSError, EntryNotFoundError) as error:
        raise explain(error, repo.name) from error

    text_encoder = main_config.get("text_encoder_name")
    if (
        isinstance(text_encoder, str)
        and is_hub_id(text_encoder)
        and find(text_encoder, [folder], "config.json") is None
    ):
        fetch_text_encoder(text_encoder, **repo.options)  # small, and known to be there before gigabytes are fetched
    is_there = {name: (folder / name).is_file() and not force_download for name in weights}
    check_room(sum(repo.sizes[name] or 0 for name in weights if not is_there[name]))
    try:
        return Path(download(repo.name, revision=repo.commit, allow_patterns=files))
    except (HTTP_ERROR, OSError, EntryNotFoundError) as error:
        raise explain(error, repo.name) from error


def fetch_text_encoder(name, *, allow_patterns=None, **options):
    """Config and tokenizer of a text encoder, as the argument `download` of `open_original`."""
    from .original import TOKENIZER_FILES

    try:
        return snapshot_download(name, allow_patterns=allow_patterns or ["config.json", *TOKENIZER_FILES], **options)
    except (HTTP_ERROR, OSError, EntryNotFoundError) as error:
        raise explain(error, name) from error


def license_of(folder):
    """Licence that the model card in a folder names, if any."""
    readme = folder / "README.md"
    return ModelCard.load(readme).data.license if readme.is_file() else None
