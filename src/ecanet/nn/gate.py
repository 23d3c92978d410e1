"""The base class of every gate: it turns channel means into gates and scales a feature map by them."""

from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.parametrize import is_parametrized

from ecanet.nn.activations import ACTIVATIONS, Activation, check_activation
from ecanet.nn.events import GATE_GETS_FACTOR
from ecanet.nn.factors import check_factor, has_no_value, is_factor, version_of, why_no_factor
from ecanet.nn.hooks import called_differently
from ecanet.nn.inner_layers import has_unregistered_weights
from ecanet.nn.kernel_size import check_channels
from ecanet.nn.tail import eager
from ecanet.nn.tail.maths import GateMaths, ScaleAndShift, Statistics, check_scale_and_shift
from ecanet.ops import reference
from ecanet.ops.backend import PLAIN_TENSORS, decide
from ecanet.ops.kernels import KERNELS
from ecanet.private_torch import count_dispatch_modes, is_tracing, is_transformed


def has_own_maths(own: dict[str, Any]) -> bool:
    """Whether a method was replaced on the gate object itself, so that its class does not tell what it computes.

    Args:
        own: The gate's ``__dict__``.
    """
    # Five separate tests, because this runs at every call: an intersection of sets would visit all attributes.
    return "logits" in own or "activate" in own or "gate" in own or "scaled" in own or "scale_and_shift" in own


