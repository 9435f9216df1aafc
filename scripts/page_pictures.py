"""Pictures of the server's page for the documentation, on smol-llava, by Chromium.

pip install playwright; apt install chromium
python scripts/page_pictures.py --cache photos.cache --image cat.jpg --output docs/images
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright
from toy_server import Server


def answered(page: Page) -> None:
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false", timeout=300_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol-llava")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--output", default="docs/images")
    args = parser.parse_args()
    server = Server(args.model, "--cache", args.cache, "--port", 0, "--dtype", "float32", threads=2)
    folder = Path(args.output)
    try:
        with sync_playwright() as tool:
            browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme="light")
            page.set_default_timeout(300_000)
            page.goto(server.url)
            page.set_input_files("#file", args.image)
            page.check("#beside")
            for question in ("What is in the picture?", "Is there a cat?"):
                page.fill("#question", question)
                page.click("#send")
                answered(page)
            page.screenshot(path=folder / "page-ask.png")
            page.click("#tab-look")
            page.click("#show")
            expect(page.locator("#maps canvas").first).to_be_visible(timeout=300_000)
            page.screenshot(path=folder / "page-look.png")
            page.click("#tab-search")
            page.fill("#words", "a cat")
            page.click("#search-form button")
            expect(page.locator("#gallery img").first).to_be_visible(timeout=300_000)
            page.wait_for_load_state("networkidle")
            page.screenshot(path=folder / "page-search.png")
            browser.close()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
