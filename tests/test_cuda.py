"""The pipeline on a CUDA device against the same pipeline on the CPU in float32.

`examples/gpu_check.sh` runs these tests where there is a GPU; elsewhere they are skipped. TANGO_TEST_DEVICE=cpu runs
all of them that make sense without one, to test the tests.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

from examples.benchmark import signal_to_difference_db
from examples.gpu_check import replay_as_graphs
from pipeline_tango import SCHEDULERS, TANGO_TINY, TangoPipeline
from pipeline_tango.__main__ import main
from pipeline_tango.presets import FAST, choose_dtypes


DEVICE = torch.device(os.environ.get("TANGO_TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")

# Signal to difference. What differs in float32 is the order of sums; with other convolutions on a CPU that leaves at
# least 109 dB in the latents and 66 dB in the sound. A wrong mask, text, noise or scheduler table leaves less than 20.
SAME_LATENTS_DB = 70.0
SAME_SOUND_DB = 45.0
# Latents of tango-tiny after 10 steps. A CPU measures 46 dB in bfloat16 and 50 dB in float16; TF32 has the mantissa of
# float16.
LATENTS_DB = {"float32": 70.0, "tf32": 35.0, "float16": 35.0, "bfloat16": 30.0}

SHORT = {"num_inference_steps": 4, "guidance_scale": 3.0, "audio_length_in_s": 0.3}
LONG = {"audio_length_in_s": 0.6, "window_length_in_s": 0.32}  # 3 windows
MOVING = [(0.0, "rain"), (0.6, "dog")]
TONE = {"audio": np.sin(np.arange(4800) / 5).astype(np.float32), "audio_sampling_rate": 16000}
FEATURES = {
    "plain": {},
    "one step": {"num_inference_steps": 1},
    "no guidance": {"guidance_scale": 1.0},
    "guidance interval": {"guidance_interval": (0.25, 0.75)},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "negative prompt": {"negative_prompt": "dog"},
    "two waveforms each": {"prompt": ["rain", "dog"], "num_waveforms_per_prompt": 2},
    "variation": TONE | {"strength": 0.5},
    "inpainting": TONE | {"mask": [(0.1, 0.2)]},
    "soft inpainting": TONE | {"mask": [(0.1, 0.2)], "strength": 0.75},
    "continuation": TONE | {"audio_length_in_s": 0.5},
    "a band": TONE | {"frequency_mask_in_hz": (1000.0, 4000.0)},
    "windows": LONG,
    "windows at once": LONG | {"window_batch_size": 3},
    "windows in sequence": LONG | {"window_order": "sequential"},
    "moving prompt": LONG | {"prompt": MOVING},
    "inpainting in windows": TONE | LONG | {"mask": [(0.1, 0.2)], "window_order": "sequential"},
}


@pytest.fixture(autouse=True)
def full_float32():
    """float32 means float32, and a seed decides: neither TF32 nor kernels chosen by the clock."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def tiny():
    """Loads tango-tiny, the trained checkpoint, in a dtype."""

    def load(dtype=torch.float32, device=DEVICE):
        pipe = TangoPipeline.from_pretrained(TANGO_TINY, dtype=dtype, local_files_only=True).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def seeds(*numbers, device="cpu"):
    generators = [torch.Generator(device).manual_seed(number) for number in numbers]
    return generators if len(numbers) > 1 else generators[0]


def sound_of(pipe, **options):
    """float32 array on the CPU, of noise drawn there."""
    options = {"prompt": "rain", "output_type": "pt"} | SHORT | options
    num_waveforms = options.get("num_waveforms_per_prompt", 1)
    if isinstance(options["prompt"], list) and options["prompt"] is not MOVING:
        num_waveforms *= len(options["prompt"])
    return pipe(generator=seeds(*range(num_waveforms)), **options).audios.float().cpu().numpy()


def latents_of(pipe, **options):
    return sound_of(pipe, output_type="latent", **options)


# What takes longest comes first, so that with several processes the others do the rest meanwhile


@needs_cuda
def test_compilation_gives_the_same_sound(pipe):
    compiled_gives_the_same_sound(pipe, (pipe.unet, pipe.vae.decoder, pipe.vocoder))


def test_the_result_stays_on_the_device(pipe):
    pipe.to(DEVICE)
    assert pipe("rain", output_type="pt", **SHORT).audios.device.type == DEVICE.type
    assert isinstance(pipe("rain", **SHORT).audios, np.ndarray)


@needs_cuda
def test_compilation_with_cuda_graphs_gives_the_same_sound(pipe):
    compiled_gives_the_same_sound(pipe, (pipe.unet,), mode="reduce-overhead")


def compiled_gives_the_same_sound(pipe, modules, **options):
    pipe.to(DEVICE)
    expected = sound_of(pipe)
    torch._dynamo.reset()
    for module in modules:
        module.compile(**options)
    for _ in range(2):
        assert signal_to_difference_db(expected, sound_of(pipe)) > SAME_SOUND_DB


