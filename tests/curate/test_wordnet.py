"""The tree of a few synsets, and the real one on the names of ImageNet and CIFAR-100."""

import csv
import gzip
import json
import statistics
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from fastlt.curate.proposals import Target
from fastlt.curate.propose import run_propose
from fastlt.curate.settings import CurateConfig
from fastlt.curate.wordnet import check_known, pool, propose, within
from fastlt.errors import UserError
from fastlt.utils.embeddings import Embeddings, read_embeddings
from fastlt.utils.names import normalised
from fastlt.utils.wordnet import find_synsets, read_tables, read_wordnet

#          animal 0
#        /          \
#      bird 1       cat 2
#     /    \        /    \
# crane 3  owl 4  tabby 5  lynx 6      machine 7 - crane 8
#            |              |
#       barn owl 9      bobcat 10 (also of a bird, as a joke)
ID = [f"n{i:08d}" for i in range(11)]
NAMES = [
    "animal",
    "bird",
    "cat",
    "crane",
    "owl",
    "tabby",
    "lynx, catamount",
    "machine",
    "crane",
    "barn owl",
    "bobcat",
]
EDGES = [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6), (7, 8), (4, 9), (6, 10), (1, 10)]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "wordnet"
    place.mkdir()
    (place / "wordnet.parent-child.txt").write_text("".join(f"{ID[a]} {ID[b]}\n" for a, b in EDGES))
    (place / "synset_to_lemma.txt").write_text(
        "".join(f"{ID[i]}\t{name}\n" for i, name in enumerate(NAMES))
    )
    (place / "synset_to_definition.txt").write_text(f"{ID[4]}\tnocturnal bird of prey\n")
    return place


@pytest.fixture
def small(folder):
    return read_tables(folder)


def names_of(proposals, kept=True):
    return [p.name for p in proposals if kept == (not p.refused)]


def test_distances_are_the_shortest_and_rise_bounds_the_way_up(small):
    assert within(small, ID[3], 4, 2) == {
        ID[3]: (0, 0),
        ID[1]: (1, 1),
        ID[4]: (2, 1),
        ID[10]: (2, 1),
        ID[9]: (3, 1),
        ID[0]: (2, 2),
        ID[2]: (3, 2),
        ID[5]: (4, 2),
        ID[6]: (4, 2),
    }
    assert set(within(small, ID[3], 4, 1)) == {ID[i] for i in (3, 1, 4, 10, 9)}
    assert set(within(small, ID[2], 1, 0)) == {ID[i] for i in (2, 5, 6)}


def test_neighbours_are_hyponyms_then_siblings_never_hypernyms(small):
    owl, tabby = propose(small, [ID[4], ID[5]], 4, 2, None)
    assert names_of(owl) == ["barn owl", "crane", "bobcat", "lynx"]
    assert [(p.name, p.refused) for p in owl if p.refused] == [
        ("bird", "it contains the target 'owl'"),
        ("animal", "it contains the target 'tabby'"),
        ("cat", "it contains the target 'tabby'"),
    ]
    assert names_of(tabby) == ["lynx", "bobcat", "crane"]
    assert owl[0].description == "" and [p.description for p in tabby if p.name == "owl"] == []


def test_a_hyponym_of_another_target_belongs_to_that_too(small):
    crane, _ = propose(small, [ID[3], ID[4]], 4, 2, None)
    assert next(p for p in crane if p.name == "barn owl").also == (1,)


def test_what_is_as_near_is_ranked_by_likeness(small):
    vectors = {"owl": [1.0, 0.0], "crane": [0.6, 0.8], "bobcat": [0.8, 0.6]}
    likeness = Embeddings({name: np.array(vector) for name, vector in vectors.items()})
    (owl,) = propose(small, [ID[4]], 4, 2, likeness)
    assert names_of(owl)[:3] == ["barn owl", "bobcat", "crane"]
    assert [p.similarity for p in owl if p.name in ("bobcat", "lynx")] == [0.8, None]


def test_names_are_found_by_their_first_meaning(small):
    assert (
        small.find("Cranes") == ID[3]
        and small.find(ID[8]) == ID[8]
        and small.find("catamount") == ID[6]
    )
    assert small.find("owl_bird") == ID[4]  # as an owl, which is a bird
    assert small.find("owl machine") is None and small.find("n99999999") is None
    assert (
        small.query(ID[3]) == "crane bird"
        and small.query(ID[8]) == "crane machine"
        and small.query(ID[4]) == "owl"
    )


