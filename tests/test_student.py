import json
import logging

import numpy as np
import pytest
import torch
from conftest import (
    LONG,
    MOVING,
    STUDENT,
    build_components,
    count_rows,
    largest_difference,
    noise,
    seeds,
    student_layers,
)
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_schedule import know_the_answer

from pipeline_tango import SCHEDULERS, TangoPipeline
from pipeline_tango.student import check_student


@pytest.mark.parametrize(
    "entry, value",
    [
        ("scheduler", "lcms"),
        ("scheduler", ["lcm"]),
        ("scheduler_options", {"original_steps": 50}),
        ("scheduler_options", {"original_inference_steps": float("nan")}),
        ("scheduler_options", None),
        ("num_inference_steps", 0),
        ("num_inference_steps", 51),
        ("num_inference_steps", 4.0),
        ("num_inference_steps", True),
        ("guidance_scale", 0.5),
        ("guidance_scale", None),
        ("guidance_scale", [8.0, 1.0]),
        ("guidance_scale", [1.0]),
        ("guidance_scale", float("inf")),
        ("eta", 1.5),
        ("eta", None),
    ],
)
def test_what_is_no_student_is_refused_by_the_name_of_the_entry(entry, value):
    with pytest.raises(ValueError, match=f"`{entry}` of a student has to be "):
        check_student(STUDENT | {entry: value})


def test_a_student_has_all_entries_and_no_others():
    assert check_student(STUDENT | {"guidance_scale": (1, 8)}) == STUDENT | {"guidance_scale": [1.0, 8.0]}
    assert check_student(STUDENT | {"eta": 0})["eta"] == 0.0
    for wrong in (None, "lcm", {"scheduler": "lcm"}, STUDENT | {"steps": 4}):
        with pytest.raises(ValueError, match="`student` has to be a dict of"):
            check_student(wrong)


@pytest.fixture(scope="module")
def student_pipe(student_folder):
    """A pipeline with the student loaded. Shared by the module: tests set nothing but its scheduler."""
    pipe = TangoPipeline(**build_components())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(student_folder)
    return pipe


@pytest.fixture(params=["lcm", "tcd"])
def any_student(student_pipe, request):
    """The student, as one that was distilled for each of the schedulers."""
    student, scheduler = STUDENT | {"scheduler": request.param}, student_pipe.scheduler
    (config,) = student_pipe.unet.peft_config.values()
    config.student = student
    student_pipe.scheduler = SCHEDULERS[request.param].from_config(scheduler.config)
    yield student_pipe
    config.student, student_pipe.scheduler = STUDENT, scheduler


def latents_of(pipe, prompt="rain", **options):
    options = {"generator": seeds(0), "audio_length_in_s": 0.3, "output_type": "latent"} | options
    return pipe(prompt, **options).audios


def timesteps_of(pipe, **options):
    """The timesteps that the UNet gets in a call."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    try:
        latents_of(pipe, **options)
    finally:
        hook.remove()
    return seen


# What a student changes in a call


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_student_takes_its_steps_without_unconditional_rows(any_student, num_steps):
    rows = count_rows(any_student.unet)
    given = {} if num_steps == STUDENT["num_inference_steps"] else {"num_inference_steps": num_steps}
    # evenly spaced ones of the 50 timesteps 19, 39 ... 999
    assert timesteps_of(any_student, **given) == [999 - 20 * (50 * k // num_steps) for k in range(num_steps)]
    assert rows == [1] * num_steps


def test_explicit_values_override_those_of_the_student(student_pipe):
    rows = count_rows(student_pipe.unet)
    latents_of(student_pipe, num_inference_steps=2, guidance_scale=1.5, negative_prompt="dog")
    assert rows == [2, 2]


def test_a_student_may_have_an_eta_of_its_own(student_pipe):
    (config,) = student_pipe.unet.peft_config.values()
    scheduler = student_pipe.scheduler
    student_pipe.scheduler = SCHEDULERS["tcd"].from_config(scheduler.config)
    runs = {eta: latents_of(student_pipe, eta=eta) for eta in (0.0, 0.3, None)}
    assert torch.equal(runs[None], runs[0.3]) and not torch.equal(runs[None], runs[0.0])
    config.student = STUDENT | {"scheduler": "tcd", "eta": 0.0}
    assert torch.equal(latents_of(student_pipe), runs[0.0])
    config.student, student_pipe.scheduler = STUDENT, scheduler


@pytest.fixture
def timed_student(student_pipe):
    """The student, as one that was distilled for certain timesteps and DDIM's steps."""
    (config,) = student_pipe.unet.peft_config.values()
    scheduler = student_pipe.scheduler
    options = {"solver_order": 1, "use_karras_sigmas": False}
    table = {"timesteps": {"1": [999], "2": [999, 380], "4": [999, 770, 480, 180]}}
    config.student = check_student(STUDENT | {"scheduler": "dpm++", "scheduler_options": options} | table)
    student_pipe.scheduler = SCHEDULERS["dpm++"].from_config(scheduler.config, **options)
    yield student_pipe
    config.student, student_pipe.scheduler = STUDENT, scheduler


