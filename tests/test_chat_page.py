"""The chat page of the streaming example, driven by a browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

import interpreter
from proxy import Proxy
from support import eventually, texts

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` brings Playwright")
expect = playwright.expect
expect.set_options(timeout=30_000)  # milliseconds; nothing waits for it unless something is broken

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXAMPLE = """
import example_fastapi_streaming as example
example.TIMEOUTS["serverSelectionTimeoutMS"] = 1_000  # the tests wait for it whenever they cut the line
example.main()
"""

WINDOW: Any = {"width": 1200, "height": 800}
NICE = "Nice to meet you. I keep your name with the session, so that you can see it beside this conversation."

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH"),
    pytest.mark.may_block,  # Playwright runs an event loop in the thread of the tests
]


class Served:
    """The example as a process of its own, which may be killed and started again."""

    def __init__(self, uri: str, database: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        address, _, options = uri.partition("?")
        self._environment = {**os.environ, "MONGODB_URI": f"{address.rstrip('/')}/{database}?{options}"}
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self._process = interpreter.start(EXAMPLE, "--port", self.port, env=self._environment)
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._process.communicate()[1]
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return True  # it listens once it has started
        except OSError:
            return False

    def is_healthy(self) -> bool:
        """Return whether it reaches its database."""
        return httpx.get(f"{self.url}/ready", verify=False).status_code == 200

    def end(self, how: signal.Signals = signal.SIGTERM) -> str:
        """End the process and return what it logged."""
        self._process.send_signal(how)
        return self._process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--renderer-process-limit=1",
                "--in-process-gpu",
                "--disable-extensions",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def module_database(driver: Any) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    yield name
    driver.drop_database(name)


@pytest.fixture(scope="module")
def line(server: str) -> Iterator[Proxy]:
    """The line between the example and its database, which a test may cut."""
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def served(line: Proxy, module_database: str) -> Iterator[Served]:
    process = Served(line.uri, module_database)
    yield process
    process.end()


@pytest.fixture
def stored(driver: Any, module_database: str) -> Any:
    return driver[module_database]["agent_sessions"]


@pytest.fixture(scope="module")
def tab(browser: Any) -> Any:
    """The tab in which all tests open the page: a new one starts another process of the browser."""
    return browser.new_context(viewport=WINDOW, reduced_motion="reduce").new_page()


@contextmanager
def opened(tab: Any, url: str) -> Iterator[Any]:
    """Open the page as in a new tab, and see that no script fails and that nothing is fetched from elsewhere."""
    wrong: list[str] = []
    asked: list[str] = []
    unanswered: set[Any] = set()

    def began(request: Any) -> None:
        asked.append(request.url)
        if not request.url.endswith("/events"):  # these streams end with the page
            unanswered.add(request)

    notes: dict[Any, Callable[[Any], None]] = {
        "pageerror": lambda error: wrong.append(str(error)),
        "request": began,
        "requestfinished": lambda request: unanswered.discard(request),
        "requestfailed": lambda request: unanswered.discard(request),
    }
    for event, note in notes.items():
        tab.on(event, note)
    tab.goto(url)
    yield tab
    # A request that is still being served could create its session again when the next test has deleted it. When a tab
    # is closed, its requests end without an event.
    eventually(lambda: not unanswered or tab.wait_for_timeout(10))
    tab.evaluate("sessionStorage.clear()")
    for event, note in notes.items():
        tab.remove_listener(event, note)
    assert wrong == []
    home = url.partition("#")[0].rstrip("/")
    assert [each for each in asked if not each.startswith((f"{home}/", "data:"))] == []
    assert asked


@pytest.fixture
def page(tab: Any, served: Served, stored: Any) -> Iterator[Any]:
    stored.delete_many({})
    with opened(tab, served.url) as page:
        yield page


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def said(page: Any) -> list[str]:
    return page.locator(".said").all_inner_texts()


def ask(page: Any, text: str, answer: str) -> None:
    say(page, text)
    expect(page.locator(".said").last).to_have_text(answer)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    # The page reads the conversation again when an answer is complete, and shows what can be done with it then.
    expect(page.locator(".message").last.get_by_role("button", name="Good answer")).to_be_visible()


def answered(page: Any) -> None:
    page.get_by_role("button", name="Send").wait_for()


def begins(page: Any) -> None:
    """Wait until the page shows the beginning of a story, which takes two seconds; `expect` asks once a second."""
    page.locator(".writing .said", has_text="Once upon").wait_for()


def test_tokens_arrive_as_they_are_made(page: Any) -> None:
    page.evaluate(
        """() => {
          window.lengths = new Set();
          new MutationObserver(() => {
            const writing = document.querySelector(".writing .said");
            if (writing) window.lengths.add(writing.textContent.length);
          }).observe(document.getElementById("messages"), { childList: true, subtree: true, characterData: true });
        }"""
    )
    say(page, "Tell me a story")
    expect(page.get_by_role("status")).to_have_text("Answering…")
    answered(page)
    assert page.evaluate("window.lengths.size") > 20
    assert said(page)[1].endswith("The end.")
    expect(page.get_by_role("status")).to_have_text("")


def test_the_conversation_is_there_after_a_reload_and_after_a_restart(page: Any, served: Served) -> None:
    ask(page, "Hello, my name is Ada.", NICE)
    before = said(page)
    page.reload()
    expect(page.locator(".said")).to_have_count(3)
    assert said(page) == before

    served.end()
    say(page, "What is my name?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("What is my name?")
    assert said(page) == before

    served.start()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".said").last).to_have_text("Your name is Ada.")
    page.reload()
    expect(page.locator(".said")).to_have_text([*before, "What is my name?", "Your name is Ada."], use_inner_text=True)


def test_metadata_and_tokens_are_shown_as_they_come(page: Any) -> None:
    expect(page.locator("#metadata")).to_have_text("None yet")
    say(page, "Call me Grace, please")
    expect(page.locator("#metadata")).to_contain_text("nameGrace")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()  # while it is still being answered
    answered(page)
    total = int(re.search(r"Total(\d+)", page.locator("#usage").inner_text().replace("\n", ""))[1])
    assert total > 0
    ask(page, "And now?", "Hello! I have been sent 5 messages.")
    assert int(page.locator("#usage dd").last.inner_text()) > total
    expect(page.get_by_role("heading", level=1)).to_have_text("Call me Grace, please")


def test_sessions_are_listed_and_switched_and_deleted_when_that_is_meant(page: Any, stored: Any) -> None:
    ask(page, "first chat", "Hello! I have been sent 1 message.")
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.locator(".said")).to_have_count(0)
    ask(page, "second chat", "Hello! I have been sent 1 message.")
    names = page.locator("#list .open span")
    expect(names).to_have_text(["second chat", "first chat"])
    names.last.click()
    expect(page.locator(".said").first).to_have_text("first chat")
    expect(page.locator("#list [aria-current]")).to_contain_text("first chat")
    page.go_back()
    expect(page.locator(".said").first).to_have_text("second chat")

    deleted: list[str] = []
    page.on("request", note := lambda request: request.method == "DELETE" and deleted.append(request.url))
    delete = page.get_by_role("button", name="Delete second chat")
    delete.click()
    page.get_by_role("button", name="Keep").click()
    assert stored.count_documents({}) == 2
    delete.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(names).to_have_text(["first chat"])
    expect(page.locator(".said")).to_have_count(0)
    assert [document["title"] for document in stored.find()] == ["first chat"]
    page.remove_listener("request", note)
    assert len(deleted) == 1


def test_a_fork_goes_its_own_way(page: Any) -> None:
    ask(page, "one", "Hello! I have been sent 1 message.")
    ask(page, "two", "Hello! I have been sent 3 messages.")
    page.get_by_role("button", name="Go on from here in a new chat").first.click()
    expect(page.locator("#list .open span")).to_have_text(["one (branch)", "one"])
    expect(page.locator(".said")).to_have_count(2)
    ask(page, "another two", "Hello! I have been sent 3 messages.")
    page.locator("#list .open").last.click()
    answers = ["Hello! I have been sent 1 message.", "Hello! I have been sent 3 messages."]
    expect(page.locator(".said")).to_have_text(["one", answers[0], "two", answers[1]])


def test_what_fails_is_said_and_can_be_tried_again(page: Any) -> None:
    say(page, "please fail")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The answer failed: ConnectionError.")
    page.reload()
    expect(alert).to_contain_text("The last message was not answered.")
    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The answer failed: ConnectionError.")
    ask(page, "and now?", "Hello! I have been sent 2 messages.")
    expect(alert).to_be_hidden()


def test_what_was_read_before_a_message_was_sent_is_not_shown_after_it(page: Any) -> None:
    ask(page, "hello", "Hello! I have been sent 1 message.")
    late: list[Any] = []
    page.route("**/api/chats/*", lambda route: route.continue_() if late else late.append((route, route.fetch())))
    say(page, "please fail")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The answer failed: ConnectionError.")
    eventually(lambda: late or page.wait_for_timeout(10))
    ask(page, "and now?", "Hello! I have been sent 4 messages.")
    with page.expect_response("**/api/chats/*"):
        route, response = late[0]
        route.fulfill(response=response)
    page.evaluate("new Promise((done) => setTimeout(done, 50))")
    expect(alert).to_be_hidden()
    page.unroute_all()


def test_a_lost_server_is_said_and_the_page_recovers(page: Any, served: Served) -> None:
    say(page, "Tell me a story")
    begins(page)
    served.end(signal.SIGKILL)
    expect(page.get_by_role("status")).to_have_text("Connection lost. Reconnecting…")
    served.start()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The last message was not answered.")
    expect(page.locator(".said")).to_have_text(["Tell me a story"])
    alert.get_by_role("button", name="Try again").click()
    answered(page)
    expect(page.locator(".said").last).to_contain_text("The end.")
    expect(page.locator(".said")).to_have_count(2)


# The database is unreachable.

AWAY = "The database is unreachable"
SOON = 10_000  # milliseconds within which the page must say so


@pytest.fixture
def begun(page: Any, served: Served, line: Proxy) -> Iterator[Any]:
    """The page with a conversation; the test may leave the database unreachable."""
    ask(page, "My name is Ada.", NICE)
    expect(page.locator("#list .open span")).to_have_text(["My name is Ada."])
    yield page
    line.accept()
    eventually(served.is_healthy)


def away(page: Any) -> None:
    """The page says that the database is unreachable."""
    page.get_by_role("alert").filter(has_text=AWAY).wait_for(timeout=SOON)


def refused(page: Any) -> None:
    """The page says that the database is unreachable; the alert is dismissed for the next one."""
    away(page)
    expect(page.get_by_role("alert").get_by_role("button", name="Try again")).to_be_visible()
    page.evaluate("document.getElementById('alert').hidden = true")


def test_whatever_is_done_without_the_database_is_refused_in_words_and_nothing_is_lost(begun: Any, line: Proxy) -> None:
    page, alert = begun, begun.get_by_role("alert")
    before = said(page)
    line.refuse()
    page.locator("#list .open").click()
    refused(page)
    page.get_by_role("button", name="Good answer").last.click()
    refused(page)
    page.get_by_role("button", name="Delete My name is Ada.").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    refused(page)
    expect(page.locator("#list .open span")).to_have_text(["My name is Ada."])
    assert said(page) == before

    say(page, "What is my name?")
    away(page)
    expect(page.get_by_role("status")).to_have_text("")
    assert said(page) == before
    box = page.get_by_label("Message", exact=True)
    expect(box).to_have_value("What is my name?")

    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_be_hidden()
    away(page)
    expect(box).to_have_value("What is my name?")

    line.accept()
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".said").last).to_have_text("Your name is Ada.")
    expect(box).to_have_value("")
    assert said(page) == [*before, "What is my name?", "Your name is Ada."]


def test_a_new_chat_and_a_reload_without_the_database_show_no_empty_page(begun: Any, line: Proxy) -> None:
    page, alert = begun, begun.get_by_role("alert")
    box = page.get_by_label("Message", exact=True)
    before = said(page)
    line.refuse()
    page.get_by_role("button", name="New chat", exact=True).click()
    refused(page)
    say(page, "half a thought")
    away(page)
    expect(box).to_have_value("half a thought")
    expect(page.locator("#list .open span")).to_have_text(["My name is Ada."])  # what is known stays

    page.go_back()
    page.reload()
    away(page)
    expect(page.locator("#messages")).to_have_text("This conversation cannot be shown now.")
    expect(page.locator("#list")).to_have_text("The sessions cannot be shown now.")
    expect(page.get_by_role("heading", level=1)).to_have_text("Not available")
    expect(box).to_have_value("half a thought")

    line.accept()
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".said")).to_have_text(before, use_inner_text=True)
    expect(page.locator("#list .open span")).to_have_text(["My name is Ada."])
    expect(alert).to_be_hidden()


def test_an_answer_that_loses_its_database_says_so_and_can_be_tried_again(begun: Any, line: Proxy) -> None:
    page, alert = begun, begun.get_by_role("alert")
    say(page, "Tell me a story")
    begins(page)
    line.refuse()
    expect(alert).to_contain_text("database is unreachable")  # it is stored when it is complete
    expect(page.get_by_role("status")).to_have_text("")
    assert said(page)[3] == "Tell me a story"

    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_be_hidden()
    away(page)
    assert said(page)[3] == "Tell me a story"

    line.accept()
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".said")).to_have_count(5)
    expect(page.locator(".said").last).to_contain_text("The end.")
    answered(page)
    assert said(page)[3] == "Tell me a story"


def test_a_reload_follows_the_answer_under_way(page: Any) -> None:
    under_way = page.locator(".writing .said", has_text="Once upon")
    for stories in range(1, 6):  # on a busy machine, a reload can take longer than a story
        say(page, "Tell me a story")
        begins(page)
        page.reload()
        eventually(lambda told=stories: under_way.is_visible() or page.get_by_text("The end.").count() == told)
        if followed := under_way.is_visible():
            break
    assert followed
    answered(page)
    assert [text[:9] for text in said(page)] == ["Tell me a", "Once upon"] * stories


def test_a_closed_tab_loses_nothing_and_another_browser_sees_none_of_it(served: Served, stored: Any) -> None:
    stored.delete_many({})
    chat, session = "/api/chats/mine", "/api/sessions/mine"
    with (
        httpx.Client(base_url=served.url, verify=False) as tab,
        httpx.Client(base_url=served.url, verify=False) as other,
    ):
        assert other.get(chat).status_code == other.get("/api/sessions").status_code == 401
        for each in (tab, other):
            each.get("/")
        assert tab.post(f"{chat}/messages", json={"text": "Tell me a story"}).status_code == 202
        with tab.stream("GET", f"{chat}/events") as events:
            assert next(line for line in events.iter_lines() if "Once" in line)
        eventually(lambda: len(stored.find_one()["agents"]["assistant"]["messages"]) == 2)

        assert other.get("/api/sessions").json()["sessions"] == []
        said = other.post(f"{chat}/messages", json={"text": "not mine"})
        found = [other.get(chat), other.get(session), other.delete(session), said]
        assert {each.status_code for each in found} == {404}
        assert tab.get(session).status_code == 200
    told = texts(stored.find_one()["agents"]["assistant"]["messages"])
    assert told[0] == "Tell me a story"
    assert told[1].endswith("The end.")
    assert len(told) == 2


def test_two_tabs_do_not_answer_twice(page: Any, stored: Any) -> None:
    ask(page, "hello", "Hello! I have been sent 1 message.")
    with opened(page.context.new_page(), page.url) as other:
        expect(other.locator(".said")).to_have_count(2)
        say(page, "Tell me a story")
        begins(page)
        say(other, "Tell me a story, too")
        expect(other.get_by_role("alert")).to_contain_text("The last message is being answered.")
        page.keyboard.press("Escape")  # stops it, unless it is over
        answered(other)
        answered(page)
        assert len(stored.find_one()["agents"]["assistant"]["messages"]) == 4
        expect(other.locator(".said")).to_have_text(said(page), use_inner_text=True)
    other.close()


def test_by_keyboard(page: Any) -> None:
    box = page.get_by_label("Message", exact=True)
    expect(box).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a story")
    page.keyboard.press("Enter")
    begins(page)
    page.keyboard.press("Escape")
    answered(page)
    assert said(page)[0] == "line one\na story"
    assert "The end." not in said(page)[-1]
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "new":
            break
    page.keyboard.press("Enter")
    expect(box).to_be_focused()
    expect(page.locator(".said")).to_have_count(0)


BACKGROUNDS = {"light": "rgb(246, 247, 249)", "dark": "rgb(21, 24, 29)"}
CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = channels(getComputedStyle(node).backgroundColor);
      if (color[3] !== 0) return color;
    }
  };
  return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() &&
      [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())).map((node) => {
    const [a, b] = [luminance(channels(getComputedStyle(node).color)), luminance(behind(node))];
    return [node.className || node.tagName, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
  });
}
"""


