"""Fetching one file over HTTP: resumed where it stopped, verified, and visible under its name only when it is right."""

import email.utils
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
MAX_WAIT = 300.0  # seconds; a server may ask for more, nobody waits longer in one go


class DownloadError(Exception):
    """A file could not be fetched; the message says which and why. What was received stays for the next try."""


@dataclass(frozen=True)
class Policy:
    """How patiently a file is fetched."""

    max_retries: int = 5  # failures in a row that bring no new byte
    timeout: float = 60.0  # seconds without an answer
    first_wait: float = 1.0  # seconds before the first retry; doubles


Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all


def fetch(
    url: str,
    target: Path,
    *,
    checksum: tuple[str, str] | None = None,
    size: int | None = None,
    policy: Policy = Policy(),
    progress: Progress | None = None,
) -> Path:
    """Fetch `url` into `target` through target.part; resumes a part that is there. Raises DownloadError.

    A wrong checksum starts once more from nothing, then fails naming both sums.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in (1, 2):
        total = _receive(url, part, size, policy, progress)
        expected = size if size is not None else total
        here = part.stat().st_size
        if checksum is None and here != (expected or here or 1):
            problem = f"{here} bytes arrived, {expected or 'some'} were expected"
        elif checksum is not None and (found := digest(part, checksum[0])) != checksum[1]:
            problem = f"{checksum[0]} is {found}, expected {checksum[1]}"
        elif checksum is None and _is_page(part):
            problem = "a web page, as servers show it for a login or an error"
        else:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
            _facts_path(part).unlink(missing_ok=True)
            return target
        part.unlink()
        _facts_path(part).unlink(missing_ok=True)
        if attempt == 2:
            raise DownloadError(
                f"{url}: wrong content twice: {problem}; the file on the server has changed or a proxy spoils it"
            )
    raise AssertionError


def _is_page(path: Path) -> bool:
    """Whether a file is HTML. None that is fetched here should be; most have a checksum that says so anyway."""
    with open(path, "rb") as file:
        return file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html"))


def digest(path: Path, algorithm: str) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _receive(url: str, part: Path, size: int | None, policy: Policy, progress: Progress | None) -> int | None:
    """Bring `part` to its full length; returns the length that the server gave."""
    failures, furthest = 0, part.stat().st_size if part.exists() else 0
    while True:
        wait, complete, total = 0.0, False, None
        try:
            complete, total = _one_request(url, part, size, policy.timeout, progress)
            problem = "the connection ended early"
        except _Rejected as error:
            if not error.may_retry:
                raise DownloadError(f"{url}: the server answered {error.status} {error.reason}") from None
            problem, wait = f"the server answered {error.status} {error.reason}", error.wait
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            # ValueError: it leads on to what is no address
            problem = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        if complete:
            return total
        here = part.stat().st_size if part.exists() else 0
        failures = 0 if here > furthest else failures + 1
        furthest = max(furthest, here)
        if failures > policy.max_retries:
            kept = f"{here} bytes are kept in {part}" if here else "nothing was received"
            raise DownloadError(
                f"{url}: {problem}, {failures} times in a row without progress; {kept}; run the same command again"
            )
        pause = min(max(wait, policy.first_wait * 2 ** (failures - 1) if failures else 0.0), MAX_WAIT)
        if pause:
            print(f"{url}: {problem}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)


class _Rejected(Exception):
    def __init__(self, error: urllib.error.HTTPError):
        super().__init__(str(error))
        self.status, self.reason = error.code, " ".join(str(error.reason).split())
        # 2xx: not ready yet, or of a proxy's own making; 408 and 425 ask to come again
        self.may_retry = error.code in (408, 425, 429) or error.code >= 500 or error.code < 300
        self.wait = _retry_after(error.headers.get("Retry-After"))


def _retry_after(value: str | None) -> float:
    """Seconds that the server asks to wait, given as a number or as a date."""
    if not value:
        return 0.0
    if number := _number(value):
        return float(number)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _one_request(
    url: str, part: Path, size: int | None, timeout: float, progress: Progress | None
) -> tuple[bool, int | None]:
    """Ask for what is missing and append it; (whether the file is complete, its full length if known)."""
    have, facts = part.stat().st_size if part.exists() else 0, _read_facts(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "multimodal-download/1"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if facts.get("validator"):
            headers["If-Range"] = facts["validator"]
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise _Rejected(error) from None
        total = _total_of_range(error.headers.get("Content-Range")) or size
        if total == have:
            return True, total
        _restart(part)
        return False, total
    with response:
        if response.status not in (200, 206):
            answer = urllib.error.HTTPError(url, response.status, response.reason, response.headers, None)
            raise _Rejected(answer)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity" and not url.endswith(".gz"):
            raise DownloadError(f"{url}: the server sends it encoded as {encoding}, which was not asked for")
        length = _number(response.headers.get("Content-Length"))
        total = None if length is None else length + (have if response.status == 206 else 0)
        if response.status == 206:
            started = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            promised = _total_of_range(response.headers.get("Content-Range"))
            now = _validator(response.headers)
            if (
                not started
                or int(started[1]) != have
                or (facts.get("total") and promised and promised != facts["total"])
                or (facts.get("validator") and now and now != facts["validator"])  # it does not heed If-Range
            ):
                _restart(part)
                return False, None
            total = promised or total
        elif have:  # the whole file again: the server ignores ranges, or the file has changed
            _restart(part)
            have = 0
        _write_facts(part, response.headers, total)
        with open(part, "ab") as file:
            while block := response.read1(CHUNK):  # what has come, not a full block: a reset loses nothing received
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total or size)
            file.flush()
            os.fsync(file.fileno())
    return total is None or have >= total, total


def _restart(part: Path) -> None:
    part.unlink(missing_ok=True)
    _facts_path(part).unlink(missing_ok=True)


def _number(value: str | None) -> int | None:
    """A header's number; None for none and for what is no number."""
    return int(value) if value and re.fullmatch(r"\s*[0-9]{1,18}\s*", value) else None


def _total_of_range(value: str | None) -> int | None:
    return _number((value or "").rpartition("/")[2])


def _facts_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_facts(part: Path) -> dict:
    try:
        facts = json.loads(_facts_path(part).read_text())
        return facts if facts["validator"] is None or facts["validator"].isprintable() else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # damaged, or of no download of ours: the server is asked without it


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What stands for the content; a weak ETag does not (RFC 9110, 13.1.5)."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _write_facts(part: Path, headers: http.client.HTTPMessage, total: int | None) -> None:
    """What tells whether a later answer continues the same file."""
    _facts_path(part).write_text(json.dumps({"validator": _validator(headers), "total": total}))
