"""Recipes are read strictly, and those of the paper hold the paper's numbers."""

import dataclasses
import json
from pathlib import Path

import pytest

from lowssl_core.errors import UserError
from lowssl_core.methods import METHODS
from lowssl_core.recipe import Recipe, differences, load_recipe, recipe_from_dict, recipe_names
from lowssl_core.schedules import Progress

IMAGENET = [
    f"{method}-{backbone}-{kind}"
    for method, backbone in (
        ("dino", "mobilenetv2"),
        ("dino", "resnet18"),
        ("dino", "resnet34"),
        ("dino", "vit-tiny"),
        ("swav", "mobilenetv2"),
        ("moco", "mobilenetv2"),
    )
    for kind in ("baseline", "matched")
]
SMALLEST = {"method": {"name": "moco"}, "data": {"batch_size": 8}}

# The paper's table of training recipes: base and final learning rate, start of the warm-up, optimizer, decay (start,
# end), locals. Base rates are for 256 images; each warm-up lasts 10 epochs.
TRAINING = {
    "dino-mobilenetv2": (0.48, 0.0048, 0.0, "lars", (1e-6, 1e-6), 6),
    "dino-resnet18": (0.48, 0.0048, 0.0, "lars", (1e-6, 1e-6), 6),
    "dino-resnet34": (0.48, 0.0048, 0.0, "lars", (1e-6, 1e-6), 6),
    "dino-vit-tiny": (0.0005, 1e-5, 0.0, "adamw", (0.04, 0.4), 10),
    "swav-mobilenetv2": (0.3, 0.0048, 0.075, "lars", (1e-6, 1e-6), 6),
    "moco-mobilenetv2": (0.48, 0.0048, 0.0, "lars", (1e-6, 1e-6), 6),
}
BACKBONES = {
    "dino-mobilenetv2": "mobilenetv2",
    "dino-resnet18": "resnet18",
    "dino-resnet34": "resnet34",
    "dino-vit-tiny": "vit_tiny",
    "swav-mobilenetv2": "mobilenetv2",
    "moco-mobilenetv2": "mobilenetv2",
}
METHOD_VALUES = {
    "dino-cnn": {
        "hidden": 2048,
        "bottleneck": 256,
        "outputs": 4096,
        "head_batchnorm": True,
        "gain_trainable": False,
        "student_temperature": 0.1,
        "teacher_temperature_start": 0.04,
        "teacher_temperature": 0.07,
        "teacher_temperature_epochs": 50,
        "center_momentum": 0.9,
        "momentum": 0.996,
        "freeze_last_layer_epochs": 1.0,
    },
    "swav": {
        "hidden": 4096,
        "outputs": 128,
        "prototypes": 3000,
        "temperature": 0.1,
        "epsilon": 0.05,
        "iterations": 3,
        "queue_length": 3840,
        "queue_start_epoch": 15,
        "freeze_prototypes_epochs": 1.0,
    },
    "moco": {"hidden": 2048, "outputs": 128, "queue_length": 65536, "temperature": 0.2, "momentum": 0.999},
}
METHOD_VALUES["dino-vit"] = METHOD_VALUES["dino-cnn"] | {
    "outputs": 65536,
    "head_batchnorm": False,
    "gain_trainable": True,
    "teacher_temperature_epochs": 30,
}


def row_of(name: str) -> tuple[str, str]:
    """The table's row of a recipe, and its kind: "baseline" or "matched"."""
    row, _, kind = name.rpartition("-")
    return row, kind


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def error_of(*overrides: str, recipe: str = "dino-resnet18-matched") -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Packaged recipes


def test_every_row_of_the_papers_tables_has_a_recipe():
    assert set(IMAGENET) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_survives_the_way_through_plain_values(name):
    recipe = load_recipe(name)
    through_json = json.loads(json.dumps(recipe.as_dict()))
    assert recipe_from_dict(through_json) == recipe
    assert recipe_from_dict(through_json).hash() == recipe.hash()
    assert differences(recipe, recipe) == []


