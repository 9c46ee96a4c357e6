"""The page of the demo: its tabs, their events, and the functions that programs call. Needs Gradio."""

import base64
import functools
import html
import logging
import os
import re
import tempfile
import uuid
from pathlib import Path

import gradio as gr
import numpy as np

from .demo_model import (
    MAX_TEXT_LENGTH,
    MODES,
    OWN_SCHEDULER,
    QUALITIES,
    DemoError,
    Request,
    Sound,
    Stopped,
    audio_flags,
    check_upload,
    file_name,
    find_peaks,
    read_rows,
)
from .presets import SCHEDULER_NAMES
from .sound_files import draw_spectrogram, encode_wav, write_atomically


logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SCRIPTS = (FOLDER / "demo_page.js").read_text("utf-8")
TEXT_EXAMPLES = [["rain and thunder", 5], ["a cow moos in a field", 4], ["footsteps on gravel while birds sing", 6]]
AUDIO_EXAMPLES = [
    ["cow.flac", "a dog barks", "variation", 0.7, 0.0, 1.0, 3.0],
    ["crossing_bell.flac", "thunder", "inpainting", 1.0, 1.5, 3.0, 3.0],
    ["crossing_bell.flac", "a train passes", "continuation", 1.0, 0.0, 1.0, 4.0],
]
LONG_EXAMPLES = [
    [[[0, "heavy rain"], [10, "heavy rain"], [20, "thunder"]], 30],
    [[[0, "birds sing"], [12, "footsteps on gravel"]], 25],
]
STYLE = """
.status {min-height: 4em}
.facts {overflow-wrap: anywhere}
#region canvas {width: 100%; height: 96px; display: block; touch-action: none; cursor: col-resize; border-radius: 6px;
    background: var(--background-fill-secondary)}
#stream button {padding: 4px 12px; border: 1px solid var(--border-color-primary); border-radius: 6px}
#stream button:disabled {opacity: 0.5}
@media (max-width: 640px) {.gradio-container {padding: 8px !important}}
"""
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}  # whoever asks, and for whatever
HIDDEN = {"api_visibility": "private"}  # events of the page that programs do not call


def script(name):
    """The part of the page's JavaScript for a `gr.HTML`."""
    return re.search(rf"^// ---- {name}:.*?\n(.*?)(?=^// ----|\Z)", SCRIPTS, re.DOTALL | re.MULTILINE)[1]


def refuse_addresses(audio):
    """Let a component take what was uploaded or recorded only. Gradio would fetch a sound from any address too.

    Not by a subclass: Gradio writes a file beside the module of one.
    """
    move = audio.async_move_resource_to_block_cache

    async def move_upload(path):
        if path is not None and re.match(r"\w+:/", str(path)):
            raise say("a sound must be uploaded, addresses are not fetched")
        return await move(path)

    audio.async_move_resource_to_block_cache = move_upload


def say(sentence):
    """The error that shows one sentence to whoever called, at the page or in a program."""
    return gr.Error(html.escape(str(sentence), quote=False), duration=None, print_exception=False)


def report(fraction, text):
    gr.Progress()(fraction, desc=text)


def new_folder():
    """A folder for the files of one result, where Gradio keeps those of the page."""
    return Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))


def save_sound(sound):
    """The path of a sound as a WAV file."""
    path = new_folder() / file_name(sound.prompt, sound.seed)
    write_atomically(path, encode_wav(sound.samples, sound.sampling_rate))
    return str(path)


def save_picture(samples, sampling_rate, title):
    path = new_folder() / "spectrogram.png"
    write_atomically(path, draw_spectrogram(samples, sampling_rate, title))
    return str(path)


def encode_part(samples):
    """Base64 of samples in [-1, 1] as int16, for the page's player."""
    return base64.b64encode(np.int16(np.rint(samples.clip(-1, 1) * 32767)).tobytes()).decode()


