"""What threads that wait at a barrier are told, beside what stands in `table`: more slots in the line of arrivals."""

import os
import sys

#: how many sleep; rounds before a thread leaves the processor, now and at most; C's `syscall`
SYNC_SLEEPERS, SYNC_SPINS, SYNC_MOST_SPINS, SYNC_SYSCALL = 1, 2, 3, 4

#: the number of Linux's system call `futex`; 0 where threads can't sleep so, and go on yielding
FUTEX = (
    {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, 0) if sys.platform == "linux" and sys.maxsize > 1 << 32 else 0
)

#: rounds of some 15 nanoseconds: longer than balanced waits, where each thread has a processor; and where there are fewer,
#: so that who waits stands in others' way
MOST_SPINS, LEAST_SPINS = 6_000, 50
