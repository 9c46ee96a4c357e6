import pytest
import torch
import torch._dynamo.testing
from conftest import latents_of
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

from pipeline_tango import BlockedAttnProcessor, TangoPipeline, attention


def attend_in_blocks(pipe):
    pipe.unet.set_attn_processor(BlockedAttnProcessor())


@pytest.mark.parametrize("max_scores", [1, 700, 2**22])  # single queries, a last block that is shorter, one block
def test_blocks_attend_as_the_whole(pipe, monkeypatch, max_scores):
    monkeypatch.setattr(attention, "MAX_BLOCK_SCORES", max_scores)
    expected = latents_of(pipe, ["rain", "a dog barks"])
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_out.0"]))
    expected_with_lora = latents_of(pipe, ["rain", "a dog barks"])
    assert not torch.allclose(expected_with_lora, expected, atol=1e-2)
    attend_in_blocks(pipe)
    assert torch.allclose(latents_of(pipe, ["rain", "a dog barks"]), expected_with_lora, atol=1e-4)
    pipe.unet.delete_adapters("default")
    assert torch.allclose(latents_of(pipe, ["rain", "a dog barks"]), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("max_scores", [1, 700, 2**22])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_vae_attends_as_the_whole(pipe, monkeypatch, caplog, max_scores, memory_format):
    monkeypatch.setattr(attention, "MAX_BLOCK_SCORES", max_scores)
    latents = torch.randn(2, pipe.vae.config.latent_channels, 6, 4)
    expected = pipe.vae.decode(latents)[0]
    pipe.vae.set_attn_processor(BlockedAttnProcessor())
    pipe.vae.to(memory_format=memory_format)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # it is not used
        assert torch.allclose(pipe.vae.decode(latents)[0], expected, atol=1e-5)
        other = pipe.vae.encode(expected)[0].mean
    pipe.vae.set_attn_processor(AttnProcessor2_0())
    assert torch.allclose(pipe.vae.encode(expected)[0].mean, other, atol=1e-5)
    assert not caplog.records


def test_only_self_attention_is_in_blocks(pipe):
    attend_in_blocks(pipe)
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda query, key, *args, **kwargs: calls.append(key.shape[2]) or attend(query, key, *args, **kwargs),
        )
        latents_of(pipe)
        assert calls and max(calls) < 16  # tokens of text; those of the latents are many more
        with torch.enable_grad():
            unet = pipe.unet.train()
            text = torch.randn(1, 5, unet.config.cross_attention_dim)
            unet(torch.randn(1, unet.config.in_channels, 8, 16), 1, text)[0].sum().backward()
        assert max(calls) >= 16 and all(each.grad is not None for each in unet.parameters() if each.requires_grad)


def test_a_compiled_unet_attends_whole(components):
    pipe = TangoPipeline(**components)
    expected = latents_of(pipe)
    attend_in_blocks(pipe)
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounter()
    pipe.unet.compile(backend=backend, fullgraph=True)
    assert torch.allclose(latents_of(pipe), expected, atol=1e-4)
    num_graphs = backend.frame_count
    for seconds in (0.4, 0.5, 0.6):
        latents_of(pipe, audio_length_in_s=seconds)
    assert backend.frame_count <= num_graphs + 1  # one for all other lengths
