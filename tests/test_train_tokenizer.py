import json

import pytest
from transformers import T5EncoderModel, T5Tokenizer

from training.train_tokenizer import main


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CAPTIONS = ["heavy rain and thunder", "it is raining", "a dog barks while rain falls", "thunder", "a bell rings", "é"]


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"location": f"{i}.wav", "captions": [caption]}) for i, caption in enumerate(CAPTIONS)]
    path.write_text("\n".join(lines))
    return path


def test_the_folder_loads_as_a_tokenizer_and_an_encoder_that_fit(manifest, tmp_path):
    assert main(["--train_manifest", str(manifest), "--output_dir", str(tmp_path / "t5"), "--max_length=7"]) == 0
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "t5")
    encoder, report = T5EncoderModel.from_pretrained(tmp_path / "t5", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert encoder.config.vocab_size == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer("").input_ids == [1]
    for caption in CAPTIONS:
        assert tokenizer.unk_token_id not in tokenizer(caption).input_ids
    assert len(tokenizer("thunder " * 9, truncation=True).input_ids) == 7
    inputs = tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    assert encoder(**inputs)[0].shape == (*inputs.input_ids.shape, encoder.config.d_model)


def test_case_makes_no_difference_and_unseen_words_are_read_in_pieces(manifest, tmp_path):
    assert main(["--train_manifest", str(manifest), "--output_dir", str(tmp_path / "t5")]) == 0
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "t5")
    assert tokenizer("RAIN and Thunder").input_ids == tokenizer("rain and thunder").input_ids
    ids = tokenizer("xylophone, 7 zebras!").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "xylophone, 7 zebras!"


def test_what_was_made_is_logged_and_empty_captions_do_not_count(manifest, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"location": "a.wav", "captions": ["", " "]}')
    flags = ["--train_manifest", str(manifest), str(empty)]
    assert main([*flags, "--output_dir", str(tmp_path / "t5")]) == 0
    assert f"tokens from {len(CAPTIONS)} captions" in caplog.text and capsys.readouterr().out == ""
    assert main(["--train_manifest", str(empty), "--output_dir", str(tmp_path / "none")]) == 1
    assert "`--train_manifest`: no caption in" in capsys.readouterr().err


def test_bad_input_is_refused_by_name_and_leaves_nothing(manifest, tmp_path, capsys):
    for flags, name in ((["--vocab_size=5"], "--vocab_size"), ([f"--output_dir={tmp_path}"], "exists already")):
        with pytest.raises(SystemExit):
            main(["--train_manifest", str(manifest), "--output_dir", str(tmp_path / "t5"), *flags])
        assert name in capsys.readouterr().err
    assert main(["--train_manifest", str(tmp_path / "missing.jsonl"), "--output_dir", str(tmp_path / "t5")]) == 1
    assert "missing.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "t5").exists()
