"""The short way into the study: `python -m demo`."""

import study  # noqa: F401  # before torch, because it says how its threads wait
