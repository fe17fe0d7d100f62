"""The report stands alone: what it shows is in the page, and what it cannot show it names."""

import json
import re
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


def test_the_bars_of_all_systems_stand_in_one_table_on_top(tmp_path):
    bars = [Bar("recall", 0.5, target=0.4, baseline=0.1)]
    paths = [make_run(tmp_path / name, title=f"System {name}", bars=bars) for name in "ab"]
    write_index(paths, tmp_path / "index.html")
    top = (tmp_path / "index.html").read_text().split("<section>")[0]
    assert top.count("<td>recall") == 2 and "<td>System a" in top and "<td>System b" in top


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
