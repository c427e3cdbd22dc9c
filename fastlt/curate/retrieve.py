"""`fastlt curate retrieve`: images of each auxiliary class, with where they came from.

CURATED/candidates/  what each source answered, a file a category
CURATED/raw/         000000.tar, as img2dataset writes them: key.jpg, key.txt, key.json,
                     and key.cls with the category; beside
                     each 000000.jsonl, a row for every candidate that was tried, whether
                     it was fetched, and why not

Candidates are fetched in groups; a group is written whole or not at all, so what was killed goes on
after the last whole one.
"""

import asyncio
import hashlib
import io
import json
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from fastlt.curate.candidates import (
    ENDPOINTS,
    LOCAL_CLIP,
    Candidate,
    Find,
    Search,
    accepted,
    endpoint,
    open_sources,
)
from fastlt.curate.fetch import Fetcher, Refused, open_fetcher
from fastlt.curate.pictures import Picture, examine
from fastlt.curate.settings import CurateConfig, RetrieveConfig, keep_settings
from fastlt.curate.table import read_table, write_table
from fastlt.errors import UserError
from fastlt.utils.files import whole_file
from fastlt.utils.lock import alone_in
from fastlt.utils.names import normalised
from fastlt.utils.progress import rated_progress
from fastlt.utils.signals import Stopped

PROPOSED_BY = "fastlt curate propose"
CATEGORIES_AT_A_TIME = 8  # whose sources are asked


class Found(NamedTuple):
    """A picture that was fetched, and where it came from."""

    data: bytes
    picture: Picture
    url: str  # after redirects


def run_retrieve(out: Path, config: CurateConfig, console: Console) -> None:
    """Fetch images of each category.

    Raises UserError where nothing is known or fetched, Stopped where SIGTERM or Ctrl-C ended it:
    what was fetched is kept.
    """
    categories = [
        Search(row["name"], row.get("query") or row["name"])
        for row in read_table(out / "categories.jsonl", PROPOSED_BY)
    ]
    with alone_in(out, "another step"):
        mend(out / "raw", console)
        try:
            asyncio.run(until_stopped(retrieve(out, categories, config, console)))
        except (asyncio.CancelledError, KeyboardInterrupt):
            have = sum(row["fetched"] for row in tried(out / "raw"))
            raise Stopped(
                f"stopped: {have:,} images are in {out / 'raw'}; the same command goes on"
            ) from None
    show(out, [category.name for category in categories], config.retrieve, console)


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run until it is done, or SIGTERM or Ctrl-C ends it."""
    task = asyncio.ensure_future(work)
    with suppress(NotImplementedError, RuntimeError):  # no signals here, or not in this thread
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


async def retrieve(
    out: Path, categories: Sequence[Search], config: CurateConfig, console: Console
) -> None:
    """Find and fetch candidates, group by group."""
    settings = config.retrieve
    async with open_fetcher(settings) as fetcher:
        sources = open_sources(settings, [category.name for category in categories], fetcher)
        keep_settings(out, config)  # now that they are known to be of use
        with rated_progress(console, "/s", transient=True) as bar:
            found = await find_all(out / "candidates", categories, sources, settings, bar)
            waiting = pending(out / "raw", interleaved(found), settings)
            task = bar.add_task("fetching", total=len(waiting))
            for number, group in enumerate(
                groups(waiting, settings.shard), start=next_number(out / "raw")
            ):
                await fetch_group(out / "raw", number, group, fetcher, bar, task)


# --- candidates


async def find_all(
    folder: Path,
    categories: Sequence[Search],
    sources: dict[str, Find],
    settings: RetrieveConfig,
    bar: Progress,
) -> list[list[Candidate]]:
    """Return the candidates of each category, source by source, until there are enough.

    What was answered before is not asked again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = bar.add_task("asking", total=len(categories))
    slots = asyncio.Semaphore(CATEGORIES_AT_A_TIME)
    failed: Counter[str] = Counter()

    async def find(category: Search) -> list[Candidate]:
        async with slots:
            found: dict[str, Candidate] = {}
            for name, source in sources.items():
                if len(found) < settings.per_category:
                    try:
                        answers = await remembered(folder, name, source, category, settings)
                    except Refused as refused:
                        failed[f"{name}: {refused.reason}"] += 1
                        continue
                    found |= {
                        one.place: one
                        for one in answers
                        if one.place and accepted(one, settings.licences)
                    }
            bar.advance(task)
            return list(found.values())[: settings.per_category]

    result = await asyncio.gather(*map(find, categories))
    for reason, times in failed.most_common():
        bar.console.print(
            f"[yellow]note:[/] no answer for {times:,} categories from {reason}; the same command "
            "asks again"
        )
    return result


