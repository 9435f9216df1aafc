"""The page in a real browser: ask, slide, search, look; by keyboard alone; on a phone and a desk; light and dark."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from server_toys import *  # noqa: F403
from server_toys import app_of, file_bytes, listening, pixels

pytest.importorskip("playwright")
from playwright.sync_api import expect, sync_playwright  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed (apt install chromium)", allow_module_level=True)
SHOTS = os.environ.get("FWD2BOT_SCREENSHOTS")  # a folder, where pictures of the page are wanted


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")], ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser, server, request):
    """The page at a width and in a scheme; whatever its console says of errors fails the test."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(server.url)
    expect(opened.locator("#model")).to_have_text("toy")
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    context.close()
    refusals = [text for text in said if "400" in text]  # of a filter that a test makes wrong
    assert len(refusals) <= 1 and refusals == said


@pytest.fixture
def photo(tmp_path) -> Path:
    (tmp_path / "dog.png").write_bytes(file_bytes(pixels(0)))
    return tmp_path / "dog.png"


def done(page, count: int = 1):
    """The answers, once all are there."""
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false", timeout=30_000)
    boxes = page.locator(".turn:last-child .answer p")
    expect(boxes).to_have_count(count)
    for i in range(count):
        expect(boxes.nth(i)).not_to_be_empty()
    return [boxes.nth(i).inner_text() for i in range(count)]


def shot(page, name: str) -> None:
    if SHOTS:
        width, dark = page.viewport_size["width"], page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        page.screenshot(path=Path(SHOTS) / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def test_ask_slide_and_search(page, photo):
    """A picture is chosen and asked about; fewer tokens answer otherwise; a hit of a search is asked about."""
    page.set_input_files("#file", photo)
    expect(page.locator("#picture")).to_be_visible()
    page.fill("#question", "how many dogs are there")
    page.click("#send")
    four = done(page)
    expect(page.locator("#size-dense")).to_have_text("16 × 64: 2,048 bytes")
    expect(page.locator("#size-summary")).to_have_text("4 × 64: 512 bytes")
    page.fill("#k", "1")
    expect(page.locator(".turn:last-child .answer h2")).to_have_text("2 summary tokens")
    two = done(page)
    assert four != two
    page.check("#beside")
    answers = done(page, 2)
    assert answers[0] == two[0] and page.locator(".answer h2").nth(1).inner_text() == "base, all dense tokens"
    shot(page, "ask")
    page.click("#tab-search")
    page.fill("#words", "a dog")
    page.click("#search-form button")
    expect(page.locator("#found")).to_have_text("4 found")
    expect(page.locator("#gallery img")).to_have_count(4)
    shot(page, "search")
    page.fill("#filter", "no such column")
    page.click("#search-form button")
    expect(page.locator("#problem")).to_contain_text("The filter")
    page.fill("#filter", "id LIKE 'beach/%'")
    page.click("#search-form button")
    expect(page.locator("#found")).to_have_text("2 found")
    page.click("#gallery li:first-child button")
    expect(page.locator("#picture-name")).to_contain_text("beach/")
    page.uncheck("#beside")
    page.fill("#question", "what is it")
    page.click("#send")
    done(page)


def test_look(page, photo):
    """A map for each summary token."""
    page.click("#tab-look")
    page.click("#show")
    expect(page.locator("#problem")).to_contain_text("Drop a picture")
    page.click("#tab-ask")
    page.set_input_files("#file", photo)
    page.click("#tab-look")
    page.click("#show")
    expect(page.locator("#maps canvas")).to_have_count(4)
    told = page.locator("#maps figcaption").all_inner_texts()
    assert all(text.startswith("token ") and text.endswith(" %") for text in told)
    shot(page, "look")


def test_by_keyboard_alone(page):
    """Tabs by arrows, the rest by Tab and Enter; where the focus is shows."""
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "tab-ask":
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-search"
    expect(page.locator("#search")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.type("a dog")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text("4 found")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#gallery') !== null"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("how many")
    page.keyboard.press("Enter")
    done(page)


def test_no_serious_finding_of_axe(page, photo):
    """axe-core's rules on every tab, with what a user sees there."""
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    page.set_input_files("#file", photo)
    page.fill("#question", "what is it")
    page.click("#send")
    done(page)
    for tab in ("ask", "search", "look"):
        page.click(f"#tab-{tab}")
        if tab == "search":
            page.fill("#words", "a dog")
            page.click("#search-form button")
            expect(page.locator("#found")).to_have_text("4 found")
        found = Axe().run(page).response["violations"]
        assert not [v["id"] for v in found if v["impact"] in ("serious", "critical")], found


def test_what_is_sent_is_text(browser, loaded, checkpoint, tmp_path):
    """A file's name with HTML in it shows as it is; a token is asked for and used."""
    app = app_of(loaded, checkpoint, token="a-long-secret")
    with listening(app, token="a-long-secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#token-form")).to_be_visible()
        page.fill("#token", "a-long-secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("toy")
        name = "<img src=x onerror=alert(1)>.png"
        (tmp_path / name).write_bytes(file_bytes(pixels(0)))
        page.set_input_files("#file", tmp_path / name)
        expect(page.locator("#picture-name")).to_have_text(name)
        page.close()
