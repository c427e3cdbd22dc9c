"""What targets are taken for: ids, names, several senses."""

import csv
import io
from pathlib import Path

import pytest
from helpers.princeton import write_princeton
from rich.console import Console
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.curate import senses as senses_module
from fastlt.curate.proposals import Target
from fastlt.curate.propose import run_propose
from fastlt.curate.senses import Sense, by_id, look_up, parts, read_senses, spellings
from fastlt.curate.settings import CurateConfig
from fastlt.errors import UserError
from fastlt.utils.wordnet import WordNet, read_wordnet

OF_DEBIAN = Path("/usr/share/wordnet")


@pytest.fixture
def ids(tmp_path) -> list[str]:
    return write_princeton(tmp_path / "wordnet")


@pytest.fixture
def words(tmp_path, ids) -> WordNet:
    return read_wordnet(str(tmp_path / "wordnet"))


def found(words: WordNet, out: Path, *names: str, option: str = "", shown=None):
    console = Console(file=shown or io.StringIO(), width=160)
    return look_up(words, [Target(name) for name in names], option, out, console)


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "senses.csv").read_text().splitlines()))


def test_princetons_files(tmp_path, words, ids):
    assert words.version == "3.0" and len(words.lemmas) == len(ids)
    assert words.lemmas[ids[10]] == ["European fire salamander", "Salamandra salamandra"]
    assert words.parents[ids[8]] == [ids[7]] and words.definitions[ids[7]].startswith("nocturnal")
    assert words.individuals == {ids[6]}
    data = (tmp_path / "wordnet/data.noun").read_bytes()
    assert data[int(ids[7][1:]) :].startswith(ids[7][1:].encode())  # offsets are places
    assert read_wordnet(str(tmp_path / "wordnet/data.noun")).lemmas == words.lemmas


@pytest.mark.parametrize("line", ["no synset at all\n", "12345678 05 n zz owl 0 000 | x\n", "1\n"])
def test_damaged_files_are_named_by_line(tmp_path, ids, line):
    with (tmp_path / "wordnet/data.noun").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=rf"data\.noun, line {len(ids) + 2}: it is no synset"):
        read_wordnet(str(tmp_path / "wordnet"))


@pytest.mark.parametrize(
    "text", ["", "<a>", "<LexicalResource></LexicalResource>", "<?xml version='1.0'?><x/>"]
)
def test_other_xml_is_refused(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml"):
        read_wordnet(str(tmp_path / "a.xml"))
    (tmp_path / "a.xml.gz").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml\.gz"):
        read_wordnet(str(tmp_path / "a.xml.gz"))


def test_class_folders_as_people_name_them(tmp_path, words, ids):
    names = {
        ids[7]: ids[7],
        f"{ids[10]}_European_fire_salamander": ids[10],
        "Salamandra_salamandra": ids[10],
        "European fire-salamanders": ids[10],
        "Tyto_alba_guttata": ids[8],
        "001.Barn_owl": ids[8],
        "crane (bird)": ids[2],
        "crane_machine": ids[4],
        "unicorn": None,
    }
    shown = io.StringIO()
    assert found(words, tmp_path / "out", *names, shown=shown) == list(names.values())
    by = {row["target"]: row["by"] for row in rows_of(tmp_path / "out")}
    assert by == {
        ids[7]: "id",
        f"{ids[10]}_European_fire_salamander": "id",
        "Salamandra_salamandra": "name",
        "European fire-salamanders": "name",
        "Tyto_alba_guttata": "species",
        "001.Barn_owl": "name without its number",
        "crane (bird)": "name",
        "crane_machine": "name",
        "unicorn": "unknown",
    }
    assert "Tyto_alba_guttata" in shown.getvalue() and "unicorn" not in shown.getvalue()


def test_an_id_that_is_called_otherwise_is_told(words, ids):
    assert by_id(words, ids[7], "owl") == Sense(ids[7], "id")
    assert by_id(words, ids[7], "eagle").by == "id, which WordNet does not call 'eagle'"
    assert by_id(words, "n99999999", "owl").synset is None
    assert parts("n01629819-x y") == ("n01629819", "x y") and parts("owl") == ("", "owl")
    assert spellings("Canis lupus") == [("Canis lupus", "name")]


def test_ids_of_3_0_are_not_taken_for_those_of_another_version(tmp_path):
    ids = write_princeton(tmp_path / "newer", "3.1")
    words = read_wordnet(str(tmp_path / "newer"))
    assert all(one.startswith("wn31-n") for one in words.lemmas)
    of_imagenet = ids[7].removeprefix("wn31-")  # stands for something else there
    with pytest.raises(UserError, match=r"is an id of WordNet 3\.0, but this WordNet is 3\.1"):
        found(words, tmp_path / "out", of_imagenet)
    # by its name, whatever stands at the place of the id
    assert found(words, tmp_path / "out", f"{of_imagenet}_barn_owl") == [ids[8]]
    table = tmp_path / "mine.csv"
    table.write_text(f"target,synset\nowl,{of_imagenet}\n")
    with pytest.raises(UserError, match="this WordNet has no synset"):
        found(words, tmp_path / "out", "owl", option=str(table))


def test_an_index_of_another_wordnet_is_refused(tmp_path, ids):
    index = tmp_path / "wordnet/index.noun"
    index.write_text(index.read_text() + "owl n 1 1 @ 1 1 12345678  \n")
    with pytest.raises(UserError, match=r"index\.noun, line 3: it names synsets that data\.noun"):
        read_wordnet(str(tmp_path / "wordnet"))


def test_several_senses_are_never_guessed(tmp_path, words, ids):
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"1 targets have several senses, such as 'crane': .*senses"
    ):
        found(words, out, "crane", "owl")
    rows = [row for row in rows_of(out) if row["target"] == "crane"]
    assert [row["synset"] for row in rows] == [ids[4], ids[2]]  # the writer is no class
    assert rows[0]["gloss"] == "lifts and moves heavy objects" and rows[1]["parent"] == "bird"
    # the user keeps one line, and runs it again
    text = "".join(
        line
        for line in (out / "senses.csv").read_text().splitlines(keepends=True)
        if ids[4] not in line
    )
    (out / "senses.csv").write_text(text)
    assert found(words, out, "crane", "owl") == [ids[2], ids[7]]
    assert found(words, out, "crane", "owl") == [ids[2], ids[7]]


