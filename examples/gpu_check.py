"""Check and measure the pipeline on a GPU in one call, within a time limit.

    sh examples/gpu_check.sh --output_dir gpu_check                              # a machine with a GPU
    sh examples/gpu_check.sh --device cpu --size tiny --audio_seconds 0.64 --steps 3 2 --batch_sizes 1 2

The order is that of the work's value: first the rows of a pipeline of the released size with random weights, one
row for each variant, number of steps and batch size, with a profile of two of them; then the tests marked `cuda`,
which run while kernels are compiled; then more rows. After each of these OUTPUT_DIR/gpu_check.json and its table
gpu_check.md are written anew, so that a run that was stopped has told what it knew. tests.log is pytest's output.

A variant is options joined by `+`:

{options}

The columns of the table:

    text, VAE, vocoder        milliseconds, each measured alone
    UNet, UNet call           milliseconds of the loop, which is the rest of the clip, and of one bare guided call
    clip                      milliseconds from prompt to waveform, of the whole batch, median of the rounds
    a clip                    the same, divided by the batch size
    TFLOP                     what the clip computes
    share                     of the rate of a large matrix product in the same dtype, measured in the same run
    GB, reserved              peak of what tensors took, and of what torch held for them, which includes CUDA graphs
    latents dB                signal to difference against the first row of these steps, which is in float32 for the
                              fewest steps and for the preset
    cold                      seconds of the first call: choice of kernels, compilation, capture of graphs
"""

import argparse
import contextlib
import gc
import json
import operator
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from examples.benchmark import UNET_BLOCKS, flop_counter, matrix_rate, seconds, signal_to_difference_db
from examples.random_pipeline import SIZES, random_pipeline
from pipeline_tango import SCHEDULERS
from pipeline_tango.kernels import use_conv2d
from pipeline_tango.presets import FAST
from pipeline_tango.sound_files import write_atomically


ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {
    "float32": "float32 without TF32",
    "tf32": "float32, multiplied in TF32",
    "bf16": "the four models in bfloat16",
    "channels-last": "UNet and VAE with channels last in memory",
    "cudnn-benchmark": "cuDNN chooses kernels by trial",
    "conv2d-vocoder": "the vocoder's convolutions as 2-D ones, with channels last",
    "compile": "torch.compile of the UNet's resnets and transformer blocks, one by one",
    "graphs": "UNet, VAE decoder and vocoder replayed as CUDA graphs",
    "text-graph": "the text encoder too",
}
BEST = "bf16+channels-last+cudnn-benchmark+graphs"
COMPILED = BEST.replace("graphs", "compile+graphs")
NUM_GRAPHS_OF_A_BLOCK = 256  # widths times shapes; torch gives up after 8
GOALS = (  # title, workload, batch size, figure of the row, goal; on an H100
    ("200 steps, s", 200, 1, "clip_in_s", 0.65),
    ("25 steps, s", 25, 1, "clip_in_s", 0.09),
    ("preset, s", "preset", 1, "clip_in_s", 0.035),
    ("25 steps of a batch of 32, share of the matrix rate", 25, 32, "share_of_rate", 0.65),
    ("preset, peak in GB", "preset", 1, "memory_in_bytes", 3.2e9),
)
PROMPT = "A dog barks while rain falls on a metal roof"
SECONDS_AFTER_TESTS = 30  # are kept for what comes after them
LONG_ROUND_IN_S = 1.0  # is not repeated
WAITING_CALLS = r"cu(da)?[A-Z]|Mem(cpy|set)|aten::(item|_local_scalar_dense|nonzero)$"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchao", "triton", "numpy")
KERNEL_GROUPS = (  # the first that matches a kernel's name, in lower case
    ("attention", r"flash|fmha|attention|sdpa"),
    ("layout", r"nchwtonhwc|nhwctonchw|transpose|tensortransform"),
    ("convolution", r"conv|xmma_fprop|implicit|wgrad|dgrad|cudnn"),
    ("matrix product", r"gemm|cutlass|cublas|nvjet|matmul|splitk"),
    ("norm", r"norm|welford|rowwisemoments"),
    ("softmax", r"softmax"),
    ("copy, concatenation", r"memcpy|memset|copy|cat"),
    ("elementwise", r"elementwise|vectorized|silu|gelu|triton_poi|reduce|index|upsample"),
    ("compiled", r"triton"),
)


