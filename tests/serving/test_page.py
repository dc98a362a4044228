"""The page at /: what it loads, how it is served, and what it does, where there is Node."""

import html
import http.server
import importlib.resources
import json
import pathlib
import re
import shutil
import subprocess
import threading

import cases
import pytest

from lora_jax.serving import page

FILE = importlib.resources.files("lora_jax.serving") / "page.html"


def test_the_page_is_small_and_loads_nothing():
    text = page.page()
    assert len(text.encode()) < 20_000
    assert not re.findall(r"https?:|//\w|\bsrc=|@import|url\(", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert "localStorage" not in text


def test_every_field_has_a_name_for_readers_of_the_screen():
    text = page.page()
    fields = re.findall(r"<(?:input|select|textarea)[^>]*>", text)
    assert len(fields) == 6
    for field in fields:
        before = text[: text.index(field)]
        inside = before.rfind("<label") > before.rfind("</label>")
        name = re.search(r'id="(\w+)"', field)[1]
        assert inside or f'<label class="hidden" for="{name}">' in text, field
    used = set(re.findall(r'\$\("(\w+)"\)', text))
    assert used and used <= set(re.findall(r'\bid="(\w+)"', text))


def test_the_page_is_served_to_everyone_and_may_only_ask_its_server(serve):
    answer = serve(api_key="secret").get("/")
    assert answer.status == 200 and answer.body.decode() == page.page()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_two_models_stream_side_by_side():
    node = shutil.which("node")
    if not node:
        pytest.skip("Node is not installed")
    program = pathlib.Path(__file__).parent / "run_page.mjs"
    ended = subprocess.run([node, program, FILE], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    seen, asked = found["seen"], [each["body"] for each in found["asked"]]

    said = {name: ["", f"{name} says <i>né😀"] for name in ("base", "mine")}
    assert seen["one"] == [[["user", "one"], said["mine"]]]
    assert seen["two"] == [[["user", "one"], said["mine"], ["user", "two"], said["mine"]],
                           [["user", "two"], said["base"]]]  # fmt: skip
    history = [{"role": "user", "content": "one"},
               {"role": "assistant", "content": "mine says <i>né😀"}]  # fmt: skip
    two = {"role": "user", "content": "two"}
    system = {"role": "system", "content": "be nice"}
    assert asked[0] == {"model": "mine", "stream": True, "temperature": 0.7,
                        "messages": history[:1]}  # fmt: skip
    assert [each["messages"] for each in asked[1:3]] == [[system, *history, two], [system, two]]
    assert [each["key"] for each in found["asked"][:2]] == [None, "Bearer secret"]
    assert found["kept"] == {"key": "secret"}

    assert seen["reset"] == [[], []]
    (stopped,) = seen["stopped"]
    assert stopped[0] == ["user", "wait"] and all(kind != "wrong" for kind, _ in stopped)
    assert seen["refused"] == [[["user", "refuse"], ["wrong", "no <b>"]]]
    assert seen["broken"][0][1:] == [said["mine"], ["wrong", "the engine failed"]]
    assert seen["lost"][0][2][0] == "wrong"
    assert seen["text"] == [[["user", "go on"], said["mine"]]]
    assert found["asked"][-1]["path"] == "v1/completions"
    assert (asked[-1]["prompt"], asked[-1]["max_tokens"]) == ("go on", 128)


FRAMES = """<!doctype html><body><script>
const sizes = [[1280, 800], [390, 844], [320, 568]], found = [];
const ready = sizes.map(([width, height]) => new Promise(done => {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height, src: "/page", style: "border: 0"});
  frame.onload = () => done(frame);
  document.body.append(frame);
}));
Promise.all(ready).then(async frames => {
  await new Promise(done => setTimeout(done, 500));
  for (const {contentDocument: page, contentWindow: view} of frames) {
    page.querySelector("details").open = true;
    page.getElementById("beside").click();
    const cut = [...page.querySelectorAll("button, select, textarea, h1, label")]
      .filter(each => each.scrollWidth > each.clientWidth + 1 && !each.closest(".hidden"));
    const outside = [...page.querySelectorAll("button, select, textarea, section")]
      .filter(each => each.getBoundingClientRect().right > view.innerWidth + 1);
    found.push({cut: cut.map(each => each.outerHTML), outside: outside.map(each => each.outerHTML),
                sections: page.querySelectorAll("section").length,
                back: view.getComputedStyle(page.body).backgroundColor});
  }
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
});
</script>"""


@pytest.mark.parametrize(
    "number, back", [*cases.long((1, "rgb(247, 247, 245)")), (0, "rgb(23, 24, 27)")]
)
def test_nothing_is_cut_on_a_desktop_or_a_phone(number, back, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("Chromium is not installed")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            texts = {"/": FRAMES, "/page": page.page()}
            models = json.dumps({"data": [{"id": "a-model-with-a-long-name" * 3}, {"id": "mine"}]})
            self.send_response(200)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(texts.get(self.path, models).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking", "--virtual-time-budget=5000", "--dump-dom",
                 f"--blink-settings=preferredColorScheme={number}")  # fmt: skip
        where = f"--user-data-dir={tmp_path}", f"http://127.0.0.1:{server.server_port}/"
        ended = subprocess.run(
            [chromium, *flags, *where], capture_output=True, text=True, timeout=60
        )
        server.shutdown()
    frames = json.loads(html.unescape(re.search("FOUND(.*)END", ended.stdout)[1]))
    for each in frames:
        assert each == {"cut": [], "outside": [], "sections": 2, "back": back}
