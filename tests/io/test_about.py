"""--about: a closed set of keys, each a bounded text; what is wrong is said with file, line and key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.about import KEYS, is_about, read_about
from dinox_io.errors import ShardError
from dinox_io.manifest import read_manifest, serialize_manifest
from tests.io.test_manifest import resign

LEAST = "name: Ward 7\nlicence: in house\nweights_may_be_released: no\n"


def read(folder: Path, text: str | bytes) -> dict[str, str]:
    path = folder / "about.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_about(path)


def test_values_are_texts_whatever_yaml_would_make_of_them(tmp_path: Path) -> None:
    about = read(tmp_path, LEAST + "version: 1.10\nnotes: |\n  a\n  b\ndescription: 2011-01-02\n")
    assert about == {
        "name": "Ward 7", "licence": "in house", "weights_may_be_released": "no", "version": "1.10",
        "notes": "a\nb", "description": "2011-01-02",
    }  # fmt: skip
    assert list(about) == sorted(about)
    assert is_about(about)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            LEAST + "license: x\n",
            r"about\.yaml, line 4: 'license' is no key .*did you mean licence\?.*allowed are name",
        ),
        (LEAST + "name: x\n", r"line 4: name stands twice"),
        ("name: x\nweights_may_be_released: ask\n", r"licence is missing \(SPDX"),
        (LEAST.replace("no\n", "maybe\n"), r"weights_may_be_released is 'maybe', not one of yes, no, ask"),
        (LEAST.replace("no\n", "true\n"), r"'true', not one of yes, no, ask"),
        (LEAST + "doi: doi.org/10.1/x\n", "doi is"),
        (LEAST + "url: ftp://x\n", "url is"),
        (LEAST + "citation:\n", "citation is empty"),
        (LEAST + "citation: ~\n", "citation is empty"),
        (LEAST + "citation: [a, b]\n", "citation must be a text"),
        (LEAST + "citation: {a: b}\n", "citation must be a text"),
        (LEAST + "notes: " + "x" * 10_001, "10,001 characters, at most 10,000"),
        (LEAST + 'notes: "\\e[31m"\n', "control character"),
        (LEAST + 'version: "a\\nb"\n', "line break"),
        ("[1, 2]", "key: text"),
        ("", "key: text"),
        ("name: 'x", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("[" * 20_000, "is not YAML|key: text"),
        ("x" * 70_000, "more than 65,536 bytes"),
        ("!!python/object/apply:os.system ['true']", "key: text"),
        (LEAST + "? [a]\n: b\n", "is no key: allowed are name"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read \(No such file"):
        read_about(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_about(tmp_path)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_description_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        about, problem = read(folder, data), ""
    except ValueError as error:
        about, problem = None, str(error)
    assert is_about(about) if about else "about.yaml" in problem


def test_every_file_that_ships_is_read(repository: Path) -> None:
    files = sorted((repository / "configs" / "about").glob("*.yaml"))
    assert [path.stem for path in files] == ["lidc_idri"]
    about = read_about(files[0])
    assert about["doi"] == "10.7937/K9/TCIA.2015.LO9QL9SX"
    assert (about["licence"], about["weights_may_be_released"]) == ("CC-BY-3.0", "yes")
    assert about.keys() <= KEYS.keys()


@pytest.mark.parametrize("about", [[], "x", {"name": 5}, {"weights_may_be_released": "perhaps"}, {"name": "a\x1b[2J"}])
def test_a_manifest_with_another_description_is_refused(tmp_path: Path, make_volume, write_set, about: object) -> None:
    manifest = resign(write_set(tmp_path / "set", [[make_volume(1)]]) | {"about": about})
    (tmp_path / "set" / "manifest.json").write_bytes(serialize_manifest(manifest))
    with pytest.raises(ShardError, match="about"):
        read_manifest(tmp_path / "set")
