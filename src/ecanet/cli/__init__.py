"""The command ``ecanet VERB``: one file for each verb, named in the table of ``verbs.py``."""

from ecanet.cli.command import main
from ecanet.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
