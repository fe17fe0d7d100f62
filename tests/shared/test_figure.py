"""The figure shows of every report what can be shown, and says what cannot be read."""

import json

import pytest
from PIL import Image

from shared.errors import UserError
from shared.report.figure import MARGIN, TALLEST, TITLE_HEIGHT, WIDTH, main, short

TOP = round(TALLEST * WIDTH)


def make_report(folder, pictures: dict[str, tuple[int, int, str]], others: tuple[str, ...] = ()):
    """A report over single-coloured pictures, (width, height, colour) by name, and other files."""
    folder.mkdir()
    for name, (width, height, colour) in pictures.items():
        Image.new("RGB", (width, height), colour).save(folder / name)
    rows = [{"path": name, "caption": f"this is {name}", "group": ""} for name in (*others, *pictures)]
    (folder / "report.json").write_text(json.dumps({"title": folder.name, "samples": rows}))
    return folder / "report.json"


def test_every_report_gives_its_first_wide_picture(tmp_path):
    one = make_report(tmp_path / "one", {"square.png": (50, 50, "red"), "wide.png": (200, 20, "blue")}, ("gone.png",))
    two = make_report(tmp_path / "two", {"tall.png": (20, 200, "lime")}, ("words.txt",))
    none = make_report(tmp_path / "none", {})
    main.__wrapped__([str(one), str(none), str(two), "--output", str(tmp_path / "made" / "figure.png")])
    figure = Image.open(tmp_path / "made" / "figure.png").convert("RGB")
    heights = [round(WIDTH / 10), TOP]  # the wide one keeps its shape, the tall one is cut
    assert figure.size == (WIDTH + 2 * MARGIN, sum(heights) + 2 * (TITLE_HEIGHT + MARGIN))
    assert figure.getpixel((MARGIN + 5, TITLE_HEIGHT + 5)) == (0, 0, 255)
    assert figure.getpixel((MARGIN + 5, figure.height - MARGIN - 5)) == (0, 255, 0)


def test_a_suffix_in_capitals_is_the_same_kind_of_picture(tmp_path):
    report = make_report(tmp_path / "one", {"a.png": (50, 50, "red")})
    main.__wrapped__([str(report), "--output", str(tmp_path / "f.PNG")])
    assert Image.open(tmp_path / "f.PNG").format == "PNG"


def test_what_cannot_be_shown_is_said(tmp_path):
    report = make_report(tmp_path / "none", {})
    cases = (
        ([str(report)], "figure.png", "no report has a picture"),
        ([str(tmp_path / "gone.json")], "figure.png", "no such report"),
        ([str(report)], "figure.gif", "give a name that ends in"),
    )
    for reports, name, message in cases:
        with pytest.raises(UserError, match=message):
            main.__wrapped__([*reports, "--output", str(tmp_path / name)])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="not a report"):
        main.__wrapped__([str(tmp_path / "bad.json"), "--output", str(tmp_path / "figure.png")])


def test_captions_fit_on_a_line():
    assert short("drawn: 一 a  red\napple") == "drawn: a red apple"
    assert len(short("word " * 50)) <= 104 and short("word " * 50).endswith(" ...")
