"""Does LK training raise acceptance? A real target, trained drafts, real speculative decoding."""

import os

# Threads that wait for one another sleep. By default they spin, and on a busy machine they spin away the time of those
# that they wait for. It must be said before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
