"""Converted models in use: saved and loaded, in stock pipelines, with LoRA, offloading and compilation."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models import AutoModel
from tiny_denoisers import BUILDERS, TEXT, arguments, output, tiny_pixart, tiny_sana, tiny_unet
from tiny_models import tiny_vae

import gspn2_diffusion.conversion as conversion
from gspn2_diffusion import convert_to_gspn2
from gspn2_diffusion.conversion.loading import load_for_conversion

LORA_LAYERS = ["mixer.to_proxy", "mixer.to_out"]


@pytest.mark.parametrize("family", BUILDERS)
def test_saved_models_load_as_they_were(family, tmp_path):
    model = convert_to_gspn2(BUILDERS[family](), layers="*", keep_attention=1, proxy_ratio=4)
    model.save_pretrained(tmp_path)
    for load in (type(model).from_pretrained, load_for_conversion):
        loaded = load(tmp_path)
        assert type(loaded) is type(model)
        assert loaded.config.gspn2_conversion == model.config.gspn2_conversion
        assert "quantization_config" not in loaded.config
        assert torch.allclose(output(family, loaded), output(family, model), atol=1e-4)


def test_saved_models_load_in_another_dtype_and_sharded(tmp_path):
    model = convert_to_gspn2(tiny_sana())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.allclose(
        loaded.transformer_blocks[1].attn1.mixer.to_out.weight.float(),
        model.transformer_blocks[1].attn1.mixer.to_out.weight,
        atol=1e-2,
    )


def test_plain_diffusers_says_what_to_install(tmp_path):
    """diffusers' own class, which knows nothing of this package, must not load a half-empty model."""
    convert_to_gspn2(tiny_pixart()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pip install gspn2-diffusion"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


def stock_pipeline(family):
    common = {"vae": tiny_vae(), "tokenizer": None, "text_encoder": None}
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    if family == "sd15":
        return StableDiffusionPipeline(
            **common, unet=tiny_unet(), scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **common, unet=tiny_unet(xl=True), scheduler=scheduler, tokenizer_2=None,
            text_encoder_2=None, add_watermarker=False,
        )  # fmt: skip
    if family == "pixart":
        scheduler = DPMSolverMultistepScheduler()
        return PixArtSigmaPipeline(**common, transformer=tiny_pixart(), scheduler=scheduler)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return SanaPipeline(**{**common, "vae": tiny_dc()}, transformer=tiny_sana(), scheduler=scheduler)


def tiny_dc():
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        scaling_factor=0.5,
    )


