"""The `llm` provider: a language model behind any endpoint that speaks OpenAI's protocol.

Every reply is kept on the disk under the hash of what was asked, so that what was answered once
costs nothing again.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib import resources
from pathlib import Path
from queue import Empty, SimpleQueue
from string import Template
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastlt.curate.proposals import Proposal, Target
from fastlt.curate.settings import ProposeConfig
from fastlt.errors import UserError
from fastlt.utils.files import write_text

OTHERS = 200  # target names that a prompt lists
SPARE = 4  # categories asked for beyond those wanted, as some will be targets
CHARACTERS_PER_TOKEN, TOKENS_PER_CATEGORY = 4, 40  # about, of English


class Suggested(BaseModel):
    """A category that a model suggests."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(min_length=1, max_length=100)
    description: str = Field(default="", max_length=1000)


class Reply(BaseModel):
    """The categories of a reply."""

    model_config = ConfigDict(extra="ignore")
    categories: list[Suggested] = Field(min_length=1)

    @field_validator("categories", mode="before")
    @classmethod
    def _sound_ones(cls, value: Any) -> Any:
        """One that is damaged does not cost the others."""
        return (
            [entry for entry in value if is_suggested(entry)] or value
            if isinstance(value, list)
            else value
        )


def is_suggested(entry: Any) -> bool:
    """Return whether an entry of a reply is a category."""
    try:
        Suggested.model_validate(entry)
    except ValidationError:
        return False
    return True


class Usage(NamedTuple):
    """The prompts and tokens that were, or will be, used."""

    prompts: int
    known: int  # of them answered before
    tokens_in: int
    tokens_out: int

    def cost(self, settings: ProposeConfig) -> float:
        """Return the cost in dollars."""
        return (self.tokens_in * settings.price_in + self.tokens_out * settings.price_out) / 1e6


class PromptRefused(Exception):
    """The endpoint will not answer this prompt; others it may."""


class Failed(NamedTuple):
    """The reason why a target has no answer."""

    reason: str


def prompts(settings: ProposeConfig, targets: Sequence[Target], limits: Sequence[int]) -> list[str]:
    """Return a prompt for each target.

    Raises UserError where the prompt file is not there, or names what is not known.
    """
    template = Template(_prompt_text(settings.prompt))
    return [
        _fill(template, settings.prompt, target, count, targets)
        for target, count in zip(targets, limits, strict=True)
    ]


def _prompt_text(place: str) -> str:
    if not place:
        return (resources.files("fastlt.curate") / "prompt.txt").read_text(encoding="utf-8")
    try:
        return Path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {place}: {error}") from error


def _fill(
    template: Template, place: str, target: Target, count: int, targets: Sequence[Target]
) -> str:
    others = [spoken(other) for other in targets if other is not target][:OTHERS]
    try:
        return template.substitute(
            target=spoken(target), count=count + SPARE, others=", ".join(others)
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the prompt {place}: {error} is not one of $target, $count, $others; a dollar is "
            "written $$"
        ) from error


def spoken(target: Target) -> str:
    """Return a target in words: its name, or the word for its id."""
    return (target.word or target.name).replace("_", " ")


