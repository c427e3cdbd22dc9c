"""Batches on their way to a GPU; on a CPU they are there already."""

import numpy as np
import pytest
import torch

from fastlt.data.plan import Batch
from fastlt.data.prefetch import prefetch_to_device


def batches(count: int) -> list[tuple[Batch, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    none = np.zeros(5, np.int64)
    images = [
        torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8, generator=generator)
        for _ in range(count)
    ]
    return [
        (Batch(none + i, none, np.zeros((5, 4)), none.astype(bool)), image)
        for i, image in enumerate(images)
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_batches_are_the_same_and_in_order(device, count):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    given = batches(count)
    made = list(prefetch_to_device(iter(given), torch.device(device)))
    assert [batch.images[0] for batch, _ in made] == list(range(count))
    for (_, images), (_, wanted) in zip(made, given, strict=True):
        assert images.device.type == device and torch.equal(images.cpu(), wanted)


def test_a_batch_is_handed_over_before_the_next_is_asked_for():
    asked = []

    def slow():
        for pair in batches(3):
            asked.append(1)
            yield pair

    made = prefetch_to_device(slow(), torch.device("cpu"))
    next(made)
    assert len(asked) == 1
