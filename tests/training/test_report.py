"""report.html: the page of a run, made from its run.json and metrics.jsonl alone."""

import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import cases
import cli
import pytest

from lora_jax.training.report import curves, formatting, style
from lora_jax.training.report import page as report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
EVIL = "</pre><script>alert('1')</script><img src=x onerror=alert(2)> & \"\ud800\x00"
ANSWER = {"prompt": "Tom has 41 cats.", "expected": " He likes cat 1.", "text": " He <b>sat</b>."}
RECORD = {
    "status": "finished",
    "settings": {"rank": 2, "targets": ["q_proj", "v_proj"], "quant": "int4", "lr": 2e-4,
                 "use_dora": False, "layers": None, "rank_pattern": {"q_proj": 4}},
    "num_steps": 60,
    "versions": {"lora-jax": "0.1.0", "jax": "0.10.2"},
    "device": "8 × NVIDIA H100 80GB HBM3 (gpu)",
    "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
    "memory": {"planned_bytes": 9_870_000_000, "bytes_before": 0},
    "peak_bytes": 10_230_000_000,
    "compile_seconds": 75.5,
    "base": {"id": "owner/model", "bytes": 3_595_632, "checksum": "65f3de6f", "commit": None},
    "data": {"train": "18967b34", "held out": None},
    "samples": {"before": [ANSWER], "after": [{**ANSWER, "text": ANSWER["expected"]}]},
    "seconds": {"load": 4.13, "evaluate": 128.4, "train": 8000.0},
}  # fmt: skip


def step(number, loss=1.0):
    return {"step": number, "loss": loss, "lr": 1e-4 / number, "grad_norm": 0.5,
            "tokens_per_second": 3000.0 + number, "data_wait": 0.01, "mfu": 0.423}  # fmt: skip


METRICS = [
    {"step": 0, "eval_loss": 1.0906, "exact_match": 0.0},
    *(step(number, 2 - number / 60) for number in range(1, 31)),
    {"step": 30, "eval_loss": 0.5},
    *(step(number, 2 - number / 60) for number in range(31, 61)),
    {"step": 60, "eval_loss": 0.0121, "exact_match": 0.975},
]


