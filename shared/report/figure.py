"""One picture of what several runs made: for each report its first wide picture, or three frames of its first video.

`python -m shared.report.figure OUT/dit/report.json ... --output OUT/figure.jpg`; run_all.sh writes it next to its page.
"""

import argparse
import json
from pathlib import Path

from shared.errors import UserError, check_output, command, written_aside

WIDTH, MARGIN, TITLE_HEIGHT = 1000, 12, 50  # pixels
TALLEST = 0.36  # height over width; what is taller is cut below
WIDE = 1.1  # width over height
CAPTION = 100  # characters
FRAMES = (0.2, 0.5, 0.8)  # places in a video
PICTURES, VIDEOS = {".png", ".jpg", ".jpeg"}, {".mp4", ".webm"}


def open_picture(path: Path):
    """The picture, or three frames of the video side by side; None for any other file."""
    from PIL import Image

    if path.suffix in PICTURES:
        return Image.open(path).convert("RGB")
    if path.suffix not in VIDEOS:
        return None
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    shown = [frames[int(place * len(frames))] for place in FRAMES]
    strip = Image.new("RGB", (sum(frame.width for frame in shown) + MARGIN * 2, shown[0].height), "white")
    for number, frame in enumerate(shown):
        strip.paste(frame, (number * (frame.width + MARGIN), 0))
    return strip


def strip_of(report: Path):
    """(title, caption, picture of full width) of one report; the picture is None when it shows none."""
    from PIL import Image

    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        title, samples = content["title"], [(report.parent / row["path"], row["caption"]) for row in content["samples"]]
    except FileNotFoundError:
        raise UserError(f"{report}: no such report; run the system's metrics first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report}: not a report ({error}); run the system's metrics again") from None
    found = ((caption, open_picture(path)) for path, caption in samples if path.exists())
    pictures = [(caption, picture) for caption, picture in found if picture is not None]
    if not pictures:
        return title, "", None
    wide = (entry for entry in pictures if entry[1].width >= WIDE * entry[1].height)
    caption, picture = next(wide, pictures[0])
    height = round(picture.height * WIDTH / picture.width)
    picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    return title, caption, picture.crop((0, 0, WIDTH, min(height, round(TALLEST * WIDTH))))


def short(caption: str) -> str:
    """The caption in what the built-in font can show, on one line."""
    text = " ".join("".join(letter if letter.isascii() else " " for letter in caption).split())
    return text if len(text) <= CAPTION else f"{text[:CAPTION].rsplit(' ', 1)[0]} ..."


def write_figure(reports: list[Path], output: Path) -> None:
    """Write the strips of all reports below one another; those without a picture are left out."""
    from PIL import Image, ImageDraw, ImageFont

    strips = [strip for strip in map(strip_of, reports) if strip[2] is not None]
    if not strips:
        raise UserError("no report has a picture or a video; run the systems' metrics first")
    height = sum(TITLE_HEIGHT + picture.height + MARGIN for *_, picture in strips)
    page = Image.new("RGB", (WIDTH + 2 * MARGIN, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for title, caption, picture in strips:
        draw.text((MARGIN, top + 4), title, fill="black", font=ImageFont.load_default(size=18))
        draw.text((MARGIN, top + 28), short(caption), fill="#666666", font=ImageFont.load_default(size=13))
        page.paste(picture, (MARGIN, top + TITLE_HEIGHT))
        top += TITLE_HEIGHT + picture.height + MARGIN
    with written_aside(output) as temporary:
        page.save(temporary, format="PNG" if output.suffix.lower() == ".png" else "JPEG", quality=85)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="report.json files, in the order of the figure")
    parser.add_argument("--output", type=Path, required=True, help="the .jpg or .png file to write")
    options = parser.parse_args(argv)
    check_output(options.output, tuple(sorted(PICTURES)))
    write_figure(options.reports, options.output)
    print(f"figure: {options.output}")


if __name__ == "__main__":
    main()
