"""Embed files, search among them with a text, a picture or a sound, and make a page on which they find each other.

  python multimodal/embed.py encode --checkpoint OUT --images DIR --output pictures.safetensors     or .parquet
  python multimodal/embed.py encode --checkpoint OUT --texts captions.txt --output texts.safetensors
  python multimodal/embed.py search --checkpoint OUT --index pictures.safetensors --query-text "a dog on grass"
  python multimodal/embed.py page --index pictures.safetensors texts.safetensors --output search.html
A stopped encode goes on where it was when the same command is given again.
"""

import base64
import hashlib
import html
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Section, load_config, setting  # noqa: E402
from shared.errors import UserError, check_output, command, write_text, written_aside  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from multimodal.data.records import Kind
    from multimodal.weights.open import Embedder

KINDS = ("images", "texts", "audio")
MOST_IDS = 50_000  # that a safetensors header holds as text; more are tensors of their own
THUMBNAIL, MAX_SOUND = 96, 400_000  # pixels; bytes of a sound that a page carries


class _Common(Section):
    checkpoint: str = setting("outputs/multimodal", "a run's folder, a checkpoint folder or a .pt file")
    batch_size: int = setting(64, "items at a time", ge=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


class EncodeOptions(_Common):
    """Flags of `encode`."""

    images: str | None = setting(None, "folder or file of pictures")
    texts: str | None = setting(None, "file with one text a line")
    audio: str | None = setting(None, "folder or file of sounds")
    output: str = setting("embeddings.safetensors", "file to write: vectors and their ids; .parquet, or safetensors")
    dtype: Literal["fp16", "fp32"] = setting("fp32", "precision of the stored vectors")
    workers: int = setting(0, "loader processes", "num_workers", ge=0)
    part_size: int = setting(4096, "items of a part; finished parts are kept when the command is stopped", ge=1)


class SearchOptions(_Common):
    """Flags of `search`."""

    index: str = setting("embeddings.safetensors", "file that encode wrote")
    query_text: str | None = setting(None, "search with a text")
    query_image: str | None = setting(None, "search with a picture file")
    query_audio: str | None = setting(None, "search with a sound file")
    top_k: int = setting(10, "results", ge=1)


class PageOptions(Section):
    """Flags of `page`."""

    index: list[str] = setting(["embeddings.safetensors"], "files that encode wrote with the same model")
    output: str = setting("search.html", "page to write; it needs nothing else")
    limit: int = setting(1000, "items of each index on the page, evenly spaced", ge=1)


@command
def main(argv: list[str] | None = None) -> None:
    """encode, search or page."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "encode":
        encode(load_config(EncodeOptions, argv=argv[1:], description=__doc__))
    elif argv and argv[0] == "search":
        search(load_config(SearchOptions, argv=argv[1:], description=__doc__))
    elif argv and argv[0] == "page":
        page(load_config(PageOptions, argv=argv[1:], description=__doc__))
    elif argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n--help after encode, search or page lists its flags")
    else:
        found = argv[0] if argv else "nothing"
        raise UserError(f"expected encode, search or page, found {found}; --help after each lists its flags")


# --- encode -----------------------------------------------------------------------------------------------------------


def encode(options: EncodeOptions) -> Path:
    """Write the vectors of files or texts, part by part, so that a stopped command loses one part at most."""
    from safetensors.torch import load_file, save_file
    from torch import cat, float16, float32

    from multimodal.weights.open import Embedder, files_below

    output = check_output(options.output, (".safetensors", ".parquet"))
    given = [name for name in KINDS if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError(f"give one of --images, --texts and --audio; found {' and '.join(given) or 'none'}")
    kind, place = given[0], str(getattr(options, given[0]))
    misnamed = []
    if kind == "texts":
        items = read_lines(place)
    else:
        found = [str(path) for path in files_below(place, "image" if kind == "images" else "audio")]
        items = [name for name in found if is_text(name)]
        misnamed = [f"{ascii(name)[1:-1]}: its name is not UTF-8; rename it" for name in found if not is_text(name)]
        print("".join(f"left out: {sentence}\n" for sentence in misnamed), end="", file=sys.stderr, flush=True)
    embedder = Embedder.load(options.checkpoint, device=options.device, batch_size=options.batch_size)

    stats = [] if kind == "texts" else [os.stat(name) for name in items]  # of a file that was replaced no part is kept
    states = [*items, *(f"{own.st_size} {own.st_mtime_ns}" for own in stats)]
    names = hashlib.sha256("\n".join(states).encode()).hexdigest()
    mark = weights_mark(embedder)
    plan = json.dumps({"kind": kind, "dtype": options.dtype, "model": mark, "part": options.part_size, "items": names})
    parts = output.with_name(f".{output.name}.parts")
    if parts.is_dir() and (not (parts / "plan.json").exists() or (parts / "plan.json").read_text() != plan):
        shutil.rmtree(parts)  # left by another command with this --output, stopped in the middle
    made = [folder for folder in parts.parents if not folder.exists()]
    parts.mkdir(parents=True, exist_ok=True)
    write_text(parts / "plan.json", plan)
    dtype = float16 if options.dtype == "fp16" else float32
    starts = range(0, len(items), options.part_size)
    for number, start in enumerate(starts):
        path = parts / f"{number:06d}.safetensors"
        if is_part(path):
            continue
        own = items[start : start + options.part_size]
        if kind == "texts":
            vectors, good, faults = embedder.texts(own), own, list[str]()
        else:
            files = [Path(item) for item in own]
            vectors, read, faults = embedder.files(files, "image" if kind == "images" else "audio", options.workers)
            good = [str(path) for path in read]
        for sentence in faults:
            print(f"left out: {sentence}", file=sys.stderr, flush=True)
        with written_aside(path) as temporary:
            noted = {"ids": json.dumps(good), "bad": json.dumps(faults)}
            save_file({"embeddings": vectors.to(dtype).contiguous()}, temporary, noted)
        if len(starts) > 1:
            print(f"{min(start + options.part_size, len(items))} of {len(items)}", file=sys.stderr, flush=True)

    paths = [parts / f"{number:06d}.safetensors" for number in range(len(starts))]
    facts = [_facts(path) for path in paths]
    ids = [name for part in facts for name in json.loads(part["ids"])]
    bad = misnamed + [sentence for part in facts for sentence in json.loads(part["bad"])]
    if not ids:
        shutil.rmtree(parts)
        for folder in made:
            folder.rmdir()
        raise UserError(f"none of {len(bad)} files can be read; the first: {bad[0]}")
    write_index(output, cat([load_file(path)["embeddings"] for path in paths]), ids, kind, mark)
    if bad:
        rows = "".join(json.dumps({"reason": sentence}, ensure_ascii=False) + "\n" for sentence in bad)
        write_text(output.with_name(f"{output.name}.bad.jsonl"), rows)
    shutil.rmtree(parts)
    print(f"{output}: {len(ids)} vectors{f', {len(bad)} files left out' if bad else ''}")
    return output


def is_text(name: str) -> bool:
    """Whether a file's name can be written into an index: some are bytes of another encoding than UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_part(path: Path) -> bool:
    """Whether a part is there and whole; one that a failing disk left half-written is made again."""
    try:
        return {"ids", "bad"} <= _facts(path).keys()
    except Exception:  # of the library, for whatever it cannot read
        return False


def _facts(path: Path) -> dict[str, str]:
    import safetensors

    with safetensors.safe_open(str(path), "pt") as file:
        return file.metadata() or {}


def write_index(output: Path, vectors: "Tensor", ids: list[str], kind: str, mark: str) -> None:
    """Vectors and ids in one file.

    .safetensors: `embeddings` (n, E), and in the metadata `ids` (a JSON list), `kind` and `model`; of more than 50,000
    ids the texts lie in `ids` (uint8, UTF-8) and their ends in `id_ends`. .parquet: columns `id` and `embedding`.
    """
    import torch
    from safetensors.torch import save_file

    facts = {"kind": kind, "model": mark}
    with written_aside(output) as temporary:
        if output.suffix.lower() == ".parquet":
            import pyarrow
            import pyarrow.parquet

            values = pyarrow.array(vectors.numpy().reshape(-1))
            column = pyarrow.FixedSizeListArray.from_arrays(values, vectors.shape[1])
            table = pyarrow.table({"id": ids, "embedding": column}).replace_schema_metadata(facts)
            pyarrow.parquet.write_table(table, temporary)
            return
        tensors = {"embeddings": vectors.contiguous()}
        if len(ids) <= MOST_IDS:
            facts["ids"] = json.dumps(ids, ensure_ascii=False)
        else:
            texts = [name.encode() for name in ids]
            tensors["ids"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
            tensors["id_ends"] = torch.tensor([len(text) for text in texts]).cumsum(0)
        save_file(tensors, temporary, facts)


class Index(NamedTuple):
    """What write_index wrote."""

    vectors: "Tensor"
    ids: list[str]
    model: str
    kind: str


def read_index(path: Path) -> Index:
    """An index; UserError for a file that is none."""
    if not path.is_file():
        raise UserError(f"--index {path}: no such file; make it with embed.py encode")
    try:
        index = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_safetensors(path)
        _check_index(index)
        return index
    except Exception as error:  # the two libraries raise many kinds for what they cannot read
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"has no {error}" if isinstance(error, KeyError) else reason
        raise UserError(f"--index {path}: not an index that embed.py wrote ({reason}); encode it again") from None


def _check_index(index: Index) -> None:
    """ValueError for what other programs, or a damaged disk, may have made of an index."""
    vectors, ids = index.vectors, index.ids
    if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.numel():
        raise ValueError(f"its vectors are {vectors.dtype} of shape {tuple(vectors.shape)}")
    if not isinstance(ids, list) or len(ids) != len(vectors) or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"{len(vectors)} vectors need as many names")
    if index.kind not in KINDS:
        raise ValueError(f"it holds {index.kind}, not {', '.join(KINDS)}")
    if not vectors.isfinite().all():
        raise ValueError("some of its numbers are not finite")


def _read_parquet(path: Path) -> Index:
    import numpy as np
    import pyarrow.parquet
    import torch

    table = pyarrow.parquet.read_table(path)
    facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    column = table["embedding"].combine_chunks()
    rows = np.array(column.values).reshape(len(table), -1)
    return Index(torch.from_numpy(rows), table["id"].to_pylist(), facts["model"], facts["kind"])


def _read_safetensors(path: Path) -> Index:
    import safetensors

    with safetensors.safe_open(str(path), "pt") as file:
        facts = file.metadata() or {}
        if "ids" in facts:
            ids = json.loads(facts["ids"])
        else:
            data, ends = file.get_tensor("ids").numpy().tobytes(), [0, *file.get_tensor("id_ends").tolist()]
            ids = [data[a:b].decode() for a, b in zip(ends, ends[1:], strict=False)]
        return Index(file.get_tensor("embeddings"), ids, facts["model"], facts.get("kind", "images"))


def read_lines(path: str) -> list[str]:
    """The lines of a text file, in UTF-8 or UTF-16, that hold a word."""
    from multimodal.data.records import clean, text_lines

    if not Path(path).is_file():
        raise UserError(f"--texts {path}: no such file")
    lines = [line.strip() for _, line in text_lines(Path(path)) if clean(line)]
    if not lines:
        raise UserError(f"--texts {path}: holds no text")
    return lines


def weights_mark(embedder: "Embedder") -> str:
    """A short hash of the embedding layers: vectors of other weights cannot be compared."""
    state = embedder.payload["model_state_dict"]
    layers = b"".join(state[name].numpy().tobytes() for name in sorted(state) if name.startswith("embed."))
    return hashlib.sha256(layers).hexdigest()[:16]


# --- search -----------------------------------------------------------------------------------------------------------


def search(options: SearchOptions) -> list[tuple[str, float]]:
    """Print and return the nearest entries of an index with their cosine similarities."""
    from multimodal.weights.open import Embedder, files_below

    if sum(value is not None for value in (options.query_text, options.query_image, options.query_audio)) != 1:
        raise UserError("give one of --query-text, --query-image and --query-audio")
    index = read_index(Path(options.index))
    embedder = Embedder.load(options.checkpoint, device=options.device, batch_size=options.batch_size)
    if index.model != weights_mark(embedder) or index.vectors.shape[1] != embedder.config.model.embed_dim:
        raise UserError(f"--index {options.index}: made with other weights than {options.checkpoint}; encode it again")
    if options.query_text is not None:
        query = embedder.texts([options.query_text])[0]
    else:
        kind: Kind = "image" if options.query_image is not None else "audio"
        place = str(options.query_image or options.query_audio)
        files = files_below(place, kind)
        if len(files) > 1:
            raise UserError(f"--query-{kind} {place}: holds {len(files)} files; give one of them")
        query = (embedder.images if kind == "image" else embedder.sounds)(files)[0][0]
    scores = index.vectors.float() @ query
    best = scores.argsort(descending=True, stable=True)[: options.top_k].tolist()
    found = [(index.ids[place], float(scores[place])) for place in best]
    for name, score in found:
        print(f"{score:.4f}  {name}")
    return found


# --- page -------------------------------------------------------------------------------------------------------------


def page(options: PageOptions) -> Path:
    """Write one HTML file on which a caption, a picture or a sound finds the others; the vectors are in it."""
    import torch

    from shared.report.page import html_page

    output = check_output(options.output, (".html", ".htm"))
    if not options.index:
        raise UserError("--index names no file; give some that embed.py encode wrote")
    indexes = [(name, read_index(Path(name))) for name in options.index]
    made = [(index.model, index.vectors.shape[1]) for _, index in indexes]
    other = next((name for (name, _), own in zip(indexes, made, strict=True) if own != made[0]), None)
    if other is not None:
        raise UserError(f"--index {other}: made with other weights than {options.index[0]}; encode both with one model")
    items, vectors = [], []
    for _, index in indexes:
        count = min(options.limit, len(index.ids))
        places = [number * len(index.ids) // count for number in range(count)]
        items += [{"kind": index.kind, "name": index.ids[place], "shown": _shown(index, place)} for place in places]
        vectors.append(index.vectors[places].float())
    whole = torch.cat(vectors)
    scaled = (
        (whole / whole.abs().amax(1, keepdim=True).clamp_min(1e-12) * 127).round().to(torch.int8)
    )  # only their direction counts
    data = json.dumps(items, ensure_ascii=True).replace("<", "\\u003c")  # no name ends the script, or begins a comment
    names = ", ".join(f"{sum(item['kind'] == kind for item in items)} {kind}" for kind in KINDS)
    body = (
        f"<p>{html.escape(names)}. Choose an item, or write words of a text "
        "that is among them, and see what lies nearest.</p>"
        "<p><input id=words placeholder='words of a caption or a file name' size=40> "
        "<button id=all>all</button></p>"
        "<h2 id=title></h2><div id=found></div>"
        f"<script>const items={data};const width={whole.shape[1]};"
        f"const packed='{base64.b64encode(scaled.numpy().tobytes()).decode()}';{_SCRIPT}</script>"
    )
    write_text(output, html_page("Pictures, texts and sounds that find each other", body))
    print(output)
    return output


def _shown(index: Index, place: int) -> str:
    """A small picture or a short sound as a data address; nothing for texts and for what cannot be read."""
    from multimodal.data.audio import read_audio
    from multimodal.data.image import read_image
    from shared.errors import BadSample

    path = Path(index.ids[place])
    buffer = io.BytesIO()
    try:
        if index.kind == "images":
            picture = read_image(path, max_side=THUMBNAIL)
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            picture.save(buffer, "JPEG", quality=80)
            return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if index.kind == "audio":
            import soundfile

            samples = read_audio(path, seconds=5.0)
            soundfile.write(buffer, samples, 16000, format="OGG", subtype="VORBIS")
            sound = buffer.getvalue()
            return "data:audio/ogg;base64," + base64.b64encode(sound).decode() if len(sound) < MAX_SOUND else ""
    except (BadSample, OSError):
        return ""
    return ""


_SCRIPT = """
const raw=atob(packed),vectors=new Int8Array(raw.length);
for(let i=0;i<raw.length;i++)vectors[i]=raw.charCodeAt(i);
const norms=items.map((_,i)=>{let s=0;for(let k=0;k<width;k++){const v=vectors[i*width+k];s+=v*v}
return Math.sqrt(s)||1});
function near(i){return items.map((_,j)=>{let s=0;
for(let k=0;k<width;k++)s+=vectors[i*width+k]*vectors[j*width+k];return [s/norms[i]/norms[j],j]})}
function card(j,score){const item=items[j],box=document.createElement('figure');
if(item.kind=='images'&&item.shown){const e=document.createElement('img');e.src=item.shown;box.append(e)}
if(item.kind=='audio'&&item.shown){const e=document.createElement('audio');e.controls=true;e.src=item.shown;
box.append(e)}
const text=document.createElement('figcaption');
const name=item.kind=='texts'?item.name:item.name.split('/').pop();
text.textContent=(score===null?'':score.toFixed(3)+'  ')+name;box.append(text);
box.style.cursor='pointer';box.onclick=()=>choose(j);return box}
function gallery(title,rows){if(!rows.length)return;const head=document.createElement('h3');head.textContent=title;
const box=document.createElement('div');box.className='gallery';box.style.gridTemplateColumns='repeat(auto-fill,8rem)';
rows.forEach(([score,j])=>box.append(card(j,score)));document.getElementById('found').append(head,box)}
function show(title,rows,top){document.getElementById('title').textContent=title;
document.getElementById('found').textContent='';
[['images','pictures'],['audio','sounds'],['texts','texts']].forEach(([kind,name])=>
gallery(name,rows.filter(([_,j])=>items[j].kind==kind).slice(0,top)))}
function choose(i){const rows=near(i).filter(([_,j])=>j!=i).sort((a,b)=>b[0]-a[0]);
show('near: '+items[i].name,rows,12);scrollTo(0,0)}
function every(){show('all',items.map((_,j)=>[null,j]),200)}
document.getElementById('all').onclick=every;
document.getElementById('words').oninput=event=>{
const words=event.target.value.toLowerCase().split(/\\s+/).filter(Boolean);
if(!words.length)return every();
const hits=items.map((item,j)=>[words.filter(w=>item.name.toLowerCase().includes(w)).length,j]).filter(([n])=>n>0);
hits.sort((a,b)=>b[0]-a[0]);if(hits.length)choose(hits[0][1]);else show('nothing named so',[],0)};
every();
"""


if __name__ == "__main__":
    main()
