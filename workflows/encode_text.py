"""Encode every caption once with a frozen text encoder, so that a prior that hears its features trains without it."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from captioner.provenance import identify
from infra import storage
from infra.artifact import Planned
from infra.cache import cached
from infra.cluster import Cluster, connect
from infra.config import to_dict
from infra.data.ahead import ahead
from infra.data.ledger import Ledger
from infra.data.run import run_stages
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, by_shard, step
from t2i.conditions.encoders import TextEncoder, TextEncoderConfig, place_of, sizes_of, tokens_of
from t2i.conditions.text_features import save_null, sizes_told
from t2i.priors.task import ALT, ALTS
from t2i.stages import EncodeText, cut_column, texts_of

NULL = "null.safetensors"  # the features of an empty text
MOST_CUT = 0.05  # of the captions of a style, unless the config says that more may be
LOOKED_AT = 20_000  # rows whose captions are counted before any is encoded: all, where there are no more
SHARDS = 64  # in which they lie, at most


@dataclass(frozen=True, kw_only=True)
class EncodeTextConfig:
    """Which encoder, under what name, and of which captions.

    An encoder that cuts more than 5 % of the captions of a style is refused, unless `cut_captions` says that it may.
    """

    name: str = "features"  # of the columns, and of the condition of a prior that hears them
    encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    styles: tuple[str, ...] = ()  # none: every style of the captions, and the alt texts ("alt")
    cut_captions: bool = False
    batch: int = 64  # rows at once, and texts

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")
        if not self.name.isidentifier():
            raise ValueError(f"Columns are named by a word, such as clip, but not '{self.name}'.")


@dataclass(frozen=True)
class Cut:
    """Rows with captions of a style, and how many of these an encoder does not read to the end."""

    rows: int
    cut: int

    @property
    def share(self) -> float:
        """Of all rows with captions."""
        return self.cut / max(self.rows, 1)


def told(config: EncodeTextConfig, inputs: Sequence[Artifact], made: Artifact | None) -> list[str]:
    """For a plan: of how many rows of each style the encoder cuts the caption; nothing where that is not known yet."""
    if made is not None:
        cuts, beside = {style: Cut(**each) for style, each in made.summary["cut"].items()}, ""
    else:
        if any(isinstance(each, Planned) for each in inputs):
            return []
        try:
            cuts = look(config, inputs[0], inputs[1])
        except (OSError, ValueError):  # the step itself will say what is wrong
            return []
        beside = " of those that were looked at"
    return [
        f"{style}: {each.cut:,} of {each.rows:,} rows{beside} ({each.share:.1%}) are cut"
        for style, each in cuts.items()
    ]


@step(version=1, shards=by_shard, told=told)
def encode_text(
    config: EncodeTextConfig, images: Artifact, captions: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `<name>_<style>` and `<name>_pooled_<style>`, the features of a caption, for every row of a corpus.

    Of several alt texts of a row the further ones have columns of their own, as `<name>_alt_1`.
    """
    config = replace(config, encoder=anchored(config.encoder))
    sizes, styles = sizes_of(config.encoder), styles_of(config, captions)
    inputs = [images.path, captions.path]
    alts = most_alts(inputs) if ALT in styles else 1
    stage = EncodeText(
        config.encoder, config.name, styles, alts, config.batch, cluster.cpus_per_actor, cluster.gpus_per_actor
    )
    _check_names(stage, inputs)
    _check_cuts(config, look(config, images, captions))
    if not storage.exists(storage.join(out, NULL)):
        _write_null(config.encoder, storage.join(out, NULL))
    connect(cluster)
    counts = run_stages([stage], inputs, out, batch_size=config.batch, actors=cluster.actors, report=report)
    with cached(config.encoder.model) if "://" in config.encoder.model else nullcontext(config.encoder.model) as local:
        weights = identify(place_of(local)[0], config.encoder.revision) | {"model": config.encoder.model}
    return counts | {
        "name": config.name,
        "encoder": to_dict(config.encoder),
        "sizes": to_dict(sizes_told(sizes)),
        "weights": weights,
        "styles": list(styles),
        "alts": alts,
        "cut": {style: {"rows": each.rows, "cut": each.cut} for style, each in _cuts(config.name, styles, out).items()},
    }


