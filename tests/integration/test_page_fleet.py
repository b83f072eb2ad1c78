"""The fleet on the page, in a real Chromium, with a real daemon on a real broker."""

import json
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("selenium", reason="the driver of Chromium, in the extra `dev`")

from selenium.webdriver.common.keys import Keys

from edge.transports.mqtt.fleet import MAX_DEVICES
from tests.integration.harness import Broker, Daemon, Listener
from tests.integration.http_client import ask, url_of
from tests.support.browser import Browser, contrast

pytestmark = pytest.mark.slow
STATE = {"type": "health", "state": "idle", "queued": 3, "model": "m@1", "backend": "ort", "version": "9"}
ILL = STATE | {"state": "degraded", "failure": "<img src=x onerror=alert(1)> the GPU is gone"}
METRICS = {"type": "metrics", "tokens_per_s": 412.74, "watts": {"VDD_IN": 9.26}}
HEADS = ["Device", "State", "Bundle", "Version", "Backend", "Queue", "Tokens/s", "Watts", "Last seen"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the file."""
    started = Browser()
    yield started
    started.close()


@pytest.fixture
def other(browser: Browser, broker: Broker, listen: Callable[..., Listener]) -> Listener:
    """Speaks for other devices."""
    return listen(broker, "edgelm/none")


@pytest.fixture
def daemon(browser: Browser, start_daemon: Callable[..., Daemon], broker: Broker) -> Daemon:
    return start_daemon("--mqtt", broker.address, "--http", "127.0.0.1:0", DEVICE="kitchen")


def rows(page: Browser) -> dict[str, list[str]]:
    """The table's cells, by device."""
    script = (
        "return [...document.querySelectorAll('#fleet tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    return {name: cells for name, *cells in page.js(script)}


def shows(page: Browser, device: str, state: str) -> None:
    page.until(lambda: rows(page).get(device, ["", ""])[0] == state, f"{device} is {state}")


def test_page_fleet_shows_every_device_as_it_is(browser: Browser, daemon: Daemon, other: Listener) -> None:
    other.publish("edgelm/attic/state", STATE, retain=True)
    other.publish("edgelm/attic/metrics", METRICS, retain=True)
    browser.open(url_of(daemon))
    shows(browser, "attic", "idle")
    shows(browser, "kitchen", "idle")
    assert browser.js("return [...document.querySelectorAll('#fleet thead th')].map((h) => h.textContent)") == HEADS
    assert rows(browser)["attic"][1:8] == ["m@1", "9", "ort", "3", "412.7", "9.3", "–"]
    assert rows(browser)["kitchen"][7].endswith(" ago")
    assert browser.text("fleet-count").startswith("2 of 2 devices of 127.0.0.1:")

    other.publish("edgelm/attic/availability", b"offline", retain=True)
    shows(browser, "attic", "vanished")
    assert browser.text("fleet-count").startswith("1 of 2 devices of 127.0.0.1:")
    for kind in ("availability", "state", "metrics"):
        other.publish(f"edgelm/attic/{kind}", b"", retain=True)
    browser.until(lambda: list(rows(browser)) == ["kitchen"], "it is cleared away")
    assert browser.write("Tom").startswith("Tom") and browser.complaints() == []


def test_page_fleet_takes_what_devices_say_as_text(browser: Browser, daemon: Daemon, other: Listener) -> None:
    other.publish("edgelm/shed/state", ILL, retain=True)
    browser.open(url_of(daemon))
    shows(browser, "shed", "degraded")
    assert browser.text("failures") == f"shed: {ILL['failure']}"
    assert browser.all("#fleet img") == [] and browser.complaints() == []
    other.publish("edgelm/shed/state", STATE, retain=True)
    shows(browser, "shed", "idle")
    assert browser.text("failures") == ""


def test_page_fleet_says_that_the_broker_is_lost(browser: Browser, daemon: Daemon, broker: Broker) -> None:
    browser.open(url_of(daemon))
    shows(browser, "kitchen", "idle")
    broker.stop()
    lost = f"The broker {broker.address} is lost; these are the devices heard last."
    browser.until(lambda: browser.text("fleet-trouble") == lost, "a sentence")
    assert "kitchen" in rows(browser)
    browser.open(url_of(daemon))
    assert browser.write("Tom").startswith("Tom"), "the rest goes on"
    broker.start()
    browser.until(lambda: browser.text("fleet-trouble") == "", "its return")


def test_page_fleet_of_a_broker_that_is_not_there_is_a_sentence(
    browser: Browser, daemon: Daemon, broker: Broker
) -> None:
    broker.stop()
    browser.open(url_of(daemon))
    browser.until(lambda: f"the broker {broker.address} cannot be reached" in browser.text("fleet-trouble"), "why")
    assert not browser.shown("fleet-table") and browser.text("error") == ""
    broker.start()
    shows(browser, "kitchen", "idle")


def test_page_fleet_is_absent_without_a_broker(browser: Browser, start_daemon: Callable[..., Daemon]) -> None:
    browser.open(url_of(start_daemon("--http", "127.0.0.1:0")))
    assert browser.write("Tom").startswith("Tom")
    assert not browser.shown("fleet")
    assert not any(url.endswith("/fleet") for url in browser.requested()), "nor is it asked for"


def test_page_fleet_is_not_asked_for_by_a_page_that_is_not_seen(browser: Browser, daemon: Daemon) -> None:
    browser.open(url_of(daemon))
    shows(browser, "kitchen", "idle")
    browser.js("Object.defineProperty(document, 'hidden', {get: () => window.away}); window.away = true")
    before = browser.text("fleet-count")
    browser.js("document.getElementById('fleet-count').textContent = ''")
    pause = "setTimeout(arguments[0], 5000)"
    browser.driver.execute_async_script(pause)
    assert browser.text("fleet-count") == ""
    browser.js("window.away = false")
    browser.until(lambda: browser.text("fleet-count") == before, "it is seen again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fleet_is_legible_on_a_phone(browser: Browser, daemon: Daemon, other: Listener, scheme: str) -> None:
    other.publish("edgelm/shed/state", ILL | {"model": "a-long-name-of-a-bundle@00b83432ffa1"}, retain=True)
    browser.open(url_of(daemon), width=360, height=740, prefers_color_scheme=scheme)
    shows(browser, "shed", "degraded")
    shows(browser, "kitchen", "idle")
    assert browser.js("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    for selector in ("#fleet h2", "#fleet-count", "thead th", "tbody th", "tbody td", ".unwell", "#failures li"):
        assert contrast(browser, selector) >= 4.5, selector


def test_page_fleet_is_reached_and_scrolled_by_keyboard(browser: Browser, daemon: Daemon) -> None:
    browser.open(url_of(daemon), width=360, height=740)
    shows(browser, "kitchen", "idle")
    browser.find("#write").send_keys(Keys.TAB)
    assert browser.js("return document.activeElement.id") == "fleet-table"
    focused = browser.driver.switch_to.active_element
    assert focused.value_of_css_property("outline-style") == "solid"
    browser.press(Keys.ARROW_RIGHT)
    browser.until(lambda: browser.js("return document.activeElement.scrollLeft > 0"), "it scrolls")


def test_page_fleet_speaks_to_screen_readers(browser: Browser, daemon: Daemon) -> None:
    browser.open(url_of(daemon))
    shows(browser, "kitchen", "idle")
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {
        (node["role"]["value"], node["name"]["value"]) for node in nodes if not node.get("ignored") and "name" in node
    }
    title = "Devices of this broker"
    assert {("heading", title), ("table", title), ("rowheader", "kitchen"), ("columnheader", "Last seen")} <= named
    live = browser.js(
        "return [...document.querySelectorAll('#fleet [role=status], #fleet [aria-live]')].map((e) => e.id)"
    )
    assert live == ["fleet-trouble"], "a table that changes every second is not read out"


def test_page_fleet_stays_usable_with_as_many_devices_as_there_may_be(
    browser: Browser, daemon: Daemon, other: Listener
) -> None:
    for number in range(MAX_DEVICES + 5):
        other.client.publish(f"edgelm/d{number}/state", json.dumps(STATE), retain=True)
    browser.open(url_of(daemon))
    browser.until(lambda: len(rows(browser)) == MAX_DEVICES, "all of them")
    assert browser.text("fleet-count").endswith("More than 1000: the others are left out.")
    assert len(ask(daemon, "/fleet").body) < 2**19
    assert browser.write("Tom").startswith("Tom")
