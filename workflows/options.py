"""The options of every command, made from the types of what it configures."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from infra import storage
from infra.cluster import CLUSTERS, Cluster, laptop, this_machine
from infra.config import FieldError, expected
from infra.store import Step
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import sampling_of
from t2i.tokenizers.published import SUFFIXES, PublishedConfig
from workflows import recipes
from workflows.asked import captioner_of
from workflows.caption_with import caption_with
from workflows.commands import check_quoted, choose
from workflows.corpora.shapes import ShapesConfig
from workflows.deduplicate import deduplicate, hash_images
from workflows.direct import DirectOptions
from workflows.encode_text import encode_text
from workflows.examine import examine
from workflows.export import ExportOptions
from workflows.foreseen import written_styles
from workflows.ingest import IngestConfig
from workflows.kinds import Recipe, read
from workflows.line import strings
from workflows.lookup import MAKERS, STORE, in_store, one
from workflows.mix import MixConfig, weights_of
from workflows.parse import parse
from workflows.rebuild import rebuild
from workflows.sample import SampleConfig, sample
from workflows.text_to_image import STEPS
from workflows.train_clip import train_clip
from workflows.train_tokenizer import MODEL, TrainTokenizerConfig
from workflows.yardstick import calibrate, measure, train_extractor

BRIEF = ("max-requests", "max-tokens", "token-prices")  # fields of the cluster that are options by themselves
FURTHER = (encode_text, train_clip, hash_images, deduplicate, examine, train_extractor, calibrate, measure, rebuild)
WORK: dict[str, Step] = {work.name: work for work in (*STEPS, *FURTHER)}
OLDER: dict[str, Step] = {caption_with.name: caption_with}  # steps of before, whose artifacts can be retried
_FLAT = tyro.conf.arg(name="")  # its fields are options of the command itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Any field of the recipe is an option; what is not said stays as the recipe has it."""

    recipe: Recipe
    store: str = STORE  # folder or s3:// address of all artifacts
    cluster: Cluster = dataclasses.field(default_factory=laptop)
    json: bool = False  # the results as one JSON object, last on standard output


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):  # noqa: D101 -- its base's
    __doc__ = RecipeOptions.__doc__

    probe: bool = False  # run a piece of each step here, and tell what all of it takes
    probe_steps: int = 40  # of each training, that are run
    probe_rows: int = 1000  # of a shard, likewise
    price: float = 0.0  # of an hour of this machine, in your money


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedOptions(DirectOptions):  # noqa: D101 -- its base's
    __doc__ = DirectOptions.__doc__

    name: str = ""  # of this run, to be asked for by


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetryOptions:
    """Rows that failed are tried again, the others stay as they are; what comes is a new revision."""

    path: tyro.conf.Positional[str]  # folder of an artifact, or of a store in which rows of one artifact failed
    only: tuple[str, ...] = ()  # decode_error, read_error, oom, timeout, device_error, error; none: whatever failed
    cluster: Cluster = dataclasses.field(default_factory=laptop)
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryOptions:
    """Rows with their images, captions, scores and verdicts on one page."""

    path: tyro.conf.Positional[str]  # folder of captions, or of a mix, whose verdicts are shown too, or of a store
    out: str = "gallery.html"
    count: int = 500  # rows at most, evenly of those kept, rejected and failed
    seed: int = 0  # of the draw
    whole: bool = True  # also read every caption, for the habits that they have in common
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesOptions:
    """The built-in corpus as WebDataset tars."""

    out: str  # folder to write to
    shapes: Annotated[ShapesConfig, _FLAT] = dataclasses.field(default_factory=ShapesConfig)
    json: bool = False


