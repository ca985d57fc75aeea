"""A visitor of the page in a real browser: clicks and types as a person does, and waits for what is seen."""

from __future__ import annotations

import importlib
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from gspn2_diffusion.png_metadata import GenerationSettings, read_settings

PATIENCE = 300  # seconds; machines that run tests are slow, and busy with other tests
SCREENSHOTS = os.environ.get("GSPN2_SCREENSHOTS")
# "4" makes the browser's processor four times slower: what breaks then was a matter of luck before.
SLOWDOWN = float(os.environ.get("GSPN2_BROWSER_SLOWDOWN", "1"))
THUMBNAILS = "#g2-gallery .thumbnail-lg"


def expect(locator: Any) -> Any:
    """Playwright's ``expect``, imported late: not every machine has it."""
    sync_api = importlib.import_module("playwright.sync_api")
    sync_api.expect.set_options(timeout=1000 * PATIENCE)
    return sync_api.expect(locator)


class Visitor:
    """One browser window on the page; remembers errors and requests to other hosts."""

    def __init__(self, browser: Any, server: Any, **context: Any) -> None:
        self.problems: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._note_foreign)
        if SLOWDOWN > 1:
            session = self.context.new_cdp_session(self.page)
            session.send("Emulation.setCPUThrottlingRate", {"rate": SLOWDOWN})
        self.page.goto(server.blocks.local_url)
        expect(self.page.locator("#g2-generate")).to_be_visible()

    def _note_foreign(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.problems.append(f"went to {request.url}")

    # Filling in

    def type(self, field: str, text: str) -> None:
        """Types into a field and sees that the text stays.

        The click is no ornament. When an accordion is opened for the first time, Gradio mounts what is in it,
        and one frame later, before anything of it is painted, sets all values anew: ``fill`` alone can come
        in between. A click waits until the field has stood still for two frames and nothing covers it.
        """
        found = self.page.locator(field)
        found.click()
        found.fill(text)
        found.press("Tab")
        expect(found).to_have_value(text)

    def set_number(self, control: str, value: float) -> None:
        self.type(f"{control} input[type=number]", str(value))

    def write(self, prompt: str, steps: int = 3, side: int = 32) -> None:
        self.type("#g2-prompt textarea", prompt)
        self.open("More settings")
        numbers = {"#g2-steps": steps, "#g2-width": side, "#g2-height": side}
        for control, value in numbers.items():
            self.set_number(control, value)
        for control, value in numbers.items():  # none has gone back meanwhile
            expect(self.page.locator(f"{control} input[type=number]")).to_have_value(str(value))

    def open(self, title: str) -> None:
        """Opens an accordion."""
        button = self.page.locator("button.label-wrap", has_text=title)
        if "open" not in (button.get_attribute("class") or "").split():
            button.click()
        expect(button).to_have_class(re.compile(r"\bopen\b"))

    def drop(self, control: str, file: Path) -> None:
        """Gives a file to an upload field, once it is there and painted."""
        self.page.locator(control).hover()  # waits as a click does
        self.page.set_input_files(f"{control} input[type=file]", file)

    # Drawing and looking

    def generate(self, button: str = "#g2-generate") -> None:
        """Clicks, and waits until there is one picture more and the page says that it is done."""
        before = self.page.locator(THUMBNAILS).count()
        self.page.click(button)
        self.expect_pictures(before + 1)
        self.expect_status("Done")

    def choose(self, index: int = 0, shown: str = "") -> int:
        """Clicks a picture of the gallery (0 is the newest) and waits until its settings are shown.

        Args:
            shown: what these settings have to tell, where the seed does not say which picture it is.

        Returns:
            Its seed.
        """
        thumbnail = self.page.locator(THUMBNAILS).nth(index)
        caption = re.search(r"seed (\d+)", thumbnail.inner_text())
        assert caption is not None
        thumbnail.click()
        for text in (caption[1], shown):
            expect(self.page.locator("#g2-details")).to_contain_text(text)
        return int(caption[1])

    def saved(self, folder: Path, shown: str = "") -> GenerationSettings:
        """Chooses the newest picture and reads what its download says."""
        seed = self.choose(0, shown)
        with self.page.expect_download() as download:
            self.page.click("#g2-download")
        download.value.save_as(folder / "saved.png")
        settings = read_settings(folder / "saved.png")
        assert settings.seed == seed
        return settings

    def expect_status(self, text: str | re.Pattern[str]) -> None:
        expect(self.page.locator("#g2-status")).to_contain_text(text)

    def expect_pictures(self, count: int) -> None:
        expect(self.page.locator(THUMBNAILS)).to_have_count(count)

    def expect_loaded(self, picture: Any) -> None:
        """Waits until an ``<img>`` has its pixels, and with them its size on the page."""
        expect(picture).to_be_visible()
        self.until(lambda: picture.evaluate("image => image.complete && image.naturalWidth > 0"))

    def sees(self, element: Any, is_it: Callable[[int, int, int], bool]) -> bool:
        """Whether some pixels of ``element`` on the screen are of a colour (red, green, blue)."""
        with Image.open(io.BytesIO(element.screenshot())) as seen:
            colours = seen.convert("RGB").getcolors(seen.width * seen.height)
        return sum(count for count, colour in colours or [] if is_it(*colour)) >= 20

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what Playwright's ``expect`` has no words for."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            self.page.wait_for_timeout(50)

    def shot(self, name: str) -> None:
        """Keeps a picture of the page in the folder that GSPN2_SCREENSHOTS names."""
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(SCREENSHOTS, f"{name}.png"), full_page=True)
