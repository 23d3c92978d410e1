"""The command ``ecanet VERB``: one module for each verb, listed in the table of ``verbs.py``."""

from ecanet.cli.command import main
from ecanet.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
