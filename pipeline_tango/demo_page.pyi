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
)
from .presets import SCHEDULER_NAMES
from .sound_files import draw_spectrogram, encode_wav, write_atomically

logger = logging.getLogger(__name__)

SOUNDS = Path(__file__).parent / "demo_sounds"
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
# one model runs at a time, whoever asks and for whatever
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
STYLE = """
.status {min-height: 4.5em}
.facts {overflow-wrap: anywhere}
footer {flex-wrap: wrap}
@media (max-width: 640px) {.gradio-container {padding: 8px !important}}
"""

from gradio.events import Dependency

class UploadedAudio(gr.Audio):
    """A sound that was uploaded or recorded. Gradio would fetch one from any address too."""

    is_template = True  # in the browser it is the component above

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if url_or_file_path is not None and re.match(r"\w+:/", str(url_or_file_path)):
            raise say("a sound must be uploaded, addresses are not fetched")
        return await super().async_move_resource_to_block_cache(url_or_file_path)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

def say_error(error):
    """What the page or a program is told of an error: one sentence."""
    return gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False)

def told(model, error):
    """The sentence for whatever a call raised."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, Stopped):
        return say_error("stopped")
    if isinstance(error, (DemoError, ValueError)):  # the pipeline's own checks are sentences too
        return say_error(model.without_paths(str(error)))
    logger.error("a call failed", exc_info=error)
    return say_error(f"the model failed: {model.without_paths(str(error)) or type(error).__name__}")

def session_of(request):
    return None if request is None else request.session_hash

def report(fraction, text):
    gr.Progress()(fraction, desc=text)

def script(name):
    """A part of the page's JavaScript."""
    return re.search(rf"^// ---- {name}:.*?\n(.*?)(?=^// ----|\Z)", SCRIPTS, re.DOTALL | re.MULTILINE)[1]

SCRIPTS = Path(__file__).with_name("demo_page.js").read_text("utf-8")

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

def read_number(value, whole=False):
    """A number of a field; an empty one is `None`."""
    return None if value is None else int(value) if whole else float(value)

class Results:
    """The results of a tab: a place for each take, of which those in use are shown."""

    def __init__(self, num_places, has_before=False):
        self.has_before, self.places = has_before, []
        for number in range(num_places):
            with gr.Group(visible=False) as group:
                audio = gr.Audio(
                    label=f"Take {number + 1}" if num_places > 1 else "Sound",
                    interactive=False,
                    buttons=["download"],
                    elem_classes="result",
                )
                before = gr.Image(label="Before", interactive=False, visible=has_before, buttons=[])
                picture = gr.Image(
                    label="After" if has_before else "Spectrogram", interactive=False, buttons=["fullscreen"]
                )
                facts = gr.Markdown(elem_classes="facts", padding=True)
                with gr.Accordion("Python that makes it again", open=False):
                    code = gr.Code(language="python", buttons=["copy"], interactive=False, wrap_lines=True)
            self.places.append([group, audio, before, picture, facts, code])

    @property
    def components(self):
        return [component for place in self.places for component in place]

    def show(self, sounds, before=None):
        """Updates of `components`. `before` is the given sound: mono samples and their rate."""
        updates = []
        for place, sound in zip(self.places, [*sounds, *[None] * (len(self.places) - len(sounds))]):
            if sound is None:
                updates += [gr.update(visible=False), *[gr.update(value=None)] * (len(place) - 1)]
                continue
            facts = sound.facts
            text = (
                f"seed **{facts['seed']}** · **{facts['seconds']:g} s** of sound in {facts['compute_in_s']:.1f} s · "
                f"real-time factor {facts['real_time_factor']:.2f} · {facts['steps']} steps"
            )
            picture = save_picture(sound.samples, sound.sampling_rate, sound.prompt)
            old = None if before is None else save_picture(*pad(*before, sound.seconds), "the given sound")
            updates += [gr.update(visible=True), save_sound(sound), old, picture, text, sound.code]
        return updates

def pad(samples, sampling_rate, seconds):
    """Mono samples with silence up to a length, so that both pictures have one time axis."""
    return np.pad(samples, (0, max(0, round(seconds * sampling_rate) - len(samples)))), sampling_rate

def for_programs(sounds):
    return [save_sound(sound) for sound in sounds], [sound.facts | {"code": sound.code} for sound in sounds]

