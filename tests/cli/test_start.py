"""What is answered without importing torch, whose import takes seconds."""

import subprocess
import sys

import pytest

SPY = """
import sys
from fastlt.__main__ import main
sys.argv = ["fastlt", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "tensorboard", "matplotlib", "scipy"} & sys.modules.keys()
    print("imported:", *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "Usage"),
        (["train", "--help"], "Usage"),
        (["eval", "--help"], "Usage"),
        (["settings", "--help"], "Usage"),
        (["train", "dmeo", "--data", "nowhere", "--out", "run"], "no recipe 'dmeo'"),
        (["train", "demo", "--data", "nowhere", "--out", "run"], "there is no pack at"),
        (["train", "demo", "--data", "x", "--out", "run", "--epochs", "2"], "no option --epochs"),
        (["train", "demo", "--data", "x", "--out", "run", "train.lr=1"], "no setting 'train.lr'"),
        (["train", "demo", "--data", "x", "--out", "run", "optim.lr=-1"], "optim.lr = -1"),
        (["train", "demo", "--data", "x", "--out", "run", "loss.gama=1"], "'loss.gamma'"),
        (["train", "demo", "--data", "x", "--out", "run", "--method", "kd"], "no method 'kd'"),
        (["eval", "nowhere"], "there is no run at nowhere"),
        (["export", "nowhere", "--to", "model.onnx"], "there is no run at nowhere"),
    ],
)
def test_torch_is_not_imported(arguments, said, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", SPY, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert said in " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == (0 if "--help" in arguments else 2)
    assert ended.stderr.splitlines()[-1].strip() == "imported:"
    assert not list(tmp_path.iterdir())


def test_nor_for_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    ended = subprocess.run(
        [sys.executable, "-c", SPY, "eval", "photos"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert ended.returncode == 2 and "is not a run" in ended.stderr
    assert ended.stderr.splitlines()[-1].strip() == "imported:"