def test_a_student_takes_the_timesteps_that_it_was_distilled_for(timed_student, call):
    for num_steps, timesteps in timed_student.student["timesteps"].items():
        assert timesteps_of(timed_student, num_inference_steps=int(num_steps)) == timesteps
    assert timesteps_of(timed_student) == [999, 770, 480, 180]
    assert timesteps_of(timed_student, timesteps=[800, 300]) == [800, 300]
    with pytest.raises(ValueError, match="`num_inference_steps` has to be one of 1, 2, 4, .*not 3"):
        latents_of(timed_student, num_inference_steps=3)
    sound = {"audio": noise(4800), "audio_sampling_rate": 16000, "audio_length_in_s": None}
    assert timesteps_of(timed_student, strength=0.5, **sound) == [480, 180]
    with pytest.raises(ValueError, match="`strength` 0.5 leaves none of the 1 steps"):
        latents_of(timed_student, num_inference_steps=1, **sound)
    options = {"pipe": timed_student, "mask": [(0.1, 0.2)], "audio": noise(4800), "guidance_scale": None}
    together = call(["rain", "dog"], **options | {"generator": seeds(1, 2)})
    assert largest_difference(call("dog", **options | {"generator": seeds(2)})[0], together[1]) < 1e-4


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("strength", [0.2, 0.7, 1.0])
def test_a_student_takes_all_its_steps_in_the_fraction_that_strength_says(
    any_student, call, monkeypatch, num_steps, strength
):
    answer = torch.randn(1, 4, 8, 16, generator=seeds(1)[0])
    know_the_answer(any_student, monkeypatch, answer)
    seen = []
    latents = call(
        pipe=any_student,
        audio=noise(5000),
        strength=strength,
        num_inference_steps=num_steps,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(int(timestep)) or {},
    )
    assert len(seen) == any_student.num_timesteps == num_steps and seen[0] == 1000 * strength - 1
    assert seen == sorted(seen, reverse=True)
    # TCD ends at the noise of timestep 0
    assert (latents - answer).abs().max() < (0.3 if any_student.student["scheduler"] == "tcd" else 1e-3)


def test_a_strength_that_leaves_fewer_timesteps_than_steps_is_refused(student_pipe, call):
    with pytest.raises(ValueError, match="`num_inference_steps` of 4 cannot be taken.*LCM.*`strength`"):
        call(pipe=student_pipe, audio=noise(5000), strength=0.05, num_inference_steps=4)


INPUTS = {
    "text": {},
    "sequential windows": LONG | {"window_order": "sequential"},
    "moving": LONG | {"window_batch_size": 3, "prompt": [MOVING, [(0.0, "dog"), (0.6, "rain")]]},
    "variation": {"audio": noise(4800), "strength": 0.6},
    "inpainting": {"audio": noise(4800), "mask": [(0.1, 0.2)]},
    "continuation": {"audio": noise(4800), "audio_length_in_s": 0.6, "window_length_in_s": 0.32},
    "band": {"audio": noise(4800), "frequency_mask_in_hz": (4000, 8000)},
    "guided": {"guidance_scale": 1.5},
    "scaled": {"cross_attention_kwargs": {"scale": 0.5}},
    "one step": {"num_inference_steps": 1},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("any_student", ["lcm"], indirect=True)
def test_a_sound_of_a_student_does_not_depend_on_its_batch(any_student, call, name):
    options = {"audio_length_in_s": 0.3, "guidance_scale": None, "num_inference_steps": 2} | INPUTS[name]
    prompts = options.pop("prompt", ["rain", "dog"])
    together = call(prompts, pipe=any_student, **options | {"generator": seeds(1, 2)})
    for i, prompt in enumerate(prompts):
        alone = call(prompt, pipe=any_student, **options | {"generator": seeds(i + 1)})
        assert largest_difference(alone[0], together[i]) < 1e-4
    assert np.isfinite(together).all() and largest_difference(*together) > 1e-3


def test_takes_have_seeds_of_their_own(any_student, call):
    options = {"pipe": any_student, "audio_length_in_s": 0.3, "guidance_scale": None, "num_inference_steps": None}
    takes = call(num_waveforms_per_prompt=2, **options | {"generator": seeds(1, 2)})
    assert largest_difference(call(**options | {"generator": seeds(2)})[0], takes[1]) < 1e-4
    assert largest_difference(*takes) > 1e-3


@pytest.mark.parametrize("window_order", ["joint", "sequential"])
def test_a_stream_of_a_student_joined_is_the_whole(any_student, call, window_order):
    options = LONG | {"window_order": window_order, "guidance_scale": None, "num_inference_steps": 2}
    chunks = any_student("rain", generator=seeds(0)[0], stream=True, **options)
    joined = np.concatenate(list(chunks), axis=1)
    assert largest_difference(joined, call(pipe=any_student, **options)) == 0


@pytest.mark.parametrize("num_steps", [1, 4])
def test_what_a_mask_keeps_has_no_noise_in_the_end(any_student, call, num_steps):
    sound = noise(4800).astype(np.float32)
    options = {"audio": sound, "mask": [(0.1, 0.2)], "guidance_scale": None, "num_inference_steps": num_steps}
    kept = call(pipe=any_student, **options)[0]
    assert np.array_equal(kept[:1000], sound[:1000]) and np.array_equal(kept[-1000:], sound[-1000:])
    runs = [call(p, pipe=any_student, output_type="latent", **options) for p in ("rain", "dog")]
    difference = (runs[0] - runs[1]).abs().amax((0, 1, 3))  # by frame
    assert difference.max() > 1e-3 and (difference == 0).any()  # the encoded audio, whatever is beside it


# Loading and unloading


def test_unloading_brings_everything_back_to_the_bit(pipe, student_folder):
    scheduler, before = pipe.scheduler, latents_of(pipe, num_inference_steps=3)
    state = {name: each.clone() for name, each in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(student_folder)
    assert pipe.student == STUDENT and type(pipe.scheduler) is SCHEDULERS["lcm"]
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert len(timesteps_of(pipe)) == 4
    pipe.unload_lora_weights()
    assert pipe.student is None and pipe.scheduler is scheduler and "student" not in pipe.config
    assert all(torch.equal(each, state[name]) for name, each in pipe.unet.state_dict().items())
    assert torch.equal(latents_of(pipe, num_inference_steps=3), before)


def test_the_scheduler_follows_the_adapters_that_are_active(pipe, student_folder, tmp_path):
    layers, metadata = student_layers(pipe, seed=2)
    TangoPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)

    def is_student():
        assert (pipe.student is None) == (type(pipe.scheduler) is not SCHEDULERS["lcm"])
        return pipe.student is not None

    pipe.load_lora_weights(student_folder, adapter_name="student")
    assert is_student()
    pipe.load_lora_weights(tmp_path, adapter_name="style")  # the last one is active
    assert not is_student()
    pipe.set_adapters(["student", "style"], [1.0, 0.5])
    assert is_student()
    mixed = latents_of(pipe)
    pipe.set_adapters("student")
    assert is_student() and largest_difference(latents_of(pipe), mixed) > 1e-3
    pipe.disable_lora()
    assert not is_student()
    pipe.enable_lora()
    assert is_student()
    pipe.load_lora_weights(tmp_path, adapter_name="student", hotswap=True)
    assert not is_student()
    pipe.load_lora_weights(student_folder, adapter_name="student", hotswap=True)
    assert is_student()
    pipe.delete_adapters("student")
    assert not is_student()


def test_a_scheduler_that_was_assigned_stays(pipe, student_folder):
    pipe.load_lora_weights(student_folder)
    pipe.scheduler = own = SCHEDULERS["ddim"].from_config(pipe.scheduler.config)
    pipe.unload_lora_weights()
    assert pipe.scheduler is own


def test_pipelines_that_share_a_unet_are_all_the_student(pipe, student_folder):
    scheduler = pipe.scheduler
    pipe.load_lora_weights(student_folder)
    other = TangoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.student == STUDENT and torch.equal(latents_of(other), latents_of(pipe))
    other.unload_lora_weights()
    pipe.unload_lora_weights()
    assert pipe.student is other.student is None and pipe.scheduler is other.scheduler is scheduler


def test_layers_of_all_kinds_are_scaled_and_fused(pipe, student_folder):
    names = list(load_file(next(student_folder.iterdir())))
    for kind in ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"):
        assert any(f".{kind}.lora_A" in name for name in names)
    pipe.load_lora_weights(student_folder)
    loose = latents_of(pipe)
    without = latents_of(pipe, cross_attention_kwargs={"scale": 0.0})
    pipe.fuse_lora()
    assert largest_difference(latents_of(pipe), loose) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.scheduler = SCHEDULERS["lcm"].from_config(pipe.scheduler.config)
    teacher = latents_of(pipe, guidance_scale=1.0, num_inference_steps=4)
    assert largest_difference(teacher, without) < 1e-4 < 1e-2 < largest_difference(teacher, loose)


def test_a_fused_student_is_saved_as_a_pipeline(pipe, student_folder, tmp_path):
    pipe.load_lora_weights(student_folder)
    loose = latents_of(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.student == STUDENT and len(timesteps_of(pipe)) == 4
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["student"] == STUDENT
    code = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    for loaded in (TangoPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path, **code)):
        loaded.set_progress_bar_config(disable=True)
        assert loaded.student == STUDENT and largest_difference(latents_of(loaded), loose) < 1e-4
    for load in (pipe.load_lora_weights, pipe.merge_lora_weights):
        with pytest.raises(ValueError, match="is a student already"):
            load(student_folder)
    assert TangoPipeline.from_pipe(pipe).student == STUDENT


@pytest.mark.parametrize("has_patterns", [False, True])
def test_merging_without_peft_is_fusing(components, tmp_path, has_patterns):
    pipes = [TangoPipeline(**build_components()) for _ in range(2)]
    layers, metadata = student_layers(pipes[0])
    if has_patterns:
        metadata["alpha_pattern"] = {"conv1": 2, "attn1.to_q": 16}
    TangoPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata, student=STUDENT)
    pipes[0].merge_lora_weights(tmp_path, lora_scale=0.5)
    pipes[1].load_lora_weights(tmp_path)
    pipes[1].fuse_lora(lora_scale=0.5)
    pipes[1].unload_lora_weights()
    merged, fused = (pipe.unet.state_dict() for pipe in pipes)
    assert merged.keys() == fused.keys()
    plain = components["unet"].state_dict()
    assert max(largest_difference(merged[name], fused[name]) for name in fused) < 1e-6
    assert sum(largest_difference(merged[name], plain[name]) > 1e-2 for name in plain) == len(layers) / 2
    assert pipes[0].student == pipes[1].student == STUDENT
    assert pipes[0].scheduler.config == pipes[1].scheduler.config