# Parity


@pytest.mark.parametrize("name", LATENTS_DB)
def test_tango_tiny_in_each_precision(tiny, name):
    if not ON_CUDA and name == "tf32":
        pytest.skip("needs a CUDA device")
    options = {"prompt": "A dog barks", "num_inference_steps": 10, "audio_length_in_s": 2.0}
    expected = latents_of(tiny(device="cpu"), **options)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    pipe = tiny({"default": torch.float32, "unet": torch.float32 if name == "tf32" else getattr(torch, name)})
    difference_db = signal_to_difference_db(expected, latents_of(pipe, **options))
    print(f"{name}: {difference_db:.1f} dB")
    assert difference_db > LATENTS_DB[name]


def test_tango_tiny_decodes_as_on_the_cpu(tiny):
    options = {"prompt": "A dog barks", "num_inference_steps": 2, "audio_length_in_s": 2.0}
    difference_db = signal_to_difference_db(sound_of(tiny(device="cpu"), **options), sound_of(tiny(), **options))
    print(f"sound: {difference_db:.1f} dB")
    assert difference_db > SAME_SOUND_DB


@pytest.mark.parametrize("feature", FEATURES)
def test_every_way_of_making_sound_works_as_on_the_cpu(pipe, feature):
    latents, sound = latents_of(pipe, **FEATURES[feature]), sound_of(pipe, **FEATURES[feature])
    pipe.to(DEVICE)
    assert signal_to_difference_db(latents, latents_of(pipe, **FEATURES[feature])) > SAME_LATENTS_DB
    assert signal_to_difference_db(sound, sound_of(pipe, **FEATURES[feature])) > SAME_SOUND_DB


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("feature", ["plain", "soft inpainting"])
def test_every_scheduler_works_as_on_the_cpu(pipe, name, feature):
    config = {"skip_prk_steps": True} if name == "pndm" else {}
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, **config)
    expected = latents_of(pipe, **FEATURES[feature])
    assert signal_to_difference_db(expected, latents_of(pipe.to(DEVICE), **FEATURES[feature])) > SAME_LATENTS_DB


@pytest.mark.parametrize("name", ["windows in sequence", "plain"])
def test_a_stream_gives_the_same_sound(pipe, name):
    pipe.to(DEVICE)
    options = {"prompt": "rain"} | SHORT | FEATURES[name]
    expected = pipe(generator=seeds(0), **options).audios
    stretches = list(pipe(generator=seeds(0), stream=True, **options))
    assert all(isinstance(stretch, np.ndarray) for stretch in stretches)
    assert signal_to_difference_db(expected, np.concatenate(stretches, axis=1)) > SAME_SOUND_DB


def test_a_batch_gives_what_its_rows_give_alone(pipe):
    pipe.to(DEVICE)
    rows = [
        pipe(prompt, generator=seeds(seed), output_type="latent", **SHORT).audios
        for seed, prompt in enumerate(["rain", "dog"])
    ]
    batch = pipe(["rain", "dog"], generator=seeds(0, 1), output_type="latent", **SHORT).audios
    assert signal_to_difference_db(torch.cat(rows).cpu(), batch.cpu()) > SAME_LATENTS_DB