def draw(family, pipe, height=16, width=32):
    """The tiny VAE's scale is 2; each family has its own way to take embeddings."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 5, TEXT, generator=generator)
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
    if family == "sdxl":
        pooled = torch.randn(1, TEXT, generator=generator)
        options |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    elif family in ("pixart", "sana"):
        mask = torch.ones(1, 5)
        options |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        options |= {"negative_prompt": None, "use_resolution_binning": False}
    return pipe(
        **options, num_inference_steps=2, height=height, width=width, output_type="np", generator=generator
    ).images


@pytest.mark.parametrize("family", BUILDERS)
def test_stock_pipeline_draws_saves_and_loads(family, tmp_path):
    height, width = (64, 32) if family == "sana" else (16, 32)  # Sana's pipeline wants multiples of 32
    pipe = convert_to_gspn2(stock_pipeline(family))
    picture = draw(family, pipe, height, width)
    assert picture.shape == (1, height, width, 3)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, component in pipe.components.items() if component is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded) is type(pipe)
    denoiser = loaded.components.get("unet") or loaded.components["transformer"]
    assert type(denoiser).__name__.startswith("GSPN2")
    assert abs(draw(family, loaded, height, width) - picture).max() < 1e-3


def test_names_convert_whole_pipelines_and_their_parts(tmp_path):
    stock_pipeline("pixart").save_pretrained(tmp_path / "pipe")
    pipe = convert_to_gspn2(tmp_path / "pipe", dtype=torch.float32)
    assert isinstance(pipe, PixArtSigmaPipeline)
    assert isinstance(pipe.transformer, conversion.GSPN2PixArtTransformer2DModel)
    part = convert_to_gspn2(str(tmp_path / "pipe"), subfolder="transformer")
    assert isinstance(part, conversion.GSPN2PixArtTransformer2DModel)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"neither model_index.json nor config.json"):
        convert_to_gspn2(tmp_path / "empty")


def test_config_without_a_conversion_is_refused():
    with pytest.raises(ValueError, match="no 'gspn2_conversion': load PixArtTransformer2DModel"):
        conversion.GSPN2PixArtTransformer2DModel.from_config(dict(tiny_pixart().config))


def test_lora_trains_saves_and_loads(tmp_path):
    from peft import LoraConfig

    model = convert_to_gspn2(tiny_sana())
    before = output("sana", model)
    model.add_adapter(LoraConfig(r=2, target_modules=LORA_LAYERS, init_lora_weights=False))
    after = output("sana", model)
    assert not torch.allclose(before, after, atol=1e-3)
    model.save_lora_adapter(tmp_path)
    torch.manual_seed(0)  # the start is drawn from nothing random
    fresh = convert_to_gspn2(tiny_sana())
    fresh.load_lora_adapter(
        tmp_path, prefix=None, use_safetensors=True, weight_name="pytorch_lora_weights.safetensors"
    )
    assert torch.allclose(output("sana", fresh), after, atol=1e-4)


@pytest.mark.parametrize("how", ["accelerate", "groups", "layerwise"])
def test_offloading_and_casting(how):
    model = convert_to_gspn2(tiny_sana())
    before = output("sana", model)
    if how == "accelerate":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device("cpu"))
        tolerance = 1e-5
    elif how == "groups":
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        tolerance = 1e-5
    else:
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        mixer = model.transformer_blocks[0].attn1.mixer
        assert (mixer.to_out.weight.dtype, mixer.to_scan.weight.dtype) == (torch.float16, torch.float32)
        tolerance = 2e-2
    after = output("sana", model)
    assert float((after - before).norm() / before.norm()) < tolerance


@pytest.mark.parametrize("regional", [False, True])
def test_compiles_whole_and_by_block_without_a_break(regional):
    model = convert_to_gspn2(tiny_pixart() if regional else tiny_sana())
    family = "pixart" if regional else "sana"
    sizes = [(2, 4), (4, 2)] if regional else [(2, 3), (3, 2)]
    want = [output(family, model, height=h, width=w) for h, w in sizes]
    torch._dynamo.reset()
    if regional:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        run = model
    else:
        run = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for (height, width), expected in zip(sizes, want, strict=True):
            got = run(**arguments(family, height, width)).sample
            assert torch.allclose(got, expected, atol=1e-5)


def test_auto_model_finds_the_class_in_a_saved_pipeline(tmp_path):
    convert_to_gspn2(stock_pipeline("sd15")).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(str(tmp_path), subfolder="unet")
    assert isinstance(model, conversion.GSPN2UNet2DConditionModel)


def test_scan_backend_is_set_everywhere():
    model = convert_to_gspn2(tiny_sana())
    model.set_scan_backend("reference")
    assert {block.attn1.mixer.backend for block in model.transformer_blocks} == {"reference"}
    with pytest.raises(ValueError, match="backend must be one of"):
        model.set_scan_backend("none")


def test_what_is_left_of_attention_still_takes_processors_and_adapters():
    """An adapter made for the original finds its cross-attention; its self-attention is gone."""
    from diffusers.models.attention_processor import AttnProcessor
    from peft import LoraConfig, get_peft_model_state_dict

    original = tiny_sana()
    original.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(original)
    model = convert_to_gspn2(tiny_unet())
    before = output("sd15", model)
    model.set_attn_processor(AttnProcessor())
    assert torch.allclose(output("sd15", model), before, atol=1e-4)
    model = convert_to_gspn2(tiny_sana())
    before = output("sana", model)
    model.load_lora_adapter(weights, prefix=None)
    assert not torch.allclose(output("sana", model), before, atol=1e-4)
    assert not any("attn1" in name for name, _ in model.named_parameters() if "lora" in name)
