"""The pages in a browser, as wide as a desk and a phone: no page scrolls sideways, no block of code is cut."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Addresses: "" is the front page.
PAGES = [f"{page.relative_to(DOCS).with_suffix('')}/".removesuffix("index/") for page in sorted(DOCS.rglob("*.md"))]
#: Headless, as root, and without a word to hosts outside.
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
MEASURE = """
const cut = [...document.querySelectorAll('pre > code')].filter(one => one.scrollWidth > one.clientWidth + 1);
return [document.documentElement.scrollWidth, cut.map(one => one.textContent.slice(0, 80))];
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("material", reason="the pages need .[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="a browser is driven by selenium: .[docs]")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no Chromium with its chromedriver: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page or "front")
def test_no_block_is_cut_and_no_page_scrolls_sideways(site: str, browser: Any, page: str, width: int) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(site + page)
    across, cut = browser.execute_script(MEASURE)
    assert across <= width
    assert cut == []
