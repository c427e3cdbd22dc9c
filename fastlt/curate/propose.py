"""`fastlt curate propose`: which auxiliary classes there are to be, and because of which targets.

CURATED/proposals.jsonl   every category that was proposed, whether it is kept, and why
CURATED/categories.jsonl  the auxiliary classes: name, what to search images by, owners
CURATED/pairs.csv         target,auxiliary, as `fastlt pack` reads it
CURATED/llm/              replies of a language model
"""

import csv
import io
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.classes import ClassSpace
from fastlt.curate import llm, wordnet
from fastlt.curate.proposals import (
    Category,
    Decision,
    Proposal,
    Target,
    even_limits,
    merge,
    tail_weighted_limits,
    with_random_names,
)
from fastlt.curate.senses import look_up, parts
from fastlt.curate.settings import CurateConfig, ProposeConfig, keep_settings
from fastlt.curate.table import write_table
from fastlt.errors import UserError
from fastlt.utils.embeddings import read_embeddings
from fastlt.utils.files import whole_file
from fastlt.utils.lock import alone_in
from fastlt.utils.names import normalised
from fastlt.utils.progress import rated_progress
from fastlt.utils.wordnet import read_wordnet

REPLACED = "the random control has another category in its place"
WITH_WORD = re.compile(r"(n\d{8})[\s,]+(\S.*)")  # a WordNet id and what it is called
SHOWN = 8  # targets of the table on the screen
FILE_COLUMNS = ("target", "category", "query", "description")


class Proposed(NamedTuple):
    """The synonyms and proposals of each target, and notes for the user."""

    synonyms: list[list[str]]
    proposals: list[list[Proposal]]
    notes: list[str] = []  # noqa: RUF012  # never changed


def run_propose(
    place: Path, out: Path, config: CurateConfig, dry_run: bool, console: Console
) -> None:
    """Propose auxiliary classes, or with dry_run print the prompts.

    place: a pack, or a text file with the name or the WordNet id of a target on each line.
    """
    if dry_run:
        settings = config.propose
        targets = named(settings, read_targets(place))
        show_prompts(settings, targets, limits_of(settings, targets), out, console)
        return
    with alone_in(out, "another step"):
        propose(place, out, config, console)


def propose(place: Path, out: Path, config: CurateConfig, console: Console) -> None:
    """Propose auxiliary classes within the locked folder of the curation."""
    settings = config.propose
    targets = named(settings, read_targets(place))
    limits = limits_of(settings, targets)
    if settings.control == "random" and not settings.wordnet:
        raise UserError(
            "the random control is drawn from WordNet: give its tables with propose.wordnet"
        )
    proposed = PROVIDERS[settings.provider](settings, targets, limits, out, console)
    for note in proposed.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    decisions, categories = merge(targets, proposed.synonyms, proposed.proposals, limits)
    if not categories:
        write_table(
            out / "proposals.jsonl", (decision_row(decision, targets) for decision in decisions)
        )
        raise UserError(
            f"no neighbour was found for any of the {len(targets):,} targets: "
            f"{out / 'proposals.jsonl'} says why"
        )
    if settings.control == "random":
        neighbours, categories = (
            categories,
            random_categories(settings, targets, proposed.synonyms, categories, out, console),
        )
        replaced = [d._replace(kept=False, reason=REPLACED) if d.kept else d for d in decisions]
        decisions = [
            *replaced,
            *(drawn(*pair) for pair in zip(neighbours, categories, strict=True)),
        ]
    write(out, targets, decisions, categories)
    keep_settings(out, config)
    show(targets, decisions, categories, console)
    console.print(
        f"written to {out}: categories.jsonl, proposals.jsonl, pairs.csv",
        highlight=False,
        soft_wrap=True,
    )


