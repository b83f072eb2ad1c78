"""The page in a real Chromium, on the daemon with the model that ships."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the driver of Chromium, in the extra `dev`")

from selenium.webdriver.common.keys import Keys

from tests.integration.harness import ROOT, Daemon, until
from tests.integration.http_client import ask, complete, events, url_of
from tests.support.browser import Browser, contrast, luminance, set_field

pytestmark = pytest.mark.slow
DONE = "Done."
WITH_GAPS = "Tom had a ___:3 and it was ___:4."
GAPS = ["Tom had a ", {"gap": 3}, " and it was ", {"gap": 4}, "."]
DRAWN = """
window.drawn = [];
const look = () => requestAnimationFrame(() => {
  const text = document.querySelector("article:last-child .text")?.textContent;
  if (text && text !== window.drawn.at(-1)) window.drawn.push(text);
  look();
});
look();
"""
"""Keeps each text that a frame was drawn with. It asks for each frame before the page does, and so sees the text of the
frame before, which the page is about to change."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the file."""
    started = Browser()
    yield started
    started.close()


@pytest.fixture(scope="module")
def daemon(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The shipped model on this processor."""
    folder = tmp_path_factory.mktemp("daemon")
    started = Daemon(folder, ROOT / "bundle" / "tinystories", "--http", "127.0.0.1:0")
    yield started
    started.close()


@pytest.fixture
def page(browser: Browser, daemon: Daemon) -> Iterator[Browser]:
    """The page, loaded. At its end the browser has nothing to complain of, and has asked nobody but the daemon."""
    browser.open(url_of(daemon))
    yield browser
    assert browser.complaints() == []
    requested = browser.requested()
    assert requested and all(url.startswith((url_of(daemon), "data:")) for url in requested), requested


def test_page_shows_a_text_as_it_is_written(page: Browser) -> None:
    set_field(page, seed=7)
    text = page.write("Lily found a")
    seen = page.seen()
    firm = sorted({state["firm"] for state in seen})

    assert text.startswith("Lily found a ") and len(text) > 100
    assert len(firm) >= 3, "it appears in steps"
    assert any(state["draft"] for state in seen), "drafts are shown as drafts"
    assert not seen[-1]["draft"] and seen[-1]["text"] == text
    assert page.find(".given").text.strip() == "Lily found a"
    figures = page.figures()
    assert figures["tokens per pass"] == pytest.approx(figures["tokens"] / figures["passes"], abs=0.006)
    assert figures["tokens per pass"] > 1.2 and figures["tokens/s"] > 0 and figures["seed"] == 7
    assert page.text("status") == DONE


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("Once upon a", {"max_tokens": 4, "seed": 1, "window": 1}),
        ("Once upon a time", {"max_tokens": 8, "seed": 1}),
        (GAPS, {"seed": 25}),
    ],
)
def test_page_draws_a_short_text_in_steps(
    page: Browser, daemon: Daemon, given: str | list[Any], fields: dict[str, int]
) -> None:
    """What an eye can see: each state that the daemon sent of the text, and the whole, for a frame at least."""
    asked = {"prompt": given} if isinstance(given, str) else {"segments": given}
    snapshots = [data for name, data in events(daemon, snapshots=True, **asked, **fields) if name == "snapshot"]
    sent = ["".join(part["text"] for part in json.loads(data)["parts"]) for data in snapshots]
    set_field(page, **fields)
    page.js(DRAWN)
    text = page.write(given if isinstance(given, str) else WITH_GAPS)
    page.until(lambda: page.js("return window.drawn.at(-1)") == text, "a frame with the whole text")
    drawn = page.js("return window.drawn")
    assert len(sent) >= 2
    assert drawn[-len(sent) - 1 :] == [*sent, text] and len(drawn) <= len(sent) + 2, drawn  # before: what was given


def test_page_text_is_that_of_the_daemon(page: Browser, daemon: Daemon) -> None:
    set_field(page, seed=3, max_tokens=20, temperature=0.5, top_p=0.9)
    whole = complete(daemon, prompt="Tom", seed=3, max_tokens=20, temperature=0.5, top_p=0.9).object
    assert page.write("Tom") == "Tom" + whole["choices"][0]["text"]
    assert page.figures()["passes"] == whole["usage"]["steps"]


def test_page_fills_gaps(page: Browser, daemon: Daemon) -> None:
    set_field(page, seed=25)
    text = page.write(WITH_GAPS)

    assert text == complete(daemon, segments=GAPS, seed=25).object["choices"][0]["text"]
    assert [span.text for span in page.all(".given")] == ["Tom had a ", " and it was ", "."]
    assert len(page.all(".written")) == 2, "what was written is told from what was given"


def test_page_canvas_fills_masked_places(page: Browser) -> None:
    page.all("#decode input")[1].click()
    set_field(page, seed=1, steps=200, max_tokens=100)
    text = page.write("Once upon a time")
    seen = page.seen()
    open_places = [state["open"] for state in seen]

    assert max(open_places) > 50 and open_places[-1] == 0
    assert sum(a > b for a, b in pairwise(open_places)) >= 3
    assert text.startswith("Once upon a time") and seen[-1]["text"] == text
    assert not page.shown("compare"), "only blocks have drafts"


def test_page_settings_are_those_of_the_bundle(page: Browser, daemon: Daemon) -> None:
    (model,) = ask(daemon, "/v1/models").object["data"]
    set_field(page)
    for decoder, radio in zip(model["decoders"], page.all("#decode input"), strict=True):
        radio.click()
        shown = {field.get_dom_attribute("id"): field for field in page.all("#settings input") if field.is_displayed()}
        for name, value in model[decoder].items():
            if name in shown:
                assert float(shown[name].get_dom_attribute("placeholder") or "") == value
        limited = "window" if decoder == "blocks" else "steps"
        assert page.text(f"{limited}-hint").endswith(f" to {model['limits'][limited]}")
    chosen = page.js("return document.getElementById('selection').options[0].text")
    assert chosen == model["canvas"]["selection"]
    assert not page.shown("conditions"), "this bundle takes neither words nor pictures"


@pytest.mark.parametrize(("field", "value"), [("temperature", 99), ("window", "8"), ("seed", "1.5"), ("top_k", "many")])
def test_page_says_the_daemons_sentence_at_the_field(page: Browser, daemon: Daemon, field: str, value: Any) -> None:
    set_field(page, **{field: value})
    assert page.write("Tom") == ""
    number = {"8": 8, "1.5": 1.5}.get(value, value)
    assert page.text("error") == complete(daemon, prompt="Tom", **{field: number}).error["message"]
    assert f"`{field}`" in page.text("error")
    assert [element.get_dom_attribute("id") for element in page.all("[aria-invalid]")] == [field]
    page.fill(field, "")
    assert page.write("Tom") != "" and page.text("error") == ""


def test_page_compares_with_drafting_off(page: Browser) -> None:
    text = page.write("Once upon a time")
    page.find("#compare").click()
    page.until(lambda: page.text("verdict"), "a verdict")
    assert [article.text for article in page.all("article .text")] == [page.all("article .text")[0].text] * 2
    with_drafts, without = page.figures(1), page.figures(2)
    assert page.seen()[-1]["text"] == text
    assert with_drafts["seed"] == without["seed"] and with_drafts["tokens"] == without["tokens"]
    assert without["tokens per pass"] == 1 < with_drafts["tokens per pass"]
    passes = f"{with_drafts['passes']:.0f} passes with drafts, {without['passes']:.0f} without."
    assert page.text("verdict") == f"Both texts are the same: {passes}"


def test_page_replays_what_was_seen(page: Browser) -> None:
    set_field(page, seed=1)
    text = page.write("Lily")
    page.js("window.seen.length = 0")
    page.find("#replay").click()
    page.until(lambda: len({state["firm"] for state in page.seen()}) >= 2, "it is shown again")
    page.press(Keys.ESCAPE)
    page.until_idle()
    assert page.find("article .text").text == text.strip()


def test_page_stop_cancels(page: Browser, daemon: Daemon) -> None:
    def cancelled() -> float:
        text = ask(daemon, "/metrics").body.decode()
        (line,) = re.findall(r'requests_ended_total\{.*code="cancelled".*\} (\S+)', text)
        return float(line)

    before = cancelled()
    page.all("#decode input")[1].click()
    set_field(page, steps=1024)
    page.fill("prompt", "Once upon a time")
    page.find("#write").click()
    page.until(lambda: page.all("article dd"), "it begins")
    page.find("#write").click()
    page.until_idle()
    assert page.text("status") == "Stopped." and page.all(".open")
    until(lambda: cancelled() == before + 1, "the daemon has heard of it")
    assert ask(daemon, "/health").object["state"] == "idle"


def test_page_works_by_keyboard_alone(page: Browser) -> None:
    assert page.js("return document.activeElement.id") == "prompt"
    page.press("a", holding=Keys.CONTROL)
    page.press("Tom")
    reached = []
    for _ in range(20):
        page.press(Keys.TAB)
        focused = page.driver.switch_to.active_element
        reached.append(focused.get_dom_attribute("id") or focused.tag_name)
        outline = focused.value_of_css_property("outline-style"), focused.value_of_css_property("outline-width")
        assert outline == ("solid", "2px"), f"focus is not seen on {reached[-1]}"
        if focused.tag_name == "summary":
            page.press(" ")
        if reached[-1] == "seed":
            page.press("5")
        if reached[-1] == "write":
            break
    assert reached[-1] == "write" and {"input", "summary", "temperature", "seed", "window"} <= set(reached)
    page.press(Keys.ENTER)
    page.until(lambda: page.text("status") == DONE, "the text")
    assert page.js("return document.activeElement.id") == "write", "the focus stays"
    assert page.figures()["seed"] == 5
    page.press(Keys.TAB, Keys.TAB, Keys.ENTER)
    page.until(lambda: page.text("verdict"), "the comparison")
    page.find("#prompt").click()
    page.press(Keys.ENTER, holding=Keys.CONTROL)
    page.until(lambda: not page.text("verdict") and page.text("status") == DONE, "another text")


def test_page_speaks_to_screen_readers(page: Browser) -> None:
    set_field(page)
    page.write("Tom")
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node.get("ignored") and "name" in node and node["role"]["value"] not in ("none", "InlineTextBox")
    }
    kinds = ("textbox", "radio", "button", "combobox", "DisclosureTriangle")
    controls = [entry for entry in named if entry[0] in kinds]
    assert len(controls) >= 12 and all(name for _, name in controls), controls
    assert {("textbox", "Prompt"), ("radio", "from the left"), ("button", "Write"), ("heading", "Text")} <= named
    live = page.js("return [...document.querySelectorAll('[role=status], [role=alert], [aria-live]')].map((e) => e.id)")
    assert live == ["status", "error", "verdict", "fleet-trouble"], (
        "the text itself is no live region: it would be read at every pass"
    )
    assert page.find("article").get_dom_attribute("aria-busy") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_legible_in_both_schemes(page: Browser, daemon: Daemon, scheme: str) -> None:
    page.open(url_of(daemon), prefers_color_scheme=scheme)
    set_field(page, temperature="warm")
    page.write("Tom")
    assert contrast(page, "#error") >= 4.5
    page.fill("temperature", "")
    page.write("Tom")
    background = page.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (luminance(background) < 0.1) == (scheme == "dark")
    for selector in (".written", ".given", ".hint", "#device", "label", "#write", "#compare", "dt", "#status"):
        assert contrast(page, selector) >= 4.5, selector


def test_page_fits_a_phone(page: Browser, daemon: Daemon) -> None:
    page.open(url_of(daemon), width=360, height=740)
    set_field(page, max_tokens=30)
    page.write("Tom said " + "a" * 90)
    page.find("#compare").click()
    page.until(lambda: page.text("verdict"), "the comparison")
    assert page.js("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    heights = page.js("return [...document.querySelectorAll('button')].map((b) => b.offsetHeight).filter(Boolean)")
    assert min(heights) >= 40, "large enough for a finger"


def test_page_moves_nothing_where_motion_is_reduced(page: Browser, daemon: Daemon) -> None:
    durations = "return [...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration)"
    assert set(page.js(durations)) != {"0s"}
    page.open(url_of(daemon), prefers_reduced_motion="reduce")
    assert set(page.js(durations)) == {"0s"}


def test_page_takes_text_as_text(page: Browser) -> None:
    set_field(page, max_tokens=2)
    assert page.write("<img src=x onerror=alert(1)><b>Tom</b>").startswith("<img src=x onerror=alert(1)><b>Tom</b>")
    assert page.all("article img, article b") == []


def test_page_runs_no_script_but_its_own(page: Browser) -> None:
    page.js("const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)")
    assert page.js("return window.broken") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints())
