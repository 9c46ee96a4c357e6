"""The demo as programs and people meet it: the command, the Space, functions over HTTP, and the page in Chromium."""

import configparser
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from conftest import noise
from scipy.io import wavfile

from pipeline_tango.__main__ import main as tango
from pipeline_tango.demo import launch, main, parse_arguments
from pipeline_tango.sound_files import encode_wav


pytest.importorskip("gradio", reason="needs Gradio")
needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium and its driver")

ROOT = Path(__file__).parents[1]
SHORT = {"seconds": 0.3, "steps": 2}


@pytest.fixture(scope="module")
def served(tiny_folder, tmp_path_factory):
    """The page on the tiny model, in this process: its `gr.Blocks` and its address, with the folder of its files."""
    folder = tmp_path_factory.mktemp("files")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    flags = [f"--model={tiny_folder}", "--dtype=float32", "--device=cpu", "--port=0", "--queue=8"]
    blocks, url = launch(parse_arguments([*flags, "--max_seconds=20", "--max_upload=0.2"]))
    yield Namespace(blocks=blocks, url=url.rstrip("/"), folder=folder)
    blocks.close(verbose=False)
    if before is None:
        del os.environ["GRADIO_TEMP_DIR"]
    else:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture
def client(served, tmp_path):
    from gradio_client import Client

    return Client(served.url, verbose=False, download_files=tmp_path, httpx_kwargs={"timeout": 60})


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "recording.wav"
    path.write_bytes(encode_wav(noise(16000), 16000))
    return path


def wait_for_a_step(job):
    def is_there():
        assert not job.done(), job.exception()
        told = job.status().progress_data
        return told and re.fullmatch(r"step \d+ of 900", told[0].desc)

    wait_until(is_there)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.02)


# programs


def test_functions_have_names_and_documented_arguments(client):
    functions = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    settings = ["quality", "scheduler", "steps", "guidance", "seed", "model", "lora", "lora_scale"]
    assert {name: [each["parameter_name"] for each in about["parameters"]] for name, about in functions.items()} == {
        "/text_to_audio": ["prompt", "negative_prompt", "seconds", "takes", *settings],
        "/from_audio": ["audio", "prompt", "mode", "strength", "start", "end", "more_seconds", *settings],
        "/long_sound": ["rows", "seconds", *settings],
        "/stop": [],
    }
    assert all(about["description"] for about in functions.values())
    page = (ROOT / "docs" / "demo.md").read_text()
    for about in functions.values():
        for parameter in about["parameters"]:
            assert f"`{parameter['parameter_name']}`" in page


def test_a_program_gets_the_bytes_of_the_command(client, tiny_folder, tmp_path):
    files, details = client.predict("rain", takes=2, seed=5, quality="full", **SHORT, api_name="/text_to_audio")
    flags = ["--seconds=0.3", "--steps=2", "--takes=2", "--seed=5", "--dtype=float32", "--device=cpu", "--quiet"]
    assert tango(["rain", f"--model={tiny_folder}", f"--output={tmp_path / 'a.wav'}", *flags]) == 0
    assert [Path(file).read_bytes() for file in files] == [(tmp_path / f"a-{n}.wav").read_bytes() for n in (1, 2)]
    assert [Path(file).name for file in files] == ["rain-5.wav", "rain-6.wav"]
    assert [(each["prompt"], each["seed"], each["seconds"], each["steps"]) for each in details] == [
        ("rain", 5, 0.3, 2),
        ("rain", 6, 0.3, 2),
    ]
    assert all(each["real_time_factor"] > 0 and "manual_seed" in each["code"] for each in details)


def test_the_other_functions_return_sounds_too(client, recording):
    from gradio_client import handle_file

    options = {"audio": handle_file(recording), "prompt": "rain", "steps": 2, "seed": 0, "api_name": "/from_audio"}
    files, [details] = client.predict(mode="inpainting", start=0.2, end=0.5, **options)
    samples, given = wavfile.read(files[0])[1], wavfile.read(recording)[1]
    assert (
        np.abs(samples[8500:] - given[8500:]).max() <= 1 and np.abs(samples[4800:6400] - given[4800:6400]).max() > 50
    )
    files, [details] = client.predict(mode="continuation", more_seconds=0.5, **options)
    assert details["seconds"] == 1.5
    rows = [[0, "rain"], [11, "dog"]]
    files, [details] = client.predict(rows, seconds=12, steps=1, seed=0, api_name="/long_sound")
    assert len(wavfile.read(files[0])[1]) == 12 * 16000 and details["prompt"] == "rain; dog"


