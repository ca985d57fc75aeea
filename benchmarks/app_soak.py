"""Random clicking on the web page by several visitors at once.

Starts the server as a program, drives it in headless Chromium through Playwright, reads the server's memory
and log meanwhile, and writes benchmarks/results/app_soak-<device>.json. A run is clean if the server lives
and nothing was thrown in its log (what browsers threw is listed); memory is flat if the median of the run's
last fifth is about that of its second fifth.

    python benchmarks/app_soak.py --minutes 10 --clients 4
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
PROMPTS = ("a penguin", "a rocket", "a red apple", "an owl", "", "x" * 900, "äöü 🍎 <b>bold</b>")
FLAT_SHARE, FLAT_BYTES = 0.05, 40e6
"""Memory is flat if it grew by less than this share, or by less than so many bytes."""


class Visitor:
    """One browser window whose owner clicks on whatever is there."""

    def __init__(self, browser: Any, url: str, files: list[Path], seed: int) -> None:
        self.browser, self.url, self.files = browser, url, files
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.problems: list[str] = []
        self.page: Any = None

    async def arrive(self) -> None:
        """A new window; the old one is closed in the middle of whatever it did."""
        if self.page is not None:
            await self.page.context.close()
        size = self.random.choice([(1280, 900), (390, 844)])
        scheme = self.random.choice(["light", "dark"])
        context = await self.browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        self.page = await context.new_page()
        self.page.set_default_timeout(8000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)[:300]))
        await self.page.goto(self.url, timeout=60_000)
        await self.page.wait_for_selector("#g2-generate", timeout=60_000)
        await self.page.evaluate(
            "document.querySelectorAll('button.label-wrap:not(.open)').forEach((b) => b.click())"
        )
        await self.small()

    async def small(self) -> None:
        """Little work, so that much happens."""
        for control, value in (("width", 64), ("height", 64), ("steps", self.random.randint(1, 5))):
            await self.number(f"#g2-{control}", value)

    async def number(self, control: str, value: float) -> None:
        field = self.page.locator(f"{control} input[type=number]")
        await field.fill(str(value))
        await field.press("Tab")

    async def stay(self, until: float) -> None:
        """Clicks until a time of ``time.monotonic()``."""
        actions = {name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name[:3] == "do_"}
        weights = [
            {"generate": 8, "point": 4, "leave": 0.4, "thumbnail": 2, "reload": 0.4, "size": 0.5}.get(
                name, 1.0
            )
            for name in actions
        ]
        while time.monotonic() < until:
            (name,) = self.random.choices(list(actions), weights)
            name = name if self.page else "reload"
            try:
                await actions[name]()
                self.done[name] += 1
            except Exception as error:  # mostly: what is to be clicked is not there just now
                if "Timeout" not in type(error).__name__ and type(error).__name__ != "Error":
                    raise
                self.missed[name] += 1
            await asyncio.sleep(self.random.uniform(0.05, 0.8))

    async def any_of(self, selector: str) -> None:
        found = self.page.locator(f"{selector} >> visible=true")
        count = await found.count()
        if count:
            await found.nth(self.random.randrange(count)).click()

    async def do_generate(self) -> None:
        await self.page.fill("#g2-prompt textarea", self.random.choice(PROMPTS))
        if self.random.random() < 0.3:
            await self.page.keyboard.press("Control+Enter")
        else:
            await self.page.click("#g2-generate")

    async def do_stop(self) -> None:
        await self.page.click("#g2-stop")

    async def do_escape(self) -> None:
        await self.page.keyboard.press("Escape")

    async def do_chip(self) -> None:
        await self.any_of("#g2-style label, #g2-background label, #g2-direction label")

    async def do_few_steps(self) -> None:
        await self.any_of("#g2-few-steps input")

    async def do_shape(self) -> None:
        await self.any_of("#g2-aspect label")
        await self.small()

    async def do_size(self) -> None:
        await self.number("#g2-width", self.random.choice([64, 128, 100, 99999, -5]))

    async def do_thumbnail(self) -> None:
        await self.any_of("#g2-gallery .thumbnail-lg")

    async def do_reuse(self) -> None:
        await self.any_of("#g2-reuse")
        await self.small()

    async def do_again(self) -> None:
        await self.any_of("#g2-again")
        await asyncio.sleep(0.5)
        await self.small()

    async def do_source(self) -> None:
        await self.page.set_input_files("#g2-source input[type=file]", self.random.choice(self.files))
        await asyncio.sleep(0.5)
        await self.small()

    async def do_mask(self) -> None:
        await self.any_of("#g2-masked input")

    async def do_paint(self) -> None:
        box = await self.page.locator("#g2-mask canvas").first.bounding_box(timeout=800)
        if box:
            await self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            await self.page.mouse.down()
            await self.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 3, steps=3)
            await self.page.mouse.up()

    async def do_clear(self) -> None:
        await self.any_of("#g2-source button[aria-label='Clear']")

    async def do_enlarge(self) -> None:
        await self.any_of("#g2-enlarge")

    async def do_point(self) -> None:
        await self.any_of("#g2-inside button.label-wrap:not(.open)")
        picture = self.page.locator("#g2-map img")
        box = await picture.bounding_box(timeout=800)
        if box:
            x, y = (self.random.random() * box[side] for side in ("width", "height"))
            await picture.click(position={"x": x, "y": y})

    async def do_layer(self) -> None:
        await self.number("#g2-layer", self.random.randint(1, 10))

    async def do_settings(self) -> None:
        await self.page.set_input_files("#g2-drop input[type=file]", self.random.choice(self.files))

    async def do_example(self) -> None:
        await self.any_of(".gallery-item")

    async def do_anything(self) -> None:
        await self.any_of("button:not(#g2-download):not([role=option])")

    async def do_reload(self) -> None:
        await self.arrive()

    async def do_leave(self) -> None:
        await self.arrive()


def make_files(folder: Path) -> list[Path]:
    """Pictures and what only says that it is one."""
    from PIL import Image

    Image.radial_gradient("L").convert("RGB").save(folder / "good.jpg")
    Image.linear_gradient("L").resize((300, 120)).convert("RGBA").save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    whole = (folder / "wide.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    return sorted(folder.iterdir())


def start_server(options: argparse.Namespace, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The program, and its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", options.device]
    for model in options.model:
        command += ["--model", model]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Ctrl+C ends the server, also where this program was started in the background and ignores it.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment, preexec_fn=heed
    )
    url = f"http://127.0.0.1:{port}/"
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return process, url
        except OSError:
            if process.poll() is not None:
                sys.exit(f"the server ended:\n{log.read_text()}")
            time.sleep(0.5)
    sys.exit("the server does not answer")


async def watch_memory(pid: int, until: float) -> list[tuple[float, int]]:
    """Seconds and resident bytes, every two seconds."""
    import psutil

    process, started, samples = psutil.Process(pid), time.monotonic(), []
    while time.monotonic() < until:
        samples.append((round(time.monotonic() - started, 1), process.memory_info().rss))
        await asyncio.sleep(2)
    return samples


async def soak(options: argparse.Namespace, url: str, pid: int, files: list[Path]) -> dict[str, Any]:
    """All visitors together; what they did, what went wrong and the memory."""
    from playwright.async_api import async_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        until = time.monotonic() + 60 * options.minutes
        visitors = [Visitor(browser, url, files, options.seed + k) for k in range(options.clients)]
        tasks = [visitor.stay(until) for visitor in visitors]
        samples, *_ = await asyncio.gather(watch_memory(pid, until), *tasks)
        version = browser.version
        await browser.close()
    return {
        "chromium": version,
        "actions": dict(sum((visitor.done for visitor in visitors), Counter())),
        "not_there": dict(sum((visitor.missed for visitor in visitors), Counter())),
        "browser_errors": [problem for visitor in visitors for problem in visitor.problems],
        "memory": samples,
    }


def judge_memory(samples: list[tuple[float, int]]) -> dict[str, Any]:
    """Growth from the second fifth of the run to the last."""
    fifth = len(samples) // 5
    early = statistics.median(size for _, size in samples[fifth : 2 * fifth])
    late = statistics.median(size for _, size in samples[-fifth:])
    grown = late - early
    return {
        "early_megabytes": round(early / 1e6, 1),
        "late_megabytes": round(late / 1e6, 1),
        "flat": grown < max(FLAT_SHARE * early, FLAT_BYTES),
    }


def judge_log(text: str) -> dict[str, Any]:
    """What the server wrote that it should not have."""
    lines = [line[:300] for line in text.splitlines() if re.search(r"\bERROR\b|\bCRITICAL\b", line)]
    return {"tracebacks": text.count("Traceback (most recent call last)"), "error_lines": lines[:20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--model", action="append", help="may be given several times; gspn2-emoji by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep-log", type=Path, help="where the server's log goes")
    options = parser.parse_args()
    options.model = options.model or ["gspn2-emoji"]
    with tempfile.TemporaryDirectory(prefix="gspn2-soak-") as folder:
        log = options.keep_log or Path(folder, "server.log")
        Path(folder, "files").mkdir()
        process, url = start_server(options, log)
        try:
            found = asyncio.run(soak(options, url, process.pid, make_files(Path(folder, "files"))))
            alive = process.poll() is None
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        found.update(judge_log(log.read_text(errors="replace")))
    from gspn2_diffusion.environment import describe_environment

    memory = judge_memory(found["memory"])
    clean = alive and not found["tracebacks"] and not found["error_lines"]
    settings = {name: getattr(options, name) for name in ("minutes", "clients", "device", "seed")}
    settings["models"] = [Path(model).name for model in options.model]
    result = {**describe_environment(), "settings": settings, "clean": clean, **memory, **found}
    device = (
        "cpu" if options.device == "cpu" or result["gpu"] == "none" else str(result["gpu"]).replace(" ", "-")
    )
    path = options.out or RESULTS / f"app_soak-{device}.json"
    path.write_text(json.dumps(result) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "memory"}, indent=1))
    sys.exit(0 if clean and memory["flat"] else 1)


if __name__ == "__main__":
    main()
