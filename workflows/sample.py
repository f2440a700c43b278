"""Draw pictures for prompts: captions of held-out images, or a user's own."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from infra import storage
from infra.artifact import OWN_ROWS
from infra.cluster import Cluster, connect
from infra.config import from_dict, setting
from infra.data.ledger import LEDGER, Ledger
from infra.data.run import run_here, run_stages
from infra.data.shards import FOLDER, VIRTUAL, ShardReader, joined_names
from infra.data.stage import ACCEPTED, FAILED
from infra.metrics import Report, counting
from infra.store import Artifact, step
from t2i.conditions.words import WordsRows
from t2i.priors.asking import CAPTION, Asking
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import SamplingKind, sampling_of
from t2i.stages import LinkAt, Paint, askings, settled
from workflows.clips import weights_of
from workflows.commands import say
from workflows.held_out import prompts_of
from workflows.lookup import tail
from workflows.prompt_rows import write_rows
from workflows.prompts import Prompt, digest_of, read_prompts
from workflows.samples import FEW, show
from workflows.train_tokenizer import MODEL

WORDS_OF = 1000  # prompts whose words are looked up in the vocabulary


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """How a link of a chain draws: of several candidates a picture that is kept which a judge likes best.

    The judge is a CLIP, by its artifact's or another folder, or a hub's name: the picture that is nearest the prompt.
    """

    sampling: SamplingKind = setting(default_factory=SamplingConfig, was=SamplingConfig)
    candidates: int = 1
    judge: str = ""

    def __post_init__(self) -> None:
        if self.candidates < 1 or (self.candidates > 1) != bool(self.judge):
            raise ValueError("Of several candidates a judge keeps one: give both, and of candidates at least 1.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How many pictures, of what, and how they are drawn.
    `prompts_file` is a text with a prompt a line, JSONL, GenEval's metadata, DPG-Bench's folder, or COCO's captions.
    """

    count: int = 256  # prompts, taken from the rows of the `test` split: the first by sample id
    prompts: tuple[str, ...] = ()  # these instead
    sampling: SamplingKind = setting(default_factory=SamplingConfig, was=SamplingConfig)
    batch: int = 64  # pictures drawn together, of which other sizes make the same but for rounding
    seed: int = 0
    negative: str = setting("", since="0.2")  # a prompt of what is not wanted, where guidance else puts the null
    told: dict[str, str] = setting(default_factory=dict, since="0.2")  # to further conditions: class_label=cat
    prompts_file: str = setting("", since="0.2")  # or those that a file holds, local or s3://
    pictures: int = setting(1, since="0.2")  # of a prompt that does not say how many
    precision: Literal["fp32", "bf16"] = setting("fp32", since="0.2")
    candidates: int = setting(1, since="0.2")  # of the first link, of which the judge keeps one: `LinkConfig`
    judge: str = setting("", since="0.2")
    links: tuple[LinkConfig, ...] = setting((), since="0.2")  # of a chain, after the first

    def __post_init__(self) -> None:
        if min(self.count, self.batch, self.pictures) < 1:
            raise ValueError(
                f"count, batch and pictures must be at least 1, but they are {self.count}, {self.batch} and "
                f"{self.pictures}."
            )
        if self.negative and all(each.guidance == 1 for each in self.samplings):
            raise ValueError("A negative prompt is what guidance moves away from: give sampling.guidance above 1, too.")
        _ = self.every_link  # whether there is a judge where there are candidates
        try:
            "".join([*self.prompts, self.negative, *self.told.values()]).encode()
        except UnicodeEncodeError:
            raise ValueError("A prompt has bytes that are not UTF-8, which is no text.") from None
        if self.prompts and self.prompts_file:
            raise ValueError("Give prompts, or a file of them, but not both.")
        if self.told and not self.own:
            raise ValueError("What held-out rows tell beside their captions is their own: `told` goes with prompts.")

    @property
    def own(self) -> bool:
        """Whether prompts are a user's own, and no rows' captions."""
        return bool(self.prompts or self.prompts_file)

    @property
    def every_link(self) -> tuple[LinkConfig, ...]:
        """How each draws, the first, too."""
        return (LinkConfig(sampling=self.sampling, candidates=self.candidates, judge=self.judge), *self.links)

    @property
    def samplings(self) -> tuple[Any, ...]:
        """Those of the links."""
        return tuple(link.sampling for link in self.every_link)


def prompts_key(config: SampleConfig) -> str | None:
    """A hash of the file of prompts, so that one that changed makes new pictures."""
    return digest_of(config.prompts_file) if config.prompts_file else None


