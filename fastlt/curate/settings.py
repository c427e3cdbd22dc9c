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
    """Where neighbours come from: WordNet, a language model, or a file."""
    control: Literal["neighbours", "random"] = "neighbours"
    """random: a control, as many categories drawn from all of WordNet."""
    per_target: Annotated[int, Field(ge=1, le=1000)] = 8
    """The most auxiliary classes that one target gets."""
    allocation: Literal["even", "tail"] = "even"
    """tail: as many in all, but more for targets with fewer images."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random control."""
    wordnet: str = ""
    """For wordnet: a folder with Princeton's data.noun, such as /usr/share/wordnet, or with tables,
    a file in XML such as Open English WordNet's, or wn:omw-en:1.4, data of the library wn."""
    synsets: str = ""
    """For wordnet: a CSV target,synset for targets whose name has several senses or none, or first
    for the first sense of each in WordNet's order (--senses)."""
    reach: Annotated[int, Field(ge=1, le=20)] = 4
    """For wordnet: edges of the tree between a target and its neighbours, at most."""
    rise: Count = 2
    """For wordnet: how many of these edges may go upwards: 1 for siblings, 2 for cousins."""
    embeddings: str = ""
    """For wordnet: FILE.npz or FILE.npz:KEY with names and vectors that rank what is equally
    near."""
    file: str = ""
    """For file: a CSV target,category[,query[,description]], best first."""
    model: str = ""
    """For llm: the model's name."""
    base_url: str = ""
    """For llm: an endpoint that speaks OpenAI's protocol; empty: OPENAI_BASE_URL, or OpenAI."""
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """For llm: how replies are asked for; auto: by a schema, or as the endpoint takes it."""
    prompt: str = ""
    """For llm: a text file with $target, $count and $others; empty: the one of fastlt."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.2
    """For llm: the sampling temperature."""
    concurrency: Several = 4
    """For llm: requests at a time."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """For llm: seconds that one request may take."""
    retries: Count = 5
    """For llm: repetitions of a request that fails, or whose reply is of another form."""
    price_in: Price = 0.0
    """For llm: dollars for a million tokens of the prompts."""
    price_out: Price = 0.0
    """For llm: dollars for a million tokens of the replies."""


class RetrieveConfig(Section):
    """The settings of `fastlt curate retrieve`."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = ("openverse",)
    """The sources, asked in turn until there are enough candidates."""
    per_category: Several = 100
    """Candidates of each auxiliary class."""
    licences: tuple[str, ...] = ()
    """Licences that are accepted, such as cc0, by, by-sa; empty: any."""
    endpoints: dict[Source, str] = Field(default={})
    """Other addresses of the same interface, by source."""
    urls: str = ""
    """For urls: a CSV or parquet with category, url and, if there, licence and author."""
    folder: str = ""
    """For folder: a folder with a sub-folder of images for each category."""
    clip_index: str = ""
    """For clip: what `clip-retrieval inference` wrote of images, with their addresses."""
    clip_text: str = ""
    """For clip: FILE.npz with names and vectors of the categories by the same model."""
    contact: str = ""
    """An address or page by which hosts can reach you, as part of the user agent."""
    allow_private: bool = False
    """Fetch from addresses of private networks and of this machine too."""
    ask_pages: bool = True
    """Read the page that shows an image too, which may opt out of machine learning."""
    per_host: Annotated[float, Field(gt=0)] = 5.0
    """Requests a second to one host."""
    concurrency: Several = 32
    """Requests at a time."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that one request may take."""
    retries: Count = 2
    """Repetitions of requests that may succeed the next time."""
    max_bytes: Several = 20_000_000
    """The largest image, in bytes."""
    max_pixels: Several = 50_000_000
    """The largest image, in pixels."""
    min_side: Several = 64
    """The shortest side of an image, in pixels."""
    shard: Several = 500
    """Images that are fetched and written together."""
    retry: Literal["transient", "all"] = "transient"
    """Which failures are tried again by a later call."""


class FilterConfig(FeatureSettings):
    """The settings of `fastlt curate filter`, below those of the features."""

    prototype: Literal["retrieved", "targets", "both"] = "retrieved"
    """Whose images the prototype of a class is made of: its own, its owners', or both."""
    gamma1: Cosine = 0.7
    """The least cosine of an image to the prototype of its class."""
    gamma2: Annotated[float, Field(gt=0, le=2)] = 0.98
    """The cosine from which on two images are the same; above 1: none are."""
    hash_distance: Annotated[int, Field(ge=-1, le=5)] = 4
    """The bits of 64 up to which two perceptual hashes are the same; -1: off."""
    test: str = ""
    """A further pack none of whose images may be among the auxiliaries."""
    min_images: Several = 10
    """An auxiliary class with fewer images is given up."""
    sheet: Count = 24
    """Images of a class on its contact sheet, kept and dropped ones each; 0: no sheets."""


class CurateConfig(Section):
    """The settings of all steps."""

    propose: ProposeConfig = ProposeConfig()
    """The settings of `propose`."""
    retrieve: RetrieveConfig = RetrieveConfig()
    """The settings of `retrieve`."""
    filter: FilterConfig = FilterConfig()
    """The settings of `filter`."""


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