class Cache:
    """The replies in a folder, a file each."""

    def __init__(self, folder: Path, settings: ProposeConfig) -> None:
        self.folder, self.settings = folder, settings

    def path(self, prompt: str) -> Path:
        """Return the file of the reply to a prompt."""
        key = [self.settings.model, self.settings.temperature, prompt]
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"

    def read(self, prompt: str) -> Reply | Failed | None:
        """Return the reply to a prompt, or None where there is none yet."""
        try:
            kept = json.loads(self.path(prompt).read_text(encoding="utf-8"))
            return (
                Failed(kept["failed"]) if "failed" in kept else Reply.model_validate(kept["reply"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is asked again

    def keep(self, prompt: str, reply: Reply | Failed, tokens: tuple[int, int]) -> None:
        """Keep a reply.

        One that was bad each time was paid for as well, and would be again.
        """
        answer: dict[str, Any] = (
            {"failed": reply.reason} if isinstance(reply, Failed) else {"reply": reply.model_dump()}
        )
        kept = {"model": self.settings.model, "prompt": prompt, **answer, "tokens": tokens}
        write_text(self.path(prompt), json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def estimate(cache: Cache, wanted: Sequence[str]) -> Usage:
    """Return what prompts will use, before any is sent: tokens are estimated by characters."""
    new = [prompt for prompt in wanted if cache.read(prompt) is None]
    tokens_in = sum(len(prompt) for prompt in new) // CHARACTERS_PER_TOKEN
    return Usage(
        len(wanted),
        len(wanted) - len(new),
        tokens_in,
        TOKENS_PER_CATEGORY * (cache.settings.per_target + SPARE) * len(new),
    )


# What is asked for in the reply, the strictest first.
FORMS: dict[str, dict[str, Any]] = {
    "json_schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "categories", "schema": Reply.model_json_schema()},
        }
    },
    "json_object": {"response_format": {"type": "json_object"}},
    "none": {},
}


class Endpoint:
    """A client, and the form of replies that its endpoint takes."""

    def __init__(self, client: Any, settings: ProposeConfig) -> None:
        self.client, self.settings = client, settings
        self.form = next(iter(FORMS)) if settings.structured == "auto" else settings.structured

    def complete(self, prompt: str) -> tuple[str, tuple[int, int]]:
        """Return the text of a reply, and tokens in and out.

        Raises PromptRefused, and UserError where it does not answer.
        """
        import openai

        form = self.form
        try:
            answer = self.client.chat.completions.create(
                model=self.settings.model,
                temperature=self.settings.temperature,
                messages=[{"role": "user", "content": prompt}],
                **FORMS[form],
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if (
                self.settings.structured == "auto"
                and form != "none"
                and "response_format" in str(error)
            ):
                self.form = list(FORMS)[list(FORMS).index(form) + 1]  # for the prompts to come too
                return self.complete(prompt)
            raise PromptRefused(f"the endpoint refuses the prompt: {error}") from error
        except openai.APIError as error:
            where = self.settings.base_url or "the endpoint"
            raise UserError(
                f"{where} does not answer ({type(error).__name__}: {error}); what was answered is "
                "kept"
            ) from error
        except (
            AttributeError,
            TypeError,
            ValueError,
            RecursionError,
        ):  # its client does not check what it is sent
            return "", (0, 0)
        return said(answer), spent_on(answer)


def ask_all(
    cache: Cache, wanted: Sequence[str]
) -> Iterator[tuple[int, Reply | Failed, tuple[int, int]]]:
    """Yield (number of the prompt, reply or why there is none, tokens in and out), as they come.

    Stops at what concerns all prompts: UserError where the key is refused or the endpoint not
    there.
    """
    endpoint = Endpoint(open_client(cache.settings), cache.settings)
    waiting: SimpleQueue[tuple[int, str]] = SimpleQueue()
    done: SimpleQueue[tuple[int, Future[tuple[Reply | Failed, tuple[int, int]]]]] = SimpleQueue()
    for job in enumerate(wanted):
        waiting.put(job)

    def work() -> None:
        with suppress(Empty):
            while True:
                number, prompt = waiting.get_nowait()
                answer: Future[tuple[Reply | Failed, tuple[int, int]]] = Future()
                try:
                    answer.set_result(ask(endpoint, cache, prompt))
                except BaseException as error:  # it is raised where the answer is looked at
                    answer.set_exception(error)
                done.put((number, answer))

    # Not a pool: its threads are waited for at the end, however slow their endpoint is.
    for _ in range(min(cache.settings.concurrency, len(wanted))):
        threading.Thread(target=work, name="fastlt-llm", daemon=True).start()
    try:
        for _ in wanted:
            number, answer = done.get()
            yield number, *answer.result()
    finally:
        with suppress(Empty):
            while True:
                waiting.get_nowait()
        endpoint.client.close()


def open_client(settings: ProposeConfig) -> Any:
    """Return a client of the endpoint. Raises UserError where there is no key or library."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise UserError(
            "propose.provider=llm needs the library openai: pip install fastlt[curate]"
        ) from error
    if not settings.model:
        raise UserError("propose.provider=llm needs a model: name it with propose.model")
    key = os.environ.get("OPENAI_API_KEY") or ("none" if settings.base_url else "")
    if not key:
        raise UserError(
            "set OPENAI_API_KEY to the key of the endpoint, or propose.base_url to one that needs "
            "none"
        )
    return OpenAI(
        api_key=key,
        base_url=settings.base_url or None,
        timeout=settings.timeout,
        max_retries=settings.retries,
    )


def ask(endpoint: Endpoint, cache: Cache, prompt: str) -> tuple[Reply | Failed, tuple[int, int]]:
    """Return the reply to a prompt or why there is none, and the tokens in and out of all requests.

    The client itself tries again, later each time, where the endpoint is slow, busy or broken; here
    its replies are checked.
    """
    if known := cache.read(prompt):
        return known, (0, 0)
    spent, problem = [0, 0], ""
    for _ in range(cache.settings.retries + 1):
        try:
            text, tokens = endpoint.complete(prompt)
        except PromptRefused as refused:
            return Failed(str(refused)), (spent[0], spent[1])
        spent = [before + now for before, now in zip(spent, tokens, strict=True)]
        try:
            reply = Reply.model_validate_json(json_in(text))
        except (ValidationError, RecursionError) as error:
            problem = (
                str(error.errors()[0]["msg"])
                if isinstance(error, ValidationError)
                else "nested too deeply"
            )
            continue
        cache.keep(prompt, reply, (spent[0], spent[1]))
        return reply, (spent[0], spent[1])
    failed = Failed(
        f"no reply of the form that was asked for, last: {problem}; to ask again, remove "
        f"{cache.path(prompt)}"
    )
    cache.keep(prompt, failed, (spent[0], spent[1]))
    return failed, (spent[0], spent[1])


def said(answer: Any) -> str:
    """Return the text of an answer that may be anything."""
    try:
        text = answer.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def spent_on(answer: Any) -> tuple[int, int]:
    """Return the tokens in and out of an answer."""
    usage = getattr(answer, "usage", None)
    tokens_in, tokens_out = (
        getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")
    )
    return (
        (tokens_in, tokens_out)
        if isinstance(tokens_in, int) and isinstance(tokens_out, int)
        else (0, 0)
    )


def json_in(text: str) -> str:
    """Return the JSON of a reply.

    Many models think aloud first, wrap it in a fence of Markdown, or write something around it.
    """
    text = text.rpartition("</think>")[2].strip()
    if fenced := re.search(r"```(?:json)?\s*(\{.*?\})\s*```", text, re.DOTALL):
        return fenced[1]
    begin, end = text.find("{"), text.rfind("}")
    return text[begin : end + 1] if 0 <= begin < end else text


def to_proposals(target: int, reply: Reply) -> list[Proposal]:
    """Return the categories of a reply as proposals for a target."""
    return [
        Proposal(target, category.name.strip(), "llm", description=category.description)
        for category in reply.categories
    ]
