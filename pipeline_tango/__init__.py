"""Tango text-to-audio as a diffusers pipeline."""

__version__ = "0.1.0"

__all__ = ["SCHEDULERS", "TangoPipeline", "log_mel_spectrogram"]


def __getattr__(name):
    if name in __all__:  # imported on first use: the command answers before torch is loaded
        from . import pipeline_tango

        return getattr(pipeline_tango, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
