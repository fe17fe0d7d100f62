"""The five systems in a browser, over checkpoints made here or public ones. Start it with `bash scripts/demo.sh`.

Everything stays on this machine: the page is served at 127.0.0.1 unless asked otherwise, and it fetches nothing from
elsewhere. One job runs at a time, others wait in a queue; a job is a command of the system, see jobs.py.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")

import gradio as gr  # noqa: E402
from PIL import Image  # noqa: E402

from scripts.demo.jobs import PYTHON, ROOT, JobError, Jobs, text_of  # noqa: E402

SYSTEMS = ("float", "opens2v", "bagel", "dit", "multimodal")
LARGEST_UPLOAD = "30mb"
LONGEST_SOUND = 120  # seconds
WAITING = 16  # visitors in the queue
SEEN_SIDE = 256  # pixels; smaller pictures are enlarged in the chat
EMOTIONS = ["S2E", "angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PROGRESS = gr.Progress()  # Gradio finds it among the defaults of a function and hands in one for each visitor
STYLE = (
    ".gradio-container{width:min(70rem,100%)!important;max-width:none!important;margin:auto}"
    "footer,[aria-label=Share]{display:none!important}.message img{min-width:10rem}"
)
SOURCES: list[Any] = ["upload", "microphone"]
SEEN: list[Any] = [
    "download",
    "fullscreen",
]  # Gradio's share buttons upload elsewhere: left out, and hidden where it insists


class Demo:
    """The tabs and what their buttons do."""

    def __init__(self, runs: Path, checkpoints: dict[str, str], *, local: bool) -> None:
        """local: only this machine can reach the page, so a visitor may name any folder and any checkpoint on it."""
        self.jobs, self.local = Jobs(), local
        self.checkpoints = {name: checkpoints.get(name, str(runs / name)) for name in SYSTEMS}
        self.examples = self.jobs.folder / "examples"
        subprocess.run([str(PYTHON), "-m", "scripts.demo.examples", str(self.examples)], cwd=ROOT, check=False)

    def example(self, name: str) -> str | None:
        """The path of an example by its stem."""
        return next((str(path) for path in sorted(self.examples.glob(f"{name}.*"))), None)

    # --- running ---

    def follow(self, visitor: str, command: list, progress: Any) -> Iterator[str]:
        """Run a command, moving the bar; yields what to write under it. gr.Error with a sentence when it fails."""
        try:
            for step in self.jobs.run(visitor, command):
                said = step.line[:120] or "starting"
                progress(step.share, desc=f"{step.seconds:.0f} s: {said}")
                yield f"{step.seconds:.0f} s: {said}"
        except JobError as error:
            raise told(error) from None

    def checkpoint(self, system: str, given: str) -> str:
        """The checkpoint to use. gr.Error where there is nothing at its place."""
        path = (self.local and given.strip()) or self.checkpoints[system]
        if not (ROOT / path).exists():
            raise told(
                f"{path}: no such checkpoint; train one with bash run_all.sh --only {system}, or give another path"
            )
        return path

    def talk(self, face, sound, emotion, guidance, steps, seed, checkpoint, request: gr.Request, progress=PROGRESS):
        """A photo and a recording become a video."""
        if face is None or sound is None:
            raise told("give a photo and a recording")
        if (seconds := seconds_of(sound)) > LONGEST_SOUND:
            raise told(f"the recording lasts {seconds:.0f} seconds; at most {LONGEST_SOUND} are taken")
        made = self.jobs.new_folder() / "talk.mp4"
        command = ["float/generate.py", "--checkpoint", self.checkpoint("float", checkpoint), "--ref-path", face]
        command += ["--aud-path", sound, "--output", made, "--emo", emotion, "--seed", int(seed)]
        command += ["--a-cfg-scale", guidance, "--steps", int(steps)]
        for line in self.follow(request.session_hash, command, progress):
            yield None, line
        yield str(made), "done"

    def film(self, subject, prompt, steps, guidance, seed, checkpoint, request: gr.Request, progress=PROGRESS):
        """A subject's picture and a sentence become a video."""
        if subject is None:
            raise told("give a picture of the subject")
        made = self.jobs.new_folder() / "video.mp4"
        command = [
            "opens2v/generate.py",
            "--checkpoint",
            self.checkpoint("opens2v", checkpoint),
            "--ref-image",
            subject,
        ]
        command += ["--prompt", sentence(prompt), "--output", made, "--seed", int(seed), "--steps", int(steps)]
        command += ["--guidance-scale", guidance]
        for line in self.follow(request.session_hash, command, progress):
            yield None, line
        yield str(made), "done"

    def chat(self, message, task, history, picture, points, checkpoint, request: gr.Request, progress=PROGRESS):
        """One turn of the chat: the message and the last picture of the conversation go to the model."""
        prompt = sentence((message or {}).get("text"))
        given = [file for file in (message or {}).get("files", []) if file.lower().endswith(PICTURES)]
        history = [*history, *({"role": "user", "content": {"path": file}} for file in given)]
        history.append({"role": "user", "content": prompt})
        picture = given[-1] if given else picture
        if task in ("answer", "edit") and picture is None:
            raise told(f"to {task}, the model needs a picture; attach one, or let it draw one first")
        kind = {"draw": "t2i", "edit": "edit", "answer": "understand", "write": "text"}[task]
        made = self.jobs.new_folder() / ("answer.txt" if task in ("answer", "write") else "picture.png")
        command = ["bagel/generate.py", "--checkpoint", self.checkpoint("bagel", checkpoint), "--prompt", prompt]
        command += ["--task", kind, "--output", made, "--max-length", "200", "--num-timesteps", int(points)]
        command += ["--image", picture] if task in ("answer", "edit") else []
        for line in self.follow(request.session_hash, command, progress):
            yield history, picture, None, line
        if made.suffix == ".txt":
            answer: Any = made.read_text(encoding="utf-8").strip() or "(no words)"
        else:
            answer, picture = {"path": str(enlarged(made))}, str(made)
        yield [*history, {"role": "assistant", "content": answer}], picture, None, "done"

    def draw(self, prompt, count, sampler, steps, guidance, seed, checkpoint, request: gr.Request, progress=PROGRESS):
        """A sentence becomes pictures."""
        made = self.jobs.new_folder() / "pictures"
        command = ["dit/generate.py", "--checkpoint", self.checkpoint("dit", checkpoint), "--prompt", sentence(prompt)]
        command += ["--images-per-prompt", int(count), "--sampler", sampler, "--steps", int(steps)]
        command += ["--cfg-scale", guidance, "--seed", int(seed), "--output", made]
        for line in self.follow(request.session_hash, command, progress):
            yield None, line
        yield [str(path) for path in sorted(made.glob("*.png"))], "done"

    def search(self, folder, kind, text, picture, sound, count, checkpoint, request: gr.Request, progress=PROGRESS):
        """Search a folder's pictures or sounds by a text, a picture or a sound."""
        place = Path((self.local and (folder or "").strip()) or ROOT / "multimodal" / "sample_data")
        place = place if place.is_absolute() else ROOT / place
        if not place.is_dir():
            raise told(f"{place}: no such folder")
        checkpoint, work = self.checkpoint("multimodal", checkpoint), self.jobs.new_folder()
        queries = [("--query-text", text and sentence(text)), ("--query-image", picture), ("--query-audio", sound)]
        given = [(flag, value) for flag, value in queries if value]
        if len(given) != 1:
            raise told("give one of a text, a picture or a sound to search with")
        index = work / "index.safetensors"
        command = ["multimodal/embed.py", "encode", "--checkpoint", checkpoint, f"--{kind}", place, "--output", index]
        for line in self.follow(request.session_hash, command, progress):
            yield None, None, line
        command = ["multimodal/embed.py", "search", "--checkpoint", checkpoint, "--index", index, "--top-k", int(count)]
        for line in self.follow(request.session_hash, [*command, *given[0]], progress):
            yield None, None, line
        found = hits_of(self.jobs.printed(request.session_hash))
        rows = [[f"{score:.3f}", str(path)] for path, score in found]
        shown = [(shutil.copy(path, work), f"{score:.3f}") for path, score in found if path.suffix.lower() in PICTURES]
        yield shown, rows, "done" if rows else "nothing was found"

    # --- the page ---

    def page(self) -> gr.Blocks:
        """All tabs."""
        with gr.Blocks(title="Five trainings", analytics_enabled=False) as page:
            gr.Markdown("# Five trainings\nWhat was trained here, tried by hand. Nothing leaves this machine.")
            with gr.Tab("Talk (FLOAT)"):
                self._float()
            with gr.Tab("Film a subject (OpenS2V)"):
                self._opens2v()
            with gr.Tab("Chat (BAGEL)"):
                self._bagel()
            with gr.Tab("Draw (DiT)"):
                self._dit()
            with gr.Tab("Search (multimodal)"):
                self._multimodal()
        return page.queue(max_size=WAITING, default_concurrency_limit=1)

    def _bottom(self, system: str, verb: str) -> tuple[gr.Textbox, gr.Button, gr.Textbox]:
        """Checkpoint, the button that starts and the one that stops, and a line that says what is going on."""
        with gr.Accordion("checkpoint", open=False):
            checkpoint = gr.Textbox(
                label="a run's folder, or a public checkpoint", placeholder=self.checkpoints[system], value=""
            )
        with gr.Row():
            start, stop = gr.Button(verb, variant="primary"), gr.Button("Stop", variant="stop")
        state = gr.Textbox(label="state", interactive=False, max_lines=1)
        stop.click(self._stop, None, state, queue=False)
        return checkpoint, start, state

    def _stop(self, request: gr.Request) -> str:
        self.jobs.stop(request.session_hash)
        return "stopped"

    def _float(self) -> None:
        with gr.Row():
            face = gr.Image(self.example("portrait"), type="filepath", label="photo", buttons=SEEN)
            sound = gr.Audio(
                self.example("speech"), type="filepath", label="recording", sources=["upload", "microphone"]
            )
            video = gr.Video(label="video", autoplay=True, buttons=SEEN[:1])
        with gr.Row():
            emotion = gr.Dropdown(EMOTIONS, value="S2E", label="emotion (S2E: from the voice)")
            guidance = gr.Slider(0, 10, 2, step=0.5, label="guidance by sound")
            steps = gr.Slider(1, 50, 10, step=1, label="steps")
            seed = gr.Number(15, precision=0, minimum=0, label="seed")
        checkpoint, start, state = self._bottom("float", "Speak")
        start.click(self.talk, [face, sound, emotion, guidance, steps, seed, checkpoint], [video, state])

    def _opens2v(self) -> None:
        with gr.Row():
            # image_mode None: a cut-out keeps its transparency; "RGB" shows whatever colours lie under it
            subject = gr.Image(self.example("subject"), type="filepath", label="subject", buttons=SEEN, image_mode=None)
            video = gr.Video(label="video", autoplay=True, loop=True, buttons=SEEN[:1])
        prompt = gr.Textbox(
            "a big penguin moves to the right on a yellow background", label="what happens", max_length=500
        )
        with gr.Row():
            steps = gr.Slider(1, 100, 20, step=1, label="steps")
            guidance = gr.Slider(1, 10, 1.5, step=0.5, label="guidance by text")
            seed = gr.Number(42, precision=0, minimum=0, label="seed")
        checkpoint, start, state = self._bottom("opens2v", "Film")
        start.click(self.film, [subject, prompt, steps, guidance, seed, checkpoint], [video, state])

    def _bagel(self) -> None:
        chat, picture = gr.Chatbot(label="conversation", height=420, buttons=["copy"]), gr.State(None)
        message = gr.MultimodalTextbox(
            {"text": "a big dog in the upper left corner on a blue background", "files": []},
            file_types=["image"],
            label="message",
            submit_btn=False,
        )
        with gr.Row():
            task = gr.Radio(["draw", "edit", "answer", "write"], value="draw", label="the model shall")
            points = gr.Slider(2, 100, 25, step=1, label="points of the time grid")
        gr.Markdown(
            "Edits and answers look at the last picture of the conversation. The small model knows a few sentences: "
            "*what is in the picture?*, *what colour is the background?*, *make the background green*."
        )
        checkpoint, start, state = self._bottom("bagel", "Send")
        inputs = [message, task, chat, picture, points, checkpoint]
        gr.on([start.click, message.submit], self.chat, inputs, [chat, picture, message, state])

    def _dit(self) -> None:
        prompt = gr.Textbox(
            "a big ambulance in the upper left corner on a blue background", label="sentence", max_length=500
        )
        pictures = gr.Gallery(label="pictures", columns=4, height=320, object_fit="contain", buttons=SEEN)
        with gr.Row():
            count = gr.Slider(1, 16, 4, step=1, label="pictures")
            samplers = ["auto", "euler", "heun", "midpoint", "rk4", "dopri5", "sde", "ddim", "dpmpp_2m", "ddpm"]
            sampler = gr.Dropdown(samplers, value="auto", label="sampler")
            steps = gr.Slider(1, 250, 30, step=1, label="steps")
            guidance = gr.Slider(1, 15, 3, step=0.5, label="guidance")
            seed = gr.Number(0, precision=0, minimum=0, label="seed")
        checkpoint, start, state = self._bottom("dit", "Draw")
        inputs = [prompt, count, sampler, steps, guidance, seed, checkpoint]
        gr.on([start.click, prompt.submit], self.draw, inputs, [pictures, state])

    def _multimodal(self) -> None:
        with gr.Row():
            folder = gr.Textbox("", label="folder on this machine", placeholder="multimodal/sample_data")
            kind = gr.Radio(["images", "audio"], value="images", label="search among its")
            count = gr.Slider(1, 20, 8, step=1, label="results")
        with gr.Row():
            text = gr.Textbox("a red balloon", label="by a text", max_length=500)
            picture = gr.Image(type="filepath", label="or by a picture", buttons=SEEN)
            sound = gr.Audio(type="filepath", label="or by a sound", sources=SOURCES, buttons=SEEN[:1])
        gallery = gr.Gallery(label="found", columns=4, height=320, object_fit="contain", buttons=SEEN)
        table = gr.Dataframe(headers=["similarity", "file"], label="files", interactive=False)
        checkpoint, start, state = self._bottom("multimodal", "Search")
        inputs = [folder, kind, text, picture, sound, count, checkpoint]
        start.click(self.search, inputs, [gallery, table, state])


