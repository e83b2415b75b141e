"""The pages in Debian's chromium: what is clicked, what appears, how an error reads."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.tiny import make_classifier_free, make_consistency, make_points


pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="gradio is missing: pip install 'hf-diffusion[browser]'")
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is missing: pip install 'hf-diffusion[browser]'"
)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from hf_diffusion.space.app import build  # noqa: E402
from hf_diffusion.space.watch import build_watch  # noqa: E402


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,1000"
)
SECONDS = 40


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that resolves no name, so that a page which fetches from elsewhere shows it."""
    for program in ("chromium", "chromedriver"):
        assert shutil.which(program), f"{program} is missing: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        *FLAGS.split(),
        f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def images(serve):
    return serve(build(make_classifier_free(), "Tiny images"))


def opened(browser, address: str, button: str = "draw"):
    """Go to a page; returns a function that waits for a condition."""
    browser.get(address)
    wait = WebDriverWait(browser, SECONDS).until
    wait(lambda page: page.find_elements(By.ID, button), f"{address} shows no {button}")
    return wait


def click(browser, name: str) -> None:
    browser.find_element(By.ID, name).click()


def field(browser, name: str):
    """The field of one argument, where it can be typed into."""
    return browser.find_element(By.CSS_SELECTOR, f"#{name} input[type=number]")


def fill(browser, name: str, text: str) -> None:
    """Type into a field, in place of what it holds."""
    field(browser, name).send_keys(Keys.CONTROL + "a")
    field(browser, name).send_keys(text, Keys.TAB)


def note(browser) -> str:
    return browser.find_element(By.ID, "note").text


def picture(browser, selector: str) -> np.ndarray:
    """The pixels (H, W, 3) of an element as the browser shows it."""
    shot = browser.find_element(By.CSS_SELECTOR, selector).screenshot_as_base64
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")).astype(int)


def coloured(pixels: np.ndarray) -> int:
    """How many pixels are no grey."""
    return int(((pixels.max(-1) - pixels.min(-1)) > 60).sum())


def test_a_click_draws_samples_and_shows_their_steps(browser, images):
    wait = opened(browser, images)
    fill(browser, "seed", "3")
    click(browser, "draw")
    wait(lambda page: note(page).startswith("16 images in") and "seeds 3 to 18" in note(page))
    for name in ("samples", "steps"):
        wait(lambda page, name=name: page.find_elements(By.CSS_SELECTOR, f"#{name} img"))
        assert picture(browser, f"#{name} img").std() > 20, f"{name} is blank"


def test_another_seed_draws_other_samples(browser, images):
    wait = opened(browser, images)
    click(browser, "draw")
    wait(lambda page: "seeds 0 to 15" in note(page))
    click(browser, "another")
    wait(lambda page: " in " in note(page) and "seeds 0 " not in note(page))
    wait(lambda page: f"seeds {field(page, 'seed').get_attribute('value')} to" in note(page))


def test_a_mistake_is_shown_as_a_sentence_and_the_page_goes_on(browser, images):
    wait = opened(browser, images)
    fill(browser, "seed", "-1")
    click(browser, "draw")
    wait(lambda page: page.find_elements(By.CSS_SELECTOR, "[data-testid='toast-text']"))
    toast = browser.find_element(By.CSS_SELECTOR, "[data-testid='toast-text']")
    wait(lambda page: "the seed must be between 0 and" in toast.text and "not -1" in toast.text)
    fill(browser, "seed", "2")
    click(browser, "draw")
    wait(lambda page: "seeds 2 to 17" in note(page))


def test_options_that_are_only_looked_at_change_nothing(browser, images):
    wait = opened(browser, images)
    browser.find_element(By.XPATH, "//button[.//span[contains(text(), 'More options')]]").click()
    wait(lambda page: page.find_element(By.ID, "eta").is_displayed())
    click(browser, "draw")
    wait(lambda page: "seeds 0 to 15" in note(page))


def test_a_consistency_model_draws_in_one_step(browser, serve):
    wait = opened(browser, serve(build(make_consistency(), "Tiny consistency")))
    fill(browser, "num_inference_steps", "1")
    click(browser, "draw")
    wait(lambda page: note(page).startswith("16 images in"))
    assert picture(browser, "#samples img").std() > 20


def test_points_appear_as_a_plot_with_the_names_of_their_classes(browser, serve):
    wait = opened(browser, serve(build(make_points(), "Tiny points")))
    click(browser, "draw")
    wait(lambda page: note(page).startswith("500 points in"))
    assert coloured(picture(browser, "#samples img")) > 100


def test_a_page_fetches_nothing_from_elsewhere(browser, images):
    browser.get_log("performance")
    wait = opened(browser, images)
    click(browser, "draw")
    wait(lambda page: " in " in note(page))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((images, "data:", "blob:", "ws://127.0.0.1"))] == []


def test_a_run_is_followed_without_a_click(browser, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_diffusion.space.watch.REFRESH", 0.5)
    log = tmp_path / "metrics.jsonl"
    (tmp_path / "config.yaml").write_text("max_train_steps: 1000\n")
    wait = opened(browser, serve(build_watch(tmp_path)), "says")
    wait(lambda page: "Nothing is logged yet" in page.find_element(By.ID, "says").text)
    log.write_text("".join(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in (10, 20, 30)))
    wait(lambda page: "Step 30 of 1,000" in page.find_element(By.ID, "says").text)
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "samples" / "ema-00000030.png")
    wait(lambda page: coloured(picture(page, "#curve")) > 50, "no line was drawn")
    wait(lambda page: page.find_elements(By.CSS_SELECTOR, "#grid img"))
    wait(lambda page: picture(page, "#grid img").reshape(-1, 3).mean(0)[0] > 200)
    with log.open("a") as file:
        file.write('{"step": 40, "loss": 0.25, "images_per_second": 40.0}\n')
    wait(lambda page: "Step 40 of 1,000" in page.find_element(By.ID, "says").text)
    said = browser.find_element(By.ID, "says").text
    assert "loss 0.25 · 40 samples/s · about " in said and said.endswith(" min left")