@pytest.mark.parametrize("generator_device", ["cpu", DEVICE.type])
def test_the_same_seed_gives_the_same_bytes(tiny, generator_device):
    pipe = tiny(torch.bfloat16)
    options = {"num_inference_steps": 4, "audio_length_in_s": 1.0}
    first, second, other = (
        pipe("rain", generator=seeds(seed, device=generator_device), **options).audios for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_a_callback_sees_tensors_of_the_device(pipe):
    seen = []
    pipe.to(DEVICE)
    pipe(
        "rain",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"].device.type) or {},
        **SHORT,
    )
    assert seen == [DEVICE.type] * 4


def test_no_step_waits_for_the_device(pipe):
    if not ON_CUDA:
        pytest.skip("needs a CUDA device")
    pipe.to(DEVICE)
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config)
    waits = []

    def watch(pipe, i, t, tensors):
        # from the end of the first step to the end of the last but one, whatever waits is an error
        torch.cuda.set_sync_debug_mode("error" if i < 2 else "default")
        waits.append(i)
        return {}

    try:
        latents_of(pipe, callback_on_step_end=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [0, 1, 2, 3]


# Offloading


@needs_cuda
@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("has_cache", [False, True])
def test_offloading_gives_the_same_sound(pipe, kind, has_cache):
    if has_cache:
        pipe.enable_deep_cache(2)
    expected = sound_of(pipe)
    getattr(pipe, f"enable_{kind}_cpu_offload")()
    for _ in range(2):
        assert signal_to_difference_db(expected, sound_of(pipe)) > SAME_SOUND_DB
    if kind == "model":
        assert {p.device.type for p in pipe.unet.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "kind, uses_stream, has_cache",
    [
        ("leaf_level", False, False),
        ("leaf_level", True, False),
        ("block_level", False, False),
        ("leaf_level", False, True),
    ],
)
def test_group_offloading_gives_the_same_sound(pipe, kind, uses_stream, has_cache):
    if has_cache:
        pipe.enable_deep_cache(2)
    expected = sound_of(pipe)
    options = {"onload_device": DEVICE, "use_stream": uses_stream and ON_CUDA}
    pipe.unet.enable_group_offload(offload_type=kind, num_blocks_per_group=1, **options)
    for model in (pipe.text_encoder, pipe.vae, pipe.vocoder):
        apply_group_offloading(model, offload_type="leaf_level", **options)
    for _ in range(2):
        assert signal_to_difference_db(expected, sound_of(pipe)) > SAME_SOUND_DB


# What makes it fast


def test_a_deep_cache_works_as_on_the_cpu(pipe):
    pipe.enable_deep_cache(3)
    options = {"num_inference_steps": 8, "guidance_interval": (0.0, 0.5)}
    expected = latents_of(pipe, **options)
    pipe.to(DEVICE)
    assert signal_to_difference_db(expected, latents_of(pipe, **options)) > SAME_LATENTS_DB
    pipe.disable_deep_cache()
    assert signal_to_difference_db(expected, latents_of(pipe, **options)) < SAME_LATENTS_DB


@pytest.mark.parametrize("interval", [None, 3])
def test_replayed_graphs_give_the_same_bytes(pipe, interval):
    pipe.to(DEVICE)
    if interval:
        pipe.enable_deep_cache(interval)
    options = {"num_inference_steps": 8, "guidance_interval": (0.0, 0.5)}
    prompts = ("rain", ["dog", "rain"], "dog")
    expected = [sound_of(pipe, prompt=prompt, **options) for prompt in prompts]
    with replay_as_graphs(pipe):
        for _ in range(2):
            for prompt, each in zip(prompts, expected):
                assert np.array_equal(sound_of(pipe, prompt=prompt, **options), each)
    assert np.array_equal(sound_of(pipe, **options), expected[0])


def test_channels_last_gives_the_same_sound(pipe):
    expected = sound_of(pipe)
    pipe.to(DEVICE)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    assert signal_to_difference_db(expected, sound_of(pipe)) > SAME_SOUND_DB


def test_lora_works_as_on_the_cpu(pipe):
    plain = latents_of(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False))
    expected = latents_of(pipe)
    assert signal_to_difference_db(plain, expected) < SAME_LATENTS_DB
    pipe.to(DEVICE)
    assert signal_to_difference_db(expected, latents_of(pipe)) > SAME_LATENTS_DB
    pipe.fuse_lora()
    assert signal_to_difference_db(expected, latents_of(pipe)) > SAME_LATENTS_DB


@pytest.mark.skipif(not find_spec("torchao"), reason="needs torchao")
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_stays_near(tiny, name):
    import torchao.quantization

    options = {"num_inference_steps": 4, "audio_length_in_s": 2.0}
    dtypes = {"default": torch.float32, "unet": torch.bfloat16, "text_encoder": torch.bfloat16}
    expected = latents_of(tiny(dtypes), **options)
    pipe = tiny(dtypes)
    torchao.quantization.quantize_(
        pipe.unet,
        getattr(torchao.quantization, name)(),
        lambda module, name: isinstance(module, torch.nn.Linear) and min(module.weight.shape) >= 32,
    )
    difference_db = signal_to_difference_db(expected, latents_of(pipe, **options))
    print(f"{name}: {difference_db:.1f} dB")
    assert difference_db > 15  # a CPU measures 30 and 26 dB


# The command


def test_the_preset_runs_in_the_dtypes_chosen_for_the_device(tiny):
    pipe = tiny(choose_dtypes("auto", DEVICE, fast=True))
    pipe.scheduler = SCHEDULERS[FAST["scheduler"]].from_config(pipe.scheduler.config)
    pipe.enable_deep_cache(FAST["deep_cache"])
    options = {"guidance_scale": FAST["guidance"], "guidance_interval": FAST["guidance_interval"]}
    audio = pipe("rain", num_inference_steps=FAST["steps"], audio_length_in_s=1.0, **options).audios
    assert np.isfinite(audio).all() and 0.001 < np.abs(audio).max() <= 1


def test_the_command_writes_a_sound(tmp_path):
    path = tmp_path / "rain.wav"
    arguments = ["rain", "--fast", "--seconds", "1", "--device", DEVICE.type, "--output", str(path)]
    assert main(arguments) == 0
    assert path.stat().st_size > 16000
