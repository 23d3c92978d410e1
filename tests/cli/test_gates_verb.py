"""``ecanet gates``: every gate with its formula, cost and needs."""

import re

import pytest

from ecanet.cli import main
from ecanet.nn import GATES


def test_it_lists_every_gate_with_formula_parameters_needs_start_and_source(capsys) -> None:
    main(["gates"])
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+)  +\S", printed, re.MULTILINE) == list(GATES)
    assert printed.endswith("timm:strip, timm:nl\n")
    grn = printed[printed.index("\ngrn") : printed.index("\ncbam")]
    for part in ("x + w x |x| / mean(|x|) + b", "512 parameters at C = 256", "needs means, variances", "ConvNeXt V2"):
        assert part in grn
    assert "neutral start: w = b = 0" in grn
    assert "called by the tail; neutral start: none: it has no weights" in printed[printed.index("\nsimam") :]


def test_it_lists_those_that_are_named_and_prints_the_table_of_the_docs(capsys) -> None:
    main(["gates", "gct", "eca", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| gate", "|-|-|-|-|-|-|-|-|-|", "| `gct`", "| `eca`"]


def test_a_layer_of_timms_is_described_where_it_is_named(capsys) -> None:
    main(["gates", "timm:gca"])
    said = capsys.readouterr().out
    assert said.startswith("timm:gca  x + mlp(mean of x weighted by attention)\n")
    assert "neutral start: mlp_add.fc2 = 0\n" in said


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(SystemExit, match=r"ecanet gates: ValueError: gate must be one of .*: did you mean 'gct_gauss'"):
        main(["gates", "gaussgct", "gct_gaus"])


def test_help_has_an_example(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["gates", "--help"])
    assert "Example: ecanet gates gct grn" in " ".join(capsys.readouterr().out.split())