def read_targets(place: Path) -> list[Target]:
    """Return the targets of a pack, or of a text file. Raises UserError."""
    if place.is_dir():
        space = ClassSpace.load(place / "classes.json")
        return [
            Target(name, count)
            for name, count in zip(space.target_names, space.train_counts, strict=False)
        ]
    try:
        names = [
            line.strip()
            for line in place.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{place} is neither a pack nor a text file with a target on each line ({error})"
        ) from error
    if names and names[0][0] in "[{":
        raise UserError(f"{place} is JSON, not a list of names: write one target on each line")
    words = {
        match[1]: match[2].replace("_", " ")
        for name in names
        if (match := WITH_WORD.fullmatch(name))
    }
    names = [match[1] if (match := WITH_WORD.fullmatch(name)) else name for name in names]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{place} names '{repeated[0]}' more than once")
    if not names:
        raise UserError(f"{place} names no targets: write one on each line")
    return [Target(name, word=words.get(name, "")) for name in names]


def named(settings: ProposeConfig, targets: Sequence[Target]) -> list[Target]:
    """Return the targets; one named by a WordNet id gets the word behind it, or where WordNet is
    given its first one.
    """
    ids = {target.name: parts(target.name) for target in targets}
    words = {name: word for name, (synset, word) in ids.items() if synset and word}
    if settings.wordnet and any(synset for synset, _ in ids.values()):
        known = read_wordnet(settings.wordnet)
        if known.version == "3.0":
            first = {name: known.lemmas.get(synset, [""])[0] for name, (synset, _) in ids.items()}
            words |= {name: word for name, word in first.items() if word}
    return [replace(target, word=words.get(target.name, target.word)) for target in targets]


def limits_of(settings: ProposeConfig, targets: Sequence[Target]) -> list[int]:
    """Return the most categories that each target gets."""
    if settings.allocation == "even":
        return even_limits(targets, settings.per_target)
    if not any(target.count for target in targets):
        raise UserError(
            "propose.allocation=tail needs the number of images of each target: give a pack, not a "
            "list of names"
        )
    return tail_weighted_limits(targets, settings.per_target)


# --- providers


def from_wordnet(
    settings: ProposeConfig,
    targets: Sequence[Target],
    limits: Sequence[int],
    out: Path,
    console: Console,
) -> Proposed:
    """Return neighbours in WordNet's tree."""
    words = read_wordnet(settings.wordnet)
    synsets = look_up(words, targets, settings.synsets, out, console)
    wordnet.check_known(words, targets, synsets)
    embeddings = read_embeddings(settings.embeddings) if settings.embeddings else None
    found = wordnet.propose(words, synsets, settings.reach, settings.rise, embeddings)
    unknown = [target.name for target, synset in zip(targets, synsets, strict=True) if not synset]
    notes = (
        [f"WordNet does not know {len(unknown)} targets ({few(unknown)}): map them with --senses"]
        if unknown
        else []
    )
    proposals = [
        of
        if synset
        else [Proposal(number, "", "wordnet", refused="WordNet does not know this target")]
        for number, (of, synset) in enumerate(zip(found, synsets, strict=True))
    ]
    return Proposed(
        [list(words.lemmas[synset]) if synset else [] for synset in synsets], proposals, notes
    )


def from_llm(
    settings: ProposeConfig,
    targets: Sequence[Target],
    limits: Sequence[int],
    out: Path,
    console: Console,
) -> Proposed:
    """Return what a language model suggests; print what it costs."""
    cache = llm.Cache(out / "llm", settings)
    prompts = llm.prompts(settings, targets, limits)
    console.print(f"about {in_words(llm.estimate(cache, prompts), settings)}", highlight=False)
    proposals: list[list[Proposal]] = [[] for _ in targets]
    failed: dict[str, str] = {}
    tokens = [0, 0]
    known = sum(cache.read(prompt) is not None for prompt in prompts)
    try:
        with rated_progress(console, "prompts/s", transient=True) as bar:
            for number, reply, spent in bar.track(
                llm.ask_all(cache, prompts), total=len(prompts), description="asking"
            ):
                tokens = [before + now for before, now in zip(tokens, spent, strict=True)]
                if isinstance(reply, llm.Failed):
                    failed[targets[number].name] = reply.reason
                    proposals[number] = [
                        Proposal(number, "", "llm", refused=f"no answer: {reply.reason}")
                    ]
                else:
                    proposals[number] = llm.to_proposals(number, reply)
    finally:  # what was spent is reported where it ends early, too
        console.print(
            f"asked: {in_words(llm.Usage(len(prompts), known, *tokens), settings)}", highlight=False
        )
    notes = (
        [
            f"no answer for {len(failed)} targets ({few(list(failed))}): "
            f"{next(iter(failed.values()))}"
        ]
        if failed
        else []
    )
    return Proposed(synonyms_of(settings, targets, out, console), proposals, notes)


def synonyms_of(
    settings: ProposeConfig, targets: Sequence[Target], out: Path, console: Console
) -> list[list[str]]:
    """Return the synonyms of each target by WordNet, where it is given to another provider."""
    if not settings.wordnet:
        return [[] for _ in targets]
    words = read_wordnet(settings.wordnet)
    synsets = look_up(words, targets, settings.synsets, out, console)
    return [list(words.lemmas.get(synset or "", [])) for synset in synsets]


def from_file(
    settings: ProposeConfig,
    targets: Sequence[Target],
    limits: Sequence[int],
    out: Path,
    console: Console,
) -> Proposed:
    """Return the rows of a CSV, the best of a target first.

    Its columns are target, category and, if wanted, query and description.
    """
    if not settings.file:
        raise UserError(
            "propose.provider=file needs propose.file, a CSV with the header target,category"
        )
    file = Path(settings.file)
    try:
        reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline=""))
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not {"target", "category"} <= set(reader.fieldnames or []) or not set(
        reader.fieldnames or []
    ) <= set(FILE_COLUMNS):
        raise UserError(
            f"{file}, line 1: the header must be target,category and, if wanted, query and "
            "description"
        )
    numbers = {target.name: number for number, target in enumerate(targets)}
    proposals: list[list[Proposal]] = [[] for _ in targets]
    for line, row in enumerate(rows, start=2):
        name, category = (row["target"] or "").strip(), (row["category"] or "").strip()
        if name not in numbers or not category:
            wrong = f"there is no target '{name}'" if category else "there is no category"
            raise UserError(f"{file}, line {line}: {wrong}")
        query, description = row.get("query") or "", row.get("description") or ""
        proposals[numbers[name]].append(
            Proposal(numbers[name], category, "file", query=query, description=description)
        )
    return Proposed(synonyms_of(settings, targets, out, console), proposals)


PROVIDERS = {"wordnet": from_wordnet, "llm": from_llm, "file": from_file}


def random_categories(
    settings: ProposeConfig,
    targets: Sequence[Target],
    synonyms: Sequence[Sequence[str]],
    categories: Sequence[Category],
    out: Path,
    console: Console,
) -> list[Category]:
    """Return as many categories, with as many owners, that have nothing to do with the targets."""
    words = read_wordnet(settings.wordnet)
    synsets = look_up(words, targets, settings.synsets, out, Console(quiet=True))
    taken = {normalised(word) for word in chain((target.name for target in targets), *synonyms)}
    pool = wordnet.pool(
        words, synsets, taken | {normalised(category.name) for category in categories}
    )
    if len(pool) < len(categories):
        raise UserError(
            f"WordNet has {len(pool):,} categories to draw from, fewer than the "
            f"{len(categories):,} of the neighbours"
        )
    return with_random_names(categories, pool, settings.seed)


def drawn(neighbour: Category, category: Category) -> Decision:
    """Return the decision for a category that was drawn in place of a neighbour."""
    first, *others = sorted(category.owners)
    description = category.description
    proposal = Proposal(
        first,
        category.name,
        "random",
        category.key,
        category.query,
        description=description,
        also=tuple(others),
    )
    return Decision(proposal, True, f"drawn at random, in the place of {neighbour.name}")


# --- what is written, and shown


