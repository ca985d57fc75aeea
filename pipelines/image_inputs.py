"""Pictures and masks that come into a pipeline: what is allowed, their size, and their tensors.

Pictures are PIL pictures, arrays ``(H, W, 3)`` or ``(B, H, W, 3)``, tensors ``(3, H, W)`` or
``(B, 3, H, W)``, or lists of them; masks the same with one channel, which may be left out. Numbers are floats
in [0, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

MASK_MODES = ("1", "L", "RGB")


def picture_size(image: Any) -> tuple[int, int]:
    """Height and width in pixels of the (first) picture; raises ``TypeError`` for anything else."""
    first = image[0] if isinstance(image, (list, tuple)) and len(image) else image
    if isinstance(first, PIL.Image.Image):
        return first.height, first.width
    if isinstance(first, torch.Tensor) and first.ndim in (3, 4):
        return int(first.shape[-2]), int(first.shape[-1])
    if isinstance(first, np.ndarray) and first.ndim in (3, 4):
        return int(first.shape[-3]), int(first.shape[-2])
    came = f"{type(first).__name__} of shape {tuple(first.shape)}" if hasattr(first, "shape") else repr(first)
    raise TypeError(f"`image` must be PIL pictures, (B, H, W, 3) arrays or (B, 3, H, W) tensors, got {came}")


def read_pictures(image: Any, height: int, width: int, processor: VaeImageProcessor) -> torch.Tensor:
    """Pictures ``(B, 3, height, width)`` float32 in [-1, 1], resized where they have another size.

    PIL pictures of any mode; what is transparent becomes white.

    Raises:
        TypeError, ValueError: not pictures, no floats in [0, 1], not three channels, or of several sizes.
    """
    items = list(image) if isinstance(image, (list, tuple)) else [image]
    for index, item in enumerate(items):
        if type(item) is not type(items[0]) and not isinstance(item, PIL.Image.Image):
            raise TypeError(f"`image[{index}]` must be of the type of the first, got {type(item).__name__}")
        if isinstance(item, (torch.Tensor, np.ndarray)):
            _check_numbers("image", item)
            channels = item.shape[-1] if isinstance(item, np.ndarray) else item.shape[-3]
            if channels != 3:
                raise ValueError(f"`image` must have 3 channels, got {channels} in shape {tuple(item.shape)}")
    if not isinstance(items[0], PIL.Image.Image):
        items = [part for item in items for part in (item if item.ndim == 4 else [item])]
    items = [on_white(item) if isinstance(item, PIL.Image.Image) else item for item in items]
    if len({picture_size(item) for item in items}) > 1 and not isinstance(items[0], PIL.Image.Image):
        raise ValueError("`image` holds arrays of several sizes; all must have the same")
    return processor.preprocess(items, height=height, width=width).float()


def read_mask(
    mask: Any, size: tuple[int, int], height: int, width: int, processor: VaeImageProcessor
) -> torch.Tensor:
    """Masks ``(B, 1, height, width)`` float32, 1 where the picture is drawn anew, 0 where it is kept.

    Args:
        mask: white (over one half) = drawn anew.
        size: height and width of the picture that came with it.
        processor: one that binarises.

    Raises:
        TypeError, ValueError: not a mask, of another size than the picture, a mode other than 1, L and RGB,
            more than one channel, or no floats in [0, 1].
    """
    items = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    if not items:
        raise ValueError("`mask_image` is an empty list; pass at least one mask")
    tensors = torch.cat([_mask_tensor(item) for item in items]) if _same_sizes(items) else None
    if tensors is None or tuple(tensors.shape[-2:]) != size:
        sizes = sorted({tuple(_mask_tensor(item).shape[-2:]) for item in items})
        raise ValueError(
            f"`mask_image` must have the size of `image`, {size[0]} x {size[1]} pixels (height x width), got "
            + ", ".join(f"{h} x {w}" for h, w in sizes)
        )
    return processor.preprocess(tensors, height=height, width=width).float()


def _same_sizes(items: list[Any]) -> bool:
    return len({_mask_tensor(item).shape[-2:] for item in items}) == 1


def _mask_tensor(mask: Any) -> torch.Tensor:
    """One mask or a batch as ``(B, 1, H, W)`` float32 in [0, 1]."""
    if isinstance(mask, PIL.Image.Image):
        if mask.mode not in MASK_MODES:
            raise ValueError(
                f"`mask_image` must have one of the modes {', '.join(MASK_MODES)}, got {mask.mode!r}; "
                'convert it with .convert("L")'
            )
        return torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)[None, None]
    if not isinstance(mask, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"`mask_image` must be a PIL picture, an array or a tensor, got {type(mask).__name__}"
        )
    _check_numbers("mask_image", mask)
    came = tuple(mask.shape)
    if isinstance(mask, np.ndarray):  # (H, W), (H, W, 1), (B, H, W) or (B, H, W, 1)
        mask = torch.from_numpy(np.ascontiguousarray(mask))
        if mask.ndim == 4 or (mask.ndim == 3 and mask.shape[-1] == 1):
            mask = mask.movedim(-1, -3)
    mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"`mask_image` must have one channel, got the shape {came}")
    return mask.float().cpu()


def _check_numbers(name: str, values: Any) -> None:
    dtype = values.dtype
    boolean = dtype in (torch.bool, np.bool_)
    floating = (
        dtype.is_floating_point if isinstance(dtype, torch.dtype) else np.issubdtype(dtype, np.floating)
    )
    if not (floating or (boolean and name == "mask_image")):
        raise TypeError(f"`{name}` must hold floats in [0, 1], got {dtype}; divide bytes by 255")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`{name}` must lie in [0, 1], got [{float(values.min())}, {float(values.max())}]")


def on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as RGB; what is transparent becomes white."""
    if not (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, "white")
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def soften(mask: torch.Tensor, radius: float) -> torch.Tensor:
    """Masks ``(B, 1, H, W)`` with Gaussian edges of ``radius`` pixels, in [0, 1]."""
    if radius == 0:
        return mask
    layers = [
        PIL.Image.fromarray((layer.numpy() * 255).round().astype(np.uint8)) for layer in mask[:, 0].cpu()
    ]
    blurred = [np.asarray(VaeImageProcessor.blur(layer, radius), dtype=np.float32) / 255 for layer in layers]  # type: ignore[arg-type]
    return torch.from_numpy(np.stack(blurred))[:, None].to(mask.device)
