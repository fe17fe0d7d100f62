"""Drives the demo in a headless browser: every tab once, its output checked, a picture of each; no request leaves.

    .venv-demo/bin/python tests/demo_browser.py RUNS PICTURES

RUNS holds a run of each system. Needs playwright in .venv-demo and a chromium; test_demo.py runs it where they are.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONGEST = 240_000  # milliseconds for one job
START_SECONDS = 15


def start(runs: Path) -> tuple[subprocess.Popen, str, float]:
    """The demo's process, its address, and the seconds until it answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), "--runs", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}/"
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).read()
            return process, address, time.monotonic() - began
        except OSError:
            assert process.poll() is None and time.monotonic() - began < 120, "the demo did not start"
            time.sleep(0.1)


def use(page: Page, tab: str, button: str) -> None:
    """Open a tab and press its button; waits until its state says that it is done."""
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    assert page.get_by_label("Share").filter(visible=True).count() == 0, "a button that uploads elsewhere"
    panel.get_by_role("button", name=button, exact=True).click()
    state = panel.get_by_label("state")
    began = time.monotonic()
    while state.input_value() == "done" and time.monotonic() - began < 30:  # that of the job before
        page.wait_for_timeout(50)
    while state.input_value() != "done":
        alert = page.locator(".toast-body")
        assert alert.count() == 0, f"{tab}: {alert.first.inner_text()}"
        assert time.monotonic() - began < LONGEST / 1000, f"{tab}: still {state.input_value()!r}"
        page.wait_for_timeout(200)
    page.wait_for_timeout(700)
    print(f"{tab}: done after {time.monotonic() - began:.0f} s", flush=True)


def drive(page: Page, pictures: Path) -> None:
    """Every tab once."""
    use(page, "Draw (DiT)", "Draw")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    assert panel.locator("img").count() >= 4
    assert panel.locator("img").first.evaluate("picture => picture.naturalWidth") > 0
    page.screenshot(path=pictures / "dit.png")

    use(page, "Talk (FLOAT)", "Speak")
    video = page.get_by_role("tabpanel").filter(visible=True).locator("video")
    video.first.wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].some(v => v.videoWidth > 0 && v.duration > 0.5)"
    )
    page.screenshot(path=pictures / "float.png")

    use(page, "Film a subject (OpenS2V)", "Film")
    video = page.get_by_role("tabpanel").filter(visible=True).locator("video")
    video.first.wait_for()
    page.wait_for_timeout(500)
    assert video.first.evaluate("video => video.videoWidth") > 0
    page.screenshot(path=pictures / "opens2v.png")

    use(page, "Chat (BAGEL)", "Send")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    assert panel.locator(".bot img").count() == 1
    panel.get_by_label("answer").check()
    panel.get_by_role("textbox").first.fill("what is in the picture?")
    use(page, "Chat (BAGEL)", "Send")
    answer = panel.locator(".message.bot").last.inner_text().strip()
    assert answer and panel.locator(".message.bot").count() == 2, answer
    page.screenshot(path=pictures / "bagel.png")

    use(page, "Search (multimodal)", "Search")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    assert panel.locator("img").count() >= 4
    page.screenshot(path=pictures / "multimodal.png")


def mistakes(page: Page) -> None:
    """An empty sentence is a sentence on the page; Stop ends a long job at once."""
    page.get_by_role("tab", name="Draw (DiT)").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_label("sentence").fill("")
    panel.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("the sentence is empty; write a sentence").first.wait_for(timeout=20_000)
    panel.get_by_label("sentence").fill("a red ground")
    panel.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_timeout(2500)
    began = time.monotonic()
    panel.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("stopped").first.wait_for(timeout=20_000)
    print(f"stopped after {time.monotonic() - began:.1f} s", flush=True)


def main(runs: Path, pictures: Path) -> None:
    """Start the demo and use it; AssertionError says what does not hold."""
    pictures.mkdir(parents=True, exist_ok=True)
    process, address, seconds = start(runs)
    print(f"the demo answered after {seconds:.1f} s", flush=True)
    outside: list[str] = []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.on("request", lambda request: outside.append(request.url) if _leaves(request.url) else None)
            page.goto(address)
            page.get_by_role("tab", name="Draw (DiT)").wait_for()
            drive(page, pictures)
            mistakes(page)
            browser.close()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
    assert not outside, f"the page asked for {outside}"
    assert seconds < START_SECONDS, f"the demo took {seconds:.1f} s to start"
    print("every tab was used; no request left the machine")


def _leaves(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
