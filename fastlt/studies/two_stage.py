"""The two-stage protocol: what a backbone is worth by a classifier trained again on top of it.

The paper judges what data do to features so: cross entropy first, then the head alone by balanced
cross entropy (arXiv 2410.15980). The second stage is that of `fastlt eval --post-hoc retrain`.
"""

import json
from pathlib import Path
from typing import Any

from fastlt.evaluation.evaluate import evaluate_post_hoc
from fastlt.evaluation.posthoc import RETRAIN
from fastlt.studies.repeated import folder_name
from fastlt.utils.files import write_text
from fastlt.utils.run_files import METRICS

SHARE = 0.2  # of the validation images, on which the weight decay is chosen
TITLE = "a new classifier"
NOTE = (
    "a new classifier: trained by balanced cross entropy on the frozen backbone, scored on the "
    "80 % of the images that its weight decay was not chosen on"
)


def with_second_stage(rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Return the rows of trainings in `out` with the figures of their second stage.

    These are kept in each RUN/retrained.json.
    """
    found = []
    for row in rows:
        figures = second_stage(out / folder_name(row["control"], row["seed"]))
        again = {f"retrained_{metric}": figures[RETRAIN][metric] for metric in METRICS}
        found.append(row | {"same_images_top1": figures["as trained"]["top1"]} | again)
    return found


def second_stage(run: Path) -> dict[str, dict[str, Any]]:
    """Return what `score` says of a run as trained and with a new classifier, on equal images."""
    kept = run / "retrained.json"
    if not kept.is_file():
        results = evaluate_post_hoc(run, [RETRAIN], None, None, SHARE, None)
        write_text(kept, json.dumps(results, indent=1) + "\n")
    return json.loads(kept.read_text(encoding="utf-8"))


def of_second_stage(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose figures are those of the second stage, for a table of them."""
    return [row | {metric: row[f"retrained_{metric}"] for metric in METRICS} for row in rows]
