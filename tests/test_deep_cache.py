import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import pytest
import torch
import torch._dynamo.testing
from conftest import LONG, MOVING, count_rows, latents_of, set_scheduler
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from pipeline_tango import TangoPipeline


def small_unet(blocks, **config):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=[32, 2],
        in_channels=4,
        out_channels=4,
        down_block_types=blocks,
        up_block_types=[block.replace("Down", "Up") for block in reversed(blocks)],
        block_out_channels=[8] * len(blocks),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
        **config,
    ).eval()


def replay_deep_features(pipe, interval, num_windows=1):
    """Give the last resnet, in the UNet's evaluations that a cache skips, the deep features of an earlier one. All the
    rest is computed: another way to the same result."""
    last, kept, counts, num_skip = pipe.unet.up_blocks[-1].resnets[-1], {}, {"call": 0}, pipe.unet.conv_in.out_channels

    def replay(module, args):
        evaluation, window = divmod(counts["call"], num_windows)
        counts["call"] += 1
        deep, skip = args[0][:, :-num_skip], args[0][:, -num_skip:]
        last_full, features = kept.get(window, (-interval, deep))
        if evaluation - last_full >= interval or len(features) < len(deep):
            kept[window] = evaluation, deep
            return args
        return torch.cat([features[-len(deep) :], skip], dim=1), *args[1:]

    return last.register_forward_pre_hook(replay)


def deep_cache_and_replay(pipe, interval, num_windows=1, **options):
    handle = replay_deep_features(pipe, interval, num_windows)
    expected = latents_of(pipe, **options)
    handle.remove()
    pipe.enable_deep_cache(interval)
    return latents_of(pipe, **options), expected


def test_interval_1_and_a_disabled_cache_change_no_bit(pipe):
    expected = latents_of(pipe)
    pipe.enable_deep_cache(interval=1)
    assert torch.equal(latents_of(pipe), expected)
    pipe.enable_deep_cache()
    assert not torch.equal(latents_of(pipe), expected)
    pipe.disable_deep_cache()
    assert pipe.deep_cache is None
    assert torch.equal(latents_of(pipe), expected)
    pipe.disable_deep_cache()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"prompt": ["rain", "dog"], "num_waveforms_per_prompt": 2},
        {"guidance_interval": (0.0, 0.5)},
        {"guidance_interval": (0.3, 0.8)},
        {"num_windows": 3, **LONG},
        {"num_windows": 2, "window_batch_size": 2, "guidance_interval": (0.3, 0.8), "prompt": MOVING, **LONG},
        {"scheduler": "heun"},
        {"scheduler": "dpm++", "guidance_rescale": 0.7},
    ],
)
def test_the_rest_comes_from_the_last_full_evaluation(pipe, options):
    options = dict(options)
    set_scheduler(pipe, options.pop("scheduler", "ddim"))
    latents, expected = deep_cache_and_replay(pipe, 3, options.pop("num_windows", 1), **options)
    assert torch.equal(latents, expected)


@pytest.mark.parametrize(
    "scheduler, interval, options, expected",
    [
        ("ddim", 3, {}, [2, 2, 2]),
        ("ddim", 2, {"guidance_scale": 1.0}, [1, 1, 1, 1]),
        ("heun", 5, {}, [2, 2, 2]),  # 13 evaluations
        ("ddim", 3, {"guidance_interval": (0.0, 0.5)}, [2, 2, 1]),  # guided: 0 to 3
        ("ddim", 3, {"guidance_interval": (0.6, 1.0)}, [1, 1, 2]),  # guided: 5 and 6
        ("ddim", 3, {"window_order": "sequential", **LONG}, [2, 2, 2] * 3),
    ],
)
def test_everything_is_computed_once_in_an_interval(pipe, scheduler, interval, options, expected):
    set_scheduler(pipe, scheduler)
    pipe.enable_deep_cache(interval)
    shallow, deep = count_rows(pipe.unet.conv_out), count_rows(pipe.unet.mid_block.resnets[0])
    latents_of(pipe, num_inference_steps=7, **options)
    assert deep == expected
    assert len(shallow) == {"ddim": 7, "heun": 13}[scheduler] * (3 if "window_order" in options else 1)


def test_a_clip_is_the_same_whatever_batch_it_rides_in_with_a_cache(pipe):
    pipe.enable_deep_cache(2)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 2)]
    options = {"num_inference_steps": 4, "audio_length_in_s": 0.3, "output_type": "latent"}
    together = pipe(["rain", "dog"], generator=seeds[:2], **options).audios
    alone = pipe("dog", generator=seeds[2:], **options).audios
    assert torch.allclose(together[1:], alone, atol=1e-4)