def test_the_first_sense_is_taken_and_told_where_that_is_asked_for(tmp_path, words, ids):
    shown = io.StringIO()
    assert found(words, tmp_path / "out", "crane", option="first", shown=shown) == [ids[4]]
    assert "first of 2 senses" in shown.getvalue() and "lifts and moves" in shown.getvalue()


def test_a_table_settles_them(tmp_path, words, ids):
    table = tmp_path / "mine.csv"
    table.write_text(f"target,synset\ncrane,{ids[2]}\nowl,\n")
    assert found(words, tmp_path / "out", "crane", "owl", option=str(table)) == [ids[2], None]
    for text, said in (
        (f"target,synset\nkrane,{ids[2]}\n", "line 2: there is no target 'krane', did you mean"),
        ("target,synset\ncrane,owl.n.01\n", r"line 2: this WordNet has no synset 'owl\.n\.01'"),
        (f"target,synset\ncrane,{ids[2]}\ncrane,{ids[4]}\n", "'crane' has several lines: keep one"),
        ("target\ncrane\n", "has no column 'synset'"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=said):
            read_senses(table, words, [Target("crane")])


def test_in_a_terminal_the_user_is_asked(tmp_path, words, ids, monkeypatch):
    monkeypatch.setattr(senses_module, "is_interactive", lambda console: True)
    for answer, wanted in (("2", ids[2]), ("0", None), ("9\n1", ids[4])):
        out, shown = tmp_path / answer[0], io.StringIO()
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
        assert found(words, out, "crane", "owl", shown=shown) == [wanted, ids[7]]
        assert "crane has 2 senses" in shown.getvalue()
        assert "large long-necked wading bird" in shown.getvalue()
        assert found(words, out, "crane", "owl") == [wanted, ids[7]]  # it is not asked again


def test_the_command_goes_on_from_the_table(tmp_path, ids):
    (tmp_path / "names.txt").write_text("crane\nspotted salamander\n")
    base = ["curate", "propose", str(tmp_path / "names.txt"), "--out", str(tmp_path / "out")]
    base.append(f"propose.wordnet={tmp_path / 'wordnet'}")
    stopped = CliRunner().invoke(app, base)
    assert stopped.exit_code != 0 and not (tmp_path / "out/categories.jsonl").exists()
    done = CliRunner().invoke(app, [*base, "--senses", "first"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/categories.jsonl").is_file()


@pytest.mark.skipif(not OF_DEBIAN.is_dir(), reason="Debian's wordnet-base is not installed")
def test_the_files_of_debian(tmp_path):
    (tmp_path / "names.txt").write_text("n01629819_European_fire_salamander\nbarn owl\n")
    config = CurateConfig.model_validate({"propose": {"wordnet": str(OF_DEBIAN)}})
    run_propose(
        tmp_path / "names.txt", tmp_path / "out", config, False, Console(file=io.StringIO())
    )
    text = (tmp_path / "out/categories.jsonl").read_text()
    assert "salamander" in text and "owl" in text
