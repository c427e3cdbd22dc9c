import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from typer.testing import CliRunner

from fastlt.cli import app, doctor
from fastlt.errors import UserError


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_versions_and_machine_are_reported(found):
    assert found["versions"]["Python"] == platform.python_version()
    assert found["versions"]["torch"] and found["versions"]["numpy"]
    assert found["machine"]["CPU cores"] >= 1
    assert ("GPU 0" in found["GPU"]) == torch.cuda.is_available()


def test_every_engine_is_available_or_says_what_is_in_its_way(found):
    assert {"torch", "resident", "ffcv", "dali"} <= found["engines"].keys()
    assert found["engines"]["torch"] == found["engines"]["resident"] == "available"
    assert all(found["engines"].values()) and all(found["JPEG decoder"].values())


def test_a_missing_library_comes_with_its_extra(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    libraries = doctor.optional()
    assert libraries["timm"] == "not installed: pip install fastlt[timm]"
    assert libraries["ray"] == "not installed: pip install fastlt[sweep]"
    assert "pytest" not in libraries


def test_json_and_table_say_the_same(found, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output) == found
    table = CliRunner().invoke(app, ["doctor"]).output
    assert all(section in table for section in found)
    assert found["versions"]["torch"] in table


def test_the_platform_says_what_works(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert "CPU alone" in doctor.machine()["support"]
    monkeypatch.setattr("sys.platform", "plan9")
    assert doctor.machine()["support"] == "plan9: not tried"


def test_windows_is_refused_in_a_sentence_but_for_doctor(found, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: found)
    monkeypatch.setattr("sys.platform", "win32")
    refused = CliRunner().invoke(app, ["report", "run"])
    assert isinstance(refused.exception, UserError) and "WSL 2" in str(refused.exception)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_an_installed_torch_is_not_needed_for_help():
    code = (
        "import sys, fastlt.cli; from typer.testing import CliRunner;"
        "ended = CliRunner().invoke(fastlt.cli.app, ['--help']); assert ended.exit_code == 0;"
        "print([name for name in ('torch', 'numpy', 'scipy', 'timm') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr
