"""Checkpoints in both layouts, as tests compare and damage them."""

import hashlib

import torch

from convert.convert_tango import main


def load(path):
    return torch.load(path, weights_only=True)


def equal(tensors, others):
    return tensors.keys() == others.keys() and all(
        tensors[name].dtype == others[name].dtype and torch.equal(tensors[name], others[name]) for name in tensors
    )


def fingerprint(folder):
    """Hash of every file under a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder):
    """Hash of every weight file of a diffusers folder."""
    return {name: value for name, value in fingerprint(folder).items() if name.endswith(".safetensors")}


def fails(arguments, output, capsys):
    """The error line of a run that must leave nothing behind."""
    before = set(output.parent.iterdir())
    assert main([str(argument) for argument in arguments]) == 1
    assert set(output.parent.iterdir()) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def edit(path, change):
    tensors = load(path)
    change(tensors)
    torch.save(tensors, path)
