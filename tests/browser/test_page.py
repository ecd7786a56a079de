"""GET /docs in a real browser: what a person can see and do there."""

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from scripts.rabbitmq import free_port
from tests.conftest import Service, Start
from tests.rabbitmq import RabbitMQ
from tests.support import openapi

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no browser: apt-get install chromium chromium-driver"
)
# No sandbox, since a container cannot provide one; and no traffic to the browser's maker.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
JSON = {"Content-Type": "application/json"}
DESKTOP, PHONE = (1280, 900), (360, 740)


class Page:
    """The page, open in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load it again, in a desktop's window with light colours, and wait for the example."""
        self.resize(*DESKTOP)
        self.prefer("prefers-color-scheme", "light")
        self.driver.get(f"{url}/docs")
        self.driver.execute_script("localStorage.clear(); document.documentElement.style.colorScheme = ''")
        self.until(lambda: self.get("body").get_property("value"))

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, feature: str, value: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": feature, "value": value}]})

    def get(self, id: str) -> WebElement:
        return self.driver.find_element(By.ID, id)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], object], timeout_seconds: float = 10.0) -> None:
        WebDriverWait(self.driver, timeout_seconds, 0.05).until(lambda _: condition())

    def choose(self, summary: str) -> None:
        Select(self.get("example")).select_by_visible_text(summary)

    def fill(self, id: str, text: str) -> None:
        self.run(
            "const it = document.getElementById(arguments[0]); it.value = arguments[1];"
            "it.dispatchEvent(new Event('input', { bubbles: true })); it.dispatchEvent(new Event('change'))",
            *(id, text),
        )

    def send(self) -> str:
        """Press the button; return the status shown with the answer."""
        self.run("document.getElementById('outcome').replaceChildren()")
        self.get("send").click()
        return self.status()

    def status(self) -> str:
        self.until(lambda: self.text("#status"))
        return self.text("#status")

    def complaints(self) -> list[str]:
        """Return what the browser has logged since the last call: script errors, blocked content, failed requests."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries]

    def answer(self) -> Any:
        return json.loads(self.text("#answer"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(CHROMEDRIVER)))
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def url(broker: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A producer that these tests share."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    environment = {"AMQP_URL": broker.url, "HTTP_PORT": str(port), "QUEUE_NAME": "test-page"}
    service = Service("producer", address, environment, tmp_path_factory.mktemp("producer"))
    service.wait_until_ready()
    yield address
    service.stop()


@pytest.fixture
def other_site() -> Iterator[str]:
    """A page of another site: for a browser, localhost and 127.0.0.1 are two."""

    class Blank(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Blank) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def count(url: str, sample: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{sample} ")).rpartition(" ")[2])


def post(url: str, body: bytes) -> None:
    with urllib.request.urlopen(urllib.request.Request(f"{url}/process", body, JSON)) as answer:
        assert answer.status == 200


def is_listening(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/healthz").close()
    except OSError:
        return False
    return True


def test_sending_the_example_shows_200_and_the_event(page: Page, url: str) -> None:
    page.open(url)
    assert page.send() == "200 OK"
    assert re.fullmatch(r"[\d.]+ (ms|s)", page.text("#time"))
    assert page.answer() == openapi.EVENT
    assert not page.get("faults").is_displayed()


def test_the_answer_is_shown_as_it_came(page: Page, url: str) -> None:
    """JavaScript would read other numbers: 1 for 1.0."""
    page.open(url)
    event = {**openapi.EVENT, "client_id": 12345678901234567890}
    event["data"] = {"license_id": "", "preds": [{"image_frame": '"{[,:\\', "prob": 1, "tags": []}]}
    page.fill("body", json.dumps(event))
    assert page.send() == "200 OK"
    assert '"prob": 1.0' in page.text("#answer")
    assert page.answer()["client_id"] == "12345678901234567890"
    assert page.answer()["data"]["preds"][0]["image_frame"] == '"{[,:\\'


def test_a_bad_example_shows_each_fault_by_its_place(page: Page, url: str) -> None:
    page.open(url)
    page.choose("Several faults at once (refused)")
    assert page.send().startswith("422 ")
    places = page.run("return [...document.querySelectorAll('#faults code')].map((it) => it.textContent)")
    assert places == [
        *("device_id", "created_at", "data.preds[0].prob", "data.preds[0].tags"),
        *("data.preds[1].image_frame", "data.preds[1].prob"),
    ]
    assert "Field required" in page.text("#faults")
    page.choose("Not JSON (refused)")
    assert page.send().startswith("422 ")
    assert "JSON decode error" in page.text("#faults")


def test_a_batch_shows_the_faults_of_its_events(page: Page, url: str) -> None:
    page.open(url)
    page.choose("Two events, one a line")
    assert page.send() == "200 OK"
    assert page.answer()["accepted"] == 2
    page.choose("One event, and one with faults")
    assert page.text("#target") == "POST /process/batch"
    assert page.send().startswith("207 ")
    assert page.text("#faults code") == "[1].device_id"


def test_an_idempotency_key_is_made_and_sent(page: Page, url: str) -> None:
    page.open(url)
    page.get("new-key").click()
    key = page.get("key").get_property("value")
    assert re.fullmatch(r"[0-9a-f]{32}", str(key))
    assert page.send() == "200 OK"
    page.fill("key", "two words")
    assert page.send().startswith("400 ")
    assert "Idempotency-Key" in page.answer()["detail"]


def test_the_curl_line_does_the_same(page: Page, url: str) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    page.open(url)
    page.fill("body", json.dumps({**openapi.EVENT, "device_id": 'it\'s a $HOME `id` \\ "camera" !'}))
    page.fill("key", "key-'1'")
    page.send()
    line = page.text("#curl").replace("curl -i", "curl -s")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, timeout=20)
    assert json.loads(done.stdout) == page.answer()


def test_text_from_a_server_is_never_taken_for_html(page: Page, url: str) -> None:
    page.open(url)
    hostile = "<img src=x onerror='document.title=1'></pre><script>document.title=1</script>"
    page.fill("body", json.dumps({**openapi.EVENT, "device_id": hostile}))
    assert page.send() == "200 OK"
    assert page.answer()["device_id"] == hostile
    assert page.run("return document.querySelectorAll('img, #answer script').length") == 0
    assert page.driver.title == "predlog"


def test_the_live_panel_moves(page: Page, url: str) -> None:
    page.open(url)
    page.until(lambda: page.text("#broker .value") == "connected")
    assert page.text("#ready") == "Ready"

    def since_start() -> int:
        return int((re.findall(r"[\d,]+", page.text("#requests .note")) or ["0"])[0].replace(",", ""))

    before = since_start()
    body = json.dumps(openapi.EVENT).encode()
    for _ in range(30):
        post(url, body)
    page.until(lambda: since_start() >= before + 30)
    page.until(lambda: re.fullmatch(r"[\d.,]+ / [\d.,]+ms", page.text("#latency .value")))
    assert page.text("#latency .note").startswith("confirm p99 ")
    assert len(page.run("return document.querySelector('#requests .line').getAttribute('d')")) > 10
    page.choose("Not JSON (refused)")
    page.send()
    page.until(lambda: re.search(r"422 \S \d", page.text("#errors .note")))


def test_everything_can_be_done_with_the_keyboard_in_order(page: Page, url: str) -> None:
    page.open(url)
    page.run("document.activeElement.blur()")
    stops = []
    for _ in range(9):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        focus = page.driver.switch_to.active_element
        stops.append(focus.get_attribute("id") or focus.get_attribute("class"))
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid", stops
    assert stops[:8] == ["skip", "theme", "example", "body", "key", "new-key", "token", "send"]
    page.get("theme").send_keys(Keys.SPACE)
    assert page.get("theme").get_attribute("aria-pressed") == "true"
    page.get("example").send_keys("Integers")
    assert '"device_id": 7' in str(page.get("body").get_property("value"))
    page.get("body").send_keys(Keys.CONTROL, Keys.ENTER)
    assert page.status() == "200 OK"
    page.run("document.getElementById('outcome').replaceChildren()")
    page.get("send").send_keys(Keys.ENTER)
    assert page.status() == "200 OK"
    page.run("document.querySelector('#process summary').focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert "prob" in page.get("process").text


def test_a_screen_reader_hears_answers_and_control_names(page: Page, url: str) -> None:
    """Answers are announced, and every control has a name."""
    page.open(url)
    assert page.get("outcome").get_attribute("aria-live") == "polite"
    assert page.get("ready").get_attribute("role") == "status"
    for control in page.driver.find_elements(By.CSS_SELECTOR, "input, select, textarea, button, [tabindex]"):
        assert control.accessible_name, control.get_attribute("outerHTML")


def test_a_phone_needs_no_horizontal_scrolling(page: Page, url: str) -> None:
    page.open(url)
    page.resize(*PHONE)
    page.choose("Several faults at once (refused)")
    page.send()
    page.run("for (const it of document.querySelectorAll('details')) it.open = true")
    assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [PHONE[0], PHONE[0]]
    wide = page.run(
        "return [...document.querySelectorAll('main *, header *')]"
        ".filter((it) => it.getBoundingClientRect().right > innerWidth + .5 && !it.closest('textarea, pre, .result'))"
        ".map((it) => it.outerHTML.slice(0, 99))"
    )
    assert wide == []


def test_an_answer_moves_nothing_on_the_page(page: Page, url: str) -> None:
    page.open(url)
    places = (
        "return [document.documentElement.scrollHeight, ...['send', 'curl', 'operations']"
        ".map((id) => scrollY + document.getElementById(id).getBoundingClientRect().top)]"
    )
    page.until(lambda: page.text("#broker .value") == "connected")
    before = page.run(places)
    page.choose("Several faults at once (refused)")
    page.send()
    assert page.run(places) == before


CONTRAST = """
const TEXT = "h1, h2, h3, p, label, small, dt, button, code, pre span, footer a, .hint, .note, .unit, .pill, .type, "
  + ".about, .status, .fields";
