"""The page at ``/``: what it is made of, and a person's way through it in headless Chromium."""

import re
from importlib import resources

import httpx2
import page_driver
import pytest
import server_fixtures
import train_fixtures
from page_driver import NARROW, add, ask, explained, opened
from server_fixtures import FACTS, KEYS, serving, wait_for

quick_compilation = train_fixtures.quick_compilation
TEXT = " ".join(FACTS[:7])  # of two segments
QUESTION = "what does the red box hold ?"


def until(tab, expression):
    """Until ``expression`` is true in the page, whose policy keeps playwright's own waiting out."""
    for _ in range(600):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    pytest.fail(f"{expression} did not come about")


@pytest.fixture(scope="module")
def model(quick_compilation):
    return server_fixtures.comi()


@pytest.fixture(scope="module")
def served(model):
    """A server without keys."""
    with serving(model, keys=(), store_bytes=10**7) as it:
        yield it


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="playwright is not installed")
    if page_driver.chromium() is None:
        pytest.skip("there is no Chromium on the PATH")
    with page_driver.browsing() as it:
        yield it


def test_the_page_is_small_and_asks_nobody_else(served):
    got = httpx2.get(f"{served.url}/")
    assert got.status_code == 200 and got.headers["content-type"] == "text/html; charset=utf-8"
    policy = got.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    template = httpx2.get(f"{served.url}/explanation.html").text
    assert "{{data}}" in template and len(got.content) + len(template.encode()) < 100_000
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", got.text)
    assert got.text == resources.files("comi_jax.serving.http").joinpath("page.html").read_text(encoding="utf-8")


def test_whatever_is_typed_into_has_a_label(served):
    text = httpx2.get(f"{served.url}/").text
    fields = re.findall(r"<(?:textarea|select|input)\b[^>]*\bid=\"(\w+)\"", text)
    assert len(fields) >= 6
    for name in fields:
        inside = re.search(rf"<label\b(?:(?!</label>).)*id=\"{name}\"", text, re.DOTALL)
        assert inside or f'<label for="{name}"' in text, name


@pytest.mark.slow
def test_a_document_two_questions_and_what_was_kept(browser, served, model):
    tab, told = opened(browser, f"{served.url}/")
    add(tab, "boxes.txt", TEXT.encode())
    document = model.encode(TEXT)
    assert tab.is_checked('.doc:has-text("boxes.txt") input')
    for rate, question in ((4, QUESTION), (2, "what holds a key ?")):
        card = ask(tab, question, rate)
        want = model.answer(document, question, rate=rate, max_new_tokens=64)
        assert card.locator("h3").inner_text() == question
        assert card.locator(".answer").text_content() == want.text
        assert f"{document.tokens} tokens in {want.memory_vectors} memory vectors" in card.inner_text()
        assert want.text in tab.text_content("#said")
    frame = explained(tab)
    until(tab, "document.activeElement.id === 'kept-title'")
    for pane, rate in enumerate((2, 4)):  # the newest beside the one before it
        slots = model.answer(document, QUESTION, rate=rate).memory_vectors
        assert frame.locator(f'.g[data-pane="{pane}"]').last.get_attribute("data-slot") == str(slots - 1)
        text = frame.locator(".row").evaluate_all(
            f"rows => rows.map(row => row.querySelectorAll('.cell')[{pane}].textContent).join('')"
        )
        assert text == TEXT
    frame.locator('.g[data-pane="0"]').nth(1).click()
    assert frame.locator("#panel h2").inner_text().startswith("A: slot 2 of")
    tab.click("#hide")
    assert not tab.is_visible("#kept")
    tab.reload()
    tab.wait_for_selector('.doc:has-text("boxes.txt")')
    card = ask(tab, QUESTION, 1)
    assert "not compressed" in card.inner_text()
    assert card.get_by_role("button", name="What was kept").count() == 0
    tab.get_by_role("button", name="Remove boxes.txt").click()
    tab.wait_for_selector(".doc", state="detached")
    assert tab.is_disabled("#ask") and told == []


