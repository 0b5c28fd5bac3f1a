from pathlib import Path

import pytest
from pydantic import BaseModel

from flows.config import ConfigRejected, OptimizeConfig, Settings, load_settings, override
from registry.gate import GateSettings
from tasks.steps import DistillConfig
from tasks.variants import VARIANTS, Recipe


def write(folder: Path, text: str) -> Path:
    path = folder / "thorforge.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_config_is_read_from_the_working_folder_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings() == Settings()
    write(
        tmp_path, '[optimize]\ncorpus = "my.jsonl"\nvariants = ["fp32-onnx"]\n[optimize.gate]\nmax_task_loss = 0.02\n'
    )
    found = load_settings().optimize
    assert (found.corpus, found.variants, found.gate.max_task_loss) == ("my.jsonl", ("fp32-onnx",), 0.02)
    assert found.gate.cosine_mean_pass == GateSettings().cosine_mean_pass


BAD: dict[str, tuple[str, str]] = {
    "unknown key": ("[optimize]\ncorpsu = 'x'", r"optimize\.corpsu: unknown key \(did you mean corpus\?\)"),
    "unknown section": ("[optimise]\nmodel = 'x'", r"optimise: unknown key \(did you mean optimize\?\)"),
    "unknown gate key": (
        "[optimize.gate]\ncosine_mean = 1",
        r"cosine_mean: unknown .*did you mean cosine_mean_\w+\?",
    ),
    "key like nothing": ("[optimize]\nzzz = 1", r"optimize\.zzz: unknown key$"),
    "wrong type": ("[optimize]\ncalibration_size = 'many'", r"optimize\.calibration_size: .*valid integer"),
    "out of range": ("[optimize]\ncalibration_size = 0", r"calibration_size: .*greater than or equal to 1"),
    "unknown variant": ("[optimize]\nvariants = ['int4']", r"'int4' is no variant: known are fp32-onnx, fp16"),
    "recipe without a budget": (
        "[[optimize.recipe]]\nname = 'a'\nbuild = 'fp32-onnx'\nsteps = [{kind = 'distill', depth = 3, max_minutes=0}]",
        r"optimize\.recipe\.0\.steps\.0.*max_minutes: .*greater than 0",
    ),
    "recipe that prunes everything": (
        "[[optimize.recipe]]\nname = 'a'\nbuild = 'fp32-onnx'\nsteps = [{kind = 'prune', ratio = 1.0}]",
        r"optimize\.recipe\.0\.steps\.0\.prune\.ratio: .*less than 1",
    ),
    "recipe of a name that is taken": (
        "[[optimize.recipe]]\nname = 'int8-static'\nbuild = 'fp32-onnx'\nsteps = []",
        "a recipe is called 'int8-static', as another variant is",
    ),
    "calibration method of a build that has none": (
        "[[optimize.recipe]]\nname = 'a'\nbuild = 'int8-openvino'\ncalibration = 'entropy'",
        "calibration 'entropy' is a setting of int8-static and int8-tensorrt, not of int8-openvino",
    ),
    "unknown calibration method": (
        "[[optimize.recipe]]\nname = 'a'\nbuild = 'int8-static'\ncalibration = 'max'",
        r"optimize\.recipe\.0\.calibration: .*'minmax', 'percentile' or 'entropy'",
    ),
    "no variants": ("[optimize]\nvariants = []", r"optimize\.variants: .*at least 1 item"),
    "variant twice": (
        "[optimize]\nvariants = ['fp32-onnx', 'fp32-onnx']",
        r"optimize\.variants: .*'fp32-onnx' is named twice",
    ),
    "bad name": ("[optimize]\nname = '../evil'", r"optimize\.name: .*is not a name"),
    "limits crossed": ("[optimize.gate]\ncosine_mean_caution = 0.995", "cosine_mean_caution 0.995 is above"),
    "nan limit": ("[optimize.gate]\nmax_task_loss = nan", "max_task_loss: .*finite"),
    "bad limit of a model": ("[optimize.gate.models.minilm]\nmax_loss = 1", r"models\.minilm: max_loss: unknown key"),
    "not TOML": ("[optimize\n", r"thorforge\.toml is not TOML"),
}


def test_config_recipe_is_a_variant_like_any_other(tmp_path: Path) -> None:
    text = """
        optimize.variants = ["student3-fp32", "mine"]
        [[optimize.recipe]]
        name = "mine"
        build = "int8-openvino"
        steps = [{ kind = "distill", depth = 2, epochs = 1 }]
    """
    known, mine = load_settings(write(tmp_path, text)).optimize.recipes()
    assert known == VARIANTS["student3-fp32"]
    assert (mine.name, mine.runtime, mine.precision, mine.is_calibrated) == ("mine", "openvino", "int8", True)
    assert mine.steps == (DistillConfig(depth=2, epochs=1),)


@pytest.mark.parametrize("case", BAD)
def test_config_fault_is_named(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    with pytest.raises(ConfigRejected, match=message) as caught:
        load_settings(write(tmp_path, text))
    assert "thorforge.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_that_is_not_text_or_not_there_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigRejected, match="is not TOML"):
        load_settings(path)
    with pytest.raises(ConfigRejected, match=r"settings file .*none\.toml does not exist"):
        load_settings(tmp_path / "none.toml")
    with pytest.raises(ConfigRejected, match="cannot be read"):
        load_settings(tmp_path)


def test_config_registry_section_of_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "[registry]\nmax_bundle_bytes = 5")
    with pytest.raises(ConfigRejected, match=r"\[registry\] counts in thorforge.toml of the working folder alone"):
        load_settings(path)
    monkeypatch.chdir(tmp_path)
    assert load_settings(path).registry.max_bundle_bytes == 5
    write(tmp_path, "[registry]\nmax_bundle_byte = 5")
    with pytest.raises(ConfigRejected, match=r"max_bundle_byte: unknown key \(did you mean max_bundle_bytes\?\)"):
        load_settings()


def test_override_takes_only_what_is_given_and_checks_it() -> None:
    config = OptimizeConfig(corpus="a.txt", gate=GateSettings(max_task_loss=0.5))
    changed = override(config, corpus=None, model="hf:x/y", variants=("fp32-onnx",), calibration_size=7)
    assert changed == config.model_copy(update={"model": "hf:x/y", "variants": ("fp32-onnx",), "calibration_size": 7})
    with pytest.raises(ConfigRejected, match=r"the command line: optimize\.calibration_size"):
        override(config, calibration_size=-1)


def test_override_leaves_defaults_what_they_are() -> None:
    """Default variants that do not fit a model are set aside, those that somebody named are refused."""
    assert override(OptimizeConfig(corpus="a.txt"), model="hf:x/y").model_fields_set == {"corpus", "model"}
    recipe = Recipe(name="mine", build="fp32-onnx", steps=(DistillConfig(depth=3),))
    assert override(OptimizeConfig(recipe=(recipe,)), variants=("mine",)).recipe == (recipe,)


@pytest.mark.parametrize("model", [OptimizeConfig])
def test_config_every_setting_says_what_it_is(model: type[BaseModel]) -> None:
    for name, setting in model.model_fields.items():
        assert setting.description, name
        assert setting.description[-1] != ".", name
