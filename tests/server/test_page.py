"""The page to talk to: what it may not do, and, where Chromium and playwright are, what it does."""

import json
import re
import shutil
from importlib.resources import files

import pytest

from ggpy.server.models import Served

from .conftest import serving

PAGE = (files("ggpy.server") / "page.html").read_text("utf-8")
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

#: what a model could say to get its own markup or script into the page
ATTACKS = """<img src=x onerror="window.broken = 1"> <script>window.broken = 1</script>
[a](javascript:window.broken=1) [b](data:text/html,<script>1</script>) ![c](https://example.org/leak.png)
`<svg onload=window.broken=1>` **<iframe srcdoc="<script>parent.broken=1</script>">**

```html"><script>window.broken=1</script>
<script>window.broken = 1</script>
```

| <b>a</b> | b |
|---|---|
| <img src=x onerror=window.broken=1> | `c` |
"""


def test_the_page_makes_no_markup_of_text_and_takes_nothing_from_elsewhere():
    script = PAGE.split("<script>")[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", script)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,)""", PAGE)
    assert not re.search(r"@import|url\(", PAGE)
    assert set(re.findall(r'fetch\("([^"]*)"', script)) == {"v1/chat/completions", "experts?model=", "v1/models"}


@pytest.fixture(scope="module")
def served(demo):
    with serving([Served("demo", demo, {"n_ctx": 1024})]) as client:
        yield client


def test_the_page_may_run_its_own_script_alone(served):
    answer = served.get("/")
    assert answer.text == PAGE
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None or CHROMIUM is None:
        pytest.skip("needs playwright and Chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(params=[(1200, 800), (390, 760)], ids=["desktop", "phone"])
def page(browser, served, request):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.goto(str(served.base_url))
    page.wait_for_selector("option", state="attached")
    yield page
    assert page.wrong == []
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def ended(page):
    expect(page.locator("#send")).to_have_text("Send", timeout=60000)


def say(page, text):
    page.fill("#say", text)
    page.press("#say", "Enter")


def setting(page, **values):
    page.click("#settings")
    for name, value in values.items():
        if isinstance(value, bool):
            page.set_checked(f"[data-set={name}]", value)
        else:
            page.fill(f"[data-set={name}]", str(value))
    page.click("#panel .close")


def test_it_streams_stops_retries_and_edits(page):
    setting(page, temperature=0, max_tokens=12)
    say(page, "What is the capital of France?")
    ended(page)
    first = page.inner_text(".turn.assistant .body")
    assert first and "12 tokens" in page.inner_text(".turn.assistant .foot")
    page.click("text=Retry")
    ended(page)
    assert page.inner_text(".turn.assistant .body") == first
    page.reload()
    assert page.inner_text(".turn.assistant .body") == first  # it is kept
    page.press("#say", "ArrowUp")
    page.fill(".edit", "Another question")
    page.press(".edit", "Enter")
    ended(page)
    assert page.locator(".turn").count() == 2 and page.inner_text(".turn.user .body") == "Another question"
    setting(page, max_tokens=900, temperature=1)
    say(page, "And now at length")
    expect(page.locator(".turn.assistant .body").nth(1)).to_have_text(re.compile(".{20}", re.DOTALL), timeout=60000)
    page.keyboard.press("Escape")
    ended(page)
    assert "stopped" in page.locator(".turn.assistant .foot").nth(1).inner_text()


def test_tokens_show_what_else_they_could_have_been(page):
    setting(page, temperature=0, max_tokens=8, tokens=True)
    say(page, "Once upon a time")
    ended(page)
    assert page.locator(".tokens span").count() == 8
    page.locator(".tokens span").nth(2).click()
    rows = page.locator("#choices tr")
    assert rows.count() == 8 and page.locator("#choices .chosen").count() == 1
    assert sum(float(text.split()[-2]) for text in rows.all_inner_texts()) <= 100.1
    page.keyboard.press("Escape")
    assert page.locator("#choices").is_hidden()


def test_the_experts_at_work_are_drawn(page):
    page.click("#experts")
    if page.viewport_size["width"] < 700:
        pytest.skip("the map covers the conversation there")
    setting_tokens = "localStorage.setItem('ggpy settings', JSON.stringify({max_tokens: 60}))"
    page.evaluate(setting_tokens)
    say(page, "Tell me more")
    expect(page.locator("#heat-words")).to_contain_text("chosen each time", timeout=60000)
    ended(page)
    page.hover("#map")
    assert page.inner_text("#heat-point").startswith("Layer ")


def test_text_stays_text(page):
    page.evaluate(
        "text => { turns = [{role: 'user', content: text}, {role: 'assistant', content: text}]; show(); }", ATTACKS
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.broken") is None
    assert page.locator("#talk :is(script, img, svg, iframe)").count() == 0
    links = page.eval_on_selector_all("#talk a", "all => all.map(a => a.href)")
    assert all(link.startswith("https://") for link in links)
    assert page.locator("#talk .block code").inner_text().strip() == "<script>window.broken = 1</script>"


def test_a_tools_result_goes_back(page):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    page.evaluate("given => { turns = given; show(); }", turns)
    assert '"city": "Oslo"' in page.inner_text(".call")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.fill(".call input", "rain")
        page.press(".call input", "Enter")
    messages = json.loads(sent.value.post_data)["messages"]
    assert messages[-1] == {"role": "tool", "content": "rain", "tool_call_id": "call_1"}
    assert messages[-2]["tool_calls"] == [call]
    ended(page)


def test_calls_are_shown_as_they_grow_and_those_that_break_off_are_none(page):
    """The server's answer is given here, piece by piece."""
    page.evaluate("""() => {
        window.push = null;
        window.fetched = window.fetch;
        window.sent = [];
        window.fetch = (path, options) => {
            if (!path.startsWith("v1/chat")) return window.fetched(path, options);
            window.sent.push(JSON.parse(options.body));
            const text = new TextEncoder();
            const body = new ReadableStream({start(to) {
                const write = data => to.enqueue(text.encode("data: " + JSON.stringify(data) + "\\n\\n"));
                window.push = delta => delta ? write({choices: [{index: 0, delta}]}) : to.close();
            }});
            return Promise.resolve(new Response(body, {status: 200}));
        };
    }""")
    say(page, "Weather?")
    page.wait_for_function("Boolean(window.push)")

    def push(index, arguments, name=None):
        call = {"index": index, "function": {"arguments": arguments}}
        call |= {"id": f"call_{index}", "type": "function"} if name else {}
        call["function"] |= {"name": name} if name else {}
        page.evaluate("call => window.push({tool_calls: [call]})", call)

    push(0, "", "weather")
    push(0, '{"city": "Os')
    shown = page.locator(".call pre")
    expect(shown).to_have_text('{"city": "Os')
    assert page.locator(".call input").count() == 0
    push(0, 'lo"}')
    expect(shown).to_have_text('{\n  "city": "Oslo"\n}')
    push(1, "", "weather")
    push(1, '{"city": "')
    page.evaluate("window.push(null)")
    ended(page)
    assert page.locator(".call").count() == 2 and page.locator(".call input").count() == 1
    assert "broken off" in page.locator(".call").nth(1).inner_text()
    page.fill(".call input", "rain")
    page.press(".call input", "Enter")
    page.wait_for_function("window.sent.length == 2")
    sent = page.evaluate("window.sent[1].messages")
    assert [call["id"] for call in sent[1]["tool_calls"]] == ["call_0"] and sent[2]["tool_call_id"] == "call_0"
    page.evaluate("window.push(null)")
    ended(page)
