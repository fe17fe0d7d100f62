"""Make a portrait speak: picture + sound -> mp4 with sound, of any length, window by window.

python float/generate.py --checkpoint outputs/float --ref-path face.png --aud-path speech.wav --output talk.mp4
python float/generate.py --checkpoint outputs/float --output talk.mp4   the first held-out clip speaks its own sound
python float/generate.py --ckpt-path float.pth --ref-path face.png --aud-path speech.mp3 --emo happy --e-cfg-scale 5
arecord -f S16_LE -r 16000 | python float/generate.py --checkpoint OUT --ref-path face.png --aud-path - --stream ...
... --moving lips            only the lips move; --moving face: the face moves and the head stays
... --pose still             of a run trained with --pose-condition: the head stays; --pose nods.mp4: it moves like that
... --set-direction 3=1.5    every frame gets coefficient 1.5 along direction 3; --shift-direction 3=0.5 adds 0.5
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting
from shared.errors import UserError, check_output, command

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    from float.data.clips import Clip
    from float.sampling.animate import Animator
    from float.sampling.live import LiveSound
    from float.sampling.motion import SamplingOptions


# options of the same name in sampling.motion.SamplingOptions
SAMPLING = ("nfe", "steps", "a_cfg_scale", "r_cfg_scale", "e_cfg_scale", "reference_guidance", "fix_noise_seed", "seed")


class GenerateOptions(Section):
    """The released tool's flags, and ours."""

    checkpoint: str | None = setting(None, "run of float/train.py, one of its checkpoints, or float.pth", "ckpt_path")
    ref_path: str | None = setting(
        None, "portrait: a picture, or a video whose first frame is taken; null: a held-out clip", "reference"
    )
    aud_path: str | None = setting(None, "speech: any sound or video file; null: that clip's", "audio")
    output: str | None = setting(None, "mp4 to write; null: a name made of the inputs, in res_dir", "res_video_path")
    res_dir: str = setting("./results", "folder for generated names")
    emo: str = setting("S2E", "angry, disgust, fear, happy, neutral, sad, surprise; S2E: from the voice")
    no_crop: bool = setting(False, "take the whole picture, squeezed to a square; else it is cropped to the face")
    face_box: list[float] | None = setting(None, "face in the picture: left, top, right, bottom, pixels")
    seed: int = setting(15, "seed of the noise", ge=0, le=2**63 - 1)
    fix_noise_seed: bool = setting(False, "the same noise in every window, as the released tool")
    nfe: int | None = setting(None, "time points of the solver, one more than steps; null: the checkpoint's", ge=2)
    steps: int | None = setting(None, "steps of the solver, in place of nfe", ge=1)
    torchdiffeq_ode_method: str | None = setting(None, "euler, midpoint, heun, rk4, or a torchdiffeq method", "method")
    a_cfg_scale: float | None = setting(None, "guidance by sound")
    r_cfg_scale: float | None = setting(None, "guidance by reference motion; acts with --reference-guidance")
    e_cfg_scale: float | None = setting(None, "guidance by emotion; 5 to 10 exaggerates")
    reference_guidance: bool | None = setting(None, "a further pass without reference motion")
    dynamic_emotion: bool = setting(False, "hear the emotion anew in every window (needs the recogniser)")
    stream: bool = setting(
        False,
        "hear the sound window by window: the first frame is ready soon; --aud-path may be - (standard input), a pipe, "
        "or a file that is being recorded, and the video can be watched while it grows",
    )
    moving: Literal["all", "face", "lips"] = setting(
        "all", "face: the head stays where it is in the picture; lips: nothing but the mouth moves; with any checkpoint"
    )
    pose: str = setting(
        "free",
        "of a run trained with --pose-condition: free, still (the head stays as in the picture), or a video, whose "
        "head's movement is taken",
    )
    set_direction: list[str] = setting([], "K=VALUE: fix the motion's coefficient along direction K")
    shift_direction: list[str] = setting([], "K=VALUE: add to it")
    wav2vec_model_path: str | None = setting(None, "folder of wav2vec2, in place of the checkpoint's")
    audio2emotion_path: str | None = setting(None, "folder of the emotion recogniser, in place of the checkpoint's")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


