"""Configurations: layers, errors that name the key, and the trip through YAML."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from mae_et.config import (
    ConfigError,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    SearchConfig,
    checked_keys,
    differences,
    dump_config,
    load_config,
    task_of,
)

SCHEMAS = [PretrainConfig, FinetuneConfig, ProbeConfig, SearchConfig]


def write(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_layers_override_each_other(tmp_path):
    path = write(tmp_path, "epochs: 10\noptim: {batch: 64}\ndata: {root: /a, size: [32, 64]}\n")
    config = load_config(path, ["optim.batch=128", "data.mean=[0.5]", "target.kind=pixel"])
    assert (config.epochs, config.optim.batch, config.data.root, config.data.size) == (10, 128, "/a", [32, 64])
    assert (config.data.mean, config.target.kind, config.mask_ratio) == ([0.5], "pixel", 0.75)
    assert config.run == "runs/recipe"


def test_defaults_are_the_papers_run():
    config = load_config(None)
    peak = config.optim.base_lr * config.optim.batch / 256
    assert (config.epochs, config.mask_ratio, config.optim.batch, peak) == (400, 0.75, 4096, pytest.approx(2.4e-3))
    assert (config.optim.betas, config.optim.weight_decay, config.optim.warmup) == ([0.9, 0.95], 0.05, 0.1)
    assert (config.target.kind, config.curriculum.preset, config.data.scale) == ("hog", "efficienttrain_pp", [0.2, 1])


def test_yaml_round_trip(tmp_path):
    stages = "curriculum.stages=[{end: 0.5, bandwidth: 96}, {end: 1, bandwidth: [96, 192]}]"
    config = load_config(None, ["run=x", stages])
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert differences(config, again) == []
    again.optim.batch = 8
    assert differences(config, again) == ["optim.batch: 4096 -> 8"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.base_lrr=1", "unknown key 'optim.base_lrr'; did you mean 'optim.base_lr'?"),
        ("epoch=5", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("mask_ration=0.5", "did you mean 'mask_ratio'?"),
        ("model.patchsize=16", "did you mean 'model.patch_size'?"),
        ("optim.batch=many", "optim.batch"),
        ("optim.batch=1.5", "optim.batch"),
        ("data.flip=perhaps", "data.flip"),
        ("optim=5", "optim"),
        ("target.kind=hogg", "target.kind='hogg' is not one of hog, pixel, norm_pixel; did you mean 'hog'?"),
        ("engine.precision=bfloat", "engine.precision='bfloat' is not one of"),
        ("epochs=-5", "epochs=-5.0 is out of range: it must be above 0"),
        ("epochs=inf", "epochs=inf is out of range"),
        ("optim.base_lr=nan", "optim.base_lr=nan is out of range"),
        ("mask_ratio=1", "mask_ratio=1.0 is out of range: it must be at least 0 and at most"),
        ("evaluation.every=0", "evaluation.every=0.0 is out of range"),
        ("saving.keep=0", "saving.keep=0 is out of range: it must be at least 1"),
        ("seed=-1", "seed=-1 is out of range"),
        ("data.scale=[0.2]", "data.scale=[0.2] must be two positive numbers"),
        ("data.ratio=[0.5,nan]", "data.ratio=[0.5, nan] must be two positive numbers"),
        ("optim.batch", "override 'optim.batch' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
    ],
)
def test_bad_values_name_the_key(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no config file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"recipe\.yaml cannot be read as YAML"):
        load_config(write(tmp_path, "epochs: [1, 2\n"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml must hold keys and values"):
        load_config(write(tmp_path, "- 1\n- 2\n"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key 'optm\.batch'; did you mean 'optim\.batch'\?"):
        load_config(write(tmp_path, "optm: {batch: 5}\n"))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_check_names_a_key_that_exists_and_defaults_pass(schema):
    found = checked_keys(schema)
    assert len(found["RANGES"]) > 12
    for key in (key for keys in found.values() for key in keys):
        node = schema()
        for part in key.split("."):
            node = getattr(node, part)
    assert load_config(None, schema=schema).task == schema().task


@pytest.mark.parametrize(
    ("schema", "key"), [(schema, key) for schema in SCHEMAS for key in checked_keys(schema)["RANGES"]]
)
@pytest.mark.parametrize("value", [math.inf, math.nan, -1])
def test_no_number_may_be_negative_or_not_finite(schema, key, value):
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        load_config(None, [f"{key}={value}"], schema)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_round_trip_of_every_kind(tmp_path, schema):
    data = [] if schema is SearchConfig else ["data=cifar100"]
    config = load_config(None, ["run=x", *data, "seed=7"], schema)
    assert load_config(write(tmp_path, dump_config(config)), schema=schema) == config


def test_a_file_for_another_kind_of_run_is_refused(tmp_path):
    path = write(tmp_path, "task: finetune\nepochs: 3\n")
    assert (task_of(path), task_of(write(tmp_path / "..", "epochs: 3\n"))) == ("finetune", "pretrain")
    with pytest.raises(ConfigError, match="configures a finetune run, and this is for pretrain runs"):
        load_config(path)
    assert load_config(path, schema=FinetuneConfig).epochs == 3


def test_data_in_one_word(tmp_path):
    def data(word: str):
        found = load_config(None, [f"data={word}"], FinetuneConfig).data
        return found.source, found.root

    assert data("flowers102") == ("flowers102", None)
    assert data("/photos") == ("folder", "/photos")
    assert data("lists/train.txt") == ("list", "lists/train.txt")
    with pytest.raises(ConfigError, match=r"data='cifar' is not one of .*; did you mean 'cifar10"):
        data("cifar")


def test_model_and_curriculum_in_one_word():
    config = load_config(None, ["model=timm/resnet50", "curriculum=efficienttrain_pp"], FinetuneConfig)
    assert (config.model.name, config.curriculum.preset) == ("timm/resnet50", "efficienttrain_pp")
    with pytest.raises(ConfigError, match="'vit_bas' is not one of"):
        load_config(None, ["model=vit_bas"])


def test_free_form_keys():
    config = load_config(None, ["model.arguments={depths: [1, 1]}", "model.arguments.patch_size=1"], FinetuneConfig)
    assert config.model.arguments == {"depths": [1, 1], "patch_size": 1}


@pytest.mark.parametrize("command", [["pretrain.py"], ["-m", "mae_et", "plan"]])
def test_a_typo_exits_with_2_and_one_line(repository, command):
    recipe = repository / "configs" / "pretrain" / "demo.yaml"
    line = [sys.executable, *command, "--config", str(recipe), "optim.batchh=8"]
    done = subprocess.run(line, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: optim.batchh=8: unknown key 'optim.batchh'; did you mean 'optim.batch'?"


def test_the_schedule_named_last_counts(tmp_path):
    own = write(tmp_path, "curriculum: {stages: [{end: 1, bandwidth: 16}]}\n")
    assert load_config(own).curriculum.stages is not None
    named = load_config(own, ["curriculum=linear"]).curriculum
    assert (named.preset, named.stages) == ("linear", None)
    grown = load_config(own, ["curriculum.growth.first=4"]).curriculum
    assert (grown.growth.first, grown.stages) == (4, None)
    assert load_config(own, ["curriculum.growth.first=4", "curriculum=baseline"]).curriculum.growth.first is None
    assert load_config(None, ["curriculum=linear", f"curriculum={own}"]).curriculum.stages is not None
    assert load_config(own, ["curriculum.early_large_batch=true"]).curriculum.stages is not None