def build_page(model):
    """The page on a [`DemoModel`], a `gr.Blocks` that is not launched yet."""

    def handled(function):
        """`function`, whose errors become sentences."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:  # nobody at a page can do anything with a traceback
                raise told(model, error) from None

        return call

    def text_to_audio(
        prompt: str,
        negative_prompt: str = "",
        seconds: float = 5.0,
        takes: int = 1,
        quality: str = "fast",
        scheduler: str = OWN_SCHEDULER,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        model_name: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        request: gr.Request = None,
    ):
        """Generate sounds from text: `takes` of them, the first with `seed`, the next with `seed + 1`, and so on."""
        asked = Request(
            prompt=prompt or "",
            negative_prompt=negative_prompt or "",
            seconds=read_number(seconds),
            takes=read_number(takes, whole=True),
            **settings_of(quality, scheduler, steps, guidance, seed, model_name, lora, lora_scale),
        )
        return model.generate(asked, (session_of(request), "text"), report)

    def from_audio(
        audio: str,
        prompt: str,
        mode: str = "variation",
        strength: float = 0.7,
        start: float = 0.0,
        end: float = 1.0,
        more_seconds: float = 3.0,
        quality: str = "fast",
        scheduler: str = OWN_SCHEDULER,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        model_name: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        request: gr.Request = None,
    ):
        """Generate a sound from a given one: a variation of it, with a region of it regenerated, or continued."""
        if audio is None:
            raise DemoError("there is no sound yet: upload or record one")
        asked = Request(
            prompt=prompt or "",
            audio=audio,
            audio_options=audio_flags(mode, strength, start, end, more_seconds),
            **settings_of(quality, scheduler, steps, guidance, seed, model_name, lora, lora_scale),
        )
        return model.generate(asked, (session_of(request), "audio"), report)

    def long_sound(
        rows: list,
        seconds: float = 30.0,
        quality: str = "fast",
        scheduler: str = OWN_SCHEDULER,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        model_name: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        request: gr.Request = None,
    ):
        """Generate a long sound whose prompt changes over time. `rows` is a list of [seconds, prompt]."""
        asked = Request(
            prompt=read_rows(rows),
            seconds=read_number(seconds),
            **settings_of(quality, scheduler, steps, guidance, seed, model_name, lora, lora_scale),
        )
        return model.stream(asked, (session_of(request), "long"), report)

    def stop(kind):
        def stop(request: gr.Request = None):
            """Stop what this client's session generates."""
            return "Stopped." if model.stop(session_of(request), kind) else "Nothing runs."

        return stop

    def show_text(*args, **kwargs):
        return ["", *text_results.show(text_to_audio(*args, **kwargs))]

    def show_audio(audio, *args, **kwargs):
        sounds = from_audio(audio, *args, **kwargs)
        samples, sampling_rate = check_upload(audio, model.max_seconds)
        return ["", *audio_results.show(sounds, before=(samples.mean(axis=1), sampling_rate))]

    @functools.wraps(long_sound)
    def show_long(*args, **kwargs):
        shown, run, parts, num_samples = [gr.skip()] * len(long_results.components), uuid.uuid4().hex, [], 0
        try:
            for part in long_sound(*args, **kwargs):
                if isinstance(part, Sound):
                    yield ["", gr.skip(), *long_results.show([part])]
                    continue
                parts.append(base64.b64encode(np.int16(np.rint(part.clip(-1, 1) * 32767)).tobytes()).decode())
                num_samples += len(part)
                sampling_rate = model.pipe.vocoder.config.sampling_rate
                value = {"run": run, "sampling_rate": sampling_rate, "parts": parts.copy()}
                yield ["", value | {"seconds": num_samples / sampling_rate}, *shown]
        except Exception as error:
            raise told(model, error) from None

    def look(audio):
        """What is drawn of an upload."""
        if audio is None:
            return None
        samples, sampling_rate = check_upload(audio, model.max_seconds)
        seconds = len(samples) / sampling_rate
        return {"peaks": find_peaks(samples), "seconds": seconds, "start": 0, "end": min(1.0, seconds)}

    def named(function, show):
        """`show` with the name and the parameters of `function`."""
        return handled(functools.wraps(function)(show))

    def common_settings():
        quality = gr.Radio(QUALITIES, value="fast", label="Quality", info="fast: fewer steps, as tango --fast")
        with gr.Accordion("More", open=False):
            scheduler = gr.Dropdown([OWN_SCHEDULER, *SCHEDULER_NAMES], value=OWN_SCHEDULER, label="Scheduler")
            with gr.Row():
                steps = gr.Number(None, label="Steps", precision=0, min_width=90, placeholder="default")
                guidance = gr.Number(None, label="Guidance scale", min_width=90, placeholder="default")
                seed = gr.Number(None, label="Seed", precision=0, min_width=90, placeholder="random")
        return [quality, scheduler, steps, guidance, seed]

    def buttons(kind):
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", elem_id=f"{kind}-generate", min_width=90)
            stop = gr.Button("Stop", variant="stop", elem_id=f"{kind}-stop", min_width=90)
        return generate, stop

    def connect(kind, generate, stop_button, function, show, inputs, results, more_outputs=(), **names):
        """The events of a tab, and its function for programs."""
        status, places = results
        ran = generate.click(
            show,
            inputs,
            [status, *more_outputs, *places.components],
            show_progress_on=[status],
            api_visibility="private",
            **ONE_AT_A_TIME,
        )
        stop_button.click(stop(kind), None, status, cancels=[ran], queue=False, api_visibility="private")
        return ran

    with gr.Blocks(title="Tango", analytics_enabled=False, delete_cache=(300, 3600)) as page:
        gr.Markdown("# Tango\nSounds from text, by [pipeline-tango](https://arxiv.org/abs/2304.13731).")
        chosen_model = gr.Dropdown(
            model.model_names(),
            value=next(iter(model.given)),
            allow_custom_value=model.allow_repos,
            label="Model",
            info="A name of the list" + (", or a Hub repo such as owner/name" if model.allow_repos else ""),
            render=False,
        )
        chosen_lora = gr.Dropdown(
            [("none", ""), *((name, name) for name in model.lora_names())],
            value=next(iter(model.given_loras), ""),
            allow_custom_value=model.allow_repos,
            label="LoRA",
            render=False,
        )
        lora_scale = gr.Slider(0, 2, 1, step=0.05, label="Scale of the LoRA", render=False)
        models = [chosen_model, chosen_lora, lora_scale]
        files = gr.File(file_count="multiple", visible=False, label="sounds")
        facts = gr.JSON(visible=False, label="seed, seconds, real-time factor and code of each")
        for_api = gr.Button(visible=False)

        with gr.Tab("Text to audio"), gr.Row():
            with gr.Column(min_width=280):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="rain and thunder", max_length=MAX_TEXT_LENGTH, elem_id="text-prompt"
                )
                negative = gr.Textbox(label="Negative prompt", placeholder="speech", max_length=MAX_TEXT_LENGTH)
                with gr.Row():
                    seconds = gr.Slider(0.5, model.max_seconds, 5, step=0.5, label="Seconds", min_width=120)
                    takes = gr.Slider(1, model.max_takes, 1, step=1, label="Takes", precision=0, min_width=120)
                inputs = [prompt, negative, seconds, takes, *common_settings(), *models]
                generate, stop_button = buttons("text")
                gr.Examples(TEXT_EXAMPLES, [prompt, seconds], label="Examples")
            with gr.Column(min_width=280):
                status = gr.Markdown(elem_classes="status", elem_id="text-status")
                text_results = Results(model.max_takes)
            show = named(text_to_audio, show_text)
            connect("text", generate, stop_button, text_to_audio, show, inputs, (status, text_results))
            for_api.click(
                named(text_to_audio, lambda *args, **kwargs: for_programs(text_to_audio(*args, **kwargs))),
                inputs,
                [files, facts],
                api_name="text_to_audio",
                **ONE_AT_A_TIME,
            )

        with gr.Tab("From audio"), gr.Row():
            with gr.Column(min_width=280):
                audio = UploadedAudio(
                    sources=["upload", "microphone"], type="filepath", label="Sound", elem_id="audio-input"
                )
                prompt = gr.Textbox(label="Prompt", placeholder="thunder", max_length=MAX_TEXT_LENGTH)
                mode = gr.Radio(MODES, value="variation", label="What to do with the sound")
                strength = gr.Slider(
                    0.05, 1, 0.7, step=0.05, label="Strength", info="at 1 nothing of the sound is left"
                )
                with gr.Group(visible=False) as region_group:
                    region = gr.HTML(
                        html_template='<canvas aria-label="waveform: drag to mark a region"></canvas>',
                        css_template="canvas {width: 100%; height: 96px; display: block; touch-action: none; "
                        "cursor: col-resize; border-radius: 6px; background: var(--background-fill-secondary)}",
                        js_on_load=script("region"),
                        elem_id="region",
                    )
                    with gr.Row():
                        start = gr.Number(0.0, label="Region from (s)", min_width=90, elem_id="region-start")
                        end = gr.Number(1.0, label="to (s)", min_width=90, elem_id="region-end")
                more_seconds = gr.Number(3.0, label="Seconds to add", visible=False)
                inputs = [audio, prompt, mode, strength, start, end, more_seconds, *common_settings(), *models]
                generate, stop_button = buttons("audio")
                gr.Examples(
                    [[str(SOUNDS / name), *rest] for name, *rest in AUDIO_EXAMPLES], inputs[:7], label="Examples"
                )
            with gr.Column(min_width=280):
                status = gr.Markdown(elem_classes="status", elem_id="audio-status")
                audio_results = Results(1, has_before=True)
            show = named(from_audio, show_audio)
            connect("audio", generate, stop_button, from_audio, show, inputs, (status, audio_results))
            for_api.click(
                named(from_audio, lambda *args, **kwargs: for_programs(from_audio(*args, **kwargs))),
                inputs,
                [files, facts],
                api_name="from_audio",
                **ONE_AT_A_TIME,
            )
            audio.change(handled(look), audio, region, show_progress="hidden", api_visibility="private")
            mode.change(
                lambda mode: [gr.update(visible=mode == each) for each in MODES],
                mode,
                [strength, region_group, more_seconds],
                queue=False,
                api_visibility="private",
            )
            region.input(None, region, [start, end], js="(region) => [region.start, region.end]")
            gr.on(
                [start.input, end.input],
                None,
                [region, start, end],
                region,
                js="(region, start, end) => region && ({...region, start, end})",
            )

        with gr.Tab("Long"), gr.Row():
            with gr.Column(min_width=280):
                rows = gr.Dataframe(
                    LONG_EXAMPLES[0][0],
                    headers=["from second", "prompt"],
                    datatype=["number", "str"],
                    column_count=(2, "fixed"),
                    type="array",
                    label="The prompt over time",
                    interactive=True,
                    wrap=True,
                    column_widths=["30%", "70%"],
                )
                seconds = gr.Slider(1, model.max_seconds, 30, step=1, label="Seconds")
                inputs = [rows, seconds, *common_settings(), *models]
                generate, stop_button = buttons("long")
                gr.Examples(LONG_EXAMPLES, [rows, seconds], label="Examples")
            with gr.Column(min_width=280):
                status = gr.Markdown(elem_classes="status", elem_id="long-status")
                player = gr.HTML(
                    html_template="<button disabled>Pause</button> <span></span>",
                    css_template="button {padding: 4px 12px; border: 1px solid var(--border-color-primary); "
                    "border-radius: 6px} button:disabled {opacity: 0.5}",
                    js_on_load=script("stream"),
                    elem_id="stream",
                )
                long_results = Results(1)
            show = functools.wraps(long_sound)(show_long)
            connect("long", generate, stop_button, long_sound, show, inputs, (status, long_results), [player])
            for_api.click(
                named(long_sound, lambda *args, **kwargs: for_programs(list(long_sound(*args, **kwargs))[-1:])),
                [gr.JSON([[0, "heavy rain"], [20, "thunder"]], visible=False, label="rows"), *inputs[1:]],
                [files, facts],
                api_name="long_sound",
                **ONE_AT_A_TIME,
            )

        with gr.Tab("Model"):
            for component in models:
                component.render()
            if len(model.model_names()) > 1:
                gr.Examples([[name] for name in model.model_names()[:3]], [chosen_model], label="Examples")
        for_api.click(stop(None), None, gr.Textbox(visible=False, label="answer"), api_name="stop", queue=False)
        page.unload(functools.partial(model.stop))
    return page

def settings_of(quality, scheduler, steps, guidance, seed, model_name, lora, lora_scale):
    return {
        "quality": quality,
        "scheduler": None if scheduler in (None, OWN_SCHEDULER) else scheduler,
        "steps": read_number(steps, whole=True),
        "guidance": read_number(guidance),
        "seed": read_number(seed, whole=True),
        "model": model_name or None,
        "lora": lora or None,
        "lora_scale": read_number(lora_scale),
    }

def read_rows(rows):
    """`[(seconds, prompt), ...]` of a table, in order, without its empty rows."""
    keyframes = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, list) or len(row) != 2:
            raise DemoError("each row must have two cells, seconds and prompt")
        seconds, prompt = row
        if prompt in (None, "") and seconds in (None, ""):
            continue
        try:
            seconds = float(seconds or 0)
        except (TypeError, ValueError):
            raise DemoError(f"the time of a row must be a number of seconds, got {seconds!r:.100}") from None
        if not 0 <= seconds < float("inf"):
            raise DemoError(f"the time of a row must be a number of seconds from 0 on, got {seconds}")
        keyframes.append((seconds, str(prompt or "")))
    return sorted(keyframes)
