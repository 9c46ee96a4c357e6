"""Measure how fast each way to generate a sound is, how near the hardware's limit, and how it changes the sound.

    python -m examples.benchmark --quick                                   # a small random model: under two minutes
    python -m examples.benchmark                                           # random weights of the released size
    python -m examples.benchmark --model tango2 --variants bf16 bf16+channels-last+deep-cache-3 preset --rounds 3
    python -m examples.benchmark --model tango2 --variants preset --batch_sizes 1 2 4 8 --processes 1 2   # throughput

A variant is one option, or several options joined by `+`:

{options}

Variants alternate with `plain`, each in a process of its own, so that other load on the machine affects all of them
alike and the peak memory of each is its own. After each variant, `results.jsonl` in --output_dir is rewritten: an
interrupted run continues when it is started again. The table and `results.json` have medians over the rounds:

    text, UNet step, VAE, vocoder, clip   seconds. A clip marked ~ is extrapolated from --steps_timed steps
    RTF                                   real-time factor: seconds of computation per second of sound
    clips/min                             of all processes together, in batches of the size in the second column. The
                                          processes, as under `accelerate launch`, start each run together and share
                                          the cores; times are those of the slowest process, memory is the sum
    load                                  seconds of `from_pretrained`, mostly with the files in memory
    GiB                                   peak memory: of the process on a CPU (Linux only; of memory-mapped files, the
                                          part that was read), of torch's allocations on a GPU
    step x, clip x                        speedup over `plain` in the same round, with the same batch size and number
                                          of processes
    floor, share                          the time of the clip's arithmetic at the rate of a large matrix product in
                                          the same dtypes and process, and the fraction of that rate that was reached.
                                          It exceeds 100% where convolutions are faster than the product
    latents, decoder, sound dB            signal-to-difference ratio against `plain` from the same noise: of the
                                          latents, of the sound decoded from plain's latents, of the sound. {max_db:g}
                                          means equal. Empty with another scheduler or number of steps, where samples
                                          cannot be compared
    cold                                  seconds of the first call with compilation, and the number of clips after
                                          which it pays off against the same variant without, if that is measured
    graphs                                compiled for that call + for another prompt and length after it, / breaks

Random weights are enough for speed and memory. The effect of a variant on the sound needs a trained --model.
"""

import argparse
import contextlib
import json
import math
import os
import re
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import diffusers
import numpy as np
import torch
import transformers
from accelerate import PartialState
from diffusers import PipelineQuantizationConfig
from safetensors.torch import load_file, save
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from examples.random_pipeline import SIZES, random_pipeline
from pipeline_tango import SCHEDULERS, BlockedAttnProcessor, TangoPipeline
from pipeline_tango.__main__ import CommandError, read_prompts
from pipeline_tango.kernels import use_conv2d, use_kernels
from pipeline_tango.presets import FAST, choose_dtypes, choose_kernels, fast_settings
from pipeline_tango.sound_files import encode_wav, write_atomically
from pipeline_tango.student import call_defaults