# CUDA graphs


class ReplayedForward:
    """Forward of a module as CUDA graphs: one is captured for each shape of the inputs, and replayed from then on,
    which launches thousands of kernels in one call.

    What a deep cache keeps is an input and an output of the graph like others.

    Args:
        module (`torch.nn.Module`)
        deep_cache (`Callable`): returns the pipeline's [`DeepCache`], or `None`.
    """

    def __init__(self, module, deep_cache):
        self.forward = module.forward
        self.deep_cache = deep_cache
        self.captured = {}

    def __call__(self, *args, **kwargs):
        cache = self.deep_cache()
        mode = "off" if cache is None else cache.mode
        leaves, structure = tree_flatten((args, kwargs, cache.features if mode == "reuse" else None))
        key = mode, *((each.shape, each.dtype) if torch.is_tensor(each) else each for each in leaves)
        if key not in self.captured:
            self.captured[key] = self.capture(mode, leaves, structure)
        inputs, replay, outputs, features = self.captured[key]
        for held, given in zip(inputs, leaves):
            if torch.is_tensor(held):
                held.copy_(given)
        replay()
        if mode == "keep":
            cache.features = features
        return tree_map_only(torch.Tensor, torch.clone, outputs)  # the next replay writes to the same memory

    def capture(self, mode, leaves, structure):
        inputs = [each.clone() if torch.is_tensor(each) else each for each in leaves]
        args, kwargs, kept = tree_unflatten(inputs, structure)

        def run():
            if mode == "reuse":
                self.deep_cache().features = kept
            outputs = self.forward(*args, **kwargs)
            return outputs, self.deep_cache().features if mode == "keep" else None

        if next(each for each in inputs if torch.is_tensor(each)).device.type != "cuda":
            outputs, features = run()  # a stand-in: computes anew, and writes to the same memory as a graph does
            held = [each for each in tree_flatten((outputs, features))[0] if torch.is_tensor(each)]

            def replay():
                for each, new in zip(held, [each for each in tree_flatten(run())[0] if torch.is_tensor(each)]):
                    each.copy_(new)

            return inputs, replay, outputs, features
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # workspaces, choice of kernels and compilation stay out of the graph
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, features = run()
        return inputs, graph.replay, outputs, features


@contextlib.contextmanager
def replay_as_graphs(pipe, names=("unet", "vae.decoder", "vocoder")):
    """Within this context the modules `names` of `pipe` are replayed as graphs, as [`ReplayedForward`] says. Dtype,
    device, memory format and LoRA have to be set before."""
    modules = [operator.attrgetter(name)(pipe) for name in names]
    before = [vars(module).get("forward") for module in modules]  # of hooks, which replace it on the instance
    for module in modules:
        cache_of = (lambda: pipe.deep_cache) if module is pipe.unet else (lambda: None)
        module.forward = ReplayedForward(module, cache_of)
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            del module.forward
            if forward is not None:
                module.forward = forward


# Variants and workloads


def build(size, device):
    """A random pipeline whose weights are drawn on the device: on a CPU that takes a minute at full size."""
    with torch.device(device):
        pipe = random_pipeline(size)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    # the scheduler's tables belong on the CPU
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    diffusers.utils.logging.set_verbosity_error()  # of the cast to bfloat16, which is meant
    return pipe.to(device)


