"""`rescribe compare`: what was trained, by folder or name, draws for the same prompts and is compared."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import tyro

from infra import storage
from infra.cluster import Cluster, this_machine
from infra.config import from_dict
from infra.store import Artifact, Store
from t2i.priors.task import sampling_of
from workflows.clips import in_words, weights_of
from workflows.commands import say
from workflows.compare import CompareConfig, compare
from workflows.corpora.scoring import Corpus
from workflows.evaluate import ancestors
from workflows.lookup import MAKERS, STORE, Line, current, in_store, one, only, rephrased
from workflows.parse import parse
from workflows.sample import SampleConfig, as_trained, sample, with_links
from workflows.train_tokenizer import MODEL
from workflows.yardstick import PROMPTS, MeasureConfig, calibrate, corpus_of, measure, yardstick_of

SHARED = ("count", "prompts", "prompts_file", "pictures", "batch", "seed", "negative", "told")  # by all that draw


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Trained priors, runs by their names, or pictures that were drawn, on the same prompts and seeds.

    Prompts are those on the line or in a file; else those of pictures that are given; else held-out captions of the
    first model's mixture.
    """

    paths: tyro.conf.Positional[tuple[str, ...]]  # folders or names, at least two; the others are set against the first
    names: tuple[str, ...] = ()  # what they are called; else as they are given
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""  # as of `sample`
    mixture: str = ""  # whose held-out captions are the prompts
    count: int | None = None  # of held-out captions; else as many as the first model's recipe draws
    seed: int | None = None
    told: dict[str, str] = field(default_factory=dict)  # what priors hear beside prompts of one's own
    clip: str = ""  # a CLIP that scores pictures: what train_clip made, a folder, or a hub's name
    yardstick: str = ""  # what calibrate made: FID and its like, for which prompts of its own are drawn, too
    corpus: Corpus | None = None  # how pictures are scored; else by the scene where the first model learned Shapes
    shown: int = 24  # prompts on the page and on the sheet
    store: str = STORE
    cluster: Cluster = field(default_factory=this_machine)
    json: bool = False


class Entrant(NamedTuple):
    """What is compared: priors and tokenizers by turns, how they draw, and what.

    `drawn` are pictures that were given, `known` those that tell how these models draw.
    """

    chain: tuple[Artifact, ...]
    config: SampleConfig
    mixture: Artifact | None
    drawn: Artifact | None = None
    known: Artifact | None = None

    @property
    def images(self) -> Artifact | None:
        """The index that its first prior learned from."""
        return next((each for each in ancestors(self.chain[:1]) if each.step == "ingest"), None)


def compare_models(arguments: list[str]) -> dict[str, Any]:
    """Compare models on the same prompts, on one page: `rescribe compare demo other --count 64`."""
    options = parse(CompareOptions, arguments, "rescribe compare")
    if len(options.paths) < 2:
        raise ValueError("Say which models, at least two: folders of priors or of pictures, or names of runs.")
    entrants = [
        entrant(in_store(given, options.store), rephrased("compare", arguments, given)) for given in options.paths
    ]
    shared, mixture = _asked(options, entrants, arguments)
    store, calibrated = Store(options.store, options.cluster), None
    if options.yardstick:
        line = rephrased("compare", arguments, options.yardstick, "--yardstick")
        calibrated = one(in_store(options.yardstick, options.store), (calibrate.name,), line)
        _demand(calibrated, entrants)
    samples = [each.drawn or _draw(store, each, shared, mixture) for each in entrants]
    measured = None
    if calibrated is not None:
        wanted = SampleConfig(prompts_file=calibrated.url(PROMPTS), seed=shared.seed, batch=shared.batch)
        by_yardstick = [_draw(store, each, wanted, None) for each in entrants]
        measured = store.step(measure, MeasureConfig(), calibrated, *by_yardstick)
    clip = weights_of(in_words(options.clip, options.store, rephrased("compare", arguments, options.clip, "--clip")))
    config = CompareConfig(
        retrieval=bool(clip),
        names=options.names or _names(options.paths, entrants),
        corpus=options.corpus or _corpus(entrants[0]),
        clip=clip,
        shown=options.shown,
    )
    made = store.step(compare, config, measured, *samples)
    say(f"{made.summary['pictures']} pictures of each of {len(samples)} models: {made.summary['page']}")
    return {**made.summary, "artifact": made.path}


