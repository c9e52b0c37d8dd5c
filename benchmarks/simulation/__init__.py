"""Sessions in virtual time around the real placement, scheduler, caches and retention.

Imported from the system: ``router.placement``, ``router.tool_waits``, ``workers.scheduler``, ``workers.cache``. Of its
own this package has traffic, a clock, the time that a step takes, and bookkeeping; it decides nothing.
"""
