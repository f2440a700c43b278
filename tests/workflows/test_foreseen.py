"""What can be known before any step begins is said then: of a recipe, and of this machine."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.vllm import VLLMConfig
from captioner.styles import SHORT, Style
from infra import capacity, device, storage
from infra.cluster import CLUSTERS, laptop
from infra.config import to_dict
from t2i.conditions.encoders import TextEncoderConfig
from t2i.tokenizers.vqgan import VQGANConfig
from tests.captioner.backends import server, tiny
from workflows.__main__ import main
from workflows.encode_text import EncodeTextConfig
from workflows.foreseen import check_captions, lacks, unread
from workflows.mix import READ, MixConfig, weights_of
from workflows.options import WORK, recipe_options, step_options
from workflows.recaption import RecaptionConfig
from workflows.recipes import demo, own
from workflows.text_to_image import STEPS, Recipe
from workflows.train_captioner import TrainCaptionerConfig

T5 = TextEncoderConfig(model="/no/t5")
ALL = [work.name for work in STEPS]


@pytest.fixture
def endpoint():
    """A server of captions."""
    served = server.Endpoint(lambda body, number: server.completion("a caption"))
    yield served
    with contextlib.suppress(OSError):
        served.close()


def with_(recipe: Recipe, part: str, **fields) -> Recipe:
    return replace(recipe, **{part: replace(getattr(recipe, part), **fields)})


def by(model) -> Recipe:
    """The demo, captioned by somebody else's model."""
    return replace(demo(), captioner=TrainCaptionerConfig(model=model, base=None, styles=()))


@pytest.mark.parametrize("size", [(36, 32), (32, 12)])
def test_sizes_that_are_no_whole_patches(size):
    with pytest.raises(ValueError, match=f"Images of {size[0]}x{size[1]} .* patches of 8 pixels.* such as"):
        with_(demo(), "corpus", image_size=size)
    with pytest.raises(ValueError, match="patches of 8 pixels"):
        with_(demo(), "corpus", image_size=None, buckets=((64, 32), size))
    with pytest.raises(ValueError, match=r"give corpus\.image_size"):
        with_(demo(), "corpus", image_size=None)


def test_the_patches_of_a_pyramid():
    assert VQGANConfig(multipliers=(1, 1, 2)).grid((32, 64)) == (8, 16)
    with pytest.raises(ValueError, match=r"patches of 64 pixels: .* such as 64x64"):
        with_(demo(), "tokenizer", model=VQGANConfig(multipliers=(1,) * 7))


STYLES = (SHORT, Style(name="loud", prompt="Shout."))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (with_(demo(), "mix", weights={"alt": 0.5, "loud": 0.5}), "mix.weights .* 'loud', which nobody writes"),
        (with_(demo(), "captions", styles=(SHORT,)), "mix.weights .* 'descriptive'"),
        (replace(demo(), captioner=None, captions=None), "'descriptive', which nobody writes; there are alt. "),
        (with_(demo(), "captioner", styles=()), "captions.styles is empty"),
        (by("Salesforce/blip-image-captioning-base"), "tuned for none, and captions.styles is empty"),
        (replace(demo(), text_features=(EncodeTextConfig(encoder=T5, styles=("loud",)),)), "text_features.0.styles "),
        (with_(by(VLLMConfig(model="m")), "captions", styles=(SHORT,)), "Style 'short' has no prompt"),
        (with_(by(VLLMConfig(model="m")), "captions", clip="c"), "only names a model"),
    ],
)  # fmt: skip
def test_styles_that_nobody_writes(recipe, said):
    with pytest.raises(ValueError, match=said):
        check_captions(recipe)


def test_styles_that_somebody_writes():
    check_captions(
        with_(with_(demo(), "captions", styles=STYLES), "mix", weights={"loud": 0.5, "alt": 0.5, "gone": 0.0})
    )
    check_captions(by(TransformersConfig(model="owner/name")))
    check_captions(replace(demo(), captioner=None, captions=None, mix=replace(demo().mix, weights={"alt": 1.0})))


def test_blip_as_it_was_published_is_asked_for_one_style(tmp_path):
    recipe = own("corpus", tiny.blip(tmp_path / "blip"))
    assert recipe.captions == RecaptionConfig(styles=(SHORT,))
    assert set(recipe.mix.weights) == {"alt", "short"}


def test_styles_of_what_is_there(tmp_path):
    """Of captions and of captioners by their paths."""

    def made(step, **manifest):
        storage.write_json(f"{tmp_path}/{step}/manifest.json", {"step": step, "id": step, "inputs": []} | manifest)
        return f"{tmp_path}/{step}"

    captions = made("recaption", config={}, summary={"styles": [{"name": "loud"}]})
    with pytest.raises(ValueError, match="'descriptive', which nobody writes; there are alt, loud"):
        check_captions(replace(demo(), captioner=None, captions=captions))
    trained = made("train_captioner", config=to_dict(with_(demo(), "captioner", styles=STYLES).captioner), summary={})
    with pytest.raises(ValueError, match="'descriptive', which nobody writes; there are alt, short, loud"):
        check_captions(replace(demo(), captioner=trained))
    check_captions(replace(demo(), captioner=f"{tmp_path}/none"))  # the plan says that it is not there