def test_no_two_packaged_recipes_are_the_same():
    assert len({load_recipe(name).hash() for name in recipe_names()}) == len(recipe_names())


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_trains_as_the_paper_does(name):
    row, _ = row_of(name)
    recipe = load_recipe(name)
    base, final, warmup_start, optimizer, decays, num_locals = TRAINING[row]
    assert recipe.epochs == 200
    assert recipe.data.batch_size == 8 * 128
    assert recipe.backbone.name == BACKBONES[row]
    assert recipe.backbone.drop_path == (0.1 if row == "dino-vit-tiny" else 0.0)
    assert recipe.optim.name == optimizer
    assert recipe.views.num_locals == num_locals
    steps_per_epoch = 1_281_167 // 1024
    schedule = recipe.optim.schedule(recipe.data.batch_size)

    def at(epoch):
        return Progress(
            step=epoch * steps_per_epoch, total_steps=200 * steps_per_epoch, steps_per_epoch=steps_per_epoch
        )

    assert schedule.learning_rate(at(0)) == pytest.approx(warmup_start)
    assert schedule.learning_rate(at(5)) == pytest.approx((warmup_start + base * 4) / 2)
    assert schedule.learning_rate(at(10)) == pytest.approx(base * 1024 / 256)
    assert schedule.learning_rate(at(105)) == pytest.approx((base * 4 + final) / 2)
    assert schedule.learning_rate(at(200)) == pytest.approx(final)
    assert (schedule.weight_decay(at(0)), schedule.weight_decay(at(200))) == pytest.approx(decays)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_has_the_papers_method(name):
    method = load_recipe(name).method
    kind = method.name if method.name != "dino" else ("dino-vit" if "vit" in name else "dino-cnn")
    values = dataclasses.asdict(method)
    assert {key: values[key] for key in METHOD_VALUES[kind]} == METHOD_VALUES[kind]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe_has_the_papers_views(name):
    row, kind = row_of(name)
    recipe, views = load_recipe(name), load_recipe(name).views
    border = 0.3 if kind == "matched" else (0.25 if row == "dino-vit-tiny" else 0.14)
    assert (views.global_size, views.local_size) == (224, 128 if kind == "matched" else 96)
    assert (views.global_scale, views.local_scale) == ((border, 1.0), (0.05, border))
    assert recipe.alpha == (0.4 if kind == "matched" else None)
    color = views.photometric
    strengths = (color.brightness, color.contrast, color.saturation, color.hue)
    assert (color.jitter_probability, color.gray_probability, color.blur_radius) == (0.8, 0.2, (0.1, 2.0))
    if row.startswith("swav"):
        assert strengths == (0.8, 0.8, 0.8, 0.2)
        assert color.blur_probability == (0.5, 0.5, 0.5)
        assert color.solarize_probability == (0.0, 0.0, 0.0)
    else:
        assert strengths == (0.4, 0.4, 0.2, 0.1)
        assert color.blur_probability == (1.0, 0.1, 0.5)
        assert color.solarize_probability == (0.0, 0.2, 0.0)


@pytest.mark.parametrize("row", TRAINING)
def test_matched_differs_from_baseline_in_scales_local_size_and_alpha_alone(row):
    changed = differences(load_recipe(f"{row}-baseline"), load_recipe(f"{row}-matched"))
    keys = {line.partition(":")[0] for line in changed}
    assert keys == {"alpha", "views.global_scale", "views.local_scale", "views.local_size"}
    assert "alpha: 'absent', 0.4" in changed


# Reading


