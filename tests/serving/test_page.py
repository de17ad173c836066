"""The chat page in a real browser, against a small server that speaks OpenAI's protocol."""

import base64
import contextlib
import hashlib
import http.server
import json
import queue
import random
import re
import shutil
import threading
from pathlib import Path

import pytest

from mistral_jax.config import CHECKOUT

pytestmark = pytest.mark.slow

PAGE = CHECKOUT / "mistral_jax/serving/page.html"
HOSTILE = Path(__file__).with_name("hostile.txt").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP, TELEPHONE = {"width": 1200, "height": 800}, {"width": 360, "height": 740}
DONE = object()


def text(content, kind="content"):
    """Returns the event of one piece of an answer."""
    return {"choices": [{"index": 0, "delta": {kind: content}, "finish_reason": None}]}


def end(tokens, reason="stop"):
    """Returns the events at the end of an answer."""
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    return [last, {"choices": [], "usage": usage}, DONE]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the page, and answers with what the test has put into `server.answers`."""

    def log_message(self, *args):
        pass

    def send(self, body, kind="application/json", status=200, **headers):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            models = [{"id": name} for name in self.server.models]
            models[0]["default_sampling"] = {"temperature": 0.7}
            return self.send(json.dumps({"data": models}).encode())
        body = PAGE.read_bytes()
        hashes = {
            tag: base64.b64encode(
                hashlib.sha256(re.search(b"<%s>(.*?)</%s>" % (tag, tag), body, re.S)[1]).digest()
            ).decode()
            for tag in (b"script", b"style")
        }
        policy = (
            f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; "
            f"style-src 'sha256-{hashes[b'style']}'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return self.send(body, "text/html; charset=utf-8", content_security_policy=policy)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.put((body, self.headers))
        if self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            return self.send(b'{"error": {"message": "the key is missing"}}', status=401)
        if self.server.refusals:
            status, message, headers = self.server.refusals.pop(0)
            error = json.dumps({"error": {"message": message}}).encode()
            return self.send(error, status=status, **headers)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        role = {"role": "assistant", "content": None}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.event({"choices": [{"index": 0, "delta": role, "finish_reason": None}]})
            while True:
                try:
                    event = self.server.answers.get(timeout=0.05)
                except queue.Empty:
                    self.wfile.write(b": ping\n\n")
                    continue
                if event is DONE:
                    return self.wfile.write(b"data: [DONE]\n\n")
                if event == "close":
                    return None
                self.event(event)
        return self.server.gone.set()

    def event(self, event):
        # In two parts: what the network delivers may end within an event, or within a letter.
        data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        cut = len(data) // 2
        for part in (data[:cut], data[cut:]):
            self.wfile.write(part)
            self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.answers, self.seen = queue.Queue(), queue.Queue()
        self.gone, self.models = threading.Event(), ["small"]
        self.key, self.refusals = None, []

    def says(self, *pieces, tokens=4):
        for event in (*map(text, pieces), *end(tokens)):
            self.answers.put(event)

    def request(self):
        """Returns the next request's body."""
        return self.seen.get(timeout=10)[0]


