import pytest

from fastlt.config import (
    Config,
    as_override,
    check_early,
    check_settings,
    load_config,
    recipe_names,
    setting_names,
    to_toml,
)
from fastlt.errors import UserError


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_valid_and_survives_a_round_trip(recipe, tmp_path):
    config = load_config(recipe)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(str(tmp_path / "config.toml")) == config


def test_the_recipes_of_the_issue_are_there():
    wanted = {
        "cifar100-lt",
        "cifar100-siblings",
        "demo",
        "imagenet-lt-resnet50",
        "imagenet-lt-vit-b16",
    }
    assert wanted <= set(recipe_names())
    assert any(name.startswith("inat18-") for name in recipe_names())
    assert any(name.startswith("places-lt-") for name in recipe_names())


def test_cifar100_lt_is_the_published_protocol():
    config = load_config("cifar100-lt")
    assert (config.model.name, config.train.epochs, config.data.batch) == ("resnet32", 200, 128)
    assert (
        config.optim.name,
        config.optim.lr,
        config.optim.momentum,
        config.optim.weight_decay,
    ) == ("sgd", 0.1, 0.9, 2e-4)
    assert (config.schedule.warmup_epochs, config.schedule.steps) == (
        5,
        {"160": 0.01, "180": 0.0001},
    )
    assert (config.data.crop, config.data.padding, config.data.flip) == ("pad-crop", 4, True)


def test_a_recipe_extends_another():
    vit, places = load_config("imagenet-lt-vit-b16"), load_config("places-lt-vit-b16")
    assert places.loss.tau == 1.05
    assert places.optim == vit.optim


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=0.5", 0.5),
        ("loss.name=ce", "ce"),
        ("data.scale=[0.5, 1.0]", (0.5, 1.0)),
        ("data.auxiliary=false", False),
    ],
)
def test_overrides_are_read_as_toml(override, value):
    section, key = override.split("=")[0].split(".")
    assert getattr(getattr(load_config("demo", [override]), section), key) == value


