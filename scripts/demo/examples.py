"""Examples for the demo out of the sample data: run by the environment of the trainings, which can decode videos.

python -m scripts.demo.examples FOLDER
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(folder: Path) -> None:
    """Write portrait.png, speech.wav, subject.png, picture.jpg and sound.* where the sample data have them."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    clip = ROOT / "float" / "sample_data" / "video" / "th019.mp4"
    with av.open(str(clip)) as container:
        next(container.decode(video=0)).to_image().resize((256, 256)).save(folder / "portrait.png")
    shutil.copy(ROOT / "float" / "sample_data" / "audio" / "th009.wav", folder / "speech.wav")
    pictures = sorted((ROOT / "bagel" / "sample_data" / "images").glob("*.jpg"))
    shutil.copy(pictures[len(pictures) // 2], folder / "picture.jpg")
    subjects = sorted((ROOT / "opens2v" / "sample_data" / "subject_crops").rglob("*_penguin.png")) or pictures
    shutil.copy(subjects[0], folder / f"subject{subjects[0].suffix}")
    sounds = sorted(
        path for path in (ROOT / "multimodal" / "sample_data").rglob("*") if path.suffix in (".wav", ".flac", ".ogg")
    )
    if sounds:
        shutil.copy(sounds[0], folder / f"sound{sounds[0].suffix}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
