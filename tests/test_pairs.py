import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch
from accelerate import PartialState

from pipeline_tango import TangoPipeline
from training.batches import keyed_generator, list_of_items
from training.data import ClipDataset, ClipSources
from training.latents import Encoders
from training.pairs import PairDataset, encode_pairs, prepare_pairs, read_pairs


RATE = 16000


def sources(**changes):
    fields = dict.fromkeys((field.name for field in dataclasses.fields(ClipSources)), None)
    fields |= {"min_length_in_s": 0.0, "on_bad_data": "skip", "dataset_split": "train"}
    chosen, rejected = changes.pop("columns", ("chosen", "rejected"))
    shared = fields | {key: str(value) for key, value in changes.items()}
    return tuple(ClipSources(**shared | {"audio_column": column}) for column in (chosen, rejected))


@pytest.fixture
def manifest(tmp_path):
    def write(*pairs):
        for i in range(4):
            soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).uniform(-0.5, 0.5, 8000), RATE)
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        return tmp_path / "pairs.jsonl"

    return write


def pair(chosen, rejected, prompt="rain"):
    return {"prompt": prompt, "chosen": f"{chosen}.wav", "rejected": f"{rejected}.wav"}


def test_several_pairs_of_a_prompt_keep_their_order(manifest):
    found = read_pairs(sources(train_manifest=manifest(pair(0, 1), pair(2, 1), pair(3, 0, "wind"))))["train"]
    assert [tuple(clip.path[-5] for clip in each) for each in found] == [("0", "1"), ("2", "1"), ("3", "0")]
    assert [chosen.captions for chosen, _ in found] == [("rain",), ("rain",), ("wind",)]


def test_a_pair_of_one_file_is_refused(manifest):
    with pytest.raises(ValueError, match="pair 2 has the same sound as chosen and rejected.*1.wav"):
        read_pairs(sources(train_manifest=manifest(pair(0, 1), pair(1, 1))))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_pair_with_a_bad_sound_is_left_out_and_reported(manifest, tmp_path):
    path = manifest(pair(0, 1), pair(2, "missing"), pair(3, 0))
    accelerator = PartialState(cpu=True)
    train, validation = prepare_pairs(sources(train_manifest=path), accelerator, tmp_path, 0, seed=0)
    assert [chosen.path[-5] for chosen, _ in train] == ["0", "3"] and validation == []
    report = json.loads((tmp_path / "bad_train_data.json").read_text())
    assert [fault["reason"] for fault in report["faults"]] == ["missing"]
    with pytest.raises(ValueError, match="1 of 5 sounds cannot be used"):
        prepare_pairs(sources(train_manifest=path, on_bad_data="refuse"), accelerator, tmp_path, 0, seed=0)
    only = manifest(pair(0, "missing"))
    with pytest.raises(ValueError, match="of none of the 1 pairs both sounds can be used"):
        prepare_pairs(sources(train_manifest=only), accelerator, tmp_path, 0, seed=0)


def test_a_data_set_with_both_sounds_in_a_row_is_read(tmp_path):
    sounds = [np.random.default_rng(i).uniform(-0.5, 0.5, 800).astype(np.float32) for i in range(4)]
    rows = {
        "prompt": ["rain", "wind"],
        "winner": [{"array": each, "sampling_rate": RATE} for each in sounds[:2]],
        "loser": [{"array": each, "sampling_rate": RATE} for each in sounds[2:]],
    }
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    found = read_pairs(sources(dataset_name=tmp_path / "set", columns=("winner", "loser")))["train"]
    assert len({clip.path for each in found for clip in each}) == 4
    with found[1][1].decode() as file:
        np.testing.assert_allclose(file.read(), sounds[3], atol=1e-6)


def test_an_item_has_both_sounds_and_encodes_to_two_rows_of_one_text(manifest, short_folder):
    found = read_pairs(sources(train_manifest=manifest(pair(0, 1), pair(2, 3, "wind"))))["train"]
    clips = [clip for side in zip(*found, strict=True) for clip in side]
    dataset = PairDataset(ClipDataset(clips, sampling_rate=RATE, num_samples=5120, crop="head"))
    items = [dataset[(0, index)] for index in range(len(dataset))]
    assert len(items) == 2 and [item["caption"] for item in items] == ["rain", "wind"]
    read = [ClipDataset([clip], sampling_rate=RATE, num_samples=5120, crop="head")[(0, 0)] for clip in clips]
    for i, item in enumerate(items):
        assert torch.equal(item["waveform"], read[i]["waveform"])
        assert torch.equal(item["rejected_waveform"], read[2 + i]["waveform"])
    encoders = Encoders(TangoPipeline.from_pretrained(short_folder), "cpu")
    generators = [[keyed_generator(0, i) for i in range(2)] for _ in range(2)]
    latents, text, mask = encode_pairs(encoders, list_of_items(items), *generators)
    assert len(latents) == len(text) == len(mask) == 4
    assert torch.equal(text[:2], text[2:]) and torch.equal(mask[:2], mask[2:])
    alone = [encoders.encode(list_of_items([each]), [keyed_generator(0, i % 2)])[0] for i, each in enumerate(read)]
    torch.testing.assert_close(latents, torch.cat(alone))
