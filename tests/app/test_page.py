"""The real page in headless Chromium, with a tiny model: what a visitor does, also on a phone."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from visitor import THUMBNAILS, Visitor, expect

# Where a browser must be there, as in CI, its absence is a failure and not a skip.
REQUIRED = os.environ.get("GSPN2_REQUIRE_BROWSER", "") not in ("", "0")
if not REQUIRED:
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    pytest.importorskip("gradio", reason='needs gradio: pip install "gspn2-diffusion[app]"')
sync_api = importlib.import_module("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="needs Chromium: apt-get install chromium"),
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Without one of the system's, Playwright looks for its own, and says so if there is none.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def arrive(browser: Any, server: Any) -> Iterator[Callable[..., Visitor]]:
    """Opens windows on the page, each of a visitor of its own; all leave at the end."""
    visitors: list[Visitor] = []

    def arrive(**context: Any) -> Visitor:
        visitors.append(Visitor(browser, server, **context))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
    assert [problem for visitor in visitors for problem in visitor.problems] == []


@pytest.fixture
def visitor(arrive: Callable[..., Visitor]) -> Visitor:
    return arrive()


@pytest.fixture
def endless(server: Any) -> int:
    """Steps that take minutes: what draws so many does not end by itself while a test looks at it."""
    return server.app.limits.steps


def test_draw_reuse_download_and_drop(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.write("a red apple")
    page.locator("#g2-prompt textarea").press("Control+Enter")
    visitor.expect_pictures(1)
    visitor.expect_status("Done")
    settings = visitor.saved(tmp_path, "a red apple")
    assert (settings.prompt, settings.steps, settings.width) == ("a red apple", 3, 32)

    page.reload()
    expect(page.locator("#g2-generate")).to_be_visible()
    visitor.open("Settings from a picture")
    visitor.drop("#g2-drop", tmp_path / "saved.png")
    visitor.expect_status("Settings taken over")
    expect(page.locator("#g2-prompt textarea")).to_have_value("a red apple")
    visitor.open("More settings")
    expect(page.locator("#g2-seed input")).to_have_value(str(settings.seed))
    expect(page.locator("#g2-random input")).not_to_be_checked()
    visitor.generate()
    assert visitor.choose() == settings.seed
    visitor.shot("drawn")


def test_escape_stops_half_way_and_the_page_goes_on(visitor: Visitor, server: Any, endless: int) -> None:
    page = visitor.page
    visitor.write("a blue rocket", steps=endless, side=128)
    page.click("#g2-generate")
    page.click("#g2-generate")  # does nothing while it draws
    visitor.expect_status(re.compile(rf"\d+/{endless}, .* left"))
    expect(page.locator("#g2-stage img")).to_have_count(1)  # the preview
    visitor.shot("drawing")
    page.keyboard.press("Escape")
    visitor.expect_status("Stopped")
    visitor.expect_pictures(0)
    assert len(server.app.engine.line) == 0
    page.click("#g2-stop")
    visitor.expect_status("Nothing is running")
    visitor.write("a red apple")
    visitor.generate()
    visitor.expect_pictures(1)


def test_closing_the_page_frees_the_model(arrive: Callable[..., Visitor], endless: int) -> None:
    leaving = arrive()
    leaving.write("a red apple", steps=endless, side=128)
    leaving.page.click("#g2-generate")
    leaving.expect_status(f"/{endless}")
    leaving.context.close()
    waiting = arrive()
    waiting.write("a blue rocket")
    waiting.generate()


def test_two_visitors_at_once_see_only_their_own(arrive: Callable[..., Visitor]) -> None:
    visitors = {prompt: arrive() for prompt in ("a red apple", "a blue rocket")}
    for prompt, visitor in visitors.items():
        visitor.write(prompt, steps=20)
    for visitor in visitors.values():
        visitor.page.click("#g2-generate")
    for prompt, visitor in visitors.items():
        visitor.expect_pictures(1)
        visitor.expect_status("Done")
        visitor.choose(0, prompt)


def test_from_a_dropped_picture_and_a_part_of_one(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    photo = Image.radial_gradient("L").resize((96, 48)).convert("RGB")
    photo.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    visitor.write("a red apple")
    visitor.open("Start from a picture")
    visitor.drop("#g2-source", tmp_path / "text.png")
    expect(page.locator(".toast-body.warning")).to_contain_text("not a PNG, JPEG or WebP")
    expect(page.locator("#g2-source img")).to_have_count(0)  # taken out again
    visitor.drop("#g2-source", tmp_path / "photo.jpg")
    expect(page.locator("#g2-masked")).to_be_visible()
    expect(page.locator("#g2-width input[type=number]")).to_have_value("16")  # as large as it fits
    visitor.set_number("#g2-width", 32)
    visitor.set_number("#g2-strength", 0.3)
    visitor.generate()
    settings = visitor.saved(tmp_path)
    assert (settings.width, settings.height) == (32, 16)
    assert (settings.source["task"], settings.source["strength"]) == ("img2img", 0.3)

    page.locator("#g2-masked input").check()
    canvas = page.locator("#g2-mask canvas").first
    expect(canvas).to_be_visible()
    expect(page.locator("#g2-mask [aria-label=Undo]")).to_be_enabled()  # the picture is in the editor
    page.click("#g2-generate")
    expect(page.locator(".toast-body.error")).to_contain_text("Nothing is painted")
    canvas.hover()  # scrolls to it, and waits until it stands still
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 25, y + 4, steps=4)
    page.mouse.up()
    visitor.until(lambda: visitor.sees(canvas, lambda red, green, blue: red > green + 80))  # the stroke
    visitor.generate()
    assert visitor.saved(tmp_path).source["task"] == "inpaint"
    visitor.shot("inpaint")


def test_enlarged_pictures(visitor: Visitor, tmp_path: Path) -> None:
    visitor.write("a red apple")
    visitor.generate()
    visitor.choose()
    visitor.generate("#g2-enlarge")
    settings = visitor.saved(tmp_path, "64 x 64")
    assert (settings.width, settings.height, settings.source["task"]) == (64, 64, "enlarge")


def test_enlarging_while_drawing_loses_no_picture(visitor: Visitor) -> None:
    page = visitor.page
    visitor.write("a red apple")
    visitor.generate()
    visitor.choose()
    visitor.write("a blue rocket", steps=40)
    page.click("#g2-generate")
    page.click("#g2-enlarge")  # both wait or are drawn now
    visitor.expect_pictures(3)
    for told in ("3 steps · 32x32", "40 steps · 32x32", "64x64"):
        expect(page.locator(THUMBNAILS).filter(has_text=told)).to_have_count(1)


def test_propagation_panel_and_comparison(visitor: Visitor) -> None:
    page = visitor.page
    visitor.write("a red apple", steps=4)
    visitor.generate()
    visitor.generate()
    assert visitor.choose(0) != visitor.choose(1)
    visitor.open("What GSPN-2 does here")
    picture = page.locator("#g2-map img")
    visitor.expect_loaded(picture)
    before = picture.get_attribute("src")
    box = picture.bounding_box()
    assert box is not None
    picture.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.1})
    reach = page.locator("#g2-reach")
    expect(reach).to_contain_text(re.compile(r"call 2 of 4: .* travels \d+ pixels"))
    visitor.expect_status("Done")
    expect(picture).not_to_have_attribute("src", before or "")
    told = reach.inner_text()
    right, left = (int(re.findall(rf"{name} (\d+)", told)[0]) for name in ("right", "left"))
    assert right < left  # the point is near the right edge
    visitor.set_number("#g2-layer", 1)
    expect(reach).to_contain_text("Layer 1")
    before = picture.get_attribute("src")
    page.locator("#g2-direction label", has_text="left").click()
    expect(picture).not_to_have_attribute("src", before or "")
    visitor.expect_status("Done")
    visitor.shot("propagation")
    visitor.open("Compare the last two")
    expect(page.locator("#g2-differences")).to_contain_text("Seed")
    visitor.shot("compare")


def test_models_to_choose_from(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.write("a red apple")
    page.locator("#g2-model input").click()
    page.get_by_role("option", name="other").click()
    expect(page.locator("#g2-model input")).to_have_value("other")
    visitor.generate()
    assert visitor.saved(tmp_path).model == "other"
    expect(page.locator(".g2-head")).to_contain_text("other")


def test_few_steps(visitor: Visitor, tmp_path: Path) -> None:
    page, box = visitor.page, visitor.page.locator("#g2-few-steps")
    visitor.write("a red apple", steps=5)
    expect(box).not_to_be_visible()  # the first model has no adapter
    page.locator("#g2-model input").click()
    page.get_by_role("option", name="other").click()
    expect(box).to_be_visible()
    expect(box).to_contain_text("Fast: 3 steps, without guidance")
    steps = page.locator("#g2-steps input[type=number]")
    box.locator("input").check()
    expect(steps).to_have_value("3")
    visitor.generate()
    settings = visitor.saved(tmp_path, "with the few-step adapter")
    assert (settings.few_steps, settings.steps, settings.guidance_scale) == (True, 3, 1.0)
    box.locator("input").uncheck()
    expect(steps).to_have_value("20")
    page.click("#g2-reuse")
    expect(steps).to_have_value("3")
    expect(box.locator("input")).to_be_checked()


def test_others_are_told_how_many_come_before_them(arrive: Callable[..., Visitor], endless: int) -> None:
    first, second = arrive(), arrive()
    first.write("a red apple", steps=endless, side=128)
    second.write("a blue rocket")
    first.page.click("#g2-generate")
    first.expect_status(f"/{endless}")
    second.page.click("#g2-generate")
    second.expect_status("1 before you in the queue")
    first.page.click("#g2-stop")
    first.expect_status("Stopped")
    second.expect_pictures(1)
    second.expect_status("Done")


def test_sides_free_the_shape_and_shapes_set_both_sides(visitor: Visitor, server: Any) -> None:
    page = visitor.page
    chosen = page.locator("#g2-aspect label.selected")
    for name in ("width", "height"):
        visitor.set_number(f"#g2-{name}", 112)
    expect(chosen).to_have_text("free")
    page.locator("#g2-aspect label", has_text="4:3").click()
    for name, side in zip(("width", "height"), server.app.aspects()["4:3"], strict=True):
        expect(page.locator(f"#g2-{name} input[type=number]")).to_have_value(str(side))
    expect(chosen).to_have_text("4:3")


def test_errors_are_sentences(visitor: Visitor) -> None:
    visitor.page.click("#g2-generate")
    expect(visitor.page.locator(".toast-body")).to_contain_text("The prompt is empty")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(arrive: Callable[..., Visitor], scheme: str) -> None:
    viewport = {"width": 390, "height": 844}
    visitor = arrive(viewport=viewport, is_mobile=True, has_touch=True, color_scheme=scheme)
    page = visitor.page
    expect(page.locator("#g2-generate")).to_be_in_viewport(ratio=1)  # in reach without scrolling
    visitor.type("#g2-prompt textarea", "a red apple")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#g2-generate").tap()
    visitor.expect_pictures(1)
    visitor.expect_status("Done")
    expect(page.locator("#g2-stage img")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 60)")
    assert dark == (scheme == "dark")
    visitor.shot(f"phone-{scheme}")