def test_what_only_peft_can_merge_is_refused(pipe, student_folder):
    layers, metadata = student_layers(pipe)
    layers = {f"unet.{name}": each for name, each in layers.items()}
    name = next(iter(layers)).replace("lora_A.weight", "lora_B.bias")
    with pytest.raises(ValueError, match=r"\['B.bias'\] cannot be merged"):
        pipe.merge_lora_weights(layers | {name: torch.zeros(8)})
    pipe.load_lora_weights(student_folder)
    with pytest.raises(ValueError, match=r"`unload_lora_weights\(\)`"):
        pipe.merge_lora_weights(layers)


def test_a_whole_unet_is_registered_as_a_student(pipe):
    pipe.register_student(STUDENT)
    assert len(timesteps_of(pipe)) == 4 and type(pipe.scheduler) is SCHEDULERS["lcm"]
    with pytest.raises(ValueError, match=r"`guidance_scale` of a student has to be one number"):
        pipe.register_student(STUDENT | {"guidance_scale": [1.0, 8.0]})


def test_a_student_with_guidance_as_an_input(components):
    unet = UNet2DConditionModel.from_config(components["unet"].config, time_cond_proj_dim=8).eval()
    pipe = TangoPipeline(**components | {"unet": unet}, default_guidance_scale=9.0)
    pipe.set_progress_bar_config(disable=True)
    ranged = STUDENT | {"guidance_scale": [1.0, 8.0]}
    with pytest.raises(ValueError, match="`default_guidance_scale`.*not 9.0"):
        pipe.register_student(ranged)
    with pytest.raises(ValueError, match=r"`guidance_scale` of a student has to be \[low, high\]"):
        pipe.register_student(STUDENT)
    pipe.register_to_config(default_guidance_scale=3.0)
    pipe.register_student(ranged)
    rows = count_rows(pipe.unet)
    assert torch.equal(latents_of(pipe), latents_of(pipe, guidance_scale=3.0))
    assert largest_difference(latents_of(pipe), latents_of(pipe, guidance_scale=8.0)) > 1e-5
    assert rows == [1] * 16
    with pytest.raises(ValueError, match=r"`guidance_scale` has to be in \[1.0, 8.0\].*not 9"):
        latents_of(pipe, guidance_scale=9)
    with pytest.raises(ValueError, match="`negative_prompt` has no effect.*leave it out[.]"):
        latents_of(pipe, negative_prompt="dog")