def write(
    out: Path,
    targets: Sequence[Target],
    decisions: Sequence[Decision],
    categories: Sequence[Category],
) -> None:
    """Write the tables and pairs.csv.

    An auxiliary set of an earlier proposal is removed: it would not fit these pairs.

    What was retrieved stays.
    """
    shutil.rmtree(out / "auxiliary", ignore_errors=True)
    write_table(
        out / "proposals.jsonl", (decision_row(decision, targets) for decision in decisions)
    )
    write_table(
        out / "categories.jsonl", (category_row(category, targets) for category in categories)
    )
    with (
        whole_file(out / "pairs.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        pairs = csv.writer(file)
        pairs.writerow(["target", "auxiliary"])
        pairs.writerows(
            [targets[owner].name, category.name]
            for category in categories
            for owner in sorted(category.owners)
        )


def decision_row(decision: Decision, targets: Sequence[Target]) -> dict[str, Any]:
    """Return a row of proposals.jsonl."""
    row = asdict(decision.proposal)
    del row["refused"]  # it is the reason then
    also = [targets[target].name for target in decision.proposal.also]
    target = targets[decision.proposal.target].name
    return {**row, "target": target, "also": also, "kept": decision.kept, "reason": decision.reason}


def category_row(category: Category, targets: Sequence[Target]) -> dict[str, Any]:
    """Return a row of categories.jsonl."""
    return {
        **asdict(category),
        "owners": [targets[owner].name for owner in sorted(category.owners)],
    }


def show(
    targets: Sequence[Target],
    decisions: Sequence[Decision],
    categories: Sequence[Category],
    console: Console,
) -> None:
    """Print how many categories there are, and the reasons of what was dropped."""
    owned = Counter(owner for category in categories for owner in category.owners)
    median = statistics.median(owned[target] for target in range(len(targets)))
    several = sum(len(category.owners) > 1 for category in categories)
    without = sum(target not in owned for target in range(len(targets)))
    table = Table(
        "target",
        "its auxiliary classes",
        title=f"the first of {len(targets):,} targets",
        title_justify="left",
    )
    for number, target in enumerate(targets[:SHOWN]):
        names = [category.name for category in categories if number in category.owners]
        table.add_row(escape(target.name), escape(", ".join(names)) or "[yellow]none[/]")
    console.print(table)
    console.print(
        f"{len(categories):,} auxiliary classes, {several:,} of them for several targets; "
        f"{owned.total():,} pairs, "
        f"{median:g} for a target (median); {without:,} targets have none",
        highlight=False,
    )
    dropped = Counter(kind_of(decision.reason) for decision in decisions if not decision.kept)
    for reason, times in dropped.most_common():
        console.print(f"  {times:>7,} proposals dropped: {reason}", highlight=False, markup=False)


def kind_of(reason: str) -> str:
    """Return a reason without the names in it."""
    return reason.partition(" '")[0].partition(" (")[0]


def show_prompts(
    settings: ProposeConfig,
    targets: Sequence[Target],
    limits: Sequence[int],
    out: Path,
    console: Console,
) -> None:
    """Print the prompts and about what they cost."""
    if settings.provider != "llm":
        raise UserError(
            f"--dry-run shows the prompts of propose.provider=llm; {settings.provider} has none "
            "and costs nothing"
        )
    prompts = llm.prompts(settings, targets, limits)
    for target, prompt in zip(targets, prompts, strict=True):
        console.rule(escape(target.name))
        console.print(prompt, markup=False, highlight=False, soft_wrap=True)
    console.rule()
    console.print(
        f"about {in_words(llm.estimate(llm.Cache(out / 'llm', settings), prompts), settings)}",
        highlight=False,
    )


def in_words(usage: llm.Usage, settings: ProposeConfig) -> str:
    """Return a usage in words."""
    priced = settings.price_in or settings.price_out
    cost = (
        f"{usage.cost(settings):.2f} dollars"
        if priced
        else "dollars as propose.price_in and propose.price_out say"
    )
    return (
        f"{usage.prompts - usage.known:,} prompts, {usage.known:,} answered before; "
        f"{usage.tokens_in:,} tokens in, {usage.tokens_out:,} out, {cost}"
    )


def few(names: Iterable[str]) -> str:
    """Return the first few names in words."""
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
