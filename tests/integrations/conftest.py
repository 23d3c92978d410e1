"""Ultralytics writes its settings when it is imported: not into the home of who runs the tests."""

import atexit
import os
import tempfile
from pathlib import Path

_CONFIG = tempfile.TemporaryDirectory(prefix="ecanet-tests-")
atexit.register(_CONFIG.cleanup)
os.environ["YOLO_CONFIG_DIR"] = _CONFIG.name
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
(Path(_CONFIG.name) / "Ultralytics").mkdir()
(Path(_CONFIG.name) / "Ultralytics" / "Arial.ttf").touch()  # looked for before training, and downloaded if not there
