"""The demo in a real browser: every tab, by keyboard alone, on a telephone, with uploads that are no photographs.

It needs Playwright and a Chromium: POLYREP_CHROMIUM, or `chromium` on the path. Without, these tests are skipped, and
fail where POLYREP_REQUIRE_BROWSER=1 or CI is set. POLYREP_SCREENSHOTS names a folder for pictures of every tab.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import PATIENCE, ROOT
from PIL import Image
from test_demo import awaited, free_port

CHROMIUM = os.environ.get("POLYREP_CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
TABS = ("Search", "Words", "Kept tokens", "Uncertainty", "Layers", "Vectors", "Frontier")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SLOW = 300_000
"""Milliseconds for a step, on a machine that does much else."""


def refuse(reason: str) -> Any:
    if os.environ.get("POLYREP_REQUIRE_BROWSER") == "1" or os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        refuse("the demo is not tested in a browser: `pip install playwright`")
    if not CHROMIUM:
        refuse("the demo is not tested in a browser: install chromium, or name one with POLYREP_CHROMIUM")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(browser: Any, sets: Path, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("demo"), free_port()
    command = [warm.python(), str(ROOT / "demo" / "app.py"), "--documents", "60", "--port", str(port)]
    command += ["--vision", str(vision), "--trust_remote_code"]
    with (folder / "log").open("w+") as log:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
        env |= {"POLYREP_DATA": str(sets)}
        options: dict[str, Any] = {"stdout": log, "stderr": log, "env": env}
        server = subprocess.Popen([*command, "--cache", str(folder / "cache")], **options)
        try:
            if awaited(f"http://127.0.0.1:{port}/config", server) is None:
                log.seek(0)
                pytest.fail(log.read())
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(PATIENCE)


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of the demo, which must not complain or ask another host; its size is the test's parameter."""
    theme = "light"
    context = browser.new_context(viewport=getattr(request, "param", DESK), color_scheme=theme)
    opened = context.new_page()
    opened.set_default_timeout(SLOW)
    complaints: list[str] = []
    ours = (address, "data:", "blob:")
    opened.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(ours) else complaints.append(r.url))
    opened.goto(f"{address}/?__theme={theme}")
    opened.get_by_role("tab", name="Search", exact=True).wait_for()
    yield opened
    context.close()
    assert not complaints


def go_to(page: Any, tab: str) -> None:
    """Press a tab, on a telephone perhaps among those that did not fit."""
    if not page.get_by_role("tab", name=tab, exact=True).is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=tab).click()
    else:
        page.get_by_role("tab", name=tab, exact=True).click()
    panel(page).wait_for()


def panel(page: Any) -> Any:
    return page.locator("[role=tabpanel]:visible")


