"""A real browser, and what is demanded of every page that fastlt writes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SCRIPTS = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
CONTRAST = 4.5  # WCAG 2.1, 1.4.3, for text of any size
DESKTOP, TELEPHONE = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


def system_browser() -> str:
    """Return the path of a Chromium, or skip the test."""
    pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")


@contextmanager
def launched() -> Iterator[Any]:
    """Start the system's browser, for as long as the block lasts."""
    path = system_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, scheme: str = "light", size: Any = None) -> Iterator[Any]:
    """Open a page with everything unfolded; after the block, no error and no request were seen."""
    context = browser.new_context(viewport=size or DESKTOP, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on(
        "console",
        lambda message: (
            complaints.append(f"console: {message.text}")
            if message.type in ("error", "warning")
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            complaints.append(f"request: {request.url}")
            if not request.url.startswith(("file:", "data:"))
            else None
        ),
    )
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    try:
        page.goto(file.resolve().as_uri())
        yield page
        assert not complaints, complaints
    finally:
        context.close()


def unfold(page: Any) -> None:
    """Open what can be opened, so that all of a page is looked at."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")


def column(page: Any, table: int, place: int) -> list[str]:
    """Return the cells of a column of a sortable table, as they are shown."""
    return page.evaluate(f"([table, place]) => ({SCRIPTS}).column(table, place)", [table, place])


def check(browser: Any, file: Path) -> None:
    """Hold a page to what is demanded of all pages, in light and in dark, wide and narrow."""
    papers = []
    for scheme in ("light", "dark"):
        for size in (DESKTOP, TELEPHONE):
            with opened(browser, file, scheme, size) as page:
                unfold(page)
                assert page.title().strip()
                assert page.evaluate("document.documentElement.lang") == "en"
                wrong = page.evaluate(f"(contrast) => ({SCRIPTS}).wrong(contrast)", CONTRAST)
                assert not wrong, f"{scheme}, {size['width']} pixels: {wrong}"
                papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert papers[0] == papers[1] != papers[2] == papers[3]
