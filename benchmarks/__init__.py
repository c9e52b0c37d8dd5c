"""Programs that measure; each prints a ratio and writes rows to results/."""