OPTIONS = {
    "plain": "float32, eager, the checkpoint's scheduler, number of steps and guidance",
    "bf16": "the four models in bfloat16",
    "bf16-saved": "the same, from a copy of the checkpoint saved in bfloat16: for load time and memory",
    "fp16": "the UNet in float16; the other models overflow in it",
    "channels-last": "UNet and VAE with channels last in memory",
    "conv2d-vocoder": "the vocoder's convolutions as 2-D convolutions, with channels last",
    "blocked-attention": "the UNet's self-attention in blocks of queries, for a CPU's bfloat16",
    "blocked-attention-vae": "the same of the VAE's",
    "channels-last-vae": "the VAE with channels last in memory",
    "transposed-convs": "the UNet with channels last, and convolutions of narrow images on the transposed images",
    "keep-memory": "memory that tensors free stays with the process",
    "fused-qkv": "one matrix for queries, keys and values",
    "compile": "torch.compile of UNet, VAE decoder and vocoder",
    "compile-dynamic": "the same, for all lengths and texts at once",
    "compile-blocks": "the same, with the UNet's resnets and transformer blocks compiled one by one",
    "reduce-overhead": "the same with CUDA graphs; needs CUDA",
    "max-autotune": "the same, with kernels chosen by measurement; needs CUDA",
    "deep-cache-N": "DeepCache: the UNet's inner blocks every N steps only",
    "guidance-half": "guidance in the middle half of the steps only",
    "int8": "the UNet's matrices stored in int8; needs torchao",
    "int8-dynamic": "the same, with products computed in int8; needs torchao",
    "preset": "the settings of `tango --fast`, with its dtypes and kernels for this device",
    "student-N": "N steps of LCM without guidance, as a student takes them, with the dtypes of `preset`. Without a "
    "student of the model it is right for time and memory only",
}
COMPILE_OPTIONS = {  # arguments of torch.compile
    "compile": {},
    "compile-dynamic": {"dynamic": True},
    "compile-blocks": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
KERNEL_OPTIONS = ("blocked-attention-vae", "channels-last-vae", "transposed-convs", "keep-memory")
CUDA_OPTIONS = ("reduce-overhead", "max-autotune")
# diffusers' `compile_repeated_blocks` leaves out the resnets, 43% of the UNet's arithmetic
UNET_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
STUDENT = r"student-[1-9]\d?"
NUMBERED = rf"deep-cache-[1-9]\d?|{STUDENT}"  # options with a number
DEFAULT_VARIANTS = ("bf16", "bf16+channels-last", "deep-cache-3", "guidance-half", "preset")
MIDDLE_HALF = (0.25, 0.75)
INT8_CONFIGS = {"int8": "Int8WeightOnlyConfig", "int8-dynamic": "Int8DynamicActivationInt8WeightConfig"}

STAGES = ("text", "unet", "vae", "vocoder")
PROMPT = "A dog barks while rain falls on a metal roof"
OTHER_PROMPT = "Church bells ring far away, and closer by a car goes through a puddle"
EMBEDS = ("prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask")
MAX_DB = 200.0


def read_variant(name, device, preset=FAST):
    """The settings of a variant. `preset` is those of `tango --fast` for the model.

    Raises:
        ValueError: if `name` has an unknown option, or one that this machine cannot run.
    """
    variant = {
        "dtypes": {"default": torch.float32},
        "channels_last": False,
        "fused_qkv": False,
        "blocked_attention": False,
        "compile": None,
        "conv2d_vocoder": False,
        "deep_cache": None,
        "guidance": None,
        "guidance_interval": None,
        "int8": None,
        "kernels": (),
        "scheduler": None,
        "steps": None,
    }
    is_large = "deep_cache" in preset
    for option in name.split("+"):
        if option in COMPILE_OPTIONS:
            if option in CUDA_OPTIONS and device != "cuda":
                raise ValueError(f"{name} needs CUDA")
            variant["compile"] = option
        elif option in ("bf16", "bf16-saved"):
            variant["dtypes"] = {"default": torch.bfloat16}
        elif option == "fp16":
            variant["dtypes"] = choose_dtypes("float16", device)
        elif option in ("channels-last", "fused-qkv", "blocked-attention", "conv2d-vocoder"):
            variant[option.replace("-", "_")] = True
        elif option in KERNEL_OPTIONS:
            variant["kernels"] += (option,)
        elif re.fullmatch(r"deep-cache-[1-9]\d?", option):
            variant["deep_cache"] = int(option.removeprefix("deep-cache-"))
        elif option == "guidance-half":
            variant["guidance_interval"] = MIDDLE_HALF
        elif option in INT8_CONFIGS:
            if not find_spec("torchao"):
                raise ValueError(f"{name} needs torchao: pip install torchao")
            variant["int8"] = option
        elif option == "preset" or re.fullmatch(STUDENT, option):
            dtypes = choose_dtypes("auto", device, fast=True)
            if option != "preset":
                preset = {"scheduler": "lcm", "steps": int(option.removeprefix("student-")), "guidance": 1.0}
            kernels = choose_kernels(dtypes, device, is_large=is_large)[0]
            variant |= preset | {"dtypes": dtypes, "kernels": kernels}
        elif option != "plain":
            raise ValueError(f"{option!r} is none of {', '.join(OPTIONS)}")
    return variant


def load(model, variant, device):
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    quantization_config = None
    if variant["int8"]:
        import torchao.quantization
        from diffusers import TorchAoConfig

        config = TorchAoConfig(getattr(torchao.quantization, INT8_CONFIGS[variant["int8"]])())
        quantization_config = PipelineQuantizationConfig(quant_mapping={"unet": config})
    pipe = TangoPipeline.from_pretrained(
        model, dtype=variant["dtypes"], quantization_config=quantization_config, local_files_only=Path(model).exists()
    )
    pipe.to(device)
    if variant["channels_last"]:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if variant["conv2d_vocoder"]:
        use_conv2d(pipe.vocoder)
    if variant["fused_qkv"]:
        pipe.unet.fuse_qkv_projections()
    if variant["blocked_attention"]:
        pipe.unet.set_attn_processor(BlockedAttnProcessor())
    use_kernels(pipe, variant["kernels"])
    if variant["scheduler"]:
        pipe.scheduler = SCHEDULERS[variant["scheduler"]].from_config(pipe.scheduler.config)
    if variant["deep_cache"]:
        pipe.enable_deep_cache(interval=variant["deep_cache"])
    return pipe


def compile_models(pipe, option):
    """Apply an option of COMPILE_OPTIONS. Compilation happens in the first call."""
    modules = [pipe.unet, pipe.vae.decoder, pipe.vocoder]
    if option == "compile-blocks":
        # a graph for each pair of widths, 12 in the released UNet, and again for other lengths: torch's limit is 8
        torch._dynamo.config.recompile_limit = 64
        modules[:1] = [each for each in pipe.unet.modules() if type(each).__name__ in UNET_BLOCKS]
    for module in modules:
        module.compile(**COMPILE_OPTIONS[option])


def count_graphs():
    """The number of graphs compiled in this process, and that of graph breaks."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def matrix_rate(dtype, device):
    """FLOP per second of a large matrix product, the best of ten."""
    size = 8192 if device == "cuda" else 2048
    matrix = torch.randn(size, size, dtype=torch.float32).to(device, dtype)
    times = []
    for _ in range(10):
        start = seconds(device)
        matrix @ matrix
        times.append(seconds(device) - start)
    return 2 * size**3 / min(times)


def flop_counter():
    """A FLOP counter. torch's own omits attention on CPUs and products of int8 (torch 2.13)."""

    def attention(query_shape, key_shape, value_shape, *args, **kwargs):
        return sdpa_flop_count(query_shape, key_shape, value_shape)

    def product(left_shape, right_shape, *args, **kwargs):
        return 2 * math.prod(left_shape) * right_shape[-1]

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention, torch.ops.aten._int_mm: product}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def seconds(device):
    """The time after all work queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Peak memory in bytes, or `None` where the system does not report it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # of this process alone, unlike getrusage, which includes its parent
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 if status.exists() else None


def signal_to_difference_db(reference, other):
    """Energy of `reference` over that of its difference to `other`, two arrays of one shape, in dB up to MAX_DB."""
    reference, other = (np.asarray(each, dtype=np.float64) for each in (reference, other))
    difference = np.square(reference - other).sum()
    if difference == 0:
        return MAX_DB
    return float(np.clip(10 * np.log10(max(np.square(reference).sum(), 1e-300) / difference), -MAX_DB, MAX_DB))


@torch.no_grad()
def measure(model, name, batch_size, settings, reference_path, prompts, sounds, rank=0, wait=lambda: None):
    """Load a variant, run it, and measure it.

    Args:
        model (`str`): folder or repo.
        name (`str`): of the variant.
        batch_size (`int`)
        settings (`dict`): those of the whole run.
        reference_path (`Path`): file with latents and sound of `plain`, written by its first run.
        prompts (`list[dict]`): prompts to write sounds for.
        sounds (`Path`): folder for these sounds.
        rank (`int`, *optional*, defaults to 0): of processes that are measured together, only the first writes files.
        wait (`Callable`, *optional*): returns when all of them have called it.

    Returns:
        `dict`: seconds, FLOP and matrix rate by stage, `steps` of a clip, `load_in_s`, `cold_in_s`, `num_graphs`,
        `num_more_graphs` and `num_graph_breaks` of compilation, `memory_in_bytes` and the signal to difference in dB.
    """
    device = settings["device"]
    variant = read_variant(name, device, fast_settings(model))
    start = seconds(device)
    pipe = load(model, variant, device)
    load_in_s = seconds(device) - start
    own_num_steps, own_guidance_scale = call_defaults(pipe.config, pipe.student)
    num_steps = variant["steps"] or settings["steps"] or own_num_steps
    is_guided = (variant["guidance"] or own_guidance_scale) > 1 and pipe.unet.config.time_cond_proj_dim is None
    steps_timed = min(settings["steps_timed"] or num_steps, num_steps)
    options = {
        "audio_length_in_s": settings["seconds"] or pipe.config.default_audio_length_in_s,
        "guidance_scale": variant["guidance"],
        "guidance_interval": variant["guidance_interval"],
    }
    pipe.set_progress_bar_config(desc=name, unit="step", leave=False, disable=None)
    reference = load_file(reference_path) if reference_path.exists() else None

    def run(given_latents=None, count=None, prompt=PROMPT, **other_options):
        """Run all stages once: seconds by stage, latents and sound. Decodes `given_latents`, if given."""
        times = {}
        torch.manual_seed(0)  # for vocoders that draw noise

        def stage(name, function):
            counter = contextlib.nullcontext() if count is None else flop_counter()
            start = seconds(device)
            with counter:
                result = function()
            if count is not None:
                count[name] = counter.get_total_flops()
            times[name] = seconds(device) - start
            return result

        encode_options = {"prompt": [prompt] * batch_size, "do_classifier_free_guidance": is_guided}
        embeds = stage("text", lambda: dict(zip(EMBEDS, pipe.encode_prompt(**encode_options))))
        generator = [torch.Generator().manual_seed(row) for row in range(batch_size)]
        denoise = options | other_options | embeds
        denoise |= {"num_inference_steps": steps_timed, "generator": generator, "output_type": "latent"}
        latents = stage("unet", lambda: pipe(**denoise).audios)
        decoded = latents if given_latents is None else given_latents.expand_as(latents).to(device)
        decoded = (decoded / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        mel_spectrogram = stage("vae", lambda: pipe.vae.decode(decoded, return_dict=False)[0].float())
        waveform = stage("vocoder", lambda: pipe.mel_spectrogram_to_waveform(mel_spectrogram))
        return times, latents.cpu(), waveform.cpu()

    flop, compilation = {}, {}
    _, latents, waveform = run(count=flop)  # the first run is slower, and not measured
    if variant["compile"]:
        compile_models(pipe, variant["compile"])
        times, latents, waveform = run()
        compilation = {"cold_in_s": sum(times.values()), "num_graphs": count_graphs()[0]}
    wait()
    times, _, decoded = run(None if reference is None else reference["latents"])
    memory_in_bytes = peak_memory(device)
    if variant["compile"]:
        run(prompt=OTHER_PROMPT, audio_length_in_s=0.75 * options["audio_length_in_s"])
        num_graphs, num_breaks = count_graphs()
        compilation["num_more_graphs"] = num_graphs - compilation["num_graphs"]
        compilation["num_graph_breaks"] = num_breaks

    if reference is None:
        reference = {"latents": latents[:1].contiguous(), "waveform": waveform[:1].contiguous()}
        if rank == 0:
            write_atomically(reference_path, save(reference))
        decoded = waveform
    is_comparable = variant["scheduler"] is None and variant["steps"] is None

    options["num_inference_steps"] = num_steps
    for position, request in enumerate(prompts if rank == 0 else ()):
        path = sounds / f"{request['name']}.wav"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            audio = pipe(request["prompt"], generator=torch.Generator().manual_seed(position), **options).audios[0]
            write_atomically(path, encode_wav(audio, pipe.vocoder.config.sampling_rate))

    dtypes = {"text": pipe.text_encoder.dtype, "unet": pipe.unet.dtype}
    dtypes |= {"vae": pipe.vae.dtype, "vocoder": next(pipe.vocoder.parameters()).dtype}
    wait()
    rates = {dtype: matrix_rate(dtype, device) for dtype in set(dtypes.values())}
    return {
        "variant": name,
        "batch_size": batch_size,
        "seconds": options["audio_length_in_s"],
        "steps": num_steps,
        "steps_timed": steps_timed,
        "time_in_s": times,
        "flop": flop,
        "flop_per_s": {stage: rates[dtype] for stage, dtype in dtypes.items()},
        "load_in_s": load_in_s,
        "memory_in_bytes": memory_in_bytes,
        **compilation,
        "latents_db": signal_to_difference_db(reference["latents"][0], latents[0]) if is_comparable else None,
        "decoder_db": signal_to_difference_db(reference["waveform"][0], decoded[0]),
        "sound_db": signal_to_difference_db(reference["waveform"][0], waveform[0]) if is_comparable else None,
    }


def measure_as_process(rank, port, settings, *args):
    """[`measure`] in one of `settings["num_processes"]` processes, which form a group as under `accelerate launch`."""
    num_processes, num_threads = settings["num_processes"], settings["num_threads"] // settings["num_processes"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(num_processes)}
    if settings["device"] == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    state = PartialState(cpu=True)  # it synchronises the processes, and no tensors are exchanged
    try:
        torch.set_num_threads(max(num_threads, 1))
        return measure(*args, rank=rank, wait=state.wait_for_everyone)
    finally:
        state.destroy_process_group()


def join_records(records):
    """Join the records of processes that ran at the same time: the slowest one's times, the sum of their memory."""
    joined = dict(records[0], num_processes=len(records))
    joined["time_in_s"] = {stage: max(each["time_in_s"][stage] for each in records) for stage in STAGES}
    for name, function in (("load_in_s", max), ("cold_in_s", max), ("memory_in_bytes", sum)):
        if records[0].get(name) is not None:
            joined[name] = function(each[name] for each in records)
    return joined


