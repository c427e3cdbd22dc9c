"""The settings of `fastlt curate`, a section for each step.

They are kept in config.toml beside what the steps wrote.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fastlt.config import Cosine, Count, Section, Several, to_toml, with_settings
from fastlt.errors import UserError
from fastlt.evaluation.feature_settings import FeatureSettings
from fastlt.utils.files import write_text

CONFIG = "config.toml"

Source = Literal["openverse", "commons", "inaturalist", "urls", "clip", "folder"]
Price = Annotated[float, Field(ge=0)]


class ProposeConfig(Section):
    """The settings of `fastlt curate propose`."""

    provider: Literal["wordnet", "llm", "file"] = "wordnet"
    # random: as many, drawn from all of WordNet
    control: Literal["neighbours", "random"] = "neighbours"
    # the most auxiliary classes that one target gets
    per_target: Annotated[int, Field(ge=1, le=1000)] = 8
    # tail: as many in all, but more for targets with fewer images
    allocation: Literal["even", "tail"] = "even"
    seed: Annotated[int, Field(ge=0)] = 0  # of the random control
    # wordnet
    wordnet: str = ""  # a folder with its tables, or wn:omw-en:1.4, data of the library wn
    synsets: str = ""  # CSV target,synset for targets whose name says too little
    reach: Annotated[int, Field(ge=1, le=20)] = 4  # edges of the tree between target and neighbour
    rise: Count = 2  # of which upwards: 1 are siblings, 2 are cousins
    # FILE.npz or FILE.npz:KEY with names and vectors: what is as near is ranked by them
    embeddings: str = ""
    # file
    file: str = ""  # CSV target,category[,query[,description]], best first
    # llm
    model: str = ""
    # of any endpoint that speaks OpenAI's protocol; empty: OPENAI_BASE_URL, or OpenAI itself
    base_url: str = ""
    # how replies are asked for; auto: by a schema, or as the endpoint takes it
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    # a text file with $target, $count, $others; empty: the one that comes with fastlt
    prompt: str = ""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.2
    concurrency: Several = 4  # requests at a time
    timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds, of one request
    # of a request that fails, waiting longer each time, and of a reply that is not what was asked
    # for
    retries: Count = 5
    price_in: Price = 0.0  # dollars for a million tokens
    price_out: Price = 0.0


class RetrieveConfig(Section):
    """The settings of `fastlt curate retrieve`."""

    # asked in turn, until there are enough candidates
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = ("openverse",)
    per_category: Several = 100  # candidates of each auxiliary class
    licences: tuple[str, ...] = ()  # those that are accepted, such as cc0, by, by-sa; empty: any
    # other addresses of the same interface, by source
    endpoints: dict[Source, str] = Field(default={})
    # of source urls: CSV or parquet with category, url and, if there, licence, author
    urls: str = ""
    folder: str = ""  # of source folder: a sub-folder of images for each category
    # of source clip: what `clip-retrieval inference` wrote of images, with their addresses
    clip_index: str = ""
    clip_text: str = ""  # and of the categories: FILE.npz with names and vectors of the same model
    # an address or page by which hosts can reach you; part of the user agent
    contact: str = ""
    allow_private: bool = False  # addresses of private networks and of this machine too
    per_host: Annotated[float, Field(gt=0)] = 5.0  # requests a second of one host
    concurrency: Several = 32  # requests at a time
    timeout: Annotated[float, Field(gt=0)] = 30.0  # seconds, of one request
    retries: Count = 2  # of what may go better the next time
    max_bytes: Several = 20_000_000  # of an image
    max_pixels: Several = 50_000_000
    min_side: Several = 64  # pixels
    shard: Several = 500  # images that are fetched, and written, together
    retry: Literal["transient", "all"] = "transient"  # of what failed before, when called again


class FilterConfig(FeatureSettings):
    """The settings of `fastlt curate filter`, below those of the features."""

    # whose images a class is like: its own, its owners', both
    prototype: Literal["retrieved", "targets", "both"] = "retrieved"
    gamma1: Cosine = 0.7  # the least cosine of an image to the prototype of its class
    # from this cosine on two images are the same; above 1: none are
    gamma2: Annotated[float, Field(gt=0, le=2)] = 0.98
    # of 64 bits, up to which two perceptual hashes are the same; -1: off
    hash_distance: Annotated[int, Field(ge=-1, le=5)] = 4
    test: str = ""  # a further pack none of whose images may be among the auxiliaries
    min_images: Several = 10  # an auxiliary class with fewer is given up
    # images of a class on its contact sheet, kept and dropped ones each; 0: no sheets
    sheet: Count = 24


class CurateConfig(Section):
    """The settings of all steps."""

    propose: ProposeConfig = ProposeConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    filter: FilterConfig = FilterConfig()


def read_settings(
    out: Path, file: Path | None, overrides: Sequence[str], allow_private: bool = False
) -> CurateConfig:
    """Return the settings of a file with overrides on top.

    By default it is that of an earlier step in `out`. --allow-private is given anew each time.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder: name another one with --out")
    kept = out / CONFIG
    private = f"retrieve.allow_private={str(allow_private).lower()}"
    return with_settings(
        CurateConfig, file or (kept if kept.is_file() else None), [private, *overrides]
    )


def keep_settings(out: Path, config: CurateConfig) -> None:
    """Write the settings to `out`, for the next step."""
    write_text(out / CONFIG, to_toml(config))
