"""`fastlt pack`: a collection of images becomes the one folder that every loader reads (fastlt/data/packed.py is the other end)."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
