"""The guide's way from end to end: download over a bad line, train, go on elsewhere, report, embed, measure."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from multimodal import download_datasets, embed, metrics, train
from multimodal.download.catalogue import SETS, RemoteFile, RemoteSet
from tests.launching import final_tensors, same_bits
from tests.multimodal.server import Site, serving
from tests.multimodal.test_download import sha

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210)}
GUIDE = {  # the guide's keys; the sizes are those of a test
    "model": {"size": "mini", "embed_dim": 32, "use_checkpoint": True},
    "training": {
        "epochs": 5,
        "batch_size": 4,
        "learning_rate": "1e-4",
        "use_amp": True,
        "gradient_accumulation_steps": 2,
    },
    "paths": {"data_root": "./data", "output_dir": "./outputs"},
}


pytestmark = pytest.mark.usefixtures("small_network")


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def jpeg(colour: str, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-20, 20, (48, 64, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tone(seed: int) -> bytes:
    time = np.arange(8000) / 16000
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * (200 + 50 * seed) * time), 16000, format="WAV")
    return buffer.getvalue()


def publish(site: Site, patch: pytest.MonkeyPatch) -> None:
    """COCO, Clotho and AudioCaps in small, as their servers have them: of AudioCaps the tables alone."""
    names = list(COLOURS)
    counts = {"train": range(24), "val": range(24, 36)}
    annotations: dict[str, bytes] = {}
    for split, numbers in counts.items():
        listed = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
        texts = [{"id": n, "image_id": n, "caption": f"a {names[n % 3]} wall, number {n}"} for n in numbers]
        boxes = [{"image_id": n, "category_id": 1 + n % 3} for n in numbers]
        tree = {"images": listed, "annotations": texts}
        annotations[f"annotations/captions_{split}2017.json"] = json.dumps(tree).encode()
        tree = {"annotations": boxes, "categories": [{"id": n + 1, "name": f"class {n}"} for n in range(80)]}
        annotations[f"annotations/instances_{split}2017.json"] = json.dumps(tree).encode()
    archives = {"annotations/annotations_trainval2017.zip": zipped(annotations)}
    for split, numbers in counts.items():
        files = {f"{split}2017/{n:012d}.jpg": jpeg(names[n % 3], n) for n in numbers}
        archives[f"zips/{split}2017.zip"] = zipped(files)
    coco = tuple(RemoteFile(path, "always", sha(data), len(data), 10 * len(data)) for path, data in archives.items())
    plain: dict[str, bytes] = {}
    for name, numbers in (("development", range(12)), ("validation", range(12, 20))):
        rows = [f"{n}.wav,a tone {n},a sound" for n in numbers]
        plain[f"clotho_captions_{name}.csv"] = "\n".join(["file_name,caption_1,caption_2", *rows]).encode()
    sounds = zipped(
        {f"development/{n}.wav": tone(n) for n in range(12)} | {f"validation/{n}.wav": tone(n) for n in range(12, 20)}
    )
    clotho = tuple(RemoteFile(name, "always", sha(data), len(data)) for name, data in plain.items())
    clotho += (RemoteFile("sounds.zip", "always", sha(sounds), len(sounds), 10 * len(sounds)),)
    table = b"audiocap_id,youtube_id,start_time,caption\n1,abc,30,a bell\n2,def,0,rain\n"
    tables = tuple(RemoteFile(f"{split}.csv", split, sha(table), len(table)) for split in ("train", "val", "test"))
    own = SETS["audiocaps"]
    site.files = {**archives, **plain, "sounds.zip": sounds} | {
        f"{split}.csv": table for split in ("train", "val", "test")
    }
    patch.setitem(SETS, "coco", RemoteSet("coco", site.url, coco))
    patch.setitem(SETS, "clotho", RemoteSet("clotho", site.url, clotho))
    patch.setitem(SETS, "audiocaps", RemoteSet("audiocaps", site.url, tables, steps=own.steps, layout=own.layout))


def download(folder: Path, *names: str) -> int:
    words = ["--datasets", *names, "--data-root", str(folder / "data"), "--skip-existing", "--first-wait", "0"]
    try:
        download_datasets.main([*words, "--timeout", "5", "--yes"])
    except SystemExit as leaving:
        return int(str(leaving.code))
    return 0


def test_from_download_to_retrieval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with serving() as site:
        publish(site, monkeypatch)
        site.cut, site.reset = 9000, True  # every connection breaks after nine thousand bytes
        assert download(tmp_path, "coco", "clotho", "audiocaps") == 4  # AudioCaps' clips are left to ask for
        assert any(place for _, place in site.requests) and "forms.gle" in capsys.readouterr().out
        asked = len(site.requests)
        assert download(tmp_path, "coco", "clotho", "audiocaps") == 4
        assert not [path for path, _ in site.requests[asked:] if path.endswith(".zip")]  # fetched and marked

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(GUIDE))
    flags = ["--image-size", "32", "--image-patch", "8", "--audio-frames", "64", "--workers", "1", "--device", "cpu"]
    command = ["--config", "config.yaml", *flags, "--save-every", "1", "--keep-last", "9", "--logging-steps", "1"]
    train.main(command)
    out = tmp_path / "outputs"
    printed = capsys.readouterr().out
    assert "audiocaps" in printed and "Training goes on without it" in printed
    assert {path.name for path in (out / "checkpoints").glob("*.pt")} == {
        "best_model.pt",
        "final_model.pt",
        *(f"checkpoint_epoch_{n}.pt" for n in range(1, 6)),
    }
    assert list((out / "logs" / "tensorboard").rglob("events.*"))

    # In the middle of stage 2 (epochs 2 and 3), from one file, in another folder.
    carried = tmp_path / "carried.pt"
    shutil.copy(out / "checkpoints" / "checkpoint_epoch_2.pt", carried)
    train.main([*command, "--output-dir", "elsewhere", "--resume", str(carried)])
    for stage in ("stage2_align", "stage3_finetune"):
        assert same_bits(final_tensors(tmp_path / "elsewhere" / stage), final_tensors(out / stage))

    report = json.loads(next((out / "reports").glob("report_*.json")).read_text())
    assert report["run"]["exit_reason"] == "finished" and {row["stage"] for row in report["epochs"]} == {1, 2, 3}
    assert {row["dataset"] for row in report["data"]} == {"coco", "clotho"} and "mAP" in report["classification"]
    assert next((out / "reports").glob("report_*.md")).exists() and "<html" in (out / "report.html").read_text()

    model = torch.load(out / "checkpoints" / "best_model.pt", weights_only=True)
    assert model["best_metric"] == "val/retrieval" and "optimizer_state_dict" not in model

    embed.main(["encode", "--checkpoint", "outputs", "--images", "data/coco/val2017", "--output", "p.safetensors"])
    capsys.readouterr()
    embed.main(["search", "--checkpoint", "outputs", "--index", "p.safetensors", "--query-text", "a red wall"])
    assert len(capsys.readouterr().out.splitlines()) == 10

    for place in sorted((tmp_path / "data" / "coco" / "val2017").glob("*.jpg")):
        folder = tmp_path / "classes" / list(COLOURS)[int(place.stem) % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(place, folder / place.name)
    metrics.main(["--checkpoint", "outputs", "--zeroshot", "classes", "--output", "zero.json"])
    assert json.loads((tmp_path / "zero.json").read_text())["zeroshot"]["items"] == 12
    metrics.main(["--checkpoint", "outputs", "--datasets", "coco", "--zeroshot", "coco80", "--output", "coco80.json"])
    assert json.loads((tmp_path / "coco80.json").read_text())["zeroshot"]["items"] == 12

    metrics.main(["--checkpoint", "outputs", "--output", "m.json", "--workers", "1"])
    found = json.loads((tmp_path / "m.json").read_text())["retrieval"]
    assert found["coco"]["items"] == 12 and found["clotho"]["items"] == 8
    assert found["coco"]["seen_in_training"] == 0 and found["clotho"]["item_to_text"]["chance_R@1"] == pytest.approx(
        1 / 8
    )


def test_the_clips_come_later_and_the_same_commands_take_them_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with serving() as site:
        publish(site, monkeypatch)
        assert download(tmp_path, "audiocaps") == 4
        (tmp_path / "data" / "audiocaps" / "audio" / "train").mkdir(parents=True)
        (tmp_path / "data" / "audiocaps" / "audio" / "train" / "Yabc_30.000_40.000.wav").write_bytes(tone(3))
        (tmp_path / "data" / "audiocaps" / "audio" / "train" / "2.wav").write_bytes(tone(5))
        assert download(tmp_path, "audiocaps") == 0
    flags = ["--image-size", "32", "--image-patch", "8", "--audio-frames", "64", "--device", "cpu", "--workers", "0"]
    words = ["--data-root", "data", "--datasets", "all", "--model-size", "mini", "--batch-size", "2", "--epochs", "1"]
    train.main([*words, *flags, "--max-steps", "1", "--output-dir", "out", "--label-set", "none"])
    assert "audiocaps train: 2 of 2 present" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoints" / "final_model.pt").exists()
