"""The report in a real browser, as readers meet it: by mouse, keys, phone, paper and no script."""

import base64
import html
import io
import json
import os
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from helpers import IMAGES, SmallAdapter, config, discs, run_adapt, run_that_improves
from PIL import Image
from scipy import ndimage

from selfadapt import adapt, write_report
from selfadapt._charts import _INK, COLOURS
from selfadapt._fates import FATES, fates, summed

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra test")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium or google-chrome, and chromedriver"
)


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless=new",
        "--disable-gpu",
        "--force-device-scale-factor=1",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(flag)
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # as which its sandbox does not start
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


class Findable(SmallAdapter):
    """Of which scale and polarity are found in the images."""

    adjustable = frozenset({"scale", "invert", "tta"})


@pytest.fixture(scope="module")
def runs(adapter, tmp_path_factory):
    """Folders of finished runs, by what they are for."""
    root = tmp_path_factory.mktemp("runs")
    far = config(iterations=4, learning_rate=0.3)
    run_adapt(adapter, root / "changed", config=far)
    both = config(candidates="default,gentle")
    adapt(adapter, IMAGES, config=both, output_dir=root / "initial kept", progress=False)
    run_that_improves(adapter, root / "improved")
    dark = [255 - discs(300 + k, (96, 120))[0] for k in range(3)]
    few = config(iterations=1, views=2)
    found = Findable().with_model(adapter.model)
    adapt(found, dark, config=few, output_dir=root / "calibrated", progress=False)
    return root


@pytest.fixture
def page(driver, runs, request):
    """The report of a run, "changed" where no other is named, opened on a desk."""
    size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    open_page(driver, write_report(runs / getattr(request, "param", "changed")))
    return driver


def open_page(driver, file):
    for kind in ("browser", "performance"):  # of the page before
        driver.get_log(kind)
    driver.get(file.as_uri())


def seen(driver, selector=".pair"):
    """The pixels of an element."""
    shot = driver.find_element(By.CSS_SELECTOR, selector).screenshot_as_png
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def differ(first, second):
    return first.shape != second.shape or np.abs(first - second).max() > 30


def press(driver, *keys):
    driver.switch_to.active_element.send_keys(*keys)


def value(driver):
    return driver.find_element(By.CSS_SELECTOR, ".wipe").get_attribute("value")


@pytest.mark.parametrize("page", ["improved", "initial kept"], indirect=True)
def test_the_verdict_is_read_first_and_nothing_is_wrong_or_fetched(page, runs, request):
    name = request.node.callspec.params["page"]
    told = json.loads((runs / name / "result.json").read_text())
    assert told["outcome"] == name
    lines = page.find_element(By.TAG_NAME, "body").text.splitlines()
    assert lines[0] == name.capitalize()
    assert name.capitalize() in page.title
    assert lines.index("What to do next") < lines.index("Before and after")
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events
             if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked[0].startswith("file://")
    assert all(url.startswith("data:image/") for url in asked[1:])
    pictures = page.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == 6
    script = "return arguments[0].complete && arguments[0].naturalWidth"
    assert all(page.execute_script(script, each) > 100 for each in pictures)


def near(shot, colour):
    """Where a picture has the colour "#rrggbb", on white."""
    return np.abs(shot - [int(colour[k : k + 2], 16) for k in (1, 3, 5)]).max(-1) < 40


@pytest.mark.parametrize("page", ["calibrated"], indirect=True)
def test_the_star_of_calibration_stands_at_the_scale_that_was_chosen(page, runs):
    told = json.loads((runs / "calibrated" / "calibration.json").read_text())
    chosen = told["chosen"]["input"]
    assert chosen["invert"]  # of the dark discs
    section = page.find_element(By.CSS_SELECTOR, ".calibration")
    assert section.is_displayed()
    assert section.find_element(By.TAG_NAME, "h2").text == "How the images go in"
    assert f"Scale {chosen['scale']:.3g}, finds objects of about" in section.text
    assert "inverted (dark made bright)" in section.text
    name = section.find_element(By.TAG_NAME, "img").accessible_name
    assert f"chosen: scale {chosen['scale']:.3g}, score {told['chosen']['score']:.2f}" in name
    assert page.get_log("browser") == []

    shot = seen(page, ".calibration img")
    first, second, *_ = COLOURS.values()
    flat = near(shot, first)  # as it is: nothing is found at any scale
    assert not any(each["score"] for each in told["trials"] if not each["input"]["invert"])
    line = np.flatnonzero(flat[flat.sum(1).argmax()])
    scales = np.log([each["input"]["scale"] for each in told["trials"]])
    share = (np.log(chosen["scale"]) - scales.min()) / (scales.max() - scales.min())
    ink = ndimage.uniform_filter(near(shot, _INK).astype(float), 7)
    row, column = np.unravel_index(ink.argmax(), ink.shape)
    assert ink[row, column] > 0.8  # no letter, and no axis
    assert abs(column - (line[0] + share * (line[-1] - line[0]))) < 6
    best = np.flatnonzero(near(shot, second)[:, column - 12 : column + 12].any(1))
    assert abs(row - best[0]) < 12  # where the other line is highest


