"""For the tests of the lessons: nbval does not follow a display that changes."""

import os

os.environ.setdefault("PARDIST_LIVE", "0")
