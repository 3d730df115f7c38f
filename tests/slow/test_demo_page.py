"""extras/demo.py in a browser without a window, used as a person would: every tab, at two widths."""

import io
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_demo import pictures_of
from test_latents import encode, images, run_of, vae  # noqa: F401  (fixtures)

import train
from config import UserError
from conftest import FLAGS, tiny
from extras import demo, studio
from run import load

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: install chromium")]
WIDTHS = (1400, 400)
STREAMS = ("/queue/data", "/upload_progress")               # of events, which the page itself ends


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """serve(shared): the address of the page."""
    pages = []

    def start(shared: demo.Shared) -> str:
        pages.append(demo.launch(shared, "127.0.0.1", None))
        return pages[-1].local_url

    yield start
    for page in pages:
        page.close()


@pytest.fixture
def visit(browser):
    """visit(address, width): a page in the browser. In the end: no errors on its console, nothing asked of others."""
    pages, problems = [], []

    def open_page(url: str, width: int = 1400):
        page = browser.new_page(viewport={"width": width, "height": 1000})
        pages.append(page)
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", lambda answer: answer.status >= 400 and problems.append(f"{answer.status} {answer.url}"))
        page.on("request", lambda asked: asked.url.startswith((url, "data:", "blob:")) or problems.append(asked.url))
        page.on("requestfailed", lambda asked: any(stream in asked.url for stream in STREAMS) or
                problems.append(f"lost {asked.url}"))
        page.goto(url)
        page.set_default_timeout(60_000)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert problems == []


def train_run(cfg) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda job: {})
        train.train(cfg, device="cpu")
    return cfg.out


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    return train_run(tiny(tmp_path_factory.mktemp("digits"), steps=60, save_every=60, solver="dopri5",
                          solver_steps=0))


def opened(name: str) -> demo.Shared:
    shared = demo.Shared(device="cpu")
    shared.open(name)
    return shared


def thumbnails(page) -> list[np.ndarray]:
    """As the browser got them."""
    page.wait_for_selector("#thumbnails img")
    sources = page.locator("#thumbnails img").evaluate_all("images => images.map(image => image.src)")
    return [np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("L")) for source in sources]


def shown(page, place: str) -> list[np.ndarray]:
    page.wait_for_selector(f"{place} img, {place} .reel")
    return pictures_of(page.inner_html(place).replace("&quot;", '"'))


def says(page, words: str) -> str:
    """The status, once it holds these words."""
    try:
        page.wait_for_function("words => document.querySelector('#status')?.innerText.includes(words)", arg=words)
    except playwright.TimeoutError:
        raise AssertionError(f"the status is {page.inner_text('#status')!r}, without {words!r}") from None
    return page.inner_text("#status")