def enlarged(path: Path) -> Path:
    """The picture itself, or, where it is too small to see in a chat, a copy of whole-numbered size beside it."""
    with Image.open(path) as picture:
        factor = SEEN_SIDE // max(picture.size)
        if factor < 2:
            return path
        larger = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    copy = path.with_stem(f"{path.stem}_large")
    larger.save(copy)
    return copy


def told(what: Exception | str) -> gr.Error:
    """An error that the page shows as a sentence."""
    return gr.Error(str(what), print_exception=False, duration=20)


def sentence(text: str | None) -> str:
    """A visitor's sentence, or gr.Error."""
    try:
        return text_of(text, "the sentence")
    except JobError as error:
        raise told(error) from None


def seconds_of(path: str) -> float:
    """The length of a .wav; other files are judged by the command itself and count as 0."""
    try:
        with wave.open(path) as file:
            return file.getnframes() / file.getframerate()
    except (wave.Error, EOFError, OSError):
        return 0.0


def hits_of(lines: list[str]) -> list[tuple[Path, float]]:
    """(file, similarity) from the lines `similarity  file` that `embed.py search` prints."""
    split = (re.fullmatch(r"(-?\d\.\d+)  (.+)", line) for line in lines)
    return [(Path(hit[2]), float(hit[1])) for hit in split if hit and Path(hit[2]).is_file()]