def test_the_slider_wipes_from_after_to_before(page):
    slider = page.find_element(By.CSS_SELECTOR, ".wipe")
    slider.send_keys(Keys.HOME)
    after = seen(page)
    slider.send_keys(Keys.END)
    before = seen(page)
    assert differ(before, after)
    slider.send_keys(Keys.HOME)
    for _ in range(50):
        slider.send_keys(Keys.ARROW_RIGHT)
    both, middle = seen(page), before.shape[1] // 2
    assert value(page) == "50"
    rows = slice(60, None)  # below the names
    assert not differ(both[rows, : middle - 6], before[rows, : middle - 6])
    assert not differ(both[rows, middle + 6 :], after[rows, middle + 6 :])


def test_buttons_show_one_and_take_the_outlines_away(page):
    def click(what):
        page.find_element(By.CSS_SELECTOR, f"[data-{what}]").click()

    shots = {}
    for name, at in (("before", 100), ("after", 0)):
        click(f'show-button="{at}"')
        assert [each.get_attribute("value") for each in
                page.find_elements(By.CSS_SELECTOR, ".wipe")] == [str(at)] * 2  # fmt: skip
        for which in ("all", "changed", "none"):
            click(f'outlines-button="{which}"')
            shots[name, which] = seen(page)[60:]
    assert differ(shots["before", "all"], shots["after", "all"])
    assert differ(shots["before", "all"], shots["before", "none"])
    assert not differ(shots["before", "none"], shots["after", "none"])  # the same pixels
    pressed = page.find_elements(By.CSS_SELECTOR, ".tools [aria-pressed=true]")
    assert [each.text.split()[0] for each in pressed] == ["After", "None"]


def test_changes_alone_hide_what_is_the_same(page):
    press(page, "b")
    press(page, "o")
    same = page.find_elements(By.CSS_SELECTOR, ".outlines .same")
    others = page.find_elements(By.CSS_SELECTOR, ".outlines path:not(.same)")
    assert others
    assert not any(each.is_displayed() for each in same)
    assert all(each.value_of_css_property("display") != "none" for each in others)


def test_keys_flip_wherever_one_is(page):
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys("b")
    before = seen(page)
    assert value(page) == "100"
    body.send_keys("a")
    assert value(page) == "0"
    assert differ(before, seen(page))
    page.execute_script("document.querySelector('.pair').focus()")
    press(page, " ")
    assert value(page) == "100"
    first, second = page.find_elements(By.CSS_SELECTOR, ".wipe")
    assert second.get_attribute("value") == "0"  # that one alone
    press(page, Keys.TAB)
    assert page.switch_to.active_element == first


def test_a_click_or_enter_enlarges_and_escape_reduces(page):
    pair = page.find_element(By.CSS_SELECTOR, ".pair")
    small = pair.size["width"]
    pair.click()
    assert pair.size["width"] > 1.2 * small
    button = page.find_element(By.CSS_SELECTOR, ".enlarge")
    assert (button.text, button.get_attribute("aria-pressed")) == ("Reduce", "true")
    press(page, Keys.ESCAPE)
    assert pair.size["width"] == small
    page.execute_script("arguments[0].focus()", pair)
    press(page, Keys.ENTER)
    assert pair.size["width"] > 1.2 * small


def test_the_legend_counts_what_the_function_counts(page, runs):
    examples = runs / "changed" / "examples"
    counts = [
        fates(*(tifffile.imread(examples / f"{k}-{when}.tif") for when in ("before", "after")))
        for k in range(2)
    ]
    pooled = summed(each.counts for each in counts)
    assert sum(pooled[fate] > 0 for fate in FATES) >= 3
    legend = [each.text for each in page.find_elements(By.CSS_SELECTOR, ".legend li")]
    assert legend == [f"{pooled[f]} {'the ' * (f == 'same')}{f}" for f in FATES]
    said = [each.text for each in page.find_elements(By.CSS_SELECTOR, ".counts")]
    for each, words in zip(counts, said, strict=True):
        found = {word: int(n) for n, word in re.findall(r"(\d+) (?:the )?(\w+)", words)}
        assert found == {fate: n for fate, n in each.counts.items() if n}
    sides = [each.get_attribute("textContent") for each in
             page.find_elements(By.CSS_SELECTOR, ".side")]  # fmt: skip
    assert sides == [text for each in counts for text in
                     (f"Before {len(each.before)}", f"After {len(each.after)}")]  # fmt: skip


