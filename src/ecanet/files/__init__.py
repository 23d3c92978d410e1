"""Files: written whole or not at all (``atomic.py``); read without running code in them (``state_dicts.py``)."""