def test_errors_are_sentences_for_programs_too(client, recording, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    broken = handle_file(tmp_path / "broken.wav")
    for options, message in [
        ({"prompt": " ", "api_name": "/text_to_audio"}, "the prompt is empty: describe a sound"),
        ({"prompt": "rain", "steps": 0, "api_name": "/text_to_audio"}, "steps must be a whole number from 1 to 1000"),
        ({"audio": broken, "prompt": "rain", "api_name": "/from_audio"}, "the sound cannot be read"),
        ({"audio": None, "prompt": "rain", "api_name": "/from_audio"}, "there is no sound yet"),
        ({"rows": [["x", "<b>rain"]], "api_name": "/long_sound"}, "the time of a row must be a number of seconds"),
        ({"prompt": "rain", "model": "/etc", "api_name": "/text_to_audio"}, "is not in the list of choices"),
    ]:
        with pytest.raises(Exception, match=message) as error:
            client.predict(**options)
        text = str(error.value)
        assert "Traceback" not in text and "\n" not in text and "<b>" not in text and str(tmp_path) not in text


def test_stop_ends_what_the_client_runs_and_nothing_else(served, client):
    from gradio_client import Client

    other = Client(served.url, verbose=False, httpx_kwargs={"timeout": 60})
    assert client.predict(api_name="/stop") == "Nothing runs."
    job = client.submit("rain", seconds=0.3, steps=900, quality="full", api_name="/text_to_audio")
    try:
        wait_for_a_step(job)
        assert other.predict(api_name="/stop") == "Nothing runs."
    finally:
        assert client.predict(api_name="/stop") == "Stopped."
    with pytest.raises(Exception, match="stopped"):
        job.result(timeout=20)
    other.predict("rain", **SHORT, api_name="/text_to_audio")


def test_others_wait_with_their_place_and_too_many_are_refused(served, client):
    from gradio_client import Client

    other = Client(served.url, verbose=False, httpx_kwargs={"timeout": 60})
    job = client.submit("rain", seconds=0.3, steps=900, quality="full", api_name="/text_to_audio")
    try:
        wait_for_a_step(job)
        waiting = []
        for place in range(8):
            waiting.append(other.submit("wind", seed=place, **SHORT, api_name="/text_to_audio"))
            wait_until(lambda: waiting[-1].status().rank == place)
        with pytest.raises(Exception, match="(?i)queue is full"):
            other.predict("wind", **SHORT, api_name="/text_to_audio")
    finally:  # past the queue, as the page does
        body = {"data": [], "session_hash": client.session_hash}
        assert json.loads(fetch(f"{served.url}/gradio_api/run/stop", body)[1])["data"] == ["Stopped."]
    assert [each.result(timeout=60)[1][0]["seed"] for each in waiting] == list(range(8))


def test_eight_clients_at_once_lose_nothing_and_mix_nothing_up(served):
    from examples.demo_load import load

    counts = load(served.url, os.getpid(), Namespace(clients=8, requests=24, steps=2, seconds=0.3))
    assert counts == {"done": 24, "lost": 0, "mixed up": 0}


# safety


def fetch(url, body=None, **headers):
    """Status and content."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def call(served, name, body):
    """The last event and its data, as curl gets them."""
    status, content = fetch(f"{served.url}/gradio_api/call/v2/{name}", body)
    assert status == 200, content
    answer = fetch(f"{served.url}/gradio_api/call/v2/{name}/{json.loads(content)['event_id']}")[1].decode()
    kind, data = re.findall(r"event: (\w+)\ndata: (.*)", answer)[-1]
    return kind, json.loads(data)


def test_plain_http_gets_a_sound(served):
    kind, [files, [details]] = call(served, "text_to_audio", {"prompt": "rain", "seed": 5, **SHORT})
    assert kind == "complete" and details["seed"] == 5
    status, content = fetch(files[0]["url"])
    assert status == 200 and wavfile.read(io.BytesIO(content))[1].any()


def test_files_of_the_machine_are_neither_served_nor_read(served, tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode_wav(noise(1600), 16000))
    inside = f"{served.folder}/../../{secret.parent.name}/secret.wav"
    for path in (
        "/etc/passwd",
        "//etc/passwd",
        str(secret),
        inside,
        inside.replace("..", "%2e%2e"),
        str(ROOT / "setup.cfg"),
    ):
        status, content = fetch(f"{served.url}/gradio_api/file={path}")
        assert status in (403, 404) and b"root:" not in content and b"RIFF" not in content, path
    for path in (str(secret), inside, f"file://{secret}", "http://127.0.0.1:9/a.wav", "https://example.com/a.wav"):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        kind, data = call(served, "from_audio", {"audio": given, "prompt": "rain", "steps": 1})
        assert kind == "error", (path, data)


def test_large_uploads_are_refused_before_they_are_decoded(served):
    def upload(num_bytes):
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../a.wav"\r\n\r\n'
        body = part + bytes(num_bytes) + b"\r\n--x--\r\n"
        return fetch(f"{served.url}/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")

    status, content = upload(300_000)
    assert status == 413
    status, content = upload(1000)
    [path] = json.loads(content)
    assert status == 200 and Path(path).resolve().is_relative_to(served.folder.resolve())


def test_nothing_goes_past_the_queue(served):
    for name in ("text_to_audio", "text_page"):
        assert fetch(f"{served.url}/gradio_api/run/{name}", {"data": ["rain"] * 12})[0] in (401, 404)
    assert fetch(f"{served.url}/monitoring")[0] in (403, 404)


def test_the_sounds_of_examples_outlive_the_files_of_results(served, client):
    from gradio.route_utils import delete_files_created_by_app

    def sounds():
        return {path.name for path in served.folder.rglob("*") if path.suffix in (".wav", ".flac", ".png")}

    client.predict("rain", seed=77, **SHORT, api_name="/text_to_audio")
    assert {"rain-77.wav", "cow.flac"} <= sounds()
    delete_files_created_by_app(served.blocks, -1)  # as every five minutes, of files older than an hour
    assert sounds() == {"cow.flac", "crossing_bell.flac"}


# the command and the Space


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--port=70000"], "port must be a whole number from 0 to 65535, got 70000"),
        (["--max_seconds=0"], "max_seconds must be"),
        (["--max_upload=nan"], "max_upload must be"),
        (["--queue=0"], "queue must be"),
        (["--models=nowhere"], "models must be a folder, got 'nowhere'"),
        (["--model="], "model must be a folder or a Hub repo"),
        (["rain"], "unrecognized arguments: rain"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert main(flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_port_in_use_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the command sets
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert main([f"--port={server.getsockname()[1]}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_the_space_serves_the_model_of_its_variable_and_leaves_no_files(tiny_folder, tmp_path):
    readme = (ROOT / "examples" / "space" / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in readme.split("---\n")[1].splitlines())
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "apache-2.0")
    assert f"gradio=={front['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "gradio" in config["options.extras_require"]["demo"]
    assert (ROOT / "examples" / "space" / "requirements.txt").read_text() == "pipeline-tango[demo]\n"

    (tmp_path / "files").mkdir()
    variables = {"TANGO_MODEL": str(tiny_folder), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": "0"}
    variables |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "files"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "space" / front["app_file"])]
    space = subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables, stderr=subprocess.PIPE, text=True)
    try:
        line = space.stderr.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/", line), line + space.stderr.read()
        status, content = fetch(line.split()[0])
        assert status == 200 and b"Text to audio" in content and f'"{tiny_folder.name}"'.encode() in content
        [folder] = (tmp_path / "files").glob("tango-demo-*")
        assert any(folder.rglob("cow.flac"))
    finally:
        space.send_signal(signal.SIGTERM)
    assert space.wait(30) == 0 and "Traceback" not in space.stderr.read()
    assert not list((tmp_path / "files").glob("tango-demo-*"))


# people


class Person(Browser):
    """A browser at the page."""

    def visit(self, served, theme="light"):
        self.open(f"{served.url}/?__theme={theme}")
        self.wait_for("document.querySelector('#text-prompt textarea') !== null", 60)

    def choose_tab(self, name):
        tab = (
            f"[...document.querySelectorAll('button[role=tab]')].find((each) => each.textContent.trim() === '{name}')"
        )
        self.run(f"{tab}.click()")

    def choose(self, group, name):
        labels = f"[...document.querySelectorAll('{group} label')]"
        self.run(f"{labels}.find((each) => each.textContent.trim() === '{name}').click()")

    def set_number(self, label, value):
        """Fill a field of the open accordion `More`."""
        self.run(
            "(([field, value]) => {"
            "const labels = [...document.querySelectorAll('label')].filter((each) => each.offsetParent);"
            "const input = labels.find((each) => each.textContent.trim() === field).querySelector('input');"
            "input.value = value; input.dispatchEvent(new Event('input', {bubbles: true}));"
            f"}})({json.dumps([label, value])})"
        )

    def open_more(self, tab):
        """The settings under "More" of a tab, the one that is shown."""
        self.run(
            "[...document.querySelectorAll('button')].filter((each) => each.offsetParent)"
            ".find((each) => each.textContent.trim().startsWith('More')).click()"
        )
        visible = "[...document.querySelectorAll('label')].some((each) => each.offsetParent && "
        self.wait_for(f"{visible}each.textContent.trim() === 'Steps')")

    def wait_for_results(self, tab):
        """Addresses of the players' files and widths of the pictures, once all are there."""
        shown = f"[...document.querySelectorAll('#{tab}-results img')].filter((each) => each.offsetParent)"
        self.wait_for(f"{shown}.length > 0 && {shown}.every((each) => each.naturalWidth > 0)", 60)
        links = self.run(f"[...document.querySelectorAll('#{tab}-results a[download]')].map((each) => each.href)")
        return [link for link in links if ".wav" in link], self.run(f"{shown}.map((each) => each.naturalWidth)")

    def text(self, selector="body"):
        return self.run(f"document.querySelector('{selector}').innerText")


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with Person(folder, folder / "profile", width=1100, height=1000, page_load="eager") as person:
        yield person


def read_sound(url):
    sampling_rate, samples = wavfile.read(io.BytesIO(fetch(url)[1]))
    assert sampling_rate == 16000
    return samples


@needs_browser
def test_typing_and_generating_gives_a_player_a_picture_and_python(served, person):
    person.visit(served)
    person.type("#text-prompt textarea", "rain & <i>thunder</i>")
    person.click("#text-generate")
    [sound], [width] = person.wait_for_results("text")
    samples = read_sound(sound)
    assert len(samples) == 5 * 16000 and np.abs(samples).max() > 100 and width > 500
    person.wait_for(f"performance.getEntriesByName({sound!r}).length > 0")  # the player has it
    person.click("#text-results button[aria-label=Play]")
    person.wait_for("document.querySelector('#text-results button[aria-label=Pause]') !== null")
    facts = person.text("#text-results .facts")
    seed = re.search(r"-(\d+)\.wav", sound)[1]
    assert re.search(rf"seed {seed} · 5 s of sound in [\d.]+ s · real-time factor [\d.]+ · 12 steps", facts)
    person.run("document.querySelector('#text-results .result button.label-wrap').click()")
    person.wait_for(f"document.querySelector('#text-results').innerText.includes('manual_seed({seed})')")
    others = "performance.getEntriesByType('resource').map((each) => each.name)"
    assert [name for name in person.run(others) if not name.startswith((served.url, "data:", "blob:"))] == []
    assert [entry for entry in person.log() if entry["level"] == "SEVERE"] == []


@needs_browser
def test_a_region_marked_on_the_waveform_is_regenerated(served, person, recording):
    person.visit(served)
    person.choose_tab("From audio")
    person.wait_for("document.querySelector('#audio-input input[type=file]') !== null")
    person.type("#audio-input input[type=file]", str(recording))
    person.choose("#audio-mode", "inpainting")
    person.type("#audio-prompt textarea", "thunder")
    drawn = "document.querySelector('#region canvas')"
    pixels = f"{drawn}.getContext('2d').getImageData(0, 0, {drawn}.width, {drawn}.height).data"
    person.wait_for(f"{drawn}?.width > 0 && {pixels}.some((each) => each > 0)")
    person.drag("#region canvas", 0.3, 0.6)
    marked = "['start', 'end'].map((each) => Number(document.querySelector(`#region-${each} input`).value))"
    person.wait_for(f"{marked}[1] > 0.5 && {marked}[1] < 0.7")
    start, end = person.run(marked)
    assert start == pytest.approx(0.3, abs=0.03) and end == pytest.approx(0.6, abs=0.03)
    person.click("#audio-generate")
    [sound], widths = person.wait_for_results("audio")
    assert len(widths) == 2  # before and after
    samples, given = read_sound(sound), wavfile.read(recording)[1]
    edges = [round(start * 16000) - 400, round(end * 16000) + 400]  # crossfades of 20 ms
    assert np.abs(samples[: edges[0]] - given[: edges[0]]).max() <= 1
    assert np.abs(samples[edges[1] :] - given[edges[1] :]).max() <= 1
    assert np.abs(samples[edges[0] : edges[1]] - given[edges[0] : edges[1]]).max() > 50


@needs_browser
def test_stop_midway_stops_the_model(served, person):
    person.visit(served)
    person.type("#text-prompt textarea", "rain")
    person.choose("#text-quality", "full")
    person.open_more("text")
    person.set_number("Steps", 900)
    person.click("#text-generate")
    person.wait_for(r"/step \d+ of 900/.test(document.querySelector('#text-results').innerText)", 30)
    person.click("#text-stop")
    person.wait_for("document.querySelector('#text-results').innerText.includes('Stopped.')")
    person.wait_for("!/step/.test(document.querySelector('#text-results').innerText)")
    assert person.run("document.querySelectorAll('#text-results a[download]').length") == 0
    person.set_number("Steps", 2)
    person.click("#text-generate")
    [sound], _ = person.wait_for_results("text")
    assert read_sound(sound).any()


@needs_browser
def test_what_cannot_be_generated_is_a_sentence_on_the_page(served, person, tmp_path):
    person.visit(served)
    person.click("#text-generate")
    person.wait_for("document.body.innerText.includes('the prompt is empty: describe a sound')")
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    person.choose_tab("From audio")
    person.wait_for("document.querySelector('#audio-input input[type=file]') !== null")
    person.type("#audio-input input[type=file]", str(tmp_path / "broken.wav"))
    person.wait_for("document.body.innerText.includes('the sound cannot be read')")
    (tmp_path / "large.wav").write_bytes(encode_wav(noise(200_000), 16000))
    person.visit(served)
    person.choose_tab("From audio")
    person.wait_for("document.querySelector('#audio-input input[type=file]') !== null")
    person.type("#audio-input input[type=file]", str(tmp_path / "large.wav"))
    person.wait_for("/maximum allowed size|file size/i.test(document.body.innerText)")
    assert "Traceback" not in person.text() and str(tmp_path) not in person.text()


@needs_browser
def test_a_long_sound_plays_while_it_is_generated(served, person):
    person.visit(served)
    person.choose_tab("Long")
    person.wait_for("document.querySelector('#long-generate')?.offsetParent")
    scheduled = "Number(document.querySelector('#stream [data-scheduled]')?.dataset.scheduled ?? 0)"
    person.click("#long-generate")
    person.wait_for(f"{scheduled} > 1 || document.querySelectorAll('#long-results a[download]').length", 60)
    assert person.run("document.querySelectorAll('#long-results a[download]').length") == 0  # it plays already
    assert person.run("/[\\d.]+ s are there/.test(document.querySelector('#stream').innerText)")
    [sound], _ = person.wait_for_results("long")
    assert len(read_sound(sound)) == 20 * 16000
    assert person.run(scheduled) > 19


@needs_browser
def test_a_phone_shows_every_tab_and_both_themes_are_readable(served, person):
    channels = "getComputedStyle({}).{}.match(/[\\d.]+/g).slice(0, 3).map(Number)"
    try:
        for theme in ("light", "dark"):
            person.resize(400, 800)
            person.visit(served, theme)
            for tab in ("Text to audio", "From audio", "Long", "Model"):
                person.choose_tab(tab)
                time.sleep(0.3)  # the tab's layout
                wide = person.run(
                    "[...document.querySelectorAll('button, input, textarea, canvas, label')].filter((each) => "
                    "each.offsetParent && !each.closest('table, .table-wrap') && "
                    "each.getBoundingClientRect().right > 401).map((each) => each.outerHTML.slice(0, 80))"
                )
                assert wide == [] and person.run("document.documentElement.scrollWidth") <= 400, tab
            person.choose_tab("Text to audio")
            text = person.run(channels.format("document.querySelector('#text-prompt textarea')", "color"))
            back = person.run(channels.format("document.querySelector('#text-prompt textarea')", "backgroundColor"))
            assert contrast(text, back) > 7
            text = person.run(channels.format("document.querySelector('#text-prompt label span')", "color"))
            back = person.run(
                "(() => { let each = document.querySelector('#text-prompt label span'), color;"
                "do { each = each.parentElement; color = getComputedStyle(each).backgroundColor; }"
                "while (color === 'rgba(0, 0, 0, 0)' && each.parentElement);"
                "return color.match(/[\\d.]+/g).slice(0, 3).map(Number); })()"
            )
            assert contrast(text, back) > 4.5, (theme, text, back)
            assert (luminance(back) < 0.2) == (theme == "dark")
    finally:
        person.resize(1100, 1000)


def luminance(color):
    """Relative luminance of sRGB from 0 to 255, by WCAG 2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
