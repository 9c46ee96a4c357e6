import importlib
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from training.arguments import (
    add_data_arguments,
    add_optimisation_arguments,
    build_parser,
    check_arguments,
    check_libraries,
    clip_sources,
    program_name,
)


ROOT = Path(__file__).parents[1]


@pytest.fixture
def parser():
    parser = build_parser("training.train", "Train.")
    add_data_arguments(parser).add_argument("--caption_column")
    add_optimisation_arguments(parser)
    return parser


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/usr/bin/tango-train", "tango-train"),
        ("C:/Scripts/tango-train.exe", "tango-train"),
        ("/src/training/train.py", "python -m training.train"),
        ("/usr/bin/pytest", "python -m training.train"),
    ],
)
def test_a_program_is_named_as_it_was_started(monkeypatch, started, name):
    monkeypatch.setattr(sys, "argv", [started])
    assert program_name("training.train") == name
    assert build_parser("training.train", "Train.").prog == name


def test_help_names_each_default_once(parser):
    text = " ".join(parser.format_help().split())
    assert "(default: None)" not in text and "(default: False)" not in text
    assert "column of the sound (default: by convention)" in text
    assert "passes over the data (default: 40)" in text and "of linear warm-up (default: 0)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--train_manifest and --dataset_name"),
        (["--train_manifest=M", "--dataset_name=D"], "--train_manifest and --dataset_name"),
        (["--train_manifest=M", "--train_batch_size=0"], "--train_batch_size has to be at least 1, not 0"),
        (["--train_manifest=M", "--seed=-1"], "--seed has to be at least 0, not -1"),
    ],
)
def test_wrong_flags_are_refused_by_name(parser, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        check_arguments(parser, parser.parse_args(flags))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_sources_of_clips_are_those_of_the_flags(parser):
    sources = clip_sources(parser.parse_args(["--train_manifest=M", "--audio_column=path", "--max_train_samples=3"]))
    assert (sources.train_manifest, sources.audio_column, sources.max_train_samples) == ("M", "path", 3)
    assert sources.validation_manifest is None and sources.min_length_in_s == 0.1


@pytest.mark.parametrize(
    ("library", "flags", "purpose"),
    [
        ("soundfile", {}, "reading sounds"),
        ("datasets", {"dataset_name": "D"}, "--dataset_name"),
        ("peft", {"lora_rank": 4}, "--lora_rank"),
        ("tensorboard", {"report_to": "tensorboard"}, "--report_to tensorboard"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library, flags, purpose):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    args = Namespace(**{"dataset_name": None, "lora_rank": None, "report_to": "none"} | flags)
    with pytest.raises(ValueError) as error:
        check_libraries(args)
    assert str(error.value) == f'{purpose} needs {library}: pip install "pipeline-tango[train]"'


def test_every_script_says_its_name_and_flags_without_optional_libraries():
    script = (
        "import contextlib, importlib, io, sys\n"
        "for name in ('soundfile', 'datasets', 'peft', 'sentencepiece', 'matplotlib', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "for name in ('train', 'train_dpo', 'train_autoencoder', 'train_vocoder', 'train_tokenizer', 'preferences'):\n"
        "    text = io.StringIO()\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):\n"
        "        importlib.import_module(f'training.{name}').main(['--help'])\n"
        "    assert text.getvalue().startswith(f'usage: python -m training.{name} '), text.getvalue()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


NUMBERS = {  # flag -> values that make no sense
    "train": {
        "--learning_rate": ("nan", "inf", "-1"),
        "--lora_alpha": ("0", "nan"),
        "--lora_dropout": ("1", "-0.1"),
        "--snr_gamma": ("0", "-5", "nan"),
        "--adam_beta2": ("1", "nan"),
        "--ema_decay": ("1.1", "nan"),
        "--lr_warmup_steps": ("-1",),
        "--min_length_in_s": ("nan", "-1"),
        "--audio_length_in_s": ("0", "inf"),
        "--mix_ratio": ("1.5", "nan"),
        "--validation_guidance_scale": ("nan", "-1"),
        "--num_workers": ("-1",),
    },
    "train_dpo": {
        "--beta": ("0", "nan"),
        "--clip_progress": ("0", "1"),
        "--chosen_weight": ("-1",),
        "--num_supervised_steps": ("-1",),
    },
    "preferences": {"--num_takes": ("1",), "--min_margin": ("nan", "-1"), "--order_weight": ("inf",)},
    "train_autoencoder": {
        "--kl_weight": ("nan", "-1"),
        "--length_factors": ("inf", "nan"),
        "--audio_length_in_s": ("nan",),
    },
    "train_vocoder": {"--mel_weight": ("nan", "-1"), "--num_segment_frames": ("0",), "--periods": ("0",)},
    "train_tokenizer": {"--max_length": ("1",), "--seed": ("-1",)},
    "evaluate": {"--seed": ("-1",), "--audio_length_in_s": ("nan",), "--confidence": ("nan", "1")},
    "copy_synthesis": {"--seconds": ("nan", "inf", "0")},
    "listening_test": {"--max_length_in_s": ("nan", "0")},
}
START = {
    "train": ["--pretrained_model_name_or_path=x", "--train_manifest=x"],
    "train_dpo": ["--pretrained_model_name_or_path=x", "--train_manifest=x"],
    "preferences": ["--model=x", "--prompts=x"],
    "train_autoencoder": ["--train_manifest=x"],
    "train_vocoder": ["--train_manifest=x"],
    "train_tokenizer": ["--train_manifest=x"],
    "evaluate": ["--generated=x"],
    "copy_synthesis": ["x", "y"],
    "listening_test": ["build", "--system=a=b", "--output=x.html"],
}


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [(script, flag, value) for script, flags in NUMBERS.items() for flag, values in flags.items() for value in values],
)
def test_a_number_that_makes_no_sense_is_refused_by_name(script, flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = [*START[script], *([] if script in ("copy_synthesis", "listening_test") else ["--output_dir=out"])]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"training.{script}").main([*start, f"{flag}={value}"])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert f"error: {flag} has to be " in " ".join(capsys.readouterr().err.split())


def test_every_number_on_a_command_line_has_a_range():
    for path in [*(ROOT / "training").glob("*.py"), *(ROOT / "convert").glob("*.py")]:
        assert not re.search(r"type=(int|float)\b", path.read_text()), path
