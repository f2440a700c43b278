import pytest

from captioner.filters import Language, Size
from infra import storage
from infra.data.ledger import Ledger, commit
from infra.data.readers import find_corpus, write_sources
from infra.data.shards import ShardReader
from infra.data.work import StageWork
from infra.storage import join, write_bytes
from tests.infra.data.zoo import encode, picture, tar
from workflows.examine import ExamineConfig, summary
from workflows.ingest import IngestConfig, IngestWork

ROWS = [
    ("fine", picture(0, 40, 50), b"a dog runs through the park near the water"),
    ("small", picture(1, 10, 50), b"a small picture of a dog"),
    ("wide", picture(2, 40, 500), "un chien court dans le parc au bord de la rivière".encode()),
    ("dot", picture(3, 1, 1), b"."),
]


def test_every_row_has_its_verdicts(tmp_path, monkeypatch):
    pytest.importorskip("py3langid")
    corpus, images, out = (str(tmp_path / name) for name in ("corpus", "images", "out"))
    members = [
        (f"{key}.{ending}", data) for key, a, text in ROWS for ending, data in (("png", encode(a)), ("txt", text))
    ]
    write_bytes(join(corpus, "0.tar"), tar([*members, ("lost.txt", b"no image")]))
    found = find_corpus(corpus)
    write_sources(found, images)
    commit(images, "000000", IngestWork(IngestConfig(corpus=corpus), found.sources, images)("000000"))
    config = ExamineConfig(languages=("en",))
    work = StageWork(
        (Size(config.min_side, config.max_aspect), Language(config.languages, config.min_probability)), (images,), 3
    )
    work.setup()
    table = work("000000")
    commit(out, "000000", table)
    assert table["state"].to_pylist() == ["accepted"] * 4 + ["rejected"]
    columns = ShardReader([images, out], "000000").columns(["key", "unfit_size", "unfit_language", "language_alt"])
    assert columns["unfit_size"].tolist() == [None, "too small: 50x10", "too narrow: 500x40", "too small: 1x1"]
    assert columns["unfit_language"].tolist() == [None, None, "other language: fr", None]
    assert columns["language_alt"].tolist() == ["en", "en", "fr", None]
    Ledger(out).close()
    monkeypatch.setattr(storage, "open_read", lambda url: pytest.fail(f"{url} was opened"))
    assert summary(out) == {
        "unfit_size": {"too small": 2, "too narrow": 1},
        "unfit_language": {"other language": 1},
    }


@pytest.mark.parametrize(
    "fields",
    [{"min_side": 0}, {"max_aspect": 0.5}, {"max_aspect": float("nan")}, {"min_probability": 1.5}, {"batch": 0}],
)
def test_the_config_checks_itself(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} .*but it is"):
        ExamineConfig(**fields)