def captions_of(folder, *styles) -> str:
    """What stands where captions of these styles were made."""
    manifest = {"step": "recaption", "id": "0" * 16, "inputs": [], "config": {}, "started": ""}
    told = {"styles": [{"name": style} for style in styles]}
    storage.write_json(f"{folder}/recaption/{'0' * 16}/manifest.json", manifest | {"summary": told})
    return str(folder)


OWN = ["own", "--corpus", "pictures"]


def read(line) -> dict[str, float]:
    recipe = recipe_options(line, "plan").recipe
    check_captions(recipe)
    return recipe.mix.weights


def test_captions_that_are_given_are_read(tmp_path):
    one, two = captions_of(tmp_path / "one", "short"), captions_of(tmp_path / "two", "short", "descriptive")
    loud = captions_of(tmp_path / "loud", "loud")
    assert read(OWN) == {"alt": 1.0}
    assert read([*OWN, "--captions", two]) == READ
    assert read([*OWN, "--captions", one]) == {"alt": 0.05, "short": 0.95}
    assert read([*OWN, "--captions", loud]) == {"alt": 0.05, "loud": 0.95}
    assert read(["demo", "--captions", two]) == demo().mix.weights, "which read some of them already"
    assert read(["demo", "--captions", one]) == {"alt": 0.05, "short": 0.95}
    assert read([*OWN, "--captions", two, "--mix.weights.short", "0.75", "--mix.weights.descriptive", "0.2"]) == {
        "alt": 0.05,
        "short": 0.75,
        "descriptive": 0.2,
    }


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.sampled_from([{}, READ, {"alt": 1.0}, {"short": 1}]))
def test_weights_of_any_styles_can_be_read(styles, weights):
    styles = [style for style in styles if style != "alt"] or ["short"]
    found = MixConfig(weights=weights_of(styles, weights)).weights
    assert {*found} <= {*styles, *weights, "alt"}
    assert any(found.get(style, 0) > 0 for style in styles)


def test_weights_on_the_line(tmp_path):
    line = [*OWN, "--captions", captions_of(tmp_path, "short")]
    assert read([*line, "--mix.weights", "short=1", "--mix.min-words", "2"]) == {"short": 1.0}
    assert read([*line, "--mix.weights", "short=0.5", "alt=0.5"]) == {"short": 0.5, "alt": 0.5}
    options = step_options(WORK["mix"], ["--images", "i", "--captions", "c", "--weights", "short=1"])
    assert options.config.weights == {"short": 1.0}
    options = step_options(WORK["mix"], ["--images", "i", "--captions", "c", "--min_match", "short=0.5"])
    assert options.config.min_match == {"short": 0.5}
    with pytest.raises(ValueError, match=r"mix.weights: expected a number after short=, found 'much'"):
        read([*line, "--mix.weights", "short=much"])


def test_captions_that_nobody_reads(tmp_path, capsys):
    line = [*OWN, "--captions", captions_of(tmp_path, "short")]
    assert unread(recipe_options(line, "plan").recipe) == unread(recipe_options(OWN, "plan").recipe) == []
    (said,) = unread(recipe_options([*line, "--mix.weights", "alt=1"], "plan").recipe)
    assert said.startswith("mix.weights reads none of the captions (short), only alt. ")
    assert said.endswith("--mix.weights alt=0.05 short=0.95")


@pytest.mark.parametrize(
    ("recipe", "field", "step"),
    [
        (by("/no/blip"), "captioner.model", "train_captioner"),
        (by(TransformersConfig(model="./no-llava")), "captioner.model.model", "recaption"),
        (with_(demo(), "captions", clip="no/clip/"), "captions.clip", "recaption"),
        (with_(demo(), "captions", matcher="~/no-blip"), "captions.matcher", "recaption"),
        (
            replace(demo(), text_features=(EncodeTextConfig(encoder=T5),)),
            "text_features.0.encoder.model",
            "encode_text",
        ),
    ],
)
def test_a_folder_of_weights_that_is_not_there(recipe, field, step):
    (said,) = lacks(recipe, laptop(), [step])
    assert said.startswith(f"{field} is ")
    assert lacks(recipe, laptop(), ["evaluate"]) == lacks(recipe, laptop(), []) == [], "who loads it is done"


def test_names_that_may_be_a_hubs_and_what_a_server_calls_its_own(endpoint):
    served = EndpointConfig(base_url=endpoint.url, model="/models/theirs")
    assert lacks(by(served), laptop(), ALL) == []
    assert lacks(by("owner/name"), laptop(), ALL) == []


