"""The bytes of the tiers below the device: host memory, files, and the threads that move pages between them."""