class Results:
    """The results of a tab: a place for each take, of which those in use are shown."""

    def __init__(self, num_places, has_before=False):
        self.status = gr.Markdown(elem_classes="status")
        self.places = []
        for number in range(num_places):
            with gr.Column(visible=False, elem_classes="result") as place:
                title = f"Take {number + 1}" if num_places > 1 else "Sound"
                audio = gr.Audio(label=title, interactive=False, buttons=["download"])
                before, after = (
                    gr.Image(label=label, show_label=False, interactive=False, buttons=["fullscreen"], visible=visible)
                    for label, visible in (("before", has_before), ("after", True))
                )
                facts = gr.Markdown(elem_classes="facts")
                with gr.Accordion("Python that makes it again", open=False):
                    code = gr.Code(language="python", buttons=["copy"], interactive=False, wrap_lines=True)
            self.places.append([place, audio, before, after, facts, code])

    @property
    def components(self):
        return [self.status, *(component for place in self.places for component in place)]

    def show(self, sounds, before=None):
        """Updates of `components`. `before` is the given sound: mono samples and their rate."""
        updates = [""]
        for place, sound in zip(self.places, [*sounds, *[None] * len(self.places)]):
            if sound is None:
                updates += [gr.update(visible=False), *[None] * (len(place) - 1)]
                continue
            facts, old = sound.facts, None
            if before is not None:
                samples, sampling_rate = before
                missing = max(0, round(sound.seconds * sampling_rate) - len(samples))  # one time axis for both
                old = save_picture(np.pad(samples, (0, missing)), sampling_rate, "before")
            new = save_picture(sound.samples, sound.sampling_rate, sound.prompt if old is None else "after")
            text = (
                f"seed **{facts['seed']}** · **{facts['seconds']:g} s** of sound in {facts['compute_in_s']:.1f} s · "
                f"real-time factor {facts['real_time_factor']:.2f} · {facts['steps']} steps"
            )
            updates += [gr.update(visible=True), save_sound(sound), old, new, text, sound.code]
        return updates


