"""The page in a real Chromium, on daemons that are not as the usual one: with pictures, with a token, gone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="the driver of Chromium, in the extra `dev`")

from selenium.webdriver.common.keys import Keys

from tests.integration.harness import Daemon
from tests.integration.http_client import ask, complete, url_of
from tests.support.browser import Browser, set_field
from tests.support.picture_files import picture_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the file."""
    started = Browser()
    yield started
    started.close()


def test_page_takes_words_and_pictures(browser: Browser, conditioned_bundle: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(picture_file(1, size=(1600, 1200)))
    able = Daemon(tmp_path, conditioned_bundle, "--http", "127.0.0.1:0")
    try:
        limits = ask(able, "/v1/models").object["data"][0]["limits"]
        browser.open(url_of(able))
        assert browser.shown("conditions") and str(limits["words"]) in browser.text("words-hint")
        set_field(browser, seed=4, max_tokens=6, guidance=1)
        browser.fill("words", "dog, red boat")
        fields = {"prompt": "Tom", "seed": 4, "max_tokens": 6, "guidance": 1}
        with_words = complete(able, words=["dog", "red boat"], **fields).object
        assert browser.write("Tom") == "Tom" + with_words["choices"][0]["text"] and browser.text("error") == ""

        browser.fill("words", "")
        browser.find("#images").send_keys(str(photo))
        browser.until(lambda: browser.all("#pictures img"), "the picture is shown")
        sent = str(browser.js("return document.querySelector('#pictures img').src")).partition(",")[2]
        assert len(sent) < limits["message_bytes"] / 2
        with_picture = complete(able, images=[sent], **fields).object
        assert browser.write("Tom") == "Tom" + with_picture["choices"][0]["text"] and browser.text("error") == ""

        browser.find("#pictures button").click()
        assert not browser.all("#pictures img")
        browser.fill("words", "?!")
        assert browser.write("Tom") == ""
        assert browser.text("error") == complete(able, words=["?!"], **fields).error["message"]
        browser.all("#decode input")[1].click()
        assert not browser.shown("conditions") and browser.write("Tom") != "", "a canvas takes none"
        assert browser.complaints() == []
    finally:
        able.close()


def test_page_asks_for_the_token(browser: Browser, debug_bundle: Path, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret-s3cret-s3cret\n")
    secret.chmod(0o600)
    flags = ("--backend", "fake", "--http", "127.0.0.1:0")
    guarded = Daemon(tmp_path, debug_bundle, *flags, HTTP_TOKEN_FILE=str(secret))
    try:
        browser.open(url_of(guarded))
        assert browser.shown("unlock") and not browser.shown("ask") and browser.text("error") == ""
        browser.fill("token", "wrong")
        browser.press(Keys.ENTER)
        browser.until(lambda: browser.text("error") == "This is not the token of this device.", "a refusal")
        browser.fill("token", secret.read_text().strip())
        browser.press(Keys.ENTER)
        browser.until(lambda: browser.shown("ask"), "the form")
        assert browser.write("Tom").startswith("Tom") and browser.text("error") == ""
        assert browser.js("return [Object.values(sessionStorage), Object.values(localStorage), document.cookie]") == [
            [secret.read_text().strip()],
            [],
            "",
        ]
        browser.open(url_of(guarded))
        assert browser.shown("ask"), "it is kept while the tab is open"
    finally:
        guarded.close()


def test_page_says_that_the_daemon_is_gone(browser: Browser, debug_bundle: Path, tmp_path: Path) -> None:
    slow = Daemon(tmp_path, debug_bundle, "--backend", "fake:20", "--http", "127.0.0.1:0")
    try:
        browser.open(url_of(slow))
        browser.find("#write").click()
        browser.until(lambda: browser.all("article dd"), "it begins")
        slow.process.kill()
        browser.until_idle()
        assert browser.text("error") == "The device hung up before the text was whole."
        assert browser.text("status") == "" and browser.find("article .text").text, "what came stays"
    finally:
        slow.close()
    browser.write("Tom")
    assert browser.text("error") == "The device does not answer: is its daemon running?"
