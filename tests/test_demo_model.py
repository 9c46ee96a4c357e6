"""What the demo generates, without the page."""

import re
import threading

import numpy as np
import pytest
from conftest import build_components, noise
from scipy.io import wavfile
from test_lora import lora_of

from pipeline_tango import TangoPipeline
from pipeline_tango.__main__ import main
from pipeline_tango.demo_model import (
    DemoError,
    DemoModel,
    Request,
    Sound,
    Stopped,
    audio_flags,
    check_upload,
    find_peaks,
    read_rows,
)
from pipeline_tango.sound_files import encode_wav


JOB = ("session", "text")


def ignore(fraction, text):
    pass


def fail_at_a_step(fraction, text):
    assert fraction is None, "a model ran"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models: `small`, `deeper/other` and the LoRA `storm`, and beside them in vain `secret`."""
    folder = tmp_path_factory.mktemp("served") / "models"
    pipe = TangoPipeline(**build_components(), default_audio_length_in_s=0.32)
    pipe.save_pretrained(folder / "small")
    pipe.save_pretrained(folder.parent / "secret")
    for parameter in pipe.unet.conv_out.parameters():
        parameter.data.mul_(0.5)
    pipe.save_pretrained(folder / "deeper" / "other")
    layers, metadata = lora_of(pipe, 1)
    TangoPipeline.save_lora_weights(folder / "storm", layers, unet_lora_adapter_metadata=metadata)
    (folder / "link").symlink_to(folder.parent / "secret")
    return folder


@pytest.fixture
def demo(models, monkeypatch):
    monkeypatch.chdir(models)
    return DemoModel("small", models=models, max_seconds=5, device="cpu", dtype="float32")


@pytest.fixture
def recording(models):
    path = models / "recording.wav"
    wavfile.write(path, 16000, (noise(9600) * 32767).astype(np.int16))
    return str(path)


def wav(sound):
    return encode_wav(sound.samples, sound.sampling_rate)


@pytest.mark.parametrize(
    "settings, flags",
    [
        ({}, ["--steps=3"]),
        ({"quality": "fast"}, ["--fast"]),
        ({"quality": "fast", "scheduler": "ddim", "guidance": 2.5}, ["--fast", "--scheduler=ddim", "--guidance=2.5"]),
        ({"negative_prompt": "hiss", "seconds": 0.2}, ["--negative_prompt=hiss", "--seconds=0.2", "--steps=3"]),
        ({"lora": "storm", "scheduler": "euler"}, ["--lora=storm", "--scheduler=euler", "--steps=3"]),
    ],
)
def test_a_sound_is_that_of_the_command_with_the_same_settings_and_seed(demo, tmp_path, settings, flags):
    settings = {"seed": 7, "takes": 2, **({} if "quality" in settings else {"steps": 3}), **settings}
    sounds = demo.generate(Request("-rain", **settings), JOB, ignore)
    flags += ["--seed=7", "--takes=2", "--device=cpu", "--dtype=float32", "--quiet"]
    assert main(["--model=small", "-o", str(tmp_path / "a.wav"), *flags, "--", "-rain"]) == 0
    assert [wav(sound) for sound in sounds] == [(tmp_path / f"a-{n}.wav").read_bytes() for n in (1, 2)]
    assert [sound.seed for sound in sounds] == [7, 8] and wav(sounds[0]) != wav(sounds[1])


@pytest.mark.parametrize(
    "mode, flags",
    [("variation", ["--strength=0.7"]), ("inpainting", ["--mask=0.1-0.3"]), ("continuation", ["--continue=0.3"])],
)
def test_what_is_made_of_a_sound_is_what_the_command_makes(demo, recording, tmp_path, mode, flags):
    request = Request("rain", audio=recording, audio_flags=audio_flags(mode, 0.7, 0.1, 0.3, 0.3), seed=1, steps=3)
    [sound] = demo.generate(request, JOB, ignore)
    flags += ["--audio", recording, "--seed=1", "--steps=3", "--device=cpu", "--dtype=float32", "--quiet"]
    assert main(["rain", "--model=small", "-o", str(tmp_path / "a.wav"), *flags]) == 0
    assert wav(sound) == (tmp_path / "a.wav").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"quality": "fast", "negative_prompt": 'a "loud" hiss', "takes": 2},
        {"steps": 3, "lora": "storm", "lora_scale": 0.5, "scheduler": "ddim"},
        {"steps": 3, "audio_flags": audio_flags("inpainting", None, 0.1, 0.3, None)},
        {"steps": 3, "audio_flags": audio_flags("variation", 0.7, None, None, None)},
    ],
)
def test_the_python_beside_a_sound_makes_it_again(demo, recording, settings):
    settings |= {"audio": recording} if "audio_flags" in settings else {}
    for sound in demo.generate(Request("rain & größe", seed=3, **settings), JOB, ignore):
        made = run(sound.code)
        assert np.array_equal(made["audio"], sound.samples)
        assert (demo.models / f"rain-gr-e-{sound.seed}.wav").exists()


def test_a_stream_is_the_parts_of_the_sound_that_its_python_makes(demo):
    request = Request([(0.0, "rain"), (0.8, "dog")], seconds=1.0, seed=2, steps=2)
    *parts, sound = demo.stream(request, JOB, ignore)
    assert len(parts) > 1 and isinstance(sound, Sound)
    assert np.array_equal(np.concatenate(parts), sound.samples) and len(sound.samples) == 16000
    assert np.array_equal(run(sound.code)["audio"], sound.samples)
    assert sound.prompt == "rain; dog"


def run(code):
    names = {}
    exec(compile(code, "code", "exec"), names)
    return names


def test_one_model_is_in_memory_and_another_scheduler_needs_no_loading(demo):
    plain = demo.generate(Request("rain", steps=2, seed=0), JOB, ignore)
    pipe = demo.pipe
    demo.generate(Request("rain", steps=2, seed=0, scheduler="heun"), JOB, ignore)
    assert demo.pipe is pipe
    again = demo.generate(Request("rain", steps=2, seed=0), JOB, ignore)
    assert demo.pipe is pipe and wav(again[0]) == wav(plain[0])  # with the model's own scheduler
    other = demo.generate(Request("rain", steps=2, seed=0, model="deeper/other"), JOB, ignore)
    assert demo.pipe is not pipe and wav(other[0]) != wav(plain[0])


def test_progress_tells_every_step_of_every_take(demo):
    told = []
    demo.generate(Request("rain", steps=2, takes=2, seed=0), JOB, lambda *each: told.append(each))
    assert told == [(None, "loading small")] + [
        (step / 2, f"take {take} of 2, step {step} of 2") for take in (1, 2) for step in (1, 2)
    ]


def test_stop_ends_the_call_at_the_next_step_and_the_next_call_is_as_ever(demo):
    request = Request("rain", steps=4, seed=0)
    before = demo.generate(request, JOB, ignore)
    told = []

    def stop_at_two(fraction, text):
        told.append(text)
        if text == "step 2 of 4":
            assert not demo.stop("another session") and not demo.stop("session", "long") and demo.stop("session")

    with pytest.raises(Stopped):
        demo.generate(request, JOB, stop_at_two)
    assert told == ["step 1 of 4", "step 2 of 4"]
    assert not demo.stop("session")  # nothing runs
    assert wav(demo.generate(request, JOB, ignore)[0]) == wav(before[0])
    parts = demo.stream(Request([(0, "rain")], seconds=1.0, steps=4), JOB, ignore)
    next(parts)
    demo.stop("session")
    with pytest.raises(Stopped):
        list(parts)
    parts = demo.stream(Request([(0, "rain")], seconds=1.0, steps=4), JOB, ignore)
    next(parts)
    parts.close()  # as Gradio does when a page is closed
    assert wav(demo.generate(request, JOB, ignore)[0]) == wav(before[0])


def test_calls_wait_for_each_other(demo):
    inside, most, sounds = [], [], {}

    def work(number):
        def watch(fraction, text):
            inside.append(number)
            most.append(len(set(inside)))
            if fraction == 1:
                inside.clear()

        sounds[number] = demo.generate(Request("rain", steps=3, seed=number), (str(number), "text"), watch)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and sorted(sounds) == [0, 1, 2]
    assert [sounds[number][0].seed for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["../secret", "link", "/etc", ".", "..", "small/../../secret", "owner/name", "", "a\0b"]
)
def test_only_models_below_the_folder_are_loaded(demo, name):
    assert demo.model_names() == ["small", "deeper/other"] and demo.lora_names() == ["storm"]
    name = name or "recording.wav"
    with pytest.raises(DemoError, match="the model must be one of 'small', 'deeper/other', got"):
        demo.generate(Request("rain", model=name), JOB, ignore)
    with pytest.raises(DemoError, match="the LoRA must be one of 'storm', got"):
        demo.generate(Request("rain", lora=name), JOB, ignore)


def test_repos_are_loaded_only_if_allowed_and_are_never_folders(models, monkeypatch):
    monkeypatch.chdir(models)
    demo = DemoModel("small", allow_repos=True)
    assert demo.model_names() == ["small"]
    assert demo.locate("declare-lab/tango2", {}, [], "model") == "declare-lab/tango2"
    for name in ("deeper/other", "../secret", "a/b/c", "-a/b", "a"):
        with pytest.raises(DemoError, match="or a Hub repo such as owner/name"):
            demo.generate(Request("rain", model=name), JOB, ignore)
    with pytest.raises(DemoError) as error:  # there is no network
        demo.generate(Request("rain", model="owner/none"), JOB, ignore)
    assert "owner/none" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x" * 1001}, "prompt must have at most 1000 characters, got 1001"),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": [(0.0, "rain"), (1.0, "")]}, "the prompt is empty"),
        ({"negative_prompt": "x" * 2000}, "negative_prompt must have at most"),
        ({"seconds": 5.5}, "seconds must be at most 5, got 5.5"),
        ({"seconds": 0}, "seconds must be a number of seconds from 0.001"),
        ({"seconds": float("nan")}, "seconds must be a number of seconds"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"guidance": -1}, "guidance must be a number from 0 to 1000, got -1"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"takes": 5}, "takes must be a whole number from 1 to 4, got 5"),
        ({"quality": "best"}, "quality must be fast or full, got 'best'"),
        ({"scheduler": "best"}, "invalid choice: 'best'"),
        ({"lora_scale": 9}, "the scale of the LoRA must be"),
        ({"steps": 999, "scheduler": "lcm"}, "steps must be at most"),
        ({"prompt": "\ud800"}, "prompt must be"),
    ],
)
def test_bad_input_is_a_sentence_before_a_model_runs(demo, settings, message):
    with pytest.raises(DemoError, match=message) as error:
        demo.generate(Request(**({"prompt": "rain"} | settings)), JOB, fail_at_a_step)
    assert "\n" not in str(error.value) and str(demo.models) not in str(error.value)
    assert not demo.lock.locked()


@pytest.fixture
def upload(tmp_path):
    def write(content):
        (tmp_path / "upload.wav").write_bytes(content)
        return str(tmp_path / "upload.wav")

    return write


def test_uploads_are_decoded_only_as_far_as_they_are_accepted(upload, tmp_path):
    samples, sampling_rate = check_upload(upload(encode_wav(noise(8000), 8000)), 1.0)
    assert samples.shape == (8000, 1) and sampling_rate == 8000
    long = encode_wav(noise(8001), 8000)
    # a header that was never completed says nothing of the length
    unfinished = long[:4] + bytes(4) + long[8:40] + bytes(4) + long[44:]
    path = tmp_path / "wide.wav"
    wavfile.write(path, 8000, np.zeros((100, 9), np.int16))
    for content, message in [
        (long, "must be at most 1 s long"),
        (unfinished, "must be at most 1 s long"),
        (b"no sound", "cannot be read: Format not recognised"),
        (long[:1000], "cannot be read: it is cut short"),
        (b"", "cannot be read"),
        (encode_wav(noise(0), 8000), "the sound is empty"),
        (path.read_bytes(), "at most 8 channels, it has 9"),
    ]:
        with pytest.raises(DemoError, match=message) as error:
            check_upload(upload(content), 1.0)
        assert str(tmp_path) not in str(error.value)


def test_a_result_longer_than_accepted_is_refused_before_it_is_made(demo, recording):
    request = Request("rain", audio=recording, audio_flags={"continue": 4.9})
    with pytest.raises(DemoError, match="seconds must be at most 5 in all, got 5.5"):
        demo.generate(request, JOB, fail_at_a_step)


@pytest.mark.parametrize("start, end", [(1, 1), (2, 1), (-1, 1), (None, 1), (0, None), (float("nan"), 1)])
def test_a_region_has_to_end_after_it_starts(start, end):
    with pytest.raises(DemoError, match="the region must end after it starts"):
        audio_flags("inpainting", 1, start, end, 1)


def test_rows_become_keyframes_in_order():
    assert read_rows([["4", "thunder"], [0, "rain"], [None, ""], ["", "wind"]]) == [
        (0.0, "rain"),
        (0.0, "wind"),
        (4.0, "thunder"),
    ]
    for rows, message in [([["a", "b"]], "from 0 on, got 'a'"), ([[-1, "b"]], "from 0 on"), ([[1]], "two cells")]:
        with pytest.raises(DemoError, match=message):
            read_rows(rows)


def test_peaks_are_the_largest_magnitudes_of_equal_parts():
    samples = np.zeros((4000, 2), np.float32)
    samples[1005, 1] = -0.5
    peaks = find_peaks(samples)
    assert len(peaks) == 400 and peaks[100] == 0.5 and sum(peaks) == 0.5
    assert find_peaks(np.full((3, 1), 0.25)) == [0.25] * 3


def test_sentences_name_no_folder_of_this_machine(demo):
    text = demo.without_paths(f"cannot load {demo.models}/small: no file /home/alice/x/model.bin\n in https://a.b/c/d")
    assert text == "cannot load models/small: no file model.bin in https://a.b/c/d"


def test_a_damaged_model_is_a_sentence_and_the_next_call_works(demo, models):
    broken = models / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "TangoPipeline"}')
    try:
        with pytest.raises(DemoError) as error:
            demo.generate(Request("rain", model="broken"), JOB, ignore)
    finally:
        (broken / "model_index.json").unlink()
    assert re.search("broken", str(error.value)) and str(models.parent) not in str(error.value)
    assert demo.generate(Request("rain", steps=1), JOB, ignore)
