"""Which setting was meant by a name that is none."""

import difflib
from collections.abc import Sequence

OTHER_NAMES = {  # what other trainers call it -> ours
    "batch_size": "data.batch",
    "bs": "data.batch",
    "num_workers": "data.workers",
    "image_size": "data.size",
    "img_size": "data.size",
    "resolution": "data.size",
    "data": "data.pack",
    "dataset": "data.pack",
    "arch": "model.name",
    "backbone": "model.name",
    "model": "model.name",
    "loss": "loss.name",
    "lambda_s": "loss.silence",
    "silencing": "loss.silence",
    "smoothing": "loss.label_smoothing",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "optimizer": "optim.name",
    "optimiser": "optim.name",
    "optim": "optim.name",
    "opt": "optim.name",
    "ema_decay": "optim.ema",
    "grad_clip": "optim.clip",
    "schedule": "schedule.name",
    "scheduler": "schedule.name",
    "lr_schedule": "schedule.name",
    "warmup": "schedule.warmup_epochs",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "random_seed": "train.seed",
    "amp": "train.precision",
    "mixed_precision": "train.precision",
    "logger": "train.loggers",
    "method": "method.name",
}


def near_keys(name: str, known: Sequence[str]) -> list[str]:
    """Return the keys `section.key` that a name which is none of them may mean, likeliest first.

    A key of another section is likelier than one that is spelt alike; none where nothing is near.
    """
    name = name.replace("-", "_")
    section, _, key = name.rpartition(".")
    same = [one for one in known if one.rpartition(".")[2] == key]
    if len(same) > 1 and section:
        same = difflib.get_close_matches(name, same, n=1, cutoff=0.0)
    if same:
        return same
    if OTHER_NAMES.get(key) in known:
        return [OTHER_NAMES[key]]
    # of the section that was named, if it has any; of all where none was, or there is no such one
    own = [one for one in known if one.startswith(f"{section}.")] if section else known
    if not own:
        return difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    by_key = {one.rpartition(".")[2]: one for one in reversed(own)}
    return [by_key[one] for one in difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)]


def no_setting(name: str, known: Sequence[str], value: str = "") -> str:
    """Return the sentence that there is no such setting, with the line that works.

    value: as it was given on a command line; "": it was not.
    """
    near = near_keys(name, known)
    if not near:
        # which are those of a training, not of a curation
        lists = ": `fastlt settings` lists all" if "train.epochs" in known else ""
        return f"there is no setting '{name}'{lists}"
    several = " or ".join(f"'{one}'" for one in near)
    write = f" Write {near[0]}={value}" if value and len(near) == 1 else ""
    return f"there is no setting '{name}', did you mean {several}?{write}"
