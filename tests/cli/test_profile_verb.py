"""``ecanet profile``: tables on standard output, progress on standard error, files on request."""

from pathlib import Path

import pytest

from ecanet.cli import main


def test_it_prints_a_row_for_each_network_and_gate_and_writes_three_files(tmp_path: Path, capsys) -> None:
    main(["profile", "small_eca_resnet", "eca_resnet50", "--gates", "none, eca", "--no-time", "--out", str(tmp_path)])
    printed, said = capsys.readouterr()
    lines = printed.splitlines()
    names = [f"{model} + {gate}" for model in ("small_eca_resnet", "eca_resnet50") for gate in ("none", "eca")]
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {name}" for name in names]
    assert "| 25,557,032 | 24.37 | 0 | 4,089,184,256 | 24.37M | 3.86G | 3.86G | 75.20 | 92.52 |" in lines[4]
    assert "pictures/s" not in printed
    assert "small_eca_resnet + eca: counts, network 2 of 4" in said
    assert {path.name for path in tmp_path.iterdir()} == {"profile.md", "profile.csv", "profile.json"}


def test_it_measures_with_the_options_that_it_is_given(capsys) -> None:
    options = ["--batch-size", "3", "--image-size", "8", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    main(["profile", "small_eca_resnet", *options])
    printed = capsys.readouterr().out
    assert "cpu, 1 thread, batches of 3, 1 rounds in turn" in printed
    for head in ("training, pictures/s", "latency of one, ms", "gates in training", "saved for the backward, MB"):
        assert f" {head} |" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either MODEL ... or --table3"),
        (["eca_resnet18", "--table3"], "either MODEL ... or --table3"),
        (["--table3", "--gates", "eca"], "--gates goes with MODEL"),
        (["eca_resnet18", "--out", __file__], "--out must be a folder, got the file"),
        (["eca_resnet18", "--device", "tpu"], "device must be cpu or cuda"),
        (["eca_resnet18", "--rounds", "0"], "rounds must be a whole number of 1 or more, got 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=f"ecanet profile: ValueError: .*{said}"):
        main(["profile", *words])
