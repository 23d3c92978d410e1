"""Files: written whole or not at all (``atomic.py``); read without running what they say (``state_dicts.py``)."""
