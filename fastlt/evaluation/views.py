"""`fastlt eval --tta`: figures of test-time ensembling, of several views of every image."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.errors import DataError
from fastlt.evaluation.evaluate import opened
from fastlt.evaluation.metrics import Predictions, confusions, score
from fastlt.evaluation.predict import Unreadable, load_model
from fastlt.packing.reader import picture
from fastlt.utils.files import write_text
from fastlt.utils.progress import rated_progress


def evaluate_views(run: Path, pack: Path | str | None, split: str, tta: str) -> dict[str, Any]:
    """Return what `evaluate_run` does, with probabilities averaged over views of each image.

    tta: flip or crops, as of `fastlt predict`. Of the test images of the run's own pack,
    RUN/test-TTA.json is written too.
    """
    model = load_model(run)
    answers = model.answers(top=1, tta=tta)
    numbers = {name: number for number, name in enumerate(model.classes)}
    with opened(run, pack, split) as it, rated_progress(None, "images/s", transient=True) as bar:
        count = len(it.split)
        images = (picture(it.split, number) for number in range(count))
        predicted, confidence = np.zeros(count, np.int32), np.zeros(count, np.float32)
        found = bar.track(model.stream(images, answers), total=count, description="predicting")
        for number, one in enumerate(found):
            if isinstance(one, Unreadable):
                raise DataError(one.reason)
            predicted[number], confidence[number] = numbers[one.names[0]], one.probabilities[0]
        labels = it.split.label.astype(np.int32)
        predictions = Predictions(np.arange(count), labels, predicted, confidence)
        result = score(predictions, it.space, it.config.data.grouping)
    result = {**result, "confusion": confusions(predictions)}
    if pack is None and split == "test":
        write_text(run / f"test-{tta}.json", json.dumps(result, indent=1) + "\n")
    return result
