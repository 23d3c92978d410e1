"""The paper's Table 3 beside what is counted here: parameters digit for digit, FLOPs by the rule behind them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from timm.layers import SEModule

from ecanet.models import eca_resnet18
from ecanet.networks.cost import multiply_adds
from ecanet.profile import TABLE3, Profile, table3
from ecanet.profile.counts import count
from ecanet.profile.subjects import Subject

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs" / "profile.md", ROOT / "README.md"
TIMED = ROOT / "benchmarks" / "results" / "table3-cpu-1-thread"


@pytest.fixture(scope="module")
def counted() -> Profile:
    return table3(time=False)


def test_every_row_of_the_paper_is_there_in_its_order_and_three_by_the_papers_figures_alone(counted: Profile) -> None:
    assert tuple(row.paper for row in counted.rows) == TABLE3
    alone = [row.name for row in counted.rows if row.counts is None]
    assert alone == ["ResNet-50 + A2-Nets", "ResNet-50 + GSoP-Net1", "ResNet-50 + AA-Net"]
    said = str(counted)
    assert all(f"| {name} (the paper's figures alone) | - |" in said for name in alone)


def test_parameters_in_units_of_2_to_the_20_are_the_papers_printed_digits(counted: Profile) -> None:
    rows = {row.name: row for row in counted.rows if row.counts is not None and row.name != "ResNet-50 + GCNet"}
    assert len(rows) == 14
    here = {name: f"{row.counts.parameters / 2**20:.2f}M" for name, row in rows.items()}
    assert here == {name: row.paper.parameters for name, row in rows.items()}


def test_the_papers_figure_of_gcnet_is_in_millions_and_within_a_thousandth_of_what_timms_block_has(
    counted: Profile,
) -> None:
    row = next(row for row in counted.rows if row.name == "ResNet-50 + GCNet")
    assert row.counts.parameters / 1e6 == pytest.approx(28.08, rel=1e-3)


def test_the_rule_of_the_authors_script_gives_the_papers_flops_to_0_3_per_cent_and_multiply_adds_are_lower(
    counted: Profile,
) -> None:
    for row in counted.rows:
        if row.counts is not None:
            unit = 2**20 if row.paper.flops.endswith("M") else 2**30
            printed = unit * float(row.paper.flops[:-1])
            assert row.counts.paper_flops == pytest.approx(printed, rel=3e-3), row.name
            assert row.counts.multiply_adds < 0.993 * printed, row.name


def test_without_gates_three_of_the_four_backbones_have_the_papers_flops_to_the_last_digit(counted: Profile) -> None:
    rows = {row.name: row for row in counted.rows}
    here = {name: rows[name].counts.paper_flops for name in ("ResNet-50", "ResNet-101", "MobileNetV2")}
    assert f"{here['ResNet-50'] / 2**30:.2f}G" == rows["ResNet-50"].paper.flops
    assert f"{here['ResNet-101'] / 2**30:.2f}G" == rows["ResNet-101"].paper.flops
    assert f"{here['MobileNetV2'] / 2**20:.1f}M" == rows["MobileNetV2"].paper.flops


def test_the_docs_have_the_table_that_the_command_prints(counted: Profile) -> None:
    assert str(counted).partition("\n\n")[0] in DOCS.read_text()


def test_the_rule_counts_4_for_a_value_of_a_norm_1_for_one_of_a_relu_and_both_operations_of_a_linear_layer() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 5))

    found = count(Subject("net", build, build, "net", 4), 4)
    assert found.multiply_adds == 3 * 2 * 16 + 32 * 5
    assert found.paper_flops == 3 * 2 * 16 + 4 * 32 + 32 + (2 * 32 - 1) * 5


def test_another_librarys_attention_is_counted_as_a_gate_of_ours_with_its_scaling_of_the_map() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 1), SEModule(16, rd_channels=4, bias=False))

    found = count(Subject("net", build, build, "net", 4), 4)
    layers = 2 * 16 * 4
    assert found.multiply_adds == 3 * 16 * 16 + layers + 16 * 16
    assert found.gate_parameters == layers
    network = build()
    assert multiply_adds(network, (1, 3, 4, 4)) == 3 * 16 * 16 + layers  # unless it is named, its layers alone


def test_counting_leaves_no_hooks() -> None:
    network = eca_resnet18(num_classes=3)
    count(Subject("net", lambda: network, lambda: network, "net", 32, values_matter=True), 32)
    network.eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_the_times_in_the_docs_are_those_of_the_kept_profile_and_so_is_what_they_say_of_gates() -> None:
    kept, docs = (TIMED / "profile.md").read_text(), DOCS.read_text()
    rows = [row for row in json.loads((TIMED / "profile.json").read_text())["rows"] if row["measured"] is not None]
    for row in rows:
        timed = [line for line in kept.splitlines() if line.startswith(f"| {row['name']} | ")][1]
        assert timed in docs
    shares = {row["name"]: row["measured"]["share_of_training"] for row in rows}
    of = {gate: [share for name, share in shares.items() if name.endswith(gate)] for gate in ("ECA", "SE", "CBAM")}
    assert max(share["value"] for share in of["ECA"]) < 0.0055
    assert all(share["low"] < 0 < share["high"] for share in of["ECA"])
    se, cbam = (
        " to ".join(str(round(100 * end(share["value"] for share in of[gate]))) for end in (min, max))
        for gate in ("SE", "CBAM")
    )
    assert f"SE's take {se} %, CBAM's {cbam} %" in docs
    assert f"ECA's gates take at most 0.5 % of a training step, SE's {se} %, CBAM's {cbam} %" in README.read_text()