def summarize(records):
    """The rows of the table, one for each variant, batch size and number of processes: medians over the rounds.

    Args:
        records (`list[dict]`): as [`measure`] returns them, with their `round`.

    Returns:
        `list[dict]`: in the order of their first record.
    """

    def clip(record, times):
        """Seconds of a batch of whole clips."""
        steps = times["unet"] * record["steps"] / record["steps_timed"]
        return times["text"] + steps + times["vae"] + times["vocoder"]

    def kind(record):
        return record["batch_size"], record.get("num_processes", 1)

    plain = {(r["round"], *kind(r)): r for r in records if r["variant"] == "plain"}
    groups = {}
    for record in records:
        groups.setdefault((record["variant"], *kind(record)), []).append(record)
    rows = []
    for (variant, batch_size, num_processes), group in groups.items():
        figures = []
        for record in group:
            times = record["time_in_s"]
            floors = {stage: record["flop"][stage] / record["flop_per_s"][stage] for stage in STAGES}
            step_in_s = times["unet"] / record["steps_timed"]
            clip_in_s = clip(record, times)
            figure = {
                "text_in_s": times["text"],
                "step_in_s": step_in_s,
                "vae_in_s": times["vae"],
                "vocoder_in_s": times["vocoder"],
                "clip_in_s": clip_in_s / batch_size,
                "real_time_factor": clip_in_s / batch_size / record["seconds"],
                "clips_per_minute": 60 * batch_size * num_processes / clip_in_s,
                "floor_in_s": clip(record, floors) / batch_size,
                "share_of_floor": clip(record, floors) / clip_in_s,
                **{f"{stage}_share_of_floor": floors[stage] / times[stage] for stage in STAGES},
                **{name: record.get(name) for name in ("load_in_s", "cold_in_s", "memory_in_bytes")},
                **{name: record.get(name) for name in ("num_graphs", "num_more_graphs", "num_graph_breaks")},
                **{name: record.get(name) for name in ("latents_db", "decoder_db", "sound_db")},
            }
            if base := plain.get((record["round"], batch_size, num_processes)):
                base_step_in_s = base["time_in_s"]["unet"] / base["steps_timed"]
                figure["step_ratio"] = base_step_in_s / step_in_s
                figure["clip_ratio"] = clip(base, base["time_in_s"]) / clip_in_s
            figures.append(figure)
        row = {"variant": variant, "batch_size": batch_size, "num_processes": num_processes, "num_rounds": len(group)}
        row |= {"steps": group[0]["steps"], "is_extrapolated": group[0]["steps_timed"] < group[0]["steps"]}
        for name in dict.fromkeys(name for figure in figures for name in figure):
            values = [figure[name] for figure in figures if figure.get(name) is not None]
            row[name] = median(values) if values else None
        rows.append(row)

    for row in rows:
        eager_name = "+".join(each for each in row["variant"].split("+") if each not in COMPILE_OPTIONS) or "plain"
        eager = [r for r in rows if r["variant"] == eager_name and kind(r) == kind(row)]
        row["break_even_in_clips"] = None
        if row["cold_in_s"] and eager and eager[0]["clip_in_s"] > row["clip_in_s"]:
            gain_in_s = eager[0]["clip_in_s"] - row["clip_in_s"]
            row["break_even_in_clips"] = math.ceil(row["cold_in_s"] / gain_in_s)
    return rows