class Gate(nn.Module, ABC):
    """A channel-attention module: ``x * factor * sigmoid(logits(channel means of x))``.

    A subclass defines its logits; everything else is here. The modules of the paper's Table 2 differ only in their
    logits. A gate of another form overrides :meth:`scale_and_shift`; one that sees variances as well is an
    :class:`ecanet.nn.MomentGate`, and one that has to see the map itself an :class:`ecanet.nn.MapGate`.

    Args:
        channels: Number of channels C.
        activation: What turns logits into gate values: ``"sigmoid"``, or ``"hard_sigmoid"``, which is
            ``min(max(l / 6 + 1/2, 0), 1)``. By default that of the class.
        factor: Multiplies every gate value. 2 undoes the sigmoid of 0: :meth:`make_identity_`.

    Attributes:
        needs_variances: Whether :meth:`scale_and_shift` needs the variances of the map's channels.
        sees_map: Whether the gate has no :meth:`scale_and_shift`, because statistics are not enough for it.
        activation: What turns logits into gate values.
        channels: Number of channels C.
        scale: The factor as it is stored in files, a tensor without dimensions. It is None if the factor is 1, so that
            such a gate has the keys of the authors' module. It is not used in computations; if it is replaced or
            written to (except through ``scale.data``, which hides that), :attr:`factor` follows.
        starts_as_identity: Whether :meth:`make_identity_` was called. Then ``reset_parameters``, or loading a
            checkpoint from before the gate was inserted, makes the gate 1 again.

    Raises:
        TypeError: ``channels`` is not an integer, ``factor`` is not a number.
        ValueError: ``channels`` below 1, unknown ``activation``, or ``factor`` not finite and above 0.
    """

    needs_variances: ClassVar[bool] = False
    sees_map: ClassVar[bool] = False
    activation: str = "sigmoid"
    scale: Tensor | None

    def __init__(self, channels: int, *, activation: Activation | None = None, factor: float = 1.0) -> None:
        super().__init__()
        check_channels(channels)
        self.channels = channels
        if activation is not None:
            self.activation = check_activation(activation)
        self.starts_as_identity = False
        # Id and version of the ``scale`` that the factor was last read from or written to; whether it was read again.
        self._seen: tuple[int, float] = 0, 0
        self._read_again = False
        self.register_buffer("scale", None)
        self.factor = factor

    @abstractmethod
    def logits(self, s: Tensor) -> Tensor:
        """The input of the activation, ``(N, C)``, from channel means ``(N, C)`` in the accumulation type."""

    @property
    def factor(self) -> float:
        """The number that every gate value is multiplied by.

        Raises:
            RuntimeError: ``scale`` was overwritten by something that is not a factor.
        """
        scale = self._buffers["scale"]
        if scale is None:
            return 1.0
        # Asked at every call, so this is the cheapest check for a change.
        if is_compiling():
            self._read_factor_before_compiling()
        elif (id(scale), version_of(scale)) != self._seen:
            self._read_factor(scale)
        return self._factor

    @factor.setter
    def factor(self, value: float) -> None:
        self._factor = check_factor(value)
        if self._factor != 1:
            GATE_GETS_FACTOR.happens()
        scale = self._buffers["scale"]
        if self._factor == 1:
            self._buffers["scale"] = None
        elif scale is None or scale.is_inference():
            like = next(self.parameters(), scale)
            self._buffers["scale"] = torch.tensor(
                self._factor, dtype=None if like is None else like.dtype, device=None if like is None else like.device
            )
        else:
            with torch.no_grad():
                scale.fill_(self._factor)
        if (scale := self._buffers["scale"]) is not None:
            self._seen, self._read_again = (id(scale), version_of(scale)), False

    @torch.compiler.assume_constant_result
    def _read_factor_before_compiling(self) -> None:
        """Read the factor while a compiler traces, as an eager call would; the compiler then guards the number."""
        scale = self._buffers["scale"]
        if scale is not None and (id(scale), version_of(scale)) != self._seen:
            self._read_factor(scale)

    def _read_factor(self, scale: Tensor) -> None:
        """Read the factor from ``scale``, unless a tracer would record the number as a computed result.

        Reading synchronises a GPU, and DistributedDataParallel writes ``scale`` at every step: on a GPU only the first
        change of a tensor is read.
        """
        if is_tracing() or is_transformed(scale) or has_no_value(scale) or count_dispatch_modes():
            return
        same = id(scale) == self._seen[0]
        if same and self._read_again and not scale.is_cpu:
            return
        problem = why_no_factor(scale)
        if problem is not None:
            raise RuntimeError(
                f"the scale of a {type(self).__name__} gate {problem}: it was overwritten by something that is not a "
                "factor, or not set after to_empty(): load a state dict with gates, or call reset_parameters()"
            )
        if not is_factor(scale, self._factor):
            self._factor = float(scale)
        self._seen, self._read_again = (id(scale), version_of(scale)), same

    def gate(self, s: Tensor) -> Tensor:
        """Gates from channel means.

        Args:
            s: Channel means ``(N, C)``; N may be 0.

        Returns:
            Gates ``(N, C)`` between 0 and ``factor``; float32 for half types, float64 for float64.

        Raises:
            TypeError: ``s`` is not floating point.
            ValueError: ``s`` is not ``(N, C)``.
        """
        return self.scaled(self.activate(self.logits(reference.check_means(s, self.channels))))

    def activate(self, logits: Tensor) -> Tensor:
        """Gate values without the factor, from logits."""
        return ACTIVATIONS[self.activation](logits)

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        """What a map is multiplied by, and what is added to it: ``out = scale * x + shift``.

        Args:
            statistics: Of the map, in the accumulation type; with variances if :attr:`needs_variances` is true.

        Returns:
            The scale ``(N, C)``, times :attr:`factor`, and the shift ``(N, C)``, or None for no shift.
        """
        return self.gate(statistics.means), None

    def statistics(self, x: Tensor) -> Statistics:
        """The statistics of a map that :meth:`scale_and_shift` takes.

        Args:
            x: As :meth:`forward` takes it.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        means = reference.squeeze(x, self.channels)
        if not self.needs_variances:
            return Statistics(means)
        return Statistics(means, reference.variances(x), reference.positions(x))

    def answer(self, x: Tensor) -> ScaleAndShift:
        """What each channel of a map is multiplied by, ``(N, C)``, and what is added to it, ``(N, C)`` or None.

        Args:
            x: As :meth:`forward` takes it.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        return self.scale_and_shift(self.statistics(x))

    def scaled(self, g: Tensor) -> Tensor:
        """Gates times :attr:`factor`, for a subclass with a :meth:`gate` of its own."""
        factor = self.factor
        return g if factor == 1 else g * factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of a feature map by its gate.

        Args:
            x: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions; N may be 0. Without spatial dimensions, x itself
                holds the channel means.

        Returns:
            The shape, type, memory format and device of ``x``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: wrong rank or number of channels, or a spatial size of 0.
            RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run, or a subclass computes with a
                tensor that requires a gradient and is not among its ``parameters()``.
        """
        name = decide(x).name
        if name in KERNELS and x.shape[1] == self.channels and (maths := self.maths()) is not None:
            return eager.norm_gate_add_act(name, x, None, maths, None, 0)
        statistics = self.statistics(x)
        s = statistics.means
        if isinstance(s, Tensor) and s.device.type != "meta" and torch.is_autocast_enabled(s.device.type):
            with reference.no_autocast(s.device.type):  # as in the kernels: autocast would round in a subclass's layers
                return self._applied(x, statistics)
        return self._applied(x, statistics)

    def _applied(self, x: Tensor, statistics: Statistics) -> Tensor:
        scale, shift = check_scale_and_shift(self.scale_and_shift(statistics))
        return reference.scale(x, scale) if shift is None else reference.apply(x, scale, shift, None, 0)

    def maths(self) -> GateMaths | None:
        """The gate as the fused kernels use it: a function of a map's statistics, and the parameters it depends on.

        None if autograd has to go through the gate itself: its layers are hooked, sharded or wrapped, or a method of
        this instance was replaced.
        """
        own = self.__dict__
        if has_own_maths(own):
            return None
        parameters: dict[int, Tensor] = {}  # shared parameters count once
        for module in self.modules():
            if module is not self and called_differently(module):
                return None
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                if type(parameter) not in PLAIN_TENSORS:
                    return None
                parameters[id(parameter)] = parameter
        if not parameters and any(has_unregistered_weights(module) for module in self.modules()):
            return None
        return GateMaths(self.scale_and_shift, tuple(parameters.values()), needs_variances=self.needs_variances)

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set the weights so that the gate is the same constant for every input; it can be trained from there.

        Returns:
            The constant without ``factor``: 1/2 where it is the sigmoid of 0.

        Raises:
            ValueError: the gate has no weights that could make it constant.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be made neutral: no choice of its weights gives a constant gate"
        )

    def make_identity_(self) -> None:
        """Make the gate 1 for every input: neutral weights, and the factor that undoes their constant.

        A trained network that gets such a gate computes the same as before, and nothing else in it changes: in floating
        point, 2 times 1/2 is exactly 1.

        Raises:
            ValueError: as :meth:`make_neutral_`.

        Example:
            >>> from ecanet.nn import ECA
            >>> eca, x = ECA(64), torch.randn(8, 64, 7, 7)
            >>> eca.make_identity_()
            >>> eca.factor, torch.equal(eca(x), x)
            (2.0, True)
        """
        if any(is_parametrized(module) for module in self.modules()):
            raise ValueError(
                f"{type(self).__name__} cannot be made neutral: its weights are computed from others (parametrized); "
                "torch.nn.utils.parametrize.remove_parametrizations makes them plain"
            )
        self.neutral_value = self.make_neutral_()
        self.factor = 1 / self.neutral_value
        self.starts_as_identity = True
        for layer in self.modules():  # the gate is 1 again whichever layer is reset last
            if layer is not self and callable(getattr(type(layer), "reset_parameters", None)):
                vars(layer)["reset_parameters"] = ResetWithGate(self, layer)

    def reset_parameters(self) -> None:
        """Reset the weights: to random values, or those of :meth:`make_identity_` if the gate started as 1.

        ``scale`` is written too, because it has no value after ``to_empty()``. A subclass with its own weights draws
        them and then calls this.
        """
        for layer in self.children():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
        if self.starts_as_identity:
            self.make_identity_()
        elif self._buffers["scale"] is not None:
            self.factor = self._factor

    def has_no_values(self) -> bool:
        """Whether nothing was written since ``to_empty()``: ``scale`` is not the factor, or a tensor is not finite."""
        scale, tensors = self._buffers["scale"], (*self.parameters(), *self.buffers())
        if any(t.is_meta for t in tensors):
            return False
        is_lost = scale is not None and not is_factor(scale, self._factor)
        return is_lost or not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())

    #: The gate's value without its factor when it is neutral: what :meth:`make_neutral_` returns.
    neutral_value: float = 0.5

    @property
    def value_at_start(self) -> float:
        """The gate's value at the start of training, with its present factor; known on the device ``"meta"``, too."""
        return self.neutral_value * self.factor

    def constant(self) -> float | None:
        """The gate's value if its weights make it the same for every input, as neutral weights do; otherwise None.

        It is None for weights on the device ``"meta"``, which have no values.
        """
        if any(weight.is_meta for weight in self.parameters()) or not self.is_neutral():
            return None
        cls = type(self)
        base: Any = next(c for c in cls.__mro__ if "is_neutral" in vars(c))
        known_methods = (base.scale_and_shift, base.gate, cls.logits if base.logits is Gate.logits else base.logits)
        if known_methods == (cls.scale_and_shift, cls.gate, cls.logits) and not has_own_maths(vars(self)):
            return self.value_at_start
        scale, shift = self.try_out()  # a subclass or instance computes something else from these weights
        is_constant = bool((scale == scale[0, 0]).all()) and (shift is None or not bool(shift.any()))
        return float(scale[0, 0]) if is_constant else None

    @torch.no_grad()
    def try_out(self) -> ScaleAndShift:
        """Scale and shift for two samples whose means differ in every channel, in eval mode; the gate does not change.

        Returns:
            ``(2, C)``, and ``(2, C)`` or None.
        """
        like = next(iter((*self.parameters(), *self.buffers())), torch.empty(()))
        dtype = reference.accumulation_dtype(like.dtype)
        means = torch.linspace(-2, 2, 2 * self.channels, dtype=dtype, device=like.device).reshape(2, -1)
        statistics = Statistics(means, means.square() if self.needs_variances else None, 4)
        modes = [(module, module.training) for module in self.modules()]
        try:
            self.eval()  # so that running statistics do not move
            return self.scale_and_shift(statistics)
        finally:
            for module, mode in modes:
                module.training = mode

    def is_neutral(self) -> bool:
        """Whether the weights are those that :meth:`make_neutral_` sets."""
        return False

    def weights_on_means(self) -> tuple[Tensor, ...]:
        """Parameters that, divided by r, compensate for means multiplied by r; empty if there are none."""
        return ()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the factor along with the weights; weights without their factor are an error, strict or not.

        Weights may have more or fewer dimensions of size 1, as those of a 1 x 1 convolution do.
        """
        own = {prefix + name for name, _ in chain(self.named_parameters(), self.named_buffers())} | {f"{prefix}scale"}
        is_ours = all(key in own for key in state_dict if key.startswith(prefix))  # not keys of replaced attention
        for name, weight in self.named_parameters() if is_ours else ():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape != weight.shape and _same_except_ones(given, weight):
                state_dict[prefix + name] = given.reshape(weight.shape)
        names = {name for name, _ in chain(self.named_parameters(), self.named_buffers())} - {"scale"}
        has_weights = not names or any(prefix + name in state_dict for name in names)
        scale = state_dict.get(f"{prefix}scale")
        problem = None
        if has_weights and (scale is not None or names):
            problem = self._why_factor_does_not_fit(scale)
        if problem is not None:
            error_msgs.append(f"{prefix}*: {problem}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._buffers["scale"] is None or scale is None or problem is not None:
            return
        # Without weights, the loader only allocates missing tensors; their values come later.
        keeps = not has_weights or has_no_value(scale) or is_factor(scale, self._factor)
        self.factor = self._factor if keeps else float(scale)

    def _why_factor_does_not_fit(self, given: object) -> str | None:
        """Why weights with this ``scale`` (None if they have none) do not fit this gate; None if they do."""
        has_factor = self._buffers["scale"] is not None
        if given is None:
            if not has_factor or self._factor == 1:
                return None
            return (
                "the weights of a gate of factor 1, as the authors' and timm's are (or one part of a file whose scale "
                f"is in another part), and this gate has the factor {self._factor:g}: load them into gates without a "
                "factor (insert_gates_ with preserve=False, networks with neutral=False); load all parts at once"
            )
        problem = why_no_factor(given)
        if problem is not None:
            return f"scale {problem}, which is not a gate's factor: a factor is one number above 0"
        assert isinstance(given, Tensor)
        if has_factor or has_no_value(given) or is_factor(given, 1.0):
            return None
        return (
            f"the weights of a gate of factor {float(given):g}, and this gate has the factor 1: load them into a gate "
            f"of that factor (insert_gates_ with preserve=True, networks with factor={float(given):g})"
        )

    def extra_repr(self) -> str:
        """Constructor arguments for ``repr``."""
        return ", ".join([*self._arguments(), *([] if self.scale is None else [f"factor={self._factor:g}"])])

    def _arguments(self) -> list[str]:
        """Constructor arguments except ``factor``, as ``repr`` shows them."""
        activation = [] if self.activation == type(self).activation else [f"activation={self.activation!r}"]
        return [f"{self.channels}", *self._options(), *activation]

    def _options(self) -> list[str]:
        """The constructor arguments between the number of channels and the activation, as ``repr`` shows them."""
        return []


class ResetWithGate:
    """``reset_parameters`` of a layer inside a gate that starts as 1."""

    def __init__(self, gate: Gate, layer: nn.Module) -> None:
        self.gate, self.layer = gate, layer

    def __call__(self) -> None:
        """Reset the layer's weights as usual, and make the gate 1 again."""
        type(self.layer).reset_parameters(self.layer)  # type: ignore[attr-defined]
        self.gate.make_identity_()