def press(page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def again(page, button: str, words: str) -> str:
    """Presses a button; the new status, which may be the same as before it."""
    press(page, "Cancel")
    says(page, "cancelled")
    press(page, button)
    return says(page, words)


def draw(page, words: str = "thumbnails of") -> str:
    return again(page, "Draw thumbnails", words)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_visitor_draws_clicks_varies_and_watches(serve, visit, digits, width):
    page = visit(serve(opened(digits)), width)
    status = says(page, "20 thumbnails of 4 × 4")           # drawn without a click
    assert re.search(r"\d+ calls \(NFE\), \d+\.\d\d s", status)
    first = thumbnails(page)
    assert len(first) == 20 and all(image.shape == (4, 4) for image in first)
    assert page.evaluate("document.documentElement.scrollWidth") <= width       # nothing sticks out

    page.locator("#thumbnails img").nth(7).click()
    status = says(page, "image 7 finished")
    thumbnail, image = shown(page, "#finished")
    assert np.array_equal(thumbnail, first[7]) and image.shape == (8, 8)
    assert float(re.search(r"by ([\d.e-]+) at most", status)[1]) < 0.02         # dopri5, to its tolerance
    average = image.reshape(4, 2, 4, 2).mean(axis=(1, 3))   # but for pixels that are cut off at black and white
    distances = [np.abs(average - small).mean() for small in first]
    assert np.argmin(distances) == 7 and distances[7] < min(distances[:7] + distances[8:]) / 2

    press(page, "8 variations")
    says(page, "8 times image 7")
    varied = shown(page, "#varied")
    assert len(varied) == 8 and len({image.tobytes() for image in varied}) == 8
    press(page, "Watch it form")
    says(page, "Euler steps,")
    coarse, fine, total = shown(page, "#animation")
    assert [len(strip) for strip in (coarse, fine, total)] == [49 * 4, 49 * 8, 49 * 8]
    assert np.abs(total[-8:].astype(float) - image).mean() < 12                 # it ends as the image that was finished
    clock = page.locator("#animation output")
    page.wait_for_function("document.querySelector('#animation output').innerText > 't = 0.20'")        # it plays
    page.locator("#animation input").fill("0.25")
    assert clock.inner_text() == "t = 0.25"
    page.wait_for_timeout(300)
    assert clock.inner_text() == "t = 0.25"                                     # and stands still once touched
    place = page.locator("#animation .reel").nth(1).evaluate("reel => reel.style.backgroundPositionY")
    assert place == "25%" and "band 1 from t = 0.5" in page.inner_text("#animation")
    press(page, "Play / stop")
    page.wait_for_function("document.querySelector('#animation output').innerText != 't = 0.25'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    draw(page)
    assert all(map(np.array_equal, first, thumbnails(page))) and page.inner_text("#finished").strip() == ""
    page.get_by_label("Seed").locator("visible=true").fill("1")
    draw(page)
    assert not any(map(np.array_equal, first, thumbnails(page)))                # another seed, other images
    page.get_by_label("Solver").click()
    page.get_by_role("option", name="heun", exact=True).click()
    page.get_by_label("Steps").fill("12")
    page.get_by_label("Guidance").fill("3")
    page.get_by_label("Classes").click()
    page.get_by_role("option", name="5", exact=True).click()
    page.locator("#headline").click()                       # closes the list
    assert "24 calls" in draw(page)
    assert page.locator("#thumbnails .caption-label").all_inner_texts() == ["5"] * 20
    page.locator("#thumbnails img").nth(2).click()
    assert float(re.search(r"by ([\d.e-]+) at most", says(page, "image 2 finished"))[1]) < 1e-4     # to rounding


@pytest.mark.parametrize("width", WIDTHS)
def test_a_visitor_enlarges_a_picture(serve, visit, digits, width, tmp_path):
    page = visit(serve(opened(digits)), width)
    says(page, "thumbnails of")
    page.get_by_role("tab", name="Upsample").click()
    press(page, "Enlarge")
    says(page, "choose a picture first")
    Image.fromarray(np.full((4, 4), 100, np.uint8)).save(tmp_path / "grey.png")
    page.set_input_files("#small input[type=file]", tmp_path / "grey.png")
    page.wait_for_selector("#small >> text=grey")
    press(page, "Enlarge")
    status = says(page, "4 → 8 pixels")
    small, cubic, *large = shown(page, "#enlarged")
    assert (small == 100).all() and (cubic == 100).all() and [image.shape for image in large] == [(8, 8)] * 4
    assert len({image.tobytes() for image in large}) == 4 and "bicubic 0.0" in status
    for image in large:
        inside = ((image > 0) & (image < 255)).reshape(4, 2, 4, 2).all(axis=(1, 3))
        assert np.abs(image.reshape(4, 2, 4, 2).mean(axis=(1, 3)) - 100)[inside].max() <= 1
    page.get_by_label("Seed").locator("visible=true").fill("5")
    again(page, "Enlarge", "4 → 8 pixels")
    assert not np.array_equal(shown(page, "#enlarged")[2], large[0])

    (tmp_path / "letter.png").write_text("no picture")
    page.locator("#small").get_by_label("Remove").or_(page.locator("#small button").first).first.click()
    page.set_input_files("#small input[type=file]", tmp_path / "letter.png")
    page.wait_for_selector("#small >> text=letter")
    press(page, "Enlarge")
    assert "cannot read the image 'letter.png'" in says(page, "letter.png") and len(shown(page, "#enlarged")) == 6


@pytest.mark.parametrize("width", WIDTHS)
def test_a_visitor_takes_a_photograph_apart(serve, visit, width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = visit(serve(demo.Shared()), width)               # this tab needs no run
    assert len(shown(page, "#pyramid")) == 6
    pixels = np.random.default_rng(0).integers(0, 256, (300, 256, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    page.set_input_files("#photo input[type=file]", tmp_path / "noise.png")
    page.wait_for_selector("#photo >> text=noise")
    until = time.time() + 30
    while not np.array_equal(shown(page, "#pyramid")[-1], pixels[22:278]):      # the sum of all bands: its middle
        assert time.time() < until
        page.wait_for_timeout(100)
    page.get_by_label("number input for Bands, K").fill("5")
    page.get_by_label("number input for Bands, K").press("Enter")
    page.wait_for_function("document.querySelectorAll('#pyramid img').length == 10")
    assert [len(image) for image in shown(page, "#pyramid")] == 2 * [16, 32, 64, 128, 256]


@pytest.mark.parametrize("kind", ["latent", "export"])
def test_latents_and_exports(serve, visit, digits, tmp_path, kind, request):
    if kind == "latent":
        folder, autoencoder = (request.getfixturevalue(name) for name in ("images", "vae"))
        encode(tmp_path / "cache", folder, autoencoder)
        name = train_run(run_of(tmp_path / "run", tmp_path / "cache", autoencoder, steps=3))
    else:
        load.export(load.load_run(digits, device="cpu"), tmp_path / "export")
        name = str(tmp_path / "export")
    shared = opened(name)
    page, side = visit(serve(shared)), shared.run.cfg.res
    says(page, "thumbnails of")
    page.locator("#thumbnails img").nth(3).click()
    says(page, "image 3 finished")
    assert len(shown(page, "#finished")[1]) == side
    press(page, "8 variations")
    press(page, "Watch it form")
    says(page, "Euler steps,")
    assert len(shown(page, "#varied")) == 8 and len(shown(page, "#animation")) == shared.run.cfg.num_scales + 1
    page.get_by_role("tab", name="Upsample").click()
    Image.fromarray(np.full((16, 16, 3), 100, np.uint8)).save(tmp_path / "grey.png")
    page.set_input_files("#small input[type=file]", tmp_path / "grey.png")
    page.wait_for_selector("#small >> text=grey")
    press(page, "Enlarge")
    says(page, f"→ {side} pixels")
    assert [len(image) for image in shown(page, "#enlarged")] == [side] * 6


def test_without_a_run_it_trains_the_digits(serve, visit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "FLAGS", [*FLAGS, "--steps", "400", "--log-every", "5"])
    page = visit(serve(demo.Shared(device="cpu")))
    press(page, "Train the digits")
    assert page.get_by_role("tab").all_inner_texts() == ["Pyramid"]
    says(page, "of 400")
    assert shown(page, "#loss")[0].shape[1] > 500           # the loss, while it trains
    with page.expect_response("**/cancel"):                 # until then the button does nothing
        press(page, "Cancel")
    says(page, "cancelled")
    press(page, "Train the digits")
    says(page, "of 400")                                    # goes on
    assert list(Path("out/digits").glob("step-*.pt")) and "step 5 of" not in page.inner_text("#status")
    says(page, "20 thumbnails of 4 × 4")                    # drawn without another click
    assert len(thumbnails(page)) == 20 and (tmp_path / "out" / "digits" / "scores.json").exists()
    assert page.get_by_role("tab").all_inner_texts() == ["Generate", "Upsample", "Pyramid"]
    assert not page.get_by_role("button", name="Train the digits").is_visible()


def test_cancel_ends_the_computation(serve, visit, digits, monkeypatch):
    calls, call = [], studio.Watched.__call__
    monkeypatch.setattr(studio.Watched, "__call__", lambda self, *given: (calls.append(1), call(self, *given))[1])
    page = visit(serve(opened(digits)))
    says(page, "20 thumbnails of")
    page.get_by_label("Solver").click()
    page.get_by_role("option", name="euler", exact=True).click()
    page.get_by_label("Steps").fill("1000")
    page.get_by_label("number input for Number").fill("60")
    calls.clear()
    draw(page, "thumbnails: t = 0.")                        # progress
    assert page.locator("#status progress").get_attribute("value") != "0"
    press(page, "Cancel")
    says(page, "cancelled")
    page.wait_for_timeout(300)
    count = len(calls)
    page.wait_for_timeout(1000)
    assert 0 < len(calls) == count < 1000 and len(thumbnails(page)) == 20       # those of before
    page.get_by_label("Steps").fill("10")
    assert draw(page).startswith("60 thumbnails")


def test_an_address_that_cannot_be_served_is_one_sentence():
    with pytest.raises(UserError, match="the page cannot be served on 192.0.2.1: .*; choose another --host or --port"):
        demo.launch(demo.Shared(), "192.0.2.1", None)       # an address of nobody (RFC 5737)


def test_several_visitors_take_turns(serve, visit, digits, monkeypatch):
    active, most, preview = [], [], studio.preview

    def slow(run, wish):
        active.append(1)
        most.append(len(active))
        time.sleep(0.5)
        active.pop()
        return preview(run, wish)

    monkeypatch.setattr(studio, "preview", slow)
    url = serve(opened(digits))
    pages = [visit(url) for _ in range(4)]
    for i, page in enumerate(pages):
        page.get_by_label("Seed").locator("visible=true").fill(str(i % 2))
    for page in pages:
        press(page, "Draw thumbnails")
    assert len([says(page, "20 thumbnails of") for page in pages]) == 4 and max(most) == 1
