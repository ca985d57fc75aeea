"""Settings inside a picture: how a PNG, JPEG or WebP remembers what drew it.

Two text chunks are written. ``parameters`` is the text that AUTOMATIC1111's web UI writes and that most
galleries and other front ends read. ``gspn2`` is a JSON object with everything needed to draw the same
picture again; it is the one :func:`read_settings` trusts, because the first format cannot tell a prompt that
contains a line "Negative prompt:" from a negative prompt. JPEG and WebP carry both texts in their EXIF:
``parameters`` as the user comment, where the web UI puts it, ``gspn2`` as the image description.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Exif, Image
    from PIL.PngImagePlugin import PngInfo

FORMAT_VERSION = 1
JSON_KEY = "gspn2"
TEXT_KEY = "parameters"
SUFFIXES = (".png", ".jpg", ".webp")
_EXIF_IFD, _USER_COMMENT, _DESCRIPTION = 0x8769, 0x9286, 0x010E


class MetadataError(ValueError):
    """The file is no picture, carries no settings, or carries settings that cannot be read."""


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that decides one picture, resolved: no value is "the default" or "auto" any more.

    ``height`` and ``width`` are in pixels; ``seed`` seeds a CPU generator, so it means the same on every
    device. ``model`` is the name that was asked for (of a folder its last part only, so that a shared picture
    does not tell where its author keeps files); ``model_hash`` identifies the content, see
    :func:`gspn2_diffusion.files.model_hash`.

    ``loras`` holds ``name``, ``sha256`` (of the file) and ``weight`` of each LoRA, in the order in which they
    were added. ``few_steps`` tells whether the model's own few-step adapter was on. ``source`` is empty for a
    picture from text alone; else ``task`` ("img2img" or "inpaint"), ``strength``, ``image_sha256`` and
    ``mask_sha256`` say what it was drawn from.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    seed: int
    height: int
    width: int
    model: str
    model_hash: str
    scheduler: str
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    device_name: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    loras: list[dict[str, Any]] = field(default_factory=list)
    few_steps: bool = False
    source: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        """One JSON object, UTF-8 text, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> GenerationSettings:
        """The inverse of :meth:`to_json`. Unknown keys (of newer versions) are ignored.

        Raises:
            MetadataError: not JSON, not an object, a required key missing, or a value of the wrong type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise MetadataError(f"the {JSON_KEY!r} chunk is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise MetadataError(f"the {JSON_KEY!r} chunk holds a {type(data).__name__}, not an object")
        return cls(**_known_fields(data))


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "dict[str, Any]": dict,
    "dict[str, str]": dict,
    "list[dict[str, Any]]": list,
}


def _known_fields(data: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for item in dataclasses.fields(GenerationSettings):
        if item.name not in data:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise MetadataError(f"the {JSON_KEY!r} chunk has no {item.name!r}")
            continue
        value = data[item.name]
        # Annotations are strings here (postponed evaluation), which makes them keys of the table above.
        of_type = isinstance(value, _FIELD_TYPES[str(item.type)])
        if not of_type or isinstance(value, bool) != (item.type == "bool"):  # True is an integer, too
            raise MetadataError(
                f"the {JSON_KEY!r} chunk has {item.name!r} = {value!r}, which is not a {item.type}"
            )
        known[item.name] = value
    _check_loras(known.get("loras", []))
    return known


def _check_loras(loras: list[Any]) -> None:
    for lora in loras:
        texts = isinstance(lora, dict) and all(isinstance(lora.get(key), str) for key in ("name", "sha256"))
        weight = lora.get("weight") if texts else None
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise MetadataError(f"the {JSON_KEY!r} chunk has a LoRA that cannot be read: {lora!r}")


def format_parameters(settings: GenerationSettings) -> str:
    """``settings`` as AUTOMATIC1111's text: prompt, "Negative prompt: ..." if any, a line of values."""
    values = {
        "Steps": settings.steps,
        "Sampler": settings.scheduler,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": settings.model_hash[:10],
        "Model": settings.model,
        "Denoising strength": settings.source.get("strength", ""),
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['sha256'][:12]}" for lora in settings.loras),
        "Lora weights": ", ".join(f"{lora['name']}: {lora['weight']:g}" for lora in settings.loras),
        "Few steps": "on" if settings.few_steps else "",
        "Version": f"gspn2-diffusion {settings.versions.get('gspn2-diffusion', 'unknown')}",
    }
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in values.items() if value != ""))
    return "\n".join(lines)


def _quote(text: str) -> str:
    """Values with a comma, colon, quote or line break are written as JSON strings, as the web UI does."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n\r]', text) else text


_VALUE = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def parse_parameters(text: str) -> dict[str, str]:
    """AUTOMATIC1111's text as a dictionary, with the keys "Prompt", "Negative prompt" and the last line's.

    Reads our own text and the web UI's. A prompt that itself contains a line starting with "Negative prompt:"
    cannot be told apart in this format; :func:`read_settings` does not have that limit.
    """
    lines = text.strip("\n").split("\n")
    values = {}
    if len(_VALUE.findall(lines[-1])) >= 3:  # fewer would be a prompt that happens to contain a colon
        values = {key: _unquote(value) for key, value in _VALUE.findall(lines.pop())}
    negative_at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    prompt = "\n".join(lines[:negative_at])
    negative = "\n".join(lines[negative_at:]).removeprefix("Negative prompt:").removeprefix(" ")
    return {"Prompt": prompt, "Negative prompt": negative, **values}


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def png_info(settings: GenerationSettings) -> PngInfo:
    """The two text chunks, for callers that save with Pillow themselves."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(TEXT_KEY, format_parameters(settings))  # becomes iTXt by itself where Latin-1 is not enough
    info.add_itxt(JSON_KEY, settings.to_json())
    return info


