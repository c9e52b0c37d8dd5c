"""The DeepSeek-V3.2 architecture: configuration, forward pass over paged caches, weights."""