def test_nothing_is_left_between_calls(pipe):
    pipe.enable_deep_cache(3)
    expected = latents_of(pipe, "dog")
    latents_of(pipe, num_inference_steps=5)  # ends in the middle of an interval
    assert not pipe.deep_cache.kept and pipe.deep_cache.features is None and pipe.deep_cache.mode == "off"
    assert torch.equal(latents_of(pipe, "dog"), expected)

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        latents_of(pipe, callback_on_step_end=stop)
    assert torch.equal(latents_of(pipe, "dog"), expected)
    assert len(latents_of(pipe, ["dog", "rain"], audio_length_in_s=0.7)) == 2


def test_the_unet_by_itself_is_whole(pipe):
    def one_call():
        torch.manual_seed(0)
        with torch.no_grad():
            return pipe.unet(torch.randn(1, 4, 8, 16), 5, encoder_hidden_states=torch.randn(1, 3, 16)).sample

    expected = one_call()
    pipe.enable_deep_cache(2)
    between = []
    latents_of(pipe, callback_on_step_end=lambda *args: between.append(one_call()) or {})
    assert len(between) == 4 and all(torch.equal(each, expected) for each in between)
    assert pipe.deep_cache.features is None


def test_a_cache_belongs_to_the_unet_and_is_not_saved(pipe, tmp_path):
    before = dict(pipe.config), dict(pipe.unet.config), set(pipe.unet.state_dict())
    pipe.enable_deep_cache(2)
    assert (dict(pipe.config), dict(pipe.unet.config), set(pipe.unet.state_dict())) == before
    other = TangoPipeline.from_pipe(pipe)
    assert torch.equal(latents_of(other), latents_of(pipe))
    pipe.save_pretrained(tmp_path)
    loaded = TangoPipeline.from_pretrained(tmp_path)
    assert loaded.deep_cache is None
    other.disable_deep_cache()
    assert torch.equal(latents_of(loaded), latents_of(pipe))


def test_a_cache_works_with_lora(pipe):
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "conv1"]))
    latents, expected = deep_cache_and_replay(pipe, 2, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(latents, expected)
    assert not torch.equal(latents_of(pipe), expected)


@pytest.mark.parametrize("first", ["cache", "offload"])
@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_a_cache_works_with_offloading_in_any_order(pipe, kind, first):
    def offload():
        if kind == "model":
            accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
        elif kind == "sequential":
            accelerate.cpu_offload(pipe.unet, execution_device="cpu")
            assert pipe.unet.conv_in.weight.device.type == "meta"
        else:
            device = torch.device("cpu")
            apply_group_offloading(pipe.unet, device, device, kind, num_blocks_per_group=1)

    pipe.enable_deep_cache(3)
    expected = latents_of(pipe)
    pipe.disable_deep_cache()
    for step in (pipe.enable_deep_cache, offload) if first == "cache" else (offload, pipe.enable_deep_cache):
        step()
    assert torch.equal(latents_of(pipe), expected)
    pipe.disable_deep_cache()
    assert not torch.equal(latents_of(pipe), expected)


def test_model_offloading_renews_its_hooks_without_losing_the_cache(pipe):
    # what diffusers does after every call of a pipeline that is offloaded
    pipe.enable_deep_cache(3)
    expected = latents_of(pipe)
    for _ in range(2):
        _, hook = accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
        assert torch.equal(latents_of(pipe), expected)
        accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)