def test_a_typo_names_the_nearest_key(tmp_path):
    with pytest.raises(
        UserError, match=r"no setting 'optim\.momentun', did you mean 'optim\.momentum'\?"
    ):
        load_config("demo", ["optim.momentun=1"])
    with pytest.raises(UserError, match=r"did you mean 'loss\.silence'\?"):
        load_config("demo", ["loss.silense=0.1"])
    (tmp_path / "mine.toml").write_text("[data]\nbugdet = 3\n")
    with pytest.raises(UserError, match=r"did you mean 'data\.budget'\?"):
        load_config(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nlr = 1\n", r"there is no section \[optimizer\], did you mean 'optim'\?"),
        ("epochs = 3\n", "there is no setting 'epochs', did you mean 'train.epochs'"),
        ("[train]\nlr = 1\n", "there is no setting 'train.lr', did you mean 'optim.lr'"),
        ("[train]\nepochs = 0\n", "train.epochs = 0: Input should be greater"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(text, message, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.toml: {message}"):
        load_config(str(tmp_path / "mine.toml"))


def test_commas_make_a_list_where_the_setting_is_one():
    assert load_config("demo", ["data.mean=0.5,0.4,0.3"]).data.mean == (0.5, 0.4, 0.3)
    assert load_config("demo", ["data.mean=[0.5,0.4,0.3]"]).data.mean == (0.5, 0.4, 0.3)
    with pytest.raises(UserError, match=r"data\.mean"):
        load_config("demo", ["data.mean=0.5,0.5"])
    with pytest.raises(UserError, match=r"write loss\.silence=0\.1"):
        load_config("demo", ["loss.silence=0,1"])


def test_what_is_checked_early_is_what_is_refused_anyway():
    check_settings("demo", ["optim.lr=0.1", "loss.gamma=1", "model.head_scale=3", "method.x=1"])
    for wrong in ("optim.lr=-1", "loss.gama=1", "lr=1", "nonsense", "train.loggers=tb"):
        with pytest.raises(UserError) as early:
            check_settings("demo", [wrong])
        with pytest.raises(UserError) as late:
            load_config("demo", [wrong])
        assert str(early.value) == str(late.value)


def test_checking_early_changes_nothing():
    tree = {"optim": {"lr": 0.1}}
    check_early(tree, [(["optim", "lr"], 0.2), (["train", "epochs"], 3)], "demo")
    assert tree == {"optim": {"lr": 0.1}}


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cifar100-lt'"):
        load_config("cifar100lt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.silence=1.5", "less than or equal to 1"),
        ("loss.name=ldam", "needs model.head=cosine"),
        ("data.batch=0", "greater than or equal to 1"),
        ("nonsense", "section.key=value"),
        ("schedule.name=step", "needs schedule.steps"),
        ("schedule.steps={a=0.1}", "match pattern"),
        ("loss.drw_epoch=3", "is for loss.name=ldam"),
        ("schedule.warmup_epochs=2", "warms up by itself"),
        ("data.scale=[0.9, 0.1]", "must ascend"),
        ("data.mean=[nan, 0.0, 0.0]", "finite number"),
        ("data.eval_resize=8", "less than data.size"),
        ("train.seed=-1", "greater than or equal to 0"),
    ],
)
def test_bad_values_are_told_in_one_sentence(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("demo", [override])
    assert "\n" not in str(error.value)


def test_ldam_refuses_mixed_labels():
    with pytest.raises(UserError, match="mixup"):
        load_config("demo", ["loss.name=focal", "augment.mixup=0.8"])


def test_every_setting_can_be_named():
    names = list(setting_names())
    assert len(names) == len(set(names))
    assert all(name.split(".")[0] in Config.model_fields for name in names)


def test_a_recipe_that_extends_one_beside_it_and_one_that_extends_itself(tmp_path):
    (tmp_path / "base.toml").write_text('extends = "demo"\n[loss]\ntau = 0.5\n')
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\n[optim]\nlr = 0.3\n')
    config = load_config(str(tmp_path / "mine.toml"))
    assert (config.loss.tau, config.optim.lr, config.model.name) == (0.5, 0.3, "resnet8")
    (tmp_path / "base.toml").write_text('extends = "base.toml"\n')
    with pytest.raises(UserError, match="extends itself"):
        load_config(str(tmp_path / "mine.toml"))


def test_a_section_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_text("data = 3\n")
    with pytest.raises(UserError, match="data = 3"):
        load_config(str(tmp_path / "mine.toml"), ["data.batch=4"])


def test_any_path_survives_as_an_override():
    for path in ("/a b/'c'", '/a"b', "/p\U0001f600", "/back\\slash"):
        assert load_config("demo", [as_override("data.pack", path)]).data.pack == path


def test_broken_toml_names_the_file(tmp_path):
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML"):
        load_config(str(tmp_path / "broken.toml"))


@pytest.mark.parametrize(
    "setting",
    [
        "augment.mixup=inf",
        "optim.weight_decay=inf",
        "loss.tau=nan",
        "optim.lr=inf",
        "train.threads=100000",
        "data.workers=99999999999",
    ],
)
def test_what_is_not_finite_or_beyond_reason_is_refused(setting):
    key, _, _ = setting.partition("=")
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_config("cifar100-lt", [setting])


def test_a_ramp_without_a_start_is_refused():
    with pytest.raises(UserError, match=r"data\.ramp is for data\.start_size"):
        load_config("cifar100-lt", ["data.ramp=[0, 2]"])


@pytest.mark.parametrize(
    ("old", "mask", "images"),
    [
        (["loss.directions=both"], "both", 100),
        (["loss.directions=target_rows"], "target-rows", 100),
        (["loss.directions=aux_rows", "loss.few_shot_below=7"], "few-shot-auxiliary-rows", 7),
        (["loss.few_shot_below=20"], "few-shot", 20),
    ],
)
def test_the_keys_that_masks_replace_still_work_with_a_warning(tmp_path, old, mask, images):
    with pytest.warns(FutureWarning, match=r"is now part of loss\.mask"):
        loss = load_config("cifar100-siblings", old).loss
    assert (loss.mask, loss.few_shot_images) == (mask, images)
    recipe = tmp_path / "old.toml"
    recipe.write_text('[loss]\ndirections = "target_rows"\nfew_shot_below = 3\n')
    with pytest.warns(FutureWarning):
        assert load_config(str(recipe)).loss.mask == "few-shot-target-rows"


@pytest.mark.parametrize("old", ["loss.directions=target_rows", "loss.few_shot_below=20"])
def test_an_old_key_does_not_overrule_a_mask(old):
    message = r"loss\.mask takes the place of loss\.directions and loss\.few_shot_below"
    with pytest.warns(FutureWarning), pytest.raises(UserError, match=message):
        load_config("cifar100-siblings", ["loss.mask=normal", old])


def test_a_mask_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="there is no mask 'few-shots', did you mean 'few-shot'"):
        load_config("cifar100-siblings", ["loss.mask=few-shots"])
