"""The report: what the page says of runs, what it shows of their images, what it refuses."""

import base64
import html
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from configs import evaluate_digits
from supcon_jax import evaluate
from supcon_jax.page import charts, pictures
from supcon_jax.tools import report
from tests.runs import pretrain_config, save_made_up, shrink, snapshot

TEST_IMAGES = 120
VOID = {"meta", "br", "img", "link"}


class Page(html.parser.HTMLParser):
    """A parsed page: every element's attributes, the text, and whether tags match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.mismatched = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, name=None):
        return [a for t, a in self.elements if t == tag and (name is None or name in a)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining run with a probe and its evaluation; classes are script tags."""
    folder = tmp_path_factory.mktemp("runs")
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    names = np.array([f"<script>window.bad={d}</script>" for d in range(10)])
    labels, test = names[digits.target], slice(400, 400 + TEST_IMAGES)
    np.savez(
        folder / "data.npz",
        train_images=images[:400],
        train_labels=labels[:400],
        test_images=images[test],
        test_labels=labels[test],
    )
    data = {"data.name": "arrays", "data.root": str(folder / "data.npz")}
    config = pretrain_config(**data, **{"probe.learning_rate": 0.01})
    save_made_up(config, folder / "pretrain")
    config = shrink(evaluate_digits.get_config())
    config.update_from_flattened_dict(data | {"pretrained": str(folder / "pretrain")})
    evaluate.evaluate(config, folder / "evaluate")
    return folder


@pytest.fixture(scope="module")
def page(runs):
    """The page of both, as text."""
    out = runs / "report.html"
    report.main([*(str(runs / n) for n in NAMES), f"--out={out}"])
    return out.read_text()


NAMES = ("pretrain", "evaluate")


def test_the_page_is_whole_and_fetches_nothing(page):
    parsed = Page(page)
    assert parsed.mismatched == [] and parsed.open == []
    assert [a["id"] for a in parsed.all("section")] == [
        *("summary", "curves", "map", "neighbours"),
        *("calibration", "confusion", "hardest", "config"),
    ]
    links = {a["href"] for a in parsed.all("a")}
    assert links == {f"#{a['id']}" for a in parsed.all("section")}
    assert all(a["href"].startswith("#m") for a in parsed.all("use"))
    # Nothing else is named that a browser would fetch.
    assert not parsed.all("link") and not parsed.all("img")
    assert not re.search(r"(src|srcset|@import|xlink)\s*=|https?://", page)
    assert {m[:11] for m in re.findall(r"url\((.*?)\)", page)} == {"data:image/"}
    assert len(page) < 1e6


def test_what_users_wrote_stays_text(page):
    parsed = Page(page)
    (script,) = parsed.all("script")
    assert script == {}
    assert "&lt;script&gt;window.bad=7" in page and "<script>window" not in page
    assert "<script>window.bad=7</script>" in parsed.text


def test_numbers_are_those_of_the_runs(page, runs):
    text = Page(page).text
    for name in NAMES:
        final = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
        for metric in ("knn/top1", "eval/top1"):
            if metric in final:
                assert f"{final[metric]:.2%}" in text
    assert "pretraining, supcon" in text and "evaluate" in text
    assert "Robustness (needs robustness.csv)" in text  # what is missing is said


def test_curves_invert_to_the_metrics(page, runs):
    lines = [
        json.loads(line)
        for line in (runs / "pretrain/metrics.jsonl").read_text().splitlines()
    ]
    expected = [(r["epoch"], r["train/loss"]) for r in lines if "train/loss" in r]
    found = re.search(
        r'data-frame="([^"]*)"(?:(?!</svg>).)*?points="([^"]*)"[^>]*'
        r'data-name="pretrain loss"',
        page,
    )
    x0, x1, y0, y1, left, right, bottom, top = map(float, found[1].split())
    places = np.array([p.split(",") for p in found[2].split()], float)
    x = x0 + (places[:, 0] - left) / (right - left) * (x1 - x0)
    y = y0 + (bottom - places[:, 1]) / (bottom - top) * (y1 - y0)
    scale = [x1 - x0, y1 - y0]
    np.testing.assert_allclose(
        np.column_stack([x, y]) / scale, np.array(expected) / scale, atol=1e-3
    )