def main(argv: list[str] | None = None) -> None:
    """Read the options and serve until the process ends."""
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs"), help="folder with a run of each system")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="SYSTEM=PATH", help="another checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(argv)
    chosen = dict(given.partition("=")[::2] for given in options.checkpoint)
    for name, path in chosen.items():
        if name not in SYSTEMS or not path:
            parser.error(f"--checkpoint {name}: give SYSTEM=PATH with one of {', '.join(SYSTEMS)}")
        if not Path(path).exists():
            parser.error(f"--checkpoint {name}={path}: no such file or folder")
    if not chosen and not options.runs.is_dir():
        parser.error(f"--runs {options.runs}: no such folder; bash run_all.sh makes one, or give --checkpoint")
    if not 0 < options.port < 65536:
        parser.error(f"--port {options.port}: from 1 to 65535")
    demo = Demo(options.runs, chosen, local=options.host in ("127.0.0.1", "localhost", "::1"))
    fonts: dict[str, list[str]] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    demo.page().launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        inbrowser=False,
        max_file_size=LARGEST_UPLOAD,
        allowed_paths=[str(demo.jobs.folder), str(ROOT / "multimodal" / "sample_data")],
        theme=gr.themes.Default(**fonts),
        css=STYLE,
        show_error=True,
        enable_monitoring=False,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