def pictured(page: Any, name: str) -> None:
    if folder := os.environ.get("POLYREP_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(300)  # what fades in has done so
        page.screenshot(path=f"{folder}/{name}-{page.viewport_size['width']}.png", full_page=True)


CONTENT = {
    "Search": "bytes a document",
    "Words": "of its own",
    "Kept tokens": "pooled vectors",
    "Uncertainty": "a variance does not rank better",
    "Layers": "layer 6",
    "Vectors": "any first ones of them are an index by themselves",
    "Frontier": "Within 1,024 bytes a document and 8 ms a query",
}

UNNAMED = """() => [...document.querySelectorAll("input, textarea, select, button, [role=tab], [role=slider]")]
    .filter((e) => e.checkVisibility() && e.type !== "hidden")
    .filter((e) => !(e.ariaLabel || e.title || e.innerText?.trim() || e.labels?.length || e.querySelector("img[alt]")
        || e.getAttribute("aria-labelledby") || e.closest("label")?.innerText.trim()))
    .map((e) => e.outerHTML)"""


@pytest.mark.parametrize("page", [DESK, PHONE], indirect=True, ids=["desk", "phone"])
def test_every_tab_shows_its_content_and_fits(page):
    for tab in TABS:
        go_to(page, tab)
        panel(page).get_by_text(CONTENT[tab]).first.wait_for()
        width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= window, f"{tab} is {width} pixels wide"
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate("[...document.images].filter((i) => !i.alt.trim()).map((i) => i.outerHTML)") == []
        assert page.evaluate("[...document.images].filter((i) => i.complete && !i.naturalWidth).length") == 0
        assert panel(page).locator("[role=alert]").count() == 0
        pictured(page, tab.replace(" ", "-"))


def test_search_works_by_keyboard_alone(page):
    box = page.get_by_label("Query").first
    for _ in range(12):
        page.keyboard.press("Tab")
        if box.evaluate("(e) => e === document.activeElement"):
            break
    else:
        pytest.fail("the query cannot be reached by Tab")
    assert box.evaluate("(e) => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("Control+A")
    page.keyboard.type("dark sour bread that needs to rest overnight")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Best documents for “dark sour bread that needs to rest overnight”").wait_for()
    assert panel(page).locator("article").count() == 9
    assert panel(page).locator("article.full .relevant").count() == 1
    page.keyboard.press("Tab")  # to the button
    assert page.evaluate("document.activeElement.innerText") == "Search"
    page.keyboard.press("Tab")  # to the first example
    assert page.evaluate("document.activeElement.closest('.choices') !== null")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Best documents for “can I bring my bike across the water”").wait_for()
    assert box.input_value() == "can I bring my bike across the water"


def test_tabs_can_be_reached_by_keyboard(page):
    tab = page.get_by_role("tab", name="Layers", exact=True)
    tab.focus()
    page.keyboard.press("Enter")
    panel(page).get_by_text("layer 6").first.wait_for()
    assert tab.get_attribute("aria-selected") == "true"
    assert tab.evaluate("(e) => getComputedStyle(e).outlineStyle") == "solid"


def test_bad_text_gets_a_message_and_markup_stays_text(page):
    box = page.get_by_label("Query").first
    for text, message in (("", "The query is empty"), ("a" * 501, "501 characters"), (" ", "The query is empty")):
        box.fill(text)
        box.press("Enter")
        page.get_by_role("alert").filter(has_text=message).wait_for()
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    box.fill(evil)
    box.press("Enter")
    page.get_by_role("heading", name=f"Best documents for “{evil}”").wait_for()
    assert page.title().startswith("polyrep")


def picture(kind: str = "JPEG", size: tuple[int, int] = (320, 240), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(stream, kind)
    return stream.getvalue()


def uploaded(page: Any, name: str, content: bytes) -> None:
    kind = "image/png" if name.endswith("png") else "image/jpeg"
    chooser = panel(page).locator("input[type=file]")
    chooser.set_input_files({"name": name, "mimeType": kind, "buffer": content})


def test_uploads_good_and_bad(page):
    go_to(page, "Words")
    uploaded(page, "mine.jpg", picture())
    page.get_by_role("img", name="Your image", exact=True).wait_for()
    pictured(page, "upload-good")
    for name, content, message in (
        ("text.png", b"this is a text", "no image that can be read"),
        ("cut.jpg", picture()[:2000], "damaged or cut off"),
        ("text.txt", b"this is a text", "no image that can be read"),
        ("huge.png", picture("PNG", (8000, 5001), "1"), "8,000 × 5,001 pixels"),
        ("heavy.jpg", b"0" * 9 * 2**20, "exceed the maximum allowed size"),
    ):
        uploaded(page, name, content)
        page.get_by_text(message).first.wait_for()
    pictured(page, "upload-bad")
    uploaded(page, "clear.png", picture("PNG", mode="RGBA"))
    page.get_by_role("img", name="Your image", exact=True).wait_for()
    assert panel(page).get_by_role("alert").count() == 0


def test_keys_change_what_is_kept_and_what_is_recommended(page):
    go_to(page, "Kept tokens")
    slider = panel(page).get_by_role("slider").first
    slider.focus()
    for _ in range(7):
        page.keyboard.press("ArrowLeft")
    panel(page).get_by_text("1 pooled vector,").wait_for()
    go_to(page, "Frontier")
    box = panel(page).get_by_label("Bytes a document, at most")
    box.focus()
    box.fill("16")
    box.press("Enter")
    panel(page).get_by_text("Within 16 bytes a document and 8 ms a query").wait_for()
    panel(page).get_by_label("scifact").check()
    page.get_by_alt_text("Quality against bytes per document on scifact").wait_for()


@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["phone"])
def test_a_wide_table_scrolls_in_itself(page):
    go_to(page, "Layers")
    box = panel(page).locator(".scrolling")
    inside, outside = box.evaluate("(e) => [e.scrollWidth, e.clientWidth]")
    assert inside > outside
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