@contextlib.contextmanager
def variant(pipe, name):
    """Within this context `pipe` is the variant. From bfloat16 the weights do not come back to float32."""
    options = name.split("+")
    with contextlib.ExitStack() as stack:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        for owner, flag, value in (
            (matmul, "allow_tf32", "tf32" in options),
            (cudnn, "allow_tf32", "tf32" in options),
            (cudnn, "benchmark", "cudnn-benchmark" in options),
        ):
            stack.callback(setattr, owner, flag, getattr(owner, flag))
            setattr(owner, flag, value)
        dtype = torch.bfloat16 if "bf16" in options else torch.float32
        if pipe.unet.dtype != dtype:
            pipe.to(dtype)
        memory_format = torch.channels_last if "channels-last" in options else torch.contiguous_format
        pipe.unet.to(memory_format=memory_format)
        pipe.vae.to(memory_format=memory_format)
        if "conv2d-vocoder" in options:
            use_conv2d(pipe.vocoder)
            stack.callback(use_conv2d, pipe.vocoder, enabled=False)
        if "compile" in options:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=NUM_GRAPHS_OF_A_BLOCK))
            for module in pipe.unet.modules():
                if type(module).__name__ in UNET_BLOCKS:
                    module.compile(dynamic=False)
                    stack.callback(setattr, module, "_compiled_call_impl", None)
        if "graphs" in options:
            names = ("unet", "vae.decoder", "vocoder", *(["text_encoder"] if "text-graph" in options else []))
            stack.enter_context(replay_as_graphs(pipe, names))
        yield


@contextlib.contextmanager
def workload(pipe, name):
    """Within this context `pipe` is set up for a number of steps, or for `preset`, which is what `tango --fast` sets.
    Gives the options of the call."""
    if name != "preset":
        yield {"num_inference_steps": name}
        return
    scheduler = pipe.scheduler
    pipe.scheduler = SCHEDULERS[FAST["scheduler"]].from_config(scheduler.config)
    pipe.enable_deep_cache(FAST["deep_cache"])
    try:
        yield {
            "num_inference_steps": FAST["steps"],
            "guidance_scale": FAST["guidance"],
            "guidance_interval": tuple(FAST["guidance_interval"]),
        }
    finally:
        pipe.disable_deep_cache()
        pipe.scheduler = scheduler


def few_steps(options):
    """The same call with as few steps as have all its shapes: two, but for the preset."""
    if "guidance_interval" in options:
        return options
    return options | {"num_inference_steps": min(options["num_inference_steps"], 2)}


# Measurements


