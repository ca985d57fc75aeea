"""The real page in headless Chromium, with a tiny model: what a visitor does, also on a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspn2_diffusion.png_metadata import read_settings

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytest.importorskip("gradio", reason='needs gradio: pip install "gspn2-diffusion[app]"')
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
THUMBNAILS = "#g2-gallery .thumbnail-lg"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visitor:
    """One browser window on the page; remembers errors and requests to other hosts."""

    def __init__(self, browser: Any, server: Any, **context: Any) -> None:
        self.problems: list[str] = []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._note_foreign)
        self.page.goto(server.blocks.local_url)
        self.page.wait_for_selector("#g2-generate")

    def _note_foreign(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.problems.append(f"went to {request.url}")

    def write(self, prompt: str, steps: int = 3) -> None:
        self.page.fill("#g2-prompt textarea", prompt)
        self.set_number("#g2-width", 32)
        self.set_number("#g2-height", 32)
        self.open("More settings")
        self.set_number("#g2-steps", steps)

    def open(self, title: str) -> None:
        button = self.page.locator("button.label-wrap", has_text=title)
        if "open" not in (button.get_attribute("class") or "").split():
            button.click()

    def set_number(self, control: str, value: int) -> None:
        field = self.page.locator(f"{control} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def expect_status(self, text: str) -> None:
        sync_api.expect(self.page.locator("#g2-status")).to_contain_text(text, timeout=60_000)

    def expect_pictures(self, count: int) -> None:
        sync_api.expect(self.page.locator(THUMBNAILS)).to_have_count(count, timeout=60_000)


@pytest.fixture
def visitor(browser: Any, server: Any) -> Iterator[Visitor]:
    visitor = Visitor(browser, server)
    yield visitor
    visitor.context.close()
    assert visitor.problems == []


def test_draw_reuse_download_and_drop(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.write("a red apple")
    page.locator("#g2-prompt textarea").press("Control+Enter")
    visitor.expect_status("Done")
    visitor.expect_pictures(1)
    page.locator(THUMBNAILS).first.click()
    sync_api.expect(page.locator("#g2-details")).to_contain_text("a red apple")
    with page.expect_download() as download:
        page.click("#g2-download")
    file = tmp_path / "picture.png"
    download.value.save_as(file)
    settings = read_settings(file)
    assert (settings.prompt, settings.steps, settings.width) == ("a red apple", 3, 32)

    page.reload()
    page.wait_for_selector("#g2-generate")
    visitor.open("Settings from a picture")
    page.set_input_files("#g2-drop input[type=file]", file)
    visitor.expect_status("Settings taken over")
    sync_api.expect(page.locator("#g2-prompt textarea")).to_have_value("a red apple")
    visitor.open("More settings")
    sync_api.expect(page.locator("#g2-seed input")).to_have_value(str(settings.seed))
    sync_api.expect(page.locator("#g2-random input")).not_to_be_checked()
    page.click("#g2-generate")
    visitor.expect_status("Done")
    page.locator(THUMBNAILS).first.click()
    sync_api.expect(page.locator("#g2-details")).to_contain_text(str(settings.seed))


def test_escape_stops_half_way_and_the_page_goes_on(visitor: Visitor, server: Any) -> None:
    page = visitor.page
    visitor.write("a blue rocket", steps=400)
    visitor.set_number("#g2-width", 128)
    visitor.set_number("#g2-height", 128)
    page.click("#g2-generate")
    sync_api.expect(page.locator("#g2-status")).to_contain_text(re.compile(r"\d+/400, .* left"))
    assert page.locator("#g2-stage img").count() == 1  # the preview
    page.keyboard.press("Escape")
    visitor.expect_status("Stopped")
    visitor.expect_pictures(0)
    assert len(server.app.engine.line) == 0
    visitor.write("a red apple")
    page.click("#g2-generate")
    visitor.expect_status("Done")
    visitor.expect_pictures(1)


def test_closing_the_page_frees_the_model(browser: Any, server: Any) -> None:
    leaving = Visitor(browser, server)
    leaving.write("a red apple", steps=400)
    leaving.set_number("#g2-width", 128)
    leaving.set_number("#g2-height", 128)
    leaving.page.click("#g2-generate")
    sync_api.expect(leaving.page.locator("#g2-status")).to_contain_text("/400")
    leaving.context.close()
    waiting = Visitor(browser, server)
    waiting.write("a blue rocket")
    waiting.page.click("#g2-generate")
    waiting.expect_status("Done")
    waiting.context.close()


def test_two_visitors_at_once_see_only_their_own(browser: Any, server: Any) -> None:
    visitors = [Visitor(browser, server) for _ in range(2)]
    for visitor, prompt in zip(visitors, ("a red apple", "a blue rocket"), strict=True):
        visitor.write(prompt, steps=20)
        visitor.page.click("#g2-generate")
    for visitor, prompt in zip(visitors, ("a red apple", "a blue rocket"), strict=True):
        visitor.expect_status("Done")
        visitor.expect_pictures(1)
        visitor.page.locator(THUMBNAILS).first.click()
        sync_api.expect(visitor.page.locator("#g2-details")).to_contain_text(prompt)
        assert visitor.problems == []
        visitor.context.close()


def test_errors_are_sentences(visitor: Visitor) -> None:
    visitor.page.click("#g2-generate")
    sync_api.expect(visitor.page.locator(".toast-body")).to_contain_text("The prompt is empty")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser: Any, server: Any, scheme: str) -> None:
    visitor = Visitor(browser, server, is_mobile=True, has_touch=True, color_scheme=scheme)
    page = visitor.page
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#g2-generate").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 844  # in reach without scrolling
    page.fill("#g2-prompt textarea", "a red apple")
    page.locator("#g2-generate").tap()
    visitor.expect_status("Done")
    visitor.expect_pictures(1)
    sync_api.expect(page.locator("#g2-stage img")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 60)")
    assert dark == (scheme == "dark")
    visitor.context.close()
