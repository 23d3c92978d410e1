"""``save_pretrained`` / ``from_pretrained`` through huggingface_hub's mixin, and a clear word when it is missing."""

import json
from pathlib import Path
from typing import Any, NoReturn

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:
    _REMEDY = "needs huggingface_hub and safetensors: pip install 'ecanet[hub]'"

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Stands in where huggingface_hub is not installed."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
            """Say what is missing."""
            raise ImportError(f"save_pretrained {_REMEDY}")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
            """Say what is missing."""
            raise ImportError(f"from_pretrained {_REMEDY}")

        def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
            """Say what is missing."""
            raise ImportError(f"push_to_hub {_REMEDY}")


class HubModel(
    PyTorchModelHubMixin,
    library_name="ecanet",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/1910.03151",
    tags=["image-classification", "channel-attention", "eca-net"],
):
    """A network whose constructor arguments (``config``) and weights fit in a folder: config.json, model.safetensors.

    A subclass sets ``config`` to the arguments that build it again.
    """

    config: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and a model card into a folder.

        Args:
            save_directory: The folder; made when it is not there.
            kwargs: Passed on to huggingface_hub's ``PyTorchModelHubMixin.save_pretrained``.

        Returns:
            The commit's URL with ``push_to_hub=True``, otherwise None.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: the network was built from something JSON cannot hold, such as a gate of your own.
        """
        for name, value in self.config.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ValueError(
                    f"save_pretrained cannot write {name}={value!r} to config.json: only gates known by name and plain "
                    "values can be saved; save the weights with torch.save(model.state_dict(), path) instead"
                ) from None
        return super().save_pretrained(save_directory, config=self.config, **kwargs)