class Bench:
    """A pipeline and how it is measured.

    Args:
        pipe ([`TangoPipeline`])
        device (`str`)
        audio_length_in_s (`float`)
        num_rounds (`int`): of which a time is the median.
    """

    def __init__(self, pipe, device, audio_length_in_s, num_rounds):
        self.pipe = pipe
        self.device = device
        self.audio_length_in_s = audio_length_in_s
        self.num_rounds = num_rounds
        self.rates = {}  # dtype -> FLOP per second
        self.flop = {}  # workload -> FLOP of a clip
        self.references = {}  # workload -> latents

    def run(self, batch_size=1, output_type="pt", **options):
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"audio_length_in_s": self.audio_length_in_s, "output_type": output_type} | options
        return self.pipe([PROMPT] * batch_size, generator=generator, **options).audios

    def clock(self, function):
        """Median seconds, and the last result. A long round is not repeated."""
        times = []
        while not times or (len(times) < self.num_rounds and times[-1] < LONG_ROUND_IN_S):
            start = seconds(self.device)
            result = function()
            times.append(seconds(self.device) - start)
        return median(times), result

    def count_flop(self, name):
        """What a clip computes. All steps of a number of steps are alike."""

        def count(**options):
            with flop_counter() as counter:
                self.run(**options)
            return counter.get_total_flops()

        if name not in self.flop:
            with workload(self.pipe, name) as options:
                if name == "preset":
                    self.flop[name] = count(**options)
                else:
                    once, twice = (count(num_inference_steps=num_steps) for num_steps in (1, 2))
                    self.flop[name] = once + (name - 1) * (twice - once)
        return self.flop[name]

    def rate(self):
        dtype = self.pipe.unet.dtype
        key = f"{str(dtype).removeprefix('torch.')}{'+tf32' * torch.backends.cuda.matmul.allow_tf32}"
        if key not in self.rates:
            self.rates[key] = matrix_rate(dtype, self.device)
        return self.rates[key]

    def unet_alone_in_s(self, options):
        """Seconds of a bare call of the UNet with the inputs of the first step."""
        calls = []
        hook = self.pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        self.run(**options | {"num_inference_steps": 1})
        hook.remove()
        args, kwargs = calls[0]

        @torch.no_grad()
        def ten():
            for _ in range(10):
                self.pipe.unet(*args, **kwargs)

        return self.clock(ten)[0] / 10

    def warm(self, name, batch_size):
        """Seconds of a first call, which chooses kernels, compiles and captures what all others will use."""
        with workload(self.pipe, name) as options:
            start = seconds(self.device)
            self.run(batch_size, **few_steps(options))
            return seconds(self.device) - start

    @torch.no_grad()
    def measure(self, variant_name, name, batch_size):
        """A row of the table, of a `pipe` that is the variant."""
        pipe = self.pipe
        cold_in_s = self.warm(name, batch_size)
        with workload(pipe, name) as options:
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            clip_in_s, waveform = self.clock(lambda: self.run(batch_size, **options))
            latents = self.run(batch_size, "latent", **(options if batch_size == 1 else few_steps(options)))
            text_in_s, _ = self.clock(lambda: pipe.encode_prompt([PROMPT] * batch_size))
            decoded = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
            vae_in_s, mel_spectrogram = self.clock(lambda: pipe.vae.decode(decoded, return_dict=False)[0])
            vocoder_in_s, _ = self.clock(lambda: pipe.mel_spectrogram_to_waveform(mel_spectrogram.float()))
            row = {
                "variant": variant_name,
                "workload": name,
                "batch_size": batch_size,
                "clip_in_s": clip_in_s,
                "text_in_s": text_in_s,
                "unet_in_s": clip_in_s - text_in_s - vae_in_s - vocoder_in_s,
                "vae_in_s": vae_in_s,
                "vocoder_in_s": vocoder_in_s,
                "cold_in_s": cold_in_s,
                "audio_in_s": waveform.shape[1] / pipe.vocoder.config.sampling_rate,
            }
            if self.device == "cuda":
                row["memory_in_bytes"] = torch.cuda.max_memory_allocated()
                row["reserved_in_bytes"] = torch.cuda.max_memory_reserved()
            if batch_size == 1:
                row["latents_db"] = signal_to_difference_db(
                    self.references.setdefault(name, latents.cpu()), latents.cpu()
                )
                if name != "preset":
                    row["unet_alone_in_s"] = self.unet_alone_in_s(options)
        if name in self.flop:
            row["flop"] = batch_size * self.flop[name]
            row["share_of_rate"] = row["flop"] / clip_in_s / self.rate()
        return row

    def profile(self, name, batch_size, num_kernels=15):
        """What the device and the host do in a clip, of a `pipe` that is the variant and warm.

        Returns:
            `dict`: `clip_in_s` without the profiler; `kernels`, the largest, and `groups` of all, in seconds with
            counts; `busy_share` of the device; and of two steps on the host: `operators`, the largest by their own
            time, and `calls` of CUDA's runtime with their counts.
        """
        cuda = self.device == "cuda"

        def record(activities, **options):
            with profile(activities=activities) as recorded:
                self.run(batch_size, **options)
                seconds(self.device)
            return recorded.key_averages()

        with workload(self.pipe, name) as options:
            self.run(batch_size, **options)
            clip_in_s, _ = self.clock(lambda: self.run(batch_size, **options))
            on_device = record([ProfilerActivity.CUDA], **options) if cuda else []
            on_host = record([ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, **few_steps(options))

        kernels = [
            {"name": each.key, "count": each.count, "time_in_s": each.self_device_time_total / 1e6}
            for each in on_device
            if each.device_type == torch.autograd.DeviceType.CUDA
        ]
        kernels.sort(key=lambda each: -each["time_in_s"])
        groups = {}
        for each in kernels:
            found = (group for group, pattern in KERNEL_GROUPS if re.search(pattern, each["name"].lower()))
            name = next(found, "other")
            group = groups.setdefault(name, {"name": name, "count": 0, "time_in_s": 0.0})
            group["count"] += each["count"]
            group["time_in_s"] += each["time_in_s"]
        operators = sorted(on_host, key=lambda each: -each.self_cpu_time_total)
        return {
            "clip_in_s": clip_in_s,
            "busy_share": sum(each["time_in_s"] for each in kernels) / clip_in_s,
            "num_kernels": sum(each["count"] for each in kernels),
            "groups": sorted(groups.values(), key=lambda each: -each["time_in_s"]),
            "kernels": [each | {"name": each["name"][:160]} for each in kernels[:num_kernels]],
            "operators": [
                {"name": each.key[:80], "count": each.count, "time_in_s": each.self_cpu_time_total / 1e6}
                for each in operators
                if each.device_type == torch.autograd.DeviceType.CPU
            ][:num_kernels],
            "calls": {each.key: each.count for each in on_host if re.match(WAITING_CALLS, each.key)},
        }


# Tests


class Tests:
    """pytest in processes of its own, which leave behind what they printed.

    Args:
        path (`Path`): file or folder of the tests.
        log (`Path`): for the output.
        device (`str`)
        num_processes (`int`)
    """

    def __init__(self, path, log, device, num_processes):
        self.log = log
        self.deadline = None
        command = [sys.executable, "-m", "pytest", str(path), "-v", "-rs", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-c", str(ROOT / "setup.cfg"), "-o", "addopts=", "-m", "cuda", "-n", str(num_processes)]
        environment = os.environ | {"TANGO_TEST_DEVICE": device, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, timeout_in_s):
        """Wait for the end, or make one. Returns what passed, failed and was skipped."""
        try:
            self.process.wait(timeout=max(timeout_in_s, 0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group, with the workers
            self.process.wait()
        return read_tests(self.log.read_text(errors="replace")) | {"status": self.process.returncode}


def read_tests(text):
    """Names of the tests by result, of what `pytest -v` printed, with xdist or without."""
    results = {"passed": [], "failed": [], "skipped": []}
    name, result = r"(\S*::\S.*?)", r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    for line in text.splitlines():
        match = re.match(rf"(?:\[gw\d+\] \[ *\d+%\] ){result} {name}\s*$", line)
        if match:
            word, test = match.groups()
        elif match := re.match(rf"{name} {result}(?: \(.*\))?\s+\[ *\d+%\]$", line):
            test, word = match.groups()
        else:
            continue
        key = {"PASSED": "passed", "SKIPPED": "skipped", "XFAIL": "skipped"}.get(word, "failed")
        results[key].append(test.split("::", 1)[1].strip())
    results["reasons"] = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.MULTILINE)
    results["errors"] = re.findall(r"^E   +(.*)$", text, re.MULTILINE)[:40]
    return results


# The report


def table(report):
    """The report as Markdown."""

    def show(value, form="{:.3g}", factor=1.0):
        return "" if value is None else form.format(value * factor)

    def lines_of(titles, rows):
        return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)] + [
            "| " + " | ".join(map(str, row)) + " |" for row in rows
        ]

    lines = [f"{report['device']}, torch {report['versions']['torch']}, {report['size']} size, random weights", ""]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in report["rates"].items())
    lines += [f"Matrix product: {rates or 'not measured'}. Times in ms.", ""]
    titles = ("variant", "steps", "batch", "text", "UNet", "UNet call", "VAE", "vocoder", "clip", "a clip", "TFLOP")
    titles += ("share", "GB", "reserved", "latents dB", "cold s")
    rows = []
    for row in report["rows"]:
        cells = [row["variant"], row["workload"], row["batch_size"]]
        for name in ("text", "unet", "unet_alone", "vae", "vocoder", "clip"):
            cells.append(show(row.get(f"{name}_in_s"), factor=1e3))
        cells += [show(row["clip_in_s"] / row["batch_size"], factor=1e3), show(row.get("flop"), factor=1e-12)]
        cells.append(show(row.get("share_of_rate"), "{:.0%}"))
        cells += [show(row.get(name), "{:.2f}", 1e-9) for name in ("memory_in_bytes", "reserved_in_bytes")]
        rows.append([*cells, show(row.get("latents_db"), "{:.1f}"), show(row["cold_in_s"], "{:.1f}")])
    lines += lines_of(titles, rows)

    rows = []
    for title, name, batch_size, figure, goal in GOALS:
        found = [
            row
            for row in report["rows"]
            if row["workload"] == name and row["batch_size"] == batch_size and row.get(figure) is not None
        ]
        if found:
            best = (max if figure == "share_of_rate" else min)(found, key=operator.itemgetter(figure))
            rows.append((title, f"{goal:.3g}", f"{best[figure]:.3g}", best["variant"]))
    lines += ["", *lines_of(("goal on an H100", "goal", "measured", "by"), rows)]

    for name, each in report["profiles"].items():
        busy = f"device busy {each['busy_share']:.0%} with {each['num_kernels']} kernels"
        lines += ["", f"{name}: {each['clip_in_s'] * 1e3:.3g} ms, {busy}", ""]
        for kind in ("groups", "kernels", "operators"):
            if each[kind]:
                rows = [(of["name"][:90], of["count"], show(of["time_in_s"], factor=1e3)) for of in each[kind]]
                lines += [*lines_of((kind, "count", "ms"), rows), ""]
        lines.append("Calls in two steps: " + ", ".join(f"{count} {call}" for call, count in each["calls"].items()))
    if tests := report["tests"]:
        counts = ", ".join(f"{len(tests[name])} {name}" for name in ("passed", "failed", "skipped"))
        lines += ["", f"Tests: {counts}, status {tests['status']}"]
        lines += [f"- failed: {name}" for name in tests["failed"]] + [
            f"- skipped: {name}" for name in tests["reasons"]
        ]
    lines += [f"- {what}: {why}" for what, why in report["problems"].items()]
    return "\n".join(lines) + "\n"


