"""The report stands alone: what it shows is in the page, and what it cannot show it names."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.report.page import MAX_EMBEDDED, Bar, Sample, main, write_index, write_report

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f6"
    "45400000000049454e44ae426082"
)


def make_run(folder, title="A run", bars=(), samples=(), summary=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i, "train/loss": 2.0 / i, "train/lr": 0.1} for i in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"command": "python toy/train.py --config small", **options}
    return write_report(folder, title=title, summary=summary or {}, bars=list(bars), samples=list(samples), **options)


def loaded(page: str) -> list[str]:
    """What a browser would fetch for the page: targets of src, href, url() and @import, apart from what is inside."""
    targets = re.findall(r"""(?:src|href)\s*=\s*['"]?([^'"\s>]+)""", page)
    targets += re.findall(r"url\(['\"]?([^'\")]+)", page) + re.findall(r"@import\s+(\S+)", page)
    return [target for target in targets if not target.startswith(("data:", "#"))]


def test_the_page_fetches_nothing(tmp_path):
    (tmp_path / "picture.png").write_bytes(PNG)
    (tmp_path / "sound.wav").write_bytes(b"RIFF")
    (tmp_path / "film.mp4").write_bytes(b"ftyp")
    (tmp_path / "answer.txt").write_text("a <b> cat")
    samples = [Sample(name, f"this is {name}") for name in ("picture.png", "sound.wav", "film.mp4", "answer.txt")]
    make_run(tmp_path, samples=samples)
    page = (tmp_path / "report.html").read_text()
    assert loaded(page) == []
    assert "src='data:image/png;base64,iVBOR" in page and "<video" in page and "<audio" in page and "<svg" in page
    assert "a &lt;b&gt; cat" in page
    assert all(f"this is {sample.path}" in page for sample in samples)
    # the detector itself
    assert loaded("<img src='http://a/b.png'><link href=x.css><style>@import y;p{background:url(z)}</style>") == [
        "http://a/b.png",
        "x.css",
        "z",
        "y;p{background:url(z)}</style>",
    ]


def test_a_missing_or_too_large_sample_is_named(tmp_path):
    (tmp_path / "large.png").write_bytes(b"0" * (MAX_EMBEDDED + 1))
    make_run(tmp_path, samples=[Sample("samples/gone.png", "lost"), Sample("large.png", "big")])
    page = (tmp_path / "report.html").read_text()
    assert "samples/gone.png is missing" in page and "lost" in page
    assert "large.png: 4.0 MB, too large to embed" in page and len(page) < MAX_EMBEDDED


BARS = [
    (Bar("a", 0.8, 0.7), True, "at least 0.7"),
    (Bar("b", 0.6, 0.7), False, "at least 0.7"),
    (Bar("c", 0.7, 0.7), True, "at least 0.7"),
    (Bar("d", 12.0, 15.0, "at most"), True, "at most 15"),
    (Bar("e", 16.0, 15.0, "at most"), False, "at most 15"),
    (Bar("f", 0.5), None, "-"),
    (Bar("g", None, 0.7), None, "at least 0.7"),
    (Bar("h", float("nan"), 0.7), False, "at least 0.7"),
    (Bar("i", np.float32(0.9), np.float64(0.7)), True, "at least 0.7"),
    (Bar("j", torch.tensor(0.9), 0.7), True, "at least 0.7"),
]


def test_the_verdict_on_every_bar(tmp_path):
    path = make_run(tmp_path, bars=[bar for bar, _, _ in BARS])
    found = {bar["name"]: bar for bar in json.loads(path.read_text())["bars"]}
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for bar, reached, target in BARS:
        assert bar.reached is reached and found[bar.name]["reached"] is reached, bar
        verdict = {True: "yes", False: "no", None: "-"}[reached]
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {bar.name} |")]
        assert line.endswith(f"| {target} | {verdict} |")
    assert page.count("<td class=yes>yes") == 5 and page.count("<td class=no>no") == 3
    assert found["h"]["value"] is None and found["i"]["value"] == pytest.approx(0.9)


def test_figures_come_back_as_numbers(tmp_path):
    summary = {"steps": 5, "share": np.float32(0.25), "score": torch.tensor(0.5), "bad": float("inf"), "word": "ten"}
    path = make_run(tmp_path, summary=summary, text="What is <seen>.")
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["summary"] == {"steps": 5, "share": 0.25, "score": 0.5, "bad": None, "word": "ten"}
    assert report["command"] == "python toy/train.py --config small"
    assert "What is &lt;seen&gt;." in (tmp_path / "report.html").read_text()
    assert "- share: 0.25" in (tmp_path / "report.md").read_text()


def test_curves_come_from_the_run_and_its_phases(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "metrics.jsonl").write_text('{"step": 3, "val/loss": 0.5}\n{"step": 4, "val/loss": null}\n')
    curves = json.loads(make_run(tmp_path).read_text())["curves"]
    assert set(curves) == {"train/loss", "first: val/loss"}
    assert curves["train/loss"][:2] == [[1, 2.0], [2, 1.0]] and curves["first: val/loss"] == [[3, 0.5]]
    assert list(json.loads(make_run(tmp_path, curves=["train/lr"]).read_text())["curves"]) == ["train/lr"]
    assert (tmp_path / "report.html").read_text().count("<svg") == 1


