import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from captioner.backends.loading import load
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.protocol import CaptionError
from captioner.styles import Style
from tests.captioner.backends import tiny

pytestmark = pytest.mark.family("folder")
SHORT = Style(name="short", prompt="what is on the small dot", max_tokens=9, min_tokens=3)
ABOUT = Style(name="about", prompt="question : what ?[ a user : {alt} .] answer :", max_tokens=7)
ALTS = ["red circle", None, "the large green square on the small blue dot", "a", "", "blue"]
FAMILIES = {"llava": tiny.llava, "blip2": tiny.blip2, "florence2": tiny.florence2}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, quiet):
    made = {}

    def get(family):
        if family not in made:
            made[family] = FAMILIES[family](tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(params=list(FAMILIES))
def folder(request, folders):
    return folders(request.param)


@pytest.fixture
def images():
    draw = np.random.default_rng(3)
    sizes = [(16, 16), (9, 30), (40, 12), (1, 1), (17, 16), (16, 16)]
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def build(folder, styles=(SHORT, ABOUT), **options):
    config = TransformersConfig(model=folder, **options)
    config.check(styles)
    return config.build(styles, "cpu", "fp32", 1)


def test_together_as_alone(folder, images):
    """Prompts of many lengths and pictures of many shapes: padding must not be heard."""
    together = build(folder).caption(images, ALTS)
    backend = build(folder, batch=1)
    alone = [backend.caption([image], [alt]) for image, alt in zip(images, ALTS, strict=True)]
    for style in range(2):
        assert together[style] == [said[style][0] for said in alone]
        assert all(isinstance(text, str) for text in together[style])
        assert len(set(together[style])) > 1, "these models have to say different things of different pictures"


def test_batches_of_any_size_say_the_same(folder, images):
    assert build(folder, batch=4).caption(images, ALTS) == build(folder).caption(images, ALTS)


def test_as_the_library_by_hand(folder, images):
    """The oracle: processor, generate and decode as the model's own documentation has them, one picture at a time."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    family = model.config.model_type
    text = {
        "llava": "USER: <image> what is on the small dot ASSISTANT:",
        "blip-2": SHORT.prompt,
        "florence2": SHORT.prompt,
    }[family]
    said = build(folder).caption(images, ALTS)[0]
    for image, found in zip(images, said, strict=True):
        inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=9, min_new_tokens=3, do_sample=False, num_beams=1)[0]
        new = tokens if family == "florence2" else tokens[inputs["input_ids"].shape[1] :]
        assert found == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert any(said)


def test_beams_and_lengths_reach_the_model(folder, images, monkeypatch):
    long = Style(name="long", prompt="what", max_tokens=12, min_tokens=12)
    beams = Style(name="beams", prompt="what", max_tokens=12, min_tokens=12, beams=3)
    backend = build(folder, (long, beams))
    generate, made = backend._model.generate, []

    def watched(**inputs):
        made.append((generate(**inputs), inputs["input_ids"].shape[1]))
        return made[-1][0]

    monkeypatch.setattr(backend._model, "generate", watched)
    greedy, searched = backend.caption(images, ALTS)
    assert greedy != searched
    opening = 1 if backend._encodes else made[0][1]  # an encoder's decoder opens with </s>, others with the prompt
    assert [tokens.shape[1] - opening for tokens, _ in made] == [12, 12]
    assert not (made[0][0][:, opening : opening + 11] == 2).any(), "no caption may end early"


def test_the_alt_text_reaches_the_model(folder, images):
    first, second = build(folder, (ABOUT,)).caption(images[:1] * 2, ["red circle", "blue square"])[0]
    assert first != second
    assert (
        build(folder, (ABOUT,)).caption(images[:1] * 2, [None, "  "])[0][0]
        == build(folder, (Style(name="about", prompt="question : what ? answer :", max_tokens=7),)).caption(
            images[:1], [None]
        )[0][0]
    )


@pytest.mark.parametrize(
    "alt", ["<image>", "a <image> <image> b", "<im<image>age>", "</s> red", "<pad>" * 3, "{alt} [x]"]
)
def test_no_alt_text_speaks_in_control_tokens(folder, images, alt):
    clean, crafted = build(folder, (ABOUT,)).caption(images[:2], ["a red dot", alt])[0]
    assert isinstance(clean, str)
    assert isinstance(crafted, str)


def test_a_model_without_chat_template_gets_its_image_token(images, tmp_path):
    folder = tiny.llava(tmp_path, chat=None)
    for style, prompt in [("short", SHORT.prompt), ("own", "user : <image> what answer :")]:
        said = build(folder, (Style(name=style, prompt=prompt, max_tokens=9),)).caption(images, ALTS)[0]
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
        text = prompt if "<image>" in prompt else f"<image>\n{prompt}"
        inputs = processor(images=Image.fromarray(images[0]), text=text, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert said[0] == processor.tokenizer.decode(new, skip_special_tokens=True)


def test_a_tokenizers_template_for_text_alone(images, tmp_path):
    folder = tiny.llava(tmp_path, chat=None)
    template = "{% for message in messages %}{{ '<s> user : ' + message['content'] }}{% endfor %} answer :"
    settings = Path(folder, "tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    backend = build(folder)
    assert backend._asked("what") == "<s> user : <image>\nwhat answer :"
    assert backend._inputs([Image.fromarray(images[0])], ["<s> <image> what"])["input_ids"].tolist()[0].count(1) == 1
    assert all(isinstance(text, str) for text in backend.caption(images, ALTS)[0])


def test_a_chat_model_has_to_be_asked(folders):
    with pytest.raises(ValueError, match=r"'silent' has no prompt"):
        build(folders("llava"), (Style(name="silent"),))
    build(folders("blip2"), (Style(name="silent"),))


def test_one_bad_row_spoils_no_other(folders, images):
    """A prompt past the model's last position would be an index error, and on a GPU the end of the process."""
    style = Style(name="echo", prompt="{alt}", max_tokens=5)
    good = build(folders("blip2"), (style,)).caption(images, ALTS)[0]
    mixed = build(folders("blip2"), (style,)).caption(images, [*ALTS[:2], "a " * 400, *ALTS[3:]])[0]
    assert isinstance(mixed[2], CaptionError)
    assert str(mixed[2]).startswith("error: ValueError: the prompt and the caption need")
    assert mixed[:2] + mixed[3:] == good[:2] + good[3:]


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_want_of_memory_makes_smaller_batches(folders, images, monkeypatch, most):
    backend = build(folders("llava"))
    expected = backend.caption(images, ALTS)
    generate, sizes = backend._model.generate, []

    def cramped(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(backend._model, "generate", cramped)
    assert backend.caption(images, ALTS) == expected
    assert sizes[-1] <= most
    assert sum(size > most for size in sizes) <= 3, "what was too much once is not tried again"


def test_a_row_for_which_memory_never_suffices(folders, images, monkeypatch):
    backend = build(folders("llava"))

    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend._model, "generate", full)
    assert {str(said).split(":")[0] for said in backend.caption(images, ALTS)[0]} == {"oom"}


def test_images_are_processed_without_torchvision(folder):
    processor, _ = load(folder, "", False, torch.float32)
    assert type(processor.image_processor).__name__.endswith("Pil")


def test_half_precision(folder, images):
    backend = TransformersConfig(model=folder).build((SHORT,), "cpu", "bf16", 1)
    assert backend._model.dtype == torch.bfloat16
    assert all(isinstance(text, str) for text in backend.caption(images, ALTS)[0])


def test_a_family_that_needs_torchvision_says_so(tmp_path):
    transformers.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    Path(tmp_path, "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    Path(tmp_path, "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"})
    )
    with pytest.raises(ValueError, match=r"needs torchvision, which is not installed; .*endpoint") as told:
        build(str(tmp_path))
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)


