"""From a list of prompts to single pictures: seeds, wildcards, identities, names, and who draws what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gspn2_diffusion.batch.prompts import MAX_SEED, Entry, LoraNames, PromptError, take_lora_tags
from gspn2_diffusion.png_metadata import GenerationSettings

# What a picture was drawn on and with, and what its model was called, does not make it another picture.
_NOT_IN_KEY = ("device", "device_name", "versions", "format", "model")


@dataclass(frozen=True)
class Defaults:
    """What the command line says for prompts that say nothing themselves; sizes of None are the model's."""

    negative: str
    height: int | None
    width: int | None
    steps: int
    guidance: float
    seed: int | None
    count: int
    loras: LoraNames = ()
    few_steps: bool | None = False


@dataclass(frozen=True)
class Picture:
    """One picture to draw. ``index`` is its place in the list, from 1; sizes of None are the model's.

    ``few_steps`` of None: as the device decides; steps and guidance are then those without.
    """

    index: int
    line: int
    template: str
    prompt: str
    negative: str
    height: int | None
    width: int | None
    steps: int
    guidance: float
    seed: int
    loras: LoraNames = ()
    few_steps: bool | None = False


@dataclass(frozen=True)
class Job:
    """A picture with every setting resolved. ``file`` is relative to the output folder."""

    picture: Picture
    settings: GenerationSettings
    key: str
    file: str

    @property
    def group(self) -> tuple[int, int, int, float, tuple[tuple[str, float], ...], bool]:
        """Pictures of one group can be drawn together: height, width, steps, guidance, adapters."""
        s = self.settings
        return s.height, s.width, s.steps, s.guidance_scale, lora_identity(s), s.few_steps


def lora_identity(settings: GenerationSettings) -> tuple[tuple[str, float], ...]:
    """Hash and weight of each LoRA: what they are called and where they lie does not matter."""
    return tuple((lora["sha256"], float(lora["weight"])) for lora in settings.loras)


