"""A small vision transformer, pretrained on the half of CIFAR-100 that the siblings task lacks."""

from rich.console import Console

from fastlt.studies.protocol import ReproduceOptions
from fastlt.studies.repeated import Runner
from fastlt.utils.run_files import result_of

# as the recipe has it
SMALL_VIT = [
    "model.name=vit_tiny_patch16_224",
    "model.args={patch_size = 8, embed_dim = 96, depth = 6, num_heads = 3}",
]
TASK, RECIPE = "cifar100-unrelated", "pretrain-small-vit"


def pretrained_vit(options: ReproduceOptions, console: Console) -> list[str]:
    """Return the settings of a model that starts from it; it is trained where it is not there yet.

    A training that stopped goes on.
    """
    run = options.out / "pretrained"
    if result_of(run) is None:
        pack = options.out / "pack-pretraining"
        if not pack.is_dir():
            Runner().run("pack", options.source, "--task", TASK, "--out", str(pack))
        console.print(f"pretraining a small ViT in {run}", highlight=False)
        Runner().run("train", RECIPE, "--data", str(pack), "--out", str(run))
    return [f"model.weights={run}"]