def test_text_is_legible_and_fits_a_phone(page: Any) -> None:
    ask(page, "a" * 200 + " hello", "Hello! I have been sent 1 message.")
    for scheme, background in BACKGROUNDS.items():
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 10
        assert [(name, ratio) for name, ratio in contrasts if ratio < 4.5] == []
    page.emulate_media(color_scheme="light")

    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.get_by_role("button", name="New chat", exact=True)).to_be_hidden()
    page.get_by_role("button", name="Sessions").click()
    expect(page.get_by_role("button", name="New chat", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New chat", exact=True)).to_be_hidden()
    page.get_by_role("button", name="Details").click()
    expect(page.locator("#usage")).to_contain_text("Total")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Sessions").click()
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.locator("#list")).to_be_hidden()
    page.set_viewport_size(WINDOW)


def test_what_is_said_is_text_never_markup_and_gone_with_its_session(page: Any, stored: Any) -> None:
    markup = '<img src="x" onerror="window.broken = true"><b>bold</b>'
    ask(page, markup, "Hello! I have been sent 1 message.")
    page.reload()
    expect(page.locator(".said").first).to_have_text(markup)
    expect(page.locator("#list .open span")).to_have_text([markup[:80]])
    assert page.evaluate("window.broken") is None

    expect(page.locator("#usage")).not_to_have_text(re.compile(r"Total\s*0\b"))  # the page has read what it shows
    stored.delete_many({})
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("This session does not exist any more.")
    ask(page, "again", "Hello! I have been sent 1 message.")
    eventually(lambda: stored.count_documents({}) == 1)


def test_a_question_is_edited(page: Any, stored: Any) -> None:
    for number, text in enumerate(("one", "two")):
        ask(page, text, f"Hello! I have been sent {2 * number + 1} message{'s' if number else ''}.")
    box = page.get_by_label("Message", exact=True)
    box.fill("half a thought")
    page.get_by_role("button", name="Edit this message").nth(1).click()
    expect(box).to_have_value("two")
    page.get_by_role("button", name="Cancel").click()
    expect(box).to_have_value("half a thought")
    expect(page.locator(".said")).to_have_count(4)

    page.get_by_role("button", name="Edit this message").nth(1).click()
    ask(page, "another two", "Hello! I have been sent 3 messages.")
    shown = ["one", "Hello! I have been sent 1 message.", "another two", "Hello! I have been sent 3 messages."]
    expect(page.locator(".said")).to_have_text(shown)
    # The answer before the edit said the same, so `ask` did not wait for this one to be complete.
    answered(page)
    expect(page.locator(".message").last.get_by_role("button", name="Good answer")).to_be_visible()
    expect(page.locator("#editing")).to_be_hidden()
    expect(box).to_have_value("half a thought")

    page.get_by_role("button", name="Edit this message").first.click()
    ask(page, "My name is Ada.", NICE)
    page.reload()
    expect(page.locator(".said")).to_have_text(["My name is Ada.", "", NICE], use_inner_text=True)
    assert [message["message_id"] for message in stored.find_one()["agents"]["assistant"]["messages"]] == [0, 1, 2, 3]


def test_an_answer_is_rated_and_made_again(page: Any, stored: Any) -> None:
    ask(page, "one", "Hello! I have been sent 1 message.")
    good, bad = (page.get_by_role("button", name=f"{kind} answer") for kind in ("Good", "Bad"))
    bad.click()
    expect(bad).to_have_attribute("aria-pressed", "true")
    good.click()
    expect(bad).to_have_attribute("aria-pressed", "false")
    eventually(lambda: len(stored.find_one()["feedbacks"]) == 2)
    assert [(entry["message_id"], entry["rating"]) for entry in stored.find_one()["feedbacks"]] == [
        (1, "down"),
        (1, "up"),
    ]
    page.reload()
    expect(good).to_have_attribute("aria-pressed", "true")
    expect(bad).to_have_attribute("aria-pressed", "false")

    before = stored.find_one()["agents"]["assistant"]["messages"][1]["message"]["tracking_id"]
    page.get_by_role("button", name="Answer again").click()
    eventually(lambda: page.wait_for_timeout(10) or answers(stored) not in ([], [before]))
    answered(page)
    page.reload()
    expect(page.locator(".said")).to_have_text(["one", "Hello! I have been sent 1 message."])
    expect(good).to_have_attribute("aria-pressed", "false")
    ask(page, "My name is Ada.", NICE)
    expect(page.get_by_role("button", name="Answer again")).to_have_count(1)
    page.get_by_role("button", name="Answer again").click()
    answered(page)
    expect(page.locator(".said").last).to_have_text(NICE)
    expect(page.locator(".said")).to_have_count(5)


def answers(stored: Any) -> list[str]:
    messages = stored.find_one()["agents"]["assistant"]["messages"]
    return [each["message"]["tracking_id"] for each in messages if each["message"]["role"] == "assistant"]