def groups(steps, batch_sizes, device):
    """What to measure, most valuable first: variants and, of each, workloads with batch sizes and whether to profile.
    `None` stands for the tests."""
    long, *others, short = steps
    one, *many = batch_sizes
    many = [(short, batch_size, False) for batch_size in many]
    yield "float32", [(short, one, False), ("preset", one, False)]
    yield "tf32", [(short, one, False)]
    yield "bf16", [(short, one, True), ("preset", one, False)]
    yield BEST, [(short, one, True), (long, one, False), ("preset", one, True), *many]
    yield None, []
    if device == "cuda":
        yield COMPILED, [(short, one, True), (long, one, False), *many, ("preset", one, False)]
    yield "bf16", [(long, one, False), *many]
    yield "bf16+channels-last+graphs", [(short, one, False), *many]
    yield "bf16+graphs", [(short, one, False), *many]
    yield f"{BEST}+conv2d-vocoder", [("preset", batch_size, False) for batch_size in batch_sizes]
    rest = [(name, one, False) for name in others] + [("preset", batch_size, False) for batch_size in batch_sizes[1:]]
    yield BEST, rest + [(short, batch_size, True) for batch_size in batch_sizes[-1:]]
    yield "bf16+channels-last", [(short, one, False), *many]
    yield f"{BEST}+text-graph", [("preset", one, False)]


