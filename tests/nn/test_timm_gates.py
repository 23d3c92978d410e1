"""timm's attention layers, named with ``timm:``, are gates in every interface: networks, surgery, files, recipes."""

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn

import ecanet
from ecanet.models import small_eca_resnet
from ecanet.nn import GATES, TimmGate, build_gate, describe_gates
from ecanet.nn.build import NAMED_GATES, gate_factory, gate_name
from ecanet.nn.timm_gates import LAYERS, TIMM_GATES
from ecanet.surgery.insertion_file import Insertion, load, save
from ecanet.train.config import ModelConfig

C = 16
every_layer = pytest.mark.parametrize("name", LAYERS)


def timms_own(name: str) -> nn.Module:
    import timm.layers

    if name != "ge":
        return timm.layers.create_attn(name, C)
    layer = timm.layers.GatherExcite(C, use_mlp=False)  # with it, timm 1.0.31 cannot build one
    layer.mlp = timm.layers.ConvMlp(C, 1)
    return layer


@every_layer
def test_a_gate_returns_what_timms_own_layer_does_with_its_weights_and_gradients(name) -> None:
    gate, own = build_gate(f"timm:{name}", C).double(), timms_own(name).double()
    assert type(gate.layer) is type(own)
    for weight in gate.parameters():  # what starts at 0 would hide the rest
        nn.init.normal_(weight)
    own.load_state_dict(gate.layer.state_dict())
    x = torch.randn(3, C, 7, 5, dtype=torch.float64, requires_grad=True)
    out, want = gate(x), own(x)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    pairs = zip([x, *gate.parameters()], [x, *own.parameters()], strict=True)
    for weight, same in pairs:
        found, wanted = (torch.autograd.grad(y, w, dout, retain_graph=True) for y, w in ((out, weight), (want, same)))
        assert torch.equal(*found, *wanted)


@every_layer
def test_a_neutral_start_is_the_map_itself_of_any_rank_and_stays_so_when_layers_are_reset(name) -> None:
    gate = build_gate(f"timm:{name}", C).eval()
    assert gate.constant() is None or name == "nl", "timm starts that one so"
    gate.make_identity_()
    assert gate.constant() == 1
    gate.reset_parameters()
    gate.layer.get_submodule(LAYERS[name].zeroed[0]).reset_parameters()
    for shape in ((2, C), (2, C, 5), (2, C, 5, 6), (0, C, 3, 3)):
        x = torch.randn(shape)
        assert torch.equal(gate(x), x)
    gate.factor *= 3
    assert torch.equal(gate(x), 3 * x)
    scale, shift = gate.answer(torch.randn(2, C, 5, 6))
    torch.testing.assert_close(scale, torch.full((2, C), 3.0))
    assert shift is None or not shift.any()
    with pytest.raises(ValueError, match="at most two dimensions"):
        gate(torch.randn(2, C, 3, 3, 3))