def table(rows):
    """Format the rows of `summarize` as Markdown."""

    def show(value, form="{:.3g}"):
        return "" if value is None else form.format(value)

    titles = ("variant", "batch", "text", "UNet step", "VAE", "vocoder", "clip", "RTF", "clips/min", "load", "GiB")
    titles += ("step x", "clip x", "floor", "share", "latents dB", "decoder dB", "sound dB", "cold", "graphs")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cold = show(row["cold_in_s"], "{:.0f}")
        if row["break_even_in_clips"]:
            cold += f" ({row['break_even_in_clips']} clips)"
        graphs = ""
        if row["num_graphs"] is not None:
            graphs = "{num_graphs:g} + {num_more_graphs:g} / {num_graph_breaks:g}".format(**row)
        batch = str(row["batch_size"])
        if row["num_processes"] > 1:
            batch += f" in {row['num_processes']} processes each"
        cells = [row["variant"], batch]
        cells += [show(row[f"{stage}_in_s"]) for stage in ("text", "step", "vae", "vocoder")]
        cells += [("~" if row["is_extrapolated"] else "") + show(row["clip_in_s"]), show(row["real_time_factor"])]
        cells += [show(row["clips_per_minute"]), show(row["load_in_s"])]
        cells += [show(row["memory_in_bytes"] and row["memory_in_bytes"] / 2**30, "{:.2f}")]
        cells += [show(row.get(name), "{:.2f}") for name in ("step_ratio", "clip_ratio")]
        cells += [show(row["floor_in_s"]), show(row["share_of_floor"], "{:.0%}")]
        cells += [show(row[name], "{:.1f}") for name in ("latents_db", "decoder_db", "sound_db")]
        lines.append("| " + " | ".join([*cells, cold, graphs]) + " |")
    return "\n".join(lines)