def generate(options: GenerateOptions, animator: "Animator", portrait_path: str, sound_path: str) -> tuple[Path, int]:
    """Write the video; returns its path and its number of frames. Of sound that is still coming in, frames are written
    as they are ready, and the delay is printed.
    """
    from float.data.media import VideoWriter, sound_of_file
    from float.sampling.animate import audio_windows, sampling_options
    from float.sampling.live import STDIN, LiveSound, is_live

    config, data = animator.config, animator.config.data
    fps, length = data.video_fps, data.sequence_length
    live, total = None, None
    picture = _picture(options, animator, portrait_path)
    portrait = animator.portrait(picture)
    part = animator.part(portrait, picture, options.moving)
    if options.stream and is_live(sound_path):
        live = LiveSound(sound_path, animator.encoder, fps=fps, length=length)
        windows, sound = live.windows(), live.sound
        emotion = emotion_of(options, animator, None, live)
    elif sound_path == STDIN:
        raise UserError("--aud-path -: standard input is read with --stream")
    else:
        wave, total = _sound(animator, sound_path)
        windows = audio_windows(animator.encoder, wave, fps=fps, length=length, stream=options.stream)
        emotion, sound = emotion_of(options, animator, wave), sound_of_file(sound_path)
    pose = animator.poses(options.pose)
    edit = animator.editor(_directions(options.set_direction), _directions(options.shift_direction))
    chosen = {name: options[name] for name in SAMPLING}
    sampling = sampling_options(config, method=options.torchdiffeq_ode_method, **chosen)
    path = Path(options.output or Path(options.res_dir) / _name(options, sampling, portrait_path, sound_path))
    with VideoWriter(path, fps=fps, sound=sound, live=live is not None) as video:
        for window in animator.motion_windows(windows, portrait.motion, emotion, sampling, pose):
            # the last window of a live sound is known when it comes
            until = total or (live and live.total) or video.frames + length
            for frame in animator.frames(portrait, iter([window]), total=until - video.frames, edit=edit):
                video.add(part(frame))
    if live is not None:
        print(live.delay())
    return path, video.frames


def _sound(animator: "Animator", path: str) -> "tuple[torch.Tensor, int]":
    """A file's sound (n,), and how many frames it has."""
    import torch

    from float.data.media import is_silent, read_audio
    from float.modules.audio import frames_of

    wave = read_audio(path)
    if is_silent(wave):
        print(f"note: {path} is silent; the mouth follows no speech", file=sys.stderr)
    return torch.from_numpy(wave).to(animator.device), frames_of(len(wave), animator.config.data.video_fps)


def _picture(options: GenerateOptions, animator: "Animator", path: str) -> "np.ndarray":
    """The portrait, cropped as the model's training clips are, uint8 (S, S, 3)."""
    from float.data.face import RELEASED, crop_centre, prepare_portrait
    from float.data.media import read_image, resize

    size = animator.config.model.input_size
    if options.ref_path is None:  # a clip of the run's own
        return animator.first_frame(held_out_clip(animator))
    picture = read_image(path)
    height, width = picture.shape[:2]
    box, note = _box(options.face_box), None
    if box is not None:
        return (animator.framing or RELEASED).crop(picture, box, size)
    if options.no_crop:
        if height != width:
            note = f"{path}: {width} x {height} pixels are squeezed to a square, as --no-crop asks"
        prepared = resize(picture, size)
    elif animator.framing is None:  # the training clips show no faces that can be found
        if height != width:
            note = f"{path}: {width} x {height} pixels, the centre square is taken; give --face-box"
        prepared = crop_centre(picture, size)
    else:
        prepared, note = prepare_portrait(picture, size, name=path, framing=animator.framing)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    return prepared


def emotion_of(
    options: GenerateOptions,
    animator: "Animator",
    sound: "torch.Tensor | None",
    live: "LiveSound | None" = None,
) -> "torch.Tensor | Iterator[torch.Tensor]":
    """(7,) for the whole clip, or an iterator of one (7,) per window, as of live sound, whose past alone is known.
    Without a recogniser S2E means no emotion, and says so.
    """
    import torch

    from float.modules.audio import SAMPLE_RATE, moments
    from float.modules.emotion import FROM_SPEECH, Audio2Emotion, emotion_index, one_hot

    model, data = animator.config.model, animator.config.data
    if options.emo != FROM_SPEECH:
        return one_hot(emotion_index(options.emo))
    if not Path(model.audio2emotion_path).is_dir():
        if model.audio_features == "wav2vec2" or options.dynamic_emotion:
            raise UserError(
                f"--emo S2E needs the emotion recogniser in {model.audio2emotion_path}; "
                "download it, or name an emotion with --emo"
            )
        print(
            "note: no emotion recogniser at hand, the emotion condition is left empty; name one with --emo",
            file=sys.stderr,
        )
        return torch.zeros(model.dim_e)
    recogniser = Audio2Emotion.from_pretrained(model.audio2emotion_path).to(animator.device)
    if live is not None:
        heard = (live.heard.to(animator.device) for _ in iter(int, 1))  # of what came in up to the window
        return (recogniser.hear(wave) for wave in heard)
    assert sound is not None, "sound that is not live is there"
    if not options.dynamic_emotion:
        return recogniser.hear(sound)
    # a window at the clip's end hears as much sound as the others, for a few samples have no emotion
    length = int(data.sequence_length * SAMPLE_RATE / data.video_fps)
    ends, (mean, deviation) = range(length, len(sound) + length, length), moments(sound)
    windows = (sound[max(0, min(end, len(sound)) - length) : end] for end in ends)
    return (recogniser((window[None] - mean) / deviation)[0] for window in windows)


