"""Opens a page in a real browser, in a frame as wide as a phone or a desk, and says what a script there saw."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000", "--dump-dom"]
LAYOUT = """const all = [...document.images];
await Promise.all(all.map((one) => one.decode().catch(() => 0)));
const wide = (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .pictures, svg, pre");
return { width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, title: document.title,
    blank: all.filter((one) => !one.naturalWidth).length, pictures: all.length,
    wide: [...document.querySelectorAll("main *")].filter(wide).map((e) => e.outerHTML.slice(0, 90)),
    dead: [...document.querySelectorAll("a[href]")].filter((a) => !document.getElementById(a.hash.slice(1))).length,
    fetched: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length };"""


def seen(page: Path, script: str = LAYOUT, width: int = 390) -> Any:
    """What the body of an async function returns, run on the page without its ban on scripts: escaping has to hold."""
    text = page.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    told = """<script>addEventListener("load", async () => {
        let told; try { told = await (async () => { %s })(); } catch (error) { told = { error: String(error) }; }
        parent.postMessage(told, "*"); })</script></body>"""
    page.with_name("within.html").write_text(text.replace("</body>", told % script), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(
        f"""<body><iframe src="within.html" width="{width}" height="800" style="border:0"></iframe><script>
        addEventListener("message", (e) => {{ document.body.dataset.seen = JSON.stringify(e.data); }})</script>"""
    )
    flags = [*FLAGS, f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,900"]
    command = [str(CHROMIUM), *flags, frame.as_uri()]
    for _ in range(4):  # on a busy machine virtual time may end before the script does
        dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
        if found := re.search(r'data-seen="([^"]*)"', dom):
            told = json.loads(unescape(found[1]))
            assert "error" not in (told or {}), told
            return told
    raise AssertionError(f"the script of {page} never ended")
