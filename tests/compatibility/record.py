"""Record what must stay the same between two versions of fastlt, by its command line alone.

usage: python tests/compatibility/record.py FOLDER > record.json

Runs whichever fastlt is importable, on two threads of a CPU, in FOLDER, which must not exist.
Prints a JSON object: names of cases to digests and figures. `compare.py` beside this file calls it
for two checkouts and says where they differ.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

COUNTS = {
    "target": {"a": 40, "b": 20, "c": 10, "d": 4},
    "auxiliary": {"x": 12, "y": 9, "z": 15},
    "val": {"a": 6, "b": 6, "c": 6, "d": 6},
}
PAIRS = (("a", "x"), ("b", "x"), ("b", "y"), ("d", "z"))
SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "data.workers=0",
    "train.device=cpu",
    "train.threads=2",
    "train.epochs=3",
    "train.eval_every=3",
    "schedule.name=cosine",
    "schedule.warmup_epochs=0",
]
VIT = ["model.name=test_vit", "data.size=32", "optim.layer_decay=0.75", "optim.ema=0.9"]
VIT += ["optim.name=adamw", "optim.nesterov=false", "optim.lr=0.001"]
RUNS: dict[str, list[str]] = {
    "sgd-silenced": ["cifar100-siblings", *SMALL],
    "adamw-ema-layer-decay": ["cifar100-siblings", *SMALL, *VIT],
    "ldam-drw": ["cifar100-lt", "--method", "ldam-drw", *SMALL, "optim.momentum=0.9"],
    "crt": ["cifar100-siblings", "--method", "crt", "--start", "sgd-silenced", *SMALL],
    "mixup": ["cifar100-siblings", *SMALL, "augment.mixup=0.5"],
    "compiled": ["cifar100-siblings", *SMALL, "train.compile=on"],
    "two-ranks": ["cifar100-siblings", "--nproc", "2", *SMALL],
}
SPLITS = {"target": 0, "auxiliary": 1, "val": 2}


def write_images(root: Path) -> None:
    """Write 16-pixel images of a colour per class, as PNG and JPEG in turn, and pairs.csv."""
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            rng = np.random.default_rng([SPLITS[split], ord(name)])
            colour = np.random.default_rng(ord(name)).integers(100, 156, 3)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(
                    root / split / name / f"{i:03}.{'jpg' if i % 2 else 'png'}"
                )
    (root / "pairs.csv").write_text("target,auxiliary\n" + "".join(f"{t},{a}\n" for t, a in PAIRS))


def fastlt(*arguments: str, at: Path) -> None:
    """Run a command in the folder `at`; its output goes to this process's error stream."""
    subprocess.run(
        [sys.executable, "-m", "fastlt", *arguments], check=True, cwd=at, stdout=sys.stderr
    )


def digest_of_pack(pack: Path) -> dict[str, str]:
    """Return the sha256 of each file of a pack; of the manifest without the time of its making."""
    digests = {}
    for path in sorted(path for path in pack.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            manifest = {
                key: value
                for key, value in json.loads(data).items()
                if key in ("counts", "files", "skipped")
            }
            data = json.dumps(manifest, sort_keys=True).encode()
        digests[str(path.relative_to(pack))] = hashlib.sha256(data).hexdigest()
    return digests


def digest_of_tensors(path: Path) -> str:
    """Return the sha256 of names, dtypes, shapes and values of a safetensors file."""
    digest = hashlib.sha256()
    with safe_open(path, "np") as file:
        for name in sorted(file.keys()):
            values = file.get_tensor(name)
            digest.update(
                f"{name} {values.dtype} {values.shape}".encode()
                + np.ascontiguousarray(values).tobytes()
            )
    return digest.hexdigest()


def digest_of_run(run: Path) -> dict[str, str]:
    """Return the digests of the model and of the newest checkpoint, and the figures that tell of no
    time.
    """
    newest = max((run / "checkpoints").iterdir())
    files = [run / "model.safetensors", *sorted(newest.glob("*.safetensors"))]
    digests = {str(path.relative_to(run)): digest_of_tensors(path) for path in files}
    result = json.loads((run / "result.json").read_text())
    figures = {
        key: result[key]
        for key in ("top1", "many", "medium", "few", "per_class", "best", "epochs", "confusion")
    }
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return digests | {"figures": json.dumps(figures), "losses": json.dumps(losses)}


def record(folder: Path) -> dict[str, dict[str, str]]:
    """Return the digests of every case, made in `folder`."""
    folder.mkdir(parents=True)
    write_images(folder / "images")
    folders = [part for split in COUNTS for part in (f"--{split}", f"images/{split}")]
    fastlt(
        "pack",
        *folders,
        "--pairs",
        "images/pairs.csv",
        "--out",
        "pack",
        "--workers",
        "1",
        at=folder,
    )
    found = {"pack": digest_of_pack(folder / "pack")}
    for name, arguments in RUNS.items():
        fastlt("train", *arguments, "--data", "pack", "--out", name, at=folder)
        found[name] = digest_of_run(folder / name)
        fastlt("eval", name, "--json", f"{name}.json", at=folder)
        figures = json.loads((folder / f"{name}.json").read_text())
        found[f"eval {name}"] = {
            key: json.dumps(value) for key, value in figures.items() if key != "seconds"
        }
    return found


if __name__ == "__main__":
    json.dump(record(Path(sys.argv[1])), sys.stdout, indent=1)
