import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.data.tars import read_tar
from tests.infra.data.zoo import as_members, encode, picture, samples, tar

HEALTHY = list(as_members(samples(4)))
PNG = encode(picture(0))


def read(data, folder):
    url = storage.join(str(folder), "x.tar")
    storage.write_bytes(url, data)
    return list(read_tar("x.tar", url))


def brief(found):
    return [(sample.key, (sample.reason or "").split(":")[0]) for sample in found]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "a.b/c/", "über/" + "long" * 40 + "/"])
def test_healthy_tars_read_as_webdataset_reads_them(tmp_path, form, prefix):
    if form == tarfile.USTAR_FORMAT and len(prefix) > 100:
        prefix = "long/" * 20
    members = [(prefix + name, content) for name, content in HEALTHY]
    found = read(tar(members, format=form), tmp_path)
    theirs = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [sample.key for sample in found] == [sample["__key__"] for sample in theirs]
    for mine, other in zip(found, theirs, strict=True):
        assert mine.state is None
        assert (mine.image, mine.caption, mine.meta) == (other["png"], other["txt"], other["json"])
        assert storage.read_bytes(mine.source, mine.offset, mine.length) == mine.image


def test_endings_in_any_case_and_files_apart(tmp_path):
    members = [("a.JPG", PNG), ("b.Png", PNG), ("c.webp", PNG), ("a.TXT", b"A"), ("c.txt", b"C"), ("b.txt", b"B")]
    members += [("d.cls", b"1"), ("d.jpeg", PNG), ("d.txt", b"D")]
    assert [(s.key, s.caption, s.reason) for s in read(tar(members), tmp_path)] == [
        ("a", b"A", None),
        ("b", b"B", None),
        ("c", b"C", None),
        ("d", b"D", None),
    ]


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_odd_members_are_told(tmp_path):
    members = [
        ("README", b"no key"),
        ("._a.png", b"left by a Mac"),
        ("../up.png", PNG),
        ("/etc/root.png", PNG),
        ("x/../../y.png", PNG),
        ("text-only.txt", b"hello"),
        ("dotted.v2.png", PNG),
        ("image-only.png", PNG),
        ("twice.png", PNG),
        ("twice.txt", b"1"),
        ("twice.png", PNG),
        ("twice.txt", b"2"),
        ("symbolic.png", link("symbolic.png", tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.png", link("hard.png", tarfile.LNKTYPE, "twice.png")),
        ("device.png", link("device.png", tarfile.CHRTYPE, "")),
        ("folder.png", link("folder.png", tarfile.DIRTYPE, "")),
        ("empty.png", b""),
    ]
    assert brief(read(tar(members), tmp_path)) == [
        ("../up", "unsafe name"),
        ("/etc/root", "unsafe name"),
        ("x/../../y", "unsafe name"),
        ("text-only", "no image"),
        ("dotted.v2", ""),
        ("image-only", ""),
        ("twice", ""),
        ("twice", "duplicate key"),
        ("symbolic", "image is not a plain file"),
        ("hard", "image is not a plain file"),
        ("device", "image is not a plain file"),
        ("folder", "image is not a plain file"),
        ("empty", ""),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ("x.tar#truncated", "truncated archive")),
        (b"\0" * 512, ("x.tar#truncated", "truncated archive")),
        (tar([]), ("x.tar#empty", "the archive holds no samples")),
        (tar([("README", b"hello")]), ("x.tar#empty", "the archive holds no samples")),
        (b"garbage" * 3000, ("x.tar#truncated", "truncated archive")),
        (b"garbage" * 3000 + bytes(1024), ("x.tar#truncated", "damaged archive")),
        (PNG, ("x.tar#truncated", "truncated archive")),
    ],
)
def test_a_tar_without_samples_is_one_row(tmp_path, data, expected):
    assert brief(read(data, tmp_path)) == [expected]


def test_a_damaged_header_in_the_middle_is_told(tmp_path):
    data = bytearray(tar(HEALTHY))
    third = data.index(b"00002.png")
    data[third + 150] ^= 0xFF  # its checksum
    found = read(bytes(data), tmp_path)
    assert brief(found) == [
        ("00000", ""),
        ("00001", "cut off with its archive"),
        ("x.tar#truncated", "damaged archive"),
    ]


def test_two_tars_in_one_file_are_told(tmp_path):
    found = read(tar(HEALTHY[:3]) + tar(HEALTHY[3:]), tmp_path)
    assert brief(found)[-1] == ("x.tar#truncated", "data after the end of the archive")


def test_a_negative_size_does_not_lead_in_circles(tmp_path):
    """CVE-2025-8194."""
    info = tarfile.TarInfo("loop.png")
    header = bytearray(info.tobuf())
    header[124:136] = (-512 & (2**96 - 1)).to_bytes(12, "big")
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    found = read(bytes(header) + tar(HEALTHY), tmp_path)
    assert found[-1].key == "x.tar#truncated"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_flagged_and_keeps_what_is_whole(tmp_path, form):
    members = [(("long" * 30 if n // 3 == 1 else "") + name, content) for n, (name, content) in enumerate(HEALTHY)]
    data = tar(members, format=form)
    whole = read(data, tmp_path)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ends = [member.offset_data + member.size for member in archive]
        end_mark = archive.offset + 1024
    by_key = {sample.key: sample for sample in whole}
    places = {*range(0, end_mark, 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends), end_mark - 1}
    for length in sorted(places):
        found = read(data[:length], tmp_path)
        assert found[-1].key == "x.tar#truncated", length
        assert found[-1].state == "failed"
        kept = [sample for sample in found if sample.state is None]
        torn = [sample for sample in found[:-1] if sample.state is not None]
        for sample in kept:
            assert sample == by_key[sample.key]  # never one that lacks a file
        assert len(torn) <= 1
        reached = sum(end <= length for end in ends) // 3  # samples whose files all lie before the cut
        assert len(kept) in (reached - 1, reached)
    assert read(data[:end_mark], tmp_path) == whole


def test_a_cut_tar_whose_files_lie_apart_keeps_no_sample_that_lacks_one(tmp_path):
    apart = sorted(HEALTHY, key=lambda member: member[0].split(".")[1])  # all json, all png, all txt
    data = tar(apart)
    whole = {sample.key: sample for sample in read(data, tmp_path)}
    found = read(data[: data.index(b"00002.txt")], tmp_path)
    assert [sample.key for sample in found if sample.state is None] == ["00000"]
    assert found[0] == whole["00000"]
    assert len(found) == 5


@settings(max_examples=150, deadline=2000)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20), st.floats(0, 1))
def test_damaged_tars_never_raise(tmp_path_factory, damage, cut):
    data = bytearray(tar(HEALTHY, format=tarfile.PAX_FORMAT))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    found = read(bytes(data[: int(len(data) * (1 - cut**8))]), tmp_path_factory.mktemp("tars"))
    assert found
    assert len({(sample.key, sample.occurrence) for sample in found}) == len(found)
    for sample in found:
        assert (sample.state is None) == (sample.image is not None)
        assert (sample.state is None) == (sample.reason is None)


@given(st.binary(max_size=2000))
def test_garbage_never_raises(tmp_path_factory, data):
    (sample,) = read(data, tmp_path_factory.mktemp("tars"))
    assert sample.state == "failed"
