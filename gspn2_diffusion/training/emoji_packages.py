"""The npm packages that the emoji pictures and their names come from, and how to read them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn2_diffusion.training.emoji_names import NameIndex, plain_hex


@dataclass(frozen=True)
class Package:
    """A pinned npm package; `style` is None for packages of names."""

    name: str
    version: str
    licence: str
    attribution: str
    style: str | None = None

    @property
    def archive(self) -> str:
        """File name that ``npm pack`` gives the package."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


_MICROSOFT = "Fluent Emoji, Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"
_NOTO = "Noto Emoji, Google Inc., https://github.com/googlefonts/noto-emoji"
PACKAGES = (
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        f"{_MICROSOFT} (packed by LobeHub, https://github.com/lobehub/fluent-emoji)",
        "3d",
    ),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", _MICROSOFT, "flat"),
    Package("@iconify-json/noto", "1.2.9", "Apache-2.0", _NOTO, "noto"),
    Package(
        "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", f"{_NOTO} (the first, blob-shaped version)", "blob"
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji",
        "twemoji",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "CC-BY-4.0",
        "EmojiTwo / Emoji One, https://github.com/EmojiTwo/emojitwo",
        "emojione",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "Apache-2.0",
        "FxEmojis, Mozilla, https://github.com/mozilla/fxemoji",
        "firefox-os",
    ),
    Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "CC-BY-4.0",
        "Streamline Emojis, Streamline, https://github.com/webalys-hq/streamline-vectors",
        "streamline",
    ),
    Package("emojibase-data", "17.0.0", "MIT", "Emojibase, Miles Johnson, https://emojibase.dev"),
    Package("emojilib", "4.0.3", "MIT", "Emojilib, Mu-An Chiou, https://github.com/muan/emojilib"),
)


class PackageError(RuntimeError):
    """A package cannot be obtained or does not look as expected."""


@dataclass(frozen=True)
class Picture:
    """One picture of a package: its own name, the code points it means, and the file's content."""

    slug: str
    hexcode: str
    suffix: str
    content: bytes


def obtain(package: Package, folder: Path) -> Path:
    """Path of the package's archive in `folder`, fetched with ``npm pack`` unless it is there already.

    Raises:
        PackageError: npm is missing or fails.
    """
    target = folder / package.archive
    if target.is_file():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(f"npm is not installed; it is needed to fetch {package.name}@{package.version}")
    command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not target.is_file():
        raise PackageError(
            f"`npm pack {package.name}@{package.version}` failed: {done.stderr.strip()[-500:]}"
        )
    return target


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack into `folder` and return the package's root; links and paths that lead outside are refused.

    Raises:
        PackageError: the archive is damaged or unsafe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PackageError(f"cannot unpack {archive}: {error}") from error
    return folder / "package"


def read_json(path: Path) -> Any:
    """Content of a JSON file of a package.

    Raises:
        PackageError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"cannot read {path}: {error}") from error


def iconify_names(root: Path) -> list[tuple[str, str]]:
    """(slug, hex code) pairs of a set that ships ``chars.json``, its icon aliases included."""
    chars = read_json(root / "chars.json")
    if not chars:
        return []
    by_slug = {slug: code for code, slug in chars.items()}
    aliases = read_json(root / "icons.json").get("aliases", {})
    more = [(slug, by_slug[entry["parent"]]) for slug, entry in aliases.items() if entry["parent"] in by_slug]
    return [*by_slug.items(), *more]


def bitmap_pictures(root: Path) -> Iterator[Picture]:
    """Pictures of a package of ``assets/<hex>.webp`` files."""
    for path in sorted((root / "assets").glob("*.webp")):
        yield Picture(path.stem, plain_hex(path.stem), "webp", path.read_bytes())


def iconify_pictures(
    root: Path, index: NameIndex, joins: Mapping[str, str] | None = None
) -> Iterator[Picture]:
    """Pictures of an icon set, joined by its own code points or else by name; others are left out.

    `joins` (file name -> code points) goes before names.
    """
    joins = joins or {}
    icons = read_json(root / "icons.json")
    own: dict[str, list[str]] = {}
    for code, slug in read_json(root / "chars.json").items():
        own.setdefault(slug, []).append(plain_hex(code))
    for slug in sorted({*icons["icons"], *own}):
        codes = own.get(slug, []) if own else [joins.get(slug) or index.find(slug)]
        svg = iconify_svg(icons, slug)
        for code in dict.fromkeys(code for code in codes if code):
            if svg is not None:
                yield Picture(slug, code, "svg", svg.encode())


def iconify_svg(icons: dict[str, Any], slug: str) -> str | None:
    """A whole SVG document for an icon (or a flipped alias of one); None when there is none to draw."""
    alias = icons.get("aliases", {}).get(slug, {})
    icon = icons["icons"].get(alias.get("parent", slug))
    if icon is None or icon.get("hidden"):
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if alias.get("vFlip"):
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )
