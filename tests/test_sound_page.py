import pytest

from examples.sound_page import PROMPTS, main


def test_the_page_shows_each_sound_with_its_picture(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain & <thunder>\na dog\n")
    flags = ("--prompts", prompts, "--model", tiny_folder, "--steps", 1, "--seconds", 0.5, "--quiet")
    assert main([str(tmp_path / "out"), *map(str, flags)]) == 0
    assert main([str(tmp_path / "out"), *map(str, flags)]) == 0  # its own page is written again
    page = (tmp_path / "out" / "index.html").read_text()
    assert "rain &amp; &lt;thunder&gt;" in page and "<thunder>" not in page
    for name in ("00001", "00002"):
        assert f'src="{name}.wav"' in page and f'src="{name}.png"' in page
        assert (tmp_path / "out" / f"{name}.wav").exists() and (tmp_path / "out" / f"{name}.png").exists()


def test_there_are_twenty_prompts_and_bad_flags_leave_no_page(tmp_path):
    assert len(set(PROMPTS)) == 20
    assert main([str(tmp_path / "out"), "--model", str(tmp_path / "missing"), "--quiet"]) != 0
    assert not (tmp_path / "out" / "index.html").exists()


def test_pages_and_prompts_of_others_are_kept(tmp_path):
    for name in ("index.html", "prompts.txt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--model", str(tmp_path / "missing"), "--quiet"])
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
        (tmp_path / name).unlink()
