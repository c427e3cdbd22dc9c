"""Small modules in a backbone: what they train, what checkpoints hold, what is exported."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.method_cases import QUIET, config_of, need_timm, prepared, trained
from safetensors.torch import load_file, save_file

from fastlt.config import AdapterConfig, OptimConfig, load_config
from fastlt.errors import MissingExtra, UserError
from fastlt.evaluation.export import export_run
from fastlt.evaluation.predict import load_model
from fastlt.models.adapt import KINDS
from fastlt.models.classifier import build_model
from fastlt.models.heads import section
from fastlt.models.timm_folder import load_timm_folder
from fastlt.training.loop import forward_of, set_modes, train, train_step
from fastlt.training.optim import build_optimizer
from fastlt.training.run_folder import save

VIT = ["model.name=test_vit", "data.size=32", "data.padding=4", "optim.lr=0.01"]
CNN = ["model.name=resnet8", "optim.lr=0.01"]
FOR_VITS = ("adaptformer", "vpt-shallow", "vpt-deep")
CASES = [
    (name, kind)
    for name in ("vit", "cnn")
    for kind in KINDS
    if name == "vit" or kind not in FOR_VITS
]


@pytest.fixture(autouse=True)
def timm_and_peft():
    need_timm()


def settings_of(name: str, kind: str, *others: str) -> list[str]:
    if kind == "lora" and find_spec("peft") is None:
        pytest.skip("peft is an extra")
    return [*(VIT if name == "vit" else CNN), f"model.adapt={kind}", *others]


def built(kind: str, name: str = "test_vit", **numbers):
    adapter = AdapterConfig(**numbers)
    torch.manual_seed(3)
    return build_model(section()(name=name, adapt=kind, adapter=adapter), 5, 32).eval()


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_at_first_the_backbone_is_as_it_was(name, kind):
    settings_of(name, kind)
    model = {"vit": "test_vit", "cnn": "resnet8"}[name]
    plain, adapted = built("full", model), built(kind, model)
    shared = plain.backbone.state_dict()
    for key, tensor in adapted.backbone.state_dict().items():
        key = key.replace(".base_layer", "")
        assert key not in shared or torch.equal(tensor, shared[key])
    if not kind.startswith("vpt"):  # prompts are there from the start
        torch.testing.assert_close(adapted.features(IMAGES), plain.features(IMAGES))


def shares(kind: str, **numbers) -> set[str]:
    backbone = built(kind, **numbers).backbone
    return {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}


def test_what_is_trained_of_a_transformer():
    every = {key for key, _ in built("full").backbone.named_parameters()}
    assert shares("head") == set()
    assert shares("bitfit") == {key for key in every if key.endswith("bias")}
    assert shares("norm") == {key for key in every if "norm" in key} and len(shares("norm")) > 10
    blocks = len(built("full").backbone.blocks)
    assert len(shares("vpt-shallow")) == 1 and len(shares("vpt-deep")) == blocks
    assert len(shares("adaptformer")) == 7 * blocks


def test_lora_goes_beside_attention_and_mlp_and_convolutions():
    settings_of("vit", "lora")
    blocks = len(built("full").backbone.blocks)
    assert len(shares("lora")) == 2 * 4 * blocks
    backbone = built("lora", "resnet8", rank=2).backbone
    found = {k: p.shape for k, p in backbone.named_parameters() if p.requires_grad}
    assert found and not any(key.startswith("conv1.") for key in found)
    assert all(2 in (shape[0], shape[1]) for shape in found.values())


@pytest.mark.parametrize("kind", FOR_VITS)
def test_what_is_for_transformers_is_refused_elsewhere(kind):
    with pytest.raises(UserError, match=rf"model\.adapt={kind} is for vision transformers .* resn"):
        built(kind, "resnet8")


def test_peft_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtra, match=r'pip install "fastlt\[peft\]"'):
        built("lora")


def test_the_numbers_are_settings():
    config = load_config("cifar100-lt", ["model.adapt=vpt-deep", "model.adapter.prompts=3"])
    assert config.model.adapter.prompts == 3
    assert shares("vpt-deep", prompts=3) and built("vpt-deep", prompts=3).backbone.blocks[
        0
    ].prompts.shape == (3, built("full").backbone.embed_dim)
    with pytest.raises(UserError, match=r"no setting 'model\.adapter\.rnk', did you mean"):
        load_config("cifar100-lt", ["model.adapter.rnk=3"])
    with pytest.raises(UserError, match=r"model\.adapter\.rank = 0"):
        load_config("cifar100-lt", ["model.adapter.rank=0"])


def test_prompts_leave_the_tokens_of_the_image():
    """As the formula: a block of the prompts and the image, of which the image's are kept."""
    adapted, plain = built("vpt-deep", prompts=2), built("full")
    block, reference = adapted.backbone.blocks[1], plain.backbone.blocks[1]
    tokens = torch.randn(3, 7, adapted.backbone.embed_dim)
    prefix = adapted.backbone.num_prefix_tokens
    prompts = block.prompts.expand(3, -1, -1)
    whole = reference(torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1))
    wanted = torch.cat([whole[:, :prefix], whole[:, prefix + 2 :]], dim=1)
    torch.testing.assert_close(block(tokens), wanted)


