"""The example that makes the pictures and figures of `docs/audio-input.md`."""

import json

import numpy as np
import pytest
import soundfile

from examples.audio_to_audio import RATE, level_db, main, measure_seams, similarity, steps_at


def noise(num_samples, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(num_samples)


def test_a_step_is_the_change_of_level_and_of_spectrum():
    audio = noise(32000)
    audio[16000:] *= 10 ** (-6 / 20)
    (step,) = steps_at(audio, [16000])
    assert step == pytest.approx([6, 6], abs=1)
    assert (steps_at(audio, [8000, 24000]) < 2).all()


def test_seams_are_ranked_among_the_places_of_their_own_recording():
    recording = noise(32000)
    result = noise(40960, seed=1)
    result[12800:22400] *= 10  # both seams of the region step by 20 dB, the one at 2 s does not
    steps, usual, ranks = measure_seams(result[None], [recording])
    assert steps.shape == usual.shape == ranks.shape == (1, 3, 2)
    assert (ranks[0, :2] == 1).all() and (steps[0, :2] > 15).all() and (usual < 3).all()
    assert (steps[0, 2] < 3).all()


def test_a_sound_is_most_similar_to_itself():
    birds, rain = noise(16000) * np.sin(np.arange(16000) / 2000), noise(16000, seed=1)
    assert similarity(birds, birds) == pytest.approx(1)
    assert similarity(birds, rain) < 0.9
    assert level_db(rain).shape == (64, 100)


def test_each_example_writes_its_sounds_and_its_picture(tiny_folder, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    soundfile.write(tmp_path / "noise.flac", noise(40000), RATE)
    data.write_text(json.dumps({"location": "noise.flac", "captions": "rain"}))
    folders = ["--output_dir", str(tmp_path / "out"), "--pictures", str(tmp_path / "pictures")]
    names = ["fill", "vary", "continue", "band", "seams"]
    options = ["--model", str(tiny_folder), "--data", str(data), "--num_inference_steps", "10"]
    main([*names, *options, *folders])
    assert {each.stem for each in (tmp_path / "pictures").iterdir()} == {"fill", "vary", "continue", "band"}
    for name, seconds in (("fill-after", 5), ("vary-0.5", 2.56), ("continue-after", 6), ("seams-noise", 2.56)):
        assert soundfile.info(tmp_path / "out" / f"{name}.wav").duration == seconds
    printed = capsys.readouterr().out
    assert "| similarity |" in printed and "| noise |" in printed and "Of 3 seams" in printed


def test_an_unknown_example_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sing"])
    assert "no example ['sing']" in capsys.readouterr().err