@pytest.fixture
def server():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with driver.sync_playwright() as started:
        # Without its sandbox, which needs rights that containers often lack.
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; afterwards, no script had failed and no request had left the server."""
    with contextlib.ExitStack() as stack:
        faults = []

        def visit(size=DESKTOP, **options):
            context = browser.new_context(viewport=size, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(10_000)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda line: check(line.text))
            page.on("request", lambda request: check(request.url, request.url))
            page.goto(server.url)
            return page

        def check(shown, url=None):
            left = url and not url.startswith((server.url, "data:"))
            if left or "Content Security Policy" in shown:
                faults.append(shown)

        yield visit
        assert faults == []


def ask(page, question):
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")


def answer(page, n=-1):
    return page.locator("article.assistant").nth(n)


def finished(page, count=1):
    """Waits until the page shows `count` whole answers; returns the last."""
    page.wait_for_function(
        "n => document.querySelectorAll('article.assistant[aria-busy=false]').length === n",
        arg=count,
    )
    return answer(page)


def wait_text(page, content, selector="article.assistant:last-of-type .body"):
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.trim() === text",
        arg=[selector, content],
    )


def test_an_answer_appears_piece_by_piece(visit, server):
    page = visit()
    ask(page, "hello")
    for event, shown in [("Grü", "Grü"), ("ße 🙂", "Grüße 🙂"), (" **du**", "Grüße 🙂 du")]:
        server.answers.put(text(event))
        wait_text(page, shown)
        assert answer(page).get_attribute("aria-busy") == "true"
    for event in end(7):
        server.answers.put(event)
    done = finished(page)
    assert done.locator("strong").inner_text() == "du"
    assert re.fullmatch(
        r"7 tokens · [\d.]+ tokens/s · first after [\d.]+ s", done.locator(".stats").inner_text()
    )
    assert page.get_by_role("log").get_attribute("aria-live") == "polite"


def test_thoughts_and_calls_have_blocks_of_their_own(visit, server):
    page = visit()
    call = {"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    server.answers.put(text("Let me <b>see</b>", "reasoning_content"))
    server.answers.put(text([call], "tool_calls"))
    server.answers.put(text([rest], "tool_calls"))
    server.says("Three")
    ask(page, "1 + 2")
    done = finished(page)
    thoughts = done.locator(".thoughts")
    assert not thoughts.locator("div").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.locator("div").inner_text() == "Let me <b>see</b>"
    assert done.locator(".calls figcaption span").inner_text() == "call of add"
    assert done.locator(".calls code").inner_text() == '{"a": 1}'
    assert done.locator(".body").inner_text() == "Three"


def test_stop_ends_the_request_and_keeps_what_came(visit, server):
    page = visit()
    server.answers.put(text("one"))
    ask(page, "count")
    wait_text(page, "one")
    page.get_by_role("button", name="Stop").click()
    assert server.gone.wait(10)
    assert "stopped" in finished(page).locator(".stats").inner_text()
    assert answer(page).locator(".error").is_hidden()
    server.request()
    server.says("two")
    ask(page, "go on")
    finished(page, 2)
    assert [m["content"] for m in server.request()["messages"]] == ["count", "one", "go on"]


def test_edit_and_regenerate_send_the_messages_before_them(visit, server):
    page = visit()
    for i in range(2):
        server.says(f"a{i}")
        ask(page, f"q{i}")
        finished(page, i + 1)
        server.request()
    server.says("again")
    answer(page).get_by_role("button", name="Regenerate").click()
    wait_text(page, "again")
    finished(page, 2)
    user = [{"role": "user", "content": f"q{i}"} for i in range(2)]
    first = {"role": "assistant", "content": "a0"}
    assert server.request()["messages"] == [user[0], first, user[1]]
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("other")
    server.says("new")
    page.keyboard.press("Enter")
    wait_text(page, "new")
    finished(page, 1)
    assert server.request()["messages"] == [{"role": "user", "content": "other"}]
    page.locator("article.user").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("dropped")
    page.keyboard.press("Escape")
    assert page.locator("article.user .body").inner_text() == "other"


def test_only_chosen_settings_are_sent(visit, server):
    server.models = ["small", "large"]
    page = visit()
    server.says("a")
    ask(page, "q")
    finished(page)
    sent = server.request()
    options = {"stream": True, "stream_options": {"include_usage": True}, "model": "small"}
    assert sent == options | {"messages": [{"role": "user", "content": "q"}]}
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Temperature").get_attribute("placeholder") == "0.7"
    chosen = {
        "Temperature": ("temperature", 0), "Top p": ("top_p", 0.5), "Top k": ("top_k", 3),
        "Min p": ("min_p", 0.25), "Max tokens": ("max_tokens", 9), "Seed": ("seed", 2**53 - 1),
        "Presence penalty": ("presence_penalty", -1.5),
        "Frequency penalty": ("frequency_penalty", 1),
        "Repetition penalty": ("repetition_penalty", 1.1),
    }  # fmt: skip
    for label, (_, value) in chosen.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Stop strings").fill("END\n\\n\\n")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Model").select_option("large")
    page.reload()  # settings survive it
    server.says("b")
    answer(page).get_by_role("button", name="Regenerate").click()
    wait_text(page, "b")
    sent = server.request()
    roles = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    expected = options | dict(chosen.values()) | {"model": "large", "stop": ["END", "\n\n"]}
    assert sent == expected | {"messages": roles}
    finished(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("7")
    page.get_by_role("button", name="Done").click()
    assert page.get_by_label("Top p").is_visible()  # the browser says what is wrong


def test_hostile_markdown_stays_text(visit, server):
    page = visit()
    # In pieces, so that each unfinished form is shown as well.
    server.says(*(HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)))
    ask(page, "<img src=x onerror=hit()>")
    done = finished(page)
    body = done.locator(".body")
    kinds = body.evaluate("n => [...new Set([...n.querySelectorAll('*')].map(e => e.localName))]")
    assert not {"script", "img", "svg", "iframe", "style", "form", "input"} & set(kinds)
    assert {"strong", "em", "code", "pre", "li", "table", "blockquote", "h4", "a"} <= set(kinds)
    links = body.evaluate("n => [...n.querySelectorAll('a')].map(a => [a.href, a.rel])")
    assert [href for href, _ in links] == [
        "https://example.org/a_(b)", "mailto:me@example.org", "http://example.org/x?y=1",
        "https://example.org/i.png",
    ]  # fmt: skip
    assert all("noopener" in rel for _, rel in links)
    shown = body.inner_text()
    for kept in ("<script>hit()</script>", "<img src=x onerror=hit()>", "javascript:hit()"):
        assert kept in shown
    assert page.locator("article.user .body").inner_text() == "<img src=x onerror=hit()>"
    assert body.locator("pre code").first.inner_text() == "</code></pre><script>hit()</script>\n  x"
    assert body.locator("figcaption span").first.inner_text() == 'html" onclick="hit()'
    nested = body.locator("ol > li > ul > li").all_inner_texts()
    assert nested == ["inner", "more"]
    assert body.locator("td").all_inner_texts() == ["a|b", "<b>1</b>", "c", ""]
    attributes = body.evaluate("n => [...n.querySelectorAll('*')].flatMap(e => [...e.attributes])"
                               ".map(a => a.name)")  # fmt: skip
    assert set(attributes) <= {"href", "rel", "target", "class", "type", "tabindex", "start"}


def test_markdown_loses_no_word(visit):
    marks = ["w", "w", "w ", " ", "\n", "\n\n", "*", "**", "_", "__", "`", "```\n", "~~", "- ",
             "1. ", "   ", "\t", "> ", "# ", "|", "\n|-|\n", "|-|-|", "[", "]", "\\", "<br>", "!",
             "---\n"]  # fmt: skip
    draw = random.Random(0)
    texts = ["".join(draw.choices(marks, k=draw.randint(1, 40))) for _ in range(3000)]
    lost = """texts => texts.filter(text => {
        const whole = document.createElement("div"), grown = document.createElement("div");
        for (let end = 0; end <= text.length; end += 5) render(grown, text.slice(0, end));
        render(grown, text);
        render(whole, text);
        const words = (text) => text.replace(/[^w]/g, "").length;
        return words(whole.textContent) !== words(text) || whole.innerHTML !== grown.innerHTML;
    })"""
    assert visit().evaluate(lost, texts) == []


@pytest.mark.parametrize(
    "answer_text",
    ["> " * 20000, "*" * 50000, "`" * 50001, "[" * 50000, "**a " * 12000, "- " * 20000,
     "_a*" * 15000, "|" * 50000 + "\n" + "|-" * 25000, "[a](" * 12000, "`a``" * 12000,
     "\\" * 50000, "https://" * 6000, " " * 50000 + "x"],
    ids=lambda text: text[:6].strip() or "space",
)  # fmt: skip
def test_long_forms_take_no_long_time(visit, server, answer_text):
    page = visit()
    took = page.evaluate(
        "text => { const began = performance.now(); render(document.createElement('div'), text);"
        "return performance.now() - began; }",
        answer_text,
    )
    assert took < 3000


def test_errors_are_shown_and_retried(visit, server):
    page = visit()
    server.refusals = [
        (503, "loading the model", {"retry_after": "7"}),
        (400, "temperature is <b>", {}),
    ]
    ask(page, "q")
    shown = finished(page).get_by_role("alert")
    assert "The server is loading or busy: loading the model (try again in 7 s)" in (
        shown.inner_text()
    )
    shown.get_by_role("button", name="Retry").click()
    wait_text(page, "temperature is <b>Retry", "article.assistant .error")
    server.answers.put(text("half"))
    server.answers.put({"error": {"message": "the step failed"}})
    shown.get_by_role("button", name="Retry").click()
    wait_text(page, "the step failedRetry", "article.assistant .error")
    assert answer(page).locator(".body").inner_text() == "half"
    server.answers.put(text("cut"))
    server.answers.put("close")
    shown.get_by_role("button", name="Retry").click()
    lost = "The connection ended before the answer was complete.Retry"
    wait_text(page, lost, "article.assistant .error")
    server.says("whole")
    shown.get_by_role("button", name="Retry").click()
    wait_text(page, "whole")
    assert shown.count() == 0
    sent = [server.request()["messages"] for _ in range(5)]
    assert sent == [[{"role": "user", "content": "q"}]] * 5


def test_a_question_without_an_answer_joins_the_next(visit, server):
    page = visit()
    server.refusals = [(400, "no", {})]
    ask(page, "q0")
    finished(page)
    server.request()
    server.says("yes")
    ask(page, "q1")
    finished(page, 2)
    assert server.request()["messages"] == [{"role": "user", "content": "q0\n\nq1"}]


def test_a_key_is_asked_for_and_kept_for_the_tab_only(visit, server):
    server.key = "secret-1"
    page = visit()
    ask(page, "q")
    dialog = page.get_by_role("dialog")
    assert "the key is missing" in dialog.inner_text()
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("The server refuses the key").wait_for()
    dialog.get_by_label("Key").fill("secret-1")
    server.says("in")
    page.keyboard.press("Enter")
    wait_text(page, "in")
    finished(page)
    sent = [server.seen.get(timeout=10)[1]["authorization"] for _ in range(3)]
    assert sent == [None, "Bearer wrong", "Bearer secret-1"]
    assert "secret-1" not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    assert "secret-1" not in page.content()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Forget the key").click()
    assert page.evaluate("sessionStorage.length") == 0


def test_conversations_survive_a_reload_and_can_be_deleted(visit, server):
    page = visit()
    server.says("first **answer**")
    ask(page, "first")
    finished(page)
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    server.says("second answer")
    ask(page, "second")
    finished(page)
    page.reload()
    wait_text(page, "second answer")
    assert "4 tokens" in answer(page).locator(".stats").inner_text()
    page.get_by_role("button", name="first", exact=True).click()
    wait_text(page, "first answer")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete first").click()
    page.locator("#chats li").nth(1).wait_for(state="detached")
    page.get_by_role("button", name="Delete all").click()
    page.locator("#chats li").wait_for(state="detached")
    assert page.evaluate("Object.keys(localStorage).filter(k => k.includes('chat'))") == []


def test_copy_buttons_copy_the_source(visit, server):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    source = "*Try*\n\n```py\nprint(1)\n```"
    server.says(source)
    ask(page, "code")
    done = finished(page)
    for button, copied in [(done.locator("figure button"), "print(1)"),
                           (done.locator("footer button").first, source)]:  # fmt: skip
        button.click()
        page.wait_for_function("node => node.textContent === 'Copied'", arg=button.element_handle())
        assert page.evaluate("navigator.clipboard.readText()") == copied


def test_the_page_follows_the_answer_until_the_reader_scrolls_up(visit, server):
    page = visit()
    log = page.locator("#log")
    below = "n => n.scrollHeight - n.clientHeight - n.scrollTop"
    server.answers.put(text("line\n\n" * 60))
    ask(page, "long")
    page.wait_for_function("() => document.querySelectorAll('.body p').length === 60")
    page.wait_for_function(f"() => ({below})(document.getElementById('log')) < 2")
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -400)
    page.locator("#down").wait_for()
    before = log.evaluate("n => n.scrollTop")
    server.answers.put(text("line\n\n" * 20))
    page.wait_for_function("() => document.querySelectorAll('.body p').length === 80")
    assert log.evaluate("n => n.scrollTop") == before
    page.locator("#down").click()
    page.wait_for_function(f"() => ({below})(document.getElementById('log')) < 2")
    server.says("line\n\n" * 20)
    finished(page)
    assert log.evaluate(below) < 2


def test_only_the_changed_block_is_drawn_again(visit, server):
    page = visit()
    server.answers.put(text("one\n\n- two\n\nthr"))
    ask(page, "q")
    wait_text(page, "thr", "article.assistant .body > p:last-child")
    page.evaluate("() => void (marked = [...document.querySelectorAll('.assistant .body > *')])")
    server.says("ee")
    finished(page)
    kept = "[...document.querySelectorAll('.assistant .body > *')].map((n, i) => n === marked[i])"
    assert page.evaluate(kept) == [True, True, False]


def test_keys_of_the_input(visit, server):
    page = visit()
    box = page.get_by_label("Message", exact=True)
    low = box.bounding_box()["height"]
    box.fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "one\ntwo"
    assert box.bounding_box()["height"] > low
    server.says("a")
    page.keyboard.press("Enter")
    finished(page)
    assert server.request()["messages"][0]["content"] == "one\ntwo"
    assert box.bounding_box()["height"] == low
    # Everything that a pointer can do has a name that screen readers say.
    named = "n => n.every(b => b.ariaLabel || b.textContent.trim())"
    assert page.locator("button").evaluate_all(named)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_it_without_scrolling_sideways(visit, server, scheme):
    page = visit(TELEPHONE, color_scheme=scheme, has_touch=True)
    server.says(HOSTILE, "\n\n", "x" * 500, "\n\n`", "y" * 300, "`\n\n| " + "wide | " * 30)
    ask(page, "w" * 400)
    finished(page)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    assert page.locator("#log").evaluate("n => n.scrollWidth - n.clientWidth") <= 0
    assert not page.get_by_role("button", name="New conversation").is_visible()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New conversation").wait_for()
    assert page.evaluate(overflow) <= 0
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    drawer = page.locator("#settings")
    assert drawer.evaluate("n => n.scrollWidth - n.clientWidth") <= 0
    box = drawer.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= TELEPHONE["width"]


def test_light_and_dark_differ_and_the_choice_is_kept(visit):
    back = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit(color_scheme=scheme).evaluate(back) for scheme in ("light", "dark"))
    assert light != dark
    page = visit(color_scheme="dark")
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate(back) == light
    page.reload()
    assert page.evaluate(back) == light


def test_the_file_stands_alone():
    source = PAGE.read_text(encoding="utf-8")
    assert source.lower().startswith("<!doctype html>")
    assert len(re.findall(r"<script\b", source)) == len(re.findall(r"<style\b", source)) == 1
    assert not re.search(r"""(src|href)=["'](?!data:,)|@import|url\(|\son\w+=|\sstyle=""", source)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source)