def recipe_options(arguments: list[str], verb: str) -> RecipeOptions:
    """`NAME [--corpus PATH] [--seed N] [--cluster NAME]` and any field of the recipe, as `--prior.train.steps 100`."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"Say which recipe: rescribe {verb} {'|'.join(recipes.RECIPES)}, or a .json file of `show`.")
    check_quoted(arguments)
    name, rest, taken = arguments[0], arguments[1:], ("corpus",)
    cluster, rest = _named_cluster(rest)
    if name.endswith(".json"):
        try:
            recipe = read(storage.read_json(name))
        except FieldError as error:
            raise ValueError(f"{name}: {error}") from error
    else:
        make = choose(name, recipes.RECIPES, "recipe")
        taken = tuple(inspect.signature(make).parameters)
        given, rest = _take_parameters(make, name, rest, looks=verb in ("show", "settings"))
        recipe = make(**given)
    kind = type(recipe)
    if get_type_hints(kind).get("corpus") is IngestConfig:
        rest = _renamed(rest, "--", "--corpus.")
        rest = [re.sub(r"^--corpus(?==|$)", "--corpus.corpus", word) for word in rest]
    texts, rest = _take_texts(kind, rest)
    captioned, rest = _captioned(kind, texts, rest)
    options = _options_of(kind, PlanOptions if verb == "plan" else RecipeOptions)
    recipe = _put(recipe, texts | captioned)
    if captioned.get("captions") and "weights" not in texts.get("mix", {}):
        recipe = _reading(recipe)
    default = options(recipe=recipe, cluster=cluster)
    words = [name for name, hint in get_type_hints(kind).items() if str in get_args(hint)]
    more = [f"--{each}".replace("_", "-") for each in ("cluster", *words, *taken)]
    made = parse(options, rest, f"rescribe {verb} {name}", default, more)
    if verb not in ("show", "settings"):
        _check_said(made.recipe, verb, name)
    return made


def _reading(recipe: Any) -> Any:
    """The recipe, with captions that are there, reads styles that these have."""
    mixing = getattr(recipe, "mix", None)
    if not isinstance(mixing, MixConfig):
        return recipe
    weights = weights_of(written_styles(recipe.captions, recipe.captioner) or (), mixing.weights)
    return dataclasses.replace(recipe, mix=dataclasses.replace(mixing, weights=weights))


def _options_of(kind: type, base: type[RecipeOptions]) -> type[RecipeOptions]:
    """The options of recipes of a kind."""
    recipe = ("recipe", Annotated[kind, _FLAT])
    told = {"__doc__": RecipeOptions.__doc__}
    return dataclasses.make_dataclass("Options", [recipe], bases=(base,), frozen=True, kw_only=True, namespace=told)


def retry_options(arguments: list[str]) -> RetryOptions:
    """Of `retry`; a cluster is given by name, and its fields may be changed."""
    cluster, arguments = _named_cluster(arguments)
    default = RetryOptions(path=tyro.MISSING, cluster=cluster)
    return parse(RetryOptions, arguments, "rescribe retry", default)


def direct_options(arguments: list[str]) -> NamedOptions:
    """Of `recaption --corpus`."""
    check_quoted(arguments)
    cluster, arguments = _named_cluster(_renamed(arguments, "--corpus.", "--"))
    default = NamedOptions(corpus=tyro.MISSING, captioner=tyro.MISSING, out=tyro.MISSING, cluster=cluster)
    return parse(NamedOptions, arguments, "rescribe recaption", default)


def step_options(work: Step, arguments: list[str]) -> Any:
    """Of a step: the fields of its `config`, its inputs by name, and where the store is."""
    check_quoted(arguments)
    cluster, arguments = _named_cluster(arguments)
    hints = get_type_hints(work.work)
    config = next(iter(hints.values()))
    if config is IngestConfig:
        arguments = _renamed(arguments, "--corpus.", "--")
    texts, arguments = _take_texts(config, arguments)
    if config is SampleConfig:
        table, arguments = _take_table("--told", str, arguments)
        arguments += ["--told", *chain(*table.items())] if table else []
        texts["sampling"] = _sampling(arguments)
    fields: list[Any] = [("config", Annotated[config, _FLAT], *([config(**texts)] if texts else []))]
    known = ("tokenizer",) if work is sample else ()  # that of the prior
    fields += [(name, str, *([""] if none or name in known else [])) for name, none in work.input_names.items()]
    fields += [(name, tuple[str, ...], ()) for name in further_inputs(work)]
    fields += [("store", str, STORE), ("cluster", Cluster, cluster), ("json", bool, False)]
    if work is sample:
        fields.append(("out", str, ""))  # a folder for the pictures as files, beside the store
    if "name" not in {field.name for field in dataclasses.fields(config)}:  # it names what it makes: features
        fields.append(("name", str, ""))
    options = dataclasses.make_dataclass("Options", fields, kw_only=True, namespace={"__doc__": work.work.__doc__})
    return parse(options, arguments, f"rescribe {work.name}", more=["--cluster"])


def _sampling(arguments: list[str]) -> Any:
    """How the prior draws that is given, if it is there, by its family's defaults."""
    prior, rest = _take("--prior", arguments)
    store = _take("--store", rest)[0] or STORE
    with contextlib.suppress(OSError, ValueError):  # it is looked for again, and what is wrong is said
        return sampling_of(one(in_store(prior or "", store), MAKERS["prior"], str).url(MODEL))()
    return SamplingConfig()


