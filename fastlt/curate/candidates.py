"""Where images of a category may be had: what each source knows, with licence and author.

Nothing is downloaded here.
"""

import csv
import html
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from fastlt.curate.fetch import Fetcher, Refused
from fastlt.curate.settings import RetrieveConfig
from fastlt.decode.formats import is_image_file
from fastlt.errors import UserError
from fastlt.utils.embeddings import read_embeddings
from fastlt.utils.names import normalised

ENDPOINTS = {
    "openverse": "https://api.openverse.org/v1/",
    "commons": "https://commons.wikimedia.org/w/api.php",
    "inaturalist": "https://api.inaturalist.org/v1/",
}
# Requests a minute. iNaturalist asks for 60 or fewer (and fewer than 10,000 a day); Openverse
# allows 60 without a token; Wikimedia's limits depend on who asks, and 60 is a guess on the low
# side.
PER_MINUTE = {"openverse": 60, "commons": 60, "inaturalist": 60}
JSON_BYTES = 20_000_000
# images; Openverse gives no more without a token
OPENVERSE_PAGE, COMMONS_PAGE, INATURALIST_PAGE = (
    20,
    50,
    100,
)
OPENVERSE_PAGES = 20  # that it answers of any search
COMMONS_DEPTH = 10  # results that are looked at for each that is wanted, where licences are chosen
LOCAL_CLIP = "clip, local"  # source of what the index has on this machine
CLIP_ROWS = 65_536  # images whose scores are made together
SPELT = (
    ("licence", "license"),
    ("author", "creator", "photographer", "artist", "attribution"),
    ("page", "foreign_landing_url", "source_page"),
    ("title", "caption"),
)
COMMONS_WIDTH = 1024  # of the scaled copy that is taken; originals are often tens of megabytes


class Search(NamedTuple):
    """The name of a category, and the words that it is searched for by."""

    name: str
    query: str


@dataclass(frozen=True)
class Candidate:
    """An image that has not been looked at. `place` is an address, or a path of this machine."""

    category: str
    place: str
    source: str
    licence: str = ""
    author: str = ""
    page: str = ""  # where it is shown
    title: str = ""
    score: float | None = None  # of the source


Find = Callable[[Search, int], Awaitable[list[Candidate]]]  # and how many, at most
Accept = Callable[[Candidate], bool]  # by its licence


def open_sources(
    settings: RetrieveConfig, names: Sequence[str], fetcher: Fetcher
) -> dict[str, Find]:
    """Return the sources by name, in the order they are asked.

    Raises UserError where one lacks what it needs.
    """
    web = {"openverse": openverse, "commons": commons, "inaturalist": inaturalist}
    local: dict[str, Callable[[RetrieveConfig, Sequence[str]], dict[str, list[Candidate]]]] = {
        "urls": listed,
        "folder": in_folder,
        "clip": nearest_in_index,
    }
    found: dict[str, Find] = {}
    accept = partial(accepted, licences=settings.licences)
    for source in dict.fromkeys(settings.sources):
        if source in web:
            if source not in settings.endpoints:
                keep_to_rate(fetcher, source)
            found[source] = partial(
                web[source], partial(ask, fetcher), endpoint(settings, source), accept
            )
        else:
            found[source] = partial(_known, local[source](settings, names), accept)
    return found


def keep_to_rate(fetcher: Fetcher, source: str) -> None:
    """Keep requests to the interface of a source to the rate that it allows."""
    host = urlsplit(ENDPOINTS[source]).hostname or ""
    fetcher.rates.interval[host] = max(fetcher.rates.interval[host], 60 / PER_MINUTE[source])


def endpoint(settings: RetrieveConfig, source: str) -> str:
    """Return the address of a source's interface."""
    return {str(name): address for name, address in settings.endpoints.items()}.get(
        source, ENDPOINTS[source]
    )


async def _known(
    candidates: dict[str, list[Candidate]], accept: Accept, search: Search, most: int
) -> list[Candidate]:
    return list(filter(accept, candidates.get(normalised(search.name), [])))[:most]


def accepted(candidate: Candidate, licences: Sequence[str]) -> bool:
    """Return whether the licence of a candidate is one of those that are accepted."""
    return licence_accepted(candidate.licence, licences)


