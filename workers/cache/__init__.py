"""The caches of a rank: pages, the prefix tree over them, session tails and reservations. Pure Python, no tensors."""
