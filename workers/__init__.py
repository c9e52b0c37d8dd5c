"""Ranks: engine, scheduler, caches, model, experts, transfer and their gRPC server. No Ray, no Redis."""