def sprite_tiles(page):
    """The thumbnails of the page's only gallery, `[m, 8, 8, 3]`."""
    (encoded,) = re.findall(
        r"\.g0\{background-image:url\(data:image/png;base64,([^)]*)", page
    )
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    rows, columns = picture.shape[0] // 8, picture.shape[1] // 8
    assert columns == 50
    tiles = picture.reshape(rows, 8, columns, 8, 3).swapaxes(1, 2)
    return tiles.reshape(-1, 8, 8, 3)[:TEST_IMAGES]


def test_maps_have_every_image_with_its_class(page, runs):
    with np.load(runs / "data.npz") as file:
        images, labels = file["test_images"], file["test_labels"]
    np.testing.assert_array_equal(sprite_tiles(page), images)
    # One encoder, so one map, whatever the number of runs that use it.
    (box,) = Page(page).all("div", "data-map")
    data = json.loads(box["data-map"])
    assert data["places"] == list(range(TEST_IMAGES))
    assert [data["names"][c] for c in data["labels"]] == labels.tolist()
    assert "Used by pretrain, evaluate." in Page(page).text
    maps = re.findall(r'<svg[^>]*class="map".*?</svg>', page)
    assert len(maps) == 2
    for svg in maps:
        colours = [int(c) for c in re.findall(r"<use [^>]*c(\d)", svg)]
        assert colours == [c % 8 for c in data["labels"]]


def test_the_hardest_is_the_one_with_the_largest_loss(page, runs):
    with np.load(runs / "evaluate/predictions.npz") as file:
        logits, labels = file["logits"].astype(float), file["labels"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    section = page[page.index('id="hardest"') : page.index('id="config"')]
    places = re.findall(r"--x:(\d+);--y:(\d+)", section)
    shown = [int(x) + 50 * int(y) for x, y in places]
    assert shown == np.argsort(-losses)[: len(shown)].tolist() and len(shown) == 24
    told = [float(v) for v in re.findall(r"<b>([\d.]+)</b></figcaption>", section)]
    np.testing.assert_allclose(told, np.sort(losses)[::-1][:24], atol=0.006)


def test_the_matrix_has_every_prediction(page):
    svg = re.search(r'<svg[^>]*class="matrix".*?</svg>', page)[0]
    cells = re.findall(r'class="mid cell[^"]*"[^>]*>(\d+)<', svg)
    assert sum(map(int, cells)) == TEST_IMAGES


def test_neighbours_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(60, 5)), rng.integers(0, 4, 60)
    unit = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    found = pictures._neighbours(unit, labels)
    assert [labels[query] for query, _ in found] == [0, 1, 2, 3]
    index = NearestNeighbors(n_neighbors=9, metric="cosine").fit(unit)
    for query, nearest in found:
        distances, rows = index.kneighbors(unit[query : query + 1])
        assert [n for n, _ in nearest] == rows[0, 1:].tolist()
        np.testing.assert_allclose(
            [c for _, c in nearest], 1 - distances[0, 1:], atol=1e-5
        )


def make_run(path, lines=2, final=True, **config):
    """A workdir as a run leaves it, without checkpoints."""
    path.mkdir()
    data = {"image_size": 8, "eval_resize": 8}
    config = {"mode": "linear_eval", "pretrained": "random", "data": data} | config
    config |= {"epochs": 4.0}
    (path / "config.json").write_text(json.dumps(config))
    records = [
        {"step": 10 * n, "epoch": float(n), "wall_s": 5.0 * n, "train/loss": 1 / n}
        for n in range(1, lines + 1)
    ]
    if final and records:
        records[-1] |= {"final": True, "knn/top1": 0.75}
    text = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(text)
    return str(path)


def write(*arguments):
    report.main([str(argument) for argument in arguments])


def test_runs_are_compared_and_other_tools_files_are_shown(tmp_path, capsys):
    first = make_run(tmp_path / "a", loss={"temperature": 0.1}, seed=3)
    second = make_run(tmp_path / "b<i>", loss={"temperature": 0.2}, seed=3, log_every=7)
    (tmp_path / "a" / "robustness.csv").write_text(
        "corruption,top1_1,top1_5,top1_mean,ece_1\n<u>fog,0.9,0.5,,1\nclean,,,0.9,1\n"
    )
    (tmp_path / "b<i>" / "robustness.csv").write_text(
        "corruption,severity,top1,top5\n<u>fog,1,0.8,1\n<u>fog,5,0.4,1\nmean,,0.7,1\n"
    )
    (tmp_path / "a" / "embeddings.json").write_text(
        json.dumps({"embedding": {"rankme": 12.5, "recall": {"1": 0.5}}, "n": 3})
    )
    write(first, second, f"--out={tmp_path / 'out.html'}")
    page = (tmp_path / "out.html").read_text()
    parsed = Page(page)
    assert parsed.mismatched == [] and parsed.open == []
    assert "what changes a result: loss.temperature." in parsed.text
    marked = re.findall(r'<tr class="marked"><th scope="row">([^<]*)', page)
    assert marked == ["log_every", "loss.temperature"]  # the seed is one and the same
    assert "<i>" not in page.replace('<i class="', "") and "<u>" not in page
    assert (
        "a, &lt;u&gt;fog: 70<" in page
    )  # the mean of both severities, and no other bar
    assert "b&lt;i&gt;, &lt;u&gt;fog: 60<" in page
    assert page.count('class="bar ') == 2
    for text in ("rankme 12.5", "recall.1 0.5", "75.00%"):
        assert text in parsed.text
    assert "an untrained encoder" in capsys.readouterr().out  # why there is no map


