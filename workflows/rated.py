"""`rescribe rate`: makes the page of blind pairs, and scores what persons answered there."""

import re
from dataclasses import dataclass, field
from typing import Any

import tyro

from infra import storage
from infra.artifact import MANIFEST
from infra.cluster import Cluster, this_machine
from infra.store import Artifact, Store
from t2i.evaluate.rating import check, score
from workflows.commands import say
from workflows.lookup import MAKERS, STORE, Line, current, in_store, only, rephrased
from workflows.parse import parse
from workflows.rate import KEY, PAGE, RateConfig, rate
from workflows.sample import sample

JUDGED = (sample.name, *MAKERS["captions"])


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """Two artifacts of pictures for the same prompts, or of captions; or one of captions in two styles.

    With `score`, the files that the page wrote are scored instead.
    """

    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # folders or names
    score: tuple[str, ...] = ()  # ratings.json of one rater or several
    out: str = ""  # where the page is copied to
    styles: tuple[str, ...] = ()  # of captions
    count: int = 100  # pairs
    seed: int = 0  # of pairs, order and sides
    question: str = ""  # above the pairs
    store: str = STORE
    cluster: Cluster = field(default_factory=this_machine)
    json: bool = False


def rate_pairs(arguments: list[str]) -> dict[str, Any]:
    """Judge blind pairs of pictures or captions on a page: `rescribe rate A B --out rate.html`, then `--score FILE`."""
    options = parse(RateOptions, arguments, "rescribe rate")
    if options.score:
        if options.paths:
            raise ValueError("A file of ratings knows its page: leave out the artifacts, or --score.")
        return score_files(options.score, options.store)
    if len(options.paths) not in (1, 2):
        raise ValueError("Say what is judged: pictures or captions of two artifacts, or captions in two --styles.")
    first, *second = (
        _judged(in_store(path, options.store), rephrased("rate", arguments, path)) for path in options.paths
    )
    config = RateConfig(count=options.count, seed=options.seed, styles=options.styles, question=options.question)
    made = Store(options.store, options.cluster).step(rate, config, first, second[0] if second else None)
    page = made.url(PAGE)
    if options.out:
        page = storage.absolute(options.out)
        storage.write_bytes(page, storage.read_bytes(made.url(PAGE)))
    equal = f", beside {made.summary['equal']} that are equal" if made.summary["equal"] else ""
    say(f"{made.summary['pairs']} pairs{equal}: {page}")
    return {"page": page, "pairs": made.summary["pairs"], "equal": made.summary["equal"], "artifact": made.path}


def score_files(files: tuple[str, ...], store: str) -> dict[str, Any]:
    """The win rate of the first artifact by files of the page's answers; ValueError names a file that is none."""
    read = [(file, _read(file)) for file in files]
    page = read[0][1].get("page")
    folder = (
        storage.join(store, rate.name, page) if isinstance(page, str) and re.fullmatch("[0-9a-f]{16}", page) else ""
    )
    if not folder or not storage.exists(storage.join(folder, MANIFEST)):
        raise ValueError(f"{files[0]} is of no page of the store {store}: give --store, where `rate` made it.")
    made = Artifact.open(folder)
    key = storage.read_json(made.url(KEY))
    if storage.digest(made.url(KEY)) != made.manifest["files"][KEY]:
        raise ValueError(f"{made.url(KEY)} was changed since the page was made, so nothing can be scored by it.")
    answers: dict[str, dict[str, str]] = {}
    for file, ratings in read:
        try:
            found = check(ratings, key)
        except ValueError as error:
            raise ValueError(f"{file} is refused: {error}.") from None
        if ratings["rater"] in answers:
            raise ValueError(f"{file} is refused: another file is of the same rater; give the later one alone.")
        answers[ratings["rater"]] = found
    estimate, counts = score(answers.values(), key)
    low, high = estimate.interval
    told = {name: key[name] for name in ("first", "second", "page")}
    results = told | {"raters": len(answers), "pairs": len(key["pairs"]), "equal": key["equal"]}
    results |= {"first_wins": counts["first"], "second_wins": counts["second"], "ties": counts["ties"]}
    results |= {"win_rate": estimate.value, "win_rate_n": estimate.n}
    known = estimate.n > 1
    results |= {"win_rate_interval": [low, high]} if known else {}
    say(
        f"{key['first']} won {counts['first']} times, {key['second']} {counts['second']} times, with {counts['ties']} "
        f"ties, which count half: the first wins {100 * estimate.value:.1f} %"
        + (f" ({100 * low:.1f} to {100 * high:.1f})" if known else "")
        + f" of {estimate.n} judged pairs of {len(key['pairs'])}."
    )
    return results


def _judged(place: str, line: Line) -> Artifact:
    """The captions, or the pictures, that a folder or a name stands for; captions where it stands for both."""
    found = current(place, JUDGED)
    captions = [each for each in found if each.step != sample.name]
    return only(captions if captions and len(found) > len(captions) else found, place, line)


def _read(file: str) -> dict[str, Any]:
    try:
        ratings = storage.read_json(file)
    except ValueError:
        raise ValueError(f"{file} is refused: it is no JSON, as the page's button writes it.") from None
    if not isinstance(ratings, dict):
        raise ValueError(f"{file} is refused: it holds no answers, as the page's button writes them.")
    return ratings