def test_a_run_without_curves_bars_and_samples_has_a_report(tmp_path):
    path = write_report(tmp_path / "new", title="Empty", command="-", summary={}, bars=[], samples=[])
    assert path == tmp_path / "new" / "report.json" and "Empty" in (tmp_path / "new" / "report.html").read_text()


def test_paths_are_kept_relative_to_the_report(tmp_path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    absolute = tmp_path / "run" / "samples" / "a.png"
    absolute.write_bytes(PNG)
    path = make_run(tmp_path / "run", samples=[Sample(absolute), Sample(Path("samples/a.png"))])
    assert [sample["path"] for sample in json.loads(path.read_text())["samples"]] == ["samples/a.png"] * 2
    assert str(tmp_path) not in (tmp_path / "run" / "report.md").read_text()


def test_the_index_joins_reports_in_their_order(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PNG)
    reports = [
        make_run(tmp_path / name, f"System {name}", [Bar("score", 1.0, 0.5)], [Sample("a.png", name, "drawn")])
        for name in ("two", "one")
    ]
    write_index(reports, tmp_path / "out" / "index.html", title="All", notes=["System <three> failed"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index("System &lt;three&gt; failed") < page.index("System two") < page.index("System one")
    assert page.count("data:image/png") == 2 and page.count("<svg") == 2 and loaded(page) == []
    assert "is missing" not in page and page.count("<!doctype html>") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"title": "x", "bars": 3}'])
def test_a_damaged_report_is_refused(tmp_path, text, capsys):
    damaged = tmp_path / "report.json"
    damaged.write_text(text)
    with pytest.raises(UserError, match="report.json: not a report"):
        write_index([damaged], tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()
    with pytest.raises(SystemExit) as ended:
        main([str(damaged), "--output", str(tmp_path / "index.html")])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone.json: no such report"):
        write_index([tmp_path / "gone.json"], tmp_path / "index.html")


def test_the_cost_of_every_phase_is_told(tmp_path):
    make_run(tmp_path / "run")
    for folder, rows in (("run", [(10, 0.5, 1.5), (30, 1.0, 2.5)]), ("run/base", [(60, 2.0, 0.5)])):
        (tmp_path / folder).mkdir(exist_ok=True)
        lines = [
            {"step": step, "perf/seconds_per_step": seconds, "perf/memory_gb": memory} for step, seconds, memory in rows
        ]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_report(tmp_path / "run", title="A", command="c", summary={}, bars=[], samples=[])
    report = json.loads(path.read_text())
    assert {part["phase"]: (part["steps"], part["memory_gb"]) for part in report["cost"]} == {
        "": (30, 2.5),
        "base": (60, 0.5),
    }
    minutes = {part["phase"]: part["minutes"] for part in report["cost"]}
    assert minutes == {"": pytest.approx(25 / 60), "base": 2.0}
    for name in ("report.md", "report.html"):
        assert "base: 60 steps in 2.0 minutes, 0.5 GB" in (tmp_path / "run" / name).read_text()


def test_what_was_made_stands_first_then_curves_then_figures_folded(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("one.png", "two.png", "film.mp4"):
        (tmp_path / "a" / name).write_bytes(PNG)
    bars = [Bar("loss", 0.3, target=0.4), Bar("recall", 0.5, target=0.4, baseline=0.1)]
    samples = [Sample("one.png", "first"), Sample("film.mp4", "moves"), Sample("two.png", "chosen", first=True)]
    path = make_run(tmp_path / "a", "Toy", bars, samples, summary={"steps": 5}, headline="names 84 of 100, guessing 6")
    write_index([path], tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    order = ["<h1>", "names 84 of 100, guessing 6", "chosen", "<h2>Curves", "<svg", "first", "moves", "<td>recall"]
    places = [page.index(text) for text in order]
    assert places == sorted(places) and page.count("base64") == 3  # nothing is embedded twice
    assert "<details" not in page[: places[4]] and "<td>recall" in page[page.index("<details>") :]
    assert page.count("<details>") == 2


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.wav", "b.png", "c.mp4", "d.webm", "e.mp4", "f.mp4"], ["c.mp4", "d.webm", "e.mp4"]),
        (["a.txt", "b.png", "c.png"], ["b.png"]),
        (["a.txt", "b.wav"], ["a.txt"]),
        ([], []),
    ],
)
def test_a_report_that_names_nothing_shows_its_videos_or_else_its_first_picture(tmp_path, names, shown):
    for name in names:
        (tmp_path / name).write_bytes(PNG)
    make_run(tmp_path, samples=[Sample(name, f"[{name}]") for name in names], bars=[Bar("r", 0.5, 0.4, baseline=0.1)])
    strip = (tmp_path / "report.html").read_text().split("<h2>Curves")[0]
    assert re.findall(r"<figcaption>\[(.*?)\]", strip) == shown and "r: 0.5, baseline 0.1" in strip


def test_videos_play_silently_and_sound_is_one_click_away(tmp_path):
    (tmp_path / "spoken.mp4").write_bytes(b"ftyp mp4a")
    (tmp_path / "silent.mp4").write_bytes(b"ftyp avc1")
    make_run(tmp_path, samples=[Sample("spoken.mp4", "a sentence"), Sample("silent.mp4", "a scene")])
    strip = (tmp_path / "report.html").read_text().split("<h2>Curves")[0]
    assert strip.count(" autoplay muted></video>") == 2 and " controls" not in strip
    (button,) = re.findall("<button type=button class=sound .*?</button>", strip)
    assert "aria-pressed=false" in button and "a sentence" in button and strip.count("class=pause") == 2


def tags_of(page: str) -> list[tuple[str, set[str]]]:
    """Every tag that a browser would see, with the names of its attributes."""
    found: list[tuple[str, set[str]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, {name for name, _ in attributes}))
    parser.feed(page)
    return found


HOSTILE = "</script><img src=x onerror=alert(1)>\n# |a|`b` *c* [d](http://e) '\"&"


def test_every_text_is_escaped_in_the_page_and_in_markdown(tmp_path):
    name = "a' onerror='x ](b) |.txt"
    (tmp_path / name).write_text(HOSTILE)
    bar = Bar(HOSTILE, 0.5, 0.4, baseline=0.1, note=HOSTILE)
    rows = [Sample(name, HOSTILE, HOSTILE), Sample("gone<b>.png", HOSTILE, HOSTILE)]
    path = make_run(
        tmp_path, HOSTILE, [bar], rows, {HOSTILE: HOSTILE}, text=HOSTILE, headline=HOSTILE, command="python x\n# y"
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "toy.log").write_text(HOSTILE)
    write_index(
        [path],
        tmp_path / "index.html",
        title=HOSTILE,
        notes=[HOSTILE],
        states={HOSTILE: HOSTILE},
        logs=tmp_path / "logs",
    )
    for page in ("report.html", "index.html"):
        tags = tags_of((tmp_path / page).read_text())
        names = {tag for tag, _ in tags}
        assert "img" not in names and "b" not in names and "a" not in names and names >= {"figure", "script", "details"}
        assert [tag for tag, attributes in tags if any(name.startswith("on") for name in attributes)] == []
        assert sum(tag == "script" for tag, _ in tags) == 1
    markdown = (tmp_path / "report.md").read_text()
    assert re.findall(r"(?<!\\)[<*`]", markdown) == [] and "[d](" not in markdown and "\n# |" not in markdown
    assert "(a%27%20onerror%3D%27x%20%5D%28b%29%20%7C.txt)" in markdown and "    python x # y" in markdown
    (row,) = [line for line in markdown.splitlines() if "| 0.5 | 0.1 |" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_a_going_run_says_what_each_system_does(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "dit.log").write_text(
        "start\n 3%|#  | 5/9\r50%\nStep 40, Loss: 1.5 | of 2400 | lr 1e-3 | 0.59 GB | 0:27:43 left\n"
        "Step 40, val/loss: 0.8\n"
    )
    where = tmp_path / "index.html"
    main(
        [
            "--output",
            str(where),
            "--running",
            "--logs",
            str(tmp_path / "logs"),
            "--state",
            "dit=train",
            "--state",
            "float=waits",
        ]
    )
    page = where.read_text()
    assert "<th scope=row>dit<td>train<td>step 40 of 2400, 0:27:43 left" in page
    assert "<th scope=row>float<td>waits<td>" in page and "http-equiv=refresh" in page
    assert "<summary>dit: console" in page and "50%" in page and "5/9" not in page
    main(["--output", str(where)])
    assert "http-equiv" not in where.read_text() and "<table class=state" not in where.read_text()
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(where), "--state", "dit"])
    assert ended.value.code == 2


def test_the_page_is_made_for_a_phone_the_night_and_the_keyboard(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    make_run(tmp_path, samples=[Sample("a.png", "a card")], bars=[Bar("r", 1.0, 0.5)])
    page = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme:dark" in page and "max-width:48rem" in page and "prefers-reduced-motion" in page
    assert "alt='a card'" in page and 'role="img" aria-label="curves of train/loss' in page and ":focus-visible" in page
    assert "currentColor" in page and "#123456" not in page


def test_samples_are_found_from_the_working_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "samples").mkdir(parents=True)
    for name in ("one.png", "two.png"):
        (tmp_path / "out" / "samples" / name).write_bytes(PNG)
    samples = [Sample("samples/one.png"), Sample(Path("out/samples/two.png")), Sample("samples/none.png")]
    path = make_run(Path("out"), samples=samples)
    assert [item["path"] for item in json.loads(path.read_text())["samples"]] == [
        "samples/one.png",
        "samples/two.png",
        "samples/none.png",
    ]
    write_index([path], Path("index.html"))
    assert Path("index.html").read_text().count("is missing") == 1
