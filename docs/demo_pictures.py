"""docs/demo.png: the page of extras/demo.py as a visitor sees it, in a browser without a window.

    pip install -e '.[demo,browser]'
    python -m docs.demo_pictures docs/models/fashion [--width 400] [--out FILE]
"""

import shutil

import config
from config import UserError, explain
from extras import demo


def screenshot(url: str, browser: str, out: str, width: int) -> None:
    """Draws thumbnails, finishes number 7, varies it, and stops its animation at t = 0.7."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(300_000)                   # milliseconds: the network may be slow
        page.goto(url)
        page.locator("#thumbnails img").nth(7).click()
        page.get_by_role("button", name="8 variations").click()
        page.wait_for_selector("#varied img")
        page.get_by_role("button", name="Watch it form").click()
        page.locator("#animation input").fill("0.7")
        page.wait_for_timeout(500)
        page.screenshot(path=out, full_page=True)
        chromium.close()


def main() -> None:
    parser = config.parser(__doc__, "python -m docs.demo_pictures [RUN] [options]")
    parser.add_argument("run", nargs="?", help="run directory or export [the newest in out/]")
    parser.add_argument("--out", default="docs/demo.png", help="the picture [docs/demo.png]")
    parser.add_argument("--width", type=int, default=1400, help="of the window [1400]")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise UserError("a screenshot needs a browser: install chromium")
    with explain("the browser is driven by playwright", ": pip install -e '.[browser]'", ImportError):
        import playwright  # noqa: F401
    shared = demo.Shared()
    shared.open(args.run)
    page = demo.launch(shared, "127.0.0.1", None)
    screenshot(page.local_url, browser, args.out, args.width)
    page.close()
    print(f"wrote      {args.out}")


if __name__ == "__main__":
    config.run(main)