class Page(html.parser.HTMLParser):
    """Parses a page strictly: every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "link"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.words.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, name, class_=None):
        return [with_ for tag, with_ in self.elements
                if tag == name and class_ in (None, with_.get("class"))]  # fmt: skip


def page(record=RECORD, metrics=METRICS):
    return Page(report.render(record, metrics))


# ------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    "shown",
    [
        "owner/model ✓ finished 60 steps · rank 2 · q_proj, v_proj · base in int4",
        "Held-out loss 0.0121 from 1.0906 at step 0",
        "Exact match 97.5% from 0.0% at step 0",
        "Throughput 3.03k/s",
        "MFU 42%",
        "before step 0 after step 60 Loss 1.0906 0.0121 Perplexity 2.98 1.01 "
        "Exact match 0.0% 97.5%",
        "Step, planned 9.87 GB Peak, measured 10.2 GB",
        "load 4.1 s evaluate 2 min 8 s train 2 h 13 min Of this, compiling took 1 min 16 s. "
        "A step waited for data for 1.0% of its time.",
        "Prompt Tom has 41 cats. before ✗ not as expected He <b>sat</b>. "
        "after ✓ as expected He likes cat 1.",
        "rank 2 targets q_proj, v_proj quant int4 lr 0.0002 use-dora no layers – "
        "rank-pattern q_proj=4",
        "base owner/model base, size 3.6 MB base, checksum 65f3de6f data, train 18967b34",
        "device 8 × NVIDIA H100 80GB HBM3 (gpu) mesh data 2, fsdp 4, tensor 1 lora-jax 0.1.0",
        "step 30: held-out loss 0.5",
    ],
)
def test_the_page_shows(shown):
    assert shown in page().text


def test_the_loss_has_axes_a_curve_and_held_out_points():
    found = page()
    figures = [with_["class"] for with_ in found.all("figure")]
    assert figures == ["chart loss", "chart lr", "chart grad_norm", "chart tokens_per_second"]
    dots = [(with_["cx"], with_["cy"]) for with_ in found.all("circle", "held")]
    assert dots == [("0.0%", "45.47%"), ("50.0%", "75.0%"), ("100.0%", "99.4%")]  # of 0 to 2
    line = found.all("path", "line")[0]["d"]
    assert line.startswith("M16.7 8.3L33.3 16.7L") and line.count("L") == 59
    label = found.all("svg")[0]["aria-label"]
    assert label == "Loss. loss 1.98 at step 1, 1 at step 60"


def test_tick_labels_differ():
    assert formatting.ticks(curves.axis(0, 0.9).ticks) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert formatting.ticks(curves.axis(0, 2e-4).ticks) == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]
    assert formatting.ticks(curves.axis(0, 100_000, whole=True).ticks)[-2:] == ["80k", "100k"]
    assert curves.axis(0, 3, whole=True).ticks == [0, 1, 2, 3]
    near = curves.axis(1.23456, 1.23462)
    assert len(set(formatting.ticks(near.ticks))) == len(near.ticks) > 2
    assert near.low < 1.234561 and near.high > 1.234619
    for value in (0.0, 1e-300, 1e300, -2.0):
        assert curves.axis(value, value).high > value


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"status": "stopped at step 30"}, "■ stopped at step 30"),
        ({"status": "failed: no space: left"}, "✗ failed 60 steps"),
        ({"num_steps": 100}, "✓ finished 60 of 100 steps"),
        ({"status": "stopped at step 60"}, "before step 0 so far step 60"),
        ({"best": {"step": 30, "eval_loss": 0.01}}, "best step 30 Loss 1.0906 0.0121 0.0100"),
        ({"best": {"step": 60, "eval_loss": 0.0121}}, "97.5% The adapter is of step 60, the best."),
        ({"base": {"id": "/far/away/base-1"}}, "base-1 ✓"),
        ({"samples": {"before": [ANSWER]}}, "He <b>sat</b>. expected He likes cat 1."),
        ({"device": "1 × cpu (cpu)"}, "of this process"),
    ],
)
def test_the_page_of_other_runs_shows(change, shown):
    assert shown in page(RECORD | change).text


def test_the_page_shows_the_metrics_of_preferences():
    pairs = {"reward_accuracy": 0.75, "reward_margin": -0.5}
    held_out = {"eval_loss": 0.6, "eval_reward_accuracy": 0.5, "eval_reward_margin": 0.25}
    metrics = [{"step": 0, **held_out}, step(1) | pairs, {"step": 1, **held_out}]
    found = page(RECORD | {"settings": {"dpo": True}}, metrics)
    assert "Loss 0.6000 0.6000 Pairs in order 50.0% 50.0% Reward margin 0.25 0.25" in found.text
    assert "Perplexity" not in found.text and "step 1: margin -0.5" in found.text
    figures = [with_["class"] for with_ in found.all("figure")]
    assert figures[:3] == ["chart loss", "chart reward_accuracy", "chart reward_margin"]
    assert "step 1: held-out share 0.5" in found.text


# ------------------------------------------------------------------------- unusual input


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [step(1)],
        [{"step": 0, "eval_loss": 2.0}],
        [{"step": 0, "eval_loss": None, "exact_match": 0.5}, step(1, None)],
        [step(number, None if number % 3 else 1.0) for number in range(1, 40)],
        [step(1, math.nan), step(2, 1e308), {"step": 2, "eval_loss": 900.0}],
        [{"step": 1, "loss": 1.0}, {"loss": 1.0}, {"step": None}, {"step": 2, "loss": "1"}],
    ],
)
@pytest.mark.parametrize("record", [RECORD, {}, {"status": "running", "settings": {}}])
def test_any_run_has_a_page(record, metrics):
    text = report.render(record, metrics)
    Page(text)
    assert not re.search(r'[" (]-?(nan|inf)', text.partition("</style>")[2])


def test_values_that_are_not_finite_are_marked():
    found = page(metrics=[step(number, None if number == 3 else 1.0) for number in range(1, 6)])
    assert [with_["x1"] for with_ in found.all("line", "broken")] == ["60.0%"]
    assert "step 3: loss not finite" in found.text
    assert found.all("path", "line")[0]["d"].count("M") == 2


def test_nothing_in_the_data_is_html():
    answers = [{"prompt": EVIL, "expected": EVIL + "!", "text": EVIL}]
    record = RECORD | {
        "status": f"failed: {EVIL}",
        "settings": {EVIL: EVIL, "targets": [EVIL], "prompt": [EVIL]},
        "samples": {"before": answers, "after": answers},
        "base": {"id": EVIL, "commit": EVIL},
        "data": {EVIL: EVIL},
        "versions": {EVIL: EVIL},
        "seconds": {EVIL: 1.0},
        "mesh": {EVIL: 1},
        "device": EVIL,
    }
    found = page(record)
    names = {name for name, _ in found.elements}
    assert names == {name for name, _ in page().elements} | {"p"}
    assert "</pre><script>alert('1')</script><img src=x onerror=alert(2)> & \"" in found.text


def test_the_page_loads_no_other_file():
    text = report.render(RECORD, METRICS)
    assert "://" not in text and "url(" not in text and "@import" not in text
    for name, with_ in Page(text).elements:
        assert name not in ("script", "img", "iframe", "object", "base", "form")
        assert not {"src", "srcset", "style", "action"} & with_.keys()
        assert not [key for key in with_ if key.startswith("on")]
        assert with_.get("href", "data:,") == "data:,"
    assert "default-src 'none'" in text


def test_a_long_run_makes_a_small_page():
    metrics = [{"step": 0, "eval_loss": 2.0}]
    for number in range(1, 20_001):
        metrics.append(step(number, 1 + 1 / number + (number * 7919 % 1000) / 1e4))
        if number % 10 == 0:
            metrics.append({"step": number, "eval_loss": 1 + 1 / number})
    long = {"prompt": "&" * 10**6, "expected": "<" * 10**6, "text": "\n" * 10**6}
    text = report.render(
        RECORD | {"samples": {"before": [long, long], "after": [long, long]}}, metrics
    )
    assert len(text.encode()) < 300_000
    found = Page(text)
    assert "mean of 50 steps" in found.text and "996000 characters left out" in found.text
    assert len(found.all("circle", "held")) <= curves.DOTS and found.all("path", "band")


def test_thinning_keeps_the_mean_and_the_extremes():
    rows = [{"step": number, "loss": float(number == 57)} for number in range(1, 101)]
    points = curves.series(rows, "loss", 10)
    assert [(point.first, point.last) for point in points][:2] == [(1, 10), (11, 20)]
    assert points[5] == curves.Point(51, 60, 0.1, 0.0, 1.0, False) and len(points) == 10


# ------------------------------------------------------------------------- files


def test_the_command_writes_the_page_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    record = RECORD | {"device": EVIL}  # with a surrogate, which cannot be encoded
    (tmp_path / "run.json").write_text(json.dumps(record))
    rows = [json.dumps(row) for row in METRICS]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 61, "lo')
    ended = cli.run("report", tmp_path)
    assert ended.code == 0 and "".join(ended.out.split()) == f"report{tmp_path}/report.html"
    written = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "after step 60" in written.text
    (tmp_path / "metrics.jsonl").unlink()
    assert cli.run("report", tmp_path).code == 0
    assert "No step has been logged." in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("run", "found"),
    [(None, "no run.json"), ("{", "Expecting"), ("[]", "no JSON object"), ("1", "no JSON object")],
)
def test_a_folder_without_a_run_is_refused(tmp_path, run, found):
    if run:
        (tmp_path / "run.json").write_text(run)
    message = cli.refused("report", tmp_path)
    assert found in message and "the folder of a run" in message and "run.json" in message


def test_a_page_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    (tmp_path / "report.new").mkdir()
    assert "a run's folder that can be written" in cli.refused("report", tmp_path)


# ------------------------------------------------------------------------- look


def colours():
    """{scheme: {name: colour}} of the style sheet."""
    light, dark = re.findall(r":root \{(.*?)\}", style.STYLE, re.DOTALL)
    found = {"light": re.findall(r"--(\w+): (#\w{6})", light)}
    found["dark"] = re.findall(r"--(\w+): (#\w{6})", dark)
    return {scheme: dict(pairs) for scheme, pairs in found.items()}


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [*cases.long("light"), "dark"])
def test_text_and_curves_have_enough_contrast(scheme):
    """WCAG asks for a contrast of 4.5 : 1 for text, and 3 : 1 for curves."""
    found = colours()[scheme]
    for name in ("text", "soft", "train", "held", "good", "bad", "warn"):
        for behind in ("page", "card"):
            high, low = sorted((luminance(found[name]), luminance(found[behind])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)


MEASURE = """\
<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>
<script>
onload = () => {
  const measure = (frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const edge = (element) => element.getBoundingClientRect().right;
    const all = [...page.querySelectorAll("main section *, main header *")];
    return {
      background: getComputedStyle(page.body).backgroundColor,
      over: root.scrollWidth - root.clientWidth,
      outside: all.filter((e) => edge(e) > edge(e.closest("section, header")) + 1)
        .map((e) => e.outerHTML.slice(0, 120)),
      columns: getComputedStyle(page.querySelector(".three")).gridTemplateColumns.split(" ").length,
      plot: page.querySelector(".plot > svg").getBoundingClientRect().width,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").length,
    };
  };
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", [*cases.long("light"), "dark"])
def test_it_fits_desktop_and_phone_in_light_and_dark(scheme, tmp_path):
    answer = {"prompt": "x" * 2000, "expected": "a " * 500, "text": "</pre>" + "y" * 500}
    record = RECORD | {
        "best": {"step": 41_500, "eval_loss": 1.0},
        "samples": {"before": [ANSWER, answer], "after": [ANSWER, answer]},
        "settings": {"dataset": "/long" * 60, "long_name_" * 9: 1},
        "status": "failed: " + "z" * 200,
        "base": {"id": "owner/" + "model" * 30},
    }
    metrics = [*METRICS, step(100_000), {"step": 100_000, "eval_loss": 1.0, "exact_match": 1.0}]
    text = html.escape(report.render(record, metrics)).replace("\x00", "")
    frames = [
        f'<iframe style="width: {width}px; height: 900px" srcdoc="{text}"></iframe>'
        for width in (1280, 800, 390, 320)
    ]
    (tmp_path / "measure.html").write_text(MEASURE + "\n".join(frames), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
         "--dump-dom", f"file://{tmp_path}/measure.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    measured = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert measured, done.stderr
    channels = [int(colours()[scheme]["page"][at : at + 2], 16) for at in (1, 3, 5)]
    found = json.loads(html.unescape(measured[1]))
    for frame in found:
        assert frame["background"] == f"rgb({', '.join(map(str, channels))})"
        assert frame["over"] == 0 and frame["outside"] == [] and frame["fetched"] == 0
    assert [frame["columns"] for frame in found] == [3, 3, 1, 1]
    assert found[0]["plot"] > 900 and 250 < found[2]["plot"] < 390
