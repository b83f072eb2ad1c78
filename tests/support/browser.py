"""A headless Chromium on the daemon's page: what a reader does there, sees, and what the browser complains of."""

import json
import os
import shutil
from collections.abc import Callable
from typing import Any, Final

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

PROGRAMS: Final = ("chromium", "chromedriver")
WAIT_S: Final = 30.0
FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
)
"""Without a sandbox, because tests may run as root, and meet the daemon's own page alone."""
WATCH: Final = """
window.seen = [];
const look = () => {
  const text = document.querySelector("article:last-child .text");
  if (text === null) return;
  const at = (styles) => [...text.querySelectorAll(styles)].map((span) => span.textContent).join("");
  window.seen.push({firm: at(".given, .written").length, draft: at(".draft"), open: at(".open").length,
                    text: text.textContent});
};
new MutationObserver(look).observe(document.getElementById("stories"), {childList: true, subtree: true});
"""


def missing_browser() -> str:
    """Why no browser can be started, or nothing. In CI nothing: there it has to be."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if not absent or "CI" in os.environ:
        return ""
    return f"{' and '.join(absent)} not installed: apt-get install chromium chromium-driver"


class Browser:
    """Chromium, started; `close` ends it."""

    def __init__(self) -> None:
        if reason := missing_browser():
            pytest.skip(reason)
        options = Options()
        for flag in FLAGS:
            options.add_argument(flag)
        options.binary_location = shutil.which(PROGRAMS[0]) or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which(PROGRAMS[1])))

    def open(self, url: str, *, width: int = 1000, height: int = 900, scale: float = 1, **media: str) -> None:
        """Load a page, with an empty log. media: features such as prefers_color_scheme="dark"."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(url)
        self.until(lambda: self.shown("ask") or self.shown("unlock") or self.text("error") != "", "the page is ready")
        self.driver.execute_script(WATCH)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, id: str) -> str:
        """What an element says."""
        return str(self.js("return document.getElementById(arguments[0]).textContent", id))

    def shown(self, id: str) -> bool:
        return bool(self.js("return document.getElementById(arguments[0]).checkVisibility()", id))

    def js(self, script: str, *args: object) -> Any:
        return self.driver.execute_script(script, *args)

    def fill(self, id: str, text: str) -> None:
        """Type text into a field instead of what is there."""
        field = self.find(f"#{id}")
        field.clear()
        field.send_keys(text)

    def press(self, *keys: str, holding: str = "") -> None:
        """Keys, to whatever has the focus."""
        actions = ActionChains(self.driver)
        if holding:
            actions.key_down(holding)
        actions.send_keys(*keys)
        if holding:
            actions.key_up(holding)
        actions.perform()

    def write(self, prompt: str) -> str:
        """Ask for a text and wait for its end; what stands there then."""
        self.fill("prompt", prompt)
        self.find("#write").click()
        self.until_idle()
        return str(self.js("return document.querySelector('article:last-child .text')?.textContent ?? ''"))

    def until_idle(self) -> None:
        """Wait until a text, or what became of it, stands there."""
        self.until(lambda: self.text("write") == "Write", "the page is done")

    def until(self, condition: Callable[[], object], what: str) -> None:
        WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda _: condition(), f"waited in vain: {what}")

    def seen(self) -> list[dict[str, Any]]:
        """Each state of the last text so far: characters given or committed, drafted, and still open."""
        seen: list[dict[str, Any]] = self.js("return window.seen")
        return seen

    def figures(self, article: int = 1) -> dict[str, float]:
        """A text's figures by their names."""
        groups = self.all(f"article:nth-of-type({article}) .figures div")
        pairs = [self.js("return [...arguments[0].children].map((c) => c.textContent)", group) for group in groups]
        return {name: float(value) for name, value in pairs}

    def complaints(self) -> list[str]:
        """What the browser's log has, but for answers of the daemon that are refusals: those it logs as well."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] != "network"]

    def requested(self) -> set[str]:
        """Addresses that were asked since the page was loaded."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}

    def close(self) -> None:
        self.driver.quit()


def set_field(page: Browser, **values: object) -> None:
    """Type into settings, which are opened for it."""
    if page.js("return !document.querySelector('details').open"):
        page.find("summary").click()
    for name, value in values.items():
        page.fill(name, str(value))


def luminance(color: list[float]) -> float:
    """Of an sRGB colour (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Browser, selector: str) -> float:
    """Of an element's text and what is painted behind it (WCAG 2.2)."""
    colors = page.js(
        """let element = document.querySelector(arguments[0]);
        const rgb = (name) => getComputedStyle(element)[name].match(/[\\d.]+/g).map(Number);
        const ink = rgb("color");
        while (rgb("backgroundColor")[3] === 0) element = element.parentElement;
        return [ink, rgb("backgroundColor")];""",
        selector,
    )
    darker, lighter = sorted(luminance(color[:3]) for color in colors)
    return (lighter + 0.05) / (darker + 0.05)
