"""Does LK training raise acceptance? A real target, trained drafts, real speculative decoding."""

import os

# Threads that wait for one another sleep. By default they spin, and where another program wants the core, a pass that
# waits for a spinning thread takes many times as long. It must be said before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
