"""The server's page in headless Chromium: for its tests, and for a picture of a server that runs:

python tests/page_driver.py http://127.0.0.1:8000/ TEXT_FILE PICTURE.png "first question" "second question"

The first question is asked at the first rate of the server, the second one at the second.
"""

import contextlib
import io
import shutil
import sys
from pathlib import Path

WIDE, NARROW = {"width": 1360, "height": 900}, {"width": 400, "height": 800}


def chromium():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def browsing():
    """A headless Chromium."""
    from playwright import sync_api

    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, url, **options):
    """The page at ``url`` in a tab, and what it complained about or asked of other servers."""
    tab, told = browser.new_page(**{"viewport": WIDE, **options}), []
    tab.set_default_timeout(60_000)
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("request", lambda request: told.append(request.url) if not request.url.startswith((url, "about:")) else None)
    tab.goto(url)
    return tab, told


def add(tab, name, content):
    """Upload a document with the file field."""
    tab.set_input_files("#file", files=[{"name": name, "mimeType": "text/plain", "buffer": content}])
    tab.wait_for_selector(f'.doc:has-text("{name}")')


def ask(tab, question, rate):
    """Ask, and wait for the end of the answer. Returns its card."""
    before = tab.locator("#answers article").count()
    tab.select_option("#rate", str(rate))
    tab.fill("#question", question)
    tab.press("#question", "Enter")
    tab.wait_for_selector(f"#answers article >> nth={before}")
    tab.wait_for_selector(".answer.running", state="detached")
    return tab.locator("#answers article").first


def explained(tab):
    """Open what was kept for the newest answer. Returns the frame."""
    tab.locator("#answers article").first.get_by_role("button", name="What was kept").click()
    frame = tab.frame_locator("#frame")
    frame.locator(".row").first.scroll_into_view_if_needed()  # a row is drawn when it is seen
    frame.locator(".g").first.wait_for()
    return frame


def main(url, text, picture, *questions):
    with browsing() as browser:
        tab, told = opened(browser, url, viewport={"width": 1360, "height": 1230})
        add(tab, Path(text).name, Path(text).read_bytes())
        rates = [option.get_attribute("value") for option in tab.locator("#rate option").all()]
        for number, question in enumerate(questions):
            ask(tab, question, rates[min(number, len(rates) - 2)])  # the last one is 1
        explained(tab)
        tab.evaluate("document.getElementById('frame').style.height = '660px'; scrollTo(0, 0)")
        tab.wait_for_timeout(500)  # for the charts
        content = tab.screenshot()
    from PIL import Image

    Image.open(io.BytesIO(content)).convert("RGB").quantize(96).save(picture, optimize=True)
    print(*told, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
