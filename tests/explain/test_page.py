"""The page in a real browser: it opens, nothing fails, pointing changes what is shown."""

import json
import re

import pytest
import torch
from PIL import Image

from prism_deco.backbones.transforms import letterbox
from prism_deco.explain.gae import Relevance
from prism_deco.explain.geometry import PatchFrame
from prism_deco.explain.page import Panel, Section, side_by_side, write_page
from prism_deco.explain.words import Word

NASTY = '</script><script>document.title = "broken"</script><img src=x onerror="document.title = 1"> & %DATA% <!--'


def one_run(name, grid, query_grid, words, image):
    generator = torch.Generator().manual_seed(len(name))
    patches = PatchFrame(letterbox(image.size, 64), grid, 64 // grid[0])
    n, m, t = grid[0] * grid[1], query_grid[0] * query_grid[1], len(words)
    merged = [Word(text, (k,)) for k, text in enumerate(words)]

    def maps(method):
        query, patch = torch.rand(t, m, generator=generator), torch.rand(m, n, generator=generator)
        return Relevance(
            method, NASTY, " ".join(words), words, merged, query, patch, query @ patch, query_grid, patches, image
        )

    return Section(
        image, NASTY, [Panel(name, "avgpool", {m: maps(m) for m in ("r-gae", "attention")})], (0.1, 0.2, 0.5, 0.9)
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two runs with different grids, about one wide image."""
    image = Image.new("RGB", (120, 70), (40, 90, 160))
    runs = [
        one_run("a <b>run</b>", (8, 8), (4, 4), ["a", "red", NASTY], image),
        one_run("another", (4, 4), (4, 4), ["blue", "cross"], image),
    ]
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(path, NASTY, side_by_side([[run] for run in runs]))
    return path


def test_the_page_is_one_file_and_all_text_is_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert [item.name for item in page.parent.iterdir()] == ["index.html"]
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(", text)
    assert "onerror" not in re.sub(r"&lt;.*?&gt;|\\u003c.*?\\u003e", "", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    (section,) = data["sections"]
    assert section["prompt"] == NASTY and [panel["run"] for panel in section["panels"]] == ["a <b>run</b>", "another"]


def test_sections_are_joined_by_image_and_question():
    image, other = Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "red")
    first = [Section(image, "p", []), Section(other, "p", [])]
    joined = side_by_side([first, [Section(image, "q", []), Section(other, "p", [])]])
    assert [(section.image, section.prompt) for section in joined] == [(image, "p"), (other, "p"), (image, "q")]


PIXELS = "return Array.from(document.querySelectorAll('.picture canvas'), c => c.toDataURL())"


def point(browser, element, dx=0, dy=0):
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element_with_offset(element, dx, dy).perform()


def caption_at(browser, element):
    point(browser, browser.find_element("css selector", "h1"))
    point(browser, element)
    return browser.find_element("css selector", ".caption").text


def test_pointing_at_words_patches_and_visual_tokens_changes_the_page(browser, page):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page.as_uri())
    find = browser.find_elements
    assert browser.title == NASTY and not browser.get_log("browser")
    assert [h.text for h in find("css selector", "h3")] == ["a <b>run</b>", "another"]
    words = find("css selector", ".answer button")
    assert [w.text for w in words] == ["a", "red", NASTY, "blue", "cross"]
    width, height = (
        browser.execute_script(f"return document.querySelector('.picture').client{side}")
        for side in ("Width", "Height")
    )
    assert width / height == pytest.approx(120 / 70, rel=0.02)
    at_rest = browser.execute_script(PIXELS)

    # On a busy machine the page may still be moving under the pointer.
    WebDriverWait(browser, 20).until(lambda _: "red" in caption_at(browser, words[1]))
    on_word = browser.execute_script(PIXELS)
    assert on_word[0] != at_rest[0] and on_word[1] == at_rest[1]  # each run has its own answer
    point(browser, words[0])
    assert browser.execute_script(PIXELS)[0] not in (on_word[0], at_rest[0])

    point(browser, find("css selector", ".picture")[0], 20, 10)
    levels = [float(w.get_attribute("data-level")) for w in words]
    assert max(levels) > 0.3 and len(set(levels[:3])) > 1 and max(levels[3:]) > 0  # both runs answer
    pointed = browser.execute_script(PIXELS)
    assert pointed[0] != at_rest[0] and pointed[1] != at_rest[1]

    point(browser, find("css selector", ".tokens canvas")[1], -40, -40)
    assert "visual token 1 of 16" in find("css selector", ".caption")[1].text

    point(browser, find("css selector", "h1")[0])
    assert browser.execute_script(PIXELS) == at_rest
    find("css selector", ".methods button")[1].click()
    assert browser.execute_script(PIXELS)[0] != at_rest[0]
    assert not browser.get_log("browser")


def test_keys_move_through_the_grids(browser, page):
    from selenium.webdriver import ActionChains, Keys

    browser.get(page.as_uri())
    tokens, picture = (browser.find_elements("css selector", name)[0] for name in (".tokens canvas", ".picture"))
    caption = browser.find_elements("css selector", ".caption")[0]
    ActionChains(browser).send_keys(Keys.TAB).perform()  # keys from here on: the focus is shown
    browser.execute_script("arguments[0].focus()", tokens)
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert "visual token 7 of 16" in caption.text
    ActionChains(browser).send_keys(Keys.ARROW_UP, Keys.ARROW_UP).perform()
    assert "visual token 3 of 16" in caption.text
    browser.execute_script("arguments[0].focus()", picture)
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).perform()
    assert "row 2, column 1" in caption.text


def test_relevance_in_the_padding_is_said(browser, page):
    """A letterboxed image of 120 x 70 fills 58 % of the grid's height."""
    browser.get(page.as_uri())
    said = browser.find_elements("css selector", ".caption")[0].text
    share = int(re.search(r"\((\d+) % in the padding around the image\)", said).group(1))
    assert 30 < share < 55  # of a random map


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(browser, page, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
