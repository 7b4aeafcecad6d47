"""A page in a Chromium of the machine's, which asks nobody but the place that it comes from."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(source: Path | str) -> Iterator[Any]:
    """The page of a file, or of a server's address; it must say nothing, ask for nothing from elsewhere (a file: from
    anywhere), and hold no id twice. Skips without Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_file = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium here")
    said: list[str] = []
    address = source.as_uri() if isinstance(source, Path) else source
    own = "file:" if isinstance(source, Path) else address[: address.index("/", len("http://"))]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        page = browser.new_page(offline=isinstance(source, Path))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith(own) else None)
        page.goto(address)
        yield page
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        browser.close()
    assert said == [], said


def check_plots(page: Any, count: int, legend: str) -> None:
    """Every plot has a size, lines, and the legend's text."""
    assert page.locator("figure svg").count() == count
    for number in range(count):
        plot = page.locator("figure svg").nth(number)
        box = plot.bounding_box()
        assert box["width"] > 300 and box["height"] > 150
        assert plot.locator("path").count() > 5 and legend in plot.inner_html()
