"""Finished pictures of one visitor: files with their settings inside, newest first."""

from __future__ import annotations

import base64
import collections
import dataclasses
import html
import itertools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.png_metadata import GenerationSettings, save_png

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn2_diffusion.webapp.limits import DrawRequest

HISTORY = 40  # pictures a visitor sees
SOURCES = 10  # of them, how many keep the picture that they were drawn from in memory
MAX_FILES = 1000  # of all visitors; the oldest go first


@dataclass(frozen=True)
class Record:
    """One finished picture. ``path`` is a PNG that carries ``settings``; ``request`` draws it again alone."""

    path: str
    settings: GenerationSettings
    request: DrawRequest | None = None

    @property
    def caption(self) -> str:
        used = self.settings
        return f"{used.prompt} · seed {used.seed} · {used.steps} steps · {used.width}x{used.height}"

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(Path(self.path).read_bytes()).decode("ascii")


class Store:
    """A temporary folder that is removed by :meth:`close`. Files are named for people who download them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gspn2-app-"))
        self._numbers = itertools.count(1)
        self._kept: collections.deque[Path] = collections.deque()

    def save(
        self, picture: Image, settings: GenerationSettings, request: DrawRequest | None = None
    ) -> Record:
        """Writes the picture as PNG with its settings inside."""
        name = f"gspn2-{next(self._numbers):05d}-seed-{settings.seed}.png"
        path = save_png(picture, self.folder / name, settings)
        self._kept.append(path)
        if len(self._kept) > MAX_FILES:
            self._kept.popleft().unlink(missing_ok=True)
        return Record(str(path), settings, request)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def add_record(history: list[Record], record: Record) -> list[Record]:
    """The history with ``record`` in front; old ones go, and before that what they were drawn from."""
    kept = [record, *history][:HISTORY]
    with_source = [item for item in kept if item.request and item.request.picture]
    stale = {item.path for item in with_source[SOURCES:]}
    return [dataclasses.replace(item, request=None) if item.path in stale else item for item in kept]


def gallery_items(history: list[Record]) -> list[tuple[str, str]]:
    """What the gallery shows: files and captions."""
    return [(record.path, record.caption) for record in history if os.path.exists(record.path)]


def settings_for_json(settings: GenerationSettings) -> dict[str, Any]:
    """The settings as the API returns them, without what is the same for all pictures of a server."""
    keys = ["prompt", "negative_prompt", "steps", "guidance_scale", "seed", "height", "width"]
    keys += ["model", "model_hash", "scheduler", "dtype", "device", "loras", "few_steps", "source"]
    return {key: getattr(settings, key) for key in keys}


def head_html(model: str, status: str) -> str:
    """The page's title and what runs."""
    return f'<div class="g2-head"><h1>{html.escape(model)}</h1><p>{html.escape(status)}</p></div>'


def picture_html(source: str, alt: str) -> str:
    """The large picture: a finished one or a preview, as a ``data:`` address."""
    return f'<div class="g2-stage"><img src="{source}" alt="{html.escape(alt, quote=True)}"></div>'


def empty_html() -> str:
    """The stage before the first picture."""
    return (
        '<div class="g2-stage g2-empty"><div>Your picture appears here.'
        "<div><kbd>Ctrl</kbd> + <kbd>Enter</kbd> draws, <kbd>Esc</kbd> stops.</div></div></div>"
    )


def status_html(text: str, share: float | None = None) -> str:
    """One line and a bar: ``share`` of 1 is full, None hides the bar."""
    bar = ""
    if share is not None:
        bar = f'<div class="g2-bar"><div style="width:{100 * min(max(share, 0.0), 1.0):.0f}%"></div></div>'
    return f'<div class="g2-status" role="status">{html.escape(text)}{bar}</div>'


def _source_words(source: dict[str, Any]) -> str:
    if not source:
        return ""
    words = {"inpaint": "a part of a picture", "enlarge": "a picture of half the size"}
    what = words.get(str(source.get("task")), "a picture")
    return f"{what}, strength {source.get('strength', 1):g}"


def differences_html(older: Record, newer: Record) -> str:
    """What differs between the settings of two pictures, side by side."""
    rows, right = [], _rows(newer)
    for name, value in _rows(older).items():
        if value != right[name]:
            cells = "".join(f"<td>{html.escape(str(item)) or 'none'}</td>" for item in (value, right[name]))
            rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    if not rows:
        return '<p class="g2-same">The settings are the same.</p>'
    return f'<table class="g2-details g2-pair">{"".join(rows)}</table>'


def details_html(record: Record) -> str:
    """All settings of a picture that somebody may want to see, as a table."""
    cells = "".join(
        f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in _rows(record).items()
        if value != ""
    )
    return f'<table class="g2-details">{cells}</table>'


def _rows(record: Record) -> dict[str, Any]:
    used = record.settings
    return {
        "Prompt": used.prompt,
        "Negative": used.negative_prompt,
        "Seed": used.seed,
        "Size": f"{used.width} x {used.height}",
        "Steps": f"{used.steps}, with the few-step adapter" if used.few_steps else used.steps,
        "Guidance": f"{used.guidance_scale:g}",
        "Scheduler": used.scheduler,
        "Model": f"{used.model} ({used.model_hash[:10]})",
        "LoRA": ", ".join(f"{lora['name']} x {lora['weight']:g}" for lora in used.loras),
        "Drawn from": _source_words(used.source),
        "Drawn on": f"{used.device_name or used.device}, {used.dtype}",
    }
