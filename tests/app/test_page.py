"""The real page in headless Chromium, with a tiny model: what a visitor does, also on a phone."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gspn2_diffusion.png_metadata import GenerationSettings, read_settings

# Where a browser must be there, as in CI, its absence is a failure and not a skip.
REQUIRED = os.environ.get("GSPN2_REQUIRE_BROWSER", "") not in ("", "0")
if not REQUIRED:
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    pytest.importorskip("gradio", reason='needs gradio: pip install "gspn2-diffusion[app]"')
sync_api = importlib.import_module("playwright.sync_api")
sync_api.expect.set_options(timeout=60_000)  # machines that run tests are slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="needs Chromium: apt-get install chromium"),
]
SCREENSHOTS = os.environ.get("GSPN2_SCREENSHOTS")
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
        # Without one of the system's, Playwright looks for its own, and says so if there is none.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def shot(page: Any, name: str) -> None:
    """Keeps a picture of the page in the folder that GSPN2_SCREENSHOTS names."""
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SCREENSHOTS, f"{name}.png"), full_page=True)


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

    def saved(self, folder: Path, shown: str = "") -> GenerationSettings:
        """Clicks the newest picture, waits for ``shown`` and reads what its download says."""
        newest = self.page.locator(THUMBNAILS).first
        caption = re.search(r"seed (\d+)", newest.inner_text())
        newest.click()
        assert caption is not None
        sync_api.expect(self.page.locator("#g2-details")).to_contain_text(caption[1])
        sync_api.expect(self.page.locator("#g2-details")).to_contain_text(shown)
        with self.page.expect_download() as download:
            self.page.click("#g2-download")
        download.value.save_as(folder / "saved.png")
        return read_settings(folder / "saved.png")

    def open(self, title: str) -> None:
        button = self.page.locator("button.label-wrap", has_text=title)
        if "open" not in (button.get_attribute("class") or "").split():
            button.click()

    def set_number(self, control: str, value: float) -> None:
        field = self.page.locator(f"{control} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def expect_status(self, text: str) -> None:
        sync_api.expect(self.page.locator("#g2-status")).to_contain_text(text)

    def expect_pictures(self, count: int) -> None:
        sync_api.expect(self.page.locator(THUMBNAILS)).to_have_count(count)


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
    shot(page, "drawn")


def test_escape_stops_half_way_and_the_page_goes_on(visitor: Visitor, server: Any) -> None:
    page = visitor.page
    visitor.write("a blue rocket", steps=400)
    visitor.set_number("#g2-width", 128)
    visitor.set_number("#g2-height", 128)
    page.click("#g2-generate")
    sync_api.expect(page.locator("#g2-status")).to_contain_text(re.compile(r"\d+/400, .* left"))
    assert page.locator("#g2-stage img").count() == 1  # the preview
    shot(page, "drawing")
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


def test_from_a_dropped_picture_and_a_part_of_one(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    photo = Image.radial_gradient("L").resize((96, 48)).convert("RGB")
    photo.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    visitor.write("a red apple")
    visitor.open("Start from a picture")
    page.set_input_files("#g2-source input[type=file]", tmp_path / "text.png")
    sync_api.expect(page.locator(".toast-body.warning")).to_contain_text("not a PNG, JPEG or WebP")
    sync_api.expect(page.locator("#g2-source img")).to_have_count(0)  # taken out again
    page.set_input_files("#g2-source input[type=file]", tmp_path / "photo.jpg")
    sync_api.expect(page.locator("#g2-masked")).to_be_visible()
    sync_api.expect(page.locator("#g2-width input[type=number]")).to_have_value("16")  # as large as it fits
    visitor.set_number("#g2-width", 32)
    visitor.set_number("#g2-strength", 0.3)
    page.click("#g2-generate")
    visitor.expect_status("Done")
    settings = visitor.saved(tmp_path)
    assert (settings.width, settings.height) == (32, 16)
    assert (settings.source["task"], settings.source["strength"]) == ("img2img", 0.3)

    page.locator("#g2-masked input").check()
    canvas = page.locator("#g2-mask canvas").first
    sync_api.expect(canvas).to_be_visible()
    page.wait_for_timeout(1500)  # the editor fits the picture into its canvas
    page.click("#g2-generate")
    sync_api.expect(page.locator(".toast-body.error")).to_contain_text("Nothing is painted")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 25, y + 4, steps=4)
    page.mouse.up()
    page.click("#g2-generate")
    visitor.expect_pictures(2)
    visitor.expect_status("Done")
    assert visitor.saved(tmp_path).source["task"] == "inpaint"
    shot(page, "inpaint")


def test_enlarged_pictures(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.write("a red apple")
    page.click("#g2-generate")
    visitor.expect_status("Done")
    page.locator(THUMBNAILS).first.click()
    page.click("#g2-enlarge")
    visitor.expect_pictures(2)
    visitor.expect_status("Done")
    settings = visitor.saved(tmp_path, "64 x 64")
    assert (settings.width, settings.height, settings.source["task"]) == (64, 64, "enlarge")


def test_propagation_panel_and_comparison(visitor: Visitor) -> None:
    page = visitor.page
    visitor.write("a red apple", steps=4)
    for count in (1, 2):
        page.click("#g2-generate")
        visitor.expect_pictures(count)
        visitor.expect_status("Done")
    for index in (0, 1):
        page.locator(THUMBNAILS).nth(index).click()
        sync_api.expect(page.locator("#g2-details")).to_contain_text("a red apple")
        page.wait_for_timeout(300)
    visitor.open("What GSPN-2 does here")
    picture = page.locator("#g2-map img")
    sync_api.expect(picture).to_be_visible()
    before = picture.get_attribute("src")
    box = picture.bounding_box()
    assert box is not None
    picture.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.1})
    sync_api.expect(page.locator("#g2-reach")).to_contain_text(
        re.compile(r"call 2 of 4: .* travels \d+ pixels")
    )
    visitor.expect_status("Done")
    sync_api.expect(picture).not_to_have_attribute("src", before or "")
    told = page.locator("#g2-reach").inner_text()
    right, left = (int(re.findall(rf"{name} (\d+)", told)[0]) for name in ("right", "left"))
    assert right < left  # the point is near the right edge
    page.wait_for_timeout(1000)  # until the page has taken the last answer in
    visitor.set_number("#g2-layer", 1)
    sync_api.expect(page.locator("#g2-reach")).to_contain_text("Layer 1")
    page.locator("#g2-direction label", has_text="left").click()
    page.wait_for_timeout(500)
    shot(page, "propagation")
    visitor.open("Compare the last two")
    sync_api.expect(page.locator("#g2-differences")).to_contain_text("Seed")
    shot(page, "compare")


def test_models_to_choose_from(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.write("a red apple")
    page.locator("#g2-model input").click()
    page.get_by_role("option", name="other").click()
    page.click("#g2-generate")
    visitor.expect_status("Done")
    assert visitor.saved(tmp_path).model == "other"
    sync_api.expect(page.locator(".g2-head")).to_contain_text("other")


def test_others_are_told_how_many_come_before_them(browser: Any, server: Any) -> None:
    first, second = Visitor(browser, server), Visitor(browser, server)
    first.write("a red apple", steps=400)
    for name in ("width", "height"):
        first.set_number(f"#g2-{name}", 128)
    second.write("a blue rocket")
    first.page.click("#g2-generate")
    first.expect_status("/400")
    second.page.click("#g2-generate")
    second.expect_status("1 before you in the queue")
    first.page.click("#g2-stop")
    first.expect_status("Stopped")
    second.expect_status("Done")
    for visitor in (first, second):
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
    shot(page, f"phone-{scheme}")
    visitor.context.close()