def test_a_recipe_is_read_from_a_file_and_what_it_leaves_out_is_the_papers(tmp_path):
    lines = ("epochs = 3", "alpha = 0", "[method]", 'name = "swav"', "prototypes = 30")
    lines += ("[data]", "batch_size = 16", "[views]", 'local_size = "matched"')
    recipe = load_recipe(written(tmp_path / "mine.toml", "\n".join(lines)))
    assert (recipe.epochs, recipe.alpha, recipe.data.batch_size) == (3, 0.0, 16)
    assert isinstance(recipe.alpha, float)
    assert recipe.method == METHODS["swav"](prototypes=30)
    assert recipe.views.local_size == "matched"
    assert recipe.optim == Recipe(method=METHODS["moco"](), data=recipe.data).optim


def test_an_override_wins_over_the_file_and_the_last_one_over_the_others():
    recipe = load_recipe(
        "dino-resnet18-matched",
        [
            "optim.base_lr=1",
            "optim.base_lr=2e-1",
            "views.local_size=matched",
            "views.local_scale=[0.1, 0.2]",
            'backbone.name="resnet34"',
            " seed = 7",
            "compute.compile=true",
            "monitor.quality_every_epochs=0",
        ],
    )
    assert (recipe.optim.base_lr, recipe.views.local_size, recipe.seed) == (0.2, "matched", 7)
    assert recipe.views.local_scale == (0.1, 0.2)
    assert recipe.backbone.name == "resnet34"
    assert recipe.compute.compile is True
    assert recipe.monitor.quality_every_epochs == 0


def test_an_empty_override_leaves_a_key_absent():
    assert load_recipe("dino-resnet18-matched", ["alpha="]).alpha is None


def test_a_recipes_hash_follows_its_values_and_not_how_they_are_written():
    base = load_recipe("dino-resnet18-matched")
    assert load_recipe("dino-resnet18-matched", ["alpha=4e-1", "epochs=200"]).hash() == base.hash()
    assert load_recipe("dino-resnet18-matched", ["alpha=0.41"]).hash() != base.hash()
    assert load_recipe("dino-resnet18-matched", ["alpha="]).hash() != base.hash()


def test_differences_name_the_key_and_both_values():
    one = recipe_from_dict(SMALLEST)
    other = recipe_from_dict(SMALLEST | {"seed": 3, "alpha": 0.5})
    assert differences(one, other) == ["alpha: 'absent', 0.5", "seed: 0, 3"]


# Refusals: the key's full path, what was given, what is accepted


