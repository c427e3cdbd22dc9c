"""The recipes of ImageNet-LT, iNaturalist 2018 and Places-LT, whole, with the true numbers of
classes: one step each.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from helpers.true_counts import (
    AUXILIARIES_OF_IMAGENET_LT,
    PAIRS_OF_IMAGENET_LT,
    class_space,
    counted_pack,
    true_counts,
)
from rich.console import Console

from fastlt.config import load_config, recipe_names
from fastlt.models.export import targets_only
from fastlt.packing.reader import open_pack
from fastlt.training.loop import forward_of, set_modes, train_step
from fastlt.training.messages import report_setup
from fastlt.training.setup import prepare

pytestmark = pytest.mark.slow
if find_spec("timm") is None:
    pytest.skip("timm is an extra", allow_module_level=True)
SETS = ("imagenet-lt", "inat18", "places-lt")
# targets, training images
EXPECTED = {
    "imagenet-lt": (1000, 115_846),
    "inat18": (8142, None),
    "places-lt": (365, 62_500),
}
HERE = [
    "model.pretrained=false",
    "data.batch=4",
    "data.workers=0",
    "data.engine=torch",
    "train.threads=2",
]


@pytest.fixture(scope="module")
def packs(shared_data, tmp_path_factory):
    made = {}
    for name in SETS:
        counts = true_counts(name, shared_data / "labels" / "longtail_splits")
        many = (
            (AUXILIARIES_OF_IMAGENET_LT, PAIRS_OF_IMAGENET_LT)
            if name == "imagenet-lt"
            else (len(counts), len(counts) + 100)
        )
        made[name] = counted_pack(tmp_path_factory.mktemp(name), class_space(counts, *many))
    return made


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith(SETS)])
def test_a_step_of_each_large_recipe(packs, tmp_path, recipe):
    name = next(name for name in SETS if recipe.startswith(name))
    config = load_config(recipe, [*HERE, f"data.pack={json.dumps(str(packs[name]))}"])
    trainer = prepare(config, tmp_path, open_pack(packs[name]))
    try:
        report_setup(trainer, Console(quiet=True))
        targets, images = EXPECTED[name]
        stored = sum(trainer.space.train_counts[:targets])
        assert trainer.space.num_targets == targets and images in (None, stored)
        assert trainer.plan.images_per_epoch == stored + 50 * trainer.space.num_auxiliaries
        trainer.state.epoch = config.schedule.head_only_epochs  # all of it is trained from there on
        trainer.factor = lambda epoch: 1.0
        set_modes(trainer)
        before = trainer.model.head.weight.detach().clone()
        first = next(trainer.model.backbone.parameters()).detach().clone()
        batch, pixels = next(iter(trainer.train_loader.iterate(trainer.plan.epoch(0))))
        assert pixels.shape == (4, 224, 224, 3) and pixels.dtype == torch.uint8
        loss, correct, counted, norm = train_step(
            trainer, forward_of(trainer), batch, pixels
        ).tolist()
        assert 0 < loss < 100 and 0 <= correct <= counted <= 4 and 0 < norm < float("inf")
        assert trainer.model.head.weight.shape == (
            trainer.space.num_classes,
            trainer.model.backbone.num_features,
        )
        assert not torch.equal(trainer.model.head.weight, before)
        assert not torch.equal(next(trainer.model.backbone.parameters()), first)
        assert targets_only(trainer.model, targets)["head.weight"].shape[0] == targets
    finally:
        trainer.train_loader.close()
        trainer.val_loader.close()
