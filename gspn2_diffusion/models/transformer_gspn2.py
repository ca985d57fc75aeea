"""GSPN2Transformer2DModel: a diffusion transformer whose token mixing is a line scan (arXiv 2512.07884)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.utils import apply_lora_scale
from torch import nn

from gspn2_diffusion.layers.block import GSPN2TransformerBlock, modulate
from gspn2_diffusion.layers.embeddings import TimestepTextEmbedding
from gspn2_diffusion.layers.feed_forward import LocalPerceptionUnit
from gspn2_diffusion.layers.mixer import GSPN2Mixer, check_scan_backend
from gspn2_diffusion.models import caching
from gspn2_diffusion.models.caption_refiner import CaptionLayer
from gspn2_diffusion.models.checks import check_config, check_inputs, mixer_per_layer
from gspn2_diffusion.models.initialization import initialize_weights

# Finite, so that a fully masked row stays a number; exp(-10000) is 0 in every dtype.
_MASKED = -10000.0


class GSPN2Transformer2DModel(  # type: ignore[misc]
    ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin
):
    r"""A DiT with GSPN-2 line scans in place of self-attention, conditioned on text tokens and a timestep.

    Any picture size that ``patch_size`` divides works, square or not, with the same weights: there is no
    positional embedding. With ``mixer="softmax"`` the same model is the attention baseline of equal width
    and depth.

    Args:
        sample_size: latent height and width the model was trained for; pipelines take it as the default size.
        patch_size: latent pixels per token side.
        in_channels: latent channels.
        out_channels: channels of the prediction; ``in_channels`` by default.
        num_layers: number of blocks.
        num_attention_heads, attention_head_dim: their product is the width of the model; the heads themselves
            matter to "softmax" and "linear" mixers only.
        num_cross_attention_heads: heads of the cross-attention; ``num_attention_heads`` by default.
        cross_attention_inner_dim: width inside the cross-attention; the model's width by default.
        caption_channels: channels of ``encoder_hidden_states``.
        pooled_projection_dim: channels of ``pooled_projections``; None for a model that takes none.
        mlp_ratio: hidden width of the SwiGLU feed-forward over the model's (rounded to a multiple of 32).
        mixer: "gspn2", "softmax", "linear" or "none" for all layers, or a list with one of them per layer.
        proxy_dim: channels in which the scan runs; an eighth of the width by default.
        num_weight_groups: weight sets per scan direction; 1 is GSPN-2, ``proxy_dim`` is GSPN-1.
        chunk_size: lines after which a scan restarts (GSPN-local); None for whole pictures.
        local_perception: a depthwise 3x3 convolution before every feed-forward.
        norm_eps: epsilon of the LayerNorms.
        scan_directions: a choice of "down", "up", "right", "left"; None for all four.
        num_caption_layers: self-attention layers among the text tokens (see :class:`CaptionLayer`).

    Raises:
        ValueError: a configuration value out of range; the message names it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GSPN2TransformerBlock", "CaptionLayer"]  # type: ignore[assignment]  # noqa: RUF012
    _repeated_blocks = ["GSPN2TransformerBlock"]  # noqa: RUF012
    # The scan's gates and weights feed a recurrence over hundreds of lines, where 8-bit errors compound.
    _skip_layerwise_casting_patterns = [  # type: ignore[assignment]  # noqa: RUF012
        "patch_embed",
        "time_embed",
        "norm",
        "to_scan",
        "^proj_out$",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_cross_attention_heads: int | None = None,
        cross_attention_inner_dim: int | None = None,
        caption_channels: int = 384,
        pooled_projection_dim: int | None = None,
        mlp_ratio: float = 2.5,
        mixer: str | list[str] = "gspn2",
        proxy_dim: int | None = None,
        num_weight_groups: int = 1,
        chunk_size: int | None = None,
        local_perception: bool = True,
        norm_eps: float = 1e-6,
        scan_directions: list[str] | None = None,
        num_caption_layers: int = 0,
    ) -> None:
        super().__init__()
        check_config(dict(self.config))
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.patch_size = patch_size
        self.num_cross_attention_heads = num_cross_attention_heads or num_attention_heads
        self.out_channels = in_channels if out_channels is None else out_channels

        self.patch_embed = nn.Linear(patch_size * patch_size * in_channels, dim)
        self.time_embed = TimestepTextEmbedding(dim, pooled_projection_dim)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
        self.caption_norm = RMSNorm(dim, eps=1e-5)
        inner = cross_attention_inner_dim or dim
        self.caption_layers = nn.ModuleList(
            CaptionLayer(dim, inner, self.num_cross_attention_heads, norm_eps)
            for _ in range(num_caption_layers)
        )
        self.transformer_blocks = nn.ModuleList(
            GSPN2TransformerBlock(
                dim,
                num_attention_heads=num_attention_heads,
                num_cross_attention_heads=self.num_cross_attention_heads,
                cross_attention_inner_dim=inner,
                mlp_ratio=mlp_ratio,
                mixer=name,
                proxy_dim=proxy_dim,
                num_weight_groups=num_weight_groups,
                chunk_size=chunk_size,
                local_perception=local_perception,
                norm_eps=norm_eps,
                scan_directions=scan_directions,
            )
            for name in mixer_per_layer(mixer, num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False
        initialize_weights(self)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict (for flow matching: the velocity, noise minus data) for noisy latents.

        Args:
            hidden_states: latents ``(B, in_channels, H, W)``; H and W multiples of ``patch_size``.
            timestep: ``(B,)`` or a single value, in [0, 1000], integer or floating point.
            encoder_hidden_states: text tokens ``(B, L, caption_channels)``.
            encoder_attention_mask: ``(B, L)``, bool, integer or floating point, 1 for tokens to attend to;
                None for all of them.
            pooled_projections: pooled text ``(B, pooled_projection_dim)``; required exactly when the
                configuration has a ``pooled_projection_dim``.
            attention_kwargs: ``{"scale": s}`` multiplies the LoRA layers by ``s`` for this call.
            return_dict: return a ``Transformer2DModelOutput`` instead of a tuple.

        Returns:
            ``sample (B, out_channels, H, W)``, as the attribute of an output or the only member of a tuple.

        Raises:
            ValueError: a tensor's shape does not fit the configuration or the other tensors.
        """
        check_inputs(
            self.config,
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask,
            pooled_projections,
        )
        patch = self.patch_size
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        timestep = timestep.reshape(-1).expand(hidden_states.shape[0])

        # Copied, since the output of a linear layer is a view: to blocks that are compiled on their own, an
        # input that is a view in the first block only means one more compilation.
        hidden_states = self.patch_embed(self._patchify(hidden_states)).clone()  # (B, h*w, C)
        temb, embedded = self.time_embed(timestep, pooled_projections, hidden_states.dtype)  # (B, 6C), (B, C)
        bias = _mask_to_bias(encoder_attention_mask, self.num_cross_attention_heads, hidden_states.dtype)
        encoder_hidden_states = self._read_caption(encoder_hidden_states, bias)

        for block in self.transformer_blocks:
            arguments = (hidden_states, encoder_hidden_states, bias, temb, height, width)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)  # type: ignore[misc]
            else:
                hidden_states = block(*arguments)

        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)  # (B, 1, C) each
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        sample = self._unpatchify(hidden_states, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def encode_caption(self, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What the blocks' cross-attention reads.

        Args:
            encoder_hidden_states: text tokens ``(B, L, caption_channels)``.
            mask: ``(B, L)``, 1 for real tokens; None for all of them.

        Returns:
            ``(B, L, C)``.
        """
        bias = _mask_to_bias(mask, self.num_cross_attention_heads, encoder_hidden_states.dtype)
        return self._read_caption(encoder_hidden_states, bias)

    def _read_caption(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = self.caption_norm(self.caption_projection(tokens))  # (B, L, C)
        for layer in self.caption_layers:
            tokens = layer(tokens, bias)
        return tokens

    def set_scan_backend(self, backend: str) -> None:
        """Choose the backend of every scan, local perception unit and norm: "auto", "cupy" or "reference".

        Raises:
            ValueError: an unknown backend.
        """
        check_scan_backend(backend)
        for module in self.modules():
            if isinstance(module, (GSPN2Mixer, LocalPerceptionUnit)):
                module.backend = backend
            elif isinstance(module, GSPN2TransformerBlock):
                module.norm_backend = backend

    def enable_cache(self, config: Any) -> None:
        """As diffusers' ``CacheMixin.enable_cache``, on the mixers too; never without effect.

        Args:
            config: of FirstBlockCache, MagCache, TaylorSeerCache, PyramidAttentionBroadcast or FasterCache.

        Raises:
            ValueError: a cache is on already, this one cannot apply, or it finds nothing to cache.
        """
        if not self.is_cache_enabled:
            config = caching.fit_config(self, config)
            caching.register_block()
        before = caching.count_hooks(self)
        super().enable_cache(config)
        caching.hook_mixers(self, config)
        if caching.count_hooks(self) == before:
            super().disable_cache()
            mixers = sorted(set(mixer_per_layer(self.config["mixer"], self.config["num_layers"])))
            raise ValueError(
                f"the cache finds nothing to cache in this {type(self).__name__} of the mixers {mixers}: "
                f"{config}"
            )
        self._forget_child_registries()

    def _forget_child_registries(self) -> None:
        """Hooks were added after diffusers made its list of those that contexts are sent to."""
        forget = getattr(getattr(self, "_diffusers_hook", None), "invalidate_child_registries_cache", None)
        if forget is not None:  # a version that keeps such a list
            forget()

    def _patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """``(B, c, h*p, w*p)`` -> ``(B, h*w, p*p*c)``."""
        patch = self.patch_size
        latents = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, c, h, p, w, p)
        return latents.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _unpatchify(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """``(B, h*w, p*p*c)`` -> ``(B, c, h*p, w*p)``, contiguous."""
        patch = self.patch_size
        picture = tokens.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))  # (B, h, w, p, p, c)
        return picture.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _mask_to_bias(mask: torch.Tensor | None, heads: int, dtype: torch.dtype) -> torch.Tensor | None:
    """``(B, L)`` of 1 = keep -> additive ``(B*heads, 1, L)`` in ``dtype``.

    Repeated for the heads here, once for all blocks: diffusers' attention would repeat ``(B, 1, L)`` with
    ``repeat_interleave``, for which torch 2.11 compiles one batch size only.
    """
    if mask is None:
        return None
    bias = (1 - mask.to(dtype)) * _MASKED  # (B, L)
    return bias[:, None, None].expand(-1, heads, -1, -1).flatten(0, 1)