def further_inputs(work: Step) -> list[str]:
    """The parameter of a step that takes any number of artifacts, if it has one."""
    return [p.name for p in inspect.signature(work.work).parameters.values() if p.kind is p.VAR_POSITIONAL]


def named_fields(arguments: list[str], before: str) -> list[str]:
    """The fields that options name after a beginning, as `top_k` after `--sampling.`."""
    words = [word.partition("=")[0] for word in arguments if word.startswith(before)]
    return [word.removeprefix(before).replace("-", "_") for word in words]


def export_options(arguments: list[str]) -> ExportOptions:
    """Of `export`."""
    cluster, arguments = _named_cluster(arguments)
    default = ExportOptions(out=tyro.MISSING, cluster=cluster)
    return parse(ExportOptions, arguments, "rescribe export", default)


def _take_parameters(
    make: Callable, name: str, arguments: list[str], looks: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a recipe's function (`--seed 1`, `--corpus PATH`), taken out of the arguments.

    Who only `looks` does without what is to be given: `<corpus>`.
    """
    given: dict[str, Any] = {}
    looks = looks or not {"-h", "--help"}.isdisjoint(arguments)
    for parameter in inspect.signature(make).parameters.values():
        value, arguments = _take(f"--{parameter.name.replace('_', '-')}", arguments)
        if value is not None:
            given[parameter.name] = _whole(parameter.name, value) if parameter.annotation is int else value
        elif parameter.default is parameter.empty and not looks:
            raise ValueError(
                f"The recipe '{name}' needs --{parameter.name}, as in: rescribe run {name} --{parameter.name} PATH."
            )
        elif parameter.default is parameter.empty:
            given[parameter.name] = f"<{parameter.name}>"
    return given, arguments


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise FieldError(expected(int, "", value), f"--{name}") from None


def _check_said(recipe: Recipe, verb: str, name: str) -> None:
    """ValueError where `show` was not told what a recipe needs, and wrote the name of it in its place."""
    for field, value in strings(recipe):
        if re.fullmatch(r"<\w+>", value):
            raise ValueError(
                f"{name} does not say {field.partition('.')[0]}: it has {value} there. Give it, as in: "
                f"rescribe {verb} {name} --{value[1:-1]} PATH."
            )


def _take_texts(kind: type, arguments: list[str], prefix: str = "--") -> tuple[dict[str, Any], list[str]]:
    """What tyro would keep as its default has it, out of the arguments, by field: texts for fields that hold either a
    text or a config (`--corpus PATH`, `--captioner.model NAME`), and tables of numbers (`--mix.weights short=1`).
    """
    texts: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        value: Any = None
        configs = [each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)]
        if str in get_args(hint) and configs:
            value, arguments = _take(prefix + name, arguments)
        if get_origin(hint) is dict and get_args(hint) == (str, float):
            value, arguments = _take_table(f"{prefix}{name}", float, arguments)
        for each in [] if value else configs:
            found, arguments = _take_texts(each, arguments, f"{prefix}{name}.")  # type: ignore[arg-type]
            value = (value or {}) | found
        texts |= {name: value} if value else {}
    return texts, arguments


def _is_number(words: Sequence[str]) -> bool:
    with contextlib.suppress(ValueError):
        return bool([float(word) for word in words])
    return False


def _take_table(flag: str, kind: type, arguments: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """A table of numbers or texts, `FLAG KEY=VALUE ...`, in the place of all that the default has."""
    flags = [word.replace("_", "-") for word in arguments]
    start = flags.index(flag.replace("_", "-")) if flag.replace("_", "-") in flags else len(flags)
    end = start + 1
    while end < len(arguments) and "=" in arguments[end] and not arguments[end].startswith("--"):
        end += 1
    if end <= start + 1:
        if kind is float and start < len(arguments) and not _is_number(arguments[end + 1 : end + 2]):  # tyro's own way
            found = repr(arguments[end]) if end < len(arguments) else "nothing"
            raise ValueError(f"{flag}: expected names with numbers, such as short=0.9 alt=0.1, found {found}.")
        return None, arguments
    table = dict[str, Any]()
    for word in arguments[start + 1 : end]:
        key, _, value = word.partition("=")
        try:
            table[key] = kind(value)
        except ValueError:
            raise ValueError(f"{flag}: expected a number after {key}=, found {value!r}.") from None
    return table, arguments[:start] + arguments[end:]


def _captioned(kind: type, texts: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What a recipe holds for `--captioner WORD [--model NAME]`, `--captions WORD` and `--tokenizer WORD`.

    `none` is nobody.
    """
    made: dict[str, Any] = {}
    if (word := texts.get("captioner")) == "none":
        made |= {name: None for name in ("captioner", "captions") if name in get_type_hints(kind)}
    elif isinstance(word, str):
        model, arguments = _take("--model", arguments)
        key, arguments = _take("--key-variable", arguments)
        made["captioner"] = captioner_of(word, model or "", key or "")
    if isinstance(word := texts.get("captions"), str):
        store = in_store(word, _take("--store", arguments)[0] or STORE)
        made["captions"] = None if word == "none" else one(store, MAKERS["captions"], str).path
    if isinstance(word := texts.get("tokenizer"), str):
        made["tokenizer"] = _tokenizer(word, _take("--store", arguments)[0] or STORE)
    return made, arguments


def _tokenizer(word: str, store: str) -> Any:
    """What a recipe holds for `--tokenizer WORD`: the path of an artifact, or the config of what others trained."""
    inside = ("config.json", "model_index.json")  # of a model of diffusers, and of a pipeline
    if word.endswith(SUFFIXES) or any(storage.exists(storage.join(word, name)) for name in inside):
        return TrainTokenizerConfig(model=PublishedConfig(path=storage.anchored(word)), train=None)
    return one(in_store(word, store), MAKERS["tokenizer"], str).path


def _put(config: Any, texts: dict[str, Any]) -> Any:
    if config is None:
        raise ValueError(f"The recipe leaves out what has the field {next(iter(texts))}.")
    now = {name: getattr(config, name) for name in texts}
    nested = {n for n, value in texts.items() if isinstance(value, dict) and not isinstance(now[n], dict)}
    chosen = {name: _put(now[name], value) if name in nested else value for name, value in texts.items()}
    return dataclasses.replace(config, **chosen)


def _renamed(arguments: list[str], before: str, after: str) -> list[str]:
    """Options of the corpus by their other name, so that what a message advises works with any command."""
    known = {field.name.replace("_", "-") for field in dataclasses.fields(IngestConfig)} - {"corpus"}

    def of_corpus(word: str) -> bool:
        name = word.removeprefix(before).partition("=")[0].partition(".")[0].replace("_", "-")
        return word.startswith(before) and name.removeprefix("no-") in known

    return [after + word.removeprefix(before) if of_corpus(word) else word for word in arguments]


def _named_cluster(arguments: list[str]) -> tuple[Cluster, list[str]]:
    """The cluster that is named, or what is taken if none is: of another machine's Ray, what a laptop would ask for."""
    brief = re.compile(rf"^--(?=(?:{'|'.join(BRIEF)})(?:=|$))")
    arguments = [brief.sub("--cluster.", word) for word in arguments]
    name, arguments = _take("--cluster", arguments)
    if name:
        return choose(name, CLUSTERS, "cluster")(), arguments
    elsewhere = any(word.split("=")[0] == "--cluster.address" for word in arguments)
    return laptop() if elsewhere else this_machine(), arguments


def _take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "="), arguments[:index] + arguments[index + 1 :]
    return None, arguments
