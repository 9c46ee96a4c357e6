import json
import re

import numpy as np
import pytest
from browser import Browser, find_browser
from scipy.io import wavfile

from training.listening_test import main


ENTER, TAB, RIGHT, SPACE, BACKSPACE = "\ue007", "\ue004", "\ue014", " ", "\ue003"
PROMPTS = {"a": "rain & </script> thunder", "b": "a cow moos", "c": "birds"}


@pytest.fixture
def folders(tmp_path):
    """Two systems with sounds for three prompts, and one prompt more that only the first has."""
    rng = np.random.default_rng(0)
    result = {}
    for name in ("secret_model", "recordings"):
        result[name] = tmp_path / name
        result[name].mkdir()
        for id in [*PROMPTS, *(["d"] if name == "secret_model" else [])]:
            wavfile.write(result[name] / f"{id}.wav", 16000, rng.normal(0, 3000, 4000).astype(np.int16))
    lines = [json.dumps({"id": id, "caption": text}) for id, text in (PROMPTS | {"d": "wind"}).items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return result


@pytest.fixture
def page(folders, tmp_path):
    flags = [f"--system={name}={folder}" for name, folder in folders.items()]
    output = tmp_path / "out" / "test.html"
    assert main(["build", *flags, f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={output}"]) == 0
    return output


def read_data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def read_key(page):
    return json.loads(page.with_suffix(".key.json").read_text())


def answer(page, path, session, mark, **changes):
    """A file of answers in which each sound has the mark `mark(system, prompt)`."""
    key = read_key(page)
    marks = {
        id: dict.fromkeys(("ovl", "rel"), mark(each["system"], each["prompt"])) for id, each in key["sounds"].items()
    }
    content = {"test": key["test"], "session": session, "listener": "x", "saved": "2026", "answers": marks} | changes
    path.write_text(json.dumps(content))
    return str(path)


def test_the_page_holds_every_sound_that_all_systems_have_and_names_no_system(page, folders):
    data, key, text = read_data(page), read_key(page), page.read_text()
    assert len(data["sounds"]) == 6 and {each["prompt"] for each in data["sounds"]} == set(PROMPTS.values())
    assert [each["id"] for each in data["sounds"]] == sorted(key["sounds"])
    assert {(each["system"], each["prompt"]) for each in key["sounds"].values()} == {
        (name, id) for name in folders for id in PROMPTS
    }
    assert not any(name in text for name in folders)
    assert not re.search(r"(src|href)=", text)  # nothing from elsewhere


def test_a_page_whose_answers_may_be_on_their_way_is_not_written_over(page, folders, capsys):
    before = page.read_bytes()
    assert main(["build", f"--system=a={folders['recordings']}", f"--output={page}"]) == 1
    assert "give another name" in capsys.readouterr().err and page.read_bytes() == before


def test_summarize_gives_means_by_system_and_counts_a_session_once(page, tmp_path, capsys):
    files = [
        answer(page, tmp_path / f"{n}.json", f"s{n}", lambda system, id: 30 + n + 40 * (system == "recordings"))
        for n in range(6)
    ]
    files.append(answer(page, tmp_path / "old.json", "s0", lambda *_: 1, saved="2025"))
    output = tmp_path / "marks.csv"
    assert main(["summarize", *files, f"--key={page.with_suffix('.key.json')}", f"--output={output}"]) == 0
    text = capsys.readouterr().out
    assert "6 participants, 3 prompts, 36 sounds rated." in text
    own, real = (float(re.search(rf"\| {name} \| ([\d.]+) \[", text)[1]) for name in ("secret_model", "recordings"))
    assert (own, real) == (32.5, 72.5)
    # every listener puts the same 40 between the two, however they are drawn
    assert "| recordings | OVL | +40.0 [+40.0, +40.0] | 100% |" in text
    assert len(output.read_text().splitlines()) == 37


def test_intervals_speak_of_other_listeners(page, tmp_path, capsys):
    """Six listeners who disagree by a standard deviation of 10 leave a mean uncertain by about 10 / sqrt(6)."""
    levels = [-14, -9, -2, 3, 8, 14]
    files = [
        answer(page, tmp_path / f"{n}.json", f"s{n}", lambda system, id: 50 + level) for n, level in enumerate(levels)
    ]
    assert main(["summarize", *files, f"--key={page.with_suffix('.key.json')}"]) == 0
    low, high = map(
        float, re.search(r"\| recordings \| 50.0 \[([\d.]+), ([\d.]+)\]", capsys.readouterr().out).groups()
    )
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(levels) / np.sqrt(6), rel=0.15)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test": "other"}, "belongs to the test other"),
        ({"answers": {"0" * 16: {"ovl": 5}}}, "cannot give"),
        ({"answers": None}, "not a file of answers"),
    ],
)
def test_answers_to_something_else_are_refused(page, tmp_path, changes, message, capsys):
    file = answer(page, tmp_path / "one.json", "s", lambda *_: 5, **changes)
    assert main(["summarize", file, f"--key={page.with_suffix('.key.json')}"]) == 1
    assert message in capsys.readouterr().err


