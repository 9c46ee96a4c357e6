"""Upload a diffusers folder of a `TangoPipeline` to a Hub repo, with a model card and the pipeline's code."""

import argparse
import logging
import math
import re
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData

import pipeline_tango
from pipeline_tango.json_files import read_json
from pipeline_tango.model_files import (
    CONFIGS,
    WEIGHTS,
    check_folders,
    check_weights,
    find_variants,
    read_header,
    weight_files,
)
from pipeline_tango.original_hub import HTTP_ERROR
from pipeline_tango.single_file import single_file


logger = logging.getLogger(__name__)

PIPELINE = Path(pipeline_tango.__file__).with_name("pipeline_tango.py")
CARD = Path(__file__).with_name("card.md")
BUFFERS = {"mean", "scale"}  # of the vocoder: saved with its weights, but no parameters
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
TEMPORARY = ("~", ".tmp", ".lock", ".incomplete")

PLACEHOLDER = "path/to/this/folder"  # in a card on disk; `push` writes the repo's name there
MARKER = "Delete this line to keep your changes when it runs again. -->"  # in every generated card


def add_card_and_code(folder, *, source=None, license=None, notes=()):
    """Write `README.md` and `pipeline.py` into a diffusers folder.

    A `README.md` that this function did not write stays as it is.

    Args:
        folder (`str` or `Path`): complete diffusers folder of a `TangoPipeline`.
        source (`str` or `Path`, *optional*): Hub id or local folder of the checkpoint it was converted from.
        license (`str`, *optional*): Hub's name for the licence of the weights, such as "cc-by-nc-sa-4.0".
        notes (sequence of `str`, *optional*): what was converted and what was dropped, one line each.

    Raises:
        ValueError: if a config or a weight file is missing or cannot be read.
    """
    folder = Path(folder)
    (folder / "pipeline.py").write_bytes(single_file(PIPELINE).encode())
    readme = folder / "README.md"
    if readme.exists() and MARKER not in readme.read_text(encoding="utf-8"):
        logger.warning("%s was not generated: left as it is", readme)
    else:
        readme.write_text(_model_card(folder, source, license, notes), encoding="utf-8")


def push(folder, repo_id, *, private=False, token=None, commit_message=None, source=None, license=None):
    """Upload a diffusers folder with its card and code to a Hub repo, which is created if need be.

    All files arrive in one commit or none does. `folder` is only read: the repo gets the code of this version of the
    package as `pipeline.py`, and a generated card if the folder has none. Hidden and temporary files are left out;
    other files of the repo stay.

    Args:
        folder (`str` or `Path`): complete diffusers folder of a `TangoPipeline`.
        repo_id (`str`): "owner/name", or "name" under the owner of the token.
        private (`bool`): create the repo as a private one.
        token (`str`, *optional*): default is `HF_TOKEN` or the one stored by `hf auth login`.
        source (`str`, *optional*): Hub id of the original checkpoint, for the card's metadata.
        license (`str`, *optional*): Hub's name for the licence of the weights, for the card's metadata.

    Returns:
        `str`, the address of the repo.

    Raises:
        ValueError: if `folder` is incomplete or damaged, before anything is sent, or a private repo is public already.
        PermissionError: if there is no valid token, or it may not write to the repo.
        ConnectionError: if the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    files = check_folder(folder)
    if source is not None and not _is_hub_id(source):
        raise ValueError(f"`source` must be a Hub id such as 'declare-lab/tango', got {str(source)!r}")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else _model_card(folder, source, license, ())
    if readme.exists() and (source or license):
        card = ModelCard(text)
        card.data.base_model = source or card.data.base_model
        if license is not None:
            card.data.license, card.data.license_name, card.data.license_link = license, None, None
        text = str(card)

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"`private`: {repo_id} exists already and is public; nothing was uploaded")
        text = text.replace(PLACEHOLDER, repo_id) if MARKER in text else text
        uploads = {path.relative_to(folder).as_posix(): path for path in files}
        uploads |= {"README.md": text.encode(), "pipeline.py": single_file(PIPELINE).encode()}
        api.create_commit(  # not upload_folder, which may split a large folder into several commits
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in uploads.items()],
            commit_message=commit_message or "Upload TangoPipeline",
        )
    except (HTTP_ERROR, RuntimeError) as error:
        cause = error  # the client wraps what stops one file's upload in a RuntimeError
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            cause = error.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            message = f"not logged in to {api.endpoint}, or the token is not valid"
            raise PermissionError(f"{message}: run `hf auth login`, set HF_TOKEN or pass a token") from error
        if status == 403:
            raise PermissionError(f"the token may not write to {repo_id!r} on {api.endpoint}") from error
        reason = f"cannot reach {api.endpoint}" if status is None else f"{api.endpoint} answered {status}"
        raise ConnectionError(f"{reason}: {cause}") from error
    return f"{api.endpoint}/{repo_id}"


def check_folder(folder):
    """Check that a folder is a complete diffusers folder of a `TangoPipeline`, fit to be published.

    Returns:
        `list` of `Path`: its files, without the hidden and temporary ones.

    Raises:
        ValueError: if it is not, naming the first thing wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, got '{folder}'")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "TangoPipeline":
        raise ValueError(
            f"{folder / 'model_index.json'}: `_class_name` must be 'TangoPipeline', got {index.get('_class_name')!r}"
        )
    for component in CONFIGS:
        library = (index.get(component) or [None])[0]
        if library not in ("diffusers", "transformers"):
            raise ValueError(
                f"{folder / 'model_index.json'}: `{component}` must be a diffusers or transformers class, "
                f"got {index.get(component)!r}"
            )
    check_folders(folder, index)
    read_student_entry(folder, index)

    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part.endswith(TEMPORARY) or part == "__pycache__" for part in parts):
            continue
        if path.suffix in PICKLES:
            raise ValueError(f"{path} may be a pickle: only safetensors are published")
        if len(parts) > 1 and parts[0] in CONFIGS and "." not in path.name:
            raise ValueError(f"{path} has no dot in its name, which makes every load with `variant` fail: remove it")
        if path.is_file():
            files.append(path)
        if path.suffix == ".safetensors":
            read_header(path)
    find_variants(folder)
    for component in WEIGHTS:
        for paths in weight_files(folder, component).values():
            check_weights(folder, index, {component: paths})
    for component in ("text_encoder", "vocoder"):  # saving a variant beside the plain weights writes its type there
        config = read_json(folder / component / "config.json")
        dtype, dtypes = config.get("dtype", config.get("torch_dtype")), set()
        for path in weight_files(folder, component).get(None, []):
            dtypes |= {DTYPES.get(dtype, dtype) for dtype, _ in read_header(path).values()}
        if dtype is not None and dtypes and dtype not in dtypes:
            raise ValueError(
                f"{folder / component / 'config.json'} says `dtype` {dtype!r}, but the weights are "
                f"{', '.join(sorted(dtypes))} and would load as what it says: remove that entry"
            )
    return files


