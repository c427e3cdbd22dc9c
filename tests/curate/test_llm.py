"""The `llm` provider against a server that answers well, badly, slowly, or not at all."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.chat_server import categories, chat_server
from rich.console import Console

from fastlt.curate import llm
from fastlt.curate.propose import run_propose
from fastlt.curate.settings import CurateConfig
from fastlt.errors import UserError

pytest.importorskip("openai", reason="no openai here: it comes with the extra `curate`")
NAMES = ["lawn_mower", "tiger", "sofa"]
GOOD = {
    "lawn mower": ["mulching mower", "tiger"],
    "tiger": ["Bengal tiger", "liger"],
    "sofa": ["settee", "Ligers"],
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def good(name, times):
    return 200, categories(*GOOD[name])


def proposed(tmp_path, chat, *, dry_run=False, **settings):
    """What is printed, the categories, and what was decided."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    config = {"provider": "llm", "model": "m", "base_url": chat.url, "retries": 3, **settings}
    console, out = Console(record=True, width=300), tmp_path / "out"
    run_propose(
        tmp_path / "names.txt",
        out,
        CurateConfig.model_validate({"propose": config}),
        dry_run,
        console,
    )
    return console.export_text(), *(
        [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        if not dry_run
        else []
        for name in ("categories", "proposals")
    )


def test_what_is_answered_becomes_categories_and_is_not_asked_again(tmp_path):
    with chat_server(good) as chat:
        said, found, decided = proposed(tmp_path, chat, price_in=10, price_out=100)
        assert sorted(chat.asked) == ["lawn mower", "sofa", "tiger"]
        assert {category["name"]: category["owners"] for category in found} == {
            "mulching mower": ["lawn_mower"],
            "Bengal tiger": ["tiger"],
            "liger": ["tiger", "sofa"],
            "settee": ["sofa"],
        }
        assert found[0]["description"] == "a mulching mower"
        assert [row["reason"] for row in decided if not row["kept"]] == [
            "it is the target 'tiger' or a synonym of it"
        ]
        assert "about 3 prompts, 0 answered before" in said
        # 300 * 10 + 60 * 100 millionths
        assert "asked: 3 prompts, 0 answered before; 300 tokens in, 60 out, 0.01 dollars" in said
        schema = chat.bodies[0]["response_format"]["json_schema"]["schema"]
        assert (
            schema["properties"]["categories"]["type"] == "array"
            and chat.bodies[0]["temperature"] == 0.2
        )
        again, same, _ = proposed(tmp_path, chat, price_in=10, price_out=100)
        assert same == found and len(chat.asked) == 3
        assert "asked: 0 prompts, 3 answered before; 0 tokens in, 0 out, 0.00 dollars" in again
        proposed(tmp_path, chat, temperature=0.5)
        assert len(chat.asked) == 6  # another question


@pytest.mark.parametrize(
    "bad",
    [
        "this is no JSON",
        '{"categories": [{"name": "cut off',
        '{"animals": ["liger"]}',
        '{"categories": []}',
        '{"categories": [{"title": "liger"}]}',
        "",
        None,
    ],
)
def test_a_reply_of_another_form_is_asked_for_again_and_paid_for(tmp_path, bad):
    with chat_server(
        lambda name, times: (200, bad) if name == "tiger" and times < 3 else good(name, times)
    ) as chat:
        said, found, _ = proposed(tmp_path, chat)
    assert chat.asked.count("tiger") == 3 and "500 tokens in, 100 out" in said
    assert "Bengal tiger" in {category["name"] for category in found}


OTHERWISE = [
    b"<html>",
    b'{"a',
    b"[]",
    b"null",
    b'{"choices": 5}',
    b'{"choices": [null]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": [1]}}], "usage": {"prompt_tokens": null}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", OTHERWISE)
def test_an_endpoint_that_speaks_otherwise_is_no_crash(tmp_path, body):
    with chat_server(
        lambda name, times: (200, body) if name == "tiger" else good(name, times)
    ) as chat:
        said, found, _ = proposed(tmp_path, chat, retries=1)
    assert "no answer for 1 targets (tiger)" in said and len(found) >= 3


def test_a_prompt_that_is_refused_stops_no_other(tmp_path):
    with chat_server(
        lambda name, times: (400, "content policy") if name == "sofa" else good(name, times)
    ) as chat:
        said, found, _ = proposed(tmp_path, chat)
    assert (
        "no answer for 1 targets (sofa): the endpoint refuses the prompt" in said
        and "content policy" in said
        and len(found) == 3
    )


def test_json_in_a_fence_is_json(tmp_path):
    with chat_server(lambda name, times: (200, f"```json\n{categories(*GOOD[name])}\n```")) as chat:
        _, found, _ = proposed(tmp_path, chat)
    assert len(chat.asked) == 3 and len(found) == 4


def test_a_target_without_an_answer_is_named_and_the_others_go_on(tmp_path):
    with chat_server(
        lambda name, times: (200, "no idea") if name == "sofa" else good(name, times)
    ) as chat:
        said, found, _ = proposed(tmp_path, chat)
        assert "no answer for 1 targets (sofa): no reply of the form that was asked for" in said
        assert {owner for category in found for owner in category["owners"]} == {
            "lawn_mower",
            "tiger",
        }
        asked = len(chat.asked)
        proposed(tmp_path, chat)
        assert len(chat.asked) == asked  # nor is it paid for again
        Path(re.search(r"to ask again, remove (\S+\.json)", said)[1]).unlink()
        chat.answer = good
        said, found, _ = proposed(tmp_path, chat)
    assert (
        "1 prompts, 2 answered before" in said
        and len(found) == 4
        and chat.asked.count("tiger") == 1
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(tmp_path, status):
    with chat_server(
        lambda name, times: (status, "later") if times < 3 else good(name, times)
    ) as chat:
        _, found, _ = proposed(tmp_path, chat)
    assert len(found) == 4 and len(chat.asked) == 9


def test_a_slow_server_is_given_up_and_what_was_answered_is_kept(tmp_path):
    def slow(name, times):
        if name == "sofa":
            chat.hold.wait(30)
        return good(name, times)

    with chat_server(slow) as chat:
        chat.hold = threading.Event()
        try:
            with pytest.raises(
                UserError, match=r"does not answer \(APITimeoutError: .*what was answered is kept"
            ):
                proposed(tmp_path, chat, timeout=0.5, retries=0)
            assert not (tmp_path / "out/categories.jsonl").exists()
            assert len(list((tmp_path / "out/llm").glob("*.json"))) == 2
        finally:
            chat.hold.set()
        chat.answer = good
        said, _, _ = proposed(tmp_path, chat)
    assert "1 prompts, 2 answered before" in said


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with chat_server(good, seconds=0.05) as chat:
        proposed(tmp_path, chat, concurrency=1)
        assert chat.most == 1
        proposed(tmp_path, chat, concurrency=3, temperature=1)
        assert chat.most in (2, 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": ""}, "needs a model: name it with propose.model"),
        ({"base_url": ""}, "set OPENAI_API_KEY"),
        ({"prompt": "nowhere.txt"}, "cannot read the prompt nowhere.txt"),
    ],
)
def test_what_is_missing_is_named(tmp_path, settings, said):
    with chat_server(good) as chat, pytest.raises(UserError, match=said):
        proposed(tmp_path, chat, **settings)
    assert not chat.asked


def test_a_refused_key_ends_it(tmp_path):
    with (
        chat_server(lambda *_: (401, "wrong key")) as chat,
        pytest.raises(UserError, match=r"AuthenticationError: .*wrong key"),
    ):
        proposed(tmp_path, chat)
    with pytest.raises(UserError, match="APIConnectionError"):
        proposed(tmp_path, chat, retries=0)  # it is gone


def test_the_end_does_not_wait_for_slow_answers_and_tells_what_was_spent(tmp_path):
    begun, over = threading.Event(), threading.Event()

    def answer(name, times):
        if name == "tiger":
            begun.wait(60)
            return 401, "wrong key"
        begun.set()
        over.wait(100)
        return 200, categories(*GOOD[name])

    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "curate",
        "propose",
        str(tmp_path / "names.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    with chat_server(answer) as chat:
        settings = [
            "propose.provider=llm",
            "propose.model=m",
            f"propose.base_url={chat.url}",
            "propose.retries=0",
        ]
        try:
            ended = subprocess.run(
                [*command, *settings], capture_output=True, text=True, timeout=80
            )
        finally:
            over.set()
    assert ended.returncode == 2 and "wrong key" in ended.stderr
    assert "asked: 3 prompts, 0 answered before; 0 tokens in" in " ".join(ended.stdout.split())


def test_targets_that_are_wordnet_ids_are_asked_for_by_their_word(tmp_path, shared_data):
    (tmp_path / "ids.txt").write_text("n02129604\nn02129165\n")
    console = Console(record=True, width=300)
    settings = {"provider": "llm", "model": "m", "wordnet": str(shared_data / "labels")}
    config = CurateConfig.model_validate({"propose": settings})
    run_propose(tmp_path / "ids.txt", tmp_path / "out", config, True, console)
    said = console.export_text()
    assert 'For the class "tiger"' in said and "in the data set already: lion." in said


def test_the_prompt_is_a_file_that_may_be_changed(tmp_path):
    (tmp_path / "mine.txt").write_text(
        'For the class "$target": $count like it, not $others; for $$5'
    )
    with chat_server(good) as chat:
        proposed(tmp_path, chat, prompt=str(tmp_path / "mine.txt"), per_target=2)
        asked = {body["messages"][0]["content"] for body in chat.bodies}
        assert (
            f'For the class "lawn mower": {2 + llm.SPARE} like it, not tiger, sofa; for $5' in asked
        )
        (tmp_path / "mine.txt").write_text("$klass")
        with pytest.raises(
            UserError, match=r"mine\.txt: 'klass' is not one of \$target, \$count, \$others"
        ):
            proposed(tmp_path, chat, prompt=str(tmp_path / "mine.txt"))


def test_a_dry_run_prints_the_prompts_and_asks_nobody(tmp_path):
    with chat_server(good) as chat:
        said, *_ = proposed(tmp_path, chat, dry_run=True, price_in=1000)
    assert not chat.asked and not (tmp_path / "out").exists()
    assert said.count("You help to build") == 3 and "about 3 prompts" in said and "dollars" in said


def test_the_command(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "curate",
        "propose",
        str(tmp_path / "names.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    with chat_server(good) as chat:
        settings = ["propose.provider=llm", "propose.model=m", f"propose.base_url={chat.url}"]
        ended = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "4 auxiliary classes, 1 of them for several targets; 5 pairs" in " ".join(
        ended.stdout.split()
    )
    (tmp_path / "mine.csv").write_text("target,category\ntiger,\n")
    wrong = subprocess.run(
        [*command, "propose.provider=file", f"propose.file={tmp_path}/mine.csv"],
        capture_output=True,
        text=True,
    )
    assert (
        wrong.returncode == 2
        and "mine.csv, line 2: there is no category" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


@pytest.mark.parametrize("taken", ["json_object", "none"])
def test_an_endpoint_that_takes_no_schema_is_asked_without(tmp_path, taken):
    def answer(name, times):
        form = chat.bodies[-1].get("response_format", {}).get("type", "none")
        return (
            good(name, times)
            if form == taken
            else (400, f"response_format {form} is not supported")
        )

    with chat_server(answer) as chat:
        _, found, _ = proposed(tmp_path, chat, concurrency=1)
    assert len(found) == 4 and len(chat.asked) == 3 + {"json_object": 1, "none": 2}[taken]


@pytest.mark.parametrize(
    "around",
    [
        "<think>{no}</think>\n%s",
        "Here it is:\n```json\n%s\n```\nAnything else?",
        "```\n%s```",
        "Sure. %s Done.",
    ],
)
def test_what_a_model_says_around_its_json_does_no_harm(tmp_path, around):
    with chat_server(lambda name, _: (200, around % categories(*GOOD[name]))) as chat:
        _, found, _ = proposed(tmp_path, chat)
    assert len(found) == 4 and len(chat.asked) == 3


def test_a_damaged_category_is_left_out_and_names_are_on_one_line(tmp_path):
    def answer(name, times):
        reply = json.loads(categories(*GOOD[name]))
        reply["categories"] += [{"name": ""}, {"nome": "x"}, {"name": f"{name}\tkin\n"}]
        return 200, json.dumps(reply)

    with chat_server(answer) as chat:
        _, found, _ = proposed(tmp_path, chat)
    assert {category["name"] for category in found} >= {
        "liger",
        "settee",
        "lawn mower kin",
    } and len(chat.asked) == 3


def test_a_target_without_an_answer_has_a_row_that_says_so(tmp_path):
    with chat_server(
        lambda name, times: good(name, times) if name != "tiger" else (400, "no such topic")
    ) as chat:
        _, _, decided = proposed(tmp_path, chat)
    (row,) = [row for row in decided if row["target"] == "tiger"]
    assert not row["kept"] and "no such topic" in row["reason"]


def test_the_control_is_kept_with_the_settings(tmp_path, shared_data):
    (tmp_path / "names.txt").write_text("tiger\nsofa\n")
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "curate",
        "propose",
        str(tmp_path / "names.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    for more in (["--control", "random", f"propose.wordnet={shared_data / 'labels'}"], []):
        ended = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        rows = [
            json.loads(line) for line in (tmp_path / "out/proposals.jsonl").read_text().splitlines()
        ]
        kept = [row for row in rows if row["kept"]]
        assert kept and all(row["reason"].startswith("drawn at random") for row in kept)
        assert any(
            row["reason"] == "the random control has another category in its place" for row in rows
        )
    ended = subprocess.run(
        [*command, "propose.wordnet="], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2 and "the random control is drawn from WordNet" in ended.stderr


def test_ids_with_words_are_ids_and_json_is_no_list(tmp_path):
    from fastlt.curate.propose import read_targets

    (tmp_path / "ids.txt").write_text("n02119789 red_fox\nn02100735, English setter\n")
    assert [(t.name, t.word) for t in read_targets(tmp_path / "ids.txt")] == [
        ("n02119789", "red fox"),
        ("n02100735", "English setter"),
    ]
    (tmp_path / "index.json").write_text('{"0": ["n01440764", "tench"]}')
    with pytest.raises(UserError, match="is JSON, not a list of names"):
        read_targets(tmp_path / "index.json")