@step(version=3, key=prompts_key)
def sample(
    config: SampleConfig,
    mixture: Artifact | None,
    prior: Artifact,
    tokenizer: Artifact,
    *chain: Artifact,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Draw a picture a row of `prompts`, into the column `image`; where they are few, also as files and on a sheet.

    The mixture, of which held-out captions are taken, is not wanted where there are prompts. Further priors and their
    tokenizers, by turns, are the links of a chain. A row that cannot be drawn is failed, with its reason.

    The command finds the prior's tokenizer by itself, and draws with the guidance, temperature and so on of the recipe
    that trained the prior, whatever defaults stand below, but for those `--sampling` options that are given.
    """
    if mixture is None and not config.own:
        raise ValueError("Say what to draw: give prompts, or a mixture, whose held-out captions stand for them.")
    links, rows_of = links_of(config, prior, tokenizer, *chain), storage.join(out, OWN_ROWS)
    several = askings(links)
    unknown = _unknown(config, several)
    if not storage.exists(storage.join(rows_of, LEDGER)):
        read = prompts_key(config)
        prompts = own_prompts(config) if mixture is None or config.own else prompts_of(mixture, config.count)
        write_rows(_settled(config, prompts, links, several, mixture), rows_of, seed=config.seed, batch=config.batch)
        if prompts_key(config) != read:
            storage.remove(rows_of)
            raise RuntimeError(f"{config.prompts_file} changed while it was read. Give the same line again.")
    beside = mixture.inputs[0].path if mixture is not None and not config.own else ""
    stage = Paint(links, beside, config.precision, cluster.cpus_per_actor, cluster.gpus_per_actor)
    counts = _drawn(stage, rows_of, out, config.batch, cluster, report)
    if counts["rows_in"] <= FEW:
        show(out)
    drawn = {name: getattr(config.sampling, name, None) for name in ("guidance", "temperature")}
    told = {"samples": counts[ACCEPTED], **{name: value for name, value in drawn.items() if value is not None}}
    return told | counts | ({"unknown_words": unknown} if unknown else {})


def _drawn(stage: Paint, rows_of: str, out: str, batch: int, cluster: Cluster, report: Report) -> dict[str, Any]:
    """Draw what is not drawn yet: one batch here, where no GPU is given; more of them by actors."""
    rows = sum(record["rows_in"] for record in Ledger(rows_of).complete().values())
    if rows <= batch and not (cluster.gpus_per_actor or cluster.address):
        counts = run_here([stage], [rows_of], out, batch_size=batch, report=report)
    else:
        connect(cluster)
        report = counting(report, "pictures", of=ACCEPTED, times=1)
        counts = run_stages([stage], [rows_of], out, batch_size=batch, actors=cluster.actors, report=report)
    if not counts[ACCEPTED]:
        (why, *_) = ShardReader([out], joined_names([out])[0], every=True).reasons
        for name in (FOLDER, LEDGER):  # the same line tries again
            storage.remove(storage.join(out, name))
        raise ValueError(f"None of the {rows} pictures could be drawn. The first: {why}")
    if counts[FAILED]:
        say(f"{counts[FAILED]} of {rows} pictures could not be drawn: {', '.join(counts['reasons'])}.")
    return counts


def links_of(config: SampleConfig, *models: Artifact) -> tuple[LinkAt, ...]:
    """The links of a chain, of priors and their tokenizers by turns; ValueError where these are none."""
    makers = [model.step for model in models]
    if makers != ["train_prior", "train_tokenizer"] * (len(models) // 2):
        raise ValueError(
            f"A chain is priors and their tokenizers by turns, but these were made by {', '.join(makers)}."
        )
    if len(models) != 2 * len(config.samplings):
        raise ValueError(
            f"The chain has {len(models) // 2} links, but it is said of {len(config.samplings)} how they draw: `links` "
            "has one table for each after the first."
        )
    for prior, tokenizer, sampling in zip(models[::2], models[1::2], config.samplings, strict=True):
        learned = [tail(path) for path in prior.manifest.get("inputs", ()) if tokenizer.step in path.split("/")]
        if learned and tail(tokenizer.path) not in learned:
            raise ValueError(f"{prior.path} draws for the tokenizer {learned[0]}, and not for {tokenizer.path}.")
        if not isinstance(sampling, kind := sampling_of(prior.url(MODEL))):
            raise ValueError(
                f"{prior.path} draws as a {kind.__name__} says, but its sampling is a {type(sampling).__name__}."
            )
    return tuple(
        LinkAt(
            prior=prior.url(MODEL),
            tokenizer=tokenizer.url(MODEL),
            space=tokenizer.id,
            sampling=link.sampling,
            candidates=link.candidates,
            judge=weights_of(link.judge),
            model=f"{prior.step}/{prior.id}",
            sha256=_weights(prior),
        )
        for prior, tokenizer, link in zip(models[::2], models[1::2], config.every_link, strict=True)
    )


def _weights(prior: Artifact) -> str:
    name = f"{MODEL}/model.safetensors"
    return (prior.manifest.get("files", {}).get(name) or storage.digest(prior.url(name)))["sha256"]


def own_prompts(config: SampleConfig) -> Iterator[Prompt]:
    """Those that a user gave."""
    return read_prompts(config.prompts_file) if config.prompts_file else (Prompt(text) for text in config.prompts)


def _settled(
    config: SampleConfig,
    prompts: Iterable[Prompt],
    links: Sequence[LinkAt],
    several: Sequence[Asking],
    mixture: Artifact | None,
) -> Iterator[Prompt]:
    """The prompts with the config's word where they say nothing; ValueError, with the line, where none can be drawn."""
    passed: Any = None  # what the prompt before had alike
    for given in prompts:
        negative = config.negative if given.negative is None else given.negative
        told = given.told if given.place else {**config.told, **given.told}
        prompt = replace(given, negative=negative, told=told, count=given.count or config.pictures)
        kind = (prompt.place is None, sorted(told), prompt.settings, bool(negative))
        try:
            if kind != passed:
                _check(prompt, links, several, mixture)
        except ValueError as error:
            raise ValueError(f"{prompt.line}: {error}" if prompt.line else str(error)) from None
        passed = kind
        yield prompt


def _check(prompt: Prompt, links: Sequence[LinkAt], several: Sequence[Asking], mixture: Artifact | None) -> None:
    if prompt.place is not None and mixture is not None:
        names = [name for ask in several for name in ask.reads if name not in (CAPTION, *VIRTUAL)]
        ShardReader([mixture.inputs[0].path], prompt.place[0]).stored(names, np.zeros(0, np.int64))  # they are there
    else:
        for ask in several:
            ask.check([CAPTION, *prompt.told])
    if len(prompt.settings) > len(links):
        raise ValueError(f"It has settings for {len(prompt.settings)} links, but there are {len(links)}.")
    samplings = settled([link.sampling for link in links], prompt.settings)
    if prompt.negative and all(sampling.guidance == 1 for sampling in samplings):
        raise ValueError("A negative prompt is what guidance moves away from: give guidance above 1, too.")


def as_trained(config: SampleConfig, prior: Artifact, given: Collection[str]) -> SampleConfig:
    """With the sampling of the recipe that trained the prior, but for the fields of it that are `given`, and its links.

    The prior does not know its recipe; the newest pictures of held-out captions beside it do, which a recipe ends with.
    """
    root, drawn = prior.path.rsplit("/", 2)[0], list[Artifact]()
    for name in storage.list_names(storage.join(root, sample.name)):
        with suppress(FileNotFoundError):  # it was cut
            drawn.append(Artifact.open(storage.join(root, sample.name, name)))
    by_recipes = [
        made
        for made in drawn
        if not (made.manifest["config"]["prompts"] or made.manifest["config"].get("prompts_file"))
        and any(path.endswith(f"{prior.step}/{prior.id}") for path in made.manifest["inputs"])
    ]
    if not by_recipes:
        return config
    newest = max(by_recipes, key=lambda made: made.manifest["started"])
    theirs = from_dict(SampleConfig, newest.manifest["config"])
    priors = [path.rpartition("/")[2] for path in newest.manifest["inputs"] if path.split("/")[-2] == prior.step]
    place = priors.index(prior.id)
    sampling = replace(theirs.samplings[place], **{name: getattr(config.sampling, name) for name in given})
    drawn_by = {
        name: getattr(sampling, name) for name in ("guidance", "temperature", "steps") if hasattr(sampling, name)
    }
    told = ", ".join(f"{name} {value:g}" for name, value in drawn_by.items())
    say(f"Drawn as {newest.path} was: {told}.")
    return replace(config, sampling=sampling, links=config.links or theirs.links[place:])


def tokenizer_of(prior: Artifact) -> Artifact:
    """That whose codes a prior was trained on; ValueError where it is not to be found."""
    with suppress(OSError):  # it is not where the prior is
        for made in prior.inputs:
            if made.step == "train_tokenizer":
                return made
    raise ValueError(f"The tokenizer of {prior.path} is not beside it: give --tokenizer FOLDER.")


def with_links(config: SampleConfig, chain: Sequence[Artifact]) -> SampleConfig:
    """With as many links as a chain has after the first; those of which nothing is said draw as their families do."""
    further = [LinkConfig(sampling=sampling_of(prior.url(MODEL))()) for prior in chain[::2]]
    return replace(config, links=(*config.links[: len(further)], *further[len(config.links) :]))


def _unknown(config: SampleConfig, several: Sequence[Asking]) -> list[str]:
    """Words of a user's first prompts that the priors' vocabularies do not have, which is told."""
    texts = [prompt.text for prompt in islice(own_prompts(config), WORDS_OF)] if config.own else []
    texts += [config.negative] if texts else []
    known = [rows.vocabulary for ask in several for rows in ask.rows if isinstance(rows, WordsRows)]
    unknown = list(dict.fromkeys(word for vocabulary in known for word in vocabulary.unknown(texts)))
    if unknown:
        words = " nor ".join(f"'{word}'" for word in unknown[:20])
        more = f" nor {len(unknown) - 20} others" if len(unknown) > 20 else ""
        say(f"This prior's vocabulary has no word {words}{more}: it reads pieces, and may not know what they mean.")
    return unknown