def picture_key(settings: GenerationSettings) -> str:
    """Identity of a picture: SHA-256 (64 hex digits) of all settings that decide its content."""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _NOT_IN_KEY}
    values["loras"] = lora_identity(settings)
    for name in ("loras", "source", "few_steps"):  # newer than the first keys, which stay as they were
        if not values[name]:
            del values[name]
    values["guidance_scale"] = float(values["guidance_scale"])  # 4 and 4.0 are one setting
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def derived_seed(base: int, prompt: str, occurrence: int) -> int:
    """Seed of a prompt that has none: random-looking, but the same wherever in the list the prompt stands."""
    digest = hashlib.sha256(json.dumps([base, prompt, occurrence]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def expand(entries: Iterable[Entry], defaults: Defaults, base: int, wildcards: Wildcards) -> list[Picture]:
    """Every picture of a list, ``count`` for each entry, with its seed and its resolved prompt.

    Args:
        base: decides the seeds of entries without one, where ``defaults.seed`` is None too.

    Raises:
        PromptError: seeds pass the largest one, or a wildcard cannot be resolved.
    """
    pictures: list[Picture] = []
    seen: Counter[str] = Counter()
    for entry in entries:
        seed = entry.seed if entry.seed is not None else defaults.seed
        if seed is None:
            seed = derived_seed(base, entry.prompt, seen[entry.prompt])
            seen[entry.prompt] += 1
        count = entry.count or defaults.count
        if seed + count - 1 > MAX_SEED:
            raise PromptError(f"line {entry.line}: seed {seed} + count {count} passes {MAX_SEED}")
        for number in range(seed, seed + count):
            pictures.append(_picture(entry, defaults, len(pictures) + 1, number, wildcards))
    return pictures


def _picture(entry: Entry, defaults: Defaults, index: int, seed: int, wildcards: Wildcards) -> Picture:
    prompt = wildcards.resolve(entry.prompt, seed, entry.line)
    prompt, tagged = _without_tags(prompt, entry.line) if wildcards.enabled else (prompt, ())
    negative = defaults.negative if entry.negative is None else entry.negative
    named = entry.steps is not None or entry.guidance is not None or negative != defaults.negative
    few = False if defaults.few_steps is None and named else defaults.few_steps
    return Picture(
        index=index,
        line=entry.line,
        template=entry.prompt,
        prompt=prompt,
        loras=(defaults.loras if entry.loras is None else entry.loras) + tagged,
        negative=negative,
        height=entry.height or defaults.height,
        width=entry.width or defaults.width,
        steps=entry.steps or defaults.steps,
        guidance=defaults.guidance if entry.guidance is None else entry.guidance,
        seed=seed,
        few_steps=few,
    )


def _without_tags(prompt: str, line: int) -> tuple[str, LoraNames]:
    try:
        prompt, loras = take_lora_tags(prompt)
    except PromptError as error:
        raise PromptError(f"line {line}: {error}") from None
    if not prompt:
        raise PromptError(f"line {line} has no prompt beside its LoRAs")
    return prompt, loras


class Wildcards:
    """``{a|b}`` and ``__name__`` in prompts, through the dynamicprompts library.

    Args:
        folder: where ``name.txt`` lies for ``__name__``; None if there are no such files.
        enabled: False takes every prompt as it stands.
    """

    _DYNAMIC = re.compile(r"[{}]|__[\w*][\w*/ -]*__")

    def __init__(self, folder: Path | None = None, enabled: bool = True) -> None:
        self._folder = folder
        self.enabled = enabled

    def resolve(self, template: str, seed: int, line: int) -> str:
        """The prompt that ``template`` becomes for the picture with ``seed``: always the same one.

        Raises:
            PromptError: a syntax error, an unknown wildcard, or the library is missing.
        """
        if not self.enabled or not self._DYNAMIC.search(template):
            return template
        try:
            import logging

            from dynamicprompts.generators import RandomPromptGenerator
            from dynamicprompts.wildcards import WildcardManager
        except ImportError:
            raise PromptError(
                f"line {line}: wildcards need another package: pip install dynamicprompts"
            ) from None
        logging.getLogger("dynamicprompts").setLevel(logging.CRITICAL)
        try:
            generator = RandomPromptGenerator(WildcardManager(self._folder), seed=seed)
            prompt = " ".join(str(generator.generate(template, 1)[0]).split())
        except Exception as error:  # the parser's own types, and whatever a broken wildcard file raises
            raise PromptError(f"line {line}: {template!r} cannot be resolved: {error}") from None
        if unknown := self._DYNAMIC.search(prompt):
            raise PromptError(f"line {line}: no values for {unknown[0]!r}; --wildcards names their folder")
        if not prompt:
            raise PromptError(f"line {line}: {template!r} became an empty prompt")
        return prompt


NAME_FIELDS = ("index", "line", "seed", "prompt", "key", "width", "height", "steps", "guidance", "model")


def check_template(template: str) -> str:
    """``template`` if it makes names inside the output folder.

    Raises:
        ValueError: an unknown field, a broken format, or a way out of the folder.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in fields if name not in NAME_FIELDS]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(NAME_FIELDS)}")
        sample: dict[str, Any] = dict.fromkeys(NAME_FIELDS, 1)
        name = template.format(**{**sample, "prompt": "a", "key": "a", "model": "a"})
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{template!r} makes no file name: {error}") from None
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or not path.name or any(p.startswith(".") for p in path.parts):
        raise ValueError(f"{template!r} must make names inside the output folder, none with a leading dot")
    return template


def file_name(template: str, picture: Picture, settings: GenerationSettings | None, key: str) -> str:
    """The name of a picture without its ending. Before the model is known, ``settings`` is None."""
    return template.format(
        index=picture.index,
        line=picture.line,
        seed=picture.seed,
        prompt=slug(picture.prompt),
        key=key[:8],
        width=settings.width if settings else picture.width or 0,
        height=settings.height if settings else picture.height or 0,
        steps=picture.steps,
        guidance=picture.guidance,
        model=slug(settings.model) if settings else "model",
    )


def slug(text: str, length: int = 60) -> str:
    """``text`` as a part of a file name on every system."""
    return re.sub(r"[^\w]+", "-", text).strip("-_")[:length].strip("-") or "picture"


def make_jobs(
    resolved: Sequence[tuple[Picture, GenerationSettings]], template: str, suffix: str
) -> tuple[list[Job], int]:
    """Jobs with names that no two share, and how many pictures were asked for more than once.

    The same settings twice are one picture. Where a template gives two pictures one name, both get their key
    appended, so a name never depends on what else was drawn before.
    """
    unique: dict[str, tuple[Picture, GenerationSettings]] = {}
    for picture, settings in resolved:
        unique.setdefault(picture_key(settings), (picture, settings))
    names = {key: file_name(template, *item, key) for key, item in unique.items()}
    uses = Counter(name.casefold() for name in names.values())  # some file systems ignore case
    jobs = []
    for key, (picture, settings) in unique.items():
        name = names[key] if uses[names[key].casefold()] == 1 else f"{names[key]}-{key[:16]}"
        jobs.append(Job(picture, settings, key, name + suffix))
    return jobs, len(resolved) - len(jobs)


def share(jobs: Iterable[Job], rank: int, world: int) -> list[Job]:
    """The jobs of one of ``world`` processes, grouped. Depends on the whole list, never on what is done.

    Within a group prompts of about the same length stand together, as a batch is as long as its longest text.
    """

    def order(job: Job) -> tuple[Any, ...]:
        return job.group, len(job.settings.prompt.split()) // 8, job.picture.index

    return sorted(jobs, key=order)[rank::world]