@pytest.mark.parametrize(
    ("override", "path", "accepted"),
    [
        ("learning_rate=1", "learning_rate", "the recipe has method, data, backbone"),
        ("optim.lr=1", "optim.lr", "optim has name, base_lr, final_lr"),
        ("views.photometric.sharpness=1", "views.photometric.sharpness", "views.photometric has brightness"),
        ("method.queue_length=8", "method.queue_length", "method has hidden, bottleneck"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_valid_names(override, path, accepted):
    message = error_of(override)
    assert f"unknown key {path};" in message
    assert accepted in message


@pytest.mark.parametrize(
    ("override", "path", "accepted"),
    [
        ("epochs=1.5", "epochs is 1.5", "a whole number"),
        ("epochs=true", "epochs is True", "a whole number"),
        ("epochs=ten", "epochs is 'ten'", "a whole number"),
        ("alpha=half", "alpha is 'half'", "a number"),
        ("alpha=true", "alpha is True", "a number"),
        ("optim=3", "optim is 3", "a table"),
        ("method=dino", "method.name is None", "moco, swav, dino"),
        ("method.name=byol", "method.name is 'byol'", "moco, swav, dino"),
        ("method.name=[1]", "method.name is [1]", "moco, swav, dino"),
        ("method.outputs=many", "method.outputs is 'many'", "a whole number"),
        ("optim.name=adam", "optim.name is 'adam'", '"lars", "adamw", "sgd"'),
        ("compute.precision=fp8", "compute.precision is 'fp8'", '"fp32", "bf16"'),
        ("compute.compile=1", "compute.compile is 1", "true or false"),
        ("backbone.name=3", "backbone.name is 3", "a text"),
        ("views.local_size=big", "views.local_size is 'big'", 'a whole number or "matched"'),
        ("views.local_size=true", "views.local_size is True", 'a whole number or "matched"'),
        ("views.global_scale=[0.3]", "views.global_scale is [0.3]", "a list of 2 numbers"),
        ("views.global_scale=['a', 1]", "views.global_scale is ['a', 1]", "a list of 2 numbers"),
        ("views.photometric.blur_probability=0.5", "views.photometric.blur_probability is 0.5", "a list of 3 numbers"),
        ("data.shrink_to=1.5", "data.shrink_to is 1.5", "a whole number"),
    ],
)
def test_a_wrong_type_is_refused_with_its_path_and_what_is_accepted(override, path, accepted):
    message = error_of(override)
    assert path in message
    assert accepted in message


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("epochs=0", "epochs is 0"),
        ("alpha=1.1", "alpha is 1.1"),
        ("alpha=nan", "alpha is nan"),
        ("seed=-1", "seed is -1"),
        ("optim.base_lr=-0.1", "optim.base_lr is -0.1"),
        ("optim.final_lr=nan", "optim.final_lr is nan"),
        ("optim.momentum=2", "optim.momentum is 2.0"),
        ("optim.final_weight_decay=-1", "optim.final_weight_decay is -1.0"),
        ("method.outputs=0", "method.outputs is 0"),
        ("method.teacher_temperature=0", "method.teacher_temperature is 0.0"),
        ("method.momentum=5", "method.momentum is 5.0"),
        ("backbone.drop_path=1", "backbone.drop_path is 1.0"),
        ("data.batch_size=0", "data.batch_size is 0"),
        ("data.max_bad_fraction=1", "data.max_bad_fraction is 1.0"),
        ("data.shrink_to=0", "data.shrink_to is 0"),
        ("views.num_locals=-1", "views.num_locals is -1"),
        ("views.global_size=0", "views.global_size is 0"),
        ("views.local_scale=[0.5, 0.1]", "views.local_scale is (0.5, 0.1)"),
        ("views.photometric.hue=0.6", "views.photometric.hue is 0.6"),
        ("monitor.log_every_steps=0", "monitor.log_every_steps"),
        ("monitor.quality_images=1", "monitor.quality_images is 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_path(override, path):
    assert path in error_of(override)


def test_two_warmups_are_refused():
    assert "give one of them" in error_of("optim.warmup_steps=3")


@pytest.mark.parametrize("override", ["epochs", "=3", ".a=3", "a..b=3", ""])
def test_an_override_without_key_or_value_is_refused(override):
    assert f"--set {override}: wanted key=value" in error_of(override)


def test_an_override_below_a_value_is_refused():
    assert "local_size is a value, not a table" in error_of("views.local_size.x=3")


@pytest.mark.parametrize("missing", ["method", "data", "data.batch_size"])
def test_what_has_no_default_must_be_there(missing):
    tree = {"method": {"name": "moco"}, "data": {"batch_size": 8, "shrink_to": 40}}
    *parents, last = missing.split(".")
    (tree[parents[0]] if parents else tree).pop(last)
    with pytest.raises(UserError, match=f"^recipe: {missing} is missing$"):
        recipe_from_dict(tree)


def test_a_recipe_that_is_nowhere_is_refused_with_the_names_there_are():
    message = error_of(recipe="dino-resnet50-matched")
    assert "'dino-resnet50-matched'" in message
    assert all(name in message for name in recipe_names())


@pytest.mark.parametrize("content", [b"epochs = = 3", b"\xff\xfe\x00", b'epochs = "3', b"epochs: 3"])
def test_a_file_that_is_no_toml_is_refused(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert "bad.toml: not TOML" in error_of(recipe=str(path))
