"""``python -m ecanet.cli VERB``."""

from ecanet.cli.command import main

if __name__ == "__main__":
    main()