def parse_arguments(argv):
    options = "\n".join(f"    {name:<16} {what}" for name, what in OPTIONS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.format(options=options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("gpu_check"), help="(default: gpu_check)")
    parser.add_argument(
        "--seconds", type=float, default=240.0, metavar="S", help="limit of the whole run (default: 240)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the random model (default: full)")
    parser.add_argument("--audio_seconds", type=float, default=10.0, metavar="S", help="of a clip (default: 10)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[200, 100, 25], metavar="N", help="falling (default: 200 100 25)"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], metavar="N", help="(default: 1 32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="at most, of a measurement (default: 5)")
    parser.add_argument(
        "--tests",
        type=Path,
        default=ROOT / "tests" / "test_cuda.py",
        metavar="PATH",
        help="file or folder of tests marked `cuda` (default: tests/test_cuda.py)",
    )
    parser.add_argument("--no_tests", action="store_true", help="measure only")
    parser.add_argument(
        "--test_processes", type=int, default=min(8, os.cpu_count()), metavar="N", help="(default: cores, at most 8)"
    )
    args = parser.parse_args(argv)
    if len(args.steps) < 2 or min(args.steps) < 1:
        parser.error(f"--steps must be two or more positive numbers, got {args.steps}")
    if min(args.batch_sizes) < 1 or args.batch_sizes[0] != 1:
        parser.error(f"--batch_sizes must begin with 1, got {args.batch_sizes}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    return args


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_device(device):
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def raise_timeout(*args):
    raise TimeoutError("the time limit of the run is reached")


def main(argv=None):
    """Run the checks. Returns the exit status: 0, or 1 if a test or a variant failed."""
    start = time.perf_counter()
    args = parse_arguments(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = {
        "device": describe_device(args.device),
        "size": args.size,
        "audio_in_s": args.audio_seconds,
        "versions": versions(),
        "rates": {},
        "rows": [],
        "profiles": {},
        "tests": {},
        "problems": {},
        "done_at_s": {},  # seconds from the start, by what was done
    }

    def done(what):
        report["done_at_s"][what] = time.perf_counter() - start
        write_atomically(args.output_dir / "gpu_check.json", json.dumps(report, indent=1).encode())
        write_atomically(args.output_dir / "gpu_check.md", table(report).encode())
        print(f"{report['done_at_s'][what]:6.1f} s  {what}")

    def time_left():
        return start + args.seconds - time.perf_counter()

    @contextlib.contextmanager
    def attempt(what):
        """What goes wrong in this context is noted, and the run goes on."""
        try:
            yield
        except Exception as error:  # out of memory, no kernel for this, too late
            report["problems"][what] = f"{type(error).__name__}: {error!s:.400}"
        done(what)

    tests = None

    def wait_for_tests():
        nonlocal tests
        if tests is not None:
            report["tests"] = tests.wait(time_left() - SECONDS_AFTER_TESTS)
            tests = None
            done("tests")

    handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, max(args.seconds - 5, 1))
    try:
        pipe = build(args.size, args.device)
        bench = Bench(pipe, args.device, args.audio_seconds, args.rounds)
        report["rates"] = bench.rates  # filled as dtypes come
        done("pipeline built")
        for name in (*args.steps, "preset"):
            with attempt(f"arithmetic of {name}"):
                bench.count_flop(name)
        for variant_name, jobs in groups(args.steps, args.batch_sizes, args.device):
            if variant_name is None:
                if not args.no_tests:
                    tests = Tests(args.tests, args.output_dir / "tests.log", args.device, args.test_processes)
                continue
            if time_left() < 10:
                report["problems"][variant_name] = "not measured: no time was left"
                continue
            with attempt(variant_name), variant(pipe, variant_name):
                warm_in_s = {}
                if tests is not None and "compile" in variant_name.split("+"):
                    for name, batch_size, _ in jobs:  # while the tests run, which disturb only the times
                        warm_in_s[name, batch_size] = bench.warm(name, batch_size)
                        done(f"{variant_name}, {name} steps, batch {batch_size}, warm")
                wait_for_tests()
                for name, batch_size, is_profiled in jobs:
                    what = f"{variant_name}, {name} steps, batch {batch_size}"
                    if time_left() < 10:
                        report["problems"][what] = "not measured: no time was left"
                        continue
                    with attempt(what):
                        row = bench.measure(variant_name, name, batch_size)
                        row["cold_in_s"] = warm_in_s.get((name, batch_size), row["cold_in_s"])
                        report["rows"].append(row)
                        if is_profiled:
                            report["profiles"][what] = bench.profile(name, batch_size)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    except TimeoutError as error:
        report["problems"]["the run"] = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        wait_for_tests()
    done("all")
    print(table(report))
    return int(bool(report["tests"].get("failed") or report["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