@pytest.mark.parametrize("order", ["cache first", "compiled first"])
def test_a_compiled_unet_has_two_graphs_and_no_break(components, order):
    components["unet"] = small_unet(("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1)
    pipe = TangoPipeline(**components)
    pipe.enable_deep_cache(3)
    expected = latents_of(pipe)
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounter()
    if order == "cache first":
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    else:
        pipe.disable_deep_cache()
        pipe.unet.compile(backend=backend, fullgraph=True)
        latents_of(pipe, num_inference_steps=1)
        backend.clear()  # the graph of a UNet without hooks
    pipe.enable_deep_cache(3)
    assert torch.allclose(latents_of(pipe), expected, atol=1e-5)
    assert backend.frame_count == 2
    latents_of(pipe, "dog")
    assert backend.frame_count == 2


def test_compiled_models_serve_all_steps_prompts_and_lengths(components):
    components["unet"] = small_unet(("CrossAttnDownBlock2D",), layers_per_block=1)
    pipe = TangoPipeline(**components)
    torch._dynamo.reset()
    backends = [torch._dynamo.testing.CompileCounter() for _ in range(3)]
    for module, backend in zip((pipe.unet, pipe.vae.decoder, pipe.vocoder), backends):
        module.compile(backend=backend, fullgraph=True)  # with an error for a graph break

    def num_graphs(prompt, audio_length_in_s):
        pipe(prompt, num_inference_steps=3, guidance_scale=3.0, audio_length_in_s=audio_length_in_s)
        return [backend.frame_count for backend in backends]

    # from 1.3 s on: below that torch has another kernel for the vocoder's convolutions, and another graph
    assert num_graphs("rain", 1.3) == [1, 1, 1]
    assert num_graphs("dog and rain and dog", 1.7) == [2, 2, 2]  # what differs becomes dynamic
    assert num_graphs("a dog", 2.3) == [2, 2, 2]


@pytest.mark.parametrize(
    "blocks",
    [
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),  # tango-tiny
        ("CrossAttnDownBlock2D", "DownBlock2D"),
        ("CrossAttnDownBlock2D",),
    ],
)
@pytest.mark.parametrize("layers_per_block, mid_block_type", [(1, None), (2, "UNetMidBlock2DCrossAttn")])
def test_unets_of_other_shapes_have_a_cache(components, blocks, layers_per_block, mid_block_type):
    components["unet"] = small_unet(blocks, layers_per_block=layers_per_block, mid_block_type=mid_block_type)
    latents, expected = deep_cache_and_replay(TangoPipeline(**components), 2, num_inference_steps=4)
    assert torch.equal(latents, expected)


def test_unets_of_other_blocks_are_refused(components):
    components["unet"] = UNet2DConditionModel.from_config(
        components["unet"].config, up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"]
    )
    pipe = TangoPipeline(**components)
    with pytest.raises(ValueError, match="'SimpleCrossAttnUpBlock2D'"):
        pipe.enable_deep_cache()
    assert pipe.deep_cache is None
    with pytest.raises(ValueError, match="`unet`"):
        TangoPipeline(**components | {"unet": None}).enable_deep_cache()


@pytest.mark.parametrize("interval", [0, -1, 2.0, None, True])
def test_a_bad_cache_interval_is_named(pipe, interval):
    with pytest.raises(ValueError, match="`interval`"):
        pipe.enable_deep_cache(interval)
    assert pipe.deep_cache is None


def test_the_full_sized_unet_does_little_in_between(components):
    config = json.loads((Path(__file__).parents[1] / "examples" / "tango_unet.json").read_text())
    with torch.device("meta"):
        pipe = TangoPipeline(**components | {"unet": UNet2DConditionModel.from_config(config).eval()})
        pipe.enable_deep_cache()
        flops = []
        with torch.no_grad():
            for _ in range(2):
                pipe.deep_cache.advance(True)
                with FlopCounterMode(display=False) as counter, pipe.deep_cache.window(0, 2):
                    pipe.unet(torch.empty(2, 8, 256, 16), torch.empty(()), torch.empty(2, 32, 1024))
                flops.append(counter.get_total_flops())
    assert flops[0] == pytest.approx(1.6e12, rel=1e-3)
    for interval, ratio in ((2, 1.85), (3, 2.59), (5, 3.79)):
        assert interval * flops[0] / (flops[0] + (interval - 1) * flops[1]) > ratio


def test_the_text_of_a_full_sized_unet_is_projected_for_little():
    # the reason why keys and values of cross-attention are not kept between steps
    config = json.loads((Path(__file__).parents[1] / "examples" / "tango_unet.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        text = torch.empty(2, 32, 1024)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for name, module in unet.named_modules():
                if name.endswith(("attn2.to_k", "attn2.to_v")):
                    module(text)
    assert 0.001 < counter.get_total_flops() / 1.6e12 < 0.0025


# Shared and copied UNets


def test_pipelines_that_share_a_cached_unet_can_run_at_the_same_time(pipe):
    pipe.enable_deep_cache(3)
    prompts = ["rain", "dog barks", "bell", "wind"]
    expected = [latents_of(pipe, prompt, num_inference_steps=7) for prompt in prompts]

    def run(prompt):
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        other = TangoPipeline.from_pipe(pipe, scheduler=scheduler)
        other.set_progress_bar_config(disable=True)
        return latents_of(other, prompt, num_inference_steps=7)

    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(run, prompts), expected))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copy_of_a_cached_unet_has_a_cache_and_weights_of_its_own(pipe, components, duplicate):
    plain = latents_of(pipe)
    pipe.enable_deep_cache(2)
    expected = latents_of(pipe)
    other = TangoPipeline(**components | {"unet": duplicate(pipe.unet)})
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.zero_()
    assert torch.equal(latents_of(other), expected)
    pipe.disable_deep_cache()
    assert torch.equal(latents_of(other), expected)
    other.disable_deep_cache()
    assert torch.equal(latents_of(other), plain)