def test_a_bottleneck_is_the_formula():
    block = built("adaptformer", rank=3).backbone.blocks[0]
    adapter = block.adapter
    torch.nn.init.normal_(adapter.up.weight)
    with torch.no_grad():
        adapter.scale.fill_(0.5)
    tokens = torch.randn(2, 5, adapter.norm.normalized_shape[0])
    hidden = torch.relu(adapter.down(adapter.norm(tokens)))
    torch.testing.assert_close(adapter(tokens), 0.5 * (hidden @ adapter.up.weight.T))
    middle = tokens + block.attn(block.norm1(tokens))
    wanted = middle + block.mlp(block.norm2(middle)) + adapter(middle)
    torch.testing.assert_close(block(tokens), wanted)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "head"])
def test_recomputed_activations_give_the_same_gradients(kind):
    settings_of("vit", kind)
    gradients = []
    for anew in (False, True):
        torch.manual_seed(3)
        model = build_model(section()(name="test_vit", adapt=kind), 5, 32).train()
        if anew:
            model.backbone.set_grad_checkpointing(True)
        model(IMAGES).square().sum().backward()
        found = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
        assert found and all(gradient is not None for gradient in found.values())
        gradients.append(found)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "adaptformer", "vpt-deep", "bitfit", "norm", "last:2"])
def test_rates_and_decay_are_those_of_what_is_trained(kind):
    """A layer's rate falls by the decay from the head downwards; vectors are not decayed."""
    settings_of("vit", kind)
    model = build_model(section()(name="test_vit", adapt=kind), 5, 32)
    config = OptimConfig(name="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    optimiser = build_optimizer(config, model, 64)
    names = {id(p): key for key, p in model.named_parameters() if p.requires_grad}
    blocks = len(model.backbone.blocks)
    seen = set()
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            key = names[id(parameter)]  # and of nothing that stands still
            seen.add(key)
            assert (group["weight_decay"] == 0) == (parameter.ndim <= 1), key
            if key.startswith("head."):
                assert group["base_lr"] == 1.0
            if key.startswith("backbone.blocks."):
                depth = blocks - int(key.split(".")[2])
                assert group["base_lr"] == pytest.approx(0.5**depth), key
    assert seen == set(names.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "adaptformer", "vpt-shallow", "vpt-deep", "norm"])
def test_what_is_compiled_trains_alike(small_pack, tmp_path, kind):
    losses = []
    for compiled in ("off", "on"):
        settings = settings_of("vit", kind, f"train.compile={compiled}")
        run = trained(small_pack, tmp_path / compiled, "plain", *settings)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "last:1", "bitfit", "norm", "lora", "head"])
