"""A page in a Chromium of the machine's, without a network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(page_file: Path) -> Iterator[Any]:
    """The page; it must say nothing, ask for nothing beyond its file, and hold no id twice. Skips without Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_file = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium here")
    said = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        page = browser.new_page(offline=True)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(page_file.as_uri())
        yield page
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        browser.close()
    assert said == []


def check_plots(page: Any, count: int, legend: str) -> None:
    """Every plot has a size, lines, and the legend's text."""
    assert page.locator("figure svg").count() == count
    for number in range(count):
        plot = page.locator("figure svg").nth(number)
        box = plot.bounding_box()
        assert box["width"] > 300 and box["height"] > 150
        assert plot.locator("path").count() > 5 and legend in plot.inner_html()