def read_student_entry(folder, index):
    """What the index of a folder says of the student that its UNet is, `None` if it says nothing."""
    if index.get("student") is None:
        return None
    from pipeline_tango.student import check_student  # which imports torch

    try:
        return check_student(index["student"])
    except ValueError as error:
        raise ValueError(f"{folder / 'model_index.json'}: {error}") from error


def describe_student(student):
    """A line of the card."""
    weight, num_steps = student["guidance_scale"], student["num_inference_steps"]
    guidance = "guidance {:g} to {:g} as an input" if isinstance(weight, list) else "guidance {:g} inside"
    guidance = guidance.format(*(weight if isinstance(weight, list) else [weight]))
    return f"- Student: distilled to few steps, by default {num_steps}; {guidance}\n"


def _is_hub_id(source):
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not Path(source).exists()


def _model_card(folder, source, license, notes):
    index = read_json(folder / "model_index.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    variant = find_variants(folder)[0]

    student = read_student_entry(folder, index)
    rows = []
    for component in CONFIGS:
        num_parameters, dtypes = 0, set()
        weights = weight_files(folder, component) if component in WEIGHTS else {}
        for path in weights.get(variant, weights.get(None, [])):
            for name, (dtype, shape) in read_header(path).items():
                if not (component == "vocoder" and name in BUFFERS):
                    num_parameters += math.prod(shape)
                    dtypes.add(DTYPES.get(dtype, dtype))
        count = f"{num_parameters:,}" if weights else ""
        rows.append(f"| {component} | {index[component][1]} | {count} | {', '.join(sorted(dtypes))} |")

    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-audio",
        tags=["text-to-audio", "tango", "latent-diffusion", "audio-generation"],
        license=license,
    )
    title, origin, see = "Tango for diffusers", "", ""
    if source is not None and _is_hub_id(source):
        data.base_model = str(source)
        if license is None:
            data.license, data.license_name = "other", "that-of-the-base-model"
            data.license_link = f"https://huggingface.co/{source}"
        title = f"{str(source).split('/')[-1]} for diffusers"
        link = f"[{source}](https://huggingface.co/{source})"
        origin, see = f"Converted from {link}.\n\n", f", here {link},"
    elif source is not None:
        origin = f"Converted from a local checkpoint, `{Path(source).resolve().name}`.\n\n"
    if notes:
        origin += "".join(f"- {note}\n" for note in notes) + "\n"

    body = CARD.read_text(encoding="utf-8").format(
        title=title,
        path=PLACEHOLDER,
        variant=f', variant="{variant}"' if variant else "",
        components="\n".join(rows),
        sampling_rate=read_json(folder / "vocoder" / "config.json")["sampling_rate"],
        length=index.get("default_audio_length_in_s", 10.24),
        scheduler=", ".join(
            [index["scheduler"][1]]
            + [f"{key} {scheduler[key]}" for key in ("prediction_type", "timestep_spacing") if key in scheduler]
        ),
        steps="" if student else ", num_inference_steps=100",
        student=describe_student(student) if student else "",
        origin=f"## Origin\n\n{origin}" if origin else "",
        see=see,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tango-publish", description=__doc__)
    parser.add_argument(
        "folder", metavar="FOLDER", help="diffusers folder that tango-convert or save_pretrained wrote"
    )
    parser.add_argument("repo", metavar="REPO", help="Hub repo, OWNER/NAME; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repo as a private one")
    parser.add_argument("--token", help="access token (default: HF_TOKEN, or the one stored by `hf auth login`)")
    parser.add_argument("--commit_message", help="message of the one commit (default: 'Upload TangoPipeline')")
    parser.add_argument("--source", help="Hub id of the original checkpoint, for the model card")
    parser.add_argument("--license", help="licence of the weights by the Hub's name for it, for the model card")
    args = parser.parse_args(argv)
    try:
        url = push(
            args.folder,
            args.repo,
            private=args.private,
            token=args.token,
            commit_message=args.commit_message,
            source=args.source,
            license=args.license,
        )
    except (ValueError, OSError) as error:
        below_bars = "\n" if isinstance(error.__cause__, RuntimeError) else ""  # a broken upload leaves them open
        sys.stderr.write(f"{below_bars}error: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(f"{url}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
