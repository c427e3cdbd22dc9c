"""Which image comes when."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.scenes import bare_split

from fastlt.data.geometry import Geometry
from fastlt.data.plan import Plan, Sampling, draw_by_class, evaluation_batches, spread_budget
from fastlt.errors import UserError

# three targets, then auxiliaries with fewer, more, and as many images as the budget, and none
STORED = (
    9,
    4,
    1,
    30,
    80,
    50,
    0,
)
NUM_TARGETS, NUM_CLASSES = 3, len(STORED)
GEOMETRY = Geometry("pad-crop", 32, flip=True)


def labels() -> np.ndarray:
    return np.random.default_rng(1).permutation(np.repeat(np.arange(NUM_CLASSES), STORED))


def plan(batch: int = 16, **changes) -> Plan:
    sampling = Sampling(changes.pop("targets", "once"), changes.pop("budget", 50))
    return Plan(
        bare_split(labels()),
        NUM_TARGETS,
        NUM_CLASSES,
        GEOMETRY,
        sampling,
        batch,
        changes.pop("seed", 3),
        **changes,
    )


def same(left, right) -> bool:
    return all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("images", "labels", "boxes", "flips")
    )


def drawn(plan: Plan, epoch: int = 0) -> np.ndarray:
    return np.concatenate([batch.images for batch in plan.epoch(epoch)])


def test_counts_are_the_targets_once_and_the_budget_of_each_auxiliary():
    assert plan().class_counts.tolist() == [9, 4, 1, 50, 50, 50, 0]


@pytest.mark.parametrize("targets", ["once", "class-balanced"])
@pytest.mark.parametrize("budget", [0, 7, 50, 200])
def test_an_epoch_holds_exactly_the_counts_that_the_prior_uses(targets, budget):
    made = plan(targets=targets, budget=budget)
    for epoch in range(2):
        seen = np.bincount(labels()[drawn(made, epoch)], minlength=NUM_CLASSES)
        assert seen.tolist() == made.class_counts.tolist()
        assert made.images_per_epoch == seen.sum()


def test_class_balanced_gives_every_target_class_equally_many():
    counts = plan(targets="class-balanced").class_counts[:NUM_TARGETS]
    assert counts.tolist() == [5, 5, 5]  # as many as are stored, 14 in 3 classes, rounded


def test_every_target_image_comes_once():
    targets = np.flatnonzero(labels() < NUM_TARGETS)
    images = drawn(plan())
    assert np.array_equal(np.sort(images[np.isin(images, targets)]), targets)


def test_a_budget_is_spread_evenly_over_the_stored_images_of_a_class():
    times = np.bincount(drawn(plan()), minlength=len(labels()))
    assert set(times[labels() == 3]) == {1, 2}  # 50 from 30
    assert set(times[labels() == 4]) == {0, 1}  # 50 from 80
    assert set(times[labels() == 5]) == {1}


def test_all_images_of_a_large_auxiliary_are_seen_over_the_epochs():
    seen = np.concatenate([drawn(plan(), epoch) for epoch in range(12)])
    assert np.isin(
        np.flatnonzero(labels() == 4), seen
    ).all()  # each is left out of an epoch with probability 3/8


def test_draw_by_class_gives_what_is_asked_of_each_class():
    asked = np.array([3, 0, 7, 31, 1, 120, 0])
    images = draw_by_class(labels(), asked, np.random.default_rng(0))
    assert np.bincount(labels()[images], minlength=NUM_CLASSES).tolist() == asked.tolist()


def test_an_epoch_is_a_pure_function_of_seed_and_epoch():
    again = [same(a, b) for a, b in zip(plan().epoch(5), plan().epoch(5), strict=True)]
    assert again and all(again)
    assert not np.array_equal(plan().order(5), plan().order(6))
    assert not np.array_equal(plan().order(5), plan(seed=4).order(5))


def test_the_order_is_shuffled_over_classes():
    first = labels()[plan().order(0)][:60]
    assert len(np.unique(first)) >= 4


@pytest.mark.parametrize("first_step", [0, 1, 7, 10])
def test_a_run_resumes_at_any_step(first_step):
    whole = list(plan().epoch(2))
    assert len(whole) == 11
    rest = list(plan().epoch(2, first_step))
    assert len(rest) == 11 - first_step
    assert all(same(a, b) for a, b in zip(rest, whole[first_step:], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_images_of_a_step_whatever_their_number(world):
    alone = list(plan().epoch(1))
    ranks = [list(plan(rank=rank, world=world).epoch(1)) for rank in range(world)]
    for step, batch in enumerate(alone):
        shares = [rank[step] for rank in ranks]
        assert len({len(share.images) for share in shares}) == 1
        interleaved = np.stack([share.images for share in shares], axis=1).reshape(-1)
        boxes = np.stack([share.boxes for share in shares], axis=1).reshape(-1, 4)
        # The last step has 4 images, which any of these worlds share equally.
        assert np.array_equal(interleaved, batch.images)
        assert np.array_equal(boxes, batch.boxes)


def test_a_last_batch_that_ranks_cannot_share_equally_is_cut_or_left_out():
    assert plan().images_per_epoch == 164
    sizes = [
        [len(batch.images) for batch in plan(48, rank=rank, world=3).epoch(0)] for rank in range(3)
    ]
    assert sizes == [[16, 16, 16, 6]] * 3  # 164 = 3 * 48 + 20, and 18 of the 20 go round
    assert plan(162, rank=0, world=3).steps_per_epoch == 1  # 2 images are left for 3 ranks


def test_drop_last_leaves_out_the_batch_that_is_not_full():
    assert [len(batch.images) for batch in plan().epoch(0)] == [16] * 10 + [4]
    assert [len(batch.images) for batch in plan(drop_last=True).epoch(0)] == [16] * 10
    assert plan(drop_last=True).steps_per_epoch == 10


def test_labels_belong_to_the_images():
    for batch in plan().epoch(0):
        assert np.array_equal(batch.labels, labels()[batch.images])
        assert batch.labels.dtype == batch.images.dtype == np.int64


def test_two_occurrences_of_an_image_are_cut_differently():
    images = np.concatenate([batch.images for batch in plan(budget=400).epoch(0)])
    boxes = np.concatenate([batch.boxes for batch in plan(budget=400).epoch(0)])
    of_one = boxes[images == images[np.flatnonzero(labels()[images] == 3)[0]]]
    assert len(of_one) > 10 and len(np.unique(of_one, axis=0)) > 5


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"data\.batch=16 cannot be shared equally by 3 ranks"):
        plan(world=3)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_image_once_in_stored_order(world):
    split = bare_split(labels())
    geometry = Geometry("centre-crop", 32)
    ranks = [list(evaluation_batches(split, geometry, 16, rank, world)) for rank in range(world)]
    seen = [np.concatenate([batch.images for batch in batches]) for batches in ranks]
    assert all((np.diff(images) > 0).all() for images in seen)
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(len(split)))
    assert not any(batch.flips.any() for batches in ranks for batch in batches)


# --- more ways to sample


def test_square_root_sampling_is_between_once_and_balanced():
    counts = plan(targets="square-root").class_counts[:NUM_TARGETS]
    assert counts.tolist() == [7, 5, 2]  # 14 in the ratio 3 : 2 : 1


def test_every_auxiliary_may_have_its_own_budget():
    made = plan(budget=(3, 0, 60, 9))
    assert made.class_counts[NUM_TARGETS:].tolist() == [3, 0, 60, 0]  # the last stores none
    assert (
        np.bincount(labels()[drawn(made)], minlength=NUM_CLASSES).tolist()
        == made.class_counts.tolist()
    )


def test_a_total_is_spread_over_the_auxiliaries_that_store_images():
    assert spread_budget(11, np.array([5, 0, 3, 1])) == (4, 0, 4, 3)
    assert spread_budget(2, np.array([5, 0, 3, 1])) == (1, 0, 1, 0)
    assert spread_budget(9, np.array([0, 0])) == (0, 0) and spread_budget(9, np.array([])) == ()


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeats_come_in_a_row_and_leave_the_counts(repeats):
    made = Plan(
        bare_split(labels()),
        NUM_TARGETS,
        NUM_CLASSES,
        GEOMETRY,
        Sampling(budget=50, repeats=repeats),
        16,
        3,
    )
    order = made.order(0)
    assert (
        np.bincount(labels()[order], minlength=NUM_CLASSES).tolist() == made.class_counts.tolist()
    )
    runs = np.diff(np.flatnonzero(np.diff(order, prepend=-1, append=-1)))
    assert runs.max() >= repeats and np.count_nonzero(runs % repeats) <= NUM_CLASSES
    targets = order[labels()[order] == 0]
    assert len(np.unique(targets)) == -(-9 // repeats)


def test_the_copies_of_a_repeated_image_are_cut_differently():
    made = Plan(
        bare_split(labels()), NUM_TARGETS, NUM_CLASSES, GEOMETRY, Sampling(repeats=4), 16, 3
    )
    batch = next(iter(made.epoch(0)))
    first = batch.images == batch.images[0]
    assert first.sum() >= 4 and len(np.unique(batch.boxes[first], axis=0)) > 1


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_each_view_of_a_batch_is_the_same_images_cut_anew(views, world):
    for rank in range(world):
        once = plan(rank=rank, world=world)
        several = replace(once, sampling=replace(once.sampling, views=views))
        assert several.steps_per_epoch == once.steps_per_epoch
        assert several.class_counts.tolist() == once.class_counts.tolist()
        for batch, alone in zip(several.epoch(4), once.epoch(4), strict=True):
            parts = np.array_split(np.arange(len(batch.images)), views)
            for part in parts:
                assert batch.images[part].tolist() == alone.images.tolist()
                assert batch.labels[part].tolist() == alone.labels.tolist()
            assert batch.boxes[parts[0]].tolist() == alone.boxes.tolist()
            cuts = {(batch.boxes[part].tobytes(), batch.flips[part].tobytes()) for part in parts}
            assert len(cuts) == views