def parse_arguments(argv):
    options = "\n".join(f"    {name:<16} {what}" for name, what in OPTIONS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.format(options=options, max_db=MAX_DB),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--model", metavar="FOLDER_OR_REPO", help="a diffusers folder or repo, instead of --size")
    what.add_argument(
        "--size",
        choices=SIZES,
        help="size of a random model, saved in --output_dir (default: full, 5.3 GB)",
    )
    what.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"to measure beside plain (default: {' '.join(DEFAULT_VARIANTS)})",
    )
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    what.add_argument("--seconds", type=float, metavar="S", help="length of a clip (default: the model's)")
    what.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of a clip (default: the model's; `preset` and `student-N` have their own)",
    )
    what.add_argument("--batch_sizes", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    what.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="processes that run together (default: 1)",
    )

    how = parser.add_argument_group("how")
    how.add_argument("--output_dir", type=Path, default=Path("benchmark"), help="default: benchmark")
    how.add_argument("--rounds", type=int, default=1, metavar="N", help="runs of every variant (default: 1)")
    how.add_argument(
        "--steps_timed",
        type=int,
        default=6,
        metavar="N",
        help="UNet steps to run and time, from which the time of a clip is extrapolated. A multiple of DeepCache's "
        "interval. 0 runs all steps (default: 6)",
    )
    how.add_argument(
        "--quick", action="store_true", help="--size small --seconds 5.12 --variants bf16+channels-last preset"
    )
    how.add_argument(
        "--save_sounds",
        metavar="PROMPTS",
        help="also write whole clips OUTPUT_DIR/sounds/VARIANT/NAME.wav for each line of this list (as for `tango "
        "--prompts`), line n with seed n - 1, for `tango-evaluate --generated`",
    )
    args = parser.parse_args(argv)

    if args.model and args.size:
        parser.error("give either --model or --size")
    if args.quick:
        args.size = args.size or (None if args.model else "small")
        args.seconds = args.seconds or 5.12
        args.variants = args.variants or ["bf16+channels-last", "preset"]
    args.size = args.size or (None if args.model else "full")
    args.variants = args.variants or list(DEFAULT_VARIANTS)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: CUDA is not available")
    for name, low in (("rounds", 1), ("steps", 1), ("steps_timed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name} must be at least {low}, got {getattr(args, name)}")
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        parser.error(f"--seconds must be a positive number, got {args.seconds}")
    for name in ("batch_sizes", "processes"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {min(getattr(args, name))}")

    names, skipped = ["plain"], []
    for name in dict.fromkeys(args.variants):
        if unknown := [each for each in name.split("+") if each not in OPTIONS and not re.fullmatch(NUMBERED, each)]:
            parser.error(f"--variants: {unknown[0]!r} is none of {', '.join(OPTIONS)}")
        try:
            interval = read_variant(name, args.device)["deep_cache"]
        except ValueError as error:
            skipped.append(str(error))
            continue
        if interval and args.steps_timed % interval:
            parser.error(f"--steps_timed must be a multiple of {interval} for {name}, got {args.steps_timed}")
        if name != "plain":
            names.append(name)
    args.variants, args.skipped = names, skipped
    try:
        args.prompts = read_prompts(args.save_sounds) if args.save_sounds else []
    except CommandError as error:
        parser.error(f"--save_sounds: {error}")
    return args, parser


def main(argv=None):
    """Run the benchmark. Returns the exit status: 0, or 1 if a variant failed."""
    args, parser = parse_arguments(argv)
    settings = {name: getattr(args, name) for name in ("model", "size", "device", "seconds", "steps", "steps_timed")}
    settings |= {"torch": torch.__version__, "num_threads": torch.get_num_threads()}
    results = args.output_dir / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for record in records:
        for name, value in settings.items():
            if record["settings"][name] != value:
                parser.error(
                    f"{args.output_dir} has measurements with {name} {record['settings'][name]!r}, not {value!r}: "
                    "use another --output_dir"
                )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for reason in args.skipped:
        print(f"skipped: {reason}", file=sys.stderr)

    model = args.model
    if model is None:
        model = args.output_dir / f"random-{args.size}"
        if not (model / "model_index.json").exists():  # the last file to be written
            print(f"writing {model}", file=sys.stderr)
            random_pipeline(args.size).save_pretrained(model)
    copy = args.output_dir / "bfloat16"
    if any("bf16-saved" in name.split("+") for name in args.variants) and not (copy / "model_index.json").exists():
        print(f"writing {copy}", file=sys.stderr)
        pipe = TangoPipeline.from_pretrained(model, dtype=torch.bfloat16, local_files_only=Path(model).exists())
        pipe.save_pretrained(copy)
        del pipe

    done = {(r["variant"], r["batch_size"], r.get("num_processes", 1), r["round"]) for r in records}
    jobs = [
        (name, batch_size, num_processes, number)
        for number in range(args.rounds)
        for num_processes in args.processes
        for batch_size in args.batch_sizes
        for name in args.variants
    ]
    has_failed = False
    bar = tqdm([job for job in jobs if job not in done], unit="run", disable=None)
    for name, batch_size, num_processes, number in bar:
        bar.set_description(f"{name}, batch {batch_size}, round {number + 1}")
        folder = copy if "bf16-saved" in name.split("+") else model
        reference = args.output_dir / "plain.safetensors"
        arguments = str(folder), name, batch_size, settings, reference, args.prompts, args.output_dir / "sounds" / name
        try:
            with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as executor:
                if num_processes == 1:
                    record = executor.submit(measure, *arguments).result()
                else:
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", 0))
                        port = probe.getsockname()[1]
                    shared = settings | {"num_processes": num_processes}
                    ranks = range(num_processes)  # one in each process: they wait for each other
                    parts = [executor.submit(measure_as_process, rank, port, shared, *arguments) for rank in ranks]
                    record = join_records([part.result() for part in parts])
        except Exception as error:  # for example out of memory, which other variants may not be
            has_failed = True
            print(f"{name}, batch {batch_size}: {type(error).__name__}: {error!s:.300}", file=sys.stderr)
            continue
        records.append({**record, "round": number, "settings": settings})
        write_atomically(results, "".join(json.dumps(each) + "\n" for each in records).encode())

    rows = summarize(records)
    summary = json.dumps({"settings": settings, "rows": rows}, indent=2)
    write_atomically(args.output_dir / "results.json", summary.encode())
    print(table(rows))
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
