"""Gates, the paper's of Table 2 and others, and the tail that joins them to norm and residual."""

from ecanet.nn.build import GATES, GateFactory, GateSpec, build_gate
from ecanet.nn.context import LCT, GaussianGCT
from ecanet.nn.describe import GateDescription, describe_gates
from ecanet.nn.eca import ECA, ECANS
from ecanet.nn.folding import fold_factors_
from ecanet.nn.gate import Gate, LinearGate
from ecanet.nn.keep import ultralytics as _ultralytics
from ecanet.nn.kernel_size import adaptive_kernel_size
from ecanet.nn.maps import CBAM, MapGate, SimAM
from ecanet.nn.moments import GCT, GRN, SRM, MomentGate
from ecanet.nn.se import ESE, SE, SEGroup, SEShift, SEVar1, SEVar2, SEVar3, se_gc2, se_gc3
from ecanet.nn.tail.functional import conv_norm_gate_add_act, norm_gate_add_act
from ecanet.nn.tail.plan import explain
from ecanet.nn.timm_gates import TimmGate

__all__ = [
    "CBAM",
    "ECA",
    "ECANS",
    "ESE",
    "GATES",
    "GCT",
    "GRN",
    "LCT",
    "SE",
    "SRM",
    "Gate",
    "GateDescription",
    "GateFactory",
    "GateSpec",
    "GaussianGCT",
    "LinearGate",
    "MapGate",
    "MomentGate",
    "SEGroup",
    "SEShift",
    "SEVar1",
    "SEVar2",
    "SEVar3",
    "SimAM",
    "TimmGate",
    "adaptive_kernel_size",
    "build_gate",
    "conv_norm_gate_add_act",
    "describe_gates",
    "explain",
    "fold_factors_",
    "norm_gate_add_act",
    "se_gc2",
    "se_gc3",
]

_ultralytics.patch_when_imported()
