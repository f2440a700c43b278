"""Whatever names a corpus holds, nothing is written outside of the given folders, nor where an export is unpacked."""

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path, PureWindowsPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.data.originals import fits_webdataset
from tests.infra.data.zoo import encode, picture, tar
from tests.workflows.test_export import artifacts, here, options  # noqa: F401 -- `here` is a fixture
from workflows.export import export

PNG = encode(picture(0))
PARTS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "b",
        "é",
        " ",
        "..\\..\\b",
        "C:",
        "a\0b",
        "a\nb",
        "x" * 300,
        "\udcff",
        "~",
        "-rf",
        "$(id)",
        "a.b",
    ]
)
KEYS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
ENDINGS = st.sampled_from(
    ["png", "PNG", "txt", "json", "long.txt", "depth.npy", "\\..\\..\\x", "a\0b", "y" * 250, "C:x", "png\n", "\x1b[2J"]
)
NAMES = st.lists(st.tuples(KEYS, ENDINGS), max_size=8)
LINKS = st.lists(st.tuples(KEYS, st.sampled_from(["/etc/passwd", "../../x.png", "a.png"])), max_size=2)


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"{name}.png")
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def below(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, _, names in os.walk(folder) for name in names}


def exported(box: Path) -> None:
    """Take the corpus in a box the whole way, and unpack what comes out without any care."""
    export(options(str(box), artifacts(str(box), str(box / "corpus"))))
    unpacked = box / "unpacked"
    unpacked.mkdir()
    for path in sorted((box / "out" / "data").iterdir()):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            assert len({member.name for member in members}) == len(members)
            for member in members:
                assert member.isreg()
                assert member.name.isprintable()
                windows = PureWindowsPath(member.name)
                assert not windows.drive
                assert ".." not in windows.parts
                try:
                    archive.extract(member, unpacked, filter="fully_trusted")
                except (NotADirectoryError, IsADirectoryError, FileExistsError):
                    continue  # "a.png" and "a.png/b.png": no system holds both


@pytest.fixture
def boxed():
    """Runs a corpus in a folder far down in one that holds nothing else."""

    def run(write):
        with tempfile.TemporaryDirectory() as root:
            box = Path(root, "1", "2", "3", "4", "5", "box")
            (box / "corpus").mkdir(parents=True)
            write(box / "corpus")
            exported(box)
            given = [f"{box}/{name}/" for name in ("corpus", "store", "out", "unpacked")]
            assert [path for path in below(Path(root)) if not path.startswith(tuple(given))] == []

    return run


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES, links=LINKS, form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_members_of_tars(here, boxed, names, links, form):  # noqa: F811
    members = [("good.png", PNG), ("good.txt", b"a text")]
    members += [(f"{key}.{ending}", PNG) for key, ending in names]
    members += [(f"{key}.png", PNG) for key, _ in names]
    members += [(f"{key}.txt", b"a text") for key, _ in names]
    members += [("", link(*each)) for each in links]
    data = tar(members, errors="surrogateescape", format=form)
    boxed(lambda corpus: (corpus / "a.tar").write_bytes(data))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(KEYS, max_size=6))
def test_keys_of_parquet_rows(here, boxed, keys):  # noqa: F811
    keys = ["good", *(key.encode(errors="replace").decode() for key in keys)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": keys, "image": [PNG] * len(keys), "text": ["a text"] * len(keys)}), sink)
    boxed(lambda corpus: (corpus / "a.parquet").write_bytes(sink.getvalue()))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(KEYS, max_size=6))
def test_files_that_a_table_names(here, boxed, names):  # noqa: F811
    rows = [{"file_name": name, "text": "a text"} for name in ("good.png", "/etc/hostname", *names)]

    def write(corpus):
        (corpus / "good.png").write_bytes(PNG)
        (corpus / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    boxed(write)


@pytest.mark.parametrize("key", ["a", "a/b", "./a", "a b", "größe", "a.b/c", "12:30/a"])
def test_plain_keys_stay(key):
    assert fits_webdataset(key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "../a",
        "a/../b",
        "a.b",
        "a\0b",
        "a\nb",
        "\udcff",
        "..\\a",
        "a\\b",
        "C:a",
        "c:/a",
        "x" * 300,
        "y/" * 700 + "a",
    ],
)
def test_others_become_sample_ids(key):
    assert not fits_webdataset(key)