def entrant(place: str, line: Line) -> Entrant:
    """What a folder or a name stands for: its priors as their recipe draws, or pictures where there are no priors."""
    found = current(place, (*MAKERS["prior"], sample.name))
    priors = [each for each in found if each.step != sample.name]
    if not priors:
        drawn = only(found, place, line)
        return _of_pictures(drawn)._replace(drawn=drawn)
    ids = {each.id for each in priors}
    by_recipe = [
        each
        for each in map(_of_pictures, (each for each in found if each.step == sample.name))
        if not each.config.own and {made.id for made in each.chain[::2]} == ids
    ]
    if by_recipe:
        return by_recipe[-1]
    prior = only(priors, place, line)
    (tokenizer,) = (each for each in prior.inputs if each.step in MAKERS["tokenizer"])
    default = SampleConfig(sampling=sampling_of(prior.url(MODEL))())
    mixture = next((each for each in prior.inputs if each.step in MAKERS["mixture"]), None)
    return Entrant((prior, tokenizer), with_links(as_trained(default, prior, ()), ()), mixture)


def _of_pictures(samples: Artifact) -> Entrant:
    chain = tuple(each for each in samples.inputs if each.step not in MAKERS["mixture"])
    mixture = next((each for each in samples.inputs if each.step in MAKERS["mixture"]), None)
    return Entrant(chain, from_dict(SampleConfig, samples.manifest["config"]), mixture, known=samples)


def _asked(
    options: CompareOptions, entrants: Sequence[Entrant], arguments: list[str]
) -> tuple[SampleConfig, Artifact | None]:
    """What all are to draw, and the mixture that it is from, if it is from one."""
    given = {name: getattr(options, name) for name in ("prompts", "prompts_file", "told") if getattr(options, name)}
    given |= {name: getattr(options, name) for name in ("count", "seed") if getattr(options, name) is not None}
    given |= {"mixture": options.mixture} if options.mixture else {}
    if drawn := next((each for each in entrants if each.drawn), None):
        if given:
            raise ValueError(
                f"{drawn.drawn and drawn.drawn.path} are pictures that are drawn, and the others draw the same prompts "
                f"from the same seeds: leave out --{min(given).replace('_', '-')}, or give the priors."
            )
        return drawn.config, drawn.mixture
    first = entrants[0]
    mixture = first.mixture
    if options.mixture:
        line = rephrased("compare", arguments, options.mixture, "--mixture")
        mixture = one(in_store(given.pop("mixture"), options.store), MAKERS["mixture"], line)
    own = bool(options.prompts or options.prompts_file)
    kept = {name: getattr(first.config, name) for name in ("seed", "batch", "negative")}
    kept |= {} if own or first.config.own else {"count": first.config.count}
    return SampleConfig(**{"sampling": first.config.sampling, **kept, **given}), None if own else mixture


def _draw(store: Store, each: Entrant, shared: SampleConfig, mixture: Artifact | None) -> Artifact:
    """The pictures of a model: its recipe's own, if these are what is asked for, else what the store has or makes.

    A recipe may say 0 where its manifest is read as 0.0: the same choice, but not the same id.
    """
    config = replace(each.config, **{name: getattr(shared, name) for name in SHARED})
    alike = config == each.config and (mixture and mixture.id) == (each.mixture and each.mixture.id)
    if alike and each.known is not None and each.known.manifest["version"] == sample.version:
        return each.known
    return store.step(sample, config, mixture, *each.chain)


def _demand(calibrated: Artifact, entrants: Sequence[Entrant]) -> None:
    """ValueError where a model learned from other pictures than those of the yardstick."""
    yardstick = yardstick_of(calibrated)
    for each in entrants:
        if images := each.images:
            yardstick.demand(replace(yardstick, corpus=corpus_of(images)))


def _corpus(first: Entrant) -> Corpus:
    images = first.images
    return "shapes" if images and corpus_of(images).startswith("shapes ") else "words"


def _names(given: Sequence[str], entrants: Sequence[Entrant]) -> tuple[str, ...]:
    """The last words of what was given, and of folders of artifacts the ids; numbered where they are alike."""
    named = []
    for path, each in zip(given, entrants, strict=True):
        made = each.drawn or each.chain[0]
        last = storage.name(path.rstrip("/"))
        named.append(f"{made.step.removeprefix('train_')} {made.id[:8]}" if last == made.id else last)
    seen, names = Counter[str](), []
    for name in named:
        seen[name] += 1
        names.append(f"{name} {seen[name]}" if named.count(name) > 1 else name)
    return tuple(names)
