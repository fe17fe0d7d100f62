"""Embed files, and search among them with a text, a picture or a sound.

python multimodal/embed.py encode --checkpoint OUT --images DIR --output pictures.safetensors
python multimodal/embed.py encode --checkpoint OUT --texts captions.txt --output texts.safetensors
python multimodal/embed.py search --checkpoint OUT --index pictures.safetensors --query-text "a dog on grass" --top-k 10
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import UserError, command, written_aside  # noqa: E402


class _Common(Section):
    checkpoint: str = setting("outputs/multimodal", "a run's folder, a checkpoint folder or a .pt file")
    batch_size: int = setting(64, "items at a time", ge=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


class EncodeOptions(_Common):
    """Flags of `encode`."""

    images: str | None = setting(None, "folder or file of pictures")
    texts: str | None = setting(None, "file with one text a line")
    audio: str | None = setting(None, "folder or file of sounds")
    output: str = setting("embeddings.safetensors", "file to write: `embeddings` (n, E), and the ids in its metadata")
    dtype: Literal["fp16", "fp32"] = setting("fp32", "precision of the stored vectors")


class SearchOptions(_Common):
    """Flags of `search`."""

    index: str = setting("embeddings.safetensors", "file that encode wrote")
    query_text: str | None = setting(None, "search with a text")
    query_image: str | None = setting(None, "search with a picture file")
    query_audio: str | None = setting(None, "search with a sound file")
    top_k: int = setting(10, "results", ge=1)


@command
def main(argv: list[str] | None = None) -> None:
    """encode or search."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in ("encode", "search"):
        raise UserError(
            f"expected encode or search, found {argv[0] if argv else 'nothing'}; --help after either lists its flags"
        )
    if argv[0] == "encode":
        encode(load_config(EncodeOptions, argv=argv[1:], description=__doc__))
    else:
        search(load_config(SearchOptions, argv=argv[1:], description=__doc__))


def encode(options: EncodeOptions) -> Path:
    """Write the vectors of files or texts."""
    import torch
    from safetensors.torch import save_file

    from multimodal.weights.open import Embedder, files_below

    given = [name for name in ("images", "texts", "audio") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError(f"give one of --images, --texts and --audio; found {' and '.join(given) or 'none'}")
    lines = read_lines(options.texts) if options.texts is not None else []
    paths = files_below(getattr(options, given[0]), "image" if given[0] == "images" else "audio") if not lines else []
    embedder = Embedder.load(options.checkpoint, device=options.device, batch_size=options.batch_size)
    if lines:
        vectors, ids = embedder.texts(lines), lines
    else:
        vectors, good = (embedder.images if given[0] == "images" else embedder.sounds)(paths)
        ids = [str(path) for path in good]
    output = Path(options.output)
    embeddings = vectors.to(torch.float16 if options.dtype == "fp16" else torch.float32).contiguous()
    notes = {"ids": json.dumps(ids, ensure_ascii=False), "kind": given[0], "model": weights_mark(embedder)}
    with written_aside(output) as temporary:
        save_file({"embeddings": embeddings}, temporary, notes)
    print(f"{output}: {len(ids)} vectors of width {vectors.shape[1]}")
    return output


def search(options: SearchOptions) -> list[tuple[str, float]]:
    """Print and return the nearest entries of an index with their cosine similarities."""
    from multimodal.weights.open import Embedder, files_below

    queries = {"text": options.query_text, "image": options.query_image, "audio": options.query_audio}
    given = [name for name, value in queries.items() if value is not None]
    if len(given) != 1:
        raise UserError("give one of --query-text, --query-image and --query-audio")
    vectors, ids, mark = read_index(Path(options.index))
    embedder = Embedder.load(options.checkpoint, device=options.device, batch_size=options.batch_size)
    if mark != weights_mark(embedder):
        raise UserError(f"--index {options.index}: made with other weights than {options.checkpoint}; encode it again")
    if given[0] == "text":
        query = embedder.texts([options.query_text])[0]
    else:
        kind = given[0]
        query = (embedder.images if kind == "image" else embedder.sounds)(files_below(queries[kind], kind))[0][0]
    scores = vectors.float() @ query
    best = scores.argsort(descending=True, stable=True)[: options.top_k].tolist()
    found = [(ids[place], float(scores[place])) for place in best]
    for name, score in found:
        print(f"{score:.4f}  {name}")
    return found


def read_lines(path: str) -> list[str]:
    """The non-empty lines of a text file."""
    if not Path(path).is_file():
        raise UserError(f"--texts {path}: no such file")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--texts {path}: not a UTF-8 text file") from None
    if not lines:
        raise UserError(f"--texts {path}: holds no text")
    return lines


def read_index(path: Path) -> tuple[Any, list[str], str]:
    """Vectors, ids and the mark of the weights."""
    import safetensors

    if not path.is_file():
        raise UserError(f"--index {path}: no such file; make it with embed.py encode")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            return file.get_tensor("embeddings"), json.loads(meta["ids"]), meta["model"]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"--index {path}: not an index that embed.py wrote ({error})") from None


def weights_mark(embedder: Any) -> str:
    """A short hash of the embedding layers: vectors of other weights cannot be compared."""
    import hashlib

    state = embedder.payload["model_state_dict"]
    return hashlib.sha256(
        b"".join(state[name].numpy().tobytes() for name in sorted(state) if name.startswith("embed."))
    ).hexdigest()[:16]


if __name__ == "__main__":
    main()