@pytest.mark.slow
def test_with_the_keyboard_alone(browser, served):
    tab, told = opened(browser, f"{served.url}/")
    until(tab, "document.getElementById('rate').length === 3")
    names = []
    for _ in range(4):
        tab.keyboard.press("Tab")
        names.append(tab.evaluate("document.activeElement.id"))
    assert names[:3] == ["file", "paste", "add"]
    tab.focus("#paste")
    tab.keyboard.type(TEXT)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    until(tab, "document.activeElement.id === 'question' && state.documents.length > 0")
    tab.keyboard.type(QUESTION)
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#answers button")
    for _ in range(9):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.textContent") == "What was kept":
            break
    tab.keyboard.press("Enter")
    tab.frame_locator("#frame").locator(".g").first.wait_for()
    tab.get_by_role("button", name="Remove").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".doc", state="detached")
    assert told == []


@pytest.mark.slow
def test_what_goes_wrong_is_said(browser, served, model):
    tab, told = opened(browser, f"{served.url}/")
    until(tab, "document.getElementById('rate').length === 3")
    tab.set_input_files("#file", files=[{"name": "a.pdf", "mimeType": "a/b", "buffer": b"%PDF\xff"}])
    tab.wait_for_selector("#problem:not([hidden])")
    assert "is not UTF-8 text" in tab.inner_text("#problem")
    tab.click("#dismiss")
    assert not tab.is_visible("#problem")
    tab.set_input_files("#file", files=[{"name": "b.txt", "mimeType": "a/b", "buffer": b"a " * 2_001}])
    tab.wait_for_selector("#problem:not([hidden])")
    assert "b.txt has 4,002 bytes, more than the 4,000" in tab.inner_text("#problem")
    tab.click("#add")
    assert "no text to add" in tab.inner_text("#problem")
    add(tab, "<img src=x onerror=alert(1)>.txt", TEXT.encode())
    card = ask(tab, "the " * 20, 4)
    assert "more than the 8 of this server" in card.locator(".bad").inner_text()
    with served.held():
        tab.fill("#question", QUESTION)
        tab.press("#question", "Enter")
        wait_for(lambda: served.engine.open == 1)
        tab.click("#stop")
        tab.wait_for_selector('#answers article:has-text("Stopped.")')
        wait_for(lambda: served.engine.open == 0)
    gone = httpx2.get(f"{served.url}/v1/files").json()["data"][0]["id"]
    httpx2.delete(f"{served.url}/v1/files/{gone}")
    card = ask(tab, QUESTION, 4)
    assert "There is no such file" in card.inner_text()
    tab.wait_for_selector(".doc", state="detached")
    assert all("Failed to load resource" in line for line in told), told


@pytest.mark.slow
def test_a_server_with_keys_asks_for_one(browser, model):
    with serving(model) as other:
        tab, _ = opened(browser, f"{other.url}/")
        tab.wait_for_selector("#key-card:not([hidden])")
        tab.fill("#key", "a-wrong-key-of-nobody")
        tab.press("#key", "Enter")
        tab.wait_for_selector("#problem:not([hidden])")
        assert "key is missing or wrong" in tab.inner_text("#problem")
        tab.fill("#key", KEYS[0])
        tab.press("#key", "Enter")
        tab.wait_for_selector("#key-card", state="hidden")
        add(tab, "a.txt", TEXT.encode())
        assert ask(tab, QUESTION, 4).locator(".answer").inner_text()
        assert KEYS[0] not in tab.content()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_either_scheme_on_a_narrow_screen_and_markup_is_text(browser, served, scheme):
    tab, told = opened(browser, f"{served.url}/", color_scheme=scheme, viewport=NARROW)
    hostile = f"</script><img src=x onerror=alert(1)> {TEXT}"
    add(tab, "hostile.txt", hostile.encode())
    ask(tab, QUESTION, 4)
    frame = explained(tab)
    cells = frame.locator(".cell").evaluate_all("cells => cells.map(cell => cell.textContent).join('')")
    assert cells == hostile
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    for where in (tab.locator("body"), frame.locator("body")):
        bright = where.evaluate("body => Number(getComputedStyle(body).backgroundColor.match(/\\d+/)[0])")
        assert (bright > 200) == (scheme == "light")
    tab.get_by_role("button", name="Remove hostile.txt").click()
    tab.wait_for_selector(".doc", state="detached")
    assert told == []