def licence_accepted(stated: str, licences: Sequence[str]) -> bool:
    """Return whether a licence is one of those that are accepted; an empty list accepts any."""
    return not licences or plain_licence(stated) in {plain_licence(licence) for licence in licences}


def plain_licence(text: str) -> str:
    """Return a licence in one spelling.

    `CC BY-SA 4.0`, `cc-by-sa` and `by-sa` are `by-sa`; `CC0 1.0` is `cc0`, `Public domain` is
    `pdm`.
    """
    words = re.findall(r"[a-z]+0?", text.lower())
    if "public" in words or "pd" in words or "pdm" in words:
        return "pdm"
    if "cc0" in words or "zero" in words:
        return "cc0"
    return "-".join(word for word in words if word in ("by", "nc", "nd", "sa")) or " ".join(words)


# --- interfaces on the web

Ask = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]  # address, parameters -> JSON


async def ask(fetcher: Fetcher, address: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object that an interface answers with. Raises Refused."""
    token = (
        os.environ.get("OPENVERSE_TOKEN") if address.startswith(ENDPOINTS["openverse"]) else None
    )
    headers = {
        "Accept": "application/json",
        **({"Authorization": f"Bearer {token}"} if token else {}),
    }
    answer = await fetcher.get(
        f"{address}?{urlencode(parameters)}", JSON_BYTES, headers, is_api=True
    )
    try:
        found = json.loads(answer.data)
    except (ValueError, RecursionError) as error:
        raise Refused("the answer is not JSON") from error
    if not isinstance(found, dict):
        raise Refused("the answer is not as documented")
    return found


async def openverse(
    ask: Ask, address: str, accept: Accept, search: Search, most: int
) -> list[Candidate]:
    """Return candidates of api.openverse.org/v1: openly licensed images of Flickr and museums.

    OPENVERSE_TOKEN, if set, is sent along.
    """
    found: list[Candidate] = []
    for page in range(1, OPENVERSE_PAGES + 1):
        answer = await ask(
            f"{address}images/", {"q": search.query, "page": page, "page_size": OPENVERSE_PAGE}
        )
        found += filter(
            accept, [_of_openverse(search.name, entry) for entry in entries(answer.get("results"))]
        )
        if len(found) >= most or page >= number(answer, "page_count"):
            break
    return found[:most]


def _of_openverse(category: str, entry: dict[str, Any]) -> Candidate:
    licence = f"{text(entry, 'license')} {text(entry, 'license_version')}".strip()
    page, title = text(entry, "foreign_landing_url"), text(entry, "title")
    return Candidate(
        category, text(entry, "url"), "openverse", licence, text(entry, "creator"), page, title
    )


async def commons(
    ask: Ask, address: str, accept: Accept, search: Search, most: int
) -> list[Candidate]:
    """Return candidates of Wikimedia Commons, by MediaWiki's full-text search."""
    found: list[Candidate] = []
    looked_at = 0
    parameters: dict[str, Any] = {
        "action": "query",
        "format": "json",
        "formatversion": 2,
        "generator": "search",
        "gsrnamespace": 6,
        "prop": "imageinfo",
        "gsrsearch": f"filetype:bitmap {search.query}",
        "gsrlimit": min(most, COMMONS_PAGE),
        "iiprop": "url|extmetadata|mime",
        "iiurlwidth": COMMONS_WIDTH,
        "iiextmetadatafilter": "LicenseShortName|Artist",
    }
    while len(found) < most:
        answer = await ask(address, parameters)
        query = answer.get("query")
        pages = entries(query.get("pages") if isinstance(query, dict) else None)
        for entry in sorted(pages, key=lambda page: number(page, "index")):
            made = [
                _of_commons(search.name, text(entry, "title"), info)
                for info in entries(entry.get("imageinfo"))[:1]
            ]
            found += filter(accept, made)
        looked_at += len(pages)
        if (
            not pages
            or looked_at >= COMMONS_DEPTH * most
            or not isinstance(answer.get("continue"), dict)
        ):
            break
        parameters |= answer["continue"]
    return found[:most]


def _of_commons(category: str, title: str, info: dict[str, Any]) -> Candidate:
    metadata = info.get("extmetadata")
    values = (
        {name: text(entry, "value") for name, entry in metadata.items() if isinstance(entry, dict)}
        if isinstance(metadata, dict)
        else {}
    )
    author = html.unescape(re.sub(r"<[^>]*>", "", values.get("Artist", ""))).strip()  # it is HTML
    place = text(info, "thumburl") or text(info, "url")
    return Candidate(
        category,
        place,
        "commons",
        values.get("LicenseShortName", ""),
        author,
        text(info, "descriptionurl"),
        title,
    )


async def inaturalist(
    ask: Ask, address: str, accept: Accept, search: Search, most: int
) -> list[Candidate]:
    """Return candidates of api.inaturalist.org/v1.

    Photographs of the taxon that the name means come first, then those of confirmed observations.
    """
    taxa = entries((await ask(f"{address}taxa", {"q": search.name, "per_page": 1})).get("results"))
    if not taxa:
        return []
    taxon = number(taxa[0], "id")
    described = entries((await ask(f"{address}taxa/{taxon}", {})).get("results"))
    shown = [entry.get("photo") for one in described for entry in entries(one.get("taxon_photos"))]
    photos = entries(shown)
    found: list[Candidate] = []
    seen: dict[str, Candidate] = {}
    for page in count(1):
        made = [_of_inaturalist(search.name, photo) for photo in photos]
        before = len(seen)
        seen |= {candidate.place: candidate for candidate in made if candidate.place}
        found = list(filter(accept, seen.values()))
        if len(found) >= most or (page > 1 and len(seen) == before):
            break
        parameters = {
            "taxon_id": taxon,
            "photos": "true",
            "quality_grade": "research",
            "photo_licensed": "true",
            "page": page,
            "per_page": INATURALIST_PAGE,
        }
        observations = entries((await ask(f"{address}observations", parameters)).get("results"))
        if not observations:
            break
        photos = [photo for one in observations for photo in entries(one.get("photos"))]
    return found[:most]


def _of_inaturalist(category: str, photo: dict[str, Any]) -> Candidate:
    place = text(photo, "url").replace("/square.", "/medium.")  # 500 pixels instead of 75
    page = f"https://www.inaturalist.org/photos/{number(photo, 'id')}"
    return Candidate(
        category,
        place,
        "inaturalist",
        text(photo, "license_code"),
        text(photo, "attribution"),
        page,
    )


def entries(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a JSON list; nothing of what is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def text(entry: dict[str, Any], key: str) -> str:
    """Return the text under a key, empty where there is none."""
    value = entry.get(key)
    # JSON may hold half a character
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def number(entry: dict[str, Any], key: str) -> int:
    """Return the number under a key, 0 where there is none."""
    value = entry.get(key)
    return value if isinstance(value, int) else 0


# --- what lies on this machine


def listed(settings: RetrieveConfig, names: Sequence[str]) -> dict[str, list[Candidate]]:
    """Return the candidates of a CSV or parquet file.

    Its columns are category, url and, if there, licence, author, page, title.
    """
    if not settings.urls:
        raise UserError(
            "the source urls needs retrieve.urls, a CSV or parquet file with the columns "
            "category,url"
        )
    file = Path(settings.urls)
    rows = list(rows_of(file))
    if rows and not {"category", "url"} <= rows[0].keys():
        raise UserError(f"{file} must have the columns category and url")
    return grouped((_of_row(row) for row in rows if row["category"] and row["url"]), names)


def _of_row(row: dict[str, Any]) -> Candidate:
    return Candidate(str(row["category"]), str(row["url"]), "urls", *source_of(row))


def source_of(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return licence, author, page and title of a row, however the columns are spelt."""
    lower = {str(name).strip().lower(): value for name, value in row.items()}
    return tuple(
        str(next((lower[name] for name in names if lower.get(name)), "")) for names in SPELT
    )  # type: ignore[return-value]


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV or a parquet file."""
    try:
        if file.suffix == ".parquet":
            yield from parquet_table(file).to_pylist()
        else:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def parquet_table(file: Path) -> Any:
    """Return the table of a parquet file. Raises UserError where it cannot be read."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file} needs the library pyarrow: pip install fastlt[curate]") from error
    try:
        return pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def in_folder(settings: RetrieveConfig, names: Sequence[str]) -> dict[str, list[Candidate]]:
    """Return the images of a folder with a sub-folder for each category."""
    folder = Path(settings.folder)
    if not settings.folder or not folder.is_dir():
        raise UserError(
            "the source folder needs retrieve.folder, a folder with one of images for each "
            f"category, not '{folder}'"
        )
    images = (path for path in sorted(folder.glob("*/**/*")) if is_image_file(path))
    return grouped(
        (
            Candidate(path.relative_to(folder).parts[0], str(path.resolve()), "folder")
            for path in images
        ),
        names,
    )


def nearest_in_index(settings: RetrieveConfig, names: Sequence[str]) -> dict[str, list[Candidate]]:
    """Return the images whose CLIP features are nearest to those of each category's text.

    The index is what `clip-retrieval inference` writes: img_emb/img_emb_*.npy, (n, D) of length 1,
    and metadata/metadata_*.parquet with a column url or image_path.
    """
    import numpy as np

    if not settings.clip_index or not settings.clip_text:
        raise UserError(
            "the source clip needs retrieve.clip_index, a folder of clip-retrieval, and "
            "retrieve.clip_text"
        )
    folder, features = Path(settings.clip_index), read_embeddings(settings.clip_text).vectors
    wanted = [name for name in names if normalised(name) in features]
    if not wanted:
        raise UserError(
            f"{settings.clip_text} has vectors for none of the categories, not even '{names[0]}'"
        )
    queries = np.stack([features[normalised(name)] for name in wanted])
    files = sorted((folder / "img_emb").glob("img_emb_*.npy"))
    if not files:
        raise UserError(f"{folder} has no img_emb/img_emb_*.npy: it is no index of clip-retrieval")
    best: list[list[tuple[float, dict[str, Any]]]] = [[] for _ in wanted]
    for file in files:
        try:
            images = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        rows = parquet_table(
            folder
            / "metadata"
            / file.name.replace("img_emb", "metadata").replace(".npy", ".parquet")
        )
        if images.shape[1] != queries.shape[1] or len(rows) != len(images):
            raise UserError(
                f"{file} of shape {images.shape} does not go with {len(rows)} rows and text of "
                f"{queries.shape[1]} numbers"
            )
        for start in range(0, len(images), CLIP_ROWS):
            add_best(
                best,
                queries @ np.asarray(images[start : start + CLIP_ROWS], np.float32).T,
                rows.slice(start, CLIP_ROWS),
                settings,
            )
    return grouped(
        (
            _of_clip(name, row, score)
            for name, found in zip(wanted, best, strict=True)
            for score, row in found
            if row.get("url") or row.get("image_path")
        ),
        names,
    )


def _of_clip(category: str, row: dict[str, Any], score: float) -> Candidate:
    """Return the candidate of a row.

    `url` is fetched like any address; `image_path` alone is a file of this machine.
    """
    if row.get("url"):
        return Candidate(category, str(row["url"]), "clip", *source_of(row), score=score)
    return Candidate(category, str(row["image_path"]), LOCAL_CLIP, *source_of(row), score=score)


def add_best(
    best: list[list[tuple[float, dict[str, Any]]]], scores: Any, rows: Any, settings: RetrieveConfig
) -> None:
    """Add n more images to the best of each category.

    scores (categories, n) are theirs, and the table `rows` describes them.
    """
    import numpy as np

    if settings.licences:
        known = [name for name in rows.column_names if name.strip().lower() in SPELT[0]]
        licences = rows.column(known[0]).to_pylist() if known else [""] * len(rows)
        usable = np.array(
            [licence_accepted(str(licence or ""), settings.licences) for licence in licences], bool
        )
        scores, rows = scores[:, usable], rows.filter(usable)
    if not len(rows):
        return
    count = min(settings.per_category, scores.shape[1])
    for kept, row in zip(best, scores, strict=True):
        top = np.sort(np.argpartition(-row, count - 1)[:count])
        for i, entry in zip(top.tolist(), rows.take(top).to_pylist(), strict=True):
            kept.append((float(row[i]), entry))
        kept.sort(key=lambda entry: -entry[0])
        del kept[settings.per_category :]


def grouped(candidates: Iterable[Candidate], names: Sequence[str]) -> dict[str, list[Candidate]]:
    """Return candidates by normalised category, each with the name that it has here.

    Those of other categories are left out.
    """
    known = {normalised(name): name for name in names}
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        word = normalised(candidate.category)
        if word in known:
            found.setdefault(word, []).append(candidate)
    return found
