"""How threads wait at a barrier: first awake, for so many rounds, then asleep where the system can."""

import os
import sys

#: the number of Linux's system call `futex`; 0 where threads can't sleep so, and go on yielding
FUTEX = (
    {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, 0) if sys.platform == "linux" and sys.maxsize > 1 << 32 else 0
)

#: rounds of some 15 nanoseconds: longer than balanced waits, where each thread has a processor; and where there are fewer,
#: so that who waits stands in others' way
MOST_SPINS, LEAST_SPINS = 6_000, 50
