import os
import re
import shutil
import signal


os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub client is imported: no test may reach a network
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts the tests in the background

import math  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from checkpoints import write_full_size  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: E402
from evaluation_runs import write_recordings  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from savedmodel import random_weights, write_yamnet  # noqa: E402
from scipy.io import wavfile  # noqa: E402
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel, T5Tokenizer  # noqa: E402

from pipeline_tango import SCHEDULERS, TangoPipeline  # noqa: E402


# models this small only lose by sharing work between threads; and bytes can depend on the number of threads
torch.set_num_threads(1)


CONTRACT = {  # what .ci/contract runs with other versions of the libraries
    "test_checks",
    "test_convert_tango",
    "test_deferred_imports",
    "test_input_audio",
    "test_lora",
    "test_main",
    "test_model_files",
    "test_original",
    "test_pipeline_tango",
    "test_publish",
    "test_schedule",
    "test_single_file",
    "test_student",
    "test_to_original",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in CONTRACT:
            item.add_marker("contract")


def pytest_addoption(parser):
    parser.addoption("--allowed_skips", metavar="REGEX", help="fail if a test is skipped for any other reason")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    allowed = session.config.getoption("allowed_skips")
    if allowed is None or hasattr(session.config, "workerinput"):
        return
    skips = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    refused = [skip for skip in skips if not re.search(allowed, str(skip.longrepr))]
    for skip in refused:
        print(f"\nskipped, which is not allowed here: {skip.nodeid}: {skip.longrepr[2]}")
    if refused:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


GOLDENS = Path(__file__).parent / "goldens" / "tiny-a"
RATE = 16000
SHORT = {"num_inference_steps": 2, "audio_length_in_s": 0.3}
QUICK = {"num_inference_steps": 2, "guidance_scale": 1.0}
WINDOW = 0.32  # 8 latent frames
STUDENT = {
    "scheduler": "lcm",
    "scheduler_options": {"original_inference_steps": 50},
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
}
MOVING = [(0.0, "rain"), (0.6, "dog")]
LONG = {"audio_length_in_s": 0.6, "window_length_in_s": 0.32}  # 3 windows


def golden(name):
    """Tensors computed by the original implementation (goldens/tiny-a/README.md), floating ones as float32."""
    tensors = load_file(GOLDENS / "golden" / f"{name}.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


@pytest.fixture(scope="session")
def original_checkpoint():
    """A small checkpoint folder in the original's released layout."""
    return GOLDENS / "original"


@pytest.fixture
def source(original_checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(original_checkpoint, tmp_path / "source"))


@pytest.fixture(scope="session")
def converted(original_checkpoint, tmp_path_factory):
    """`original_checkpoint` as a diffusers folder. Shared by the session: never write into it."""
    from convert.convert_tango import main

    folder = tmp_path_factory.mktemp("converted") / "tango"
    assert main([str(original_checkpoint), str(folder)]) == 0
    return folder


def build_components():
    """Real component classes at tiny sizes, random weights: 3-level UNet, VAE factor 4, vocoder hop 160."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=[32, 2],
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        attention_head_dim=[1, 2, 2],
        cross_attention_dim=16,
        norm_num_groups=4,
        use_linear_projection=True,
        upcast_attention=True,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.9,
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=624,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16000,
            upsample_initial_channel=32,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
        )
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
    with torch.no_grad():  # as initialised the vocoder is silent and the text hardly matters
        for module in vocoder.modules():
            if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
                torch.nn.init.kaiming_normal_(module.weight, a=0.1)
        vocoder.conv_post.weight.mul_(0.2)
        for name, parameter in unet.named_parameters():
            if ".attn2." in name and parameter.ndim > 1:
                parameter.mul_(3.0)
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": T5Tokenizer.from_pretrained(GOLDENS / "original" / "tiny-t5"),
        "unet": unet.eval(),
        "scheduler": scheduler,
        "vocoder": vocoder.eval(),
    }


def student_layers(pipe, seed=1, rank=4):
    """LoRA layers (state dict) of the kinds of layers that an LCM-LoRA has, and their metadata."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1"]
    targets += ["conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    layers = get_peft_model_state_dict(unet)
    layers = {name: 0.1 * torch.randn(each.shape, generator=generator) for name, each in layers.items()}
    return layers, unet.peft_config["default"].to_dict()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def noise(num_samples, seed=0, level=0.1):
    return level * np.random.default_rng(seed).standard_normal(num_samples).clip(-4, 4)


def level_db(signal):
    return 10 * math.log10(np.mean(np.asarray(signal, np.float64) ** 2))


def largest_difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def read_wav(name, num_samples=None):
    _, samples = wavfile.read(GOLDENS / "golden" / "wav" / name)
    return torch.from_numpy(samples[:num_samples].astype(np.float32) / 32768)


def latents_of(pipe, prompt="rain", num_inference_steps=4, **options):
    options = {"audio_length_in_s": 0.3} | options
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=options.pop("guidance_scale", 3.0),
        generator=generator,
        output_type="latent",
        **options,
    ).audios


def count_rows(module):
    """A list that gets the number of rows of each call of `module`."""
    rows = []
    module.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


def set_scheduler(pipe, name, **config):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, **config)