def save_png(image: Image, path: str | os.PathLike[str], settings: GenerationSettings) -> Path:
    """Write ``image`` to ``path`` with ``settings`` inside and return the path.

    The file is written beside ``path`` under a temporary name and renamed, so ``path`` never holds half a
    picture; an existing file is replaced. The bytes depend on nothing but the picture and the settings.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, **save_options(".png", settings))
    return Path(path)


def exif(settings: GenerationSettings) -> Exif:
    """The two texts for JPEG and WebP, for callers that save with Pillow themselves."""
    from PIL import Image

    data = Image.Exif()
    data[_DESCRIPTION] = f"{JSON_KEY}: {json.dumps(dataclasses.asdict(settings), allow_nan=False)}"  # ASCII
    data.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + format_parameters(settings).encode("utf-16-be")
    return data


def save_options(suffix: str, settings: GenerationSettings) -> dict[str, Any]:
    """Arguments of Pillow's ``Image.save`` for a file ending in ``suffix``, settings included.

    Raises:
        ValueError: another ending than those of :data:`SUFFIXES`.
    """
    if suffix == ".png":
        # Half the time of Pillow's default level for 5 % more bytes: a GPU draws faster than a core encodes.
        return {"format": "PNG", "compress_level": 4, "pnginfo": png_info(settings)}
    if suffix == ".jpg":
        return {"format": "JPEG", "quality": 95, "subsampling": 0, "exif": exif(settings)}
    if suffix == ".webp":
        return {"format": "WEBP", "quality": 95, "method": 4, "exif": exif(settings)}
    raise ValueError(f"`suffix` must be one of {', '.join(SUFFIXES)}, got {suffix!r}")


def save_picture(image: Image, path: str | os.PathLike[str], settings: GenerationSettings) -> Path:
    """As :func:`save_png`, in the format that the ending of ``path`` names (one of :data:`SUFFIXES`).

    Raises:
        OSError: the folder does not exist or cannot be written.
        ValueError: an ending that is not known, or settings too long for the EXIF of a JPEG (64 KB).
    """
    options = save_options(Path(path).suffix.lower(), settings)
    with atomic_path(path) as temporary:
        image.save(temporary, **options)
    return Path(path)


def read_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """All text chunks of a PNG by key; of a JPEG or WebP the two texts in its EXIF, if any.

    Raises:
        MetadataError: no such picture, a damaged one, or pixels or text beyond Pillow's safety limits.
        OSError: the file cannot be opened.
    """
    from PIL import Image, UnidentifiedImageError

    with open(path, "rb") as file:  # separates "cannot be opened" from what Pillow thinks of the content
        try:
            with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
                if image.format == "PNG":
                    texts: dict[str, Any] = getattr(image, "text", {})
                    return {key: str(value) for key, value in texts.items()}
                return _exif_text(image.getexif())
        except UnidentifiedImageError:
            raise MetadataError(f"{os.fspath(path)!r} is not a PNG, JPEG or WebP picture") from None
        except Image.DecompressionBombError:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
            raise MetadataError(
                f"{os.fspath(path)!r} is not opened: it says it has more than {most} megapixels"
            ) from None
        except (SyntaxError, ValueError, OSError) as error:
            # Pillow's ways to say: broken chunk, too much text, cut off
            raise MetadataError(f"{os.fspath(path)!r} cannot be read: {error}") from None


def _exif_text(data: Exif) -> dict[str, str]:
    texts = {}
    comment = data.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        raw = comment.removeprefix(b"UNICODE\0")
        # The web UI's text starts with a Latin letter nearly always: the zero byte tells the byte order.
        texts[TEXT_KEY] = raw.decode("utf-16-le" if raw[1:2] == b"\0" else "utf-16-be", "replace")
    elif isinstance(comment, bytes) and comment.startswith(b"ASCII\0\0\0"):
        texts[TEXT_KEY] = comment[8:].decode("utf-8", "replace")
    description = str(data.get(_DESCRIPTION, ""))
    if description.startswith(f"{JSON_KEY}: "):
        texts[JSON_KEY] = description.removeprefix(f"{JSON_KEY}: ")
    return texts


def read_settings(path: str | os.PathLike[str]) -> GenerationSettings:
    """The settings that drew the picture at ``path``.

    Raises:
        MetadataError: not a picture, no ``gspn2`` chunk (made by another program, or saved again by one that
            drops text), or a chunk that cannot be read.
        OSError: the file cannot be opened.
    """
    text = read_text(path)
    if JSON_KEY not in text:
        raise MetadataError(
            f"{os.fspath(path)!r} carries no {JSON_KEY!r} settings (text chunks: {sorted(text) or 'none'})"
        )
    return GenerationSettings.from_json(text[JSON_KEY])


def read_parameters(path: str | os.PathLike[str]) -> dict[str, str]:
    """The AUTOMATIC1111 text of the picture at ``path``, parsed; pictures of other programs work too.

    Raises:
        MetadataError: not a picture, or no ``parameters`` text.
        OSError: the file cannot be opened.
    """
    text = read_text(path)
    if TEXT_KEY not in text:
        raise MetadataError(f"{os.fspath(path)!r} carries no {TEXT_KEY!r} text")
    return parse_parameters(text[TEXT_KEY])
