"""Training on Lightning: recipes, data, and checkpoints that survive a killed run."""

try:
    import lightning  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError(f"ecanet.train needs {error.name}: pip install 'ecanet[train]'") from error

from ecanet.train.checkpoint import TrainedNetwork, load_trained
from ecanet.train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig
from ecanet.train.evaluate import Prediction, Validation, predict, validate
from ecanet.train.explain import Explanation, explain_prediction
from ecanet.train.find_lr import RateSearch, find_learning_rate
from ecanet.train.fit import FitResult, fit
from ecanet.train.networks import build_network

__all__ = [
    "DataConfig",
    "Explanation",
    "FitResult",
    "ModelConfig",
    "OptimConfig",
    "Prediction",
    "RateSearch",
    "Recipe",
    "TrainedNetwork",
    "TrainerConfig",
    "Validation",
    "build_network",
    "explain_prediction",
    "find_learning_rate",
    "fit",
    "load_trained",
    "predict",
    "validate",
]