async def remembered(
    folder: Path, name: str, source: Find, category: Search, settings: RetrieveConfig
) -> list[Candidate]:
    """Return what a source answers; the answer of an interface is kept in a file."""
    if name not in ENDPOINTS:
        return await source(category, settings.per_category)
    key = json.dumps(
        [name, category, settings.per_category, settings.licences, endpoint(settings, name)]
    )
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jsonl"
    if path.is_file():
        return [Candidate(**row) for row in read_table(path, "fastlt curate retrieve")]
    found = await source(category, settings.per_category)
    write_table(path, (asdict(candidate) for candidate in found))
    return found


def interleaved(found: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Return the first candidate of each category, then the second ones, and so on.

    So hosts share the load, and what is stopped has some of each.
    """
    return [candidate for row in zip_longest(*found) for candidate in row if candidate is not None]


def pending(
    raw: Path, candidates: Sequence[Candidate], settings: RetrieveConfig
) -> list[Candidate]:
    """Return the candidates that were not tried, and those that may work the next time."""
    last = {(row["category"], row["place"]): row for row in tried(raw)}

    def is_done(candidate: Candidate) -> bool:
        row = last.get((candidate.category, candidate.place))
        return row is not None and (
            row["fetched"] or not (row["transient"] or settings.retry == "all")
        )

    return [candidate for candidate in candidates if not is_done(candidate)]


def tried(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield what was tried, oldest first; the last row of a candidate counts."""
    for path in sorted(raw.glob("*.jsonl")):
        yield from read_table(path, "fastlt curate retrieve")


def next_number(raw: Path) -> int:
    """Return the number of the next shard."""
    return 1 + max((int(path.stem) for path in raw.glob("*.jsonl")), default=-1)


def groups(candidates: Sequence[Candidate], size: int) -> Iterator[Sequence[Candidate]]:
    """Yield candidates in groups of a size."""
    return (candidates[start : start + size] for start in range(0, len(candidates), size))


# --- fetching


async def fetch_group(
    raw: Path,
    number: int,
    group: Sequence[Candidate],
    fetcher: Fetcher,
    bar: Progress,
    task: TaskID,
) -> None:
    """Fetch a group, and write it to its shard at once, so that memory holds the requests alone."""
    counts: Counter[bool] = Counter()
    one_at_a_time = asyncio.Lock()
    with whole_group(raw, number) as written:

        async def one(place: int, candidate: Candidate) -> None:
            try:
                result: Found | Refused = await fetch(candidate, fetcher)
            except Refused as refused:
                result = refused
            except Exception as error:  # one server's fault must not lose the others' images
                result = Refused(f"it failed by a {type(error).__name__}", transient=True)
            async with one_at_a_time:
                await asyncio.to_thread(written.add, place, candidate, result)
            counts[isinstance(result, Found)] += 1
            bar.advance(task)
            bar.update(task, note=f"group {number}: {counts[True]} fetched, {counts[False]} not")

        await asyncio.gather(*(one(place, candidate) for place, candidate in enumerate(group)))


async def fetch(candidate: Candidate, fetcher: Fetcher) -> Found:
    """Return the picture of a candidate. Raises Refused."""
    settings = fetcher.settings
    if candidate.source in ("folder", LOCAL_CLIP):
        data, url = (
            await asyncio.to_thread(read_file, Path(candidate.place), settings.max_bytes),
            "",
        )
    else:
        if settings.ask_pages and candidate.page and await fetcher.page_opts_out(candidate.page):
            raise Refused("opted out of machine learning by its page")
        data, url = await fetcher.get(candidate.place, settings.max_bytes)
    return Found(data, await asyncio.to_thread(examine, data, settings), url)


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file of this machine. Raises Refused where it is too long."""
    try:
        if path.stat().st_size > max_bytes:
            raise Refused("too many bytes")
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"the file cannot be read ({error.strerror})") from error


class Group:
    """A shard that is being written, by one thread at a time, and its table."""

    def __init__(self, number: int, tar: tarfile.TarFile) -> None:
        self.number, self.tar = number, tar
        self.lock, self.is_closed = threading.Lock(), False
        self.rows: dict[int, dict[str, Any]] = {}  # by the place of the candidate

    def add(self, place: int, candidate: Candidate, result: Found | Refused) -> None:
        """Add what became of a candidate, with its picture where there is one."""
        with self.lock:
            if not self.is_closed:
                self._add(place, candidate, result)

    def close(self) -> None:
        """Close the group: what comes later is not kept."""
        with self.lock:
            self.is_closed = True

    def _add(self, place: int, candidate: Candidate, result: Found | Refused) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row: dict[str, Any] = {
            **asdict(candidate),
            "time": now,
            "fetched": isinstance(result, Found),
        }
        self.rows[place] = row
        if isinstance(result, Refused):
            row |= {"reason": result.reason, "transient": result.transient}
            return
        key, picture = f"{self.number:06d}{place:05d}", result.picture
        row |= {
            "url": result.url,
            "sha256": hashlib.sha256(result.data).hexdigest(),
            "size": len(result.data),
            "height": picture.height,
            "width": picture.width,
            "shard": f"{self.number:06d}.tar",
            "key": key,
        }
        row["offset"] = add(self.tar, key + picture.extension, result.data)
        add(self.tar, f"{key}.cls", candidate.category.encode())
        add(self.tar, f"{key}.txt", (candidate.title or candidate.category).encode())
        add(self.tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())


@contextmanager
def whole_group(raw: Path, number: int) -> Iterator[Group]:
    """Yield a group; write the shard, then its table.

    A shard without a table does not count, and is written over.

    One that is stopped keeps what it has.
    """
    stopped: BaseException | None = None
    with (
        whole_file(raw / f"{number:06d}.tar") as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        group = Group(number, tar)
        try:
            yield group
        except (asyncio.CancelledError, KeyboardInterrupt) as error:
            stopped = error
        group.close()
    if group.rows:
        write_table(
            raw / f"{number:06d}.jsonl", (group.rows[place] for place in sorted(group.rows))
        )
    else:
        (raw / f"{number:06d}.tar").unlink()  # stopped before anything had come
    if stopped is not None:
        raise stopped


# --- what a kill, or a damaged disk, left


def mend(raw: Path, console: Console) -> None:
    """Take up what killed groups had fetched.

    Groups whose shard is gone are fetched again.
    """
    for path in sorted(raw.glob("*.jsonl")):
        rows = [row for row in read_table(path, "fastlt curate retrieve") if row["fetched"]]
        shard = path.with_suffix(".tar")
        if rows and (
            not shard.is_file()
            or shard.stat().st_size < max(row["offset"] + row["size"] for row in rows)
        ):
            console.print(
                f"[yellow]note:[/] {shard} is damaged or gone: its {len(rows):,} images are "
                "fetched again"
            )
            path.unlink()
            shard.unlink(missing_ok=True)
    for partial in sorted(raw.glob(".*.tar.*.partial")):
        number = partial.name[1:7]
        if number.isdigit() and not (raw / f"{number}.jsonl").exists():
            salvage(partial, raw, number)
        partial.unlink(missing_ok=True)


def salvage(partial: Path, raw: Path, number: str) -> None:
    """Keep the whole images of a shard that was being written."""
    rows: list[dict[str, Any]] = []
    end = 0
    with partial.open("rb") as file, suppress(tarfile.TarError, ValueError, EOFError):
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # it is cut, so closing it has nothing to do
        while (member := tar.next()) is not None:
            if member.name.endswith(".json"):
                entry = tar.extractfile(member)
                rows.append(json.loads(entry.read() if entry else b""))
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if not rows:
        return
    with whole_file(raw / f"{number}.tar") as temporary:
        shutil.copyfile(partial, temporary)
        with temporary.open("r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    write_table(raw / f"{number}.jsonl", rows)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file to a shard, and return where its bytes begin."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(header, io.BytesIO(data))
    return offset


# --- what is shown


def show(out: Path, names: Sequence[str], settings: RetrieveConfig, console: Console) -> None:
    """Print how many images each category has, and the reasons of what was refused."""
    last = {(row["category"], row["place"]): row for row in tried(out / "raw")}
    if not last:
        chosen = (
            f" with one of the licences {', '.join(settings.licences)}" if settings.licences else ""
        )
        raise UserError(f"no source knows an image of any category{chosen}: see retrieve.sources")
    reasons = Counter(row.get("reason", "fetched") for row in last.values())
    table = Table("candidates", "", title=f"{len(last):,} candidates", title_justify="left")
    for reason, times in reasons.most_common():
        table.add_row(f"{times:,}", reason)
    console.print(table)
    have = Counter(normalised(row["category"]) for row in last.values() if row["fetched"])
    without = [name for name in names if not have[normalised(name)]]
    licences = Counter(row["licence"] or "unknown" for row in last.values() if row["fetched"])
    console.print(
        f"{reasons['fetched']:,} images of {len(names) - len(without):,} categories in "
        f"{out / 'raw'}; {len(without):,} have none",
        highlight=False,
        soft_wrap=True,
    )
    shares = ", ".join(f"{name} {times:,}" for name, times in licences.most_common(8))
    console.print(f"licences: {shares}", highlight=False, markup=False)
    for_good = sum(not row["fetched"] and not row["transient"] for row in last.values())
    if for_good:
        console.print(
            f"{for_good:,} were refused for good; where other settings would take them, "
            "retrieve.retry=all tries them again",
            highlight=False,
            soft_wrap=True,
        )
    if not reasons["fetched"]:
        raise UserError(
            f"not one of {len(last):,} candidates could be fetched: the table above says why"
        )