def _box(values: list[float] | None) -> tuple[float, float, float, float] | None:
    if values is None:
        return None
    if len(values) != 4:
        raise UserError(f"--face-box {values}: four numbers expected: left,top,right,bottom in pixels")
    left, top, right, bottom = values
    return left, top, right, bottom


def _directions(assignments: list[str]) -> dict[int, float]:
    found = {}
    for text in assignments:
        key, _, value = text.partition("=")
        try:
            found[int(key)] = float(value)
            if not math.isfinite(found[int(key)]):
                raise ValueError
        except ValueError:
            raise UserError(f"direction {text!r}: K=VALUE expected, such as 3=1.5") from None
    return found


def _name(options: GenerateOptions, sampling: "SamplingOptions", portrait_path: str, sound_path: str) -> str:
    parts = [
        time.strftime("%Y%m%d-%H%M%S"),
        *(os.fsencode(Path(path).stem)[:80].decode(errors="ignore") for path in (portrait_path, sound_path)),
        f"nfe{sampling.nfe}",
        f"seed{options.seed}",
        f"acfg{sampling.a_cfg_scale:g}",
        f"ecfg{sampling.e_cfg_scale:g}",
        options.emo,
    ]
    return "-".join(parts) + ".mp4"


@command
def main(argv: list[str] | None = None) -> Path:
    """Read the flags, generate, print the path."""
    options = load_config(GenerateOptions, argv=argv, description=__doc__)
    _check(options)
    from float.sampling.animate import load_run
    from shared.engine.dist import init_distributed

    assert options.checkpoint is not None, "_check has seen to it"
    started = time.perf_counter()
    animator = load_run(options.checkpoint, init_distributed(options.device).device)
    model = animator.config.model
    model.wav2vec_model_path = options.wav2vec_model_path or model.wav2vec_model_path
    model.audio2emotion_path = options.audio2emotion_path or model.audio2emotion_path
    path, frames = generate(options, animator, *_portrait_and_sound(options, animator))
    print(f"{path}: {frames} frames in {time.perf_counter() - started:.1f} s")
    return path


def _check(options: GenerateOptions) -> None:
    """Everything that can be wrong with the flags alone, before anything is loaded."""
    from float.modules.emotion import FROM_SPEECH, emotion_index

    if options.checkpoint is None:
        raise UserError("--checkpoint is missing: the output folder of float/train.py, or float.pth")
    for flag, value in (("--ref-path", options.ref_path), ("--aud-path", options.aud_path)):
        if value is not None and not Path(value).exists() and not (value == "-" and flag == "--aud-path"):
            raise UserError(f"{flag} {value}: no such file")
        if value is not None and Path(value).is_dir():
            raise UserError(f"{flag} {value}: a folder; give one file")
        if value is not None and os.path.realpath(value) == os.path.realpath(options.output or ""):
            raise UserError(f"--output {options.output}: is {flag} itself and would be overwritten; give another name")
    if options.output is not None and Path(options.output).is_dir():
        raise UserError(f"--output {options.output}: a folder; give the name of an mp4, or --res-dir {options.output}")
    if options.output is not None:
        check_output(options.output, (".mp4", ".m4v", ".mov", ""))
    else:
        check_output(options.res_dir, flag="--res-dir", folder=True)
    if options.emo != FROM_SPEECH:
        emotion_index(options.emo)
        if options.dynamic_emotion:
            raise UserError(f"--dynamic-emotion hears the emotion, --emo {options.emo} fixes it; give one of them")
    if options.pose not in ("free", "still") and not Path(options.pose).is_file():
        raise UserError(f"--pose {options.pose}: not free, not still, and no such file; give a video")
    _box(options.face_box)
    _directions(options.set_direction)
    _directions(options.shift_direction)


def held_out_clip(animator: "Animator") -> "Clip":
    """The first held-out clip of the run's data."""
    from float.config import data_root
    from float.data.clips import find_clips

    data = animator.config.data
    return find_clips(data_root(data), data.val_split)[0]


def _portrait_and_sound(options: GenerateOptions, animator: "Animator") -> tuple[str, str]:
    """The given files; the run's first held-out clip, with its emotion, stands in for what is not given."""
    from float.modules.emotion import EMOTIONS, FROM_SPEECH

    if options.ref_path is not None and options.aud_path is not None:
        return options.ref_path, options.aud_path
    clip = held_out_clip(animator)
    if options.ref_path is None and options.emo == FROM_SPEECH and clip.emotion is not None:
        options.emo = EMOTIONS[clip.emotion]
    chosen = options.ref_path or str(clip.video), options.aud_path or str(clip.audio)
    print(f"portrait {chosen[0]}, sound {chosen[1]}, emotion {options.emo}")
    return chosen


if __name__ == "__main__":
    main()