def test_statistics_of_batch_norm_move_with_the_weights_before_them(small_pack, tmp_path, kind):
    with prepared(small_pack, tmp_path / "run", "plain", *settings_of("cnn", kind)) as trainer:
        before = {k: v.clone() for k, v in trainer.model.named_buffers() if "running" in k}
        set_modes(trainer)
        batch, pixels = next(iter(trainer.train_loader.iterate(trainer.plan.epoch(0))))
        train_step(trainer, forward_of(trainer), batch, pixels)
        after = dict(trainer.model.named_buffers())
        moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    last = {key for key in before if "stages.2." in key}
    assert last and moved == {"full": set(before), "last:1": last}.get(kind, set())


# --- trainings


def run_of(pack: Path, run: Path, name: str, kind: str, *others: str) -> Path:
    return trained(pack, run, "plain", *settings_of(name, kind, *others))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            *case,
            marks=[] if case in (("vit", "lora"),) else [pytest.mark.slow],
        )
        for case in CASES
    ],
)
def test_it_goes_on_to_the_same_bits_and_is_exported(small_pack, tmp_path, name, kind):
    several = ["train.checkpoint_steps=1", "train.keep=99", "optim.ema=0.5"]
    run = run_of(small_pack, tmp_path / "run", name, kind, *several)
    kept = sorted((run / "checkpoints").iterdir())
    half = shutil.copytree(run, tmp_path / "half")
    for path in sorted((half / "checkpoints").iterdir())[len(kept) // 2 :]:
        shutil.rmtree(path)
    for file in ("result.json", "model.safetensors"):
        (half / file).unlink()
    train(config_of(small_pack, "plain", *settings_of(name, kind, *several)), half, QUIET)
    ours, theirs = load_file(half / "model.safetensors"), load_file(run / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # what stands still is in no checkpoint
    whole = load_file(run / "model.safetensors")
    newest = load_file(kept[-1] / "model.safetensors")
    assert sum(t.numel() for t in newest.values()) < sum(t.numel() for t in whole.values())
    assert not any("base_layer" in key for key in (*newest, *whole))
    # as exported
    export_run(run, tmp_path / "folder")
    model = load_model(tmp_path / "folder", "cpu")
    wanted = load_model(run, "cpu").module(IMAGES[:, :, : model.size, : model.size])
    found = model.module(IMAGES[:, :, : model.size, : model.size])
    torch.testing.assert_close(found, wanted)
    if name == "vit" and not KINDS[kind].stays:
        assert not any("lora" in key for key in whole)
        torch.testing.assert_close(load_timm_folder(tmp_path / "folder")(IMAGES), wanted)


def test_other_weights_than_it_began_with_are_refused(small_pack, tmp_path):
    with prepared(
        small_pack, tmp_path / "start", "plain", *settings_of("vit", "bitfit")
    ) as trainer:
        backbone = {
            k: v.clone().contiguous() for k, v in trainer.model.backbone.state_dict().items()
        }
    weights = tmp_path / "weights.safetensors"
    save_file(backbone, weights)
    chosen = settings_of("vit", "bitfit", f"model.weights={json.dumps(str(weights))}")
    run = trained(small_pack, tmp_path / "run", "plain", *chosen, "train.epochs=1")
    (run / "result.json").unlink()
    save_file({k: v + 1 for k, v in backbone.items()}, weights)
    with pytest.raises(UserError, match="the weights that are not trained have changed since"):
        train(config_of(small_pack, "plain", *chosen, "train.epochs=1"), run, QUIET)


def test_a_checkpoint_of_a_large_transformer_is_small(small_pack, tmp_path):
    """LoRA of rank 4 on ViT-B/16: below 5 MB, and the optimiser's state is twice that."""
    settings = settings_of("vit", "lora", "optim.name=adamw", "train.loggers=[]")
    with prepared(
        small_pack, tmp_path / "run", "plain", *settings, "model.name=vit_base_patch16_224"
    ) as trainer:
        save(trainer)
        trainer.writer.wait()
        total, moving = trainer.parameters
    (newest,) = (tmp_path / "run" / "checkpoints").iterdir()
    size = (newest / "model.safetensors").stat().st_size
    assert total > 80e6 and moving > 500_000 and 4 * moving < size < 5e6
    assert (newest / "optimizer.safetensors").stat().st_size < 2.1 * size