const linear = (it) => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4;
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((it) => linear(it / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (it) => {
  const colour = getComputedStyle(it).backgroundColor;
  return colour === "rgba(0, 0, 0, 0)" ? ground(it.parentElement) : colour;
};
return [...document.querySelectorAll(TEXT)]
  .filter((it) => it.offsetParent && it.textContent.trim())
  .map((it) => [luminance(getComputedStyle(it).color), luminance(ground(it)), it.outerHTML.slice(0, 99)])
  .map(([a, b, html]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), html])
  .filter(([ratio]) => ratio < 4.5);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_colours_with_contrast(page: Page, url: str, scheme: str) -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1 for text."""
    page.open(url)
    page.prefer("prefers-color-scheme", scheme)
    page.choose("Several faults at once (refused)")
    page.send()
    page.run("document.getElementById('process').open = true")
    page.run("for (const it of document.getAnimations()) it.finish()")
    background = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 3 * 64) == (scheme == "dark")
    assert page.get("theme").get_attribute("aria-pressed") == str(scheme == "dark").lower()
    assert page.run(CONTRAST) == []


def test_the_theme_can_be_switched_and_stays(page: Page, url: str) -> None:
    page.open(url)
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.run(ground)
    page.get("theme").click()
    dark = page.run(ground)
    assert dark != light
    page.driver.refresh()
    assert page.run(ground) == dark
    page.run("localStorage.clear()")


def test_nothing_moves_for_those_who_want_no_motion(page: Page, url: str) -> None:
    page.open(url)
    moving = (
        "return [...document.querySelectorAll('*')].map((it) => getComputedStyle(it))"
        ".filter((it) => it.transitionDuration !== '0s' || it.animationName !== 'none').length"
    )
    assert page.run(moving) > 0
    page.prefer("prefers-reduced-motion", "reduce")
    assert page.run(moving) == 0


def test_the_token_goes_nowhere_but_into_requests(page: Page, producer: Start) -> None:
    page.open(producer(API_TOKEN="s3cret-token").url)
    assert page.send().startswith("401 ")
    assert "WWW-Authenticate: Bearer" in page.text("#outcome")
    page.fill("token", "s3cret-token")
    assert page.send() == "200 OK"
    assert "$API_TOKEN" in page.text("#curl")
    assert "s3cret-token" not in page.driver.page_source
    assert page.run("return JSON.stringify([localStorage, sessionStorage, document.cookie])") == '[{},{},""]'


def test_without_a_broker_the_page_shows_the_reason(page: Page, producer: Start) -> None:
    service = producer(wait=False, AMQP_URL=f"amqp://guest:guest@127.0.0.1:{free_port()}/")
    page.until(lambda: is_listening(service.url))
    page.open(service.url)
    page.until(lambda: page.text("#broker .value") == "away")
    page.until(lambda: page.text("#ready").startswith("Not ready: "))
    assert page.send().startswith("503 ")
    assert "Retry-After: " in page.text("#outcome")


def test_a_producer_that_is_gone_leaves_the_page_usable(page: Page, producer: Start) -> None:
    service = producer()
    page.open(service.url)
    page.until(lambda: page.text("#ready") == "Ready")
    service.kill()
    page.until(lambda: page.text("#ready") == "No answer")
    assert page.send() == "Not sent"


def test_the_browser_had_nothing_to_complain_about(page: Page, url: str) -> None:
    page.driver.get("about:blank")  # the page of the last test asks a producer that may be gone
    page.complaints()
    page.open(url)
    assert page.send() == "200 OK"
    page.until(lambda: page.text("#broker .value") == "connected")
    assert page.complaints() == []


WITHOUT_ASKING = """
const [url, body, done] = arguments;
const blob = new Blob([body]);
fetch(url, {method: "POST", mode: "no-cors", body: blob}).finally(() => {
  navigator.sendBeacon(url, blob);
  done();
});
"""
WITH_A_PREFLIGHT = """
const [url, body, done] = arguments;
const headers = {"Content-Type": "application/json", "Idempotency-Key": "k"};
fetch(url, {method: "POST", headers, body}).then(answer => done(answer.status), error => done(String(error)));
"""


def test_a_page_of_another_site_writes_no_row(page: Page, producer: Start, other_site: str) -> None:
    """It cannot with fetch in no-cors mode or sendBeacon, which send no preflight; a preflight is refused too."""
    service = producer()
    body = json.dumps(openapi.EVENT)
    page.driver.get(other_site)
    page.driver.execute_async_script(WITHOUT_ASKING, f"{service.url}/process", body)
    refused = 'predlog_http_requests_total{route="/process",status="403"}'
    page.until(lambda: count(service.url, refused) == 2)
    assert "TypeError" in page.driver.execute_async_script(WITH_A_PREFLIGHT, f"{service.url}/process", body)
    assert count(service.url, "predlog_events_total") == 0


def test_a_listed_origin_may_post_and_read_the_answer(page: Page, producer: Start, other_site: str) -> None:
    service = producer(CORS_ORIGINS=other_site)
    page.driver.get(other_site)
    body = json.dumps(openapi.EVENT)
    assert page.driver.execute_async_script(WITH_A_PREFLIGHT, f"{service.url}/process", body) == 200
    assert page.driver.execute_async_script(WITH_A_PREFLIGHT, f"{service.url}/process", "{}") == 422