def test_an_unfinished_run_is_shown_as_such(tmp_path, capsys):
    run = make_run(tmp_path / "half", final=False)
    none = make_run(tmp_path / "none", lines=0)
    (tmp_path / "half" / "predictions.npz").write_bytes(b"PK\x03\x04 half of it")
    (tmp_path / "half" / "robustness.csv").write_text("a,b\n1,2\n")
    before = snapshot(tmp_path)
    write(run, none, f"--out={tmp_path / 'out.html'}")
    text = Page((tmp_path / "out.html").read_text()).text
    assert "⚠ not finished: it reached step 20 of 40; the command" in text
    assert "⚠ not finished: it has written no metrics yet" in text
    assert "predictions.npz cannot be read, and is left out" in text
    assert "it has no top-1 of a corruption and severity" in text
    assert {p: c for p, c in snapshot(tmp_path).items() if p in before} == before


def test_data_that_moved_leave_a_page_without_pictures(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "moved")
    data, away = tmp_path / "moved/data.npz", tmp_path / "away.npz"
    data.rename(away)
    for name in NAMES:
        path = tmp_path / "moved" / name / "config.json"
        path.write_text(path.read_text().replace(str(runs), str(tmp_path / "moved")))
    workdirs = [str(tmp_path / "moved/evaluate")]
    out = tmp_path / "out.html"
    write(*workdirs, f"--out={out}")
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "evaluate: no pictures: " in said
    parsed = Page(out.read_text())
    ids = [a["id"] for a in parsed.all("section")]
    assert "map" not in ids and {"calibration", "confusion"} <= {*ids}
    assert "no pictures: " in parsed.text and "<script>window.bad=1" in parsed.text
    # Where they are now, they are the same; others are noticed.
    write(*workdirs, f"--out={out}", f"--config.data.root={away}")
    assert "warning" not in capsys.readouterr().out and 'id="map"' in out.read_text()
    with np.load(away) as file:
        arrays = dict(file)
    arrays["test_images"] = arrays["test_images"][::-1]
    np.savez(away, **arrays)
    write(*workdirs, f"--out={out}", f"--config.data.root={away}")
    assert "was made with other data; evaluation split" in capsys.readouterr().out


def test_an_encoder_that_has_changed_gives_no_map(runs, tmp_path, capsys):
    config = json.loads((runs / "pretrain/config.json").read_text())
    config |= {"mode": "linear_eval", "pretrained": str(runs / "pretrain")}
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear/config.json").write_text(json.dumps(config))
    facts = json.dumps({"frozen": "sha256:of another one"})
    (tmp_path / "linear/run.json").write_text(facts)
    write(tmp_path / "linear", f"--out={tmp_path / 'out.html'}")
    assert "pretrain is another one by now" in capsys.readouterr().out
    assert 'id="map"' not in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tmp}/nowhere"], "no run in"),
        (["{tmp}/empty"], "it has no config.json"),
        (["{tmp}/a", "{tmp}/a/"], "is given twice"),
        (["{tmp}/a", "--out={tmp}/no/report.html"], "no folder"),
        (["{tmp}/a", "--config.seed=1"], "allowed: data.dir, data.root"),
        (["{tmp}/broken"], "cannot read"),
    ],
)
def test_refusals_are_one_line(arguments, message, tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as exit:
        out = [f"--out={tmp_path / 'report.html'}"]
        write(*out, *(a.format(tmp=tmp_path) for a in arguments))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3, 7), (0.1, 39.95), (5.2, 5.3), (0, 1.2e4), (2, 2), (0, 0)]
)
def test_axes_end_at_round_numbers(low, high):
    first, last = charts.rounded(low, high)
    assert first <= low and last >= high and last > first
    marks = charts.ticks(first, last)
    assert marks[0] == pytest.approx(first) and marks[-1] == pytest.approx(last)
    assert 3 <= len(marks) <= 8
    assert len({charts.short(mark) for mark in marks}) == len(marks)