def _same_except_ones(first: Tensor, second: Tensor) -> bool:
    """Whether two shapes are the same except for dimensions of size 1."""
    return [n for n in first.shape if n != 1] == [n for n in second.shape if n != 1]


class LinearGate(Gate):
    """A gate whose logits are W s for a C x C matrix W: every module of Table 2 except SE."""

    def matrix(self) -> Tensor:
        """The matrix W of Eq. (4) to (6), ``(C, C)``: ``factor * activation(W @ y)`` equals ``gate(y[None])[0]``.

        Differentiable in the gate's weights.
        """
        like = next(self.parameters(), torch.empty(()))
        dtype = reference.accumulation_dtype(like.dtype)
        # Applied to the identity, row j of the logits is what channel j adds to every logit: column j of W.
        return self.logits(torch.eye(self.channels, dtype=dtype, device=like.device)).T

    def weights_on_means(self) -> tuple[Tensor, ...]:
        """All of W, unless it is computed from other parameters."""
        return () if any(is_parametrized(module) for module in self.modules()) else tuple(self.parameters())

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set W = 0; every gate value becomes sigmoid(0) = 1/2."""
        if next(self.parameters(), None) is None:
            return super().make_neutral_()
        for weight in self.parameters():
            weight.zero_()
        return 0.5

    def is_neutral(self) -> bool:
        """Whether W = 0."""
        weights = list(self.parameters())
        return bool(weights) and not any(weight.any() for weight in weights)