def anchored(encoder: TextEncoderConfig) -> TextEncoderConfig:
    """An encoder whose folders are found from any other folder, too."""
    return replace(encoder, model=storage.anchored(encoder.model), tokenizer=storage.anchored(encoder.tokenizer))


def styles_of(config: EncodeTextConfig, captions: Artifact) -> tuple[str, ...]:
    """The styles whose captions are encoded; ValueError for one that is not there."""
    there = (ALT, *(style["name"] for style in captions.summary.get("styles", ())))
    if unknown := [style for style in config.styles if style not in there]:
        raise ValueError(f"{captions.path} has no captions of the style '{unknown[0]}': there are {', '.join(there)}.")
    return config.styles or there


def most_alts(inputs: Sequence[str]) -> int:
    """How many alt texts a row has, at most."""

    def most(shard: str) -> int:
        reader = ShardReader(inputs, shard)
        if ALTS.removesuffix("?") not in reader.names:
            return 1
        return max((len(texts) for texts in reader.columns([ALTS])[ALTS] if texts is not None), default=1)

    return max(ahead(most, joined_names(inputs), threads=8, depth=32), default=1)


def look(config: EncodeTextConfig, images: Artifact, captions: Artifact) -> dict[str, Cut]:
    """By style, what the encoder cuts of the captions of some rows that are spread over the corpus."""
    styles, inputs = styles_of(config, captions), [images.path, captions.path]
    tokens = tokens_of(anchored(config.encoder))
    names = joined_names(inputs)
    rows, cut = dict.fromkeys(styles, 0), dict.fromkeys(styles, 0)
    for shard in _spread(names, SHARDS):
        reader = ShardReader(inputs, shard)
        columns = reader.columns([f"caption_{style}" for style in styles])
        places = _spread(range(len(reader)), -(-LOOKED_AT // min(len(names), SHARDS)))
        for style in styles:
            taken = {f"caption_{style}": columns[f"caption_{style}"][places].tolist()}
            texts = [text for text in texts_of(taken, style, 0) if text is not None]
            rows[style] += len(texts)
            cut[style] += sum(count > tokens.sizes.length for count in tokens.counts(texts))
    return {style: Cut(rows[style], cut[style]) for style in styles}


def _spread(things: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some things, evenly spread."""
    count = min(len(things), most)
    return [things[place * len(things) // count] for place in range(count)]


def _check_cuts(config: EncodeTextConfig, cuts: Mapping[str, Cut]) -> None:
    """ValueError where captions would lose their end unasked."""
    over = {style: each for style, each in cuts.items() if each.share > MOST_CUT}
    if over and not config.cut_captions:
        length = sizes_of(anchored(config.encoder)).length
        raise ValueError(
            f"{config.encoder.model} reads {length} tokens, and so cuts "
            + " and ".join(f"{each.share:.1%} of {each.rows:,} captions of '{style}'" for style, each in over.items())
            + ": what they end with no prior would hear. Choose an encoder that reads more, as T5 does, leave the "
            "style out (styles), or let them be cut: --cut-captions."
        )


def _check_names(stage: EncodeText, inputs: Sequence[str]) -> None:
    """ValueError where columns of the features would stand in the place of others."""
    for shard in joined_names(inputs)[:1]:
        if taken := sorted(ShardReader(inputs, shard).names.intersection(stage.writes)):
            raise ValueError(f"There is a column {taken[0]} already: give the features another name.")


def _write_null(encoder: TextEncoderConfig, url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_null(TextEncoder(encoder).read([""]), Path(folder, NULL))
        storage.write_bytes(url, Path(folder, NULL).read_bytes())


def _cuts(name: str, styles: Sequence[str], out: str) -> dict[str, Cut]:
    """By style, of all rows, as the records of the shards count them."""
    found = {style: {"True": 0, "False": 0} for style in styles}
    for record in Ledger(out).complete().values():
        for style in styles:
            for value, count in record["counts"][cut_column(name, style)].items():
                found[style][value] += count
    return {style: Cut(sum(each.values()), each["True"]) for style, each in found.items()}