def test_other_pipelines_are_saved_as_before(pipe):
    assert "student" not in json.loads(pipe.to_json_string())


# What makes no sense


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_rescale": 0.5},
        {"guidance_interval": (0.0, 0.5)},
        {"negative_prompt": "dog"},
        {"negative_prompt": ["dog"]},
        {"negative_prompt_embeds": torch.zeros(1, 2, 16), "negative_attention_mask": torch.ones(1, 2)},
    ],
)
def test_what_has_no_effect_without_guidance_is_refused(student_pipe, options):
    name = next(iter(options))
    for guidance in ({}, {"guidance_scale": 1.0}):
        with pytest.raises(ValueError, match=f"`{name}` has no effect on a student.*`guidance_scale` above 1"):
            latents_of(student_pipe, **options, **guidance)
    assert torch.isfinite(latents_of(student_pipe, **options, guidance_scale=1.5)).all()


def test_a_deep_cache_is_refused(student_pipe):
    student_pipe.enable_deep_cache(interval=2)
    try:
        with pytest.raises(ValueError, match=r"`disable_deep_cache\(\)`"):
            latents_of(student_pipe)
    finally:
        student_pipe.disable_deep_cache()


def test_two_students_at_once_are_refused(pipe, student_folder):
    pipe.load_lora_weights(student_folder, adapter_name="one")
    pipe.load_lora_weights(student_folder, adapter_name="two")
    pipe.set_adapters(["one", "two"])
    with pytest.raises(ValueError, match=r"\['one', 'two'\] are students.*`set_adapters`"):
        latents_of(pipe)


def test_a_scheduler_of_others_and_much_guidance_are_warned_of(pipe, student_folder, caplog):
    logging.getLogger("pipeline_tango").propagate = True
    with caplog.at_level("WARNING"):
        pipe.load_lora_weights(student_folder)
        latents_of(pipe)
        latents_of(pipe, guidance_scale=2.0)
        assert not caplog.records
        latents_of(pipe, guidance_scale=3.0)
        assert "guidance of 4 inside" in caplog.text
        caplog.clear()
        for other in (SCHEDULERS["ddim"], SCHEDULERS["lcm"]):
            pipe.scheduler = other.from_config(pipe.scheduler.config, original_inference_steps=100)
            latents_of(pipe)
            assert f"not for this {other.__name__}" in caplog.text
            assert "`pipe.scheduler = SCHEDULERS['lcm'].from_config(pipe.scheduler.config, orig" in caplog.text
            caplog.clear()
        pipe.scheduler = SCHEDULERS["lcm"].from_config(pipe.scheduler.config, original_inference_steps=50)
        latents_of(pipe)
        assert not caplog.records


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("[]", "`student` has to be"), (None, None)])
def test_a_file_with_a_student_that_is_none_is_refused_and_the_unet_stays(
    pipe, student_folder, tmp_path, text, message
):
    (path,) = student_folder.iterdir()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert TangoPipeline.lora_student(student_folder) == STUDENT
    metadata.pop("student")
    save_file(load_file(path), tmp_path / path.name, metadata | ({"student": text} if text else {}))
    if message is None:
        assert TangoPipeline.lora_student(tmp_path) is None
        return
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert pipe.student is None and not hasattr(pipe.unet, "peft_config")


def test_a_student_is_saved_in_safetensors_only(pipe, tmp_path):
    layers, _ = student_layers(pipe)
    for options in ({"safe_serialization": False}, {"save_function": torch.save}):
        with pytest.raises(ValueError, match="`student` is saved in the metadata"):
            TangoPipeline.save_lora_weights(tmp_path, layers, student=STUDENT, **options)
    with pytest.raises(ValueError, match="`scheduler` of a student"):
        TangoPipeline.save_lora_weights(tmp_path, layers, student=STUDENT | {"scheduler": "x"})
    assert not any(tmp_path.iterdir())