def test_code_of_others_is_not_run_unasked(tmp_path):
    marker = Path(tmp_path, "ran")
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    Path(tmp_path, "modeling_odd.py").write_text(code)
    entries = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForImageTextToText": "modeling_odd.Odd"}
    Path(tmp_path, "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": entries}))
    with pytest.raises(ValueError, match=r"brings Python code of its own.*trust_remote_code"):
        build(str(tmp_path))
    assert not marker.exists()
    assert TransformersConfig(model="x").trust_remote_code is False


def test_models_that_cannot_caption_are_refused(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        build(str(tmp_path / "nowhere"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"type 'bert', which does not turn an image and a text into text"):
        build(str(tmp_path / "bert"))
    transformers.BlipConfig().save_pretrained(tmp_path / "blip")
    with pytest.raises(ValueError, match="BLIP captioner, which is decoded by code of our own"):
        build(str(tmp_path / "blip"))


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.blip2(tmp_path)
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    gone = next(name for name in weights if "qformer" in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        build(folder)


@pytest.mark.parametrize("options", [{"model": ""}, {"model": "x", "batch": 0}])
def test_configs_check_themselves(options):
    with pytest.raises(ValueError, match=r"needs a model|at least 1"):
        TransformersConfig(**options)


def test_styles_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="give `styles`"):
        TransformersConfig(model="x").check(())
    with pytest.raises(ValueError, match=r"'a' sets decoder to 'short', which x cannot do"):
        TransformersConfig(model="x").check((Style(name="a", decoder="short"),))
