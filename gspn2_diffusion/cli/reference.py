"""The page ``docs/cli.md``, from the commands themselves: ``python -m gspn2_diffusion.cli.reference``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from gspn2_diffusion.cli import batch, convert, doctor, generate, info, sheet, upscale, verify

COMMANDS: tuple[Callable[..., Any], ...] = (
    generate.generate,
    batch.batch,
    sheet.sheet,
    info.info,
    verify.verify,
    upscale.upscale,
    convert.convert,
    doctor.doctor,
)

_START = """# The command line

<!-- Made by `python -m gspn2_diffusion.cli.reference > docs/cli.md`; a test checks that it is current. -->

`python -m gspn2_diffusion` is the same as `gspn2`; `gspn2 COMMAND --help` says the same in the terminal.
"""

_BATCH = """
### Lists of prompts

Text, one prompt a line; empty lines and lines starting with `#` are left out:

```text
a red apple, flat style
a {blue|green} rocket, 3d style --w 256 --h 256 --s 30 --l 5 --d 7 --n stars
a __animal__ face, noto style --count 8
```

| in text (kohya) | in text (long), JSON lines and CSV |
|---|---|
| `--n` | `negative`, `negative_prompt` |
| `--w`, `--h` | `width`, `height` |
| `--s` | `steps`, `num_inference_steps` |
| `--l` | `guidance`, `guidance_scale`, `cfg`, `cfg_scale` |
| `--d` | `seed` |
| `--lora` | `lora`: `ink:0.8, clay`; in JSON also a list or `{"ink": 0.8}`; `none` for none |
| | `count`, `n_iter`, `num_images_per_prompt`, `batch_size` |

JSON lines: `{"prompt": "a red apple", "seed": 7, "width": 256}`. CSV: the first line names the columns, empty
cells mean the default. Wildcards follow [dynamicprompts](https://github.com/adieyal/dynamicprompts); the
picture's seed decides them, and what they became is what is recorded. A LoRA of a line replaces those of
the command line; `<lora:ink:0.8>` in a prompt, as the A1111 web UI writes it, adds one. With `--literal` both
are plain text.

### What is in the folder

Pictures, and `manifest.jsonl` with one line for each: `status` (`done` or `failed`), `key` (hash of all
settings that decide the picture), `index` in the list, all settings as in the picture itself (`prompt`,
`seed`, `model_hash`, ...), `file`, `sha256` and `bytes` of the file, `seconds`, `time`; `template` where
wildcards were resolved; `error` where it failed. If a picture failed first, its last line counts.

A picture is never drawn twice: when the command runs again, those that are recorded and whole are skipped,
also if the list has grown or changed its order. Prompts without a seed keep theirs, because the folder
remembers the random number they come from (`.gspn2-batch.json`).

### Several GPUs

```bash
accelerate launch --multi_gpu -m gspn2_diffusion batch prompts.txt --out pictures
```

Each process takes its share of the list and all write into one manifest; the folder must be one that all
can see. On the CPU pictures are drawn one at a time by default and are bit for bit those of `gspn2 generate`;
drawn together, or on a GPU, they are the same up to rounding.

With `--batch-size auto` a GPU starts with a few pictures at once, measures what one needs, and grows to the
most that fit (at most 2^24 pixels, as more is no faster). Towards the end of a group batches get smaller,
because pictures are encoded and saved beside the drawing of the next ones. Where memory ends, the
batch is halved and drawn again.
"""


def page() -> str:
    """The whole page in Markdown."""
    sections = [_START]
    for command in COMMANDS:
        sections.append("\n".join(_section(command)))
        if command is batch.batch:
            sections.append(_BATCH.strip("\n") + "\n")
    return "\n".join(sections)


def _section(command: Callable[..., Any]) -> Iterator[str]:
    yield f"## gspn2 {command.__name__}\n"
    yield inspect.getdoc(command) or ""
    yield "\n| option | default | |\n|---|---|---|"
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        yield _row(name, hints[name], parameter.default)
    yield ""


def _row(name: str, hint: Any, default: Any) -> str:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{name!r} has no typer annotation")
    info = next(item for item in get_args(hint)[1:] if isinstance(item, typer.models.ParameterInfo))
    if isinstance(info, typer.models.ArgumentInfo):
        shown = info.metavar or name.upper()
    else:
        given = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
        shown = ", ".join(given) or f"--{name.replace('_', '-')}"
    limits = [
        f"{word} {value}" for word, value in (("from", info.min), ("to", info.max)) if value is not None
    ]
    text = (info.help or "") + (f" ({' '.join(limits)})" if limits else "")
    plain = default is None or default is inspect.Parameter.empty or default is False or default == ""
    return f"| `{shown}` | {'' if plain else f'`{default}`'} | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("__", "\\_\\_")


if __name__ == "__main__":
    print(page(), end="")