def test_where_no_target_is_known_that_is_an_error(small):
    with pytest.raises(
        UserError, match="knows none of the targets, not even 'oowl', did you mean 'owl'"
    ):
        check_known(small, [Target("oowl")], find_synsets(small, ["oowl"]))


def test_a_random_pool_has_neither_targets_nor_what_is_below_them(small):
    assert [category.name for category in pool(small, [ID[2]], {"cat"})] == ["crane", "barn owl"]


def test_damaged_tables_are_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="there is no WordNet at"):
        read_wordnet(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no file named like \*synset\*lemma\*"):
        read_wordnet(str(empty))
    (folder / "wordnet.parent-child.txt").write_text(f"{ID[0]} {ID[1]}\nanimal cat\n")
    with pytest.raises(
        UserError, match=r"parent-child.txt, line 2: 'animal cat' does not begin with a WordNet id"
    ):
        read_wordnet(str(folder))
    with pytest.raises(UserError, match=r"set propose\.wordnet to a folder"):
        read_wordnet("")


LMF = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.0.dtd">
<LexicalResource xmlns:dc="http://purl.org/dc/elements/1.1/">
<Lexicon id="tiny" label="tiny" language="en" email="a@example.org" license="none" version="1">
{entries}{synsets}</Lexicon></LexicalResource>
"""


def test_a_lexicon_of_the_library_wn(tmp_path, small):
    wn = pytest.importorskip("wn", reason="no wn here: it comes with the extra `curate`")
    entries = "".join(
        f'<LexicalEntry id="w{i}-{j}"><Lemma writtenForm="{word}" partOfSpeech="n"/>'
        f'<Sense id="s{i}-{j}" synset="tiny-{ID[i][1:]}-n"/></LexicalEntry>\n'
        for i, words in enumerate(NAMES)
        for j, word in enumerate(words.split(", "))
    )
    up = {
        i: "".join(
            f'<SynsetRelation relType="hypernym" target="tiny-{ID[a][1:]}-n"/>'
            for a, b in EDGES
            if b == i
        )
        for i in range(11)
    }
    synsets = "".join(
        f'<Synset id="tiny-{ID[i][1:]}-n" ili="" partOfSpeech="n"><Definition>what {name} '
        f"is</Definition>{up[i]}</Synset>\n"
        for i, name in enumerate(NAMES)
    )
    (tmp_path / "tiny.xml").write_text(LMF.format(entries=entries, synsets=synsets))
    wn.config.data_directory = tmp_path / "data"
    wn.add(tmp_path / "tiny.xml", progress_handler=None)
    found = read_wordnet("wn:tiny:1")
    of_file = read_wordnet(str(tmp_path / "tiny.xml"))
    packed = tmp_path / "tiny.xml.gz"
    packed.write_bytes(gzip.compress((tmp_path / "tiny.xml").read_bytes()))
    # ids of other lexicons than Princeton's 3.0 are not ImageNet's
    own = {one: f"tiny-{one[1:]}-n" for one in ID}
    for read in (found, of_file, read_wordnet(str(packed))):
        assert {key: list(words) for key, words in read.lemmas.items()} == {
            own[key]: list(words) for key, words in small.lemmas.items()
        }
        assert {key: set(up) for key, up in read.parents.items() if up} == {
            own[key]: {own[of] for of in up} for key, up in small.parents.items()
        }
        assert read.definitions[own[ID[9]]] == "what barn owl is" and read.version != "3.0"
    with pytest.raises(UserError, match=r"wn has no lexicon omw-en:1\.4"):
        read_wordnet("wn:omw-en:1.4")


def test_embeddings_are_read_by_name(tmp_path):
    np.savez(
        tmp_path / "e.npz", names=["lawn_mower", "owl"], glove=np.eye(2) * 3, other=np.ones((2, 3))
    )
    found = read_embeddings(f"{tmp_path}/e.npz:glove")
    assert found.similarity(["lawn mower"], ["Owls"]) == 0 and found.similarity(
        ["owl"], ["x", "owl"]
    ) == pytest.approx(1)
    assert found.similarity(["owl"], ["nothing"]) is None
    for place, said in (
        (f"{tmp_path}/e.npz", "one of glove, other"),
        (f"{tmp_path}/no.npz", "cannot read embeddings"),
    ):
        with pytest.raises(UserError, match=said):
            read_embeddings(place)
    np.savez(tmp_path / "f.npz", names=["a"], v=np.ones((2, 3)))
    with pytest.raises(UserError, match=r"1 names do not go with vectors of shape \(2, 3\)"):
        read_embeddings(f"{tmp_path}/f.npz")


# --- the real one


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def real(shared_data):
    return read_tables(shared_data / "labels")


@pytest.mark.parametrize(
    "control",
    [pytest.param(False, id="neighbours"), pytest.param(True, id="random")],
)
@pytest.mark.slow
def test_no_neighbour_of_imagenets_classes_is_a_target(shared_data, real, tmp_path, control):
    labels = shared_data / "labels"
    ids = (labels / "imagenet/imagenet_synsets.txt").read_text().split()
    kind = "random" if control else "neighbours"
    config = CurateConfig.model_validate({"propose": {"wordnet": str(labels), "control": kind}})
    run_propose(
        labels / "imagenet/imagenet_synsets.txt", tmp_path, config, False, Console(quiet=True)
    )
    categories = read(tmp_path / "categories.jsonl")
    words = {normalised(word) for synset in ids for word in real.lemmas[synset]}
    assert not words.intersection(normalised(category["name"]) for category in categories)
    assert not {category["key"] for category in categories}.intersection(ids)
    above = {key for synset in ids for key in real.above(synset)}
    assert not above.intersection(category["key"] for category in categories)
    # Of the paper's release: 5,012 auxiliary classes, 6,851 pairs, 8 for a target, 1,375 with
    # several owners.
    pairs = [(owner, category["name"]) for category in categories for owner in category["owners"]]
    per_target = Counter(owner for owner, _ in pairs)
    assert 3_000 < len(categories) < 6_000 and 6_000 < len(pairs) < 9_000
    assert statistics.median(per_target[synset] for synset in ids) == 8
    assert sum(len(category["owners"]) > 1 for category in categories) > 1_000
    assert sum(not per_target[synset] for synset in ids) < 20
    decided = [row for row in read(tmp_path / "proposals.jsonl") if row["kept"]]
    assert {row["name"] for row in decided} == {category["name"] for category in categories}
    if not control:
        first = {normalised(real.lemmas[synset][0]) for synset in ids}
        assert first.isdisjoint(
            normalised(word) for category in categories for word in real.lemmas[category["key"]]
        )
    if control:
        assert all(row["reason"].startswith("drawn at random, in the place of ") for row in decided)
        below = {synset for synset in real.lemmas if set(real.above(synset)).intersection(ids)}
        assert not below.intersection(category["key"] for category in categories)
    written = list(csv.reader((tmp_path / "pairs.csv").open()))
    assert written[0] == ["target", "auxiliary"] and [tuple(row) for row in written[1:]] == pairs


def test_cifars_names_get_neighbours(shared_data, real, tmp_path):
    labels = shared_data / "labels"
    names = [
        line.split()[1]
        for line in (labels / "cifar100/cvjena_class_names.txt").read_text().splitlines()
    ][:100]
    (tmp_path / "names.txt").write_text("\n".join(names))
    settings = {
        "wordnet": str(labels),
        "embeddings": f"{labels}/cifar100/class_embeddings.npz:glove",
        "synsets": "first",
    }
    console = Console(record=True, width=200)
    run_propose(
        tmp_path / "names.txt",
        tmp_path,
        CurateConfig.model_validate({"propose": settings}),
        False,
        console,
    )
    assert (
        "WordNet does not know 4 targets (aquarium_fish, dinosaur, forest, sea)"
        in console.export_text()
    )
    categories = read(tmp_path / "categories.jsonl")
    per_target = Counter(owner for category in categories for owner in category["owners"])
    assert {name for name in names if not per_target[name]} == {
        "aquarium_fish",
        "dinosaur",
        "forest",
        "sea",
    }
    assert {normalised(name) for name in names}.isdisjoint(
        normalised(category["name"]) for category in categories
    )
    assert "alligator" in {
        category["name"] for category in categories if "crocodile" in category["owners"]
    }
    decided = read(tmp_path / "proposals.jsonl")
    assert all(row["kept"] != bool(row["reason"]) for row in decided)
    assert {(row["target"], row["name"]) for row in decided if row["kept"]} <= {
        (owner, category["name"]) for category in categories for owner in category["owners"]
    }