def test_curves_leave_out_what_is_no_number_and_what_cannot_be_seen():
    x = np.arange(5000.0)
    y = np.where(x == 7, np.nan, x)
    svg = charts.line_chart(
        [charts.Series("a&b", x, y)], title="<t>", x_label="x", y_label="y"
    )
    assert "nan" not in svg and "a&amp;b" in svg and "<t>" not in svg
    assert svg.count(",") < 500
    nothing = charts.Series("none", [1.0], [np.inf])
    assert charts.line_chart([nothing], title="", x_label="", y_label="") == ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that may not go to the network; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs a browser, one of {', '.join(names)}, which is not here")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=found,
            headless=True,
            args=[
                *("--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                "--disable-sync",
            ],
        )
        context.set_offline(True)
        yield context
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser, page, runs, width):
    tab = browser.new_page()
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.set_viewport_size({"width": width, "height": 844})
    tab.goto(f"file://{runs / 'report.html'}")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("window.bad === undefined")
    # An image of the map: the nearest to the pointer, as a thumbnail with its class.
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    point = tab.locator("svg.map").first.locator("use").nth(7)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    tile = tip.locator(".tile")
    assert tile.get_attribute("style").replace(" ", "") == "--x:7;--y:0;"
    assert tile.evaluate("e => getComputedStyle(e).backgroundImage.length") > 1000
    assert tip.inner_text().strip().startswith("<script>window.bad=")
    place = tip.bounding_box()
    assert place["x"] >= 0 and place["x"] + place["width"] <= width
    # One class alone, and all again.
    key = tab.locator("button.key").nth(3)
    data = json.loads(tab.locator(".maps").get_attribute("data-map"))
    hidden = 2 * sum(label != 3 for label in data["labels"])
    for expected in (hidden, 0):
        key.click()
        assert tab.locator("svg.map use.off").count() == expected
    # The values of curves.
    chart = tab.locator("svg.lines").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
    assert re.search(r"pretrain loss: [\d.]+", tip.inner_text())
    colours = []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        colours.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]
    assert problems == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
    tab.close()


def test_numbers_of_embeddings_say_what_they_were_measured_on(tmp_path):
    run = make_run(tmp_path / "a")
    measured = {"step": 8, "data": "digits", "num_train": 80, "num_evaluation": 500}
    measured |= {"ood": "synthetic", "changes": ["data.fraction=0.1"]}
    numbers = {"embedding": {"rankme": 12.5}}
    (tmp_path / "a/embeddings.json").write_text(json.dumps(measured | numbers))
    write(run, f"--out={tmp_path / 'out.html'}")
    text = Page((tmp_path / "out.html").read_text()).text
    assert (
        "a, embedding (step 8, digits, 80 references, against synthetic, "
        "data.fraction=0.1)"
    ) in text
    assert "⚠ embeddings.json measured step 8, and the newest is 20" in text


@pytest.mark.parametrize("encoder", ["one_layer", "resnet8"])
def test_a_probe_at_another_image_size_has_a_page(encoder, runs, tmp_path, capsys):
    """With a map, where the encoder takes images of that size; else the reason is told."""
    small = {"encoder.name": encoder, "encoder.width": 0.25}
    if encoder == "one_layer":
        small = {}
    save_made_up(pretrain_config(**small), tmp_path / "pretrain")
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), np.uint8)
    labels = np.arange(20) % 10
    np.savez(
        tmp_path / "twelve.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    data = {"data.name": "arrays", "data.root": str(tmp_path / "twelve.npz")}
    sizes = {"data.image_size": 12, "data.eval_resize": 12}
    config = pretrain_config(**small | data | sizes)
    config.mode, config.pretrained = "linear_eval", str(tmp_path / "pretrain")
    (tmp_path / "linear").mkdir()
    content = json.dumps(config.to_dict())
    (tmp_path / "linear/config.json").write_text(content)
    write(tmp_path / "linear", f"--out={tmp_path / 'out.html'}")
    page = (tmp_path / "out.html").read_text()
    assert ('id="map"' in page) == (encoder == "resnet8")
    reason = "linear: no map: "
    assert (reason in capsys.readouterr().out) == (encoder == "one_layer")
