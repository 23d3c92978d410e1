"""Files: written whole or not at all (``atomic.py``), in folders with one writer at a time (``folder_lock.py``).

They are read without running code in them (``state_dicts.py``).
"""