def test_what_a_layer_adds_is_its_shift() -> None:
    gate, x = build_gate("timm:gca", C, factor=2.0), torch.randn(2, C, 4, 4)
    nn.init.normal_(gate.layer.mlp_add.fc2.weight)
    scale, shift = gate.answer(x)
    assert (scale == 2).all()
    torch.testing.assert_close(2 * x + shift[:, :, None, None], gate(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_go_through_layers_of_single_precision_and_stay_half(dtype) -> None:
    gate, x = build_gate("timm:se", C), torch.randn(2, C, 4, 4)
    half = x.to(dtype)
    assert torch.equal(gate(half), gate(half.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x), gate.layer(x))


def test_surgery_puts_it_in_swaps_it_for_ours_takes_it_out_and_its_file_loads(tmp_path) -> None:
    insertion = Insertion("torchvision/resnet18", "timm:cbam", where="stage", num_classes=4)
    model, (report,) = insertion.build()
    plain, x = torchvision.models.resnet18(num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".gate." not in key})
    assert torch.equal(model(x), plain(x))
    assert report.parameters == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert all(row.multiply_adds for row in report.rows)
    save(model, insertion, tmp_path / "gated.pt")
    again = load(tmp_path / "gated.pt")
    assert [type(module) for module in again.modules() if isinstance(module, TimmGate)] == [TimmGate] * 4
    assert torch.equal(again(x), plain(x))
    with pytest.raises(ValueError, match=r"has a gate already, TimmGate\(64, 'cbam'\), not TimmGate\(64, 'se'"):
        ecanet.insert_gates_(model, "timm:se", "stage", input_shape=(1, 3, 32, 32))
    swapped = ecanet.replace_gates_(copy.deepcopy(model), "cbam", input_shape=(1, 3, 32, 32))
    assert len(swapped.rows) == 4, "layers of timm's inside a gate are no attention of their own"
    assert not ecanet.replace_gates_(model, "timm:cbam", input_shape=(1, 3, 32, 32)).rows
    ecanet.remove_gates_(model)
    assert torch.equal(model(x), plain(x))


def test_networks_and_recipes_take_it_and_a_network_says_it_by_its_name() -> None:
    network = small_eca_resnet(gate="timm:gc", widths=[8, 16], neutral=True, num_classes=3)
    plain = small_eca_resnet(gate=None, widths=[8, 16], num_classes=3)
    x = torch.randn(2, 3, 12, 12)
    own = {key: value for key, value in network.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(own)
    torch.testing.assert_close(network.eval()(x), plain.eval()(x))
    assert ModelConfig(gate="timm:gc").gate == "timm:gc"
    assert gate_name(gate_factory("timm:gc")) == "timm:gc"
    with pytest.raises(ValueError, match="kernel_size=3 was given, but gate='timm:eca' has no kernel size"):
        build_gate("timm:eca", C, kernel_size=3)


def test_they_are_described_by_their_names_and_are_not_among_ours() -> None:
    gates = {gate.name: gate for gate in describe_gates(list(TIMM_GATES))}
    assert list(gates) == list(TIMM_GATES)
    assert set(NAMED_GATES) == {*GATES, *TIMM_GATES}
    assert gates["timm:se"].parameters == sum(p.numel() for p in build_gate("timm:se", 256).parameters())
    assert gates["timm:se"].call == "TimmGate(C, name='se')"
    assert gates["timm:cbam"].neutral_start == "channel.fc2 and spatial.conv.bn = 0, factor 4"
    assert all(gate.formula and gate.source and not gate.fused for gate in gates.values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("timm:cbma", "gate must be one of 'timm:se', .*got 'timm:cbma': did you mean 'timm:cbam'"),
        ("TIMM:gc", "got 'TIMM:gc': did you mean 'timm:gc'"),
        ("coord", "'timm:NAME' for a layer of timm.*got 'coord': did you mean 'timm:coord'"),
        ("timm:", "gate must be one of 'timm:se', .*got 'timm:'$"),
        ("timm:halo", "gate must not be 'timm:halo', because it takes the place of a convolution; .* gates: 'timm:se'"),
        ("timm:bat", "gate must not be 'timm:bat', because it only takes maps that divide into blocks"),
    ],
)
def test_a_wrong_name_is_answered_with_what_would_be_right(wrong, words) -> None:
    for build in (lambda: build_gate(wrong, C), lambda: Insertion("torchvision/resnet18", wrong).build()):
        with pytest.raises(ValueError, match=words):
            build()
    with pytest.raises(ValueError, match=words.removesuffix("$")):
        ModelConfig(gate=wrong)


def test_without_timm_the_error_says_what_to_install_and_ours_need_none(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert build_gate("cbam", C).channels == C
    with pytest.raises(ImportError, match=r"the gate timm:cbam needs timm: pip install 'ecanet\[timm\]'"):
        build_gate("timm:cbam", C)
