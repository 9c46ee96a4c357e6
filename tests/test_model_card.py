from argparse import Namespace

from huggingface_hub import ModelCard

from training.model_card import base_model, copy_sounds, write_card


def test_a_card_says_what_a_result_is_its_figures_and_its_flags(tmp_path):
    args = Namespace(output_dir=str(tmp_path / "rain"), learning_rate=0.001, validation_prompts=[], lora_rank=None)
    metadata = {"library_name": "diffusers", "tags": ["tango"]}
    write_card(tmp_path, args, metadata, "A Tango.", "pipe = load()", {"steps": 3}, "## Sounds\n\n")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and card.data.tags == ["tango"]
    parts = [
        "# rain",
        "A Tango.",
        "```python\npipe = load()\n```",
        "## Figures\n\n- steps: 3",
        "## Sounds",
        "## Flags",
    ]
    assert [card.text.index(part) for part in parts] == sorted(card.text.index(part) for part in parts)
    assert "    --learning_rate 0.001\n" in card.text
    assert "lora_rank" not in card.text and "validation_prompts" not in card.text


def test_the_sounds_of_the_last_step_are_copied_with_their_prompts(tmp_path):
    result = tmp_path / "model"
    result.mkdir()
    assert copy_sounds(tmp_path / "samples", result, ["rain"]) == ""
    for step in (9, 10):
        folder = tmp_path / "samples" / f"step-{step}"
        folder.mkdir(parents=True)
        for name in ("1.wav", "1.png", "2.wav"):
            (folder / name).write_text(str(step))
    (tmp_path / "samples" / "step-11-loud").mkdir()
    (tmp_path / "samples" / "step-11").write_text("a file of the user's")
    section = copy_sounds(tmp_path / "samples", result, ["rain", "thunder"])
    assert (result / "samples" / "1.wav").read_text() == "10"
    assert "[rain](samples/1.wav)\n\n![spectrogram](samples/1.png)" in section and section.startswith("## Sounds\n")
    assert "[thunder](samples/2.wav)" in section and "2.png" not in section


def test_a_base_model_is_a_repo_and_no_path_of_this_machine(tmp_path):
    assert base_model("owner/tango") == {"base_model": "owner/tango"}
    assert base_model(str(tmp_path)) == base_model(None) == {}