@pytest.fixture
def fresh_accelerate():
    """For tests that call a training script: neither accelerate's state nor a signal handler outlives them."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def components():
    return build_components()


@pytest.fixture
def pipe(components):
    pipe = TangoPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """`build_components()` saved as a diffusers folder. Shared by the session: never write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "tango"
    TangoPipeline(**build_components()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full_size_checkpoint(original_checkpoint, tmp_path_factory):
    """A checkpoint of the released size, with random weights, in the original's layout: 5 GB."""
    folder = tmp_path_factory.mktemp("full") / "tango"
    write_full_size(original_checkpoint, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def short_folder(tmp_path_factory):
    """As `tiny_folder`, with clips of 0.32 s. Shared by the session: never write into it."""
    folder = tmp_path_factory.mktemp("short") / "tango"
    TangoPipeline(**build_components(), default_audio_length_in_s=0.32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    """A LoRA of random weights that says that it makes a student. Shared by the session: never write into it."""
    folder = tmp_path_factory.mktemp("student") / "lora"
    layers, metadata = student_layers(TangoPipeline(**build_components()))
    TangoPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata, student=STUDENT)
    return folder


@pytest.fixture(scope="session")
def yamnet_folder(tmp_path_factory):
    """YAMNet with random weights. Shared by the session: never write into it."""
    return write_yamnet(tmp_path_factory.mktemp("yamnet") / "yamnet_base", random_weights())


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """Manifest of `write_recordings`. Shared by the session: never write beside it."""
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture
def measure(yamnet_folder, recordings, tmp_path):
    """Run `training.evaluate` with the flags that all runs have in common."""
    from training.evaluate import main

    def run(*flags, output="out", status=0, references=recordings):
        PartialState._reset_state()
        flags = [*flags, f"--output_dir={tmp_path / output}", f"--yamnet_weights={yamnet_folder}"]
        flags += [f"--references={references}"] if references else []
        assert main([str(flag) for flag in [*flags, "--num_resamples=20", "--device=cpu"]]) == status
        return tmp_path / output

    return run


@pytest.fixture(scope="module")
def shared_pipe():
    pipe = TangoPipeline(**build_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def guarded_pipe():
    """A pipeline whose models must not run."""
    pipe = TangoPipeline(**build_components())
    for model in (pipe.text_encoder, pipe.unet, pipe.vae, pipe.vocoder):
        model.register_forward_pre_hook(lambda *args: pytest.fail("a model ran before the inputs were checked"))
    return pipe


@pytest.fixture
def call(shared_pipe):
    """Calls the pipeline with `audio` at 16 kHz and seed 0, and returns the sounds or latents."""

    def run(prompt="rain", audio=None, pipe=shared_pipe, **options):
        if audio is not None:
            options = {"audio": audio, "audio_sampling_rate": RATE} | options
        return pipe(prompt, **({"generator": seeds(0)[0]} | QUICK | options)).audios

    return run
