"""Lists of prompts: text with flags on each line, JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

FORMATS = ("txt", "jsonl", "csv")
MAX_SEED = 2**63 - 1
MAX_COUNT = 9999


class PromptError(ValueError):
    """A list of prompts that cannot be read; the message names the line and the fault."""


LoraNames = tuple[tuple[str, float], ...]
"""LoRAs as somebody named them, each with its weight."""


@dataclass(frozen=True)
class Entry:
    """One line of a list. None means: as the command line says, or the model's own size.

    ``height`` and ``width`` are pixels; ``count`` pictures use the seeds ``seed``, ``seed + 1``, ...;
    ``line`` is where it stands, from 1; empty ``loras`` mean none at all.
    """

    prompt: str
    negative: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    count: int | None = None
    line: int = 1
    loras: LoraNames | None = None


# What other programs call the same thing: kohya's one-letter flags, the long ones of the A1111 web UI's
# "prompts from file", and the argument names of diffusers.
_ALIASES = {
    "prompt": ("prompt", "p"),
    "negative": ("negative", "negative_prompt", "n"),
    "width": ("width", "w"),
    "height": ("height", "h"),
    "steps": ("steps", "num_inference_steps", "s"),
    "guidance": ("guidance", "guidance_scale", "cfg_scale", "cfg", "l"),
    "seed": ("seed", "d"),
    "count": ("count", "n_iter", "num_images_per_prompt", "batch_size"),
    "loras": ("lora", "loras"),
}
_FIELD_OF = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_LIMITS = {
    "width": (1, 1 << 16),
    "height": (1, 1 << 16),
    "steps": (1, 1000),
    "seed": (0, MAX_SEED),
    "count": (1, MAX_COUNT),
}
_FLAG = re.compile(r"(?:^|(?<=\s))--([A-Za-z]\w*)(?:[ \t=]+|$)")


def parse_prompts(text: str, form: str = "auto") -> list[Entry]:
    """Every prompt of a list.

    Args:
        text: the whole file.
        form: "txt", "jsonl" or "csv"; "auto" is JSON lines if the first line is a JSON object, else text.

    Returns:
        The entries in their order; empty lines and lines starting with ``#`` (text, JSON lines) are left out.

    Raises:
        PromptError: a line with an unknown flag or key, a value out of range, no prompt; or no line at all.
    """
    text = text.removeprefix("\ufeff")
    readers: dict[str, Callable[[str], Iterator[Entry]]] = {
        "txt": _read_text,
        "jsonl": _read_json,
        "csv": _read_csv,
    }
    entries = list(readers[_guess(text) if form == "auto" else form](text))
    if not entries:
        raise PromptError("there is no prompt in it")
    return entries


def _guess(text: str) -> str:
    first = next((line for line in text.splitlines() if line.strip()), "")
    try:
        return "jsonl" if isinstance(json.loads(first), dict) else "txt"
    except ValueError:
        return "txt"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _read_text(text: str) -> Iterator[Entry]:
    for number, line in _lines(text):
        flags = list(_FLAG.finditer(line))
        values = {"prompt": line[: flags[0].start()].strip() if flags else line}
        ends = [*(flag.start() for flag in flags), len(line)][1:]
        for flag, end in zip(flags, ends, strict=True):
            name = _field(flag[1].lower(), f"--{flag[1]}", number)
            values[name] = _unquoted(line[flag.end() : end].strip())
        yield entry_of(values, number)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _read_json(text: str) -> Iterator[Entry]:
    for number, line in _lines(text):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise PromptError(f"line {number} is not JSON: {error}") from None
        data = {"prompt": data} if isinstance(data, str) else data
        if not isinstance(data, dict):
            raise PromptError(f"line {number} holds a {type(data).__name__}; allowed are an object or a text")
        yield entry_of(
            {_field(k, repr(k), number): value for k, value in data.items() if value is not None}, number
        )


def _read_csv(text: str) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = {column: _field(column.strip().lower(), repr(column), 1) for column in rows.fieldnames or ()}
        if "prompt" not in names.values():
            raise PromptError(f"line 1 must name the columns, one of them 'prompt'; got {list(names)}")
        for row in rows:
            if None in row:
                raise PromptError(f"line {rows.line_num} has more cells than line 1 has names")
            cells = {names[column]: value.strip() for column, value in row.items() if value and value.strip()}
            if cells:
                yield entry_of(cells, rows.line_num)
    except csv.Error as error:
        raise PromptError(f"line {rows.line_num} is not CSV: {error}") from None


def _field(alias: str, shown: str, line: int) -> str:
    if alias not in _FIELD_OF:
        known = ", ".join(sorted(_FIELD_OF))
        raise PromptError(f"line {line}: {shown} is unknown; known are {known}")
    return _FIELD_OF[alias]


def entry_of(values: dict[str, Any], line: int) -> Entry:
    """Checked values as an :class:`Entry`.

    Raises:
        PromptError: a value of the wrong type or out of range, or an empty prompt.
    """
    prompt = values.get("prompt", "")
    for name in ("prompt", "negative"):
        if not isinstance(values.get(name, ""), str):
            raise PromptError(f"line {line}: {name} must be a text, got {values[name]!r}")
    if not prompt.strip():
        raise PromptError(f"line {line} has no prompt")
    entry = Entry(prompt.strip(), values.get("negative"), line=line)
    numbers: dict[str, Any] = {n: _integer(n, values[n], line) for n in _LIMITS if n in values}
    if "guidance" in values:
        numbers["guidance"] = _guidance(values["guidance"], line)
    if "loras" in values:
        numbers["loras"] = _loras(values["loras"], line)
    return replace(entry, **numbers)


_LORA_TAG = re.compile(r"\s*<lora:([^<>]*)>")


def parse_lora(text: str) -> tuple[str, float]:
    """``name`` or ``name:0.8``.

    Raises:
        PromptError: no name, or a weight that is no finite number.
    """
    name, colon, weight = text.strip().rpartition(":")
    if colon and not weight.strip()[:1].isalpha() and not weight.startswith(("\\", "/")):
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
    else:
        name, number = text.strip(), 1.0
    if not name.strip() or not math.isfinite(number):
        raise PromptError(f"a LoRA must be NAME or NAME:WEIGHT, got {text!r}")
    return name.strip(), number


def take_lora_tags(prompt: str) -> tuple[str, LoraNames]:
    """``a cat <lora:ink:0.8>``, as the A1111 web UI writes it, to the bare prompt and its LoRAs.

    Raises:
        PromptError: as :func:`parse_lora`.
    """
    found = tuple(parse_lora(tag) for tag in _LORA_TAG.findall(prompt))
    return (_LORA_TAG.sub("", prompt).strip(), found) if found else (prompt, ())


def _loras(value: Any, line: int) -> LoraNames:
    """A text with commas between LoRAs ("none" and "" are none), a list of texts, or names with weights."""
    try:
        if isinstance(value, str):
            none = value.strip().lower() in ("", "none")
            return () if none else tuple(parse_lora(part) for part in value.split(","))
        if isinstance(value, dict) and all(type(weight) in (int, float) for weight in value.values()):
            value = [f"{name}:{weight}" for name, weight in value.items()]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(parse_lora(item) for item in value)
    except PromptError as error:
        raise PromptError(f"line {line}: {error}") from None
    raise PromptError(f"line {line}: lora must be a text or a list of texts, got {value!r}")


def _integer(name: str, value: Any, line: int) -> int:
    low, high = _LIMITS[name]
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise PromptError(f"line {line}: {name} must be a whole number from {low} to {high}, got {value!r}")
    return number


def _guidance(value: Any, line: int) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise PromptError(f"line {line}: guidance must be a number from 0, got {value!r}")
    return number