def test_a_phone_shows_it_without_scrolling_sideways(page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.refresh()
    assert page.execute_script("return innerWidth") == 390
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    for each in page.find_elements(By.CSS_SELECTOR, ".pair, .wipe, .next, h1, .tools button, pre"):
        assert each.rect["x"] >= 0
        assert each.rect["x"] + each.rect["width"] <= 390
    page.find_element(By.CSS_SELECTOR, ".enlarge").click()
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390


def side_by_side(page):
    first, second = (each.rect for each in page.find_elements(By.CSS_SELECTOR, ".pane")[:2])
    tools = page.find_elements(By.CSS_SELECTOR, ".js-only")
    assert tools
    assert not any(each.is_displayed() for each in tools)
    assert first["y"] == second["y"]
    assert second["x"] >= first["x"] + first["width"]
    clip = page.find_element(By.CSS_SELECTOR, ".after").value_of_css_property("clip-path")
    return clip == "none"


def test_without_scripts_both_are_there_side_by_side(page):
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.refresh()
    assert side_by_side(page)
    assert differ(seen(page, ".before"), seen(page, ".after"))
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_on_paper_both_are_there_side_by_side(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert side_by_side(page)
    paper = page.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert base64.b64decode(paper).startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["improved", "initial kept", "changed"], indirect=True)
def test_writing_stands_out_in_light_and_dark(page, scheme):
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})

    def brightness(colour):
        rgb = np.array([float(n) for n in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    def behind(element):
        find = (
            "let e = arguments[0], c; while (e) { c = getComputedStyle(e).backgroundColor;"
            "if (!c.endsWith(', 0)')) return c; e = e.parentElement } return 'rgb(255,255,255)'"
        )
        return page.execute_script(find, element)

    paper = brightness(behind(page.find_element(By.TAG_NAME, "main")))
    assert (paper > 0.5) == (scheme == "light")
    for selector in ("h1", ".lead", ".why", ".next p", "dt", ".counts", ".note", "pre", "th",
                     "tr.chosen td", ".tools [aria-pressed=true]"):  # fmt: skip
        element = page.find_element(By.CSS_SELECTOR, selector)
        pair = brightness(element.value_of_css_property("color")), brightness(behind(element))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5, selector


def test_everything_has_a_name_for_those_who_listen(page):
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    named = page.find_elements(By.CSS_SELECTOR, "img, input, button, .pair, .pane svg, summary")
    assert len(named) > 15
    assert all(each.accessible_name.strip() for each in named)
    levels = [int(each.tag_name[1]) for each in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


EVIL = "\"'><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"


def test_hostile_names_run_nothing(page, runs, tmp_path):
    copy = tmp_path / f"r{EVIL.replace('/', '')}"
    shutil.copytree(runs / "initial kept", copy)
    told = json.loads((copy / "result.json").read_text())
    told |= {"examples": [EVIL] * len(told["examples"]), "reason": EVIL, "rejected": "gentle"}
    (copy / "result.json").write_text(json.dumps(told))
    open_page(page, write_report(copy, [EVIL]))
    assert page.execute_script("return window.broken") is None
    assert page.get_log("browser") == []
    assert page.find_element(By.CSS_SELECTOR, ".example h3").text == EVIL
    assert value(page) == "50"


def test_what_gets_into_the_page_all_the_same_is_not_run(page, runs, tmp_path):
    """Were a name not escaped one day, the browser would still refuse."""
    file = write_report(runs / "changed")
    broken = tmp_path / "broken.html"
    assert file.read_text().count("<h2>Run it again</h2>") == 1
    broken.write_text(file.read_text().replace("<h2>Run it again</h2>", html.unescape(EVIL)))
    open_page(page, broken)
    assert page.execute_script("return window.broken") is None
    assert value(page) == "50"  # our own script is
    refused = [entry["message"] for entry in page.get_log("browser")]
    assert any("Content Security Policy" in each for each in refused)