def test_a_server_is_asked_whether_it_is_there_before_anything_is_made(endpoint, monkeypatch):
    served = by(EndpointConfig(base_url=endpoint.url, model="m"))
    endpoint.models_status = 401
    assert lacks(served, laptop(), ALL) == [f"{endpoint.url} does not take requests without a key: HTTP 401."]
    keyed = by(EndpointConfig(base_url=endpoint.url, model="m", key_variable="NO_KEY_HERE"))
    (said,) = lacks(keyed, laptop(), ALL)
    assert "NO_KEY_HERE holds no key" in said
    endpoint.close()
    (said,) = lacks(served, laptop(), ALL)
    assert said.startswith(f"Nobody answers at {endpoint.url}: ")
    assert lacks(served, laptop(), ["mix"]) == [], "all is captioned"
    assert lacks(served, replace(laptop(), address="auto"), ALL) == [], "the cluster's nodes may reach it"
    assert not endpoint.bodies, "no caption was asked for"


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"data": [{"id": "llava-7b"}, {"id": "qwen2-vl"}]}, "it lists qwen2-vl, llava-7b. If"),
        ({"data": [{"id": f"model-{n}"} for n in range(12)]}, " and 2 more. If"),
        ({"data": [{"id": "llava-7b"}, {"id": "qwen"}]}, ""),
        ({"data": []}, ""),
        ({"data": [{"name": "llava-7b"}, 3]}, ""),
        ([], ""),
        (b"no JSON", ""),
    ],
)
def test_a_model_that_a_server_does_not_list(endpoint, capsys, models, said):
    endpoint.models = models
    assert lacks(by(EndpointConfig(base_url=endpoint.url, model="qwen")), laptop(), ALL) == [], "it may be an alias"
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith(f"{endpoint.url} does not list the model 'qwen'; " if said else "")
    assert bool(told) == bool(said)


def test_vllm_that_is_not_installed(monkeypatch):
    recipe = by(VLLMConfig(model="owner/name"))
    monkeypatch.setattr(capacity.importlib.util, "find_spec", lambda name: None)
    assert "vLLM is not installed" in " ".join(lacks(recipe, laptop(), ALL))
    assert lacks(recipe, laptop(), ["mix"]) == []
    assert lacks(recipe, replace(laptop(), address="auto"), ALL) == [], "the cluster's nodes may have it"


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_gpus_that_this_machine_can_never_give(gpus, monkeypatch):
    monkeypatch.setattr(device, "count", lambda: gpus)
    monkeypatch.setattr(capacity, "logical_cpus", lambda: 64)
    told = lacks(demo(), CLUSTERS["one_node"](), ALL)
    assert len(told) == (gpus < 8)
    assert all(f"64 logical CPUs and {gpus} GPUs" in each and "8 training workers" in each for each in told)
    assert bool(lacks(demo(), CLUSTERS["one_gpu"](), ["recaption"])) == (not gpus)
    assert lacks(demo(), CLUSTERS["one_node"](), ["mix"]) == [], "which needs none"
    assert lacks(demo(), CLUSTERS["elastic"](), ALL) == [], "its nodes may come"


def test_plan_says_it_and_run_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "count", lambda: 0)
    line = ["demo", "--cluster", "one_node", "--store", str(tmp_path / "store"), "--json"]
    main(["plan", *line])
    told = capsys.readouterr()
    assert "`run` would refuse: This machine" in told.err
    results = json.loads(told.out.splitlines()[-1])
    assert len(results["steps"]) == len(STEPS)
    assert "8 training workers" in results["lacks"][0]
    with pytest.raises(SystemExit):
        main(["run", *line])
    assert "8 training workers" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_recipes_file_names_its_field(tmp_path, capsys):
    main(["show", "demo"])
    recipe = json.loads(capsys.readouterr().out)
    recipe["prior"]["train"]["steps"] = "many"
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "mine.json")])
    assert 'mine.json: prior.train.steps: expected a whole number, found "many"' in capsys.readouterr().err


def test_a_plan_names_what_is_given_and_what_only_is_named(tmp_path, capsys):
    def told(*line) -> dict[str, str]:
        main(["plan", *line, "--store", str(tmp_path / "store")])
        return {each.split()[0]: each for each in capsys.readouterr().out.splitlines()}

    assert told("debug", "--captioner", "http://localhost:1/v1", "--model", "m")["nothing"].endswith(
        "nothing is trained: m is only named"
    )
    store, identity = str(tmp_path / "store"), "1" * 16
    manifest = {
        "step": "mix",
        "id": identity,
        "version": 2,
        "config": to_dict(MixConfig()),
        "inputs": [],
        "started": "",
    }
    storage.write_json(f"{store}/mix/{identity}/manifest.json", manifest | {"summary": {}})
    assert "RUN: weights.alt 0.1 -> 0.05" in told("debug")["mix"]
    storage.write_json(f"{store}/names/theirs.json", {"name": "theirs", "artifacts": [f"mix/{identity}"]})
    assert told("debug")["mix"].endswith("RUN: first time"), "another run made it"
    given = captions_of(tmp_path / "told", "descriptive")
    same = manifest | {"config": to_dict(demo().mix), "summary": {}}
    storage.write_json(f"{store}/mix/{identity}/manifest.json", same)
    storage.write_json(f"{store}/names/debug.json", {"name": "debug", "artifacts": [f"mix/{identity}"]})
    assert told("debug", "--captions", given)["mix"].endswith("RUN: new input: ingest, recaption")
