"""The documentation as a site, in a Chromium of the machine's: nothing is missing, and a phone shows all of it."""

import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.helpers.browser import opened
from tests.helpers.paths import ROOT

PHONE = {"width": 390, "height": 844}
MKDOCS = ROOT / ".venv" / "docs" / "bin" / "mkdocs"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MKDOCS.exists(), reason="make docs makes its environment"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The folder of the site, built strictly, and its address."""
    folder = tmp_path_factory.mktemp("site")
    command = [MKDOCS, "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, timeout=120)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Tells nothing of requests."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_pages_say_nothing_lack_nothing_and_fit_on_a_phone(site):
    folder, address = site
    pages = [page.relative_to(folder) for page in sorted(folder.rglob("*.html")) if page.name != "404.html"]
    assert len(pages) > 20
    for page_file in pages:
        with opened(f"{address}/{page_file}") as page:
            missing = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
            assert missing == [], page_file
            dead = [link for link in page.evaluate(LINKS, address) if not (folder / link.lstrip("/")).exists()]
            assert dead == [], page_file
            anchors = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))")
            ids = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
            assert {anchor for anchor in anchors if anchor} <= ids | {"__search"}, page_file
            page.set_viewport_size(PHONE)
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], page_file


LINKS = """own => [...document.querySelectorAll('a[href]')].filter(a => a.origin === own).map(
    a => decodeURIComponent(a.pathname))"""


def test_the_pictures_are_seen(site):
    with opened(f"{site[1]}/method.html") as page:
        sizes = [image.bounding_box() for image in page.locator("article img").all()]
    assert len(sizes) == 2 and all(size["width"] > 300 and size["height"] > 150 for size in sizes)