class Page:
    """The page on a [`DemoModel`]: `blocks`, a `gr.Blocks` that is not launched yet."""

    def __init__(self, model):
        self.model = model
        with gr.Blocks(title="Tango", analytics_enabled=False, delete_cache=(300, 3600)) as self.blocks:
            gr.Markdown("# Tango\nSounds from text.")
            self.choices = self.choose_model()
            self.files = gr.File(file_count="multiple", visible=False, label="sounds")
            self.details = gr.JSON(visible=False, label="details")
            self.program = gr.Button(visible=False)  # its events are the functions for programs
            with gr.Tab("Text to audio"):
                self.add_text_tab()
            with gr.Tab("From audio"):
                self.add_audio_tab()
            with gr.Tab("Long"):
                self.add_long_tab()
            with gr.Tab("Model"):
                for component in self.choices:
                    component.render()
                if len(names := model.model_names()) > 1:
                    gr.Examples([[name] for name in names[:3]], self.choices[:1], label="Examples")
            answer = gr.Textbox(visible=False, label="answer")
            self.program.click(self.stop, None, answer, api_name="stop", queue=False)
            self.blocks.unload(self.leave)
        for component in self.blocks.blocks.values():  # the sounds of examples are there as long as the page
            component.keep_in_cache.update(component.temp_files)

    # functions for programs; the page shows what they return

    def text_to_audio(
        self,
        prompt: str,
        negative_prompt: str,
        seconds: float,
        takes: int,
        quality: str,
        scheduler: str,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        model: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        request: gr.Request = None,
    ):
        """Generate sounds from text: as many as `takes` says, the first with `seed`, the next with `seed + 1`."""
        settings = read_settings(quality, scheduler, steps, guidance, seed, model, lora, lora_scale)
        wanted = Request(prompt or "", negative_prompt or "", seconds, takes, **settings)
        return self.model.generate(wanted, (request.session_hash, "text"), report)

    def from_audio(
        self,
        audio: str,
        prompt: str,
        mode: str,
        strength: float,
        start: float,
        end: float,
        more_seconds: float,
        quality: str,
        scheduler: str,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        model: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        request: gr.Request = None,
    ):
        """Generate a sound from a given one: a variation of it, one with a region regenerated, or a continuation."""
        if audio is None:
            raise DemoError("there is no sound yet: upload or record one")
        settings = read_settings(quality, scheduler, steps, guidance, seed, model, lora, lora_scale)
        flags = audio_flags(mode, strength, start, end, more_seconds)
        wanted = Request(prompt or "", audio=audio, audio_flags=flags, **settings)
        return self.model.generate(wanted, (request.session_hash, "audio"), report)

    def long_sound(
        self,
        rows: list,
        seconds: float,
        quality: str,
        scheduler: str,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        model: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        request: gr.Request = None,
    ):
        """Generate a sound whose prompt changes over time: `rows` is a list of [seconds, prompt]."""
        settings = read_settings(quality, scheduler, steps, guidance, seed, model, lora, lora_scale)
        wanted = Request(read_rows(rows), seconds=seconds, **settings)
        return self.model.stream(wanted, (request.session_hash, "long"), report)

    def stop(self, request: gr.Request):
        """Stop what the session of this client generates."""
        return "Stopped." if self.model.stop(request.session_hash) else "Nothing runs."

    def leave(self, request: gr.Request):
        """The page was closed."""
        self.model.stop(request.session_hash)

    # tabs

    def choose_model(self):
        """Components of the model, which are shown in a tab of their own."""
        names, loras, custom = self.model.model_names(), self.model.lora_names(), self.model.allow_repos
        info = "one of the list, or a Hub repo such as owner/name" if custom else "one of the list"
        loras = [("none", ""), *((name, name) for name in loras)]
        options = {"allow_custom_value": custom, "info": info, "render": False}
        return [
            gr.Dropdown(names, value=names[0], label="Model", elem_id="model", **options),
            gr.Dropdown(loras, value=next(iter(self.model.given_loras), ""), label="LoRA", **options),
            gr.Slider(0, 2, 1, step=0.05, label="Scale of the LoRA", render=False),
        ]

    def add_settings(self, kind):
        """Fields that all tabs have, and buttons."""
        info = "fast: fewer steps, as tango --fast"
        quality = gr.Radio(QUALITIES, value="fast", label="Quality", info=info, elem_id=f"{kind}-quality")
        with gr.Accordion("More", open=False):
            scheduler = gr.Dropdown([OWN_SCHEDULER, *SCHEDULER_NAMES], value=OWN_SCHEDULER, label="Scheduler")
            with gr.Row():
                steps = gr.Number(None, label="Steps", precision=0, min_width=90, placeholder="default")
                guidance = gr.Number(None, label="Guidance scale", min_width=90, placeholder="default")
                seed = gr.Number(None, label="Seed", precision=0, min_width=90, placeholder="random")
        with gr.Row():
            buttons = [
                gr.Button(name, variant=variant, elem_id=f"{kind}-{name.lower()}", min_width=90)
                for name, variant in (("Generate", "primary"), ("Stop", "stop"))
            ]
        return [quality, scheduler, steps, guidance, seed, *self.choices], buttons

    def connect(self, kind, function, show, inputs, buttons, results, outputs=(), program_inputs=None):
        """The events of a tab: `show` for the page, and `function`, whose parameters are `inputs`, for programs."""
        generate, stop = buttons
        options = {"show_progress_on": [results.status], "api_name": f"{kind}_page", **HIDDEN, **ONE_AT_A_TIME}
        event = generate.click(show, inputs, [*results.components, *outputs], **options)

        def stop_this(request: gr.Request):
            return "Stopped." if self.model.stop(request.session_hash, kind) else ""

        options = {"cancels": [event], "queue": False, "api_name": f"{kind}_stop", **HIDDEN}
        stop.click(stop_this, None, results.status, **options)

        @functools.wraps(function)
        def call(*args):
            sounds = [each for each in function(*args) if isinstance(each, Sound)]
            return [save_sound(each) for each in sounds], [each.facts | {"code": each.code} for each in sounds]

        outputs = [self.files, self.details]
        options = {"api_name": function.__name__, **ONE_AT_A_TIME}
        self.program.click(self.handled(call), program_inputs or inputs, outputs, **options)

    def handled(self, function):
        """`function`, whose errors become sentences."""

        @functools.wraps(function)
        def call(*args):
            with self.sentences():
                return function(*args)

        return call

    def sentences(self):
        return Sentences(self.model)

    def add_text_tab(self):
        with gr.Row():
            with gr.Column(min_width=280):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="rain and thunder", max_length=MAX_TEXT_LENGTH, elem_id="text-prompt"
                )
                negative = gr.Textbox("", label="Negative prompt", placeholder="speech", max_length=MAX_TEXT_LENGTH)
                with gr.Row():
                    most = self.model.max_seconds
                    seconds = gr.Slider(0.1, most, min(5, most), step=0.1, label="Seconds", min_width=120)
                    takes = gr.Slider(1, self.model.max_takes, 1, step=1, label="Takes", precision=0, min_width=120)
                settings, buttons = self.add_settings("text")
            with gr.Column(min_width=280, elem_id="text-results"):
                results = Results(self.model.max_takes)
        gr.Examples(TEXT_EXAMPLES, [prompt, seconds], label="Examples")

        @functools.wraps(self.text_to_audio)
        def show(*args):
            return results.show(self.text_to_audio(*args))

        inputs = [prompt, negative, seconds, takes, *settings]
        self.connect("text", self.text_to_audio, self.handled(show), inputs, buttons, results)

    def add_audio_tab(self):
        with gr.Row():
            with gr.Column(min_width=280):
                audio = gr.Audio(type="filepath", label="Sound", buttons=["download"], elem_id="audio-input")
                refuse_addresses(audio)
                prompt = gr.Textbox(
                    label="Prompt", placeholder="thunder", max_length=MAX_TEXT_LENGTH, elem_id="audio-prompt"
                )
                mode = gr.Radio(MODES, value="variation", label="What to do with the sound", elem_id="audio-mode")
                strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="Strength", info="at 1 nothing of it is left")
                with gr.Column(visible=False) as region_column:
                    region = gr.HTML(
                        html_template='<canvas aria-label="waveform: drag to mark a region"></canvas>',
                        js_on_load=script("region"),
                        elem_id="region",
                    )
                    with gr.Row():
                        start = gr.Number(0.0, label="Region from (s)", min_width=90, elem_id="region-start")
                        end = gr.Number(1.0, label="to (s)", min_width=90, elem_id="region-end")
                more_seconds = gr.Number(3.0, label="Seconds to add", visible=False)
                settings, buttons = self.add_settings("audio")
            with gr.Column(min_width=280, elem_id="audio-results"):
                results = Results(1, has_before=True)
        inputs = [audio, prompt, mode, strength, start, end, more_seconds]
        gr.Examples(
            [[str(FOLDER / "demo_sounds" / name), *rest] for name, *rest in AUDIO_EXAMPLES], inputs, label="Examples"
        )

        def read(path):
            return check_upload(path, self.model.max_seconds)

        @functools.wraps(self.from_audio)
        def show(*args):
            sounds = self.from_audio(*args)
            samples, sampling_rate = read(args[0])
            return results.show(sounds, before=(samples.mean(axis=1), sampling_rate))

        def look(audio, start, end):
            """What is drawn of an upload."""
            if audio is None:
                return None
            samples, sampling_rate = read(audio)
            return {"peaks": find_peaks(samples), "seconds": len(samples) / sampling_rate, "start": start, "end": end}

        def choose(mode):
            return [gr.update(visible=mode == each) for each in MODES]

        self.connect("audio", self.from_audio, self.handled(show), inputs + settings, buttons, results)
        audio.change(self.handled(look), [audio, start, end], region, show_progress="hidden", **HIDDEN)
        mode.change(choose, mode, [strength, region_column, more_seconds], queue=False, **HIDDEN)
        region.input(None, region, [start, end], js="(region) => [region.start, region.end]")
        gr.on(
            [start.input, end.input],
            None,
            [region, start, end],
            region,
            js="(region, start, end) => region && ({...region, start, end})",
        )

    def add_long_tab(self):
        with gr.Row():
            with gr.Column(min_width=280):
                rows = gr.Dataframe(
                    LONG_EXAMPLES[0][0],
                    headers=["from second", "prompt"],
                    datatype=["number", "str"],
                    column_count=(2, "fixed"),
                    column_widths=["30%", "70%"],
                    type="array",
                    label="The prompt over time",
                    interactive=True,
                    wrap=True,
                )
                most = self.model.max_seconds
                seconds = gr.Slider(1, most, min(30, most), step=1, label="Seconds")
                settings, buttons = self.add_settings("long")
            with gr.Column(min_width=280, elem_id="long-results"):
                player = gr.HTML(
                    html_template="<button disabled>Pause</button> <span></span>",
                    js_on_load=script("stream"),
                    elem_id="stream",
                )
                results = Results(1)
        gr.Examples(LONG_EXAMPLES, [rows, seconds], label="Examples")

        @functools.wraps(self.long_sound)
        def show(*args):
            value = {"run": uuid.uuid4().hex, "parts": [], "seconds": 0.0}
            with self.sentences():
                for part in self.long_sound(*args):
                    if isinstance(part, Sound):
                        yield [*results.show([part]), gr.skip()]
                        continue
                    rate = self.model.pipe.vocoder.config.sampling_rate
                    parts = [*value["parts"], encode_part(part)]
                    value |= {"sampling_rate": rate, "parts": parts, "seconds": value["seconds"] + len(part) / rate}
                    yield [*[gr.skip()] * len(results.components), value.copy()]

        example = gr.JSON([[0, "heavy rain"], [20, "thunder"]], visible=False, label="rows")
        inputs = [seconds, *settings]
        options = {"outputs": [player], "program_inputs": [example, *inputs]}
        self.connect("long", self.long_sound, show, [rows, *inputs], buttons, results, **options)


class Sentences:
    """For a `with` statement: whatever is raised becomes a `gr.Error` of one sentence."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, Exception) or isinstance(error, gr.Error):
            return
        if isinstance(error, Stopped):
            raise say("stopped") from None
        text = self.model.without_paths(str(error))
        if isinstance(error, (DemoError, ValueError)):  # the pipeline's own checks are sentences too
            raise say(text) from None
        logger.error("a call failed", exc_info=error)
        raise say(f"the model failed: {text or kind.__name__}") from None


def read_settings(quality, scheduler, steps, guidance, seed, model, lora, lora_scale):
    """Fields of a [`Request`]. What is empty is the model's own."""
    return {
        "quality": quality,
        "scheduler": None if scheduler in ("", OWN_SCHEDULER) else scheduler,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "model": model or None,
        "lora": lora or None,
        "lora_scale": lora_scale,
    }
