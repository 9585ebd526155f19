"""The page in a real browser, as tests use it, and what they ask of its server beside it."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

if TYPE_CHECKING:
    from tests.e2e.conftest import RunningServer

DONE = re.compile(r"^Done in ")
PATIENCE_MS = 60_000
LONG = {"steps": 1000, "n": 2, "sampler": "ddpm", "seed": 1}
# As LONG, for tests that wait until it is done. At a tick every SELDOM_S it lasts longer than they wait for the page.
ENDING = LONG | {"steps": 250}
SELDOM_S = 0.3
QUICK = {"steps": 5, "n": 1, "sampler": "ddim", "seed": 1}
POSTED = r"/jobs$"
EVENTS = r"/jobs/\w+/events"
expect.set_options(timeout=PATIENCE_MS)


class Page:
    """A tab with the page in it; what it complains about on the console is kept."""

    def __init__(self, browser: Any, url: str, into: Any = None, key: str | None = None, **context: Any) -> None:
        """into: a browser's context for the tab; else one of its own. key: to sign in with."""
        # Nothing plays by itself then: what a test sees, stands still.
        self.server_url = re.match(r"http://[^/]+", url)[0]
        self.context = into or browser.new_context(**{"accept_downloads": True, "reduced_motion": "reduce"} | context)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.lost = "^$"  # what the browser says of answers that a test has lost
        self.requests: list[str] = []
        self.tab.on("console", self._hear)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("websocket", lambda socket: self.requests.append(socket.url))
        self.tab.goto(url)
        if key is not None:
            self.sign_in(key)
        expect(self.at("#model")).to_contain_text(
            re.compile(r"\b(small|colour|alpha|planes|numbers|fashion-mnist-32)\b")
        )
        self.wait_for_the_opening()

    def wait_for_the_opening(self) -> None:
        """Wait until the first sample is shown, or has been given up."""
        expect(self.at("body")).to_have_attribute("data-opening", re.compile("shown|absent|left"))

    def sign_in(self, key: str) -> None:
        self.tab.get_by_label("Key", exact=True).fill(key)
        self.tab.get_by_role("button", name="Sign in").click()

    def _hear(self, message: Any) -> None:
        """A refusal that the page shows to its user is an error to the browser, and to nobody else."""
        shown = rf"responded with a status of (401|404|410|422|429|503|504)|{self.lost}"
        if message.type == "error" and not re.search(shown, message.text):
            self.complaints.append(message.text)

    def lose_answers(self, pattern: str, count: int | None = None) -> None:
        """Let requests reach the server, and its answers, all or so many, not the page."""

        def lose(route: Any) -> None:
            route.fetch()
            route.abort("connectionreset")

        self.lost = "net::ERR_CONNECTION_RESET"
        self.tab.route(re.compile(pattern), lose, **({"times": count} if count else {}))

    def refuse(self, pattern: str, status: int) -> None:
        """Answer as a proxy does that has had enough."""
        self.tab.route(re.compile(pattern), lambda route: route.fulfill(status=status, body="<h1>No</h1>"))

    def hear_status(self) -> None:
        """Keep all that the page says from now on, for `heard`."""
        self.tab.evaluate(
            """() => { window.heard = []; const status = document.getElementById('status');
            new MutationObserver(() => window.heard.push(status.textContent)).observe(status, {childList: true}); }"""
        )

    def heard(self) -> list[str]:
        return self.tab.evaluate("() => window.heard")

    def press(self, name: str) -> None:
        self.tab.get_by_role("button", name=name, exact=True).click()

    def look_elsewhere(self, hidden: bool) -> None:
        """As if another tab were in front. Playwright's tabs all think that they are."""
        self.tab.evaluate(
            """(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
            document.dispatchEvent(new Event('visibilitychange')); }""",
            hidden,
        )

    def open_more(self) -> None:
        """Unfold the rest of the form."""
        self.at("#more").evaluate("(more) => (more.open = true)")

    def fill(self, **fields: object) -> None:
        expect(self.at("form[inert]")).to_have_count(0)
        self.open_more()
        for name, value in fields.items():
            field = self.at(f"[name={name}]")
            if name in ("sampler", "class_label"):
                field.select_option(label=str(value))
            else:
                field.fill(str(value))

    def sample(self, **fields: object) -> None:
        self.fill(**fields)
        self.press("Sample")

    def make(self, **fields: object) -> None:
        """Sample, and wait until it is done."""
        self.sample(**fields)
        self.wait_until(DONE)

    def cancel(self) -> None:
        self.press("Cancel")
        self.wait_until("Cancelled.")

    def give(self, file: Path) -> None:
        """Choose a picture of one's own."""
        self.at("#noise-file").set_input_files(file)

    @property
    def job_id(self) -> str:
        """The job in the address."""
        return str(self.tab.url.rpartition("=")[2])

    @property
    def form(self) -> dict[str, str]:
        names = ("class_label", "sampler", "steps", "guidance", "n", "seed")
        return {name: self.at(f"[name={name}]").input_value() for name in names}

    def at(self, selector: str) -> Any:
        return self.tab.locator(selector)

    def says(self, selector: str, text: re.Pattern[str] | str | list[str]) -> None:
        """Wait until a part of the page has this in its text."""
        expect(self.at(selector)).to_contain_text(text)

    def has(self, count: int, selector: str) -> None:
        """Wait until there are so many of something."""
        expect(self.at(selector)).to_have_count(count)

    def wait_until(self, text: re.Pattern[str] | str) -> None:
        """Wait for what the status says."""
        expect(self.at("#status")).to_have_text(text)

    def go_on_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something outside the page while its routes are handled, which is done in this thread."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not holds():
            assert time.monotonic() < deadline, "it did not happen"
            self.tab.wait_for_timeout(20)

    def wait_for_step(self) -> None:
        step = re.compile(r"^Step \d+ of \d+, t = \d+, ")
        expect(self.at("#progress-text")).to_have_text(step)

    def check_that_all_can_use_it(self) -> None:
        """Check what a program can of WCAG, and that nothing sticks out."""
        found = Axe().run(self.tab).response["violations"]
        assert not found, [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
        assert self.tab.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")

    def wait_for_picture(self, selector: str, wanted: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while self.picture(selector) != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def picture(self, selector: str) -> bytes:
        """The bytes of an image that the page shows."""
        numbers = self.tab.evaluate(
            "async (s) => [...new Uint8Array(await (await fetch(document.querySelector(s).src)).arrayBuffer())]",
            selector,
        )
        return bytes(numbers)


OpenPage = Callable[..., Page]


def job_ids(server: "RunningServer") -> set[str]:
    """Of durable jobs: the samples that the page opens with are listed too while they run."""
    jobs = httpx.get(f"{server.url}/jobs", params={"limit": 200}).json()["jobs"]
    return {job["id"] for job in jobs if job["durable"]}


def post_job(server: "RunningServer", **spec: object) -> str:
    return httpx.post(f"{server.url}/jobs", json=spec).raise_for_status().json()["id"]


def cancel_job(server: "RunningServer", job_id: str) -> None:
    httpx.post(f"{server.url}/jobs/{job_id}/cancel").raise_for_status()
