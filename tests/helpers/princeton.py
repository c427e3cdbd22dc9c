"""A small WordNet in Princeton's format: offsets are places of bytes, as in the real files."""

from pathlib import Path

LICENCE = "  1 WordNet {version} Copyright 2006 by Princeton University.  All rights reserved.  \n"
# words, parents, whether it is an individual, gloss
SYNSETS: list[tuple[list[str], list[int], bool, str]] = [
    (["animal"], [], False, "a living organism"),
    (["bird"], [0], False, "warm-blooded egg-laying vertebrates"),
    (["crane"], [1], False, "large long-necked wading bird"),
    (["machine"], [], False, "any mechanical device"),
    (["crane", "derrick"], [3], False, "lifts and moves heavy objects"),
    (["writer"], [0], False, "writes books"),
    (["Crane", "Stephen_Crane"], [5], True, "United States writer (1871-1900)"),
    (["owl", "bird_of_Minerva"], [1], False, "nocturnal bird of prey"),
    (["barn_owl", "Tyto_alba"], [7], False, "mottled buff and white owl"),
    (["salamander"], [0], False, "amphibian that has a tail"),
    (["European_fire_salamander", "Salamandra_salamandra"], [9], False, "a kind of salamander"),
    (["spotted_salamander", "fire_salamander"], [9], False, "of central and southern Europe"),
]
FREQUENCY = {"crane": [6, 4, 2]}  # of a word, its senses, the most frequent first


def write_princeton(folder: Path, version: str = "3.0") -> list[str]:
    """Write data.noun and index.noun; return the ids of SYNSETS."""
    folder.mkdir(parents=True, exist_ok=True)
    head = LICENCE.format(version=version)
    offsets = [0] * len(SYNSETS)
    for _ in range(2):  # the second time with the places that the first time found
        text, place = head, len(head)
        for number in range(len(SYNSETS)):
            offsets[number] = place
            line = _line(number, offsets)
            text, place = text + line, place + len(line.encode())
    (folder / "data.noun").write_text(text)
    rows = [
        f"{word} n {len(senses)} 1 @ {len(senses)} 1 "
        + " ".join(f"{offsets[sense]:08d}" for sense in senses)
        for word, senses in FREQUENCY.items()
    ]
    (folder / "index.noun").write_text(head + "".join(f"{row}  \n" for row in rows))
    start = "n" if version == "3.0" else f"wn{version.replace('.', '')}-n"
    return [f"{start}{offset:08d}" for offset in offsets]


def _line(number: int, offsets: list[int]) -> str:
    words, parents, is_individual, gloss = SYNSETS[number]
    children = [other for other, (_, above, *_) in enumerate(SYNSETS) if number in above]
    pointers = [("@i" if is_individual else "@", above) for above in parents]
    pointers += [("~i" if SYNSETS[below][2] else "~", below) for below in children]
    fields = [f"{offsets[number]:08d} 05 n {len(words):02x}", *(f"{word} 0" for word in words)]
    fields.append(f"{len(pointers):03d}")
    fields += [f"{symbol} {offsets[other]:08d} n 0000" for symbol, other in pointers]
    return f"{' '.join(fields)} | {gloss}  \n"