def test_marks_beyond_the_scale_are_refused(page, tmp_path, capsys):
    file = answer(page, tmp_path / "one.json", "s", lambda *_: 101)
    assert main(["summarize", file, f"--key={page.with_suffix('.key.json')}"]) == 1
    assert "cannot give" in capsys.readouterr().err


@pytest.mark.skipif(find_browser() is None, reason="no chromium with chromedriver here")
def test_in_a_browser_a_listener_marks_every_sound_by_keyboard_and_saves(page, tmp_path, capsys):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    with Browser(downloads, tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.run("document.querySelector('.count').textContent") == "6"
        browser.run("document.getElementById('listener').value = 'Ada'")
        browser.click("#start")
        heard = []
        for number in range(6):
            if number == 3:  # closed and opened again: the order, the place and the marks are kept
                browser.open(page)
                assert browser.run("document.getElementById('start').textContent") == "Go on"
                browser.click("#start")
            assert browser.run("document.getElementById('position').textContent") == f"Sound {number + 1} of 6"
            heard.append(browser.run("[sound().id, document.getElementById('prompt').textContent]"))
            browser.press(ENTER)  # not before it is heard and marked
            assert browser.run("state.at") == number
            assert browser.run("document.getElementById('next').disabled")
            browser.press(SPACE)
            browser.wait_for("state.played[sound().id]")
            assert browser.run("Math.abs(player.duration - 0.25) < 0.01")
            browser.run("document.getElementById('ovl').focus()")
            browser.press(*[RIGHT] * (number + 1), TAB, RIGHT)
            assert browser.run("document.getElementById('next').disabled") is False
            browser.press(ENTER)
        browser.click("#again")
        browser.press(BACKSPACE)
        assert browser.run("document.getElementById('ovl').value") == "55"  # the fifth sound's, 50 and 5 steps
        browser.press(ENTER, ENTER)
        browser.click("#save")
        assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []
        saved = browser.downloaded("answers-*.json")
    key = read_key(page)
    assert sorted(id for id, _ in heard) == sorted(key["sounds"])
    assert all(key["sounds"][id]["text"] == text for id, text in heard)
    content = json.loads(saved.read_text())
    assert content["listener"] == "Ada" and content["order"] == [id for id, _ in heard]
    assert [content["answers"][id] for id, _ in heard] == [{"ovl": 51 + n, "rel": 51} for n in range(6)]
    assert main(["summarize", str(saved), f"--key={page.with_suffix('.key.json')}"]) == 0
    assert "1 participants, 3 prompts, 6 sounds rated." in capsys.readouterr().out


@pytest.mark.skipif(find_browser() is None, reason="no chromium with chromedriver here")
def test_in_a_browser_every_listener_gets_another_order_and_a_phone_needs_no_sideways_scrolling(page, tmp_path):
    orders = []
    for name in ("first", "second"):
        with Browser(tmp_path, tmp_path / name, width=500, height=800) as browser:
            browser.open(page)
            browser.click("#start")
            orders.append(tuple(browser.run("state.order")))
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) == 2  # by chance equal once in 720
