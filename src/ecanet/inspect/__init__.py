"""Look inside gates: what they cost, what their matrices look like, what they learned. Figures need matplotlib.

Each name is imported where it is first used.
"""

from typing import TYPE_CHECKING

from ecanet.lazy import lazy_names

if TYPE_CHECKING:
    from ecanet.inspect.blocks import plot_se_and_eca
    from ecanet.inspect.confusion import plot_confusion
    from ecanet.inspect.curves import plot_training_curves
    from ecanet.inspect.explanation import plot_explanation
    from ecanet.inspect.kernel_plot import RELEASED_KERNELS, plot_kernel_sizes
    from ecanet.inspect.matrices import plot_matrices
    from ecanet.inspect.per_class import gate_values, plot_gates_per_class
    from ecanet.inspect.responses import Responses, gate_responses, plot_gate_responses
    from ecanet.inspect.sliding import plot_sliding_kernel, save_animation
    from ecanet.networks.cost import gate_parameters, multiply_adds, parameters
    from ecanet.networks.running import gates

__all__ = [
    "RELEASED_KERNELS",
    "Responses",
    "gate_parameters",
    "gate_responses",
    "gate_values",
    "gates",
    "multiply_adds",
    "parameters",
    "plot_confusion",
    "plot_explanation",
    "plot_gate_responses",
    "plot_gates_per_class",
    "plot_kernel_sizes",
    "plot_matrices",
    "plot_se_and_eca",
    "plot_sliding_kernel",
    "plot_training_curves",
    "save_animation",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "blocks": ("plot_se_and_eca",),
        "confusion": ("plot_confusion",),
        "curves": ("plot_training_curves",),
        "explanation": ("plot_explanation",),
        "kernel_plot": ("RELEASED_KERNELS", "plot_kernel_sizes"),
        "matrices": ("plot_matrices",),
        "per_class": ("gate_values", "plot_gates_per_class"),
        "responses": ("Responses", "gate_responses", "plot_gate_responses"),
        "sliding": ("plot_sliding_kernel", "save_animation"),
        ".networks.cost": ("gate_parameters", "multiply_adds", "parameters"),
        ".networks.running": ("gates",),
    },
)
