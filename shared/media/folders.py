"""What in a folder is a user's data, and what other programs left there."""

import os
from pathlib import Path, PurePath

_LEFT_BEHIND = frozenset(  # by archives, file servers, waste baskets, disks and Python
    (
        "__MACOSX", "@eaDir", "Thumbs.db", "$RECYCLE.BIN", "#recycle", "lost+found", "System Volume Information",
        "__pycache__",
    )
)  # fmt: skip


def is_junk(path: str | os.PathLike[str], below: str | os.PathLike[str] | None = None) -> bool:
    """Whether the name is hidden (.DS_Store, ._photo.jpg) or one that archives, file servers and waste baskets leave.

    below: a folder above `path`; the folders between the two count as well (`__MACOSX/photo.jpg`, `.git/clip.mp4`), the
    folder itself never does.
    """
    parts = PurePath(path).relative_to(below).parts if below is not None else (PurePath(path).name,)
    return any(part.startswith(".") or part in _LEFT_BEHIND for part in parts)


def files_in(folder: str | os.PathLike[str], *patterns: str) -> list[Path]:
    """What fits one of the glob patterns, by name, without junk: `Path.glob("*.tar")` takes `._0000.tar` too, which a
    Mac writes beside every file on a disk that is not its own.
    """
    return sorted(path for pattern in patterns for path in Path(folder).glob(pattern) if not is_junk(path, folder))
