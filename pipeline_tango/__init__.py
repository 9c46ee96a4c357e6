"""Tango text-to-audio as a diffusers pipeline."""

from pathlib import Path


__version__ = "0.2.0.dev0"

__all__ = [
    "SCHEDULERS",
    "TANGO_TINY",
    "TANGO_TINY_STUDENT",
    "BlockedAttnProcessor",
    "TangoPipeline",
    "log_mel_spectrogram",
]

TANGO_TINY = str(Path(__file__).parent / "tango_tiny")  # folder of a small trained checkpoint, which works offline
TANGO_TINY_STUDENT = str(Path(__file__).parent / "tango_tiny_student")  # folder of a LoRA that makes it a student


def __getattr__(name):
    if name in __all__:  # imported on first use: the command answers before torch is loaded
        from . import pipeline_tango

        return getattr(pipeline_tango, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
