"""convert_to_gspn2: what is replaced, how it starts, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from tiny_denoisers import BUILDERS, output, tiny_pixart, tiny_sana, tiny_unet

from gspn2_diffusion import GSPN2Mixer, convert_to_gspn2
from gspn2_diffusion.conversion.families import attention_layers, native_grid
from gspn2_diffusion.conversion.initialization import start_as_attention
from gspn2_diffusion.conversion.self_attention import GSPN2SelfAttention


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("family", BUILDERS)
def test_all_self_attention_is_replaced_and_starts_nearer_to_the_teacher(family):
    teacher = output(family, BUILDERS[family]())
    distance = {}
    for init in ("attention", "random"):
        torch.manual_seed(0)
        model = BUILDERS[family]()
        stock = type(model)
        names = list(attention_layers(model))
        assert convert_to_gspn2(model, init=init) is model
        assert isinstance(model, stock)
        assert list(model.config.gspn2_conversion["layers"]) == names
        assert all(isinstance(layer, GSPN2SelfAttention) for layer in attention_layers(model).values())
        assert any(isinstance(layer, Attention) for layer in model.modules()), "cross-attention stays"
        distance[init] = relative(output(family, model), teacher)
    assert distance["attention"] < 0.75 * distance["random"]


def test_zero_start_is_the_model_without_self_attention():
    model = convert_to_gspn2(tiny_pixart(), init="zero")
    without = tiny_pixart()
    for block in without.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
        torch.nn.init.zeros_(block.attn1.to_out[0].bias)
    assert torch.allclose(output("pixart", model), output("pixart", without), atol=1e-5)


@pytest.mark.parametrize(("height", "width", "chunk"), [(8, 8, None), (3, 10, None), (8, 8, 4)])
def test_uniform_picture_passes_as_through_the_attention(height, width, chunk):
    """With as many proxy channels as channels nothing is approximated but the weights of the mean."""
    torch.manual_seed(0)
    attention = Attention(12, heads=3, dim_head=4, bias=True)
    mixer = GSPN2Mixer(12, proxy_dim=12, chunk_size=chunk)
    start_as_attention(mixer, attention, (height, width))
    tokens = torch.randn(2, 1, 12).expand(2, height * width, 12)
    mixed = mixer(tokens, height, width)
    if chunk:  # a chunked scan's sum depends on the place within its chunk only when directions differ
        mixed = mixed.mean(1, keepdim=True).expand_as(mixed)
    assert torch.allclose(mixed, attention(tokens), atol=1e-5)


def test_proxy_channels_are_the_best_of_their_number():
    torch.manual_seed(0)
    attention = Attention(16, heads=2, dim_head=8)
    weight = attention.to_out[0].weight @ attention.to_v.weight
    mixer = GSPN2Mixer(16, proxy_dim=4)
    start_as_attention(mixer, attention, (8, 8))
    product = mixer.to_out.weight[:, :4] @ mixer.to_proxy.weight
    best = torch.linalg.svdvals(weight)[4:].square().sum().sqrt()
    assert float((product - weight).norm()) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sana"])
def test_height_and_width_reach_the_mixers(family):
    """Same number of tokens, other shape: the mixers must see the difference, and the right one."""
    model = convert_to_gspn2(BUILDERS[family]())
    seen: list[tuple[int, int]] = []
    for layer in attention_layers(model).values():
        layer.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    assert output(family, model, height=16, width=8).shape[-2:] == (16, 8)
    assert output(family, model, height=8, width=16).shape[-2:] == (8, 16)
    tall, wide = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [grid[::-1] for grid in tall] == wide
    assert all(height == 2 * width for height, width in tall)


def test_native_grid_of_every_level():
    model = tiny_unet()
    grids = {name: native_grid(model, name) for name in attention_layers(model)}
    assert {name.split(".attentions")[0]: grid for name, grid in grids.items()} == {
        "down_blocks.0": (16, 16),
        "down_blocks.1": (8, 8),
        "mid_block": (8, 8),
        "up_blocks.0": (8, 8),
        "up_blocks.1": (16, 16),
    }
    assert native_grid(tiny_pixart(), "transformer_blocks.0.attn1") == (8, 8)


def test_choice_of_layers():
    model = convert_to_gspn2(tiny_unet(), layers="up_blocks.*", keep_attention="up_blocks.1*")
    assert all(name.startswith("up_blocks.0") for name in model.config.gspn2_conversion["layers"])
    convert_to_gspn2(model, layers=["mid_block.*", "down_blocks.0.*"], proxy_ratio=4)
    layers = model.config.gspn2_conversion["layers"]
    assert {name.split(".attentions")[0] for name in layers} == {"up_blocks.0", "mid_block", "down_blocks.0"}
    assert layers["mid_block.attentions.0.transformer_blocks.0.attn1"]["proxy_dim"] == 8
    assert torch.isfinite(output("sd15", model)).all()


def test_a_number_of_attention_layers_stays_evenly_spread():
    model = convert_to_gspn2(tiny_pixart(), keep_attention=1)
    assert list(model.config.gspn2_conversion["layers"]) == [
        "transformer_blocks.0.attn1",
        "transformer_blocks.2.attn1",
    ]


def test_copies_and_dtypes():
    model = convert_to_gspn2(tiny_sana().to(torch.bfloat16).requires_grad_(False))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    model = copy.deepcopy(model).float()
    assert torch.isfinite(output("sana", model, height=4, width=6)).all()


def test_checkpointing_replays_each_call_at_its_own_size():
    """Two sizes with the same number of tokens are in flight when the backward pass recomputes the first."""
    from tiny_denoisers import arguments

    gradients = []
    for checkpointing in (False, True):
        model = convert_to_gspn2(tiny_pixart()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls = [model(**arguments("pixart", *size)).sample for size in ((16, 4), (4, 16))]
        sum(sample.square().sum() for sample in calls).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))


def joint_models():
    sd3 = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), in_channels=4,
    )  # fmt: skip
    return [sd3, flux]


@pytest.mark.parametrize("model", joint_models(), ids=lambda model: type(model).__name__)
def test_joint_attention_is_refused_by_name(model):
    with pytest.raises(ValueError, match=rf"got {type(model).__name__}: layer '.*attn.*joint attention"):
        convert_to_gspn2(model)


def with_adapter():
    from peft import LoraConfig

    model = tiny_sana()
    model.add_adapter(LoraConfig(target_modules=["to_v"]))
    return model


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, ValueError, "got Linear: it has no attention layers"),
        (lambda: 3, {}, TypeError, "got int"),
        (tiny_pixart, {"proxy_ratio": 0}, ValueError, "proxy_ratio must be an integer of at least 1, got 0"),
        (tiny_pixart, {"init": "ones"}, ValueError, r"init must be one of .* got 'ones'"),
        (
            tiny_pixart,
            {"layers": "mid*"},
            ValueError,
            "'mid.' matches no self-attention layer; there are trans",
        ),
        (tiny_pixart, {"layers": 3}, TypeError, "layers must be 'all', a pattern or a list of names, got 3"),
        (tiny_pixart, {"keep_attention": 3}, ValueError, "keep_attention must be from 0 to 2 layers, got 3"),
        (tiny_pixart, {"keep_attention": "*"}, ValueError, "keeps every layer"),
        (tiny_pixart, {"dtype": torch.float32}, TypeError, "unexpected arguments"),
        (with_adapter, {}, ValueError, "'transformer_blocks.0.attn1' cannot be replaced"),
        (lambda: convert_to_gspn2(tiny_sana()), {}, ValueError, "no self-attention layer left"),
        (lambda: tiny_pixart().to("meta"), {}, ValueError, "its weights are offloaded"),
    ],
)
def test_bad_input(build, options, error, message):
    with pytest.raises(error, match=message):
        convert_to_gspn2(build(), **options)


def test_cross_attention_in_the_place_of_self_attention_is_refused():
    model = tiny_unet()
    model.mid_block.attentions[0].transformer_blocks[0].attn1 = Attention(32, cross_attention_dim=16, heads=2)
    with pytest.raises(ValueError, match=r"mid_block.attentions.0.*attends to the text"):
        convert_to_gspn2(model)
    convert_to_gspn2(model, keep_attention="mid_block.*")
    assert len(model.config.gspn2_conversion["layers"]) == len(attention_layers(model)) - 1


def test_a_mask_on_self_attention_raises():
    from tiny_denoisers import arguments

    model = convert_to_gspn2(tiny_unet())
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(**arguments("sd15"), attention_mask=torch.ones(1, 128))
