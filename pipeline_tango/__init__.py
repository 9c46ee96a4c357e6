"""Tango text-to-audio as a diffusers pipeline."""

from .pipeline_tango import SCHEDULERS, TangoPipeline, log_mel_spectrogram


__version__ = "0.1.0"

__all__ = ["SCHEDULERS", "TangoPipeline", "log_mel_spectrogram"]
