"""Words for whoever has packages that are too old."""

from importlib import metadata

import pytest

from ggpy import cli
from ggpy.installed import missing_packages

OURS = [
    "numba>=0.66",
    "numpy>=1.26",
    'starlette>=0.40; extra == "serve"',
    'ray[data]>=2.60; extra == "ray"',
    'torch<=2.13.0,>=2.4; extra == "test"',
]


def here(monkeypatch, **versions):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: OURS)
    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    "versions, extra, missing",
    [
        ({"numba": "0.66.0rc1", "numpy": "2.4.6"}, "", []),
        ({"numba": "0.9.1", "numpy": "1.26"}, "", ["numba 0.66 or newer (0.9.1 is here)"]),
        ({"numpy": "2"}, "", ["numba 0.66 or newer"]),
        ({"numba": "1", "numpy": "2", "starlette": "0.39.2"}, "", []),
        ({"numba": "1", "numpy": "2", "starlette": "0.39.2"}, "serve", ["starlette 0.40 or newer (0.39.2 is here)"]),
        ({"numba": "1", "numpy": "2"}, "ray", ["ray 2.60 or newer"]),
    ],
)
def test_what_is_missing_or_too_old(monkeypatch, versions, extra, missing):
    here(monkeypatch, **versions)
    assert missing_packages(extra) == missing


def test_the_metadata_of_this_installation_are_understood():
    try:
        lines = metadata.requires("ggpy")
    except metadata.PackageNotFoundError:
        pytest.skip("run without an installation")
    assert any(line.startswith("numba") for line in lines) and missing_packages() == []


def test_an_unexpected_error_names_the_package_that_is_too_old(monkeypatch, capsys):
    def breaks(arguments):
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(cli, "_app", breaks)
    here(monkeypatch, numba="0.61.2", numpy="2.4.6")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run"])
    words = "ggpy: unexpected keyword argument; ggpy needs numba 0.66 or newer (0.61.2 is here)\n"
    assert ended.value.code == 1 and capsys.readouterr().err == words
    here(monkeypatch, numba="0.66", numpy="2.4.6")
    with pytest.raises(TypeError):
        cli.main(["run"])


def test_the_version_names_what_is_too_old(monkeypatch, capsys):
    """An older typer takes every command for --version."""
    here(monkeypatch, numba="0.66", numpy="1.25.2")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    printed = capsys.readouterr()
    assert printed.out.startswith("ggpy ") and printed.err == "ggpy: ggpy needs numpy 1.26 or newer (1.25.2 is here)\n"
    assert ended.value.code == 1


def test_serving_says_what_it_lacks(monkeypatch, capsys):
    here(monkeypatch, numba="1", numpy="2", starlette="0.30")
    with pytest.raises(SystemExit):
        cli.main(["serve", "demo"])
    assert "serving needs starlette 0.40 or newer (0.30 is here): pip install" in capsys.readouterr().err
